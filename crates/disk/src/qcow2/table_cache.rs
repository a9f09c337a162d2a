//! A bounded cache of pages of L2 tables or refcount blocks, which holds what was changed until it
//! is written in an order that survives a crash (see [`super::commit`]).
use crate::bytes::{be64, put};
use crate::{DiskError, Store};
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, VecDeque};

/// Largest page, in bytes: small, because one changed entry has its whole page written.
const PAGE: u64 = 4096;

/// Bytes of tables that are kept in memory at most, but for pages that wait to be written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheLimit(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// As in the file.
    Clean,
    /// Changed.
    Dirty,
    /// A copy of it is being written; it must stay, and is clean if it does not change meanwhile.
    Writing,
}

#[derive(Debug)]
struct Page {
    bytes: Box<[u8]>,
    state: State,
    /// Used since it was last considered for removal.
    used: bool,
}

/// Pages by their place in the file.
#[derive(Debug)]
pub(crate) struct TableCache {
    pages: HashMap<u64, Page>,
    dirty: BTreeSet<u64>,
    /// Candidates for removal, the oldest first.
    queue: VecDeque<u64>,
    page_size: u64,
    capacity: usize,
}

impl TableCache {
    pub fn new(cluster_size: u64, limit: CacheLimit) -> Self {
        let page_size = PAGE.min(cluster_size);
        let capacity = usize::try_from((limit.0 / page_size).max(64)).unwrap_or(64);
        Self {
            pages: HashMap::new(),
            dirty: BTreeSet::new(),
            queue: VecDeque::new(),
            page_size,
            capacity,
        }
    }

    /// Bytes of a page.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The page that holds the byte at `offset`, and where that byte is in it. Beyond the file's
    /// end are zeroes.
    pub fn page(&mut self, store: &dyn Store, offset: u64) -> Result<(&[u8], usize), DiskError> {
        let (page, within) = self.load(store, offset)?;
        Ok((&page.bytes, within))
    }

    /// The big-endian number at `offset`, which is aligned.
    pub fn get64(&mut self, store: &dyn Store, offset: u64) -> Result<u64, DiskError> {
        let (page, within) = self.load(store, offset)?;
        Ok(be64(&page.bytes, within))
    }

    /// Changes the big-endian number at `offset`, which is aligned.
    pub fn set64(&mut self, store: &dyn Store, offset: u64, value: u64) -> Result<(), DiskError> {
        self.change(store, offset, |bytes, at| put(bytes, at, &value.to_be_bytes()))
    }

    /// Changes the page that holds the byte at `offset`; `change` gets it and where the byte is.
    pub fn change(
        &mut self,
        store: &dyn Store,
        offset: u64,
        change: impl FnOnce(&mut [u8], usize),
    ) -> Result<(), DiskError> {
        let (page, within) = self.load(store, offset)?;
        change(&mut page.bytes, within);
        page.state = State::Dirty;
        self.dirty.insert(offset - within as u64);
        Ok(())
    }

    /// Puts a page there that is to be written, in place of what the file has.
    pub fn insert(&mut self, offset: u64, bytes: Box<[u8]>) {
        debug_assert!(offset.is_multiple_of(self.page_size));
        self.make_room();
        if self.pages.insert(offset, Page { bytes, state: State::Dirty, used: true }).is_none() {
            self.queue.push_back(offset);
        }
        self.dirty.insert(offset);
    }

    /// Forgets the pages in a range, changed or not: it belongs to something else now.
    pub fn forget(&mut self, offset: u64, length: u64) {
        for at in (offset..offset.saturating_add(length)).step_by(self.page_size as usize) {
            self.pages.remove(&at);
            self.dirty.remove(&at);
        }
    }

    /// Pages that wait to be written.
    pub fn dirty_pages(&self) -> usize {
        self.dirty.len()
    }

    /// Whether so many wait that they should be written before more do.
    pub fn crowded(&self) -> bool {
        self.dirty.len() > self.capacity / 2
    }

    /// Copies of all changed pages, with their places; they count as being written from now on.
    pub fn begin_writing(&mut self) -> Vec<(u64, Box<[u8]>)> {
        let mut copies = Vec::with_capacity(self.dirty.len());
        for offset in std::mem::take(&mut self.dirty) {
            if let Some(page) = self.pages.get_mut(&offset) {
                page.state = State::Writing;
                copies.push((offset, page.bytes.clone()));
            }
        }
        copies
    }

    /// The pages from [`TableCache::begin_writing`] are written, or could not be.
    pub fn end_writing(&mut self, copies: &[(u64, Box<[u8]>)], written: bool) {
        for (offset, _) in copies {
            let Some(page) = self.pages.get_mut(offset) else { continue };
            if page.state != State::Writing {
                continue;
            }
            if written {
                page.state = State::Clean;
            } else {
                page.state = State::Dirty;
                self.dirty.insert(*offset);
            }
        }
    }

    fn load(&mut self, store: &dyn Store, offset: u64) -> Result<(&mut Page, usize), DiskError> {
        let start = offset - offset % self.page_size;
        let within = usize::try_from(offset - start).unwrap_or(0);
        if !self.pages.contains_key(&start) {
            self.make_room();
            self.queue.push_back(start);
        }
        let page = match self.pages.entry(start) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut bytes = vec![0; usize::try_from(self.page_size).unwrap_or(0)];
                store.read_or_zero_at(start, &mut bytes)?;
                let bytes = bytes.into_boxed_slice();
                entry.insert(Page { bytes, state: State::Clean, used: false })
            }
        };
        page.used = true;
        Ok((page, within))
    }

    /// Drops clean pages that were not used lately until there is room for one.
    fn make_room(&mut self) {
        // Pages that were forgotten are still in the queue, some of them twice by now.
        if self.queue.len() > 2 * self.capacity {
            self.queue = self.pages.keys().copied().collect();
        }
        let mut tries = 2 * self.queue.len();
        while self.pages.len() >= self.capacity && tries > 0 {
            tries -= 1;
            let Some(offset) = self.queue.pop_front() else { return };
            match self.pages.get_mut(&offset) {
                // It was forgotten.
                None => {}
                Some(page) if page.state == State::Clean && !page.used => {
                    self.pages.remove(&offset);
                }
                Some(page) => {
                    page.used = false;
                    self.queue.push_back(offset);
                }
            }
        }
    }
}
