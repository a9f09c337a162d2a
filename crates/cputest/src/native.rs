//! The reference: runs one instruction at a time on the real CPU.
//!
//! A forked child holds the code and data windows at the addresses that the guest uses. It loads
//! the state of a case by returning from a signal with a rewritten frame, and reads the outcome
//! from the frame of the signal that the instruction, or the HLT after it, raises: Linux puts
//! every register, the vector, the error code and CR2 there. So no assembly has to save or load
//! anything, and 32-bit code is a matter of the code selector in the frame.
//!
//! The child is a process of its own because the engine under test may claim the same signals,
//! and because a wild instruction must not take the tests with it.
#![allow(unsafe_code)]

use crate::case::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, Outcome, READ_ONLY, READ_ONLY_SIZE, STOP, USER_CODE32,
    USER_CODE64, USER_DATA,
};
use std::io;
use std::ptr;

/// How many cases travel at a time.
pub const BATCH: usize = 64;

#[repr(C)]
struct Shared {
    count: usize,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// The real CPU, in a child process.
pub struct NativeCpu {
    shared: *mut Shared,
    child: libc::pid_t,
    to_child: libc::c_int,
    from_child: libc::c_int,
}

fn last_error<T>(what: &str) -> io::Result<T> {
    let error = io::Error::last_os_error();
    Err(io::Error::new(error.kind(), format!("{what}: {error}")))
}

impl NativeCpu {
    /// Starts the child.
    ///
    /// # Errors
    /// Fails where the host refuses memory, pipes or a process.
    pub fn start() -> io::Result<Self> {
        let size = size_of::<Shared>();
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing else.
        let shared = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if shared == libc::MAP_FAILED {
            return last_error("mmap of the exchange area");
        }
        let shared = shared.cast::<Shared>();
        let (mut down, mut up) = ([0; 2], [0; 2]);
        // SAFETY: both arrays have room for the two descriptors that pipe2 writes.
        if unsafe {
            libc::pipe2(down.as_mut_ptr(), libc::O_CLOEXEC) < 0
                || libc::pipe2(up.as_mut_ptr(), libc::O_CLOEXEC) < 0
        } {
            return last_error("pipe");
        }
        // SAFETY: after fork the child calls only `child_main`, which neither allocates nor takes
        // a lock, so it does not matter what other threads of the parent held.
        let child = unsafe { libc::fork() };
        if child < 0 {
            return last_error("fork");
        }
        if child == 0 {
            // SAFETY: the descriptors are the child's own copies; it never returns.
            unsafe {
                libc::close(down[1]);
                libc::close(up[0]);
                child_main(shared, down[0], up[1]);
            }
        }
        // SAFETY: the parent's copies of the child's ends; nothing else uses them.
        unsafe {
            libc::close(down[0]);
            libc::close(up[1]);
        }
        Ok(Self { shared, child, to_child: down[1], from_child: up[0] })
    }

