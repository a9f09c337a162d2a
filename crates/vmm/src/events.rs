//! What ends or interrupts a machine's run, and the wake-ups of its I/O thread.
use crate::triple_fault::TripleFault;
use crate::vcpu::VcpuControl;
use engine::EngineError;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Wakes the I/O thread from any thread. Wake-ups that arrive together count as one.
#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    /// A new one, not signalled.
    ///
    /// # Errors
    /// Fails where the host gives no further file descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes the descriptor readable.
    pub fn wake(&self) {
        // The one way to fail is a counter at its limit, which is signalled already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes back the wake-ups so far. To lose none, look for work after this, not before.
    pub fn clear(&self) {
        // The one way to fail is that there was none.
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What ends or interrupts the run of a machine's vCPUs.
#[derive(Debug)]
pub enum Stop {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine through a device.
    Reset,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u8),
    /// The host has no room for what the guest wrote to a disk: the machine pauses.
    DiskFull,
    /// A vCPU shut down; hardware answers with a reset.
    TripleFault(Box<TripleFault>),
    /// The engine could not go on.
    EngineFailed {
        /// The vCPU that it ran.
        vcpu: u32,
        /// Why.
        error: EngineError,
    },
}

/// Where vCPUs and devices of one machine (from power-on to reset) say that it ends.
pub struct Events {
    stop: Mutex<Option<Stop>>,
    vcpus: OnceLock<Vec<Arc<VcpuControl>>>,
    wake: Arc<Wake>,
}

impl Events {
    /// No event yet; `wake` wakes the I/O thread.
    pub fn new(wake: Arc<Wake>) -> Self {
        Self { stop: Mutex::new(None), vcpus: OnceLock::new(), wake }
    }

    /// Sets the vCPUs that an event pauses; the first call counts.
    pub fn set_vcpus(&self, vcpus: Vec<Arc<VcpuControl>>) {
        drop(self.vcpus.set(vcpus));
    }

    /// Ends the run: pauses all vCPUs at their next instruction boundary, so that a guest does
    /// nothing more after its last word, and wakes the I/O thread. The first event counts.
    pub fn stop(&self, stop: Stop) {
        self.lock().get_or_insert(stop);
        self.vcpus.get().into_iter().flatten().for_each(|vcpu| vcpu.pause());
        self.wake.wake();
    }

    /// Takes the event out.
    pub fn take(&self) -> Option<Stop> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Stop>> {
        self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
