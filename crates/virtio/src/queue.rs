//! Split virtqueues, the device's side (§2.7), with indirect descriptors and event indices.
//!
//! rust-vmm's `virtio-queue` ends a malformed chain as if it were whole and interrupts a driver
//! that asked not to be; here the first fails the device and the second is heard.
use crate::chain::{Chain, Segment};
use crate::{Transport, feature};
use device::{GuestPhysical, GuestRam, NotMemory, lock};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};

/// The largest size of a queue (§2.7).
pub const MAX_SIZE: u16 = 32768;
/// The most descriptors in a chain, where indirect tables make it longer than the queue. Drivers
/// in use stay far below.
const MAX_INDIRECT: usize = 1024;

/// Bytes of a descriptor (§2.7.5).
const DESCRIPTOR: u64 = 16;
/// Descriptor flags (§2.7.5).
mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}
/// Flag of the available ring: the driver wants no interrupts (§2.7.6).
const NO_INTERRUPT: u16 = 1;
/// Flag of the used ring: the device wants no notifications (§2.7.8).
const NO_NOTIFY: u16 = 1;

/// Where a driver put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueAddresses {
    /// The descriptor table.
    pub descriptors: GuestPhysical,
    /// The available ring ("driver area").
    pub available: GuestPhysical,
    /// The used ring ("device area").
    pub used: GuestPhysical,
}

/// How far a device has come in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The next entry of the available ring to be taken.
    pub available: u16,
    /// The next entry of the used ring to be filled.
    pub used: u16,
}

/// Why a queue cannot be where the driver put it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is not a power of two, or too large.
    #[error("the driver set a queue size of {0}, which is no power of two up to {MAX_SIZE}")]
    Size(u16),
    /// A part is not aligned (§2.7).
    #[error("the driver put a part of a queue at {0}, which is not aligned")]
    Alignment(GuestPhysical),
    /// A part is not in memory.
    #[error(transparent)]
    Memory(#[from] NotMemory),
}

/// What a driver did that no driver may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Breach {
    /// More entries than the ring has, or one that is no descriptor.
    Index,
    /// A chain that loops or is too long.
    Length,
    /// Indirect where it may not be, or of a bad size.
    Indirect,
    /// A readable buffer after a writable one.
    Order,
    /// Not in memory.
    Memory,
}

impl From<NotMemory> for Breach {
    fn from(_: NotMemory) -> Self {
        Self::Memory
    }
}

/// A queue of a device whose driver is ready. Clones are the same queue; any thread may use it.
#[derive(Clone)]
pub struct Queue(Arc<Inner>);

struct Inner {
    index: u16,
    size: u16,
    at: QueueAddresses,
    indirect: bool,
    event_index: bool,
    ram: GuestRam,
    transport: Arc<dyn Transport>,
    ring: Mutex<Ring>,
}

struct Ring {
    position: Position,
    /// The available index as it was last read.
    seen: u16,
    /// The used index when the driver was last interrupted, or spared it.
    signalled: u16,
    /// No more chains are given out.
    closed: bool,
}

#[derive(Clone, Copy)]
struct Descriptor {
    start: GuestPhysical,
    length: u32,
    flags: u16,
    next: u16,
}

