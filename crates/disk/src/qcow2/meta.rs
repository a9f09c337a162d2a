//! The metadata of an open image: level 1 table, cached level 2 tables, refcounts, and what is
//! under way. One mutex guards all of it; no guest data is transferred under it.
use super::entry::{COPIED, Mapping, table_offset};
use super::header::Header;
use super::refcounts::{RefcountChanges, Refcounts, Run};
use super::table_cache::{CacheLimit, TableCache};
use crate::{DiskError, Store};
use std::collections::{BTreeSet, HashSet};

/// Memory for L2 tables, in bytes; 16 MiB cover 128 GiB of the usual 64 KiB clusters.
const L2_CACHE: CacheLimit = CacheLimit(16 << 20);

/// Clusters, and runs of them, that may wait to be freed.
const MOST_FREED: u64 = 1 << 20;
const MOST_FREED_RUNS: usize = 4096;

#[derive(Debug)]
pub(crate) struct Meta {
    pub cluster_bits: u32,
    /// The level 1 table, as in the file.
    l1: Vec<u64>,
    l1_offset: u64,
    /// Entries of it that are to be written.
    l1_dirty: BTreeSet<usize>,
    l2: TableCache,
    pub refcounts: Refcounts,
    /// Guest clusters that are being moved to new host clusters; whoever wants to change one
    /// waits.
    pub moving: HashSet<u64>,
    /// Host clusters that no table in memory refers to any more, one entry a reference. They can
    /// be used for something else only after the tables are in the file.
    freed: Vec<Run>,
    /// How many they are.
    freed_clusters: u64,
    /// Whether internal snapshots may share clusters, so that no COPIED flag is trusted alone.
    has_snapshots: bool,
    zero_flag: bool,
}

