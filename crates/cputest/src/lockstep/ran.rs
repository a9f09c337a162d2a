//! What became of a guest, and what of it differs from another.
use super::pair::Place;
use crate::case::DATA;
use crate::compare::vector_differences;
use arch::{SegmentName, VcpuState};

/// An exception, as the handler's stack tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // The names are the manual's own.
pub struct Event {
    pub vector: u16,
    /// 0 where the vector has none.
    pub error: u64,
    /// 0 but for page faults.
    pub cr2: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

impl Event {
    /// KVM without hardware behind it emulates a user's instruction that raised #GP, and gives it
    /// #UD where the emulator does not know it.
    fn is_misjudged(&self, right: &Self) -> bool {
        let user = self.cs & 3 == 3;
        user && self.vector == 6 && *right == Self { vector: 13, ..*self }
    }
}

/// What became of a guest.
pub struct Ran {
    /// Its exceptions, in order.
    pub events: Vec<Event>,
    /// Where it ran.
    pub trail: Vec<Place>,
    /// The vCPU's state at the end.
    pub state: VcpuState,
    /// The memory that its code can write.
    pub data: Vec<u8>,
}

impl Ran {
    /// What differs, one line each; empty where both agree. `emulated` says that no hardware is
    /// behind KVM, where `other` ran at least in part.
    pub fn differences(&self, other: &Self, emulated: bool) -> Vec<String> {
        let mut found = Vec::new();
        let agree = |one: &Event, two: &Event| one == two || emulated && two.is_misjudged(one);
        let mut pairs = self.events.iter().zip(&other.events).enumerate();
        if let Some((n, (one, two))) = pairs.find(|(_, (one, two))| !agree(one, two)) {
            found.push(format!("exception {n}: {one:x?}, {two:x?}"));
        }
        let mut check = |name: &str, one: u64, two: u64| {
            if one != two {
                found.push(format!("{name}: {one:#x}, {two:#x}"));
            }
        };
        check("number of exceptions", self.events.len() as u64, other.events.len() as u64);
        let (one, two) = (&self.state, &other.state);
        for (n, (one, two)) in one.gpr.iter().zip(&two.gpr).enumerate() {
            check(&format!("register {n}"), *one, *two);
        }
        check("rip", one.rip, two.rip);
        check("rflags", one.rflags, two.rflags);
        check("cr0", one.cr0, two.cr0);
        check("cr2", one.cr2, two.cr2);
        check("cr3", one.cr3, two.cr3);
        check("cr4", one.cr4, two.cr4);
        check("xcr0", one.xcr0, two.xcr0);
        for name in SegmentName::ALL {
            let (one, two) = (one.segments[name], two.segments[name]);
            check(&format!("selector {name:?}"), one.selector.into(), two.selector.into());
            check(&format!("base {name:?}"), one.base, two.base);
        }
        found.extend(vector_differences(&one.fpu, &two.fpu));
        if let Some(n) = (0..self.data.len()).find(|&n| self.data[n] != other.data[n]) {
            let end = (n + 16).min(self.data.len());
            let (one, two) = (&self.data[n..end], &other.data[n..end]);
            found.push(format!("memory from {:#x}: {one:02x?}, {two:02x?}", DATA + n as u64));
        }
        found
    }
}
