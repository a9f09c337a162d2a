//! Doorbells: guest writes that notify somebody instead of calling the machine.
use crate::{GuestMemory, VcpuIo, Width};
use arch::GuestPhysical;
use arch::address::PAGE_SIZE;
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

/// The largest physical address width of any x86 CPU, in bits (Intel SDM 3A 4.1.4).
const PHYSICAL_BITS: u32 = 52;
/// The page of the LAPIC's registers after reset: the engine's own (Intel SDM 3A 11.4.1).
const LAPIC: GuestPhysical = GuestPhysical(0xfee0_0000);
/// What a write that is wider is made of.
const WIDEST: usize = 8;

/// What is told when a doorbell rings. Closures are notifiers.
pub trait Notify: Send + Sync {
    /// The doorbell rang. Called on the thread of the vCPU that rang it, which waits meanwhile;
    /// no lock of the engine is held.
    fn notify(&self);

    /// An event that does the same as [`Notify::notify`] when it is signalled (on Linux an
    /// eventfd to which one is added). An engine that can have the kernel signal it does that
    /// instead, so that the vCPU need not leave the guest.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl<F: Fn() + Send + Sync> Notify for F {
    fn notify(&self) {
        self();
    }
}

/// A guest write that rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// The first byte that is written.
    pub place: DoorbellPlace,
    /// Which writes there ring; others go to [`VcpuIo`].
    pub rings: Rings,
}

/// Where a doorbell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DoorbellPlace {
    /// A port.
    Port(u16),
    /// An address that is not memory.
    Mmio(GuestPhysical),
}

/// Which writes ring. A write of more than eight bytes counts as several of eight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rings {
    /// All.
    Any,
    /// Those of so many bytes.
    Width(Width),
    /// Those of so many bytes with this value.
    Value(Width, u64),
}

/// A doorbell that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DoorbellError {
    /// A write there could ring another doorbell too.
    #[error("a write to {0} would ring another doorbell as well")]
    Taken(DoorbellPlace),
    /// Writes there go to memory.
    #[error("{0} is guest memory, where a write rings no doorbell")]
    Memory(DoorbellPlace),
    /// Writes there go to the LAPIC.
    #[error("{0} belongs to the local APIC, where a write rings no doorbell")]
    Lapic(DoorbellPlace),
    /// The write would go past the end of the ports, the address space or the page, or be wider
    /// than a port takes.
    #[error("no single write of {bytes} bytes is made to {place}")]
    Impossible {
        /// Where.
        place: DoorbellPlace,
        /// How many bytes.
        bytes: u64,
    },
    /// The value does not fit the width.
    #[error("no write of {bytes} bytes has the value {value:#x}")]
    Value {
        /// How many bytes.
        bytes: u64,
        /// Which value.
        value: u64,
    },
}

impl fmt::Display for DoorbellPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "port {port:#x}"),
            Self::Mmio(address) => write!(f, "address {address}"),
        }
    }
}

impl Rings {
    /// The width, where only one rings.
    pub fn width(self) -> Option<Width> {
        match self {
            Self::Any => None,
            Self::Width(width) | Self::Value(width, _) => Some(width),
        }
    }

    /// Whether a write of these bytes, at most eight, rings.
    fn hears(self, data: &[u8]) -> bool {
        let fits = |width: Width| data.len() as u64 == width.bytes();
        match self {
            Self::Any => true,
            Self::Width(width) => fits(width),
            Self::Value(width, value) => fits(width) && value.to_le_bytes().starts_with(data),
        }
    }

    /// Whether there is a write that rings both.
    fn meets(self, other: Self) -> bool {
        match (self, other) {
            (Self::Value(a, x), Self::Value(b, y)) => (a, x) == (b, y),
            (Self::Any, _) | (_, Self::Any) => true,
            (Self::Width(a) | Self::Value(a, _), Self::Width(b) | Self::Value(b, _)) => a == b,
        }
    }
}

