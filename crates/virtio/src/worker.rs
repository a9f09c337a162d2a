//! A thread that serves queues.
use crate::{ActivateError, Transport};
use device::Notify;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

/// A thread, or several that share one notifier, that runs a function each time it is notified;
/// notifications that come while it runs count as one. Dropping it ends the threads after the runs
/// that are under way.
pub struct Worker {
    signal: Arc<Signal>,
    threads: Vec<JoinHandle<()>>,
}

/// An eventfd, so that a kernel can ring without a thread of this process.
pub(crate) struct Signal {
    event: OwnedFd,
    /// The event is signalled and the worker has not seen it: spares system calls.
    pending: AtomicBool,
    ending: AtomicBool,
}

impl Signal {
    /// One that is not signalled.
    pub(crate) fn new() -> Result<Self, ActivateError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|errno| ActivateError::Host { what: "an event", source: errno.into() })?;
        Ok(Self { event, pending: AtomicBool::new(false), ending: AtomicBool::new(false) })
    }

    /// For a thread that waits for other things as well: once this can be read, [`Self::wait`]
    /// does not sleep.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Has all threads end that wait for it.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.raise();
    }

    fn raise(&self) {
        // The one way to fail is a counter at its limit, which is signalled already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Sleeps until notified; answers whether to go on.
    pub(crate) fn wait(&self) -> bool {
        // Interrupted by a signal, it looks once too often.
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
        self.pending.store(false, Ordering::SeqCst);
        let ending = self.ending.load(Ordering::SeqCst);
        if ending {
            // For the next thread.
            self.raise();
        }
        !ending
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
        let mut worker = Self::idle()?;
        worker.add(name, transport, move |_| serve())?;
        Ok(worker)
    }

    /// Starts `threads` of them, for work that waits. A notification wakes one thread that has
    /// nothing to do; the function is given the notifier, with which it wakes a further one where
    /// there is more than it can do at once. Each thread runs it once at first.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_pool(
        name: &str,
        threads: usize,
        transport: &Arc<dyn Transport>,
        serve: impl Fn(&dyn Notify) + Send + Sync + 'static,
    ) -> Result<Self, ActivateError> {
        let mut pool = Self::idle()?;
        let serve = Arc::new(serve);
        for _ in 0..threads {
            let serve = Arc::clone(&serve);
            pool.add(name, transport.clone(), move |notifier| serve(notifier))?;
        }
        Ok(pool)
    }

    fn idle() -> Result<Self, ActivateError> {
        Ok(Self { signal: Arc::new(Signal::new()?), threads: Vec::new() })
    }

    fn add(
        &mut self,
        name: &str,
        transport: Arc<dyn Transport>,
        mut serve: impl FnMut(&dyn Notify) + Send + 'static,
    ) -> Result<(), ActivateError> {
        let signal = self.signal.clone();
        let thread = Builder::new().name(name.to_owned()).spawn(move || {
            let _guard = FailOnPanic(transport);
            serve(&*signal);
            while signal.wait() {
                serve(&*signal);
            }
        });
        let host = |source| ActivateError::Host { what: "a thread", source };
        self.threads.push(thread.map_err(host)?);
        Ok(())
    }

    /// What wakes it.
    pub fn notifier(&self) -> Arc<dyn Notify> {
        self.signal.clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.signal.end();
        for thread in self.threads.drain(..) {
            // A panic has failed the device.
            drop(thread.join());
        }
    }
}

/// Without its worker a device would hang its driver without a word.
pub(crate) struct FailOnPanic(pub(crate) Arc<dyn Transport>);

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
    fn a_pool_serves_while_one_of_its_threads_waits() {
        let (sender, runs) = mpsc::channel();
        let gate = Arc::new(std::sync::Barrier::new(2));
        let transport: Arc<dyn Transport> = Arc::new(RecordingTransport::default());
        let (first, blocked) = (AtomicBool::new(true), gate.clone());
        let pool = Worker::spawn_pool("test", 3, &transport, move |notifier| {
            let _ = sender.send(());
            if first.swap(false, Ordering::SeqCst) {
                notifier.notify();
                blocked.wait();
            }
        })
        .unwrap();
        // Each thread looks once at first, and one is woken.
        for _ in 0..4 {
            runs.recv().unwrap();
        }
        pool.notifier().notify();
        runs.recv().unwrap();
        gate.wait();
        drop(pool);
        while runs.try_recv().is_ok() {}
        assert!(runs.recv().is_err(), "all threads have ended");
    }

    #[test]
    fn a_worker_that_panics_fails_its_device() {
        let transport = Arc::new(RecordingTransport::default());
        let worker = Worker::spawn("test", transport.clone(), || panic!("for the test")).unwrap();
        drop(worker);
        assert!(transport.failed());
    }
}
