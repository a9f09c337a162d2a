//! The engine-neutral state of one virtual CPU.
use crate::registers::{cr0, rflags};
use alloc::vec::Vec;

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

/// x87, SSE and AVX registers: the standard-format XSAVE area (Intel SDM 1 13.4) up to and with
/// the AVX component, 832 bytes. Components beyond it are not offered to guests.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FpuState(pub [u8; Self::SIZE]);

impl FpuState {
    /// Bytes of the legacy region, the header and the AVX component.
    pub const SIZE: usize = 832;
}
impl core::fmt::Debug for FpuState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("FpuState { .. }")
    }
}
impl Default for FpuState {
    /// The state after INIT or power-up: FCW 037FH as FNINIT leaves it, MXCSR 1F80H, registers
    /// zero, all components marked as in use.
    fn default() -> Self {
        let mut area = [0; Self::SIZE];
        area[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        area[512] = 7;
        Self(area)
    }
}

/// An MSR and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrState {
    /// The register's number, as RDMSR takes it in ECX.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The local APIC: its registers page as xAPIC lays it out (Intel SDM 3A table 10-1), 64 words of
/// which every fourth 32-bit word counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LapicState {
    /// Register at offset `16 * n`.
    pub registers: [u32; 64],
    /// TSC value at which the deadline timer fires, 0 when it is not armed.
    pub tsc_deadline: u64,
}
impl Default for LapicState {
    fn default() -> Self {
        Self { registers: [0; 64], tsc_deadline: 0 }
    }
}

/// Whether the vCPU takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Running,
    /// Waits in HLT for an interrupt.
    Halted,
    /// Waits for INIT and start-up IPI (application processors after reset).
    WaitForSipi,
}

/// Events between instructions that a snapshot must carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Event {
    /// STI or MOV SS inhibits interrupts until after the next instruction.
    pub interrupt_shadow: bool,
    /// An NMI waits to be delivered.
    pub nmi_pending: bool,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
}

/// Everything that a virtual CPU is, independent of the engine that runs it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct VcpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15: the encoding order.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub segments: Segments,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// DR0–DR3, then DR6 and DR7.
    pub debug: [u64; 6],
    pub efer: u64,
    pub xcr0: u64,
    pub fpu: FpuState,
    /// All other MSRs that hold state; a missing one keeps its reset value.
    pub msrs: Vec<MsrState>,
    pub lapic: LapicState,
    pub mp: MpState,
    pub events: Event,
    /// The guest's time-stamp counter at the moment of the save.
    pub tsc: u64,
}

impl VcpuState {
    /// The state after power-up or RESET (Intel SDM 3A table 9-1): real mode at FFFF_FFF0H.
    pub fn reset() -> Self {
        let data = Segment::real_mode(0);
        let mut segments = Segments {
            regs: [data; 6],
            ldtr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x82 },
            tr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x8b },
        };
        segments[SegmentName::Cs] =
            Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attributes: 0x9b };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segments,
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            efer: 0,
            xcr0: 1,
            fpu: FpuState::default(),
            msrs: Vec::new(),
            lapic: LapicState::default(),
            mp: MpState::Running,
            events: Event::default(),
            tsc: 0,
        }
    }
}

impl Default for VcpuState {
    fn default() -> Self {
        Self::reset()
    }
}