impl Doorbell {
    /// Whether a guest with this memory can ring it.
    ///
    /// # Errors
    /// Says why not.
    pub fn check(&self, memory: &GuestMemory) -> Result<(), DoorbellError> {
        let place = self.place;
        let bytes = self.rings.width().map_or(1, Width::bytes);
        if let Rings::Value(_, value) = self.rings
            && bytes < 8
            && value >> (8 * bytes) != 0
        {
            return Err(DoorbellError::Value { bytes, value });
        }
        let impossible = Err(DoorbellError::Impossible { place, bytes });
        match place {
            DoorbellPlace::Port(port) if bytes > 4 || u64::from(port) + bytes > 1 << 16 => {
                impossible
            }
            DoorbellPlace::Port(_) => Ok(()),
            DoorbellPlace::Mmio(address)
                if address.0 >> PHYSICAL_BITS != 0 || address.offset() + bytes > PAGE_SIZE =>
            {
                impossible
            }
            DoorbellPlace::Mmio(address) if address.page() == LAPIC => {
                Err(DoorbellError::Lapic(place))
            }
            DoorbellPlace::Mmio(GuestPhysical(first)) => {
                let is_memory = |at| memory.address_in_range(GuestAddress(at));
                if is_memory(first) || is_memory(first + bytes - 1) {
                    return Err(DoorbellError::Memory(place));
                }
                Ok(())
            }
        }
    }
}

/// A registered doorbell: it is taken down when this is dropped. A ring that is under way at that
/// moment may still arrive.
#[must_use = "the doorbell is taken down when this is dropped"]
pub struct DoorbellHandle {
    _guard: Box<dyn Any + Send + Sync>,
}

impl DoorbellHandle {
    /// For engines: the doorbell is what `guard` takes down when it is dropped.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self { _guard: Box::new(guard) }
    }
}

/// The doorbells of a VM: the part that engines have in common.
#[derive(Default)]
pub struct Doorbells {
    /// How many there are: with none, a write costs one load more.
    count: AtomicUsize,
    places: RwLock<BTreeMap<DoorbellPlace, Vec<Entry>>>,
}

struct Entry {
    rings: Rings,
    notify: Arc<dyn Notify>,
}

/// Takes a doorbell out of its [`Doorbells`] when it is dropped.
pub struct DoorbellEntry {
    doorbells: Arc<Doorbells>,
    doorbell: Doorbell,
}

impl Doorbells {
    /// Adds a doorbell.
    ///
    /// # Errors
    /// The guest cannot ring it, or it could ring another at the same time.
    pub fn add(
        self: &Arc<Self>,
        memory: &GuestMemory,
        doorbell: Doorbell,
        notify: Arc<dyn Notify>,
    ) -> Result<DoorbellEntry, DoorbellError> {
        doorbell.check(memory)?;
        let Doorbell { place, rings } = doorbell;
        // A panic cannot leave the map half-changed.
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        let here = places.entry(place).or_default();
        if here.iter().any(|entry| entry.rings.meets(rings)) {
            return Err(DoorbellError::Taken(place));
        }
        here.push(Entry { rings, notify });
        self.count.fetch_add(1, Ordering::SeqCst);
        Ok(DoorbellEntry { doorbells: self.clone(), doorbell })
    }

    /// A machine whose doorbells ring before it is called.
    pub fn before<'a>(&'a self, io: &'a dyn VcpuIo) -> Ringing<'a> {
        Ringing { doorbells: self, io }
    }

    fn find(&self, place: DoorbellPlace, data: &[u8]) -> Option<Arc<dyn Notify>> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let entry = places.get(&place)?.iter().find(|entry| entry.rings.hears(data))?;
        Some(entry.notify.clone())
    }

    /// Rings the doorbell of a write of at most eight bytes, if there is one.
    fn ring(&self, place: DoorbellPlace, data: &[u8]) -> bool {
        let found = self.find(place, data);
        if let Some(notify) = &found {
            notify.notify();
        }
        found.is_some()
    }
}

impl Drop for DoorbellEntry {
    fn drop(&mut self) {
        let Doorbell { place, rings } = self.doorbell;
        let mut places = self.doorbells.places.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = places.get_mut(&place) {
            here.retain(|entry| entry.rings != rings);
            if here.is_empty() {
                places.remove(&place);
            }
        }
        self.doorbells.count.fetch_sub(1, Ordering::SeqCst);
    }
}

