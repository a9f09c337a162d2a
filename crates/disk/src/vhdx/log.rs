//! The log of a VHDX image ([MS-VHDX] 2.3): a ring of entries, each of which holds whole sectors
//! of 4 KiB that are to be written to the file. A change of the block table is durable once its
//! entry is, and is done again when an image is opened that was not closed.
//!
//! Entries are written here one at a time, each one complete by itself: its tail is its own start,
//! as what the entry before it holds is durable in its place by then. None is longer than half of
//! the log, so that the one before is still whole while the next one is being written.
use super::header::Header;
use super::parts::{Guid, checksum, seal};
use super::patched::{Change, Patched};
use crate::DiskError;
use crate::bytes::{array, le32, le64, put};
use crate::create::random_id;
use crate::store::{Complain, Store};
use crate::table::Changed;
use std::collections::BTreeMap;

/// Bytes of a sector of the log.
const SECTOR: u64 = 4096;
const HEADER: usize = 64;
const DESCRIPTOR: usize = 32;
/// How many times the log's length is read to find its entries, and the file's length is zeroed.
/// Where entries do not overlap, which they only do when some are left of an earlier round, once
/// is enough.
const SEARCH: u64 = 4;
/// Bytes that a file can have: the largest disk, and a hundredth for its tables.
const MAX_FILE: u64 = 65 << 40;

mod field {
    pub(super) const LENGTH: usize = 8;
    pub(super) const TAIL: usize = 12;
    pub(super) const SEQUENCE: usize = 16;
    pub(super) const DESCRIPTORS: usize = 24;
    pub(super) const LOG: usize = 32;
    pub(super) const FLUSHED: usize = 48;
    pub(super) const LAST: usize = 56;
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// An entry that was found and is whole.
struct Entry {
    /// Where it is in the log.
    offset: u64,
    length: u64,
    sequence: u64,
    /// Where the oldest entry is that has to be done before this one.
    tail: u64,
    /// Bytes that the file has had at least when the entry was written.
    flushed: u64,
    /// Bytes that the file needs for what the entry refers to.
    last: u64,
}

/// Where the log is, in the file.
#[derive(Clone, Copy)]
struct Ring {
    offset: u64,
    length: u64,
}

impl Ring {
    /// Reads from `at` on, beyond the end from the start.
    fn read(self, store: &dyn Store, at: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let (first, second) = self.split(at, buffer.len());
        let (front, back) = buffer.split_at_mut(first);
        store.read_at(self.offset + at, front)?;
        store.read_at(self.offset, back.get_mut(..second).unwrap_or_default())
    }

    fn write(self, store: &dyn Store, at: u64, data: &[u8]) -> Result<(), DiskError> {
        let (front, back) = data.split_at(self.split(at, data.len()).0);
        store.write_at(self.offset + at, front)?;
        if back.is_empty() { Ok(()) } else { store.write_at(self.offset, back) }
    }

