//! Where things are in [`Cpu`](crate::cpu::Cpu), for translated code, and which host register
//! holds which guest register.
use super::asm::{Mem, Reg};
use crate::cpu::{Cpu, System};
use std::mem::offset_of;

/// Holds the linear, then the host address of an access; free between instructions.
pub const ADDRESS: Reg = Reg::RDI;
/// Second scratch register.
pub const SCRATCH: Reg = Reg::RSI;
/// Holds the guest's RSP.
pub const GUEST_RSP: Reg = Reg::R13;

/// The host register that holds guest register `n`, or `None` for R13–R15, which stay in memory.
///
/// RAX, RCX, RDX, RBX and RBP keep their places because instructions name them implicitly, and
/// AH, CH, DH and BH can be encoded only there; the scratch registers are RSI and RDI so that an
/// access through them needs no REX prefix, which would exclude the high bytes.
pub const fn host(n: usize) -> Option<Reg> {
    match n {
        0..=3 | 5 | 8..=12 => Some(Reg(n as u8)),
        4 => Some(GUEST_RSP),
        6 => Some(Reg::R14),
        7 => Some(Reg::R15),
        _ => None,
    }
}

/// The memory home of guest register `n`.
pub const fn gpr(n: usize) -> Mem {
    Mem::cpu(offset_of!(Cpu, gpr) + 8 * n)
}

/// Saved arithmetic flags.
pub const RAW_FLAGS: Mem = Mem::cpu(offset_of!(Cpu, raw_flags));
/// Pointer that polls load through.
pub const POLL: Mem = Mem::cpu(offset_of!(Cpu, poll));
/// Whether vector state is in host registers.
pub const VECTORS_LIVE: Mem = Mem::cpu(offset_of!(Cpu, vectors_live));
/// TSC offset.
pub const TSC_OFFSET: Mem = Mem::cpu(offset_of!(Cpu, tsc_offset));

/// RFLAGS, but for the arithmetic flags.
pub const RFLAGS: Mem = Mem::cpu(offset_of!(Cpu, rflags));
/// The present mode.
pub const MODE: Mem = Mem::cpu(offset_of!(Cpu, mode));
/// The mode of a jump cache.
pub const fn jump_mode(mmu: usize) -> Mem {
    Mem::cpu(offset_of!(Cpu, jump_modes) + 4 * mmu)
}
/// Whether an interrupt may wait.
pub const OUTSTANDING: Mem = Mem::cpu(offset_of!(Cpu, outstanding));
/// PAUSEs to go.
pub const PATIENCE: Mem = Mem::cpu(offset_of!(Cpu, patience));
/// CR2.
pub const CR2: Mem = Mem::cpu(offset_of!(Cpu, sys) + offset_of!(System, cr2));
/// IA32_KERNEL_GS_BASE.
pub const KERNEL_GS_BASE: Mem = Mem::cpu(offset_of!(Cpu, sys) + offset_of!(System, kernel_gs_base));
/// IA32_TSC_AUX.
pub const TSC_AUX: Mem = Mem::cpu(offset_of!(Cpu, sys) + offset_of!(System, tsc_aux));

/// Spill slot `n`: 0, 1 or 4 (2 and 3 belong to Rust code).
pub const fn spill(n: usize) -> Mem {
    Mem::cpu(offset_of!(Cpu, spill) + 8 * n)
}

/// Slot of group `n`.
pub const fn group(n: usize) -> Mem {
    Mem::cpu(offset_of!(Cpu, groups) + 8 * n)
}

/// Base of segment register `n`.
pub const fn segment_base(n: usize) -> Mem {
    Mem::cpu(
        offset_of!(Cpu, segments)
            + n * size_of::<arch::Segment>()
            + offset_of!(arch::Segment, base),
    )
}

/// Displacement of a TLB table from the CPU structure.
pub const fn tlb_table(mmu: usize, write: bool) -> i32 {
    use crate::tlb::{TLB_ENTRIES, Tlb, TlbEntry};
    let table = TLB_ENTRIES * size_of::<TlbEntry>();
    (offset_of!(Cpu, tlb) + offset_of!(Tlb, tables) + (mmu * 2 + write as usize) * table) as i32
}

/// Slot `n` of the recent pages, and how often it may be filled.
pub const fn recent(mmu: usize, write: bool, n: usize) -> (Mem, Mem) {
    use crate::tlb::{RECENT, Tlb, TlbEntry};
    let number = (mmu * 2 + write as usize) * RECENT + n % RECENT;
    let recent = offset_of!(Cpu, tlb) + offset_of!(Tlb, recent);
    let patience = offset_of!(Cpu, tlb) + offset_of!(Tlb, patience);
    (Mem::cpu(recent + number * size_of::<TlbEntry>()), Mem::cpu(patience + number * 4))
}

/// Whether any recent page is known.
pub const RECENT_FILLED: Mem =
    Mem::cpu(offset_of!(Cpu, tlb) + offset_of!(crate::tlb::Tlb, recent_filled));

/// Displacement of the guest addresses of a jump cache.
pub const fn jump_pcs(mmu: usize) -> i32 {
    use crate::cpu::JumpCache;
    (offset_of!(Cpu, jumps) + mmu * size_of::<JumpCache>() + offset_of!(JumpCache, pcs)) as i32
}

/// Displacement of the host addresses of a jump cache.
pub const fn jump_hosts(mmu: usize) -> i32 {
    use crate::cpu::JumpCache;
    (offset_of!(Cpu, jumps) + mmu * size_of::<JumpCache>() + offset_of!(JumpCache, hosts)) as i32
}

/// The pointer to a thunk.
pub const fn thunk(which: usize) -> Mem {
    Mem::cpu(offset_of!(Cpu, thunks) + 8 * which)
}

/// Link cell `n` of jumps that leave a page.
pub const fn cell(n: u32) -> Mem {
    Mem::cpu(offset_of!(Cpu, cells) + 8 * n as usize)
}