    /// Runs up to [`BATCH`] cases.
    ///
    /// # Errors
    /// Fails where the child died or hangs: the message names the case at which it was.
    pub fn run(&mut self, cases: &[Case]) -> io::Result<Vec<Outcome>> {
        let count = cases.len().min(BATCH);
        // SAFETY: `shared` is a live mapping of a `Shared`; the child only reads it between the
        // byte that we write below and the byte that it answers.
        unsafe {
            (*self.shared).count = count;
            ptr::copy_nonoverlapping(
                cases.as_ptr(),
                ptr::addr_of_mut!((*self.shared).cases).cast::<Case>(),
                count,
            );
            mark_not_run(self.shared);
            let mut byte = 1u8;
            if libc::write(self.to_child, ptr::addr_of!(byte).cast(), 1) != 1 {
                return last_error("the native child is gone");
            }
            let mut poll = libc::pollfd { fd: self.from_child, events: libc::POLLIN, revents: 0 };
            let ready = libc::poll(&mut poll, 1, 20_000);
            if ready != 1 || libc::read(self.from_child, ptr::addr_of_mut!(byte).cast(), 1) != 1 {
                let at = ptr::addr_of!((*self.shared).outcomes).cast::<Outcome>();
                let stuck = (0..count).find(|&i| (*at.add(i)).vector == NOT_RUN).unwrap_or(0);
                return Err(io::Error::other(format!(
                    "the native child died or hangs at case {stuck}: {:02x?}",
                    cases[stuck].code()
                )));
            }
            let outcomes = ptr::addr_of!((*self.shared).outcomes).cast::<Outcome>();
            Ok(std::slice::from_raw_parts(outcomes, count).to_vec())
        }
    }
}

/// Marks an outcome that the child has not written yet.
const NOT_RUN: u64 = u64::MAX;

unsafe fn mark_not_run(shared: *mut Shared) {
    for i in 0..BATCH {
        // SAFETY: `i` is within the array of a live mapping.
        unsafe {
            let at = ptr::addr_of_mut!((*shared).outcomes).cast::<Outcome>().add(i);
            (*at).vector = NOT_RUN;
        }
    }
}

impl Drop for NativeCpu {
    fn drop(&mut self) {
        // SAFETY: the child is ours; closing the pipes ends its loop, and the kill ends it where
        // an instruction hung it. The mapping is not used after this.
        unsafe {
            libc::close(self.to_child);
            libc::close(self.from_child);
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, ptr::null_mut(), 0);
            libc::munmap(self.shared.cast(), size_of::<Shared>());
        }
    }
}

/// What the signal handler works on. One case runs at a time, on the child's only thread.
struct Running {
    case: *const Case,
    outcome: *mut Outcome,
    loaded: bool,
    gregs: [i64; 23],
    fpu: [u8; FPU_FRAME],
    fs_base: u64,
    gs_base: u64,
}
/// Bytes of the frame's XSAVE area that a case replaces: legacy region, header, AVX.
const FPU_FRAME: usize = 832;

static mut RUNNING: Running = Running {
    case: ptr::null(),
    outcome: ptr::null_mut(),
    loaded: false,
    gregs: [0; 23],
    fpu: [0; FPU_FRAME],
    fs_base: 0,
    gs_base: 0,
};

unsafe fn map_fixed(address: u64, size: usize, protection: i32, file: i32) -> bool {
    let at = address as usize as *mut libc::c_void;
    let kind = if file < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    let flags = kind | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: NOREPLACE makes the kernel refuse rather than replace a mapping.
    let got = unsafe { libc::mmap(at, size, protection, flags, file, 0) };
    got == at
}

unsafe fn child_main(shared: *mut Shared, from_parent: i32, to_parent: i32) -> ! {
    // SAFETY: runs in a freshly forked single-threaded process that owns all it touches.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let stack = libc::mmap(
            ptr::null_mut(),
            0x2_0000,
            rw,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        // The code pages are executable at their address and writable only at another one.
        let file = libc::memfd_create(c"code".as_ptr(), libc::MFD_CLOEXEC);
        let alias = if libc::ftruncate(file, CODE_SIZE as i64) == 0 {
            libc::mmap(ptr::null_mut(), CODE_SIZE, rw, libc::MAP_SHARED, file, 0)
        } else {
            libc::MAP_FAILED
        };
        if alias == libc::MAP_FAILED
            || !map_fixed(CODE, CODE_SIZE, libc::PROT_READ | libc::PROT_EXEC, file)
            || !map_fixed(DATA, DATA_SIZE, rw, -1)
            || !map_fixed(READ_ONLY, READ_ONLY_SIZE, rw, -1)
            || stack == libc::MAP_FAILED
        {
            libc::_exit(3);
        }
        let alt = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: 0x2_0000 };
        libc::sigaltstack(&alt, ptr::null_mut());
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = signal_entry as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigaction(signal, &action, ptr::null_mut());
        }
        load_data_selectors();
        let alias = alias.cast::<u8>();
        ptr::write_bytes(alias, STOP, CODE_SIZE);
        loop {
            let mut byte = 0u8;
            if libc::read(from_parent, ptr::addr_of_mut!(byte).cast(), 1) != 1 {
                libc::_exit(0);
            }
            let cases = ptr::addr_of!((*shared).cases).cast::<Case>();
            let outcomes = ptr::addr_of_mut!((*shared).outcomes).cast::<Outcome>();
            for i in 0..(*shared).count.min(BATCH) {
                run_one(cases.add(i), outcomes.add(i), alias);
            }
            if libc::write(to_parent, ptr::addr_of!(byte).cast(), 1) != 1 {
                libc::_exit(0);
            }
        }
    }
}

