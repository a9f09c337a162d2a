//! A thread that serves queues.
use crate::{ActivateError, Transport};
use device::Notify;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

/// A thread that runs a function each time it is notified; notifications that come while it runs
/// count as one. Dropping it ends the thread after the run that is under way.
pub struct Worker {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

/// An eventfd, so that a kernel can ring without a thread of this process.
struct Signal {
    event: OwnedFd,
    /// The event is signalled and the worker has not seen it: spares system calls.
    pending: AtomicBool,
    ending: AtomicBool,
}

impl Signal {
    fn raise(&self) {
        // The one way to fail is a counter at its limit, which is signalled already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Sleeps until notified; answers whether to go on.
    fn wait(&self) -> bool {
        // Interrupted by a signal, it looks once too often.
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
        self.pending.store(false, Ordering::SeqCst);
        !self.ending.load(Ordering::SeqCst)
    }
}

impl Notify for Signal {
    fn notify(&self) {
        if !self.pending.swap(true, Ordering::SeqCst) {
            self.raise();
        }
    }
    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }
}

impl Worker {
    /// Starts a thread of this name (the kernel shows its first 15 bytes). The function runs once
    /// at first, for what is there already. If it panics, the device fails.
    ///
    /// # Errors
    /// The host gives no further thread or file descriptor.
    pub fn spawn(
        name: &str,
        transport: Arc<dyn Transport>,
        mut serve: impl FnMut() + Send + 'static,
    ) -> Result<Self, ActivateError> {
        let host = |what| move |source| ActivateError::Host { what, source };
        let event =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(Into::into).map_err(host("an event"))?;
        let (pending, ending) = (AtomicBool::new(false), AtomicBool::new(false));
        let signal = Arc::new(Signal { event, pending, ending });
        let in_thread = signal.clone();
        let thread = Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _guard = FailOnPanic(transport);
                serve();
                while in_thread.wait() {
                    serve();
                }
            })
            .map_err(host("a thread"))?;
        Ok(Self { signal, thread: Some(thread) })
    }

    /// What wakes it.
    pub fn notifier(&self) -> Arc<dyn Notify> {
        self.signal.clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.signal.ending.store(true, Ordering::SeqCst);
        self.signal.raise();
        if let Some(thread) = self.thread.take() {
            // A panic has failed the device.
            drop(thread.join());
        }
    }
}

/// Without its worker a device would hang its driver without a word.
struct FailOnPanic(Arc<dyn Transport>);

impl Drop for FailOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordingTransport;
    use std::sync::mpsc;

    #[test]
    fn a_worker_looks_at_once_and_after_each_notification() {
        let (sender, runs) = mpsc::channel();
        let transport = Arc::new(RecordingTransport::default());
        let worker = Worker::spawn("test", transport, move || {
            let _ = sender.send(());
        })
        .unwrap();
        runs.recv().unwrap();
        for _ in 0..3 {
            worker.notifier().notify();
            runs.recv().unwrap();
        }
        let event = worker.notifier();
        rustix::io::write(event.event().unwrap(), &1u64.to_ne_bytes()).unwrap();
        runs.recv().unwrap();
        drop(worker);
        assert!(runs.recv().is_err(), "the thread has ended");
    }

    #[test]
    fn a_worker_that_panics_fails_its_device() {
        let transport = Arc::new(RecordingTransport::default());
        let worker = Worker::spawn("test", transport.clone(), || panic!("for the test")).unwrap();
        drop(worker);
        assert!(transport.failed());
    }
}
