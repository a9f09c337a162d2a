//! Segment registers and descriptor tables.
use super::inspect::{Inspect, Value, fields};
use alloc::format;

/// The six segment registers, in the order in which instructions encode them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum SegmentName {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

impl SegmentName {
    /// All six, in encoding order.
    pub const ALL: [Self; 6] = [Self::Es, Self::Cs, Self::Ss, Self::Ds, Self::Fs, Self::Gs];
}

/// A segment register with its hidden part (Intel SDM 3A 3.4.3 and 3.4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Linear address of the segment's first byte.
    pub base: u64,
    /// Last valid offset in bytes, the granularity bit already applied.
    pub limit: u32,
    /// Descriptor bits 40 to 55 without the limit's upper bits: type (0–3), S (4), DPL (5–6),
    /// P (7), AVL (12), L (13), D/B (14), G (15). Zero in a null ("unusable") segment.
    pub attributes: u16,
}
fields!(Segment { selector, base, limit, attributes });

impl Segment {
    /// S: a code or data segment, not a system one.
    pub const S: u16 = 1 << 4;
    /// P: present.
    pub const P: u16 = 1 << 7;
    /// L: 64-bit code.
    pub const L: u16 = 1 << 13;
    /// D/B: 32-bit default operand size, or 32-bit stack.
    pub const DB: u16 = 1 << 14;
    /// G: the limit counted in pages.
    pub const G: u16 = 1 << 15;

    /// The segment as real mode loads it: base 16 × selector, 64 KiB, read/write data
    /// (or readable code for CS, whose type is the same but for the accessed code bit).
    pub const fn real_mode(selector: u16) -> Self {
        Self { selector, base: (selector as u64) << 4, limit: 0xffff, attributes: 0x93 }
    }
    /// A flat 32-bit or 64-bit segment with the given attributes and a limit of 4 GiB.
    pub const fn flat(selector: u16, attributes: u16) -> Self {
        Self { selector, base: 0, limit: 0xffff_ffff, attributes }
    }
    /// Type field: bits 0–3.
    pub const fn kind(&self) -> u16 {
        self.attributes & 0xf
    }
    /// Descriptor privilege level, 0–3.
    pub const fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }
    /// Whether the present bit is set.
    pub const fn present(&self) -> bool {
        self.attributes & Self::P != 0
    }
    /// Whether this is code (as opposed to data).
    pub const fn is_code(&self) -> bool {
        self.attributes & (Self::S | 8) == (Self::S | 8)
    }
    /// Whether reads are allowed: data, or readable code.
    pub const fn readable(&self) -> bool {
        self.present() && (!self.is_code() || self.attributes & 2 != 0)
    }
    /// Whether writes are allowed: writable data.
    pub const fn writable(&self) -> bool {
        self.present() && !self.is_code() && self.attributes & 2 != 0
    }
    /// Whether this is expand-down data, whose valid offsets lie above the limit.
    pub const fn expand_down(&self) -> bool {
        !self.is_code() && self.attributes & 4 != 0
    }
    /// The D/B bit.
    pub const fn db(&self) -> bool {
        self.attributes & Self::DB != 0
    }
    /// The L bit.
    pub const fn long(&self) -> bool {
        self.attributes & Self::L != 0
    }
}

/// The six segment registers, LDTR and TR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segments {
    /// ES, CS, SS, DS, FS, GS, in that order: index with [`SegmentName`].
    pub regs: [Segment; 6],
    /// The local descriptor table.
    pub ldtr: Segment,
    /// The task register.
    pub tr: Segment,
}

impl Inspect for Segments {
    fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
        const NAMES: [&str; 8] = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];
        let segments = self.regs.iter().chain([&self.ldtr, &self.tr]);
        for (segment, name) in segments.zip(NAMES) {
            segment.inspect(&format!("{path}.{name}"), visit);
        }
    }
}

impl Segments {
    /// The registers after RESET (Intel SDM 3A table 10-1): CS covers the last 64 KiB below 4 GiB.
    pub const fn reset() -> Self {
        const fn system(attributes: u16) -> Segment {
            Segment { selector: 0, base: 0, limit: 0xffff, attributes }
        }
        let mut regs = [Segment::real_mode(0); 6];
        regs[SegmentName::Cs as usize] =
            Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attributes: 0x9b };
        Self { regs, ldtr: system(0x82), tr: system(0x8b) }
    }
}

impl core::ops::Index<SegmentName> for Segments {
    type Output = Segment;
    fn index(&self, name: SegmentName) -> &Segment {
        &self.regs[name as usize]
    }
}
impl core::ops::IndexMut<SegmentName> for Segments {
    fn index_mut(&mut self, name: SegmentName) -> &mut Segment {
        &mut self.regs[name as usize]
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Last valid byte offset.
    pub limit: u16,
}
fields!(DescriptorTable { base, limit });