unsafe fn run_one(case: *const Case, outcome: *mut Outcome, alias: *mut u8) {
    // SAFETY: the windows are mapped at these addresses; `case` and `outcome` are elements of the
    // exchange area; the INT3 enters the handler, which brings us back behind it with all
    // registers as they were.
    unsafe {
        let c = &*case;
        libc::mprotect(READ_ONLY as *mut _, READ_ONLY_SIZE, libc::PROT_READ | libc::PROT_WRITE);
        ptr::copy_nonoverlapping(c.data.as_ptr(), DATA as *mut u8, DATA_SIZE);
        ptr::copy_nonoverlapping(c.read_only.as_ptr(), READ_ONLY as *mut u8, READ_ONLY_SIZE);
        libc::mprotect(READ_ONLY as *mut _, READ_ONLY_SIZE, libc::PROT_READ);
        let room = (CODE + CODE_SIZE as u64).saturating_sub(c.rip).min(c.length as u64) as usize;
        let code = alias.add((c.rip - CODE) as usize);
        ptr::copy_nonoverlapping(c.bytes.as_ptr(), code, room);
        let running = ptr::addr_of_mut!(RUNNING);
        (*running).case = case;
        (*running).outcome = outcome;
        (*running).loaded = false;
        core::arch::asm!("int3");
        ptr::copy_nonoverlapping(
            DATA as *const u8,
            ptr::addr_of_mut!((*outcome).data).cast(),
            DATA_SIZE,
        );
        ptr::write_bytes(code, STOP, room);
    }
}

unsafe fn load_data_selectors() {
    // SAFETY: 64-bit code does not use DS and ES; the selector is Linux's user data segment.
    unsafe { core::arch::asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) u32::from(USER_DATA)) };
}

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;

/// arch_prctl without libc, whose errno would go through the FS base that is being changed.
unsafe fn arch_prctl(code: u64, value: u64) {
    // SAFETY: the kernel validates the arguments; RCX and R11 are what SYSCALL clobbers.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_arch_prctl => _,
            in("rdi") code,
            in("rsi") value,
            out("rcx") _,
            out("r11") _,
        );
    }
}
unsafe fn base(code: u64) -> u64 {
    let mut value = 0u64;
    // SAFETY: the kernel writes 8 bytes to `value`.
    unsafe { arch_prctl(code, ptr::addr_of_mut!(value) as u64) };
    // SAFETY: a plain local; volatile because the asm wrote it behind the compiler's back.
    unsafe { ptr::addr_of!(value).read_volatile() }
}

/// Signals arrive with the case's AC flag still set, with which Rust code must not run.
#[unsafe(naked)]
unsafe extern "C" fn signal_entry(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    core::arch::naked_asm!(
        "pushfq",
        "and qword ptr [rsp], {keep}",
        "popfq",
        "jmp {handler}",
        keep = const !0x4_0000i32,
        handler = sym on_signal,
    )
}

/// Frame index of each general register in encoding order.
const GREG: [usize; 16] = {
    use libc::*;
    [
        REG_RAX as usize,
        REG_RCX as usize,
        REG_RDX as usize,
        REG_RBX as usize,
        REG_RSP as usize,
        REG_RBP as usize,
        REG_RSI as usize,
        REG_RDI as usize,
        REG_R8 as usize,
        REG_R9 as usize,
        REG_R10 as usize,
        REG_R11 as usize,
        REG_R12 as usize,
        REG_R13 as usize,
        REG_R14 as usize,
        REG_R15 as usize,
    ]
};

unsafe extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext whose fpregs point at an XSAVE area (the child
    // runs only where AVX exists). This code uses no thread-local storage, so the case's FS base
    // does not matter until it is replaced.
    unsafe {
        let context = context.cast::<libc::ucontext_t>();
        let gregs = ptr::addr_of_mut!((*context).uc_mcontext.gregs).cast::<i64>();
        let fpu = (*context).uc_mcontext.fpregs.cast::<u8>();
        let running = ptr::addr_of_mut!(RUNNING);
        if (*running).loaded {
            save(running, gregs, fpu);
        } else {
            load(running, gregs, fpu);
        }
    }
}

