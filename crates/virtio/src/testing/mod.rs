//! A guest for the tests of devices: memory, the driver's side of queues, and a transport that
//! remembers.
#![allow(clippy::expect_used)] // The lint's exception for tests does not know helpers.
mod backends;
pub mod fuzz;

pub use backends::{MemoryDisk, MemoryNetwork};

use crate::queue::{Position, QueueAddresses};
use crate::{Activation, Queue, Transport, VirtioDevice, feature};
use device::{GuestMemory, GuestPhysical, GuestRam, Notify, lock};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use vm_memory::GuestAddress;

/// Remembers what a device tells its driver.
#[derive(Default)]
pub struct RecordingTransport {
    used: Mutex<Vec<u16>>,
    interrupted: Condvar,
    config_changes: AtomicUsize,
    failed: AtomicBool,
}

impl RecordingTransport {
    /// The queues with an interrupt since the last call, in order.
    pub fn take_used(&self) -> Vec<u16> {
        std::mem::take(&mut lock(&self.used))
    }
    /// Waits until there was an interrupt of a queue, and forgets it with those before.
    pub fn wait_used(&self, queue: u16) {
        let mut used = lock(&self.used);
        loop {
            if let Some(at) = used.iter().position(|used| *used == queue) {
                used.drain(..=at);
                return;
            }
            used = self.interrupted.wait(used).expect("no test panics with it");
        }
    }
    /// How often the configuration changed.
    pub fn config_changes(&self) -> usize {
        self.config_changes.load(Ordering::SeqCst)
    }
    /// Whether the device needs a reset.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }
}

impl Transport for RecordingTransport {
    fn queue_used(&self, queue: u16) {
        lock(&self.used).push(queue);
        self.interrupted.notify_all();
    }
    fn config_changed(&self) {
        self.config_changes.fetch_add(1, Ordering::SeqCst);
    }
    fn fail(&self) {
        self.failed.store(true, Ordering::SeqCst);
        self.interrupted.notify_all();
    }
}

/// Bytes of a [`TestGuest`]'s memory.
pub const MEMORY: usize = 4 << 20;
/// Buffers come from here on; queues lie below.
const HEAP: u64 = 1 << 20;
/// Bytes between the queues of a [`TestGuest`].
const QUEUE_STRIDE: u64 = 1 << 14;

/// A guest with the driver of one device.
pub struct TestGuest {
    /// Its memory.
    pub ram: GuestRam,
    /// What the device told it.
    pub transport: Arc<RecordingTransport>,
    /// The driver's side of the queues.
    pub queues: Vec<DriverQueue>,
    /// Features agreed on.
    pub features: u64,
    notifiers: Vec<Option<Arc<dyn Notify>>>,
    positions: Vec<Position>,
    device_queues: Vec<Queue>,
}

impl TestGuest {
    /// A guest whose queues have the size given for each, and which agrees on `features`.
    pub fn new(sizes: &[u16], features: u64) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let ram = GuestRam::new(Arc::new(memory), Arc::new(()));
        let heap = Arc::new(Mutex::new(HEAP));
        let queue = |(index, size): (u64, &u16)| {
            let event_index = features & feature::EVENT_IDX != 0;
            DriverQueue::new(ram.clone(), heap.clone(), index * QUEUE_STRIDE, *size, event_index)
        };
        let queues: Vec<_> = (0..).zip(sizes).map(queue).collect();
        let positions = vec![Position::default(); queues.len()];
        let transport = Arc::default();
        let (notifiers, device_queues) = (Vec::new(), Vec::new());
        Self { ram, transport, queues, features, notifiers, positions, device_queues }
    }

    /// A guest for a device, which it activates with all features that it offers.
    pub fn with(device: &mut dyn VirtioDevice) -> Self {
        let features = device.features() | feature::TRANSPORT;
        let sizes: Vec<_> = device.queue_sizes().iter().map(|size| (*size).min(256)).collect();
        let mut guest = Self::new(&sizes, features);
        guest.activate(device);
        guest
    }

    /// What a device is given.
    pub fn activation(&mut self) -> Activation {
        let queue = |((index, queue), position): ((u16, &DriverQueue), &Position)| {
            let (ram, transport) = (self.ram.clone(), self.transport.clone());
            Queue::new(index, queue.size, queue.at, *position, self.features, ram, transport)
        };
        let queues = (0..).zip(&self.queues).zip(&self.positions).map(queue);
        self.device_queues = queues.collect::<Result<_, _>>().expect("well-formed queues");
        Activation {
            ram: self.ram.clone(),
            features: self.features,
            queues: self.device_queues.iter().cloned().map(Some).collect(),
            transport: self.transport.clone(),
        }
    }

    /// Activates a device, also again after [`Self::deactivate`].
    pub fn activate(&mut self, device: &mut dyn VirtioDevice) {
        let activation = self.activation();
        self.notifiers = device.activate(activation).expect("the device takes its queues");
    }

    /// Deactivates a device, as a machine that pauses.
    pub fn deactivate(&mut self, device: &mut dyn VirtioDevice) {
        self.device_queues.iter().for_each(Queue::close);
        device.deactivate();
        self.positions = self.device_queues.iter().map(Queue::position).collect();
    }

    /// Notifies the device of new chains in a queue.
    pub fn notify(&self, queue: usize) {
        if let Some(Some(notifier)) = self.notifiers.get(queue) {
            notifier.notify();
        }
    }

    /// Adds a chain, notifies the device and waits until it is used; answers what was written.
    /// For devices that serve on a thread of their own.
    pub fn request(&mut self, queue: usize, readable: &[&[u8]], writable: &[usize]) -> Vec<u8> {
        let driver = self.queues.get_mut(queue).expect("a queue of the device");
        driver.add(readable, writable);
        self.notify(queue);
        let driver = self.queues.get_mut(queue).expect("a queue of the device");
        loop {
            if let Some(used) = driver.take_used() {
                return used.data;
            }
            self.transport.wait_used(queue as u16);
        }
    }
}

