//! How other threads make a running vCPU look up: flags, KVM's immediate exit, and a signal.
//!
//! The order is what makes it work. Whoever wants attention sets a flag, then KVM's
//! `immediate_exit`, then signals the thread. The vCPU's thread clears `immediate_exit` first and
//! reads the flags then, so that no flag can be set unseen: if it is set after the reading,
//! `immediate_exit` is set after the clearing, and the next KVM_RUN returns at once.
#![allow(unsafe_code)]
use engine::{EngineError, Kick};
use kvm_ioctls::VcpuFd;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The signal that interrupts KVM_RUN. The first real-time signals belong to the C library and to
/// the software engine's timers.
fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the signal's handler, which does nothing: the interruption is the message.
///
/// # Errors
/// The host refuses signal handlers.
pub fn install() -> Result<(), EngineError> {
    static RESULT: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = RESULT.get_or_init(|| {
        // SAFETY: all-zero is a valid sigaction; the handler touches nothing at all.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigaction(signal_number(), &raw const action, std::ptr::null_mut())
        };
        if result == 0 { Ok(()) } else { Err(last_errno()) }
    });
    result.map_err(|errno| EngineError::Host {
        what: "the host does not give this process a signal to interrupt vCPUs with".into(),
        source: io::Error::from_raw_os_error(errno),
    })
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
}

/// Where a vCPU runs now.
struct Place {
    thread: libc::pthread_t,
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is used only under the lock of `Attention::place`, from which the vCPU's
// thread takes it out before the memory behind it goes away.
unsafe impl Send for Place {}

/// What others want of one vCPU.
#[derive(Default)]
pub struct Attention {
    kicked: AtomicBool,
    nmi: AtomicBool,
    place: Mutex<Option<Place>>,
}

impl Attention {
    /// Makes the vCPU leave the guest and look at what is wanted. If it does not run, it will
    /// look before it does.
    pub fn call(&self) {
        if let Some(place) = &*self.lock() {
            // SAFETY: `Presence` keeps the run structure alive while the place is filled in, and
            // the thread alive as well: it is the one that empties the place.
            unsafe {
                (*place.immediate_exit).store(1, Ordering::SeqCst);
                libc::pthread_kill(place.thread, signal_number());
            }
        }
    }

    /// Asks for an NMI.
    pub fn want_nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        self.call();
    }

    /// Whether an NMI was asked for since the last call.
    pub fn take_nmi(&self) -> bool {
        self.nmi.load(Ordering::SeqCst) && self.nmi.swap(false, Ordering::SeqCst)
    }

    /// Puts an NMI back that could not be given.
    pub fn has_nmi(&self) -> bool {
        self.nmi.load(Ordering::SeqCst)
    }

    /// Whether the vCPU was kicked since the last call.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Whether a kick waits to be taken.
    pub fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// A panic cannot leave a place half-written.
    fn lock(&self) -> MutexGuard<'_, Option<Place>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kick for Attention {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.call();
    }
}

/// The time in which a vCPU runs on the present thread; others can call it in that time.
pub struct Presence<'a> {
    attention: &'a Attention,
    immediate_exit: *const AtomicU8,
}

impl<'a> Presence<'a> {
    /// Begins.
    pub fn begin(attention: &'a Attention, vcpu: &mut VcpuFd) -> Self {
        let byte = &raw mut vcpu.get_kvm_run().immediate_exit;
        let immediate_exit = byte.cast::<AtomicU8>().cast_const();
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *attention.lock() = Some(Place { thread, immediate_exit });
        Self { attention, immediate_exit }
    }

    /// Takes back the call for attention; the flags are to be read after it.
    pub fn clear(&self) {
        self.set(0);
    }

    /// Makes the next KVM_RUN finish what the last one left undone, and return.
    pub fn only_finish(&self) {
        self.set(1);
    }

    fn set(&self, value: u8) {
        // SAFETY: the run structure is mapped as long as the `VcpuFd`, which outlives `self`: the
        // run loop holds both. Other threads and the kernel access this byte, all atomically.
        unsafe { (*self.immediate_exit).store(value, Ordering::SeqCst) };
    }
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        *self.attention.lock() = None;
        self.clear();
    }
}