/// See [`Doorbells::before`].
pub struct Ringing<'a> {
    doorbells: &'a Doorbells,
    io: &'a dyn VcpuIo,
}

fn mmio(address: GuestPhysical, part: usize) -> GuestPhysical {
    GuestPhysical(address.0.wrapping_add((part * WIDEST) as u64))
}

impl VcpuIo for Ringing<'_> {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.io.pio_read(port, data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if !self.doorbells.ring(DoorbellPlace::Port(port), data) {
            self.io.pio_write(port, data);
        }
    }

    fn mmio_read(&self, address: GuestPhysical, data: &mut [u8]) {
        self.io.mmio_read(address, data);
    }

    fn mmio_write(&self, address: GuestPhysical, data: &[u8]) {
        let place = |n| DoorbellPlace::Mmio(mmio(address, n));
        let mut parts = data.chunks(WIDEST).enumerate();
        // A write in which nothing rings stays in one piece.
        if !parts.any(|(n, part)| self.doorbells.find(place(n), part).is_some()) {
            self.io.mmio_write(address, data);
            return;
        }
        for (n, part) in data.chunks(WIDEST).enumerate() {
            if !self.doorbells.ring(place(n), part) {
                self.io.mmio_write(mmio(address, n), part);
            }
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.io.end_of_interrupt(vector);
    }

    fn acknowledge_pic(&self) -> Option<u8> {
        self.io.acknowledge_pic()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        match GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]) {
            Ok(memory) => memory,
            Err(error) => panic!("1 MiB of memory: {error}"),
        }
    }

    fn at(address: u64) -> DoorbellPlace {
        DoorbellPlace::Mmio(GuestPhysical(address))
    }

    fn error(place: DoorbellPlace, rings: Rings) -> Option<String> {
        Doorbell { place, rings }.check(&memory()).err().map(|e| e.to_string())
    }

    #[test]
    fn a_doorbell_where_no_write_can_come_is_refused_and_the_fact_is_named() {
        let cases = [
            (at(0xf_fff0), Rings::Any, "address 0xffff0 is guest memory"),
            (at(0xfee0_00b0), Rings::Any, "0xfee000b0 belongs to the local APIC"),
            (at(0x20_0ffe), Rings::Width(Width::Double), "write of 4 bytes is made to address"),
            (at(1 << 52), Rings::Any, "write of 1 bytes is made to address"),
            (DoorbellPlace::Port(0xffff), Rings::Width(Width::Word), "is made to port 0xffff"),
            (DoorbellPlace::Port(0x10), Rings::Width(Width::Quad), "8 bytes is made to port 0x10"),
            (at(0x20_0000), Rings::Value(Width::Word, 0x1_0000), "2 bytes has the value 0x10000"),
        ];
        for (place, rings, part) in cases {
            let error = error(place, rings).unwrap_or_default();
            assert!(error.contains(part), "{part} in {error}");
        }
        assert_eq!(error(at(0x20_0ffe), Rings::Width(Width::Word)), None);
        assert_eq!(error(DoorbellPlace::Port(0xffff), Rings::Any), None);
        assert_eq!(error(at(0x20_0000), Rings::Value(Width::Quad, u64::MAX)), None);
    }

    #[test]
    fn doorbells_that_one_write_could_ring_exclude_each_other() {
        let doorbells = Arc::new(Doorbells::default());
        let add = |rings| {
            let doorbell = Doorbell { place: at(0x20_0000), rings };
            doorbells.add(&memory(), doorbell, Arc::new(|| {}))
        };
        let word = add(Rings::Value(Width::Word, 1));
        let other = add(Rings::Value(Width::Word, 2));
        let wider = add(Rings::Width(Width::Double));
        assert!(word.is_ok() && other.is_ok() && wider.is_ok());
        for rings in [Rings::Any, Rings::Width(Width::Word), Rings::Value(Width::Word, 1)] {
            assert!(matches!(add(rings), Err(DoorbellError::Taken(_))), "{rings:?}");
        }
        drop((word, other));
        assert!(add(Rings::Width(Width::Word)).is_ok());
    }
}
