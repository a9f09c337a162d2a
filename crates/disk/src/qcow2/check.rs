//! Verifying an image's metadata, and putting refcounts right.
//!
//! Everything that refers to a host cluster is counted, and the counts are compared with the
//! refcounts. Each table is read once however often it is referred to, holes are skipped, and
//! memory is taken only for clusters that something refers to: the work is bounded by what the
//! file really holds, whatever its numbers claim.
use super::entry::{COPIED, Mapping, table_offset};
use super::header::{BITMAPS_VALID, Bitmaps, CORRUPT, DIRTY, Header};
use super::info::snapshots;
use super::{Qcow2, meta::Meta, open_file};
use crate::bytes::{be16, be32, be64};
use crate::{Access, DiskError, ExtentKind, FileOptions, Store};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::Ordering;

/// Errors that are described in words; further ones are only counted.
const DESCRIBED: usize = 20;
/// Most bytes of bitmap tables, in all.
const MAX_BITMAP_BYTES: u64 = 256 << 20;

/// What is to be put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: only look.
    Nothing,
    /// Leaked clusters: in use by their refcount, but nothing refers to them.
    Leaks,
    /// All refcounts, and the flags that follow from them.
    Everything,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Places where the image contradicts itself so that data is or may get lost.
    pub errors: u64,
    /// The first of them, in words.
    pub described: Vec<String>,
    /// Clusters that take up space for nothing.
    pub leaks: u64,
    /// Clusters that are in use.
    pub used: u64,
    /// Errors and leaks that were put right, and are not counted above.
    pub repaired: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0
    }
}

impl Qcow2 {
    /// Checks an image, and repairs it if asked. Its backing file is not looked at.
    ///
    /// # Errors
    /// Those of [`Qcow2::open`]; that the image is damaged is no error, as long as its header can
    /// be understood.
    pub fn check(
        path: &Path,
        repair: Repair,
        options: FileOptions,
    ) -> Result<CheckReport, DiskError> {
        let access = if repair == Repair::Nothing { Access::Read } else { Access::Write };
        Self::check_in(open_file(path, FileOptions { access, ..options })?, repair)
    }

    /// Checks the image in a store, as [`Qcow2::check`] does that in a file.
    ///
    /// # Errors
    /// As [`Qcow2::check`].
    pub fn check_in(store: impl Store + 'static, repair: Repair) -> Result<CheckReport, DiskError> {
        let image = Self::open_as_is(store, None)?;
        let before = image.inspect()?;
        if repair == Repair::Nothing {
            return Ok(before.report);
        }
        image.repair(&before, repair)?;
        let mut after = image.inspect()?.report;
        let wrong = |report: &CheckReport| report.errors + report.leaks;
        after.repaired = wrong(&before.report).saturating_sub(wrong(&after));
        if after.errors == 0 {
            image.mark(CORRUPT, false)?;
            image.settle()?;
        } else {
            // Not to be closed as if it were sound.
            image.incompatible.fetch_or(CORRUPT, Ordering::SeqCst);
        }
        Ok(after)
    }

    /// Repairs an image that was not closed.
    pub(super) fn repair_after_crash(&self) -> Result<(), DiskError> {
        let found = self.inspect()?;
        if let Some(what) = found.structural {
            self.mark(CORRUPT, true)?;
            return Err(DiskError::Damaged { file: self.store.name(), what });
        }
        self.repair(&found, Repair::Everything)?;
        self.settle()
    }

    fn inspect(&self) -> Result<Findings, DiskError> {
        let header = Header::read(&*self.store)?;
        let mut meta = self.meta();
        let mut survey = Survey::new(&*self.store, &header, &mut meta);
        survey.count_all(self.is_marked(DIRTY))?;
        survey.compare()
    }

    /// Writes the refcounts that were counted, the higher ones first.
    fn repair(&self, found: &Findings, repair: Repair) -> Result<(), DiskError> {
        if repair == Repair::Everything {
            {
                let mut meta = self.meta();
                for index in &found.unsound_blocks {
                    meta.refcounts.drop_block(*index);
                }
                meta.refcounts.protect_blocks();
                for (cluster, count) in &found.too_low {
                    meta.refcounts.set(&*self.store, *cluster, *count)?;
                }
                for (index, entry) in &found.l1_flags {
                    meta.set_l1(*index, *entry);
                }
                for (place, entry) in &found.l2_flags {
                    meta.set_l2(&*self.store, *place, *entry)?;
                }
            }
            self.commit(true)?;
        }
        {
            let mut meta = self.meta();
            for (cluster, count) in &found.too_high {
                meta.refcounts.set(&*self.store, *cluster, *count)?;
            }
        }
        self.commit(true)
    }
}

