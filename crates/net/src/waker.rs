//! Waking a thread that waits for sockets.
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Wakes a thread of a network. Waking one that is awake costs no call of the system.
#[derive(Debug)]
pub(crate) struct Waker {
    event: OwnedFd,
    /// There is something to do since the thread last looked.
    signal: AtomicBool,
    /// The thread waits for sockets, so the event has to be raised.
    asleep: AtomicBool,
}

impl Waker {
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, signal: AtomicBool::new(false), asleep: AtomicBool::new(false) })
    }

    /// Has the thread look for work soon.
    pub fn wake(&self) {
        self.signal.store(true, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It only fails if the counter is at its end, and then the thread is woken already.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// The thread is about to wait. Answers whether it must not, as it was woken before.
    pub fn lie_down(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        self.signal.swap(false, Ordering::SeqCst)
    }

    /// The thread no longer waits, and will look for all work.
    pub fn get_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        self.signal.store(false, Ordering::SeqCst);
    }

    /// Takes the event back.
    pub fn drain(&self) {
        // Without an event there is nothing to take back.
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
