//! VHDX, Hyper-V's format.
//!
//! [MS-VHDX] 7.0. Two headers (`header`) say where the log is (`log`), a region table (`regions`)
//! where the block table and the metadata are. Changes of the block table go through the log, so
//! they are there as a whole or not at all. Differencing images, which need a parent, and disks
//! with logical sectors of 4 KiB are refused.
//!
//! **Order of writes.** A block's data is durable before the log entry with its table entry is
//! written; that is durable before the table is changed in its place; and that before the log
//! entry's place is used again, or the header says that the log is empty, which it does when the
//! image is closed.
mod header;
mod log;
mod parts;
mod patched;
mod regions;

use crate::blocks::{Blocks, disk_of_blocks};
use crate::bytes::{array, put};
use crate::create::{check_size, new_file};
use crate::store::{Complain, Store};
use crate::table::{Changed, Le64, PAGE, Table, lock};
use crate::{Disk, DiskError, FileOptions};
use header::{FILE_TYPE, Header, MIB};
use log::Log;
use regions::{BLOCK_SIZES, MAX_SIZE, Metadata, Regions};
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// States of a block in its table entry ([MS-VHDX] 2.5.1.1).
const STATE_MASK: u64 = 7;
const FULLY_PRESENT: u64 = 6;
/// Up to this state, a block reads as zeroes: not present, undefined, zero, unmapped.
const LAST_ABSENT: u64 = 3;
/// The bits of a table entry that are a block's place in the file, which is a multiple of 1 MiB.
const PLACE_MASK: u64 = !(MIB - 1);
/// Where new images have their log, and its length.
const NEW_LOG: u64 = MIB;
const NEW_LOG_LENGTH: u32 = 1 << 20;
const NEW_METADATA: Range<u64> = 2 * MIB..3 * MIB;
const NEW_TABLE: u64 = 3 * MIB;
/// Up to this size, new images have the smallest blocks: the host's holes do the rest.
const SMALL_BLOCKS_UP_TO: u64 = 1 << 40;
/// The block size of larger ones, which is Hyper-V's.
const LARGE_BLOCKS: u64 = 32 * MIB;

/// How an image takes up space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Blocks are added when they are first written to.
    Dynamic,
    /// All blocks have their place from the start.
    Fixed,
}

/// What a new image is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// How it takes up space.
    pub variant: Variant,
    /// Bytes of a block: a power of two from 1 MiB to 256 MiB. `None` leaves it to the disk's
    /// size.
    pub block_size: Option<u64>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self { variant: Variant::Dynamic, block_size: None }
    }
}

/// Where the next block goes.
#[derive(Debug, Default)]
struct Allocation {
    /// Where the last block, or the last other part of the file, ends.
    end: u64,
    /// Whether the file is known to end there, or before.
    trimmed: bool,
}

/// What is written beside blocks and tables.
struct Records {
    header: Header,
    log: Log,
}

/// An open VHDX image.
pub struct Vhdx {
    store: Box<dyn Store>,
    metadata: Metadata,
    table: Table<Le64>,
    /// The parts of the file where no block can be.
    parts: Vec<Range<u64>>,
    allocation: Mutex<Allocation>,
    /// Also held while the table is written, so that no older copy of a page follows a newer one.
    records: Mutex<Records>,
    /// Whether the header says that the image was changed since it was opened.
    changed: AtomicBool,
    /// Where the last block ends that can be read.
    end: AtomicU64,
}

impl Vhdx {
    /// Opens an image. Where it was not closed, what its log holds is done first, or, where the
    /// store is read-only, laid over what is read.
    ///
    /// # Errors
    /// [`DiskError::NotThisFormat`], [`DiskError::Unsupported`] for differencing images and 4 KiB
    /// sectors, [`DiskError::Damaged`], or the host cannot read.
    pub fn open(store: impl Store + 'static) -> Result<Self, DiskError> {
        let mut signature = [0; 8];
        store.read_or_zero_at(0, &mut signature)?;
        if signature != *FILE_TYPE {
            return Err(DiskError::NotThisFormat { file: store.name(), format: "VHDX" });
        }
        let mut header = Header::read(&store)?;
        let store = log::replay(Box::new(store), &mut header)?;
        let regions = Regions::read(&*store)?;
        let metadata = Metadata::read(&*store, &regions.metadata)?;
        let entries = metadata.entries();
        let room = regions.block_table.end - regions.block_table.start;
        if entries * 8 > room {
            let what = format!("its block table has {room} bytes for {entries} entries");
            return Err(store.damaged(what));
        }
        let log = header.log_offset()..header.log_offset() + header.log_length();
        let mut parts = vec![0..MIB, log, regions.block_table.clone(), regions.metadata.clone()];
        parts.extend(regions.others);
        let image = Self {
            // The log takes whole pages; the region has room for them.
            table: Table::new(regions.block_table.start, entries.next_multiple_of(PAGE / 8)),
            parts,
            allocation: Mutex::default(),
            records: Mutex::new(Records { log: Log::new(&header)?, header }),
            changed: AtomicBool::new(false),
            end: AtomicU64::new(store.size()?),
            metadata,
            store,
        };
        if !image.store.read_only() {
            let end = image.survey()?;
            *lock(&image.allocation) = Allocation { end, trimmed: false };
        }
        Ok(image)
    }

