//! The device at work, from one activation to the end of it.
use super::request::{self, Status, Task};
use super::{BlockConfig, MAX_TRANSFER, OnFull, SERIAL};
use crate::{Activation, Chain, Queue, Transport};
use device::lock;
use disk::DiskError;
use disk::requests::{self, Completion, Operation, Request};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Bytes of requests under way after which no more are taken: what a guest can make a disk hold
/// is this and one request for each vCPU.
const BUDGET: usize = 2 * MAX_TRANSFER;
/// What a request without data counts.
const LEAST: usize = 512;
/// Buffers that are kept to be used again, and how large they may be.
const KEPT_BUFFERS: usize = 16;
const KEPT_BUFFER: usize = 1 << 20;

/// A request that waits for the machine to go on: the number of its queue and its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parked {
    queue: u16,
    head: u16,
}

impl Parked {
    /// Bytes of the saved form.
    pub const BYTES: usize = 4;

    /// The saved form.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let ([q0, q1], [h0, h1]) = (self.queue.to_le_bytes(), self.head.to_le_bytes());
        [q0, q1, h0, h1]
    }

    /// From the saved form, of a device with so many queues.
    pub fn from_bytes(bytes: &[u8], queues: u16) -> Option<Self> {
        let [q0, q1, h0, h1] = bytes.try_into().ok()?;
        let parked =
            Self { queue: u16::from_le_bytes([q0, q1]), head: u16::from_le_bytes([h0, h1]) };
        (parked.queue < queues).then_some(parked)
    }
}

/// An active device.
pub struct Service {
    requests: Arc<requests::Queue>,
    queues: Vec<Option<Queue>>,
    transport: Arc<dyn Transport>,
    serial: [u8; SERIAL],
    writeback: AtomicBool,
    on_full: OnFull,
    /// Held while requests are taken; `false` once no more may be.
    open: RwLock<bool>,
    /// Bytes of the requests under way.
    under_way: AtomicUsize,
    /// Somebody stopped taking requests at the budget.
    starved: AtomicBool,
    parked: Mutex<Vec<Parked>>,
    buffers: Mutex<Vec<Vec<u8>>>,
}

/// A request on its way.
struct Job {
    queue: u16,
    chain: Chain,
    room: usize,
    cost: usize,
    /// Its data is to be durable before the guest hears of it.
    then_flush: bool,
    reads: bool,
}

impl Service {
    /// A device that takes no requests yet.
    pub fn new(
        config: &BlockConfig,
        requests: Arc<requests::Queue>,
        activation: Activation,
        writeback: bool,
    ) -> Self {
        Self {
            requests,
            queues: activation.queues,
            transport: activation.transport,
            serial: request::serial(&config.serial),
            writeback: AtomicBool::new(writeback),
            on_full: config.on_full.clone(),
            open: RwLock::new(true),
            under_way: AtomicUsize::new(0),
            starved: AtomicBool::new(false),
            parked: Mutex::default(),
            buffers: Mutex::default(),
        }
    }

