//! Refcounts: how often each host cluster is used (QEMU, `docs/interop/qcow2.txt`, "Host cluster
//! management"), and from them which clusters are free.
//!
//! All changes stay in memory until [`super::commit`] writes them. New refcount blocks, and a
//! larger table, always go to the file's end: what lies there is free whatever damaged refcounts
//! say.
use super::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use super::table_cache::{CacheLimit, TableCache};
use crate::bytes::be64;
use crate::{DiskError, Store};
use std::collections::{BTreeSet, HashSet};

/// Memory for refcount blocks, in bytes; 4 MiB cover 128 GiB of the usual 64 KiB clusters.
const CACHE: CacheLimit = CacheLimit(4 << 20);

/// Host offsets end here: table entries have 56 bits for them.
const END_OF_OFFSETS: u64 = 1 << 56;

/// Host clusters that follow each other, by index: offset divided by cluster size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub first: u64,
    pub count: u64,
}

impl Run {
    pub fn end(self) -> u64 {
        self.first + self.count
    }
}

/// Where a refcount table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TablePlace {
    pub offset: u64,
    pub clusters: u32,
}

#[derive(Debug)]
pub(crate) struct Refcounts {
    order: u32,
    cluster_bits: u32,
    /// Offsets of the blocks, 0 where there is none.
    table: Vec<u64>,
    /// Entries of the table that are to be written.
    dirty_entries: BTreeSet<usize>,
    /// Where the table is in the file, by the header.
    place: TablePlace,
    /// Where a larger table goes, until the header says so.
    moving_to: Option<TablePlace>,
    /// Former places of the table, which are free once the header names the new one.
    abandoned: Vec<Run>,
    blocks: TableCache,
    /// No cluster below this is free.
    hint: u64,
    /// First cluster beyond the file and everything that was ever allocated.
    end: u64,
    /// Whether the table's entries can be what they are. If not, nothing is allocated by them.
    sound: bool,
    /// Clusters that hold tables in force, by index. Wrong refcounts must not have them
    /// overwritten.
    metadata: HashSet<u64>,
}

impl Refcounts {
    pub fn load(store: &dyn Store, header: &Header) -> Result<Self, DiskError> {
        let cluster_size = header.cluster_size();
        let place = TablePlace {
            offset: header.refcount_table_offset,
            clusters: header.refcount_table_clusters,
        };
        let length = u64::from(place.clusters) * cluster_size;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        store.read_or_zero_at(place.offset, &mut bytes)?;
        let (entries, _) = bytes.as_chunks::<8>();
        let table: Vec<u64> = entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        let end = store.size()?.div_ceil(cluster_size);
        let mut refcounts = Self {
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            table,
            dirty_entries: BTreeSet::new(),
            place,
            moving_to: None,
            abandoned: Vec::new(),
            blocks: TableCache::new(cluster_size, CACHE),
            hint: 0,
            end,
            sound: true,
            metadata: HashSet::from([0]),
        };
        refcounts.protect(place.offset, length);
        refcounts.protect_blocks();
        Ok(refcounts)
    }

    /// Protects the refcount blocks, and finds out whether the table is sound: each block within
    /// the file and named once. (A table that names one full block a million times would make a
    /// search for a free cluster endless.)
    pub fn protect_blocks(&mut self) {
        self.sound = self.unsound_blocks().is_empty();
        let blocks: Vec<u64> = self.table.iter().copied().filter(|block| *block != 0).collect();
        for block in blocks {
            self.protect(block, 1 << self.cluster_bits);
        }
    }

    /// Entries of the table that name no possible block, or one that an earlier entry named.
    pub fn unsound_blocks(&self) -> Vec<usize> {
        let mut seen = HashSet::new();
        let used = self.table.iter().enumerate().filter(|(_, block)| **block != 0);
        let unsound =
            used.filter(|(_, block)| !self.is_sound_block(**block) || !seen.insert(**block));
        unsound.map(|(index, _)| index).collect()
    }

    /// Declares that a range holds a table.
    pub fn protect(&mut self, offset: u64, length: u64) {
        let first = offset >> self.cluster_bits;
        let end = offset.saturating_add(length).div_ceil(1 << self.cluster_bits);
        self.metadata.extend(first..end);
    }

    /// Whether a cluster holds a table.
    pub fn is_metadata(&self, cluster: u64) -> bool {
        self.metadata.contains(&cluster)
    }