unsafe fn load(running: *mut Running, gregs: *mut i64, fpu: *mut u8) {
    // SAFETY: see `on_signal`; the frame's arrays have at least the sizes copied here.
    unsafe {
        ptr::copy_nonoverlapping(gregs, ptr::addr_of_mut!((*running).gregs).cast(), 23);
        ptr::copy_nonoverlapping(fpu, ptr::addr_of_mut!((*running).fpu).cast(), FPU_FRAME);
        (*running).fs_base = base(ARCH_GET_FS);
        (*running).gs_base = base(ARCH_GET_GS);
        (*running).loaded = true;
        let case = &*(*running).case;
        for (value, index) in case.gpr.iter().zip(GREG) {
            *gregs.add(index) = *value as i64;
        }
        *gregs.add(libc::REG_RIP as usize) = case.rip as i64;
        *gregs.add(libc::REG_EFL as usize) = case.rflags as i64;
        let code = if case.wide { USER_CODE64 } else { USER_CODE32 };
        let selectors = u64::from(code) | u64::from(USER_DATA) << 48;
        *gregs.add(libc::REG_CSGSFS as usize) = selectors as i64;
        // Bytes 464 to 511 describe the frame to the kernel; components beyond AVX go to their
        // initial state.
        ptr::copy_nonoverlapping(case.fpu.0.as_ptr(), fpu, 464);
        ptr::copy_nonoverlapping(case.fpu.0.as_ptr().add(512), fpu.add(512), FPU_FRAME - 512);
        fpu.add(512).cast::<u64>().write_unaligned(7);
        if case.wide {
            arch_prctl(ARCH_SET_GS, case.fs_gs[1]);
            arch_prctl(ARCH_SET_FS, case.fs_gs[0]);
        }
    }
}

unsafe fn save(running: *mut Running, gregs: *mut i64, fpu: *mut u8) {
    // SAFETY: see `load`.
    unsafe {
        let out = (*running).outcome;
        let mut selectors = [0u32; 4];
        core::arch::asm!(
            "mov {0:e}, es", "mov {1:e}, ds", "mov {2:e}, fs", "mov {3:e}, gs",
            lateout(reg) selectors[0], lateout(reg) selectors[1],
            lateout(reg) selectors[2], lateout(reg) selectors[3],
        );
        (*out).fs_gs = [base(ARCH_GET_FS), base(ARCH_GET_GS)];
        arch_prctl(ARCH_SET_GS, (*running).gs_base);
        arch_prctl(ARCH_SET_FS, (*running).fs_base);
        load_data_selectors();
        let code = *gregs.add(libc::REG_CSGSFS as usize) as u64;
        (*out).selectors = [
            selectors[0] as u16,
            code as u16,
            (code >> 48) as u16,
            selectors[1] as u16,
            selectors[2] as u16,
            selectors[3] as u16,
        ];
        for (n, index) in GREG.into_iter().enumerate() {
            *ptr::addr_of_mut!((*out).gpr).cast::<u64>().add(n) = *gregs.add(index) as u64;
        }
        let vector = *gregs.add(libc::REG_TRAPNO as usize) as u64;
        (*out).error = *gregs.add(libc::REG_ERR as usize) as u64;
        (*out).cr2 = if vector == 14 { *gregs.add(libc::REG_CR2 as usize) as u64 } else { 0 };
        (*out).rip = *gregs.add(libc::REG_RIP as usize) as u64;
        (*out).rflags = *gregs.add(libc::REG_EFL as usize) as u64;
        ptr::copy_nonoverlapping(fpu, ptr::addr_of_mut!((*out).fpu).cast(), FPU_FRAME);
        (*out).vector = vector;
        (*running).loaded = false;
        ptr::copy_nonoverlapping(ptr::addr_of!((*running).gregs).cast(), gregs, 23);
        ptr::copy_nonoverlapping(ptr::addr_of!((*running).fpu).cast(), fpu, FPU_FRAME);
    }
}
