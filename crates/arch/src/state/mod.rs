//! The engine-neutral state of one virtual CPU.
//!
//! The table in this file (`vcpu_state!`) lists everything that a vCPU is, once. From it derive
//! the structure itself ([`VcpuState`]), its values after reset, the [`Element`]s in which it
//! moves from an engine and to one ([`VcpuState::save`], [`VcpuState::restore`]), comparison
//! ([`VcpuState::differences`]) and inspection ([`VcpuState::leaves`]). An engine implements
//! [`StateHolder`], whose methods it cannot write without an answer for each element.
mod inspect;
mod interrupts;
mod msrs;
mod segment;
mod table;
mod vector;

pub use inspect::{Inspect, Value};
pub use interrupts::{Event, InDelivery, InterruptShadow, LapicState, MpState};
pub use msrs::Msrs;
pub use segment::{DescriptorTable, Segment, SegmentName, Segments};
pub use vector::{Avx512State, FpuState};

use crate::registers::{cr0, rflags};
use alloc::string::String;
use alloc::vec::Vec;
use table::vcpu_state;

vcpu_state! {
    /// What modes are made of.
    System "segment and control registers" {
        /// ES to GS, LDTR and TR.
        segments: Segments = Segments::reset(),
        gdtr: DescriptorTable = DescriptorTable { base: 0, limit: 0xffff },
        idtr: DescriptorTable = DescriptorTable { base: 0, limit: 0xffff },
        cr0: u64 = cr0::CD | cr0::NW | cr0::ET,
        cr2: u64 = 0,
        cr3: u64 = 0,
        cr4: u64 = 0,
        efer: u64 = 0,
    }
    /// What programs compute with.
    General "general registers" {
        /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15: the encoding order.
        gpr: [u64; 16] = [0; 16],
        rip: u64 = 0xfff0,
        rflags: u64 = rflags::FIXED,
    }
    /// The components that XSAVE knows.
    Vector "FPU and vector registers" {
        xcr0: u64 = 1,
        /// x87, SSE and AVX.
        fpu: FpuState = FpuState::default(),
        avx512: Avx512State = Avx512State::default(),
        /// The rights that protection keys give to user pages.
        pkru: u32 = 0,
    }
    /// Breakpoints.
    Debug "debug registers" {
        /// DR0–DR3, then DR6 and DR7.
        debug: [u64; 6] = [0, 0, 0, 0, 0xffff_0ff0, 0x400],
    }
    /// The clock; before the MSRs, one of which (TSC_ADJUST) follows it where it is set.
    Clock "time-stamp counter" {
        /// The guest's time-stamp counter at the moment of the save.
        tsc: u64 = 0,
    }
    /// All other model-specific registers.
    Msr "MSRs" {
        msrs: Msrs = Msrs::reset(),
    }
    /// The LAPIC, and interrupts on their way: an engine may have one between the two.
    Interrupts "LAPIC and pending events" {
        lapic: LapicState = LapicState::reset(0),
        events: Event = Event::default(),
    }
    /// Last, because it lets the vCPU go.
    Activity "activity" {
        mp: MpState = MpState::default(),
    }
}

/// What holds a vCPU's state in a form of its own: an engine.
pub trait StateHolder {
    /// Why it cannot.
    type Error;

    /// Whether it can hold all of `state`; changes nothing. [`VcpuState::restore`] asks first.
    ///
    /// # Errors
    /// Names what it has no place for.
    fn check(&mut self, state: &VcpuState) -> Result<(), Self::Error>;

    /// Fills in the fields of an element.
    ///
    /// # Errors
    /// Names the element that cannot be read, or what the neutral state has no place for.
    fn read(&mut self, element: Element, state: &mut VcpuState) -> Result<(), Self::Error>;

    /// Takes over the fields of an element.
    ///
    /// # Errors
    /// Names the element that cannot be set.
    fn write(&mut self, element: Element, state: &VcpuState) -> Result<(), Self::Error>;
}

/// A leaf in which two states differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its path, as in `segments.cs.base`.
    pub path: String,
    /// The first state's value.
    pub first: Value,
    /// The second state's value.
    pub second: Value,
}

impl core::fmt::Display for Difference {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}: {} and {}", self.path, self.first, self.second)
    }
}

impl VcpuState {
    /// The state of the application processor with this APIC id after power-up or RESET: it waits
    /// for its start-up IPI (Intel SDM 3A 9.4.1).
    pub fn reset_application_processor(id: u32) -> Self {
        Self { lapic: LapicState::reset(id), mp: MpState::WaitForSipi, ..Self::reset() }
    }

