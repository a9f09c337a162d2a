//! The hand-written assembly between Rust and translated code: entering, leaving, and calls from
//! translated code to Rust helpers.
//!
//! Conventions. In translated code RSP points at the [`Cpu`]; guest registers are where
//! `emit::layout` says. A *call* thunk is reached by `call`, saves all guest registers, calls a
//! Rust function on the stack below the `Cpu`, and either restores them and returns, or goes on in
//! another block that the function names, or leaves to the run loop. A *leave* thunk is reached by `jmp`. Vector registers are saved to `Cpu::area`
//! before any Rust code runs if `vectors_live` says that they are in host registers; only the
//! variants for blocks that use vectors load them again.
#![allow(unsafe_code)]
use crate::cpu::{Cpu, JUMP_CACHE_ENTRIES, JumpCache};
use crate::helpers;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU8, Ordering};

/// Indexes into [`Cpu::thunks`].
#[allow(missing_docs)]
pub mod index {
    pub const LEAVE_EDGE: usize = 0;
    pub const LEAVE_EDGE_SAVED: usize = 1;
    pub const LEAVE_INDIRECT: usize = 2;
    pub const READ: usize = 3;
    pub const WRITE: usize = 4;
    pub const COMMIT: usize = 5;
    pub const SEGMENT: usize = 6;
    pub const EXECUTE: usize = 7;
    pub const GROUP: usize = 8;
    /// Distance from each of the six above to its variant for blocks that use vectors.
    pub const VECTOR: usize = 6;
    pub const LOAD_VECTORS: usize = 15;
    pub const LEAVE_TRANSFER: usize = 16;
    pub const COUNT: usize = 17;
}

/// Why translated code returned, in [`Cpu::exit`].
#[allow(missing_docs)]
pub mod exit {
    /// At the end of a block by edge number `exit_detail`.
    pub const EDGE: u64 = 0;
    /// Indirect jump to guest address `exit_detail`.
    pub const INDIRECT: u64 = 1;
    /// A helper decided; what is to be done is in the CPU's state.
    pub const HELPER: u64 = 2;
    /// A host signal at host address `exit_detail` in translated code.
    pub const SIGNAL: u64 = 3;
}

/// The addresses for [`Cpu::thunks`].
pub fn table() -> [usize; index::COUNT] {
    [
        leave_edge as *const () as usize,
        leave_edge_saved as *const () as usize,
        leave_indirect as *const () as usize,
        read as *const () as usize,
        write as *const () as usize,
        commit as *const () as usize,
        segment as *const () as usize,
        execute as *const () as usize,
        group as *const () as usize,
        read_vector as *const () as usize,
        write_vector as *const () as usize,
        commit_vector as *const () as usize,
        segment_vector as *const () as usize,
        execute_vector as *const () as usize,
        group_vector as *const () as usize,
        load_vectors_at_entry as *const () as usize,
        leave_transfer as *const () as usize,
    ]
}

/// The address to which a signal handler sends a vCPU that faulted in translated code.
pub fn signal_target() -> usize {
    leave_signal as *const () as usize
}

