//! Guest memory as devices reach it.
use crate::GuestPhysical;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{AtomicAccess, Bytes as _, GuestAddress, GuestMemoryBackend as _};

/// The mapping of guest-physical ranges to the host's memory; the same type as the engine's.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Hears which guest memory devices write, so that an engine can drop what it has translated from
/// there, and a dirty log can note it. Called after the write, on the writing thread.
pub trait WriteObserver: Send + Sync {
    /// `length` bytes from `start` on, all of them memory, were written.
    fn written(&self, start: GuestPhysical, length: usize);
}

/// An observer that does not care.
impl WriteObserver for () {
    fn written(&self, _: GuestPhysical, _: usize) {}
}

/// An access of a device went to where there is no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest had a device access {length} bytes at {start}, which is not memory")]
pub struct NotMemory {
    /// First byte.
    pub start: GuestPhysical,
    /// How many bytes.
    pub length: usize,
}

/// Guest memory as a device reaches it: all that it writes is observed. Clones are cheap.
#[derive(Clone)]
pub struct GuestRam {
    memory: Arc<GuestMemory>,
    observer: Arc<dyn WriteObserver>,
}

impl GuestRam {
    /// Memory whose writes are told to `observer`.
    pub fn new(memory: Arc<GuestMemory>, observer: Arc<dyn WriteObserver>) -> Self {
        Self { memory, observer }
    }

    /// The mapping, to read it. Who writes through it calls [`Self::note_written`].
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Says that guest memory was written past this type, or lost its contents.
    pub fn note_written(&self, start: GuestPhysical, length: usize) {
        self.observer.written(start, length);
    }

    /// Whether all of a range is memory.
    pub fn contains(&self, start: GuestPhysical, length: usize) -> bool {
        self.memory.check_range(GuestAddress(start.0), length)
    }

    /// Copies out of guest memory.
    ///
    /// # Errors
    /// Part of the range is not memory.
    pub fn read(&self, start: GuestPhysical, into: &mut [u8]) -> Result<(), NotMemory> {
        let length = into.len();
        self.memory.read_slice(into, GuestAddress(start.0)).map_err(|_| NotMemory { start, length })
    }

    /// Copies into guest memory.
    ///
    /// # Errors
    /// Part of the range is not memory; what comes before it may have been written.
    pub fn write(&self, start: GuestPhysical, from: &[u8]) -> Result<(), NotMemory> {
        let length = from.len();
        self.memory
            .write_slice(from, GuestAddress(start.0))
            .map_err(|_| NotMemory { start, length })?;
        self.observer.written(start, length);
        Ok(())
    }

    /// Reads a naturally aligned number in one piece.
    ///
    /// # Errors
    /// The address is not memory, or not aligned.
    pub fn load<T: AtomicAccess>(
        &self,
        at: GuestPhysical,
        order: Ordering,
    ) -> Result<T, NotMemory> {
        let length = size_of::<T>();
        self.memory.load(GuestAddress(at.0), order).map_err(|_| NotMemory { start: at, length })
    }

    /// Writes a naturally aligned number in one piece.
    ///
    /// # Errors
    /// The address is not memory, or not aligned.
    pub fn store<T: AtomicAccess>(
        &self,
        value: T,
        at: GuestPhysical,
        order: Ordering,
    ) -> Result<(), NotMemory> {
        let length = size_of::<T>();
        self.memory
            .store(value, GuestAddress(at.0), order)
            .map_err(|_| NotMemory { start: at, length })?;
        self.observer.written(at, length);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Noted(Mutex<Vec<(u64, usize)>>);
    impl WriteObserver for Noted {
        fn written(&self, start: GuestPhysical, length: usize) {
            crate::lock(&self.0).push((start.0, length));
        }
    }

    #[test]
    fn every_write_is_observed_and_none_goes_past_memory() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        let noted = Arc::new(Noted::default());
        let ram = GuestRam::new(Arc::new(memory), noted.clone());
        ram.write(GuestPhysical(0x100), &[1, 2, 3]).unwrap();
        ram.store(7u32, GuestPhysical(0x200), Ordering::Release).unwrap();
        assert_eq!(*crate::lock(&noted.0), [(0x100, 3), (0x200, 4)]);
        let mut back = [0; 3];
        ram.read(GuestPhysical(0x100), &mut back).unwrap();
        assert_eq!(
            (back, ram.load::<u32>(GuestPhysical(0x200), Ordering::Acquire)),
            ([1, 2, 3], Ok(7))
        );
        let start = GuestPhysical(0x1fff);
        assert_eq!(ram.read(start, &mut back), Err(NotMemory { start, length: 3 }));
        assert!(ram.write(GuestPhysical(u64::MAX), &back).is_err());
        assert!(ram.load::<u32>(GuestPhysical(0x201), Ordering::Acquire).is_err(), "unaligned");
        assert!(ram.contains(GuestPhysical(0x1ffd), 3) && !ram.contains(start, 3));
    }
}
