//! Which pages of memory vCPUs wrote to.
use crate::{EngineError, GuestMemory};
use arch::GuestPhysical;
use arch::address::PAGE_SIZE;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

/// The record of the pages that vCPUs write to, for snapshots and migration.
///
/// It holds what vCPUs write, accessed and dirty bits in page tables included, whichever part of
/// the engine does it. It does not hold what the machine itself writes, its loaders and devices:
/// that goes past the engine, and the machine, which knows it, adds it.
///
/// All methods are callable from any thread that no vCPU waits for: engines wait until running
/// vCPUs have taken notice. So a caller must not hold a lock that a device takes in a call from a
/// vCPU, and must not be such a call.
pub trait DirtyLog: Send + Sync {
    /// Begins to record; what was recorded before is forgotten.
    ///
    /// # Errors
    /// Fails where the host refuses; nothing is recorded then.
    fn start(&self) -> Result<(), EngineError>;

    /// Takes out the pages that were written since the last harvest, or the start: each time a
    /// page is written at least one later harvest has it. To be read after this returns.
    ///
    /// What vCPUs write while this runs is in this harvest or the next; of a vCPU that runs all
    /// the while, the same may hold for its latest writes before. What vCPUs wrote that are not in
    /// [`crate::Vcpu::run`] is complete.
    ///
    /// # Errors
    /// Fails where the log was not started, or the host refuses.
    fn harvest(&self) -> Result<Vec<DirtyRange>, EngineError>;

    /// Ends recording and forgets what was recorded. Does nothing if it was not started.
    ///
    /// # Errors
    /// Fails where the host refuses; recording goes on then.
    fn stop(&self) -> Result<(), EngineError>;
}

/// Dirty pages, one after the other. A harvest's ranges are in ascending order, and as few as
/// possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRange {
    /// The first page.
    pub start: GuestPhysical,
    /// The length in bytes, a multiple of the page size.
    pub length: u64,
}

/// A set of pages of a guest's memory that any thread can add to: what engines keep their log in.
pub struct DirtyMap {
    regions: Vec<Region>,
}

struct Region {
    start: u64,
    end: u64,
    /// A bit a page.
    words: Box<[AtomicU64]>,
}

impl DirtyMap {
    /// The empty set.
    pub fn new(memory: &GuestMemory) -> Self {
        let mut regions: Vec<_> = memory
            .iter()
            .map(|region| {
                let start = region.start_addr().0;
                let words = region.len().div_ceil(PAGE_SIZE).div_ceil(64);
                let words = (0..words).map(|_| AtomicU64::new(0)).collect();
                Region { start, end: start.saturating_add(region.len()), words }
            })
            .collect();
        regions.sort_unstable_by_key(|region| region.start);
        Self { regions }
    }

    /// Adds the page of an address; does nothing where there is no memory.
    pub fn mark(&self, address: GuestPhysical) {
        let of = |r: &&Region| (r.start..r.end).contains(&address.0);
        if let Some(region) = self.regions.iter().find(of) {
            let page = (address.0 - region.start) / PAGE_SIZE;
            if let Some(word) = region.words.get((page / 64) as usize) {
                word.fetch_or(1 << (page % 64), Ordering::SeqCst);
            }
        }
    }

    /// Adds pages from `start` on: bit n of word m is page 64 m + n.
    pub fn mark_bits(&self, start: GuestPhysical, words: &[u64]) {
        for (n, word) in (0u64..).zip(words) {
            let mut rest = *word;
            while rest != 0 {
                let page = n * 64 + u64::from(rest.trailing_zeros());
                rest &= rest - 1;
                self.mark(GuestPhysical(start.0.saturating_add(page * PAGE_SIZE)));
            }
        }
    }

    /// Adds ranges.
    pub fn mark_ranges(&self, ranges: &[DirtyRange]) {
        for range in ranges {
            let mut at = range.start.page();
            let end = range.start.0.saturating_add(range.length);
            while at.0 < end {
                self.mark(at);
                at = GuestPhysical(at.0.saturating_add(PAGE_SIZE));
            }
        }
    }

    /// Takes all pages out.
    pub fn take(&self) -> Vec<DirtyRange> {
        let mut ranges: Vec<DirtyRange> = Vec::new();
        for region in &self.regions {
            for (n, word) in (0u64..).zip(&region.words) {
                let mut rest = word.swap(0, Ordering::SeqCst);
                while rest != 0 {
                    let page = n * 64 + u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    append(&mut ranges, region.start + page * PAGE_SIZE);
                }
            }
        }
        ranges
    }
}

fn append(ranges: &mut Vec<DirtyRange>, page: u64) {
    match ranges.last_mut() {
        Some(last) if last.start.0 + last.length == page => last.length += PAGE_SIZE,
        _ => ranges.push(DirtyRange { start: GuestPhysical(page), length: PAGE_SIZE }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn range(start: u64, length: u64) -> DirtyRange {
        DirtyRange { start: GuestPhysical(start), length }
    }

    fn map() -> Option<DirtyMap> {
        let parts = [(GuestAddress(0), 0x10_0000), (GuestAddress(0x40_0000), 0x10_0000)];
        GuestMemory::from_ranges(&parts).ok().map(|memory| DirtyMap::new(&memory))
    }

    #[test]
    fn pages_come_out_once_in_order_and_joined() {
        let Some(map) = map() else { panic!("2 MiB of memory") };
        for address in [0x40_0fff, 0x5000, 0x3fff, 0x4001, 0x3000, 0x4f_f000] {
            map.mark(GuestPhysical(address));
        }
        let expected = [range(0x3000, 0x3000), range(0x40_0000, 0x1000), range(0x4f_f000, 0x1000)];
        assert_eq!(map.take(), expected);
        assert_eq!(map.take(), []);
    }

    #[test]
    fn what_is_not_memory_is_left_out() {
        let Some(map) = map() else { panic!("2 MiB of memory") };
        map.mark(GuestPhysical(0x20_0000));
        map.mark(GuestPhysical(u64::MAX));
        assert_eq!(map.take(), []);
    }

    #[test]
    fn bits_and_ranges_name_the_same_pages() {
        let Some(map) = map() else { panic!("2 MiB of memory") };
        map.mark_bits(GuestPhysical(0x40_0000), &[0b110, 1]);
        let expected = [range(0x40_1000, 0x2000), range(0x44_0000, 0x1000)];
        let taken = map.take();
        assert_eq!(taken, expected);
        map.mark_ranges(&taken);
        assert_eq!(map.take(), expected);
    }
}
