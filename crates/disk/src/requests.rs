//! Asynchronous requests: those of a guest's block device, carried out by a few threads.
//!
//! A request owns its buffer, so that nothing it is given can change or go away under it, and ends
//! with a call of its `done` on one of the threads. Requests that are in the queue together are
//! carried out in any order; a flush covers those that ended before it was submitted.
use crate::{Disk, DiskError};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What a request does. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum Operation {
    /// Fills `buffer`.
    Read {
        /// First byte.
        offset: u64,
        /// What is to be filled.
        buffer: Vec<u8>,
    },
    /// Writes `data`.
    Write {
        /// First byte.
        offset: u64,
        /// What is to be written.
        data: Vec<u8>,
    },
    /// Makes durable what was written.
    Flush,
    /// Says that the content does not matter any more.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// How a request ended.
#[derive(Debug)]
pub struct Completion {
    /// Whether it succeeded.
    pub result: Result<(), DiskError>,
    /// The request's buffer or data, to be used again; empty where it had none.
    pub buffer: Vec<u8>,
}

/// A request, and whom to tell how it ended.
pub struct Request {
    /// What it does.
    pub operation: Operation,
    /// Called once, on another thread. It must not wait for other requests.
    pub done: Box<dyn FnOnce(Completion) + Send>,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("operation", &self.operation).finish_non_exhaustive()
    }
}

/// A queue of requests to one disk, with the threads that carry them out. Dropping it carries out
/// what was submitted, and ends the threads.
pub struct Queue {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    disk: Arc<dyn Disk>,
    state: Mutex<State>,
    /// There is something to do, or the queue ends.
    work: Condvar,
    /// Everything is done.
    idle: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Request>,
    /// Requests that are being carried out.
    active: usize,
    /// Threads that have nothing to do.
    resting: usize,
    ending: bool,
}

impl Queue {
    /// Starts a queue with `threads` threads, at least one.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(disk: Arc<dyn Disk>, threads: usize) -> Result<Self, DiskError> {
        let shared = Arc::new(Shared {
            disk,
            state: Mutex::default(),
            work: Condvar::new(),
            idle: Condvar::new(),
        });
        let mut queue = Self { shared, threads: Vec::new() };
        for index in 0..threads.max(1) {
            let shared = queue.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("disk-{index}"))
                .spawn(move || shared.carry_out())
                .map_err(|source| DiskError::Host {
                    file: "the disk".to_owned(),
                    action: "have threads for its requests",
                    source,
                })?;
            queue.threads.push(thread);
        }
        Ok(queue)
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.shared.disk
    }

    /// Submits a request, without waiting for anything.
    pub fn submit(&self, request: Request) {
        let mut state = self.shared.state();
        state.waiting.push_back(request);
        let wake = state.resting > 0;
        drop(state);
        if wake {
            self.shared.work.notify_one();
        }
    }

    /// Waits until everything that was submitted has ended, its `done` included.
    pub fn drain(&self) {
        let mut state = self.shared.state();
        while !state.waiting.is_empty() || state.active > 0 {
            state = self.shared.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.state().ending = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self) {
        let mut state = self.state();
        loop {
            if let Some(request) = state.waiting.pop_front() {
                state.active += 1;
                drop(state);
                let completion = perform(&*self.disk, request.operation);
                (request.done)(completion);
                state = self.state();
                state.active -= 1;
                if state.active == 0 && state.waiting.is_empty() {
                    self.idle.notify_all();
                }
            } else if state.ending {
                return;
            } else {
                state.resting += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.resting -= 1;
            }
        }
    }
}

fn perform(disk: &dyn Disk, operation: Operation) -> Completion {
    let (result, buffer) = match operation {
        Operation::Read { offset, mut buffer } => (disk.read_at(offset, &mut buffer), buffer),
        Operation::Write { offset, data } => (disk.write_at(offset, &data), data),
        Operation::Flush => (disk.flush(), Vec::new()),
        Operation::Discard { offset, length } => (disk.discard(offset, length), Vec::new()),
        Operation::WriteZeroes { offset, length } => {
            (disk.write_zeroes(offset, length), Vec::new())
        }
    };
    Completion { result, buffer }
}