    /// Makes a new image of `size` bytes, which reads as zeroes, and opens it to write.
    ///
    /// # Errors
    /// [`DiskError::Invalid`] for a size or block size that the format does not have (at most
    /// 64 TiB) or a file that exists, or the host cannot write.
    pub fn create(
        path: &Path,
        size: u64,
        create: CreateOptions,
        options: FileOptions,
    ) -> Result<Self, DiskError> {
        new_file(path, options, |file| Self::create_in(file, size, create))
    }

    /// Makes a new image of an empty store, as [`Vhdx::create`] does of a file.
    ///
    /// # Errors
    /// As [`Vhdx::create`].
    pub fn create_in(
        store: impl Store + 'static,
        size: u64,
        create: CreateOptions,
    ) -> Result<Self, DiskError> {
        check_size(&store.name(), size, MAX_SIZE)?;
        let default = if size <= SMALL_BLOCKS_UP_TO { MIB } else { LARGE_BLOCKS };
        let block_size = create.block_size.unwrap_or(default);
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            let problem =
                format!("blocks of {block_size} bytes cannot be; choose 1 MiB to 256 MiB");
            return Err(DiskError::Invalid { file: store.name(), problem });
        }
        let fixed = create.variant == Variant::Fixed;
        lay_out(&store, &Metadata { disk_size: size, block_size, fixed })?;
        Self::open(store)
    }

    /// How the image takes up space.
    #[must_use]
    pub fn variant(&self) -> Variant {
        if self.metadata.fixed { Variant::Fixed } else { Variant::Dynamic }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.metadata.block_size
    }

    fn disk_size(&self) -> u64 {
        self.metadata.disk_size
    }

    /// Looks at the whole block table; where the last block ends.
    fn survey(&self) -> Result<u64, DiskError> {
        let mut end = self.parts.iter().map(|part| part.end).max().unwrap_or_default();
        let megabytes = self.end.load(Ordering::Acquire).div_ceil(MIB);
        let mut used = vec![0_u64; usize::try_from(megabytes.div_ceil(64)).unwrap_or_default()];
        let mut block = 0;
        self.table.scan(&*self.store, |index, entry| {
            if block >= self.metadata.blocks() || index != self.metadata.entry(block) {
                return Ok(());
            }
            if let Some(place) = self.place(block, entry)? {
                let place_end = place + self.metadata.block_size;
                for megabyte in place / MIB..place_end / MIB {
                    let word = usize::try_from(megabyte / 64).ok();
                    let Some(word) = word.and_then(|word| used.get_mut(word)) else { break };
                    if *word & 1 << (megabyte % 64) != 0 {
                        let what = format!("two blocks are at {place}, one is {block}");
                        return Err(self.store.damaged(what));
                    }
                    *word |= 1 << (megabyte % 64);
                }
                end = end.max(place_end);
            }
            block += 1;
            Ok(())
        })?;
        Ok(end.next_multiple_of(MIB))
    }

    /// Where a block with this table entry is.
    fn place(&self, block: u64, entry: u64) -> Result<Option<u64>, DiskError> {
        let place = entry & PLACE_MASK;
        let what = match entry & STATE_MASK {
            ..=LAST_ABSENT => return Ok(None),
            FULLY_PRESENT => {
                let size = self.metadata.block_size;
                // A file may end with the disk's last block, which is not full.
                let needed = size.min(self.metadata.disk_size - block * size);
                let end = place.checked_add(size);
                let is_within = place
                    .checked_add(needed)
                    .is_some_and(|end| end <= self.end.load(Ordering::Acquire));
                let overlaps = end.is_none_or(|end| {
                    self.parts.iter().any(|part| place < part.end && part.start < end)
                });
                if is_within && !overlaps {
                    return Ok(Some(place));
                }
                format!("block {block} is said to be at {place}, where none can be")
            }
            state => format!("block {block} is in state {state}, which it cannot be"),
        };
        Err(self.store.damaged(what))
    }

    /// Writes what refers to blocks, after the blocks.
    fn write_back(&self) -> Result<(), DiskError> {
        let mut records = lock(&self.records);
        let (pages, end) = {
            let allocation = lock(&self.allocation);
            (self.table.take_changed(), allocation.end)
        };
        let done = self.write_pages(&mut records, &pages, end);
        if done.is_err() {
            self.table.put_back(&pages);
        }
        done
    }

    fn write_pages(
        &self,
        records: &mut Records,
        pages: &[Changed],
        end: u64,
    ) -> Result<(), DiskError> {
        let store = &*self.store;
        if !pages.is_empty() && store.size()? < end {
            store.set_size(end)?;
        }
        store.sync()?;
        let batches = pages.chunks(records.log.capacity());
        for (index, batch) in batches.enumerate() {
            if index > 0 {
                // What the entry before holds must be in its place before its tail moves on.
                store.sync()?;
            }
            records.log.append(store, batch, end)?;
            store.sync()?;
            if records.header.log_id() != records.log.id() {
                records.header.set_log_id(records.log.id());
                records.header.write(store)?;
            }
            for page in batch {
                store.write_at(page.offset, &page.bytes)?;
            }
        }
        Ok(())
    }

    /// Says in the header that the log is empty.
    fn close(&self) -> Result<(), DiskError> {
        self.flush()?;
        let mut records = lock(&self.records);
        if records.header.log_id() == [0; 16] {
            return Ok(());
        }
        self.store.sync()?;
        records.header.set_log_id([0; 16]);
        records.header.write(&*self.store)
    }
}

