//! Giving guest memory back to the host.
#![allow(unsafe_code)]
use device::{GuestPhysical, GuestRam};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

/// Drops the contents of the whole pages of the host within a range, as far as it is memory:
/// they take no memory of the host any more until the guest touches them, and read as zero then.
/// Answers how many bytes that were.
///
/// # Errors
/// The host refuses, as it does for memory that is locked; what came before is dropped.
pub(crate) fn discard(ram: &GuestRam, start: GuestPhysical, length: u64) -> Result<u64, Errno> {
    let page = rustix::param::page_size() as u64;
    let mut dropped = 0;
    let end = start.0.saturating_add(length);
    for region in ram.memory().iter() {
        // Both within the region, and so is what is rounded inwards: regions are whole pages.
        let first = start.0.max(region.start_addr().0);
        let Some(from) = first.checked_next_multiple_of(page) else { continue };
        let to = end.min(region.start_addr().0.saturating_add(region.len())) & !(page - 1);
        let Some(bytes) = to.checked_sub(from).filter(|bytes| *bytes > 0) else { continue };
        let Some(address) = region.to_region_addr(GuestAddress(from)) else { continue };
        let (Ok(host), Ok(size)) = (region.get_host_address(address), usize::try_from(bytes))
        else {
            continue;
        };
        // SAFETY: the `size` bytes from `host` on lie in one region of guest memory, checked
        // above, whose mapping lives as long as `ram`. Guest memory is reached by volatile accesses
        // and by the guest only, never through Rust references, and the guest may change it at any
        // time: dropping its contents is one more such change. The mapping itself stays.
        unsafe { madvise(host.cast(), size, Advice::LinuxDontNeed) }?;
        ram.note_written(GuestPhysical(from), size);
        dropped += bytes;
    }
    Ok(dropped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::{GuestMemory, WriteObserver, lock};
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Noted(Mutex<Vec<(u64, usize)>>);
    impl WriteObserver for Noted {
        fn written(&self, start: GuestPhysical, length: usize) {
            lock(&self.0).push((start.0, length));
        }
    }

    #[test]
    fn only_whole_pages_that_are_memory_are_dropped_and_it_is_told() {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x10_0000), 0x4000)];
        let noted = Arc::new(Noted::default());
        let ram =
            GuestRam::new(Arc::new(GuestMemory::from_ranges(&ranges).unwrap()), noted.clone());
        for (start, length) in [(0, 0x4000), (0x10_0000, 0x4000)] {
            ram.write(GuestPhysical(start), &vec![7; length]).unwrap();
        }
        lock(&noted.0).clear();
        let drop = |start, length| discard(&ram, GuestPhysical(start), length).unwrap();
        assert_eq!(drop(0x1800, 0x2000), 0x1000, "rounded inwards");
        assert_eq!(drop(0x3001, 0xffe), 0);
        assert_eq!(drop(0x8000, 0x1000), 0, "no memory there");
        assert_eq!(drop(0x3000, u64::MAX), 0x5000, "what is memory of it");
        assert_eq!(drop(u64::MAX - 1, u64::MAX), 0);
        let told = [(0x2000, 0x1000), (0x3000, 0x1000), (0x10_0000, 0x4000)];
        assert_eq!(*lock(&noted.0), told);
        let mut back = vec![0; 0x4000];
        ram.read(GuestPhysical(0), &mut back).unwrap();
        assert!(back[..0x2000].iter().all(|byte| *byte == 7));
        assert!(back[0x2000..].iter().all(|byte| *byte == 0));
    }
}