/// A chain that the device gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// The number that [`DriverQueue::add`] answered.
    pub head: u16,
    /// How many bytes the device says that it wrote.
    pub written: u32,
    /// All of the writable buffers.
    pub data: Vec<u8>,
}

/// The driver's side of a queue.
pub struct DriverQueue {
    ram: GuestRam,
    heap: Arc<Mutex<u64>>,
    /// Its size.
    pub size: u16,
    /// Where it is.
    pub at: QueueAddresses,
    /// Whether chains go through an indirect table.
    pub indirect: bool,
    event_index: bool,
    free: Vec<u16>,
    next_available: u16,
    next_used: u16,
    /// By head: its descriptors and writable buffers.
    outstanding: Vec<Option<Outstanding>>,
}

#[derive(Clone, Default)]
struct Outstanding {
    descriptors: Vec<u16>,
    writable: Vec<(GuestPhysical, usize)>,
}

impl DriverQueue {
    fn new(ram: GuestRam, heap: Arc<Mutex<u64>>, base: u64, size: u16, event_index: bool) -> Self {
        let entries = u64::from(size);
        let available = base + 16 * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(4);
        assert!(used + 6 + 8 * entries <= base + QUEUE_STRIDE, "queues of tests are small");
        let at = QueueAddresses {
            descriptors: GuestPhysical(base),
            available: GuestPhysical(available),
            used: GuestPhysical(used),
        };
        Self {
            ram,
            heap,
            size,
            at,
            indirect: false,
            event_index,
            free: (0..size).rev().collect(),
            next_available: 0,
            next_used: 0,
            outstanding: vec![None; usize::from(size)],
        }
    }

    /// Guest memory that nobody else uses. There are 3 MiB, used round and round.
    pub fn allocate(&self, length: usize) -> GuestPhysical {
        let mut heap = lock(&self.heap);
        if *heap + length as u64 > MEMORY as u64 {
            *heap = HEAP;
        }
        let start = GuestPhysical(*heap);
        *heap = (*heap + length as u64).next_multiple_of(16);
        assert!(*heap <= MEMORY as u64, "buffers of tests are small");
        start
    }

    /// Makes a chain of buffers available; answers its head.
    pub fn add(&mut self, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let mut buffers = Vec::new();
        for bytes in readable {
            let start = self.allocate(bytes.len());
            self.ram.write(start, bytes).expect("in memory");
            buffers.push((start, bytes.len(), 0));
        }
        let mut outstanding = Outstanding::default();
        for length in writable {
            let start = self.allocate(*length);
            self.ram.write(start, &vec![0xee; *length]).expect("in memory");
            buffers.push((start, *length, 2));
            outstanding.writable.push((start, *length));
        }
        let head = if self.indirect {
            self.add_indirect(&buffers, &mut outstanding)
        } else {
            self.add_direct(&buffers, &mut outstanding)
        };
        if let Some(slot) = self.outstanding.get_mut(usize::from(head)) {
            *slot = Some(outstanding);
        }
        self.make_available(head);
        head
    }