impl Meta {
    pub fn load(store: &dyn Store, header: &Header) -> Result<Self, DiskError> {
        let mut bytes = vec![0; header.l1_entries as usize * 8];
        store.read_or_zero_at(header.l1_offset, &mut bytes)?;
        let (entries, _) = bytes.as_chunks::<8>();
        let l1: Vec<u64> = entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        let mut refcounts = Refcounts::load(store, header)?;
        refcounts.protect(header.l1_offset, bytes.len() as u64);
        for entry in &l1 {
            if table_offset(*entry) != 0 {
                refcounts.protect(table_offset(*entry), header.cluster_size());
            }
        }
        Ok(Self {
            cluster_bits: header.cluster_bits,
            l1,
            l1_offset: header.l1_offset,
            l1_dirty: BTreeSet::new(),
            l2: TableCache::new(header.cluster_size(), L2_CACHE),
            refcounts,
            moving: HashSet::new(),
            freed: Vec::new(),
            freed_clusters: 0,
            has_snapshots: header.snapshots > 0,
            zero_flag: header.version == super::Version::V3,
        })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters that an L2 table maps.
    pub fn per_l2(&self) -> u64 {
        self.cluster_size() / 8
    }

    /// The L1 table, and its offset.
    pub fn l1(&self) -> (&[u64], u64) {
        (&self.l1, self.l1_offset)
    }

    /// The offset of the L2 table that maps a guest cluster, and whether it may be changed; `None`
    /// where there is no table.
    pub fn l2_table(
        &self,
        store: &dyn Store,
        guest: u64,
    ) -> Result<Option<(u64, bool)>, DiskError> {
        let index = guest / self.per_l2();
        let entry = usize::try_from(index).ok().and_then(|index| self.l1.get(index));
        let entry = entry.copied().unwrap_or(0);
        let offset = table_offset(entry);
        if offset == 0 {
            return Ok(None);
        }
        let aligned = offset.is_multiple_of(self.cluster_size());
        if !aligned || offset >> self.cluster_bits >= self.refcounts.end() {
            let what = format!("the L2 table {index} is at {offset}, where none can be");
            return Err(DiskError::Damaged { file: store.name(), what });
        }
        Ok(Some((offset, entry & COPIED != 0)))
    }

    /// Where a guest cluster is.
    pub fn lookup(&mut self, store: &dyn Store, guest: u64) -> Result<Mapping, DiskError> {
        let Some((table, _)) = self.l2_table(store, guest)? else {
            return Ok(Mapping::Unallocated);
        };
        let entry = self.l2.get64(store, table + guest % self.per_l2() * 8)?;
        self.parse(store, guest, entry)
    }

    /// What an entry says, checked against the file.
    fn parse(&self, store: &dyn Store, guest: u64, entry: u64) -> Result<Mapping, DiskError> {
        let damaged = |why: &str| DiskError::Damaged {
            file: store.name(),
            what: format!("the L2 entry of cluster {guest} ({entry:#x}) {why}"),
        };
        let mapping = Mapping::parse(entry, self.cluster_bits).map_err(damaged)?;
        if let Some((first, _)) = mapping.host_clusters(self.cluster_bits)
            && first >= self.refcounts.end()
        {
            return Err(damaged("points beyond the file's end"));
        }
        if !self.zero_flag && matches!(mapping, Mapping::Zero { .. }) {
            return Err(damaged("says zeroes, which version 2 does not know"));
        }
        Ok(mapping)
    }

    /// Whether a cluster may be overwritten where it is.
    pub fn in_place(
        &mut self,
        store: &dyn Store,
        mapping: Mapping,
    ) -> Result<Option<u64>, DiskError> {
        let Mapping::Data { host, copied: true } = mapping else { return Ok(None) };
        let cluster = host >> self.cluster_bits;
        if self.has_snapshots && self.refcounts.get(store, cluster)? != 1 {
            return Ok(None);
        }
        if self.refcounts.is_metadata(cluster) {
            let what = format!("guest data is mapped to {host}, where a table is");
            return Err(DiskError::Damaged { file: store.name(), what });
        }
        Ok(Some(host))
    }

    /// The L2 table that maps a guest cluster, made or copied so that it may be changed.
    fn own_l2_table(&mut self, store: &dyn Store, guest: u64) -> Result<u64, DiskError> {
        let existing = self.l2_table(store, guest)?;
        if let Some((table, true)) = existing {
            let shared =
                self.has_snapshots && self.refcounts.get(store, table >> self.cluster_bits)? != 1;
            if !shared {
                return Ok(table);
            }
        }
        let (run, fresh) = self.refcounts.allocate(store, 1)?;
        let table = run.first << self.cluster_bits;
        self.refcounts.protect(table, self.cluster_size());
        let page = self.l2.page_size();
        match existing {
            None if fresh => {}
            existing => {
                for within in (0..self.cluster_size()).step_by(page as usize) {
                    let bytes = match existing {
                        Some((old, _)) => self.l2.page(store, old + within)?.0.into(),
                        None => vec![0; page as usize].into_boxed_slice(),
                    };
                    self.l2.insert(table + within, bytes);
                }
            }
        }
        if let Some((old, _)) = existing {
            self.free_later(Run { first: old >> self.cluster_bits, count: 1 });
        }
        let index = usize::try_from(guest / self.per_l2()).unwrap_or(usize::MAX);
        self.set_l1(index, table | COPIED);
        Ok(table)
    }

    /// Changes an entry of the L1 table.
    pub fn set_l1(&mut self, index: usize, entry: u64) {
        if let Some(place) = self.l1.get_mut(index) {
            *place = entry;
            self.l1_dirty.insert(index);
        }
    }

    /// Changes an L2 entry as it is, without regard to what it said.
    pub fn set_l2(&mut self, store: &dyn Store, place: u64, entry: u64) -> Result<(), DiskError> {
        self.l2.set64(store, place, entry)
    }

    /// Sees to it that the L2 entries of a guest cluster's table can be changed, so that
    /// [`Meta::link`] cannot fail for want of a table.
    pub fn prepare_link(&mut self, store: &dyn Store, guest: u64) -> Result<(), DiskError> {
        self.own_l2_table(store, guest).map(drop)
    }

    /// Replaces a guest cluster's entry; what it referred to is to be freed.
    pub fn link(&mut self, store: &dyn Store, guest: u64, entry: u64) -> Result<(), DiskError> {
        let table = self.own_l2_table(store, guest)?;
        let place = table + guest % self.per_l2() * 8;
        let former = self.l2.get64(store, place)?;
        if former == entry {
            return Ok(());
        }
        let mapping = self.parse(store, guest, former)?;
        self.l2.set64(store, place, entry)?;
        if let Some((first, count)) = mapping.host_clusters(self.cluster_bits) {
            self.free_later(Run { first, count });
        }
        Ok(())
    }

    /// Takes a reference from clusters once the tables in the file no longer have it.
    pub fn free_later(&mut self, run: Run) {
        self.freed_clusters += run.count;
        match self.freed.last_mut() {
            Some(last) if last.end() == run.first => last.count += run.count,
            _ => self.freed.push(run),
        }
    }

    /// Gives back clusters that no table ever referred to.
    pub fn give_back(&mut self, store: &dyn Store, run: Run) -> Result<(), DiskError> {
        for cluster in run.first..run.end() {
            self.refcounts.set(store, cluster, 0)?;
        }
        Ok(())
    }

    /// Whether so much waits to be written that it should be done before more comes.
    pub fn crowded(&self) -> bool {
        let many_freed = self.freed.len() > MOST_FREED_RUNS || self.freed_clusters > MOST_FREED;
        self.l2.crowded() || self.refcounts.crowded() || many_freed
    }

    /// Whether something waits to be written or freed.
    pub fn changed(&self) -> bool {
        self.tables_changed() || self.refcounts.changed() || !self.freed.is_empty()
    }

    /// Whether L1 or L2 entries wait to be written.
    pub fn tables_changed(&self) -> bool {
        self.l2.dirty_pages() > 0 || !self.l1_dirty.is_empty()
    }

    /// Takes what waits to be written; refcounts only if `with_refcounts`.
    pub fn begin_writing(&mut self, with_refcounts: bool) -> Changes {
        let refcounts = if with_refcounts {
            self.refcounts.begin_writing()
        } else {
            RefcountChanges::default()
        };
        if refcounts.moved.is_some() {
            self.refcounts.take_abandoned().into_iter().for_each(|run| self.free_later(run));
        }
        self.freed_clusters = 0;
        let l1_indices = std::mem::take(&mut self.l1_dirty);
        let l1 = l1_indices.iter().filter_map(|index| {
            Some((self.l1_offset + *index as u64 * 8, self.l1.get(*index).copied()?))
        });
        Changes {
            refcounts,
            l2: self.l2.begin_writing(),
            l1: l1.collect(),
            l1_indices,
            freed: std::mem::take(&mut self.freed),
        }
    }

    /// What [`Meta::begin_writing`] gave is in the file, or could not be written. Clusters that
    /// were freed by it are freed in any case by who called this.
    pub fn end_writing(&mut self, changes: &mut Changes, written: bool) {
        self.refcounts.end_writing(&changes.refcounts, written);
        self.l2.end_writing(&changes.l2, written);
        if !written {
            self.l1_dirty.extend(&changes.l1_indices);
            changes.freed.drain(..).for_each(|run| self.free_later(run));
        }
    }

    /// Of clusters to be freed, those that nothing will refer to.
    pub fn about_to_be_free(
        &mut self,
        store: &dyn Store,
        freed: &[Run],
    ) -> Result<Vec<u64>, DiskError> {
        let mut clusters: Vec<u64> = freed.iter().flat_map(|run| run.first..run.end()).collect();
        clusters.sort_unstable();
        let mut free = Vec::new();
        for same in clusters.chunk_by(|a, b| a == b) {
            if let Some(cluster) = same.first().copied()
                && self.refcounts.get(store, cluster)? <= same.len() as u64
            {
                free.push(cluster);
            }
        }
        Ok(free)
    }

    /// Takes a reference from each of the clusters. From now on they may be allocated.
    pub fn release(&mut self, store: &dyn Store, freed: &[Run]) -> Result<(), DiskError> {
        for cluster in freed.iter().flat_map(|run| run.first..run.end()) {
            let count = self.refcounts.get(store, cluster)?;
            let Some(left) = count.checked_sub(1) else {
                let what = format!("cluster {cluster} was in use with a refcount of 0");
                return Err(DiskError::Damaged { file: store.name(), what });
            };
            if left == 0 {
                self.refcounts.unprotect(cluster);
                self.l2.forget(cluster << self.cluster_bits, self.cluster_size());
            }
            self.refcounts.set(store, cluster, left)?;
        }
        Ok(())
    }

    /// Whether there are internal snapshots.
    pub fn has_snapshots(&self) -> bool {
        self.has_snapshots
    }

    /// Another L1 table is in force, which begins with the present one's entries.
    pub fn replace_l1(&mut self, l1: Vec<u64>, offset: u64) {
        self.refcounts.protect(offset, l1.len() as u64 * 8);
        self.l1 = l1;
        self.l1_offset = offset;
    }
}

/// Changed metadata on its way to the file.
#[derive(Debug)]
pub(crate) struct Changes {
    pub refcounts: RefcountChanges,
    pub l2: Vec<(u64, Box<[u8]>)>,
    /// Entries of the L1 table: their offsets in the file and their values.
    pub l1: Vec<(u64, u64)>,
    l1_indices: BTreeSet<usize>,
    pub freed: Vec<Run>,
}
