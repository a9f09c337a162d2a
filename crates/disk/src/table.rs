//! The tables that say where an image's blocks are: read page by page when they are first needed,
//! kept, and written back page by page when the image is flushed.
//!
//! An entry is set only after the data of its block was written, and reaches the file only after
//! that data is durable: [`Table::take_changed`] gives copies of the changed pages, the caller
//! makes the data durable that was written so far, and then writes the copies.
use crate::DiskError;
use crate::store::Store;
use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Bytes of a page of a table.
pub(crate) const PAGE: u64 = 4096;

/// Bytes that a scan reads at once.
const SCAN: u64 = 1 << 20;

/// Takes a lock. What a panic left behind is still consistent: each change under the locks of
/// this crate's formats is complete with its last statement.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How an entry is kept in the file and in memory.
pub(crate) trait Entry: Send + Sync + 'static {
    type Cell: Send + Sync;
    const BYTES: u64;
    fn cell(bytes: &[u8]) -> Self::Cell;
    fn get(cell: &Self::Cell) -> u64;
    fn set(cell: &Self::Cell, value: u64);
    fn encode(value: u64, bytes: &mut Vec<u8>);
}

/// 32 bits, little-endian.
pub(crate) enum Le32 {}
/// 32 bits, big-endian.
pub(crate) enum Be32 {}
/// 64 bits, little-endian.
pub(crate) enum Le64 {}

macro_rules! entry {
    ($entry:ident, $cell:ident, $integer:ident, $decode:ident, $encode:ident) => {
        impl Entry for $entry {
            type Cell = $cell;
            const BYTES: u64 = size_of::<$integer>() as u64;

            fn cell(bytes: &[u8]) -> $cell {
                $cell::new($integer::$decode(bytes.try_into().unwrap_or_default()))
            }

            fn get(cell: &$cell) -> u64 {
                u64::from(cell.load(Ordering::Acquire))
            }

            fn set(cell: &$cell, value: u64) {
                cell.store(value as $integer, Ordering::Release);
            }

            fn encode(value: u64, bytes: &mut Vec<u8>) {
                bytes.extend((value as $integer).$encode());
            }
        }
    };
}

entry!(Le32, AtomicU32, u32, from_le_bytes, to_le_bytes);
entry!(Be32, AtomicU32, u32, from_be_bytes, to_be_bytes);
entry!(Le64, AtomicU64, u64, from_le_bytes, to_le_bytes);

/// The entries of one page.
pub(crate) type Cells<E> = Box<[<E as Entry>::Cell]>;

/// Decodes a page.
pub(crate) fn decode<E: Entry>(bytes: &[u8]) -> Cells<E> {
    bytes.chunks_exact(usize::try_from(E::BYTES).unwrap_or(1)).map(E::cell).collect()
}

/// Encodes a page as it is now.
pub(crate) fn encode<E: Entry>(cells: &[E::Cell]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for cell in cells {
        E::encode(E::get(cell), &mut bytes);
    }
    bytes
}

/// A page to be written.
pub(crate) struct Changed {
    /// Which page of the table.
    pub page: u64,
    /// Where it is in the file.
    pub offset: u64,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// A table that lies in one piece in the file.
pub(crate) struct Table<E: Entry> {
    offset: u64,
    entries: u64,
    pages: Box<[OnceLock<Cells<E>>]>,
    changed: Mutex<BTreeSet<u64>>,
    entry: PhantomData<E>,
}

impl<E: Entry> Table<E> {
    /// A table of `entries` from `offset` on, which the caller has checked to lie in the file.
    pub(crate) fn new(offset: u64, entries: u64) -> Self {
        let pages = entries.saturating_mul(E::BYTES).div_ceil(PAGE);
        Self {
            offset,
            entries,
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            changed: Mutex::default(),
            entry: PhantomData,
        }
    }

    fn per_page() -> u64 {
        PAGE / E::BYTES
    }

    /// An entry, or none beyond the table's end.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn get(&self, store: &dyn Store, index: u64) -> Result<Option<u64>, DiskError> {
        Ok(self.cell(store, index)?.map(E::get))
    }

    /// Changes an entry that is there. No two threads may do so at once.
    ///
    /// # Errors
    /// Its page cannot be read.
    pub(crate) fn set(&self, store: &dyn Store, index: u64, value: u64) -> Result<(), DiskError> {
        if let Some(cell) = self.cell(store, index)? {
            E::set(cell, value);
            lock(&self.changed).insert(index / Self::per_page());
        }
        Ok(())
    }

    fn cell(&self, store: &dyn Store, index: u64) -> Result<Option<&E::Cell>, DiskError> {
        let (page, within) = (index / Self::per_page(), index % Self::per_page());
        let Some(slot) = usize::try_from(page).ok().and_then(|page| self.pages.get(page)) else {
            return Ok(None);
        };
        let cells = match slot.get() {
            Some(cells) => cells,
            None => {
                let cells = self.load(store, page)?;
                slot.get_or_init(|| cells)
            }
        };
        Ok(usize::try_from(within).ok().and_then(|within| cells.get(within)))
    }

    fn load(&self, store: &dyn Store, page: u64) -> Result<Cells<E>, DiskError> {
        let start = page * PAGE;
        let length = PAGE.min(self.entries.saturating_mul(E::BYTES) - start);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        store.read_at(self.offset.saturating_add(start), &mut bytes)?;
        Ok(decode::<E>(&bytes))
    }

    /// Copies of the pages that were changed since the last call.
    pub(crate) fn take_changed(&self) -> Vec<Changed> {
        let changed = std::mem::take(&mut *lock(&self.changed));
        let copy = |page: u64| {
            let cells = self.pages.get(usize::try_from(page).ok()?)?.get()?;
            let bytes = encode::<E>(cells);
            Some(Changed { page, offset: self.offset.saturating_add(page * PAGE), bytes })
        };
        changed.into_iter().filter_map(copy).collect()
    }

    /// Says that pages could not be written.
    pub(crate) fn put_back(&self, pages: &[Changed]) {
        lock(&self.changed).extend(pages.iter().map(|changed| changed.page));
    }

    /// Shows each entry with its index as the file has it, without keeping it.
    ///
    /// # Errors
    /// The table cannot be read, or `see` fails.
    pub(crate) fn scan(
        &self,
        store: &dyn Store,
        mut see: impl FnMut(u64, u64) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let length = self.entries.saturating_mul(E::BYTES);
        let mut buffer = vec![0; usize::try_from(SCAN.min(length)).unwrap_or_default()];
        let width = usize::try_from(E::BYTES).unwrap_or(1);
        let (mut done, mut index) = (0, 0);
        while done < length {
            let now = usize::try_from(SCAN.min(length - done)).unwrap_or_default();
            let bytes = buffer.get_mut(..now).unwrap_or_default();
            store.read_at(self.offset.saturating_add(done), bytes)?;
            for entry in bytes.chunks_exact(width) {
                see(index, E::get(&E::cell(entry)))?;
                index += 1;
            }
            done += now as u64;
        }
        Ok(())
    }
}