    /// First cluster beyond everything that is or was used.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Clusters that a refcount block counts.
    fn per_block(&self) -> u64 {
        1 << self.per_block_bits()
    }

    fn per_block_bits(&self) -> u32 {
        // A block fills a cluster with refcounts of 2^order bits.
        self.cluster_bits + 3 - self.order
    }

    fn block_of(&self, cluster: u64) -> usize {
        usize::try_from(cluster >> self.per_block_bits()).unwrap_or(usize::MAX)
    }

    /// The table's entries, and the places of what it points to.
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    /// Where the table is, by the header in the file.
    pub fn place(&self) -> TablePlace {
        self.place
    }

    /// The offset of the block that counts a cluster, if there is one.
    fn block(&self, store: &dyn Store, cluster: u64) -> Result<Option<u64>, DiskError> {
        let offset = self.table.get(self.block_of(cluster)).copied().unwrap_or(0);
        if offset == 0 {
            return Ok(None);
        }
        if !self.is_sound_block(offset) {
            let what = format!("a refcount block is at {offset}, where none can be");
            return Err(DiskError::Damaged { file: store.name(), what });
        }
        Ok(Some(offset))
    }

    /// Whether a block can be at an offset.
    pub fn is_sound_block(&self, offset: u64) -> bool {
        offset.is_multiple_of(1 << self.cluster_bits) && offset >> self.cluster_bits < self.end
    }

    /// How often a cluster is used.
    pub fn get(&mut self, store: &dyn Store, cluster: u64) -> Result<u64, DiskError> {
        let Some(block) = self.block(store, cluster)? else { return Ok(0) };
        let index = cluster & (self.per_block() - 1);
        let (page, at) = self.blocks.page(store, block + byte_of(index, self.order))?;
        Ok(read_count(page.get(at..).unwrap_or_default(), index, self.order))
    }

    /// Sets how often a cluster is used.
    pub fn set(&mut self, store: &dyn Store, cluster: u64, count: u64) -> Result<(), DiskError> {
        if self.order < 6 && count >> (1 << self.order) != 0 {
            let bits = 1 << self.order;
            let what =
                format!("a cluster is used {count} times, and its refcounts have {bits} bits");
            return Err(DiskError::Damaged { file: store.name(), what });
        }
        let block = match self.block(store, cluster)? {
            Some(block) => block,
            None => self.make_block(store, self.block_of(cluster))?,
        };
        let order = self.order;
        let index = cluster & (self.per_block() - 1);
        self.blocks.change(store, block + byte_of(index, order), |page, at| {
            write_count(page.get_mut(at..).unwrap_or_default(), index, order, count);
        })?;
        if count == 0 {
            self.hint = self.hint.min(cluster);
        }
        Ok(())
    }

    /// Takes up to `count` free clusters that follow each other, at least one. They read as
    /// zeroes if the second result is true.
    pub fn allocate(&mut self, store: &dyn Store, count: u64) -> Result<(Run, bool), DiskError> {
        if !self.sound {
            let what = "its refcount table names impossible blocks".to_owned();
            return Err(DiskError::Damaged { file: store.name(), what });
        }
        let first = self.first_free(store)?;
        let mut run = Run { first, count: 0 };
        let fresh = first >= self.end;
        let before = self.end;
        while run.count < count {
            let next = run.end();
            // Fresh clusters and used ones do not mix, so that one word says what they hold; and a
            // block that is made for the next cluster would take that very place.
            let fits = run.count == 0 || (next >= before) == (first >= before);
            let counted = self.block(store, next)?.is_some();
            if !fits || !counted || self.get(store, next)? != 0 {
                break;
            }
            if self.is_metadata(next) {
                let what =
                    format!("cluster {next} holds a table, and its refcount says it is free");
                return Err(DiskError::Damaged { file: store.name(), what });
            }
            self.set(store, next, 1)?;
            run.count += 1;
        }
        self.end = self.end.max(run.end());
        self.hint = run.end();
        Ok((run, fresh))
    }

