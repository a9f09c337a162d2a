//! The blocks of a dynamic VHD image. In front of each block's data is a bitmap of the sectors that
//! were written ("Block Allocation Table and Data Blocks" in the specification); what was not
//! reads as zeroes.
//!
//! Blocks that are added here have all bits set, as their data is zeroes where nothing was
//! written. Other programs' blocks get all bits set when they are first written to.
use super::footer::{DYNAMIC_HEADER, DynamicHeader, FOOTER, Footer};
use crate::store::{Complain, Store};
use crate::table::{Be32, Table, lock};
use crate::{DiskError, SECTOR};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A table entry of a block that is not there.
const ABSENT: u64 = 0xffff_ffff;
/// What data in the file is aligned to, for the host's sake, in bytes.
const ALIGNMENT: u64 = 4096;

/// Where the next block goes.
#[derive(Debug, Default)]
struct Allocation {
    /// Where the last block ends.
    end: u64,
    /// Whether the file is known to end there with a footer.
    trimmed: bool,
}

/// The blocks of an open image.
pub(super) struct Dynamic {
    header: DynamicHeader,
    footer: Vec<u8>,
    bitmap: u64,
    table: Table<Be32>,
    allocation: Mutex<Allocation>,
    writing_back: Mutex<()>,
    /// A bit for each block whose bitmap is known to have all bits set.
    complete: Box<[AtomicU64]>,
    /// Where the last block ends that can be read.
    end: AtomicU64,
}