    /// Says whether writes may be cached until the driver flushes.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::SeqCst);
    }

    fn queue(&self, index: u16) -> Option<&Queue> {
        self.queues.get(usize::from(index))?.as_ref()
    }

    /// Makes requests again that wait since before.
    pub fn resume(self: &Arc<Self>, parked: Vec<Parked>) {
        for Parked { queue, head } in parked {
            if let Some(chain) = self.queue(queue).and_then(|queue| queue.take_again(head)) {
                self.begin(queue, chain);
            }
        }
    }

    /// Takes the requests of a queue, as far as the budget goes.
    pub fn serve(self: &Arc<Self>, index: usize) {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Some(queue)) = self.queues.get(index).filter(|_| *open) else { return };
        loop {
            queue.want_notifications(false);
            while self.has_budget() {
                let Some(chain) = queue.pop() else { break };
                self.begin(queue.index(), chain);
            }
            if !queue.want_notifications(true) || self.starved.load(Ordering::SeqCst) {
                return;
            }
        }
    }

    /// Whether another request may be taken; who is told no is served when one ends.
    fn has_budget(&self) -> bool {
        let fits = || self.under_way.load(Ordering::SeqCst) < BUDGET;
        if fits() {
            return true;
        }
        self.starved.store(true, Ordering::SeqCst);
        // What ended just before the flag was set did not see it.
        fits() && self.starved.swap(false, Ordering::SeqCst)
    }

    /// Ends all work; answers which requests wait for the machine to go on.
    pub fn stop(&self) -> Vec<Parked> {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = false;
        self.requests.drain();
        std::mem::take(&mut lock(&self.parked))
    }

    fn begin(self: &Arc<Self>, queue: u16, chain: Chain) {
        let Some(room) = request::room(&chain) else {
            // There is no place even for a status.
            self.transport.fail();
            return;
        };
        let task = request::parse(&chain, room, |length| self.buffer(length));
        let operation = match task {
            Task::Disk(operation) => operation,
            Task::Identify => return self.finish(queue, chain, room, &self.serial, Status::Ok),
            Task::Answer(status) => return self.finish(queue, chain, room, &[], status),
        };
        let (cost, reads, writes) = match &operation {
            Operation::Read { buffer, .. } => (buffer.len(), true, false),
            Operation::Write { data, .. } => (data.len(), false, true),
            Operation::WriteZeroes { .. } => (0, false, true),
            Operation::Flush | Operation::Discard { .. } => (0, false, false),
        };
        let then_flush = writes && !self.writeback.load(Ordering::SeqCst);
        let cost = cost.max(LEAST);
        self.under_way.fetch_add(cost, Ordering::SeqCst);
        self.submit(operation, Job { queue, chain, room, cost, then_flush, reads });
    }

    fn submit(self: &Arc<Self>, operation: Operation, job: Job) {
        let service = self.clone();
        let done = Box::new(move |completion| service.completed(job, completion));
        self.requests.submit(Request { operation, done });
    }

    /// The disk has carried out an operation.
    fn completed(self: &Arc<Self>, job: Job, completion: Completion) {
        let Completion { result, buffer } = completion;
        let status = match result {
            Ok(()) if job.then_flush => {
                self.keep(buffer);
                return self.submit(Operation::Flush, Job { then_flush: false, ..job });
            }
            Ok(()) => Some(Status::Ok),
            Err(DiskError::Full { .. }) => match &self.on_full {
                OnFull::Fail => Some(Status::IoError),
                OnFull::Pause(_) => None,
            },
            Err(_) => Some(Status::IoError),
        };
        let cost = job.cost;
        match status {
            Some(status) => {
                let good = job.reads && status == Status::Ok;
                let data = if good { buffer.as_slice() } else { &[] };
                self.finish(job.queue, job.chain, job.room, data, status);
            }
            None => self.park(&job),
        }
        self.keep(buffer);
        self.under_way.fetch_sub(cost, Ordering::SeqCst);
        if self.starved.swap(false, Ordering::SeqCst) {
            (0..self.queues.len()).for_each(|index| self.serve(index));
        }
    }

    fn park(&self, job: &Job) {
        lock(&self.parked).push(Parked { queue: job.queue, head: job.chain.head() });
        if let OnFull::Pause(pause) = &self.on_full {
            pause();
        }
    }

    fn finish(&self, queue: u16, chain: Chain, room: usize, data: &[u8], status: Status) {
        let written = request::answer(&chain, room, data, status);
        if let Some(queue) = self.queue(queue) {
            queue.push(chain, written);
        }
    }

    /// A buffer of so many bytes, with anything in it.
    fn buffer(&self, length: usize) -> Vec<u8> {
        let mut buffer = lock(&self.buffers).pop().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }

    fn keep(&self, buffer: Vec<u8>) {
        let mut buffers = lock(&self.buffers);
        if buffer.capacity() > 0 && buffer.capacity() <= KEPT_BUFFER && buffers.len() < KEPT_BUFFERS
        {
            buffers.push(buffer);
        }
    }
}