    /// How much of `length` bytes is before the end, how much behind it.
    fn split(self, at: u64, length: usize) -> (usize, usize) {
        let first = length.min(size(self.length.saturating_sub(at)));
        (first, length - first)
    }
}

/// Finds the entry at a place of the log, if there is a whole one. `budget` are the bytes that may
/// still be read.
fn entry_at(
    store: &dyn Store,
    ring: Ring,
    offset: u64,
    id: Guid,
    budget: &mut u64,
) -> Result<Option<Entry>, DiskError> {
    let mut header = [0; HEADER];
    ring.read(store, offset, &mut header)?;
    let entry = Entry {
        offset,
        length: le32(&header, field::LENGTH).into(),
        sequence: le64(&header, field::SEQUENCE),
        tail: le32(&header, field::TAIL).into(),
        flushed: le64(&header, field::FLUSHED),
        last: le64(&header, field::LAST),
    };
    if array(&header, 0) != *b"loge"
        || array(&header, field::LOG) != id
        || !entry.length.is_multiple_of(SECTOR)
        || entry.length == 0
        || entry.length > ring.length
        || entry.sequence == 0
    {
        return Ok(None);
    }
    *budget = budget.checked_sub(entry.length).ok_or_else(|| {
        store.damaged("entries of its log overlap in a way that no program leaves".to_owned())
    })?;
    let bytes = read_entry(store, ring, &entry)?;
    let whole = le32(&bytes, 4) == checksum(&bytes) && steps(&bytes, entry.sequence).is_some();
    Ok(whole.then_some(entry))
}

fn read_entry(store: &dyn Store, ring: Ring, entry: &Entry) -> Result<Vec<u8>, DiskError> {
    let mut bytes = vec![0; size(entry.length)];
    ring.read(store, entry.offset, &mut bytes)?;
    Ok(bytes)
}

/// What an entry wants done to the file.
enum Step {
    Write { offset: u64, sector: Vec<u8> },
    Zero { offset: u64, length: u64 },
}

impl Step {
    fn into_change(self) -> Change {
        match self {
            Self::Write { offset, sector } => Change { offset, length: SECTOR, data: sector },
            Self::Zero { offset, length } => Change { offset, length, data: Vec::new() },
        }
    }
}

/// What an entry wants done, or nothing where it contradicts itself.
fn steps(bytes: &[u8], sequence: u64) -> Option<Vec<Step>> {
    let count = size(le32(bytes, field::DESCRIPTORS).into());
    let head = HEADER.checked_add(count.checked_mul(DESCRIPTOR)?)?;
    let mut sectors = bytes.get(head.next_multiple_of(size(SECTOR))..)?.chunks_exact(size(SECTOR));
    let mut steps = Vec::new();
    for descriptor in bytes.get(HEADER..head)?.chunks_exact(DESCRIPTOR) {
        let offset = le64(descriptor, 16);
        if le64(descriptor, 24) != sequence || !offset.is_multiple_of(SECTOR) {
            return None;
        }
        steps.push(match &array::<4>(descriptor, 0) {
            b"zero" => {
                let length = le64(descriptor, 8);
                length.is_multiple_of(SECTOR).then_some(Step::Zero { offset, length })?
            }
            b"desc" => {
                let stored = sectors.next()?;
                let (high, low) = (le32(stored, 4), le32(stored, 4092));
                let stored_sequence = u64::from(high) << 32 | u64::from(low);
                if array(stored, 0) != *b"data" || stored_sequence != sequence {
                    return None;
                }
                let mut sector = stored.to_vec();
                put(&mut sector, 0, descriptor.get(8..16)?);
                put(&mut sector, 4092, descriptor.get(4..8)?);
                Step::Write { offset, sector }
            }
            _ => return None,
        });
    }
    Some(steps)
}

/// The entries that are to be done again, in order: from the tail of the newest one whose tail is
/// there up to itself.
fn active<'a>(
    entries: &'a BTreeMap<u64, Entry>,
    ring: Ring,
    store: &dyn Store,
) -> Result<Vec<&'a Entry>, DiskError> {
    let mut newest: Vec<&Entry> = entries.values().collect();
    newest.sort_by_key(|entry| std::cmp::Reverse(entry.sequence));
    let mut steps = entries.len().saturating_mul(16);
    for head in newest {
        let mut chain = Vec::new();
        let mut at = entries.get(&head.tail);
        while let Some(entry) = at {
            steps = steps.checked_sub(1).ok_or_else(|| {
                store.damaged("entries of its log have tails that lead nowhere".to_owned())
            })?;
            chain.push(entry);
            if entry.offset == head.offset {
                return Ok(chain);
            }
            let next = entries.get(&((entry.offset + entry.length) % ring.length));
            at = next.filter(|next| Some(next.sequence) == entry.sequence.checked_add(1));
        }
    }
    Ok(Vec::new())
}

/// Does again what the log holds, where it holds something, and says so in the header. What is open
/// to read only reads as if that had been done.
///
/// # Errors
/// The log is damaged, or the host fails.
pub(super) fn replay(
    store: Box<dyn Store>,
    header: &mut Header,
) -> Result<Box<dyn Store>, DiskError> {
    let id = header.log_id();
    if id == [0; 16] {
        return Ok(store);
    }
    let ring = Ring { offset: header.log_offset(), length: header.log_length() };
    let mut budget = ring.length * SEARCH;
    let mut entries = BTreeMap::new();
    for offset in (0..ring.length).step_by(size(SECTOR)) {
        if let Some(entry) = entry_at(&*store, ring, offset, id, &mut budget)? {
            entries.insert(offset, entry);
        }
    }
    let chain = active(&entries, ring, &*store)?;
    let Some(head) = chain.last() else {
        // A log that is said to be in use, of which nothing was written yet.
        return Ok(store);
    };
    let now = store.size()?;
    let Entry { flushed, last, .. } = **head;
    if now < flushed || last > MAX_FILE {
        let what = format!("it has {now} bytes, and its log wants {flushed} to {last}");
        return Err(store.damaged(what));
    }
    if store.read_only() {
        let mut changes = Vec::new();
        for entry in chain {
            let steps = steps(&read_entry(&*store, ring, entry)?, entry.sequence);
            changes.extend(steps.unwrap_or_default().into_iter().map(Step::into_change));
        }
        return Ok(Box::new(Patched::new(store, changes, last)?));
    }
    if now < last {
        store.set_size(last)?;
    }
    let mut redo = Redo { store: &*store, was: now, limit: now.max(last), zeroes: 0 };
    for entry in chain {
        let bytes = read_entry(&*store, ring, entry)?;
        for step in steps(&bytes, entry.sequence).unwrap_or_default() {
            redo.step(step)?;
        }
    }
    store.sync()?;
    header.set_log_id([0; 16]);
    header.write(&*store)?;
    Ok(store)
}