impl Dynamic {
    /// Reads the header; `has_tail` says whether a sound footer is at the file's end.
    pub(super) fn open(
        store: &dyn Store,
        footer: &Footer,
        has_tail: bool,
    ) -> Result<Self, DiskError> {
        let header = DynamicHeader::read(store, footer)?;
        let size = store.size()?;
        let image = Self {
            footer: footer.bytes.clone(),
            bitmap: (header.block_size / SECTOR / 8).next_multiple_of(SECTOR),
            table: Table::new(header.table, header.blocks),
            allocation: Mutex::default(),
            writing_back: Mutex::default(),
            complete: (0..header.blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            end: AtomicU64::new(if has_tail { size.saturating_sub(FOOTER) } else { size }),
            header,
        };
        if !store.read_only() {
            let mut end = image.header.table_end.max(image.header.offset + DYNAMIC_HEADER);
            image.table.scan(store, |block, entry| {
                if entry != ABSENT {
                    end = end.max(image.check(store, block, entry)? + image.stride());
                }
                Ok(())
            })?;
            if !has_tail {
                write_footer(store, &image.footer, end)?;
            }
            *lock(&image.allocation) = Allocation { end, trimmed: !has_tail };
        }
        Ok(image)
    }

    pub(super) fn block_size(&self) -> u64 {
        self.header.block_size
    }

    /// Bytes of a block with its bitmap.
    fn stride(&self) -> u64 {
        self.bitmap + self.header.block_size
    }

    /// Where a block begins that has an entry.
    fn check(&self, store: &dyn Store, block: u64, entry: u64) -> Result<u64, DiskError> {
        let start = entry * SECTOR;
        let end = start + self.stride();
        let header = self.header.offset..self.header.offset + DYNAMIC_HEADER;
        let table = self.header.table..self.header.table_end;
        let overlaps =
            [0..FOOTER, header, table].iter().any(|other| start < other.end && other.start < end);
        if overlaps || end > self.end.load(Ordering::Acquire) {
            let what = format!("block {block} is said to be at {start}, where none can be");
            return Err(store.damaged(what));
        }
        Ok(start)
    }

    /// Where a block begins, with its bitmap.
    fn start(&self, store: &dyn Store, block: u64) -> Result<Option<u64>, DiskError> {
        match self.table.get(store, block)? {
            None | Some(ABSENT) => Ok(None),
            Some(entry) => self.check(store, block, entry).map(Some),
        }
    }

    /// Where a block's data is.
    pub(super) fn find(&self, store: &dyn Store, block: u64) -> Result<Option<u64>, DiskError> {
        Ok(self.start(store, block)?.map(|start| start + self.bitmap))
    }

    fn complete_bit(&self, block: u64) -> Option<(&AtomicU64, u64)> {
        let word = usize::try_from(block / 64).ok().and_then(|word| self.complete.get(word));
        word.map(|word| (word, 1 << (block % 64)))
    }

    fn is_complete(&self, block: u64) -> bool {
        self.complete_bit(block).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    fn set_complete(&self, block: u64) {
        if let Some((word, bit)) = self.complete_bit(block) {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// The bitmap of a block that begins at `start`; `None` where all its bits are set.
    fn read_bitmap(
        &self,
        store: &dyn Store,
        block: u64,
        start: u64,
    ) -> Result<Option<Vec<u8>>, DiskError> {
        let length = self.header.block_size / SECTOR / 8;
        let mut bitmap = vec![0; usize::try_from(length).unwrap_or_default()];
        store.read_at(start, &mut bitmap)?;
        if bitmap.iter().all(|byte| *byte == 0xff) {
            self.set_complete(block);
            return Ok(None);
        }
        Ok(Some(bitmap))
    }

    /// Zeroes in `buffer`, which was read from `within` of a block on, what was never written.
    pub(super) fn mask(
        &self,
        store: &dyn Store,
        block: u64,
        within: u64,
        buffer: &mut [u8],
    ) -> Result<(), DiskError> {
        if self.is_complete(block) {
            return Ok(());
        }
        let Some(start) = self.start(store, block)? else { return Ok(()) };
        let Some(bitmap) = self.read_bitmap(store, block, start)? else { return Ok(()) };
        let (mut at, mut rest) = (within, buffer);
        while !rest.is_empty() {
            let now = usize::try_from(SECTOR - at % SECTOR).unwrap_or_default().min(rest.len());
            let (sector, others) = rest.split_at_mut(now);
            if !is_written(&bitmap, at / SECTOR) {
                sector.fill(0);
            }
            at += now as u64;
            rest = others;
        }
        Ok(())
    }

    /// Where a block's data is, after all bits of its bitmap were set.
    pub(super) fn find_to_write(
        &self,
        store: &dyn Store,
        block: u64,
    ) -> Result<Option<u64>, DiskError> {
        let Some(start) = self.start(store, block)? else { return Ok(None) };
        if !self.is_complete(block) {
            let _one = lock(&self.allocation);
            if !self.is_complete(block)
                && let Some(bitmap) = self.read_bitmap(store, block, start)?
            {
                self.complete_block(store, block, start, &bitmap)?;
            }
        }
        Ok(Some(start + self.bitmap))
    }

    fn complete_block(
        &self,
        store: &dyn Store,
        block: u64,
        start: u64,
        bitmap: &[u8],
    ) -> Result<(), DiskError> {
        let sectors = self.header.block_size / SECTOR;
        let mut sector = 0;
        while sector < sectors {
            let first = sector;
            while sector < sectors && !is_written(bitmap, sector) {
                sector += 1;
            }
            if sector > first {
                let place = start + self.bitmap + first * SECTOR;
                store.write_zeroes(place, (sector - first) * SECTOR)?;
            }
            sector += 1;
        }
        // The bits must not come first: they would bring up what lay there.
        store.sync()?;
        store.write_at(start, &vec![0xff; bitmap.len()])?;
        self.set_complete(block);
        Ok(())
    }

    /// See [`crate::blocks::Blocks::add`].
    pub(super) fn add(
        &self,
        store: &dyn Store,
        block: u64,
        within: u64,
        data: &[u8],
    ) -> Result<(), DiskError> {
        let mut allocation = lock(&self.allocation);
        if let Some(start) = self.start(store, block)? {
            // Another thread has just added it, with all bits set.
            return store.write_at(start + self.bitmap + within, data);
        }
        if !allocation.trimmed {
            // Blocks of which a crash kept the table from knowing, or a write that failed.
            write_footer(store, &self.footer, allocation.end)?;
        }
        // Should anything fail from here on, the place is emptied before it is used again.
        allocation.trimmed = false;
        let place = (allocation.end + self.bitmap).next_multiple_of(ALIGNMENT);
        let start = place - self.bitmap;
        let end = place + self.header.block_size;
        let entry = u32::try_from(start / SECTOR).ok().filter(|entry| u64::from(*entry) != ABSENT);
        let Some(entry) = entry else {
            return Err(store.damaged("it has no room for another block below 2 TiB".to_owned()));
        };
        // The new footer comes before the old one is overwritten, by the bitmap or not at all:
        // it lies before the block's data.
        store.write_at(end, &self.footer)?;
        store.write_at(start, &vec![0xff; usize::try_from(self.bitmap).unwrap_or_default()])?;
        store.write_at(place + within, data)?;
        self.end.fetch_max(end, Ordering::AcqRel);
        self.set_complete(block);
        self.table.set(store, block, entry.into())?;
        *allocation = Allocation { end, trimmed: true };
        Ok(())
    }

    /// Writes what refers to blocks, after the blocks.
    pub(super) fn write_back(&self, store: &dyn Store) -> Result<(), DiskError> {
        let _one = lock(&self.writing_back);
        let pages = {
            let _stable = lock(&self.allocation);
            self.table.take_changed()
        };
        let write = || {
            store.sync()?;
            for page in &pages {
                store.write_at(page.offset, &page.bytes)?;
            }
            if pages.is_empty() { Ok(()) } else { store.sync() }
        };
        let done = write();
        if done.is_err() {
            self.table.put_back(&pages);
        }
        done
    }
}

fn is_written(bitmap: &[u8], sector: u64) -> bool {
    let byte = usize::try_from(sector / 8).ok().and_then(|byte| bitmap.get(byte));
    byte.is_some_and(|byte| byte & 0x80 >> (sector % 8) != 0)
}

/// Makes the file end at `end` with a footer.
fn write_footer(store: &dyn Store, footer: &[u8], end: u64) -> Result<(), DiskError> {
    store.write_at(end, footer)?;
    store.set_size(end + FOOTER)
}