impl Queue {
    /// A queue as its driver described it. `features` are those agreed on.
    ///
    /// # Errors
    /// The queue cannot be there.
    pub fn new(
        index: u16,
        size: u16,
        at: QueueAddresses,
        position: Position,
        features: u64,
        ram: GuestRam,
        transport: Arc<dyn Transport>,
    ) -> Result<Self, QueueError> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(QueueError::Size(size));
        }
        let entries = u64::from(size);
        let parts = [
            (at.descriptors, 16, DESCRIPTOR * entries),
            (at.available, 2, 6 + 2 * entries),
            (at.used, 4, 6 + 8 * entries),
        ];
        for (start, alignment, length) in parts {
            if !start.0.is_multiple_of(alignment) {
                return Err(QueueError::Alignment(start));
            }
            let length = length as usize; // at most 512 KiB
            if !ram.contains(start, length) {
                return Err(NotMemory { start, length }.into());
            }
        }
        let ring =
            Ring { position, seen: position.available, signalled: position.used, closed: false };
        Ok(Self(Arc::new(Inner {
            index,
            size,
            at,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_index: features & feature::EVENT_IDX != 0,
            ram,
            transport,
            ring: Mutex::new(ring),
        })))
    }

    /// The queue's number.
    pub fn index(&self) -> u16 {
        self.0.index
    }

    /// How far the device has come.
    pub fn position(&self) -> Position {
        lock(&self.0.ring).position
    }

    /// Gives out no more chains: [`Self::pop`] answers `None` from now on.
    pub fn close(&self) {
        lock(&self.0.ring).closed = true;
    }

    /// Takes the next chain, if there is one. A driver that breaks the rules fails the device,
    /// and there are no more.
    pub fn pop(&self) -> Option<Chain> {
        let mut ring = lock(&self.0.ring);
        if ring.closed {
            return None;
        }
        match self.0.next_head(&mut ring) {
            Ok(None) => None,
            Ok(Some(head)) => {
                let chain = self.0.chain(head);
                if chain.is_ok() {
                    ring.position.available = ring.position.available.wrapping_add(1);
                }
                self.unless_broken(&mut ring, chain)
            }
            Err(breach) => self.unless_broken(&mut ring, Err(breach)),
        }
    }

    /// How many chains there are to take, as of the last look at the ring: a call of
    /// [`Self::want_notifications`] that switches them on, or of [`Self::pop`] that found none.
    pub fn waiting(&self) -> u16 {
        let ring = lock(&self.0.ring);
        if ring.closed { 0 } else { ring.seen.wrapping_sub(ring.position.available) }
    }

    /// Takes back the last `count` calls of [`Self::pop`] that gave a chain: they come again. Only
    /// for a device that alone takes from this queue, and has pushed none of them.
    pub fn undo_pops(&self, count: u16) {
        let mut ring = lock(&self.0.ring);
        ring.position.available = ring.position.available.wrapping_sub(count);
    }

    /// Takes a chain a second time that was taken before a save, by its head.
    pub fn take_again(&self, head: u16) -> Option<Chain> {
        let chain = if head < self.0.size { self.0.chain(head) } else { Err(Breach::Index) };
        self.unless_broken(&mut lock(&self.0.ring), chain)
    }

    /// Gives a chain back with the first `written` bytes of its writable part filled, and
    /// interrupts the driver if it wants to know.
    pub fn push(&self, chain: Chain, written: u32) {
        self.push_silently(chain, written);
        self.interrupt();
    }

    /// As [`Self::push`], without interrupt: call [`Self::interrupt`] after the last.
    pub fn push_silently(&self, chain: Chain, written: u32) {
        self.push_together([(chain, written)]);
    }

    /// As [`Self::push_silently`] for several chains, of which the driver sees all or none.
    pub fn push_together(&self, chains: impl IntoIterator<Item = (Chain, u32)>) {
        let mut ring = lock(&self.0.ring);
        let mut put = |(chain, written): (Chain, u32)| self.0.put(&mut ring, chain.head(), written);
        let result = chains.into_iter().try_for_each(&mut put);
        let result = result.and_then(|()| self.0.publish(&ring));
        self.unless_broken(&mut ring, result);
    }

    /// Interrupts the driver if it wants to know of what was given back.
    pub fn interrupt(&self) {
        let mut ring = lock(&self.0.ring);
        let wanted = self.0.wants_interrupt(&mut ring);
        if self.unless_broken(&mut ring, wanted) == Some(true) {
            self.0.transport.queue_used(self.0.index);
        }
    }

    /// Says whether the driver shall notify the device of new chains. When they are switched on,
    /// answers whether chains have come meanwhile, of which no notification tells.
    pub fn want_notifications(&self, wanted: bool) -> bool {
        let mut ring = lock(&self.0.ring);
        let more = self.0.set_notifications(&mut ring, wanted);
        self.unless_broken(&mut ring, more) == Some(true) && !ring.closed
    }

    /// Takes all chains there are, without notifications meanwhile.
    pub fn serve(&self, mut each: impl FnMut(Chain)) {
        loop {
            self.want_notifications(false);
            while let Some(chain) = self.pop() {
                each(chain);
            }
            if !self.want_notifications(true) {
                return;
            }
        }
    }

    fn unless_broken<T>(&self, ring: &mut Ring, result: Result<T, Breach>) -> Option<T> {
        if result.is_err() && !ring.closed {
            ring.closed = true;
            self.0.transport.fail();
        }
        result.ok()
    }
}

impl Inner {
    /// The head of the next chain in the available ring.
    fn next_head(&self, ring: &mut Ring) -> Result<Option<u16>, Breach> {
        let next = ring.position.available;
        if ring.seen == next {
            ring.seen = self.load(self.at.available, 2, Ordering::Acquire)?;
        }
        match ring.seen.wrapping_sub(next) {
            0 => return Ok(None),
            waiting if waiting > self.size => return Err(Breach::Index),
            _ => {}
        }
        let entry = 4 + 2 * u64::from(next % self.size);
        let head = self.load(self.at.available, entry, Ordering::Relaxed)?;
        if head < self.size { Ok(Some(head)) } else { Err(Breach::Index) }
    }