    /// The first free cluster, which has a block that counts it.
    fn first_free(&mut self, store: &dyn Store) -> Result<u64, DiskError> {
        let mut cluster = self.hint;
        loop {
            if cluster >= END_OF_OFFSETS >> self.cluster_bits {
                let problem = "the image file cannot grow any further".to_owned();
                return Err(DiskError::Invalid { file: store.name(), problem });
            }
            let Some(block) = self.block(store, cluster)? else {
                self.make_block(store, self.block_of(cluster))?;
                continue;
            };
            let order = self.order;
            let index = cluster & (self.per_block() - 1);
            let (page, at) = self.blocks.page(store, block + byte_of(index, order))?;
            // Counts from here to the page's end, which is no later than the block's.
            let left = ((page.len() - at) as u64 * 8) >> order;
            let left = left - (index & sub_byte_mask(order));
            let rest = page.get(at..).unwrap_or_default();
            let start = index & sub_byte_mask(order);
            let free = (0..left).find(|step| {
                let place = start + step;
                let byte = usize::try_from(byte_of(place, order)).unwrap_or(usize::MAX);
                read_count(rest.get(byte..).unwrap_or_default(), place, order) == 0
            });
            match free {
                Some(step) => {
                    self.hint = cluster + step;
                    return Ok(cluster + step);
                }
                None => cluster += left,
            }
        }
    }

    /// Makes the refcount block for table entry `index`, at the file's end; its offset.
    fn make_block(&mut self, store: &dyn Store, index: usize) -> Result<u64, DiskError> {
        self.grow_table(store, index)?;
        // The new block is counted by one that must be there; that may be itself.
        let home = loop {
            let home = self.block_of(self.end);
            self.grow_table(store, home)?;
            if home == index || self.table.get(home).is_some_and(|block| *block != 0) {
                break self.end;
            }
            self.make_block(store, home)?;
        };
        // Growing the table may have made the block meanwhile.
        if let Some(block) = self.table.get(index).copied().filter(|block| *block != 0) {
            return Ok(block);
        }
        let offset = home << self.cluster_bits;
        self.end = home + 1;
        self.metadata.insert(home);
        self.set_entry(index, offset);
        self.set(store, home, 1)?;
        Ok(offset)
    }

    fn set_entry(&mut self, index: usize, block: u64) {
        if let Some(entry) = self.table.get_mut(index) {
            *entry = block;
            self.dirty_entries.insert(index);
        }
    }

    /// Forgets a block that cannot be where its entry says.
    pub fn drop_block(&mut self, index: usize) {
        self.set_entry(index, 0);
    }

    /// Sees to it that the table has an entry `index`.
    fn grow_table(&mut self, store: &dyn Store, index: usize) -> Result<(), DiskError> {
        if index < self.table.len() {
            return Ok(());
        }
        let cluster_size = 1 << self.cluster_bits;
        let wanted = (index as u64 + 1).max(self.table.len() as u64 * 3 / 2) * 8;
        let bytes = wanted.next_multiple_of(cluster_size);
        if bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster_size) {
            let problem = "the image file cannot grow any further; convert it to larger clusters";
            return Err(DiskError::Invalid { file: store.name(), problem: problem.to_owned() });
        }
        self.table.resize(usize::try_from(bytes / 8).unwrap_or(0), 0);
        let former = self.moving_to.unwrap_or(self.place);
        self.abandoned.push(Run {
            first: former.offset >> self.cluster_bits,
            count: u64::from(former.clusters),
        });
        let count = bytes >> self.cluster_bits;
        let offset = self.end << self.cluster_bits;
        self.protect(offset, bytes);
        let clusters = u32::try_from(count).unwrap_or(u32::MAX);
        self.moving_to = Some(TablePlace { offset, clusters });
        self.allocate_at_end(store, count)?;
        Ok(())
    }

    /// Takes `count` clusters at the file's end.
    pub fn allocate_at_end(&mut self, store: &dyn Store, count: u64) -> Result<Run, DiskError> {
        let run = Run { first: self.end, count };
        self.end = run.end();
        for cluster in run.first..run.end() {
            self.set(store, cluster, 1)?;
        }
        Ok(run)
    }

    /// The clusters of tables that are no longer in force, to be freed once the header says so.
    pub fn take_abandoned(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.abandoned)
    }

    /// A cluster that held a table is about to be freed.
    pub fn unprotect(&mut self, cluster: u64) {
        self.metadata.remove(&cluster);
    }

    /// Whether something waits to be written.
    pub fn changed(&self) -> bool {
        self.blocks.dirty_pages() > 0 || !self.dirty_entries.is_empty() || self.moving_to.is_some()
    }

    /// Whether so much waits that it should be written.
    pub fn crowded(&self) -> bool {
        self.blocks.crowded()
    }

    /// What waits to be written; it counts as being written from now on.
    pub fn begin_writing(&mut self) -> RefcountChanges {
        let pages = self.blocks.begin_writing();
        let entries = std::mem::take(&mut self.dirty_entries);
        let moved = self.moving_to.map(|place| MovedTable {
            place,
            bytes: self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect(),
        });
        let at = self.place.offset;
        let fields = entries.iter().filter_map(|index| {
            let entry = *self.table.get(*index)?;
            Some((at + *index as u64 * 8, entry))
        });
        let fields = if moved.is_some() { Vec::new() } else { fields.collect() };
        RefcountChanges { pages, entries, fields, moved }
    }

    /// What [`Refcounts::begin_writing`] gave is written, or could not be.
    pub fn end_writing(&mut self, changes: &RefcountChanges, written: bool) {
        self.blocks.end_writing(&changes.pages, written);
        if !written {
            self.dirty_entries.extend(&changes.entries);
            return;
        }
        let Some(moved) = &changes.moved else { return };
        self.place = moved.place;
        if self.moving_to == Some(moved.place) {
            self.moving_to = None;
        }
    }
}