// Register moves shared by all thunks; `$base` is where the Cpu is relative to RSP.
macro_rules! save_registers {
    ($o:literal) => {
        concat!(
            "mov [rsp+",
            $o,
            "+0x00], rax\n",
            "mov [rsp+",
            $o,
            "+0x08], rcx\n",
            "mov [rsp+",
            $o,
            "+0x10], rdx\n",
            "mov [rsp+",
            $o,
            "+0x18], rbx\n",
            "mov [rsp+",
            $o,
            "+0x20], r13\n",
            "mov [rsp+",
            $o,
            "+0x28], rbp\n",
            "mov [rsp+",
            $o,
            "+0x30], r14\n",
            "mov [rsp+",
            $o,
            "+0x38], r15\n",
            "mov [rsp+",
            $o,
            "+0x40], r8\n",
            "mov [rsp+",
            $o,
            "+0x48], r9\n",
            "mov [rsp+",
            $o,
            "+0x50], r10\n",
            "mov [rsp+",
            $o,
            "+0x58], r11\n",
            "mov [rsp+",
            $o,
            "+0x60], r12\n",
        )
    };
}
macro_rules! load_registers {
    ($o:literal) => {
        concat!(
            "mov rax, [rsp+",
            $o,
            "+0x00]\n",
            "mov rcx, [rsp+",
            $o,
            "+0x08]\n",
            "mov rdx, [rsp+",
            $o,
            "+0x10]\n",
            "mov rbx, [rsp+",
            $o,
            "+0x18]\n",
            "mov r13, [rsp+",
            $o,
            "+0x20]\n",
            "mov rbp, [rsp+",
            $o,
            "+0x28]\n",
            "mov r14, [rsp+",
            $o,
            "+0x30]\n",
            "mov r15, [rsp+",
            $o,
            "+0x38]\n",
            "mov r8, [rsp+",
            $o,
            "+0x40]\n",
            "mov r9, [rsp+",
            $o,
            "+0x48]\n",
            "mov r10, [rsp+",
            $o,
            "+0x50]\n",
            "mov r11, [rsp+",
            $o,
            "+0x58]\n",
            "mov r12, [rsp+",
            $o,
            "+0x60]\n",
        )
    };
}
/// Saves flags to `raw_flags`, RAX being saved already.
macro_rules! save_flags {
    ($o:literal) => {
        concat!("lahf\n", "seto al\n", "mov [rsp+", $o, "+{raw_flags}], ax\n")
    };
}
/// Restores flags; clobbers RAX.
macro_rules! load_flags {
    ($o:literal) => {
        concat!("movzx eax, word ptr [rsp+", $o, "+{raw_flags}]\n", "add al, 0x7f\n", "sahf\n")
    };
}
/// Saves vectors if they are live; clobbers RSI and flags.
macro_rules! save_vectors {
    () => {
        "cmp qword ptr [rsp+8+{vectors_live}], 0\n je 2f\n lea rsi, [rsp+8]\n call {save_vectors}\n 2:\n"
    };
}
macro_rules! return_to_rust {
    () => {
        concat!(
            "mov rsp, [rsp+{host_rsp}]\n",
            "pop r15\n",
            "pop r14\n",
            "pop r13\n",
            "pop r12\n",
            "pop rbp\n",
            "pop rbx\n",
            "ret\n"
        )
    };
}

/// Goes on in translated code at the host address in register `$target`, guest flags being in
/// `raw_flags`; if that is zero, returns to the run loop.
macro_rules! resume_or_return {
    ($target:literal) => {
        concat!(
            "mov rsi, ",
            $target,
            "\n",
            "test rsi, rsi\n",
            "jz 4f\n",
            load_registers!("0"),
            "jmp rsi\n",
            "4:\n",
            return_to_rust!()
        )
    };
}

/// Enters translated code at `code` with the guest's registers; returns when it leaves.
///
/// # Safety
/// `cpu` must be the start of the region made by `region::CpuRegion`, and `code` the entry of a
/// valid block of its code cache translated for the present mode, flags being in `raw_flags`.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(cpu: *mut Cpu, code: u64) {
    core::arch::naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rdi+{host_rsp}], rsp",
        "mov rsp, rdi",
        load_registers!("0"),
        "jmp rsi",
        host_rsp = const offset_of!(Cpu, host_rsp),
    )
}

/// RDI: edge number. Guest flags are in host flags.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave_edge() {
    core::arch::naked_asm!(
        save_registers!("0"),
        save_flags!("0"),
        "mov qword ptr [rsp+{exit}], 0",
        "mov [rsp+{exit_detail}], rdi",
        "jmp {leave}",
        raw_flags = const offset_of!(Cpu, raw_flags),
        exit = const offset_of!(Cpu, exit),
        exit_detail = const offset_of!(Cpu, exit_detail),
        leave = sym leave,
    )
}

/// RDI: edge number. Guest flags are in `raw_flags`.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave_edge_saved() {
    core::arch::naked_asm!(
        save_registers!("0"),
        "mov qword ptr [rsp+{exit}], 0",
        "mov [rsp+{exit_detail}], rdi",
        "jmp {leave}",
        exit = const offset_of!(Cpu, exit),
        exit_detail = const offset_of!(Cpu, exit_detail),
        leave = sym leave,
    )
}

