//! The part of the CPU's state that decides what an instruction means: the key, beside the
//! address, under which translated code is kept.
use arch::SegmentName;

/// Why a segment needs what checks in translated 16- and 32-bit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SegmentClass {
    /// Base 0, limit 4 GiB, readable and writable (or 64-bit mode): the offset is the address.
    Flat = 0,
    /// As `Flat`, but with a base to add.
    Based = 1,
    /// Everything else: a helper checks each access.
    Checked = 2,
}

/// Everything that translated code assumes about the mode of the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Mode(pub u32);

/// Width of code, operands or addresses by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// 16-bit code.
    Bits16,
    /// 32-bit code.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeSize {
    /// 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// Which software TLB an access goes through: one for each combination of rights that can be in
/// force for ordinary accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum MmuIndex {
    /// CPL 3.
    User = 0,
    /// CPL 0 to 2, user pages barred by SMAP while EFLAGS.AC is clear.
    Supervisor = 1,
    /// CPL 0 to 2 with EFLAGS.AC set under SMAP.
    SupervisorAc = 2,
    /// CPL 3 with alignment checks: never filled, so that each access takes the slow path.
    Aligned = 3,
}

impl MmuIndex {
    /// Number of indexes.
    pub const COUNT: usize = 4;
}

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:expr, $get:ident;)*) => {
        $($(#[$doc])* pub const $name: u32 = 1 << $bit;)*
        $($(#[$doc])* pub const fn $get(self) -> bool { self.0 & Self::$name != 0 })*
    };
}

impl Mode {
    flags! {
        /// SS.B: PUSH and POP use ESP (meaningless in 64-bit mode).
        STACK32 = 2, stack32;
        /// EFLAGS.DF: string instructions count down.
        DOWN = 7, down;
        /// EFLAGS.TF or an armed breakpoint: one instruction at a time, with a check after each.
        STEP = 8, step;
        /// CR0.TS.
        TASK_SWITCHED = 9, task_switched;
        /// CR0.EM.
        EMULATE_FPU = 10, emulate_fpu;
        /// CR0.MP.
        MONITOR_FPU = 11, monitor_fpu;
        /// CR4.OSFXSR: SSE instructions are enabled.
        SSE = 12, sse;
        /// CR4.OSXSAVE and XCR0: AVX instructions are enabled.
        AVX = 13, avx;
        /// Real mode or virtual-8086 mode: segments load as base = selector × 16.
        REAL_SEGMENTS = 14, real_segments;
        /// EFLAGS.VM.
        VIRTUAL_8086 = 15, virtual_8086;
        /// One instruction per block because the next one is in the shadow of STI or MOV SS.
        SHADOW = 16, shadow;
        /// CR4.TSD with CPL above 0: RDTSC faults.
        NO_TSC = 17, no_tsc;
        /// Each access by itself: see `translate::groups`.
        PLAIN = 30, plain;
        /// CR4.SMAP: STAC and CLAC exist.
        SMAP = 31, smap;
    }
    const SEGMENTS: u32 = 18;
    /// Position of the MMU index, two bits.
    pub const MMU_SHIFT: u32 = 5;

    /// Builds a mode from its parts and the flag bits above.
    pub fn new(
        code: CodeSize,
        cpl: u8,
        mmu: MmuIndex,
        segments: [SegmentClass; 6],
        bits: u32,
    ) -> Self {
        let mut key =
            bits | code as u32 | (u32::from(cpl & 3) << 3) | ((mmu as u32) << Self::MMU_SHIFT);
        for (i, class) in segments.iter().enumerate() {
            key |= (*class as u32) << (Self::SEGMENTS + 2 * i as u32);
        }
        Self(key)
    }
    /// The width of the code.
    pub const fn code(self) -> CodeSize {
        match self.0 & 3 {
            0 => CodeSize::Bits16,
            1 => CodeSize::Bits32,
            _ => CodeSize::Bits64,
        }
    }
    /// The privilege level.
    pub const fn cpl(self) -> u8 {
        (self.0 >> 3 & 3) as u8
    }
    /// The mode at another privilege level.
    pub const fn with_cpl(self, cpl: u8) -> Self {
        Self(self.0 & !(3 << 3) | (cpl as u32 & 3) << 3)
    }
    /// The mode with another TLB for ordinary accesses.
    pub const fn with_mmu(self, mmu: MmuIndex) -> Self {
        Self(self.0 & !(3 << Self::MMU_SHIFT) | (mmu as u32) << Self::MMU_SHIFT)
    }
    /// Whether this is 64-bit mode.
    pub const fn is_64(self) -> bool {
        matches!(self.code(), CodeSize::Bits64)
    }
    /// The TLB that ordinary accesses use.
    pub const fn mmu(self) -> MmuIndex {
        match (self.0 >> Self::MMU_SHIFT) & 3 {
            0 => MmuIndex::User,
            1 => MmuIndex::Supervisor,
            2 => MmuIndex::SupervisorAc,
            _ => MmuIndex::Aligned,
        }
    }
    /// What an access through `name` must check: as `segment`, but that nothing can be written
    /// through CS in protected mode (Intel SDM 3A 5.5).
    pub const fn access(self, name: SegmentName, write: bool) -> SegmentClass {
        let cs = matches!(name, SegmentName::Cs);
        if cs && write && !self.is_64() && !self.real_segments() {
            return SegmentClass::Checked;
        }
        self.segment(name as usize)
    }

    /// What accesses through segment register `index` (ES, CS, SS, DS, FS, GS) must check.
    pub const fn segment(self, index: usize) -> SegmentClass {
        match (self.0 >> (Self::SEGMENTS + 2 * index as u32)) & 3 {
            0 => SegmentClass::Flat,
            1 => SegmentClass::Based,
            _ => SegmentClass::Checked,
        }
    }
}