    /// Reads the chain that begins at `head`.
    fn chain(&self, head: u16) -> Result<Chain, Breach> {
        let mut list = Gathered::default();
        let (mut table, mut entries) = (self.at.descriptors, self.size);
        let (mut at, mut visited, mut indirect) = (head, 0, false);
        loop {
            if at >= entries {
                return Err(Breach::Index);
            }
            // A chain visits each descriptor of its tables at most once.
            visited += 1;
            if visited > usize::from(self.size).max(MAX_INDIRECT) {
                return Err(Breach::Length);
            }
            let descriptor = self.descriptor(table, at)?;
            if descriptor.flags & flag::INDIRECT != 0 {
                let bytes = u64::from(descriptor.length);
                if indirect
                    || !self.indirect
                    || descriptor.flags & flag::NEXT != 0
                    || !bytes.is_multiple_of(DESCRIPTOR)
                    || !self.ram.contains(descriptor.start, bytes as usize)
                {
                    return Err(Breach::Indirect);
                }
                entries = u16::try_from(bytes / DESCRIPTOR).map_err(|_| Breach::Indirect)?;
                (table, at, indirect) = (descriptor.start, 0, true);
                continue;
            }
            list.add(&self.ram, &descriptor)?;
            if descriptor.flags & flag::NEXT == 0 {
                return Ok(Chain::new(self.ram.clone(), head, list.segments, list.readable));
            }
            at = descriptor.next;
        }
    }

    fn descriptor(&self, table: GuestPhysical, index: u16) -> Result<Descriptor, Breach> {
        let mut bytes = [0; DESCRIPTOR as usize];
        // The table was found to lie in memory, so this does not wrap.
        let at = GuestPhysical(table.0.wrapping_add(DESCRIPTOR * u64::from(index)));
        self.ram.read(at, &mut bytes)?;
        let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Ok(Descriptor {
            start: GuestPhysical(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }

    /// Fills the next entry of the used ring (§2.7.8), which the driver does not see yet.
    fn put(&self, ring: &mut Ring, head: u16, written: u32) -> Result<(), Breach> {
        let entry = 4 + 8 * u64::from(ring.position.used % self.size);
        let mut element = [0; 8];
        let (id, length) = element.split_at_mut(4);
        id.copy_from_slice(&u32::from(head).to_le_bytes());
        length.copy_from_slice(&written.to_le_bytes());
        self.ram.write(GuestPhysical(self.at.used.0.wrapping_add(entry)), &element)?;
        ring.position.used = ring.position.used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was put into the used ring.
    fn publish(&self, ring: &Ring) -> Result<(), Breach> {
        self.store(self.at.used, 2, ring.position.used, Ordering::Release)
    }

    /// §2.7.7 and §2.7.10.
    fn wants_interrupt(&self, ring: &mut Ring) -> Result<bool, Breach> {
        let (old, new) = (ring.signalled, ring.position.used);
        if old == new {
            return Ok(false);
        }
        // What was used must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        ring.signalled = new;
        if !self.event_index {
            let flags = self.load(self.at.available, 0, Ordering::Relaxed)?;
            return Ok(flags & NO_INTERRUPT == 0);
        }
        let at = 4 + 2 * u64::from(self.size);
        let event = self.load(self.at.available, at, Ordering::Relaxed)?;
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    fn set_notifications(&self, ring: &mut Ring, wanted: bool) -> Result<bool, Breach> {
        match (self.event_index, wanted) {
            // An event index that stays behind keeps the driver silent by itself.
            (true, false) => return Ok(false),
            (true, true) => {
                // At the next chain that is not known yet: those that wait to be taken again
                // (`Queue::undo_pops`) are no news.
                let at = 4 + 8 * u64::from(self.size);
                self.store(self.at.used, at, ring.seen, Ordering::Relaxed)?;
            }
            (false, wanted) => {
                let flags = if wanted { 0 } else { NO_NOTIFY };
                self.store(self.at.used, 0, flags, Ordering::Relaxed)?;
            }
        }
        if !wanted {
            return Ok(false);
        }
        // The wish must be visible before the index is read, or both sides could wait.
        fence(Ordering::SeqCst);
        ring.seen = self.load(self.at.available, 2, Ordering::Acquire)?;
        Ok(ring.seen != ring.position.available)
    }

    fn load(&self, base: GuestPhysical, at: u64, order: Ordering) -> Result<u16, Breach> {
        let value = self.ram.load::<u16>(GuestPhysical(base.0.wrapping_add(at)), order)?;
        Ok(u16::from_le(value))
    }

    fn store(&self, base: GuestPhysical, at: u64, to: u16, order: Ordering) -> Result<(), Breach> {
        Ok(self.ram.store(to.to_le(), GuestPhysical(base.0.wrapping_add(at)), order)?)
    }
}

/// The buffers of a chain as they are found.
#[derive(Default)]
struct Gathered {
    segments: Vec<Segment>,
    readable: usize,
    bytes: u32,
}

impl Gathered {
    fn add(&mut self, ram: &GuestRam, descriptor: &Descriptor) -> Result<(), Breach> {
        let Descriptor { start, length, flags, .. } = *descriptor;
        self.bytes = self.bytes.checked_add(length).ok_or(Breach::Length)?;
        let writable = flags & flag::WRITE != 0;
        if !writable && self.segments.len() > self.readable {
            return Err(Breach::Order);
        }
        if length == 0 {
            return Ok(());
        }
        if !ram.contains(start, length as usize) {
            return Err(Breach::Memory);
        }
        self.readable += usize::from(!writable);
        self.segments.push(Segment { start, length });
        Ok(())
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
