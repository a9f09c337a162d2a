//! Host signals that belong to a vCPU: faults that the host CPU raises on behalf of the guest,
//! polls, and timers.
//!
//! The handler does nothing but note where translated code was and send it to a thunk that leaves
//! to the run loop; signals outside translated code go to whoever handled them before.
#![allow(unsafe_code)]
use crate::cpu::Cpu;
use crate::thunks;
use crate::vm::pending;
use engine::EngineError;
use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

/// What the handler needs to know of the vCPU on its thread.
#[derive(Clone, Copy)]
struct Current {
    cpu: *mut Cpu,
    code: (u64, u64),
}

thread_local! {
    static CURRENT: Cell<Option<Current>> = const { Cell::new(None) };
}

const FAULTS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];
static PREVIOUS: OnceLock<[libc::sigaction; 4]> = OnceLock::new();

/// The address that a poll loads from once a vCPU is wanted: never mapped, since it is not
/// canonical.
pub const POLL_ATTRACT: u64 = 0x8000_0000_0000_0000;

/// The signal of vCPU timers.
pub fn timer_signal() -> i32 {
    libc::SIGRTMIN() + 3
}

/// Installs the handlers, once in a process.
///
/// # Errors
/// The host refuses a handler.
pub fn install() -> Result<(), EngineError> {
    let mut result = Ok(());
    PREVIOUS.get_or_init(|| {
        // SAFETY: `handler` is async-signal-safe: it reads a const-initialised thread-local and
        // writes plain memory of its own thread.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            action.sa_sigaction = handler as *const () as usize;
            libc::sigfillset(&mut action.sa_mask);
            let mut previous = [std::mem::zeroed::<libc::sigaction>(); 4];
            for (signal, old) in FAULTS.iter().zip(&mut previous) {
                if libc::sigaction(*signal, &action, old) != 0 {
                    result = Err(EngineError::Host {
                        what: format!("cannot install a handler for signal {signal}"),
                        source: std::io::Error::last_os_error(),
                    });
                }
            }
            action.sa_sigaction = timer_handler as *const () as usize;
            libc::sigaction(timer_signal(), &action, null_mut());
            previous
        }
    });
    result
}

/// Gives this thread an alternate stack big enough for frames with vector state.
pub struct AltStack(Vec<u8>);

impl AltStack {
    /// Makes it the thread's.
    pub fn install() -> Self {
        let mut memory = vec![0u8; 64 << 10];
        let stack =
            libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: memory.len() };
        // SAFETY: the memory lives until `drop`, which takes it away from the kernel first.
        unsafe {
            libc::sigaltstack(&stack, null_mut());
        }
        Self(memory)
    }
}

impl Drop for AltStack {
    fn drop(&mut self) {
        let stack = libc::stack_t { ss_sp: null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        // SAFETY: the thread is not on the alternate stack now.
        unsafe {
            libc::sigaltstack(&stack, null_mut());
        }
        self.0.clear();
    }
}

/// Says which vCPU runs on this thread.
pub fn bind(cpu: *mut Cpu, code: (u64, u64)) {
    CURRENT.set(Some(Current { cpu, code }));
}

/// Says that none does.
pub fn unbind() {
    CURRENT.set(None);
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid context to SA_SIGINFO handlers; `current.cpu` is the
    // vCPU of this very thread, which is stopped in translated code if RIP is there.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let registers = &mut context.uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        if let Some(current) = CURRENT.get()
            && (current.code.0..current.code.1).contains(&rip)
        {
            let cpu = current.cpu;
            (*cpu).exit = thunks::exit::SIGNAL;
            (*cpu).exit_detail = rip;
            (*cpu).spill[2] = registers[libc::REG_TRAPNO as usize] as u64;
            registers[libc::REG_RIP as usize] = thunks::signal_target() as i64;
            return;
        }
        chain(signal, info, (context as *mut libc::ucontext_t).cast());
    }
}

/// Passes a signal that is not ours on.
unsafe fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let slot = FAULTS.iter().position(|&s| s == signal);
    let previous = slot.and_then(|i| PREVIOUS.get().map(|p| p[i]));
    // SAFETY: the previous action is what the kernel gave us at `install`; with the default
    // action restored, the faulting instruction runs again and the process dies as it would have.
    unsafe {
        match previous {
            Some(p) if p.sa_sigaction > libc::SIG_IGN && p.sa_flags & libc::SA_SIGINFO != 0 => {
                let call: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(p.sa_sigaction);
                call(signal, info, context);
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

extern "C" fn timer_handler(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(current) = CURRENT.get() {
        // SAFETY: the vCPU of this thread lives while it is bound; only atomics are touched, and
        // the reference-counted VM that `vm` points to.
        unsafe {
            let cpu = current.cpu;
            let (vm, index) = (&(*cpu).vm, (*cpu).index);
            if let Some(mailbox) = vm.mailboxes.get(index as usize) {
                mailbox.pending.fetch_or(pending::TIMER, Ordering::SeqCst);
            }
            (*cpu).poll.store(POLL_ATTRACT, Ordering::SeqCst);
        }
    }
}

/// A host timer that signals one thread.
pub struct HostTimer {
    id: libc::timer_t,
    /// When it will fire, if it is armed.
    pub armed: Option<std::time::Instant>,
}

// SAFETY: a timer id is a number of the process.
unsafe impl Send for HostTimer {}

impl HostTimer {
    /// A timer that signals the calling thread.
    ///
    /// # Errors
    /// The host refuses one.
    pub fn new() -> Result<Self, EngineError> {
        // SAFETY: plain system calls on local structures.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = timer_signal();
            event.sigev_notify_thread_id = libc::syscall(libc::SYS_gettid) as i32;
            let mut id: libc::timer_t = null_mut();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut id) != 0 {
                return Err(EngineError::Host {
                    what: "cannot make a timer for a vCPU; raise the limit on pending signals \
                           (ulimit -i)"
                        .into(),
                    source: std::io::Error::last_os_error(),
                });
            }
            Ok(Self { id, armed: None })
        }
    }

    /// Fires `after` this time from now.
    pub fn arm(&mut self, after: std::time::Duration, at: std::time::Instant) {
        let nanoseconds = after.as_nanos().max(1);
        // SAFETY: as in `new`; the id is valid until `drop`.
        unsafe {
            let mut value: libc::itimerspec = std::mem::zeroed();
            value.it_value.tv_sec = (nanoseconds / 1_000_000_000).min(i64::MAX as u128) as i64;
            value.it_value.tv_nsec = (nanoseconds % 1_000_000_000) as i64;
            libc::timer_settime(self.id, 0, &value, null_mut());
        }
        self.armed = Some(at);
    }
}

impl Drop for HostTimer {
    fn drop(&mut self) {
        // SAFETY: the id came from `timer_create`.
        unsafe {
            libc::timer_delete(self.id);
        }
    }
}