/// What an inspection found, and what would put it right.
#[derive(Default)]
struct Findings {
    report: CheckReport,
    /// An error that no repair of refcounts can mend.
    structural: Option<String>,
    /// Entries of the refcount table that name no possible block.
    unsound_blocks: Vec<usize>,
    /// Clusters whose refcount is too low, with the right one.
    too_low: Vec<(u64, u64)>,
    /// Clusters whose refcount is too high, with the right one.
    too_high: Vec<(u64, u64)>,
    /// Entries with a wrong COPIED flag, as they should be: by index, and by place in the file.
    l1_flags: Vec<(usize, u64)>,
    l2_flags: Vec<(u64, u64)>,
}

impl Findings {
    fn error(&mut self, what: String) {
        self.report.errors += 1;
        if self.report.described.len() < DESCRIBED {
            self.report.described.push(what);
        }
    }

    fn structural_error(&mut self, what: String) {
        self.structural.get_or_insert_with(|| what.clone());
        self.error(what);
    }
}

/// Counts of references, for few or many clusters.
#[derive(Default)]
struct Counts(HashMap<u64, [u32; Counts::PER_PAGE as usize]>);

impl Counts {
    const PER_PAGE: u64 = 32;

    fn add(&mut self, cluster: u64, times: u32) {
        let page = self.0.entry(cluster / Self::PER_PAGE).or_default();
        if let Some(count) = page.get_mut((cluster % Self::PER_PAGE) as usize) {
            *count = count.saturating_add(times);
        }
    }

    fn get(&self, cluster: u64) -> u64 {
        let page = self.0.get(&(cluster / Self::PER_PAGE));
        let count = page.and_then(|page| page.get((cluster % Self::PER_PAGE) as usize));
        count.copied().map_or(0, u64::from)
    }

    /// All that are not zero.
    fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().flat_map(|(page, counts)| {
            let used = counts.iter().enumerate().filter(|(_, count)| **count != 0);
            let first = page * Self::PER_PAGE;
            used.map(move |(index, count)| (first + index as u64, u64::from(*count)))
        })
    }
}

/// An inspection under way.
struct Survey<'a> {
    store: &'a dyn Store,
    header: &'a Header,
    meta: &'a mut Meta,
    counts: Counts,
    /// How many L1 entries refer to each L2 table.
    l2_tables: BTreeMap<u64, u32>,
    found: Findings,
}

impl<'a> Survey<'a> {
    fn new(store: &'a dyn Store, header: &'a Header, meta: &'a mut Meta) -> Self {
        let (counts, l2_tables) = (Counts::default(), BTreeMap::new());
        Self { store, header, meta, counts, l2_tables, found: Findings::default() }
    }

    fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Counts everything that refers to a cluster.
    fn count_all(&mut self, dirty: bool) -> Result<(), DiskError> {
        self.counts.add(0, 1);
        let place = self.meta.refcounts.place();
        let table_bytes = u64::from(place.clusters) * self.cluster_size();
        self.count_range(place.offset, table_bytes, 1);
        self.count_blocks(dirty);
        let (l1, l1_offset) = self.meta.l1();
        let l1 = l1.to_vec();
        self.count_range(l1_offset, l1.len() as u64 * 8, 1);
        self.count_l1("active L1 table", &l1);
        let (snapshots, length) = snapshots(self.store, self.header)?;
        if length > 0 {
            self.count_range(self.header.snapshots_offset, length, 1);
        }
        for snapshot in snapshots {
            let bytes = u64::from(snapshot.l1_entries) * 8;
            self.count_range(snapshot.l1_offset, bytes, 1);
            let l1 = self.read_table(snapshot.l1_offset, bytes)?;
            self.count_l1("L1 table of a snapshot", &l1);
        }
        if let Some(bitmaps) = self.header.bitmaps
            && self.header.autoclear & BITMAPS_VALID != 0
        {
            self.count_bitmaps(bitmaps)?;
        }
        for (table, times) in std::mem::take(&mut self.l2_tables) {
            self.count_l2(table, times)?;
        }
        Ok(())
    }