    /// The whole state of what holds it: last elements first, because what a vCPU does now is
    /// settled by asking for it.
    ///
    /// # Errors
    /// Those of [`StateHolder::read`].
    pub fn save<H: StateHolder>(holder: &mut H) -> Result<Self, H::Error> {
        let mut state = Self::reset();
        Element::ALL.into_iter().rev().try_for_each(|e| holder.read(e, &mut state))?;
        Ok(state)
    }

    /// Replaces the whole state of what holds it.
    ///
    /// # Errors
    /// Those of [`StateHolder::check`], after which the holder has its old state, and of
    /// [`StateHolder::write`].
    pub fn restore<H: StateHolder>(&self, holder: &mut H) -> Result<(), H::Error> {
        holder.check(self)?;
        Element::ALL.into_iter().try_for_each(|e| holder.write(e, self))
    }

    /// All leaves, by path.
    pub fn leaves(&self) -> Vec<(String, Value)> {
        let mut leaves = Vec::new();
        self.inspect("", &mut |path, value| {
            leaves.push((path.trim_start_matches('.').into(), value))
        });
        leaves
    }

    /// Where two states differ.
    pub fn differences(&self, other: &Self) -> Vec<Difference> {
        let pairs = self.leaves().into_iter().zip(other.leaves());
        pairs
            .filter(|((_, first), (_, second))| first != second)
            .map(|((path, first), (_, second))| Difference { path, first, second })
            .collect()
    }
}

impl Default for VcpuState {
    fn default() -> Self {
        Self::reset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msr;

    /// A holder that is nothing but a state, and says in which order it is used.
    #[derive(Default)]
    struct Plain {
        state: VcpuState,
        order: Vec<Element>,
        refuses: bool,
    }

    impl StateHolder for Plain {
        type Error = &'static str;
        fn check(&mut self, _: &VcpuState) -> Result<(), Self::Error> {
            if self.refuses { Err("no place") } else { Ok(()) }
        }
        fn read(&mut self, element: Element, state: &mut VcpuState) -> Result<(), Self::Error> {
            self.order.push(element);
            state.take(element, &self.state);
            Ok(())
        }
        fn write(&mut self, element: Element, state: &VcpuState) -> Result<(), Self::Error> {
            self.order.push(element);
            self.state.take(element, state);
            Ok(())
        }
    }

    fn other() -> VcpuState {
        let mut state = VcpuState::reset();
        state.gpr[3] = 7;
        state.segments[SegmentName::Cs].base = 0x1000;
        state.avx512.high_zmm[5][7] = 9;
        assert!(state.msrs.set(msr::STAR, 3));
        state.events.interrupt_shadow = InterruptShadow::MovSs;
        state.mp = MpState::Halted;
        state
    }

    #[test]
    fn each_element_goes_over_once_and_what_runs_comes_last() {
        let mut holder = Plain::default();
        other().restore(&mut holder).unwrap();
        assert_eq!(holder.state, other());
        assert_eq!(holder.order, Element::ALL);
        holder.order.clear();
        assert_eq!(VcpuState::save(&mut holder).unwrap(), other());
        assert_eq!(holder.order.first(), Some(&Element::Activity));
        assert_eq!(holder.order.len(), Element::ALL.len());
    }

    #[test]
    fn a_holder_that_refuses_a_state_keeps_its_own() {
        let mut holder = Plain { refuses: true, ..Plain::default() };
        assert_eq!(other().restore(&mut holder), Err("no place"));
        assert_eq!(holder.state, VcpuState::reset());
    }

    #[test]
    fn differences_name_the_leaf_and_both_values() {
        let found = VcpuState::reset().differences(&other());
        let text: Vec<_> = found.iter().map(alloc::string::ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "segments.cs.base: 0xffff0000 and 0x1000",
                "gpr[3]: 0x0 and 0x7",
                "avx512.high_zmm[5][7]: 0x0 and 0x9",
                "msrs.star: 0x0 and 0x3",
                "events.interrupt_shadow: none and mov ss",
                "mp: running and halted",
            ]
        );
        assert!(other().same(Element::Debug, &VcpuState::reset()));
        assert!(!other().same(Element::Vector, &VcpuState::reset()));
    }

    #[test]
    fn an_application_processor_waits_and_has_its_own_id() {
        let state = VcpuState::reset_application_processor(5);
        assert_eq!((state.mp, state.lapic.registers[2]), (MpState::WaitForSipi, 5 << 24));
    }
}