    fn add_direct(
        &mut self,
        buffers: &[(GuestPhysical, usize, u16)],
        outstanding: &mut Outstanding,
    ) -> u16 {
        let from = self.free.len().checked_sub(buffers.len()).expect("free descriptors");
        let mut numbers = self.free.split_off(from);
        numbers.reverse();
        for (n, (buffer, number)) in buffers.iter().zip(&numbers).enumerate() {
            let next = numbers.get(n + 1).copied();
            self.describe(self.at.descriptors, *number, *buffer, next);
        }
        outstanding.descriptors = numbers;
        *outstanding.descriptors.first().expect("a chain has a buffer")
    }

    fn add_indirect(
        &mut self,
        buffers: &[(GuestPhysical, usize, u16)],
        outstanding: &mut Outstanding,
    ) -> u16 {
        let table = self.allocate(16 * buffers.len());
        for (n, buffer) in buffers.iter().enumerate() {
            let next = (n + 1 < buffers.len()).then_some(n as u16 + 1);
            self.describe(table, n as u16, *buffer, next);
        }
        let head = self.free.pop().expect("a free descriptor");
        self.describe(self.at.descriptors, head, (table, 16 * buffers.len(), 4), None);
        outstanding.descriptors = vec![head];
        head
    }

    /// Writes a descriptor, whatever is in it.
    pub fn describe(
        &self,
        table: GuestPhysical,
        number: u16,
        (start, length, flags): (GuestPhysical, usize, u16),
        next: Option<u16>,
    ) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend_from_slice(&start.0.to_le_bytes());
        bytes.extend_from_slice(&(length as u32).to_le_bytes());
        bytes.extend_from_slice(&(flags | u16::from(next.is_some())).to_le_bytes());
        bytes.extend_from_slice(&next.unwrap_or(0).to_le_bytes());
        let at = GuestPhysical(table.0 + 16 * u64::from(number));
        self.ram.write(at, &bytes).expect("in memory");
    }

    /// Puts a head, whatever it is, into the available ring.
    pub fn make_available(&mut self, head: u16) {
        let entry = 4 + 2 * u64::from(self.next_available % self.size);
        self.put(self.at.available, entry, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.put(self.at.available, 2, self.next_available);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Writes the available index, whatever it is.
    pub fn set_available_index(&self, index: u16) {
        self.put(self.at.available, 2, index);
    }

    /// Says that no interrupt is wanted, or which: the flags, or the used event.
    pub fn want_interrupts(&self, wanted: bool) {
        if self.event_index {
            let event = if wanted { self.next_used } else { self.next_used.wrapping_sub(1) };
            self.put(self.at.available, 4 + 2 * u64::from(self.size), event);
        } else {
            self.put(self.at.available, 0, u16::from(!wanted));
        }
    }

    /// Whether the device wants to be notified of the chain added last.
    pub fn wants_notification(&self) -> bool {
        if self.event_index {
            let event = self.get(self.at.used, 4 + 8 * u64::from(self.size));
            event == self.next_available.wrapping_sub(1)
        } else {
            self.get(self.at.used, 0) & 1 == 0
        }
    }

    /// Takes the next used chain, and asks for an interrupt at the one after it.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.get(self.at.used, 2) == self.next_used {
            self.want_interrupts(true);
            std::sync::atomic::fence(Ordering::SeqCst);
            if self.get(self.at.used, 2) == self.next_used {
                return None;
            }
        }
        let entry = 4 + 8 * u64::from(self.next_used % self.size);
        let mut element = [0; 8];
        let at = GuestPhysical(self.at.used.0 + entry);
        self.ram.read(at, &mut element).expect("in memory");
        let [h0, h1, _, _, w @ ..] = element;
        self.next_used = self.next_used.wrapping_add(1);
        let (head, written) = (u16::from_le_bytes([h0, h1]), u32::from_le_bytes(w));
        let outstanding = self.outstanding.get_mut(usize::from(head)).and_then(Option::take);
        let outstanding = outstanding.expect("the device gives back what it was given");
        self.free.extend(&outstanding.descriptors);
        let mut data = Vec::new();
        for (start, length) in outstanding.writable {
            let mut part = vec![0; length];
            self.ram.read(start, &mut part).expect("in memory");
            data.extend(part);
        }
        Some(Used { head, written, data })
    }

    fn put(&self, base: GuestPhysical, at: u64, value: u16) {
        let at = GuestPhysical(base.0 + at);
        self.ram.store(value.to_le(), at, Ordering::SeqCst).expect("in memory");
    }

    fn get(&self, base: GuestPhysical, at: u64) -> u16 {
        let at = GuestPhysical(base.0 + at);
        u16::from_le(self.ram.load(at, Ordering::SeqCst).expect("in memory"))
    }
}
