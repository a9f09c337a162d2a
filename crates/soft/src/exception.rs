//! Exceptions as values: what a helper returns when the guest's instruction faults.
use arch::registers::vector;

/// A fault, trap or abort to deliver to the guest (Intel SDM 3A 6.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// The error code pushed, for the vectors that have one.
    pub error: Option<u32>,
    /// The linear address that goes to CR2, for page faults.
    pub cr2: Option<u64>,
    /// DR6 bits to set, for debug exceptions.
    pub dr6: u64,
}

impl Exception {
    const fn plain(vector: u8) -> Self {
        Self { vector, error: None, cr2: None, dr6: 0 }
    }
    const fn coded(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), cr2: None, dr6: 0 }
    }
    /// #DE, divide error.
    pub const DIVIDE: Self = Self::plain(vector::DE);
    /// #UD, invalid opcode.
    pub const INVALID_OPCODE: Self = Self::plain(vector::UD);
    /// #NM, device not available.
    pub const NO_FPU: Self = Self::plain(vector::NM);
    /// #BR, bound range exceeded.
    pub const BOUND: Self = Self::plain(vector::BR);
    /// #MF, x87 floating-point error.
    pub const X87: Self = Self::plain(vector::MF);
    /// #XM, SIMD floating-point exception.
    pub const SIMD: Self = Self::plain(vector::XM);
    /// #AC(0), alignment check.
    pub const ALIGNMENT: Self = Self::coded(vector::AC, 0);
    /// #GP(0), general protection without a selector.
    pub const GP0: Self = Self::coded(vector::GP, 0);
    /// #SS(0), stack fault without a selector.
    pub const SS0: Self = Self::coded(vector::SS, 0);

    /// #GP(code): `code` is a selector with the EXT and IDT bits as the case demands.
    pub const fn gp(code: u32) -> Self {
        Self::coded(vector::GP, code)
    }
    /// #SS(code).
    pub const fn ss(code: u32) -> Self {
        Self::coded(vector::SS, code)
    }
    /// #TS(code).
    pub const fn ts(code: u32) -> Self {
        Self::coded(vector::TS, code)
    }
    /// #NP(code).
    pub const fn np(code: u32) -> Self {
        Self::coded(vector::NP, code)
    }
    /// #PF with its error code and the faulting linear address.
    pub const fn page_fault(error: u32, address: u64) -> Self {
        Self { vector: vector::PF, error: Some(error), cr2: Some(address), dr6: 0 }
    }
    /// #DB with the bits to set in DR6.
    pub const fn debug(dr6: u64) -> Self {
        Self { vector: vector::DB, error: None, cr2: None, dr6 }
    }
}

/// How execution goes on after a helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// With the next instruction of the same block; neither RIP nor the mode changed.
    Next,
    /// At `Cpu::rip`, which the helper set, perhaps in another mode.
    Jump,
    /// At the next instruction, but the mode, an interrupt window or translated code may have
    /// changed: leave the block there.
    Leave,
    /// HLT: wait for an interrupt, then go on at the next instruction.
    Halt,
}