/// RDI: guest address to go to, which is not in its first slot of the present mode's jump cache:
/// goes there if it is in the second, else leaves as `leave_transfer`.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave_indirect() {
    core::arch::naked_asm!(
        "mov [rsp+8+{spill}], rax",
        "mov eax, [rsp+8+{mode}]",
        "shr eax, {mmu_shift}",
        "and eax, 3",
        "imul eax, eax, {cache_size}",
        "lea rax, [rsp+rax+8+{jumps}]",
        "mov esi, edi",
        "shr esi, 5",
        "xor esi, edi",
        "and esi, {slot_mask}",
        "xor esi, 1",
        "lea rax, [rax+rsi*8]",
        "cmp rdi, [rax+{pcs}]",
        "jne 2f",
        "mov rsi, [rax+{hosts}]",
        "mov rax, [rsp+8+{spill}]",
        "add rsp, 8",
        "jmp rsi",
        "2:",
        "mov rax, [rsp+8+{spill}]",
        "jmp {leave_transfer}",
        spill = const offset_of!(Cpu, spill),
        mode = const offset_of!(Cpu, mode),
        mmu_shift = const crate::mode::Mode::MMU_SHIFT,
        cache_size = const size_of::<JumpCache>(),
        jumps = const offset_of!(Cpu, jumps),
        slot_mask = const JUMP_CACHE_ENTRIES - 1,
        pcs = const offset_of!(JumpCache, pcs),
        hosts = const offset_of!(JumpCache, hosts),
        leave_transfer = sym leave_transfer,
    )
}

/// RDI: guest address to go to. Guest flags are in `raw_flags`. Called, so that the return address
/// tells where from.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave_transfer() {
    core::arch::naked_asm!(
        "pop rsi",
        "mov [rsp+{exit_from}], rsi",
        save_registers!("0"),
        "mov qword ptr [rsp+{exit}], 1",
        "mov [rsp+{exit_detail}], rdi",
        "jmp {leave}",
        exit = const offset_of!(Cpu, exit),
        exit_detail = const offset_of!(Cpu, exit_detail),
        exit_from = const offset_of!(Cpu, exit_from),
        leave = sym leave,
    )
}

/// Where the signal handler sends us: `exit` and `exit_detail` are set, guest registers and host
/// flags are those of the faulting instruction.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave_signal() {
    core::arch::naked_asm!(
        save_registers!("0"),
        save_flags!("0"),
        "jmp {leave}",
        raw_flags = const offset_of!(Cpu, host_flags),
        leave = sym leave,
    )
}

/// Saves vectors if live and returns to the caller of `enter`.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave() {
    core::arch::naked_asm!(
        "cmp qword ptr [rsp+{vectors_live}], 0",
        "je 2f",
        "mov rsi, rsp",
        "call {save_vectors}",
        "2:",
        return_to_rust!(),
        vectors_live = const offset_of!(Cpu, vectors_live),
        save_vectors = sym save_vectors,
        host_rsp = const offset_of!(Cpu, host_rsp),
    )
}