/// Doing again what a log holds.
struct Redo<'a> {
    store: &'a dyn Store,
    /// The file's size before, beyond which it reads as zeroes.
    was: u64,
    /// And now.
    limit: u64,
    /// Bytes that were zeroed.
    zeroes: u64,
}

impl Redo<'_> {
    fn step(&mut self, step: Step) -> Result<(), DiskError> {
        let (offset, length) = match &step {
            Step::Write { offset, .. } => (*offset, SECTOR),
            Step::Zero { offset, length } => (*offset, *length),
        };
        if offset.checked_add(length).is_none_or(|end| end > self.limit) {
            return Err(self.store.damaged("its log changes what is not in the file".to_owned()));
        }
        match step {
            Step::Write { sector, .. } => self.store.write_at(offset, &sector),
            Step::Zero { .. } => {
                let length = (offset + length).min(self.was).saturating_sub(offset);
                self.zeroes = self.zeroes.saturating_add(length);
                if self.zeroes > self.was.saturating_mul(SEARCH) {
                    let what = "its log empties the file again and again".to_owned();
                    return Err(self.store.damaged(what));
                }
                self.store.write_zeroes(offset, length)
            }
        }
    }
}

/// The log of an image that is open to write.
pub(super) struct Log {
    ring: Ring,
    /// What tells this use's entries from those of earlier ones.
    id: Guid,
    sequence: u64,
    /// Where the next entry goes.
    next: u64,
}

impl Log {
    pub(super) fn new(header: &Header) -> Result<Self, DiskError> {
        let ring = Ring { offset: header.log_offset(), length: header.log_length() };
        Ok(Self { ring, id: random_id()?, sequence: 1, next: 0 })
    }

    /// What the header has to name for the entries to count.
    pub(super) fn id(&self) -> Guid {
        self.id
    }

    /// Sectors that an entry can hold without being longer than half of the log.
    pub(super) fn capacity(&self) -> usize {
        let sectors = size(self.ring.length / SECTOR / 2);
        let descriptors = (HEADER + sectors * DESCRIPTOR).div_ceil(size(SECTOR));
        sectors.saturating_sub(descriptors).max(1)
    }

    /// Writes an entry, which is not yet durable. All else that was written must be, up to
    /// `file_size`.
    pub(super) fn append(
        &mut self,
        store: &dyn Store,
        pages: &[Changed],
        file_size: u64,
    ) -> Result<(), DiskError> {
        let bytes = self.encode(pages, file_size);
        self.ring.write(store, self.next, &bytes)?;
        self.next = (self.next + bytes.len() as u64) % self.ring.length;
        self.sequence += 1;
        Ok(())
    }

    fn encode(&self, pages: &[Changed], file_size: u64) -> Vec<u8> {
        let low = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
        let sector = size(SECTOR);
        let head = (HEADER + pages.len() * DESCRIPTOR).next_multiple_of(sector);
        let mut bytes = vec![0; head + pages.len() * sector];
        let length = bytes.len() as u64;
        put(&mut bytes, 0, b"loge");
        put(&mut bytes, field::LENGTH, &low(length));
        put(&mut bytes, field::TAIL, &low(self.next));
        put(&mut bytes, field::SEQUENCE, &self.sequence.to_le_bytes());
        put(&mut bytes, field::DESCRIPTORS, &low(pages.len() as u64));
        put(&mut bytes, field::LOG, &self.id);
        put(&mut bytes, field::FLUSHED, &file_size.to_le_bytes());
        put(&mut bytes, field::LAST, &file_size.to_le_bytes());
        for (index, page) in pages.iter().enumerate() {
            let at = HEADER + index * DESCRIPTOR;
            put(&mut bytes, at, b"desc");
            put(&mut bytes, at + 4, &array::<4>(&page.bytes, 4092));
            put(&mut bytes, at + 8, &array::<8>(&page.bytes, 0));
            put(&mut bytes, at + 16, &page.offset.to_le_bytes());
            put(&mut bytes, at + 24, &self.sequence.to_le_bytes());
            let at = head + index * sector;
            put(&mut bytes, at, &page.bytes);
            put(&mut bytes, at, b"data");
            put(&mut bytes, at + 4, &low(self.sequence >> 32));
            put(&mut bytes, at + 4092, &low(self.sequence & 0xffff_ffff));
        }
        seal(&mut bytes);
        bytes
    }
}