impl Blocks for Vhdx {
    fn store(&self) -> &dyn Store {
        &*self.store
    }

    fn block_size(&self) -> u64 {
        self.metadata.block_size
    }

    fn find(&self, block: u64) -> Result<Option<u64>, DiskError> {
        let entry = self.table.get(&*self.store, self.metadata.entry(block))?.unwrap_or(0);
        if block < self.metadata.blocks() { self.place(block, entry) } else { Ok(None) }
    }

    fn add(&self, block: u64, within: u64, data: &[u8]) -> Result<(), DiskError> {
        let mut allocation = lock(&self.allocation);
        if let Some(place) = self.find(block)? {
            return self.store.write_at(place + within, data);
        }
        if !allocation.trimmed && self.store.size()? > allocation.end {
            // Blocks of which a crash kept the table from knowing, or a write that failed.
            self.store.set_size(allocation.end)?;
        }
        // Should anything fail from here on, the place is emptied before it is used again.
        allocation.trimmed = false;
        let place = allocation.end;
        let end = place + self.metadata.block_size;
        self.store.write_at(place + within, data)?;
        self.end.fetch_max(end, Ordering::AcqRel);
        self.table.set(&*self.store, self.metadata.entry(block), place | FULLY_PRESENT)?;
        *allocation = Allocation { end, trimmed: true };
        Ok(())
    }

    fn before_change(&self) -> Result<(), DiskError> {
        if self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut records = lock(&self.records);
        if !self.changed.load(Ordering::Acquire) {
            // [MS-VHDX] 2.2.2: before the first change of the file.
            records.header.set_changed()?;
            records.header.write(&*self.store)?;
            self.changed.store(true, Ordering::Release);
        }
        Ok(())
    }
}

disk_of_blocks!(Vhdx);

/// Closing flushes and empties the log. Who wants to know whether that works calls `flush` first;
/// a log that is left is replayed when the image is opened again.
impl Drop for Vhdx {
    fn drop(&mut self) {
        if !self.store.read_only() {
            // There is nobody left to tell.
            let _ = self.close();
        }
    }
}

/// Writes all of a new image but its blocks' data.
fn lay_out(store: &dyn Store, metadata: &Metadata) -> Result<(), DiskError> {
    let entries = metadata.entries();
    let table_end = NEW_TABLE + (entries * 8).next_multiple_of(MIB);
    let regions =
        Regions { block_table: NEW_TABLE..table_end, metadata: NEW_METADATA, others: Vec::new() };
    store.set_size(table_end)?;
    metadata.write(store, &regions.metadata)?;
    if metadata.fixed {
        fill_table(store, metadata, table_end)?;
    }
    regions.write(store)?;
    let mut header = Header::new(NEW_LOG, NEW_LOG_LENGTH)?;
    // Both of them.
    header.write(store)?;
    header.write(store)?;
    // Last, so that a file without it is no image yet.
    let mut file_type = vec![0; 512];
    put(&mut file_type, 0, FILE_TYPE);
    let creator: Vec<u8> = "Bivisor".encode_utf16().flat_map(u16::to_le_bytes).collect();
    put(&mut file_type, 8, &creator);
    debug_assert_eq!(array(&file_type, 0), *FILE_TYPE);
    store.write_at(0, &file_type)?;
    store.sync()
}

/// Gives each block its place.
fn fill_table(store: &dyn Store, metadata: &Metadata, data: u64) -> Result<(), DiskError> {
    let per_page = PAGE / 8;
    let (mut block, blocks) = (0, metadata.blocks());
    for page in 0..metadata.entries().div_ceil(per_page) {
        let mut bytes = vec![0; PAGE as usize];
        for slot in 0..per_page {
            if block < blocks && metadata.entry(block) == page * per_page + slot {
                let entry = (data + block * metadata.block_size) | FULLY_PRESENT;
                let at = usize::try_from(slot * 8).unwrap_or_default();
                put(&mut bytes, at, &entry.to_le_bytes());
                block += 1;
            }
        }
        store.write_at(NEW_TABLE + page * PAGE, &bytes)?;
    }
    store.set_size(data + blocks * metadata.block_size)
}
