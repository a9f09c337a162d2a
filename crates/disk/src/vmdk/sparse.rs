//! A sparse extent: a grain directory leads to grain tables, and these to grains. Most extents have
//! a second directory with tables of its own, which say the same.
//!
//! The second tables are written before the first, and where a crash left them different, they
//! follow the first when their part of the disk is next used.
use super::header::Header;
use crate::blocks::Blocks;
use crate::store::{Complain, Store};
use crate::table::{Cells, Entry, Le32, decode, encode, lock};
use crate::{DiskError, SECTOR};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// An entry of a grain that is zero, where the header admits it.
const ZERO_GRAIN: u64 = 1;

/// Where the next grain or table goes.
#[derive(Debug, Default)]
struct Allocation {
    /// Where the last grain or table ends; `None` before that was looked for.
    end: Option<u64>,
    /// Whether the file is known to end there, or before.
    trimmed: bool,
    /// Grain tables to be written.
    tables: BTreeSet<u64>,
    /// Entries of the directories to be written.
    directory: BTreeSet<u64>,
}

/// A directory and where it is.
struct Directory {
    offset: u64,
    cells: Cells<Le32>,
}

impl Directory {
    fn read(store: &dyn Store, offset: u64, tables: u64) -> Result<Self, DiskError> {
        let mut bytes = vec![0; usize::try_from(tables * 4).unwrap_or_default()];
        store.read_at(offset, &mut bytes)?;
        Ok(Self { offset, cells: decode::<Le32>(&bytes) })
    }

    fn cell(&self, table: u64) -> Option<&<Le32 as Entry>::Cell> {
        usize::try_from(table).ok().and_then(|table| self.cells.get(table))
    }

    /// Where a table is; zero where there is none.
    fn table(&self, table: u64) -> u64 {
        self.cell(table).map_or(0, |cell| Le32::get(cell) * SECTOR)
    }
}

/// A piece of metadata to be written.
type Piece = (u64, Vec<u8>);

/// An open sparse extent.
pub(super) struct Sparse {
    store: Box<dyn Store>,
    header: Header,
    directory: Directory,
    redundant: Option<Directory>,
    tables: Box<[OnceLock<Cells<Le32>>]>,
    allocation: Mutex<Allocation>,
    writing_back: Mutex<()>,
    /// Where the last grain begins at the latest that can be read.
    end: AtomicU64,
}

