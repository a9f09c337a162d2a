//! Guest RAM as the engine reaches it: host pointers by guest-physical page, and for each page
//! the set of vCPUs that hold translated code of it.
#![allow(unsafe_code)]
use engine::GuestMemory;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

/// All RAM of a VM.
pub struct Ram {
    ranges: Vec<Range>,
    _memory: Arc<GuestMemory>,
}

struct Range {
    start: u64,
    end: u64,
    host: *mut u8,
    read_only: Vec<(u64, u64)>,
    /// One word a page: bit n is set while vCPU n may hold translations of code in it.
    code: Box<[AtomicU64]>,
}

// SAFETY: `host` points at a mapping that `_memory` keeps for the life of `Ram`, and all accesses
// through it are those of guest memory, which any thread may make at any time.
unsafe impl Send for Ram {}
// SAFETY: as above; the rest is atomic or immutable.
unsafe impl Sync for Ram {}

/// One page of RAM.
#[derive(Clone, Copy)]
pub struct RamPage<'a> {
    /// Host address of the page's first byte.
    pub host: *mut u8,
    /// Writes are dropped.
    pub read_only: bool,
    /// The vCPUs with translations of this page.
    pub code: &'a AtomicU64,
}

/// The most vCPUs that the code map can tell apart.
pub const MAX_VCPUS: u32 = 64;

impl Ram {
    /// Takes over all regions of `memory`; `read_only` lists (start, length) of ROM.
    pub fn new(memory: Arc<GuestMemory>, read_only: &[(u64, u64)]) -> Self {
        let ranges = memory
            .iter()
            .map(|region| {
                let start = region.start_addr().0;
                let pages = region.len().div_ceil(4096) as usize;
                Range {
                    start,
                    end: start + region.len(),
                    host: region.as_ptr(),
                    read_only: read_only.to_vec(),
                    code: zeroed_words(pages),
                }
            })
            .collect();
        Self { ranges, _memory: memory }
    }

    /// The page at guest-physical address `address`, or `None` where there is no RAM.
    #[inline]
    pub fn page(&self, address: u64) -> Option<RamPage<'_>> {
        let page = address & !0xfff;
        let range = self.ranges.iter().find(|r| page >= r.start && page + 0xfff < r.end)?;
        let offset = page - range.start;
        let read_only = range.read_only.iter().any(|&(s, l)| page + 0xfff >= s && page < s + l);
        let code = range.code.get((offset >> 12) as usize)?;
        // SAFETY: `offset` is within the mapping of this range by the check above.
        Some(RamPage { host: unsafe { range.host.add(offset as usize) }, read_only, code })
    }

    /// Host pointer to `len` bytes at `address`, all within one page of RAM.
    #[inline]
    pub fn bytes(&self, address: u64, len: usize) -> Option<*mut u8> {
        let offset = (address & 0xfff) as usize;
        if offset + len > 4096 {
            return None;
        }
        // SAFETY: within the page.
        Some(unsafe { self.page(address)?.host.add(offset) })
    }

    /// A naturally aligned word of a page table, or `None` where there is no RAM.
    pub fn entry64(&self, address: u64) -> Option<&AtomicU64> {
        let host = self.bytes(address & !7, 8)?;
        // SAFETY: aligned (page-aligned mapping plus a multiple of 8), inside the mapping, which
        // lives as long as `self`; guest memory is only ever accessed atomically or by raw copies.
        Some(unsafe { AtomicU64::from_ptr(host.cast()) })
    }

    /// The same for the 32-bit entries of legacy paging.
    pub fn entry32(&self, address: u64) -> Option<&std::sync::atomic::AtomicU32> {
        let host = self.bytes(address & !3, 4)?;
        // SAFETY: as in `entry64`.
        Some(unsafe { std::sync::atomic::AtomicU32::from_ptr(host.cast()) })
    }

    /// Forgets that vCPU `index` has translations anywhere.
    pub fn forget_code(&self, index: u32, pages: impl Iterator<Item = u64>) {
        for page in pages {
            if let Some(p) = self.page(page) {
                p.code.fetch_and(!(1 << index), Ordering::SeqCst);
            }
        }
    }
}

fn zeroed_words(n: usize) -> Box<[AtomicU64]> {
    // `vec![0; n]` is one calloc: pages of the map that are never touched cost nothing.
    let words = vec![0u64; n].into_boxed_slice();
    // SAFETY: AtomicU64 has the size, alignment and bit validity of u64.
    unsafe { Box::from_raw(Box::into_raw(words) as *mut [AtomicU64]) }
}