macro_rules! access_thunk {
    ($(#[$doc:meta])* $name:ident, $helper:path, $after:path) => {
        $(#[$doc])*
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name() {
            core::arch::naked_asm!(
                save_registers!("8"),
                "mov ebx, esi",
                save_vectors!(),
                "mov esi, ebx",
                "mov edx, esi",
                "mov rsi, rdi",
                "lea rdi, [rsp+8]",
                "mov rcx, [rsp]",
                "sub rsp, 8",
                "call {helper}",
                "add rsp, 8",
                "test edx, edx",
                "jz 3f",
                "mov rdi, rax",
                "mov ebx, edx",
                "lea rsi, [rsp+8]",
                "call {after}",
                "mov esi, ebx",
                "and esi, 2",
                load_registers!("8"),
                "ret",
                "3:",
                "add rsp, 8",
                resume_or_return!("rax"),
                helper = sym $helper,
                save_vectors = sym save_vectors,
                after = sym $after,
                vectors_live = const offset_of!(Cpu, vectors_live),
                host_rsp = const offset_of!(Cpu, host_rsp),
            )
        }
    };
}
access_thunk!(
    /// RDI: linear address, ESI: `helpers::AccessInfo`. Returns RDI: host address.
    read, helpers::read, stay_saved
);
access_thunk!(read_vector, helpers::read, load_vectors);
access_thunk!(
    /// As `read`; returns ESI nonzero where the store must be committed.
    write, helpers::write, stay_saved
);
access_thunk!(write_vector, helpers::write, load_vectors);
access_thunk!(
    /// EDI: offset in a segment, ESI: `helpers::AccessInfo`. Returns RDI: linear address.
    segment, helpers::segment, stay_saved
);
access_thunk!(segment_vector, helpers::segment, load_vectors);

access_thunk!(
    /// RDI: lowest linear address of a group, ESI: `helpers::AccessInfo`. Returns RDI: host address.
    group,
    helpers::group,
    stay_saved
);
access_thunk!(group_vector, helpers::group, load_vectors);

macro_rules! commit_thunk {
    ($(#[$doc:meta])* $name:ident, $after:path) => {
        $(#[$doc])*
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name() {
            core::arch::naked_asm!(
                save_registers!("8"),
                save_flags!("8"),
                save_vectors!(),
                "lea rdi, [rsp+8]",
                "mov rsi, [rsp]",
                "sub rsp, 8",
                "call {helper}",
                "add rsp, 8",
                "cmp rax, 1",
                "jne 3f",
                "lea rsi, [rsp+8]",
                "call {after}",
                load_flags!("8"),
                load_registers!("8"),
                "ret",
                "3:",
                "add rsp, 8",
                resume_or_return!("rax"),
                helper = sym helpers::commit,
                save_vectors = sym save_vectors,
                after = sym $after,
                raw_flags = const offset_of!(Cpu, host_flags),
                vectors_live = const offset_of!(Cpu, vectors_live),
                host_rsp = const offset_of!(Cpu, host_rsp),
            )
        }
    };
}
commit_thunk!(
    /// After a store that `write` asked to commit. Keeps all registers and flags.
    commit, stay_saved
);
commit_thunk!(commit_vector, load_vectors);

macro_rules! execute_thunk {
    ($(#[$doc:meta])* $name:ident, $after:path) => {
        $(#[$doc])*
        #[unsafe(naked)]
        unsafe extern "sysv64" fn $name() {
            core::arch::naked_asm!(
                save_registers!("8"),
                save_vectors!(),
                "mov rsi, rdi",
                "lea rdi, [rsp+8]",
                "sub rsp, 8",
                "call {helper}",
                "add rsp, 8",
                "cmp rax, 1",
                "jne 3f",
                "lea rsi, [rsp+8]",
                "call {after}",
                load_flags!("8"),
                load_registers!("8"),
                "ret",
                "3:",
                "add rsp, 8",
                resume_or_return!("rax"),
                helper = sym helpers::execute,
                save_vectors = sym save_vectors,
                after = sym $after,
                raw_flags = const offset_of!(Cpu, raw_flags),
                vectors_live = const offset_of!(Cpu, vectors_live),
                host_rsp = const offset_of!(Cpu, host_rsp),
            )
        }
    };
}
execute_thunk!(
    /// RDI: pointer to the `helpers::Helped`; flags are in `raw_flags` and come back in host flags.
    execute, stay_saved
);
execute_thunk!(execute_vector, load_vectors);

/// Brings the guest's vectors into host registers; for the start of blocks that use them.
/// Clobbers RSI and flags.
#[unsafe(naked)]
unsafe extern "sysv64" fn load_vectors_at_entry() {
    core::arch::naked_asm!("lea rsi, [rsp+8]", "jmp {}", sym load_vectors)
}

/// What the thunks of blocks without vectors do in place of `load_vectors`.
#[unsafe(naked)]
unsafe extern "sysv64" fn stay_saved() {
    core::arch::naked_asm!("ret")
}

/// RSI: the Cpu. Saves YMM0–15 and MXCSR to `Cpu::area`, gives Rust the default MXCSR and marks
/// the vectors as not live. Clobbers RSI and flags.
#[unsafe(naked)]
unsafe extern "sysv64" fn save_vectors() {
    core::arch::naked_asm!(
        "mov qword ptr [rsi+{vectors_live}], 0",
        "lea rsi, [rsi+{area}]",
        "movaps [rsi+160], xmm0", "movaps [rsi+176], xmm1", "movaps [rsi+192], xmm2",
        "movaps [rsi+208], xmm3", "movaps [rsi+224], xmm4", "movaps [rsi+240], xmm5",
        "movaps [rsi+256], xmm6", "movaps [rsi+272], xmm7", "movaps [rsi+288], xmm8",
        "movaps [rsi+304], xmm9", "movaps [rsi+320], xmm10", "movaps [rsi+336], xmm11",
        "movaps [rsi+352], xmm12", "movaps [rsi+368], xmm13", "movaps [rsi+384], xmm14",
        "movaps [rsi+400], xmm15",
        "cmp byte ptr [rip+{have_avx}], 0",
        "je 2f",
        "vextractf128 [rsi+576], ymm0, 1", "vextractf128 [rsi+592], ymm1, 1",
        "vextractf128 [rsi+608], ymm2, 1", "vextractf128 [rsi+624], ymm3, 1",
        "vextractf128 [rsi+640], ymm4, 1", "vextractf128 [rsi+656], ymm5, 1",
        "vextractf128 [rsi+672], ymm6, 1", "vextractf128 [rsi+688], ymm7, 1",
        "vextractf128 [rsi+704], ymm8, 1", "vextractf128 [rsi+720], ymm9, 1",
        "vextractf128 [rsi+736], ymm10, 1", "vextractf128 [rsi+752], ymm11, 1",
        "vextractf128 [rsi+768], ymm12, 1", "vextractf128 [rsi+784], ymm13, 1",
        "vextractf128 [rsi+800], ymm14, 1", "vextractf128 [rsi+816], ymm15, 1",
        "vzeroupper",
        "2:",
        "stmxcsr [rsi+24]",
        "cmp dword ptr [rsi+24], 0x1f80",
        "je 3f",
        "ldmxcsr [rip+{default_mxcsr}]",
        "3:",
        "ret",
        area = const offset_of!(Cpu, area),
        vectors_live = const offset_of!(Cpu, vectors_live),
        have_avx = sym HAVE_AVX,
        default_mxcsr = sym DEFAULT_MXCSR,
    )
}

/// RSI: the Cpu. Loads YMM0–15 and MXCSR from `Cpu::area` and marks them live. Clobbers RSI and
/// flags.
#[unsafe(naked)]
unsafe extern "sysv64" fn load_vectors() {
    core::arch::naked_asm!(
        "mov qword ptr [rsi+{vectors_live}], 1",
        "lea rsi, [rsi+{area}]",
        "movaps xmm0, [rsi+160]", "movaps xmm1, [rsi+176]", "movaps xmm2, [rsi+192]",
        "movaps xmm3, [rsi+208]", "movaps xmm4, [rsi+224]", "movaps xmm5, [rsi+240]",
        "movaps xmm6, [rsi+256]", "movaps xmm7, [rsi+272]", "movaps xmm8, [rsi+288]",
        "movaps xmm9, [rsi+304]", "movaps xmm10, [rsi+320]", "movaps xmm11, [rsi+336]",
        "movaps xmm12, [rsi+352]", "movaps xmm13, [rsi+368]", "movaps xmm14, [rsi+384]",
        "movaps xmm15, [rsi+400]",
        "cmp byte ptr [rip+{have_avx}], 0",
        "je 2f",
        "vinsertf128 ymm0, ymm0, [rsi+576], 1", "vinsertf128 ymm1, ymm1, [rsi+592], 1",
        "vinsertf128 ymm2, ymm2, [rsi+608], 1", "vinsertf128 ymm3, ymm3, [rsi+624], 1",
        "vinsertf128 ymm4, ymm4, [rsi+640], 1", "vinsertf128 ymm5, ymm5, [rsi+656], 1",
        "vinsertf128 ymm6, ymm6, [rsi+672], 1", "vinsertf128 ymm7, ymm7, [rsi+688], 1",
        "vinsertf128 ymm8, ymm8, [rsi+704], 1", "vinsertf128 ymm9, ymm9, [rsi+720], 1",
        "vinsertf128 ymm10, ymm10, [rsi+736], 1", "vinsertf128 ymm11, ymm11, [rsi+752], 1",
        "vinsertf128 ymm12, ymm12, [rsi+768], 1", "vinsertf128 ymm13, ymm13, [rsi+784], 1",
        "vinsertf128 ymm14, ymm14, [rsi+800], 1", "vinsertf128 ymm15, ymm15, [rsi+816], 1",
        "2:",
        "cmp dword ptr [rsi+24], 0x1f80",
        "je 3f",
        "ldmxcsr [rsi+24]",
        "3:",
        "ret",
        area = const offset_of!(Cpu, area),
        vectors_live = const offset_of!(Cpu, vectors_live),
        have_avx = sym HAVE_AVX,
    )
}

static HAVE_AVX: AtomicU8 = AtomicU8::new(0);
static DEFAULT_MXCSR: u32 = 0x1f80;

/// Tells the thunks what the host has. To be called before the first `enter`.
pub fn prepare() {
    HAVE_AVX.store(u8::from(std::arch::is_x86_feature_detected!("avx")), Ordering::SeqCst);
}
