//! One experiment: a machine state and an instruction, and what became of them.
//!
//! Both structures are plain memory, because they travel to the process that runs the instruction
//! on the real CPU (see [`crate::native`]).
use arch::FpuState;

/// Linear address of the two code pages; the page after them is unmapped.
pub const CODE: u64 = 0x2000_0000;
/// Bytes of mapped code.
pub const CODE_SIZE: usize = 0x2000;
/// Linear address of the two writable data pages, which are adjacent in linear space but not in
/// guest-physical space. The pages before and after them are unmapped.
pub const DATA: u64 = 0x2100_1000;
/// Bytes of writable data.
pub const DATA_SIZE: usize = 0x2000;
/// Linear address of one page that can only be read; its neighbours are unmapped.
pub const READ_ONLY: u64 = 0x2100_4000;
/// Bytes that can only be read.
pub const READ_ONLY_SIZE: usize = 0x1000;

/// Selector of 64-bit user code, the same as Linux's, so that CS reads equal.
pub const USER_CODE64: u16 = 0x33;
/// Selector of 32-bit user code, the same as Linux's.
pub const USER_CODE32: u16 = 0x23;
/// Selector of user data, the same as Linux's.
pub const USER_DATA: u16 = 0x2b;

/// HLT, which raises #GP in user mode: fills the code pages, so that control arriving anywhere
/// else ends the run.
pub const STOP: u8 = 0xf4;

/// Where an experiment starts.
#[derive(Clone)]
#[repr(C)]
pub struct Case {
    /// Linear address of the first byte, within the code pages.
    pub rip: u64,
    /// RAX, RCX, … R15: the encoding order.
    pub gpr: [u64; 16],
    /// Only the user's flags count.
    pub rflags: u64,
    /// FS and GS bases (64-bit only).
    pub fs_gs: [u64; 2],
    /// x87, SSE and AVX.
    pub fpu: FpuState,
    /// Length of the instruction in bytes.
    pub length: usize,
    /// The instruction.
    pub bytes: [u8; 16],
    /// Runs as 64-bit code (else 32-bit code in compatibility mode).
    pub wide: bool,
    /// The writable data.
    pub data: [u8; DATA_SIZE],
    /// The read-only data.
    pub read_only: [u8; READ_ONLY_SIZE],
}

impl Case {
    /// The instruction's bytes.
    pub fn code(&self) -> &[u8] {
        &self.bytes[..self.length.min(15)]
    }
}

/// Where an experiment ended: the state at the exception that ended it (#GP where the instruction
/// went through and [`STOP`] came next).
#[derive(Clone)]
#[repr(C)]
pub struct Outcome {
    /// The exception's vector.
    pub vector: u64,
    /// Its error code, 0 where it has none.
    pub error: u64,
    /// CR2 where it was a page fault, else 0.
    pub cr2: u64,
    /// The instruction pointer it saved.
    pub rip: u64,
    /// RAX … R15.
    pub gpr: [u64; 16],
    /// The flags it saved.
    pub rflags: u64,
    /// Selectors ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// FS and GS bases.
    pub fs_gs: [u64; 2],
    /// x87, SSE and AVX.
    pub fpu: FpuState,
    /// The writable data.
    pub data: [u8; DATA_SIZE],
}

impl Outcome {
    /// An outcome to be filled in.
    pub fn empty() -> Self {
        Self {
            vector: 0,
            error: 0,
            cr2: 0,
            rip: 0,
            gpr: [0; 16],
            rflags: 0,
            selectors: [0; 6],
            fs_gs: [0; 2],
            fpu: FpuState([0; FpuState::SIZE]),
            data: [0; DATA_SIZE],
        }
    }
}