    /// Counts the clusters of a range that the caller knows to be within bounds.
    fn count_range(&mut self, offset: u64, length: u64, times: u32) {
        let end = offset.saturating_add(length).div_ceil(self.cluster_size());
        for cluster in offset / self.cluster_size()..end {
            self.counts.add(cluster, times);
        }
    }

    fn count_blocks(&mut self, dirty: bool) {
        self.found.unsound_blocks = self.meta.refcounts.unsound_blocks();
        let table = self.meta.refcounts.table().to_vec();
        for index in self.found.unsound_blocks.clone() {
            let block = table.get(index).copied().unwrap_or(0);
            let what = format!("refcount block {index} cannot be at {block}");
            // In an image that was not closed this is part of what must be expected.
            if dirty { self.found.error(what) } else { self.found.structural_error(what) }
        }
        for (index, block) in table.into_iter().enumerate() {
            if block != 0 && self.found.unsound_blocks.binary_search(&index).is_err() {
                self.count_range(block, 1, 1);
            }
        }
    }

    /// Whether a table can be at an offset.
    fn is_table_place(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster_size())
            && offset / self.cluster_size() < self.meta.refcounts.end()
    }

    fn count_l1(&mut self, name: &str, l1: &[u64]) {
        for (index, entry) in l1.iter().enumerate() {
            let table = table_offset(*entry);
            if table == 0 {
                continue;
            }
            if self.is_table_place(table) {
                self.counts.add(table / self.cluster_size(), 1);
                let times = self.l2_tables.entry(table).or_default();
                *times = times.saturating_add(1);
            } else {
                let what =
                    format!("entry {index} of the {name} refers to {table}, no table's place");
                self.found.structural_error(what);
            }
        }
    }

    fn count_l2(&mut self, table: u64, times: u32) -> Result<(), DiskError> {
        for (index, entry) in self.read_table(table, self.cluster_size())?.into_iter().enumerate() {
            if entry == 0 {
                continue;
            }
            let mapping = Mapping::parse(entry, self.header.cluster_bits);
            let used = mapping.map(|mapping| mapping.host_clusters(self.header.cluster_bits));
            let end = self.meta.refcounts.end();
            match used {
                Ok(None) => {}
                Ok(Some((first, count))) if first < end => {
                    for cluster in first..first + count {
                        self.counts.add(cluster, times);
                    }
                }
                Ok(Some(_)) => self.found.structural_error(format!(
                    "entry {index} of the L2 table at {table} points beyond the file's end"
                )),
                Err(why) => self
                    .found
                    .structural_error(format!("entry {index} of the L2 table at {table} {why}")),
            }
        }
        Ok(())
    }

    /// The entries of a table, or none where the file has a hole there.
    fn read_table(&self, offset: u64, bytes: u64) -> Result<Vec<u64>, DiskError> {
        if self.is_hole(offset, bytes)? {
            return Ok(Vec::new());
        }
        let mut table = vec![0; usize::try_from(bytes).unwrap_or(0)];
        self.store.read_or_zero_at(offset, &mut table)?;
        let (entries, _) = table.as_chunks::<8>();
        Ok(entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }

    fn is_hole(&self, offset: u64, length: u64) -> Result<bool, DiskError> {
        if length == 0 {
            return Ok(true);
        }
        let extent = self.store.extent(offset, length)?;
        Ok(extent.kind == ExtentKind::Zero && extent.length == length)
    }

    /// Counts the directory, the tables and the data of persistent bitmaps ("Bitmaps extension").
    fn count_bitmaps(&mut self, bitmaps: Bitmaps) -> Result<(), DiskError> {
        let mut budget = MAX_BITMAP_BYTES;
        let mut spend = |bytes: u64| {
            let left = budget.checked_sub(bytes);
            budget = left.unwrap_or(0);
            left.is_some()
        };
        if !self.is_table_place(bitmaps.directory_offset) || !spend(bitmaps.directory_size) {
            self.found.structural_error("the bitmap directory is where none can be".to_owned());
            return Ok(());
        }
        self.count_range(bitmaps.directory_offset, bitmaps.directory_size, 1);
        let mut directory = vec![0; usize::try_from(bitmaps.directory_size).unwrap_or(0)];
        self.store.read_or_zero_at(bitmaps.directory_offset, &mut directory)?;
        let mut rest = directory.as_slice();
        for _ in 0..bitmaps.count {
            // Offset and entries of the table, flags, type, granularity, lengths of name and more.
            let (table, bytes) = (be64(rest, 0), u64::from(be32(rest, 8)) * 8);
            if rest.len() < 24 || !self.is_table_place(table) || !spend(bytes) {
                self.found.structural_error("a bitmap's table is where none can be".to_owned());
                return Ok(());
            }
            self.count_range(table, bytes, 1);
            for entry in self.read_table(table, bytes)? {
                let data = table_offset(entry);
                if data != 0 && self.is_table_place(data) {
                    self.count_range(data, 1, 1);
                }
            }
            let length = 24 + usize::from(be16(rest, 18)) + be32(rest, 20) as usize;
            rest = rest.get(length.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(())
    }

    /// Compares what was counted with the refcounts and the flags.
    fn compare(mut self) -> Result<Findings, DiskError> {
        self.compare_stored()?;
        self.compare_counted()?;
        self.compare_flags()?;
        self.found.report.used = self.counts.iter().count() as u64;
        Ok(self.found)
    }

    /// Looks at each refcount that is not zero.
    fn compare_stored(&mut self) -> Result<(), DiskError> {
        let table = self.meta.refcounts.table().to_vec();
        let per_block = (self.cluster_size() * 8) >> self.header.refcount_order;
        for (index, block) in table.into_iter().enumerate() {
            let unsound = self.found.unsound_blocks.binary_search(&index).is_ok();
            if block == 0 || unsound || self.is_hole(block, self.cluster_size())? {
                continue;
            }
            for cluster in index as u64 * per_block..(index as u64 + 1) * per_block {
                let (stored, counted) =
                    (self.meta.refcounts.get(self.store, cluster)?, self.counts.get(cluster));
                if stored > counted {
                    self.found.too_high.push((cluster, counted));
                    if counted == 0 {
                        self.found.report.leaks += 1;
                    } else {
                        let what =
                            format!("cluster {cluster} has refcount {stored}, not {counted}");
                        self.found.error(what);
                    }
                }
            }
        }
        Ok(())
    }

    /// Looks at the refcount of each cluster that something refers to.
    fn compare_counted(&mut self) -> Result<(), DiskError> {
        let mut counted: Vec<_> = self.counts.iter().collect();
        counted.sort_unstable();
        for (cluster, count) in counted {
            // A block that is dropped for being unsound counts nothing.
            let stored =
                self.meta.refcounts.get(self.store, cluster).or_else(|error| match error {
                    DiskError::Damaged { .. } => Ok(0),
                    other => Err(other),
                })?;
            if stored < count {
                self.found.too_low.push((cluster, count));
                let what = format!("cluster {cluster} has refcount {stored}, and {count} use it");
                self.found.error(what);
            }
        }
        Ok(())
    }

    /// The COPIED flag of an active entry says whether its refcount is 1.
    fn compare_flags(&mut self) -> Result<(), DiskError> {
        let l1 = self.meta.l1().0.to_vec();
        let mut seen = HashSet::new();
        for (index, entry) in l1.into_iter().enumerate() {
            let table = table_offset(entry);
            if table == 0 || !self.is_table_place(table) {
                continue;
            }
            if let Some(right) = self.with_right_flag(entry, table) {
                self.found.error(format!("entry {index} of the active L1 table has a wrong flag"));
                self.found.l1_flags.push((index, right));
            }
            if !seen.insert(table) {
                continue;
            }
            for (index, entry) in
                self.read_table(table, self.cluster_size())?.into_iter().enumerate()
            {
                let host = match Mapping::parse(entry, self.header.cluster_bits) {
                    Ok(Mapping::Data { host, .. } | Mapping::Zero { host: Some(host) }) => host,
                    _ => continue,
                };
                if let Some(right) = self.with_right_flag(entry, host) {
                    let what = format!("entry {index} of the L2 table at {table} has a wrong flag");
                    self.found.error(what);
                    self.found.l2_flags.push((table + index as u64 * 8, right));
                }
            }
        }
        Ok(())
    }

    /// The entry with the flag that its target's count asks for, if it has another.
    fn with_right_flag(&self, entry: u64, target: u64) -> Option<u64> {
        let once = self.counts.get(target / self.cluster_size()) == 1;
        let right = if once { entry | COPIED } else { entry & !COPIED };
        (right != entry).then_some(right)
    }
}