impl Sparse {
    pub(super) fn open(store: Box<dyn Store>, header: Header) -> Result<Self, DiskError> {
        let tables = header.tables();
        let redundant = match header.redundant {
            Some(offset) if !store.read_only() => Some(Directory::read(&*store, offset, tables)?),
            _ => None,
        };
        Ok(Self {
            directory: Directory::read(&*store, header.directory, tables)?,
            redundant,
            tables: (0..tables).map(|_| OnceLock::new()).collect(),
            allocation: Mutex::default(),
            writing_back: Mutex::default(),
            end: AtomicU64::new(store.size()?),
            header,
            store,
        })
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// Whether grains cannot be added: compressed ones, or a version that says more than is known.
    pub(super) fn is_fixed(&self) -> bool {
        self.header.compressed || self.header.version > 2
    }

    fn table_length(&self) -> u64 {
        self.header.table_entries * 4
    }

    /// Reads a table that is at `offset`.
    fn read_table(&self, offset: u64) -> Result<Vec<u8>, DiskError> {
        let mut bytes = vec![0; usize::try_from(self.table_length()).unwrap_or_default()];
        self.store.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// A grain table; `None` where there is none yet.
    fn table(&self, table: u64) -> Result<Option<&Cells<Le32>>, DiskError> {
        let Some(slot) = usize::try_from(table).ok().and_then(|table| self.tables.get(table))
        else {
            return Ok(None);
        };
        if let Some(cells) = slot.get() {
            return Ok(Some(cells));
        }
        let offset = self.directory.table(table);
        if offset == 0 {
            return Ok(None);
        }
        let bytes = self.read_table(offset)?;
        Ok(Some(slot.get_or_init(|| decode::<Le32>(&bytes))))
    }

    /// The table with the entry of a grain, and its place there.
    fn split(&self, grain: u64) -> (u64, usize) {
        let within = grain % self.header.table_entries;
        (grain / self.header.table_entries, usize::try_from(within).unwrap_or_default())
    }

    /// Where a grain is that has an entry.
    fn place(&self, grain: u64, entry: u64) -> Result<Option<u64>, DiskError> {
        if entry == 0 || entry == ZERO_GRAIN && self.header.zero_grains {
            return Ok(None);
        }
        let place = entry * SECTOR;
        // The file may end within the last grain.
        if place < self.header.overhead.max(SECTOR) || place >= self.end.load(Ordering::Acquire) {
            let what = format!("grain {grain} is said to be at {place}, where none can be");
            return Err(self.store.damaged(what));
        }
        Ok(Some(place))
    }

    /// Where the last grain or table ends.
    fn survey(&self) -> Result<u64, DiskError> {
        let header = &self.header;
        let directories = [Some(&self.directory), self.redundant.as_ref()];
        let mut end = header.overhead.max(header.descriptor + header.descriptor_length);
        for directory in directories.into_iter().flatten() {
            end = end.max(directory.offset + header.tables() * 4);
            for table in 0..header.tables() {
                end = end.max(directory.table(table) + self.table_length());
            }
        }
        for table in 0..header.tables() {
            let offset = self.directory.table(table);
            if offset == 0 {
                continue;
            }
            for (index, cell) in decode::<Le32>(&self.read_table(offset)?).iter().enumerate() {
                let grain = table * header.table_entries + index as u64;
                if let Some(place) = self.place(grain, Le32::get(cell))? {
                    end = end.max(place + header.grain);
                }
            }
        }
        Ok(end)
    }

    /// Sees to it that the file ends where the last grain or table does; where that is.
    fn make_room(&self, allocation: &mut Allocation) -> Result<u64, DiskError> {
        let end = match allocation.end {
            Some(end) => end,
            None => self.survey()?,
        };
        allocation.end = Some(end);
        if !allocation.trimmed && self.store.size()? > end {
            // Grains of which a crash kept the tables from knowing, or a write that failed.
            self.store.set_size(end)?;
        }
        // Should anything fail from here on, the place is emptied before it is used again.
        allocation.trimmed = false;
        Ok(end)
    }

    /// The number of the sector at a place.
    fn sector(&self, place: u64) -> Result<u64, DiskError> {
        let sector = place / SECTOR;
        if u32::try_from(sector).is_err() {
            let problem = "it has no room for another grain below 2 TiB; convert it to another \
                           format"
                .to_owned();
            return Err(DiskError::Invalid { file: self.store.name(), problem });
        }
        Ok(sector)
    }

    /// Adds a grain table and its copy, both empty.
    fn add_table(&self, allocation: &mut Allocation, table: u64) -> Result<(), DiskError> {
        let mut end = self.make_room(allocation)?.next_multiple_of(SECTOR);
        let bytes = vec![0; usize::try_from(self.table_length()).unwrap_or_default()];
        let directories = [Some(&self.directory), self.redundant.as_ref()];
        let mut places = Vec::new();
        for directory in directories.into_iter().flatten() {
            if directory.table(table) == 0 {
                self.store.write_at(end, &bytes)?;
                places.push((directory, self.sector(end)?));
                end = (end + self.table_length()).next_multiple_of(SECTOR);
            }
        }
        for (directory, sector) in places {
            if let Some(cell) = directory.cell(table) {
                Le32::set(cell, sector);
            }
        }
        allocation.directory.insert(table);
        allocation.end = Some(end);
        allocation.trimmed = true;
        Ok(())
    }

    /// Has a table's copy follow it where they differ.
    fn align_redundant(&self, allocation: &mut Allocation, table: u64) -> Result<(), DiskError> {
        let Some(redundant) = &self.redundant else { return Ok(()) };
        if allocation.tables.contains(&table) {
            return Ok(());
        }
        let copy = redundant.table(table);
        if copy == 0 || self.read_table(copy)? != self.read_table(self.directory.table(table))? {
            allocation.tables.insert(table);
        }
        Ok(())
    }

    /// Writes what refers to grains, after the grains.
    pub(super) fn write_back(&self) -> Result<(), DiskError> {
        let _one = lock(&self.writing_back);
        let (tables, directory, pieces, end) = {
            let mut allocation = lock(&self.allocation);
            let tables = std::mem::take(&mut allocation.tables);
            let directory = std::mem::take(&mut allocation.directory);
            let pieces = self.pieces(&tables, &directory);
            (tables, directory, pieces, allocation.end)
        };
        let done = self.write_pieces(&pieces, end);
        if done.is_err() {
            let mut allocation = lock(&self.allocation);
            allocation.tables.extend(tables);
            allocation.directory.extend(directory);
        }
        done
    }

    fn write_pieces(&self, pieces: &[Piece], end: Option<u64>) -> Result<(), DiskError> {
        if pieces.is_empty() {
            return self.store.sync();
        }
        if let Some(end) = end
            && self.store.size()? < end
        {
            self.store.set_size(end)?;
        }
        self.store.sync()?;
        for (offset, bytes) in pieces {
            self.store.write_at(*offset, bytes)?;
        }
        self.store.sync()
    }

    fn pieces(&self, tables: &BTreeSet<u64>, entries: &BTreeSet<u64>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        // A table must not have entries before its directory leads to it, nor may the first
        // directory's tables know of more than the second's.
        let directories = [self.redundant.as_ref(), Some(&self.directory)];
        for directory in directories.into_iter().flatten() {
            for table in entries {
                let mut bytes = Vec::new();
                if let Some(cell) = directory.cell(*table) {
                    Le32::encode(Le32::get(cell), &mut bytes);
                    pieces.push((directory.offset + table * 4, bytes));
                }
            }
            for table in tables {
                let slot = usize::try_from(*table).ok().and_then(|table| self.tables.get(table));
                let offset = directory.table(*table);
                if let Some(cells) = slot.and_then(OnceLock::get).filter(|_| offset != 0) {
                    pieces.push((offset, encode::<Le32>(cells)));
                }
            }
        }
        pieces
    }
}

impl Blocks for Sparse {
    fn store(&self) -> &dyn Store {
        &*self.store
    }

    fn block_size(&self) -> u64 {
        self.header.grain
    }

    fn find(&self, grain: u64) -> Result<Option<u64>, DiskError> {
        let (table, within) = self.split(grain);
        let Some(cells) = self.table(table)? else { return Ok(None) };
        cells.get(within).map_or(Ok(None), |cell| self.place(grain, Le32::get(cell)))
    }

    fn add(&self, grain: u64, within: u64, data: &[u8]) -> Result<(), DiskError> {
        let mut allocation = lock(&self.allocation);
        if let Some(place) = self.find(grain)? {
            return self.store.write_at(place + within, data);
        }
        let (table, index) = self.split(grain);
        if self.directory.table(table) == 0 {
            self.add_table(&mut allocation, table)?;
        }
        let Some(cell) = self.table(table)?.and_then(|cells| cells.get(index)) else {
            return Err(self.store.damaged(format!("it has no grain {grain}")));
        };
        self.align_redundant(&mut allocation, table)?;
        let place = self.make_room(&mut allocation)?.next_multiple_of(self.header.grain);
        let sector = self.sector(place)?;
        self.store.write_at(place + within, data)?;
        let end = place + self.header.grain;
        self.end.fetch_max(end, Ordering::AcqRel);
        Le32::set(cell, sector);
        allocation.tables.insert(table);
        allocation.end = Some(end);
        allocation.trimmed = true;
        Ok(())
    }
}