/// A larger refcount table, to be written and then named in the header.
#[derive(Debug)]
pub(crate) struct MovedTable {
    pub place: TablePlace,
    pub bytes: Vec<u8>,
}

/// Changed refcounts on their way to the file.
#[derive(Debug, Default)]
pub(crate) struct RefcountChanges {
    pub pages: Vec<(u64, Box<[u8]>)>,
    entries: BTreeSet<usize>,
    /// Table entries: their offsets in the file and their values.
    pub fields: Vec<(u64, u64)>,
    pub moved: Option<MovedTable>,
}

/// The byte of a block where a refcount begins.
fn byte_of(index: u64, order: u32) -> u64 {
    (index << order) >> 3
}

/// Which bits of an index choose among the refcounts of one byte.
fn sub_byte_mask(order: u32) -> u64 {
    if order < 3 { (8 >> order) - 1 } else { 0 }
}

/// Reads the refcount `index`, which begins in the first of `bytes`.
fn read_count(bytes: &[u8], index: u64, order: u32) -> u64 {
    let first = bytes.first().copied().unwrap_or(0);
    if order < 3 {
        let bits = 1_u32 << order;
        let shift = (index & sub_byte_mask(order)) as u32 * bits;
        return u64::from((first >> shift) & ((1_u16 << bits) - 1) as u8);
    }
    let width = 1_usize << (order - 3);
    let mut wide = [0; 8];
    if let (Some(to), Some(from)) = (wide.get_mut(8 - width..), bytes.get(..width)) {
        to.copy_from_slice(from);
    }
    be64(&wide, 0)
}

/// Writes the refcount `index`, which begins in the first of `bytes`.
fn write_count(bytes: &mut [u8], index: u64, order: u32, count: u64) {
    if order < 3 {
        let bits = 1_u32 << order;
        let shift = (index & sub_byte_mask(order)) as u32 * bits;
        let mask = ((1_u16 << bits) - 1) as u8;
        if let Some(first) = bytes.first_mut() {
            *first = (*first & !(mask << shift)) | ((count as u8 & mask) << shift);
        }
        return;
    }
    let width = 1_usize << (order - 3);
    let wide = count.to_be_bytes();
    if let (Some(to), Some(from)) = (bytes.get_mut(..width), wide.get(8 - width..)) {
        to.copy_from_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refcount_of_any_width_reads_as_written_and_leaves_its_neighbours() {
        for order in 0..=6 {
            let mut block = [0; 64];
            let most = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            let per_block = (64 * 8) >> order;
            for index in 0..per_block {
                let byte = byte_of(index, order) as usize;
                write_count(&mut block[byte..], index, order, (index * 7 + 1) & most);
            }
            for index in 0..per_block {
                let byte = byte_of(index, order) as usize;
                assert_eq!(read_count(&block[byte..], index, order), (index * 7 + 1) & most);
            }
        }
        // The first of narrow refcounts is in the least significant bits.
        let mut block = [0; 1];
        write_count(&mut block, 0, 0, 1);
        assert_eq!(block, [1]);
    }
}
