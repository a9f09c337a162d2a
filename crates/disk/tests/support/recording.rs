//! Images in memory that record what is written to them, and what is left of them when the process
//! or the host stops anywhere in between.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use crate::support::Random;
use disk::{Disk, DiskError, Extent, ExtentKind, Store};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// What changes a store.
#[derive(Clone, Debug)]
pub enum Change {
    Write(u64, Vec<u8>),
    SetSize(u64),
    Zero(u64, u64),
    Sync,
}

impl Change {
    fn end(&self) -> u64 {
        match self {
            Self::Write(offset, data) => offset.saturating_add(data.len() as u64),
            Self::SetSize(size) => *size,
            Self::Zero(offset, length) => offset.saturating_add(*length),
            Self::Sync => 0,
        }
    }
}

/// Bytes that a store in memory takes. Hostile images lead beyond that.
const LARGEST: u64 = 1 << 28;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    changes: Vec<Change>,
    /// Bytes that may still be written before it is full.
    room: Option<u64>,
}

/// A store in memory.
#[derive(Default)]
pub struct Memory {
    state: Mutex<State>,
    read_only: bool,
}

impl Memory {
    pub fn of(bytes: Vec<u8>) -> Arc<Self> {
        let state = Mutex::new(State { bytes, ..State::default() });
        Arc::new(Self { state, read_only: false })
    }

    pub fn read_only(bytes: Vec<u8>) -> Arc<Self> {
        let state = Mutex::new(State { bytes, ..State::default() });
        Arc::new(Self { state, read_only: true })
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    pub fn changes(&self) -> usize {
        self.state.lock().unwrap().changes.len()
    }

    /// From now on, only so many bytes can be written.
    pub fn set_room(&self, room: Option<u64>) {
        self.state.lock().unwrap().room = room;
    }

    fn change(&self, change: Change) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        if change.end() > LARGEST {
            return Err(DiskError::Full { file: self.name() });
        }
        let mut state = self.state.lock().unwrap();
        let mut full = false;
        let mut change = change;
        if let (Some(room), Change::Write(_, data)) = (state.room, &mut change) {
            full = room < data.len() as u64;
            data.truncate(data.len().min(room as usize));
            state.room = Some(room - data.len() as u64);
        }
        apply(&mut state.bytes, &change);
        state.changes.push(change);
        if full { Err(DiskError::Full { file: self.name() }) } else { Ok(()) }
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(offset, data) => {
            let (start, end) = (*offset as usize, *offset as usize + data.len());
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[start..end].copy_from_slice(data);
        }
        Change::SetSize(size) => bytes.resize(*size as usize, 0),
        Change::Zero(offset, length) => {
            let end = (*offset + *length).min(bytes.len() as u64) as usize;
            if let Some(range) = bytes.get_mut(*offset as usize..end) {
                range.fill(0);
            }
        }
        Change::Sync => {}
    }
}

impl Store for Memory {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn size(&self) -> Result<u64, DiskError> {
        Ok(self.state.lock().unwrap().bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size().unwrap()) {
            let what = "it ends too early".to_owned();
            return Err(DiskError::Damaged { file: self.name(), what });
        }
        self.read_or_zero_at(offset, buffer)
    }

    fn read_or_zero_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let state = self.state.lock().unwrap();
        let there = usize::try_from(offset).ok().and_then(|start| state.bytes.get(start..));
        let there = there.unwrap_or_default();
        let length = there.len().min(buffer.len());
        buffer[..length].copy_from_slice(&there[..length]);
        buffer[length..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.change(Change::Write(offset, data.to_vec()))
    }

    fn sync(&self) -> Result<(), DiskError> {
        if self.read_only { Ok(()) } else { self.change(Change::Sync) }
    }

    fn set_size(&self, size: u64) -> Result<(), DiskError> {
        self.change(Change::SetSize(size))
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.change(Change::Zero(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.size()? < offset + length {
            self.set_size(offset + length)?;
        }
        self.change(Change::Zero(offset, length))
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        let kind = if offset < self.size()? { ExtentKind::Data } else { ExtentKind::Zero };
        Ok(Extent { kind, length })
    }
}

/// What may be in a sector, by the request that put it there.
#[derive(Clone, Copy)]
struct Version {
    request: usize,
    tag: u64,
    /// A discard: what was there before may be there still.
    optional: bool,
}

/// The requests made, and what each sector may hold after them.
#[derive(Default)]
struct History {
    sectors: HashMap<u64, Vec<Version>>,
    /// How many changes of the store came before each request, and how many after it.
    spans: Vec<(usize, usize)>,
    flushes: Vec<usize>,
}

fn tagged(tag: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(64)
}

/// Makes random requests of a disk, sector by sector with a tag of its own in each word.
fn make_requests(disk: &dyn Disk, memory: &Memory, count: usize, random: &mut Random) -> History {
    let mut history = History::default();
    let sectors = disk.size() / 512;
    for request in 0..count {
        let before = memory.changes();
        let first = random.below(sectors);
        let wanted = if random.below(8) == 0 { 4000 } else { 150 };
        let length = (1 + random.below(wanted)).min(sectors - first);
        let kind = random.below(10);
        let version = |tag| Version { request, tag, optional: kind == 6 };
        match kind {
            0..6 => {
                let tag = |sector| ((request as u64 + 1) << 32) | sector;
                let data: Vec<u8> =
                    (first..first + length).flat_map(|at| tagged(tag(at))).collect();
                disk.write_at(first * 512, &data).unwrap();
                for at in first..first + length {
                    history.sectors.entry(at).or_default().push(version(tag(at)));
                }
            }
            6 | 7 => {
                if kind == 6 {
                    disk.discard(first * 512, length * 512).unwrap();
                } else {
                    disk.write_zeroes(first * 512, length * 512).unwrap();
                }
                for at in first..first + length {
                    history.sectors.entry(at).or_default().push(version(0));
                }
            }
            _ => {
                disk.flush().unwrap();
                history.flushes.push(request);
            }
        }
        history.spans.push((before, memory.changes()));
    }
    history
}

impl History {
    /// Sees to it that a disk holds what it may hold when the store was cut off after `changes`.
    fn check(&self, disk: &dyn Disk, changes: usize) {
        let flushed = self.flushes.iter().rev().find(|at| self.spans[**at].1 <= changes);
        let flushed = flushed.copied().unwrap_or(0);
        let started = self.spans.iter().take_while(|span| span.0 < changes).count();
        let mut content = vec![0; disk.size() as usize];
        disk.read_at(0, &mut content).unwrap();
        for (at, sector) in content.chunks(512).enumerate() {
            let tag = u64::from_le_bytes(sector[..8].try_into().unwrap());
            assert!(sector[..504] == sector[8..], "sector {at} is torn");
            let versions = self.sectors.get(&(at as u64)).map_or(&[][..], |versions| versions);
            let mut allowed = tag == 0;
            for version in versions.iter().take_while(|version| version.request < started) {
                if version.request < flushed && !version.optional {
                    allowed = false;
                }
                allowed |= version.tag == tag;
            }
            assert!(allowed, "after {changes} changes, sector {at} holds {tag:x}");
        }
    }
}

/// How a format is made and opened.
pub struct Format<'a> {
    pub create: &'a dyn Fn(Arc<Memory>) -> Box<dyn Disk>,
    pub open: &'a dyn Fn(Arc<Memory>) -> Result<Box<dyn Disk>, DiskError>,
    /// Looks at an image after it was opened and closed again.
    pub inspect: &'a dyn Fn(&[u8]),
}

/// Makes random requests, stops after every so many changes of the store, and sees to it that the
/// image opens, holds all that was flushed, nothing that was not written, and can be used on.
pub fn survives_being_killed(format: &Format<'_>, requests: usize, points: usize, seed: u64) {
    let mut random = Random(seed);
    let memory = Memory::of(Vec::new());
    let disk = (format.create)(Arc::clone(&memory));
    let start = memory.changes();
    let history = make_requests(&*disk, &memory, requests, &mut random);
    drop(disk);
    let changes = memory.state.lock().unwrap().changes.clone();
    let every = ((changes.len() - start) / points).max(1);
    let mut bytes = Vec::new();
    for (at, change) in changes.iter().enumerate() {
        if at >= start && (at - start).is_multiple_of(every) {
            open_and_check(format, &history, &bytes, at, &mut random);
        }
        apply(&mut bytes, change);
    }
    open_and_check(format, &history, &bytes, changes.len(), &mut random);
}

/// As [`survives_being_killed`], where the host loses power: what was not made durable may be
/// there or not, sector by sector, in any combination.
pub fn survives_losing_power(format: &Format<'_>, requests: usize, points: usize, seed: u64) {
    let mut random = Random(seed);
    let memory = Memory::of(Vec::new());
    let disk = (format.create)(Arc::clone(&memory));
    let start = memory.changes();
    let history = make_requests(&*disk, &memory, requests, &mut random);
    drop(disk);
    let changes = memory.state.lock().unwrap().changes.clone();
    let mut durable = Vec::new();
    let mut applied = 0;
    let mut cuts: Vec<usize> = (0..points)
        .map(|_| start + random.below((changes.len() - start) as u64 + 1) as usize)
        .collect();
    cuts.sort_unstable();
    for cut in cuts {
        let synced = changes[..cut].iter().rposition(|change| matches!(change, Change::Sync));
        let synced = synced.map_or(start, |at| at + 1).max(start);
        for change in &changes[applied..synced] {
            apply(&mut durable, change);
        }
        applied = synced;
        let mut bytes = durable.clone();
        for change in &changes[synced..cut] {
            match change {
                Change::Write(offset, data) => {
                    for (index, sector) in data.chunks(512).enumerate() {
                        if random.below(2) == 0 {
                            let offset = offset + index as u64 * 512;
                            apply(&mut bytes, &Change::Write(offset, sector.to_vec()));
                        }
                    }
                }
                change if random.below(2) == 0 => apply(&mut bytes, change),
                _ => {}
            }
        }
        open_and_check(format, &history, &bytes, cut, &mut random);
    }
}

fn open_and_check(
    format: &Format<'_>,
    history: &History,
    bytes: &[u8],
    changes: usize,
    random: &mut Random,
) {
    let memory = Memory::of(bytes.to_vec());
    let disk = (format.open)(Arc::clone(&memory))
        .unwrap_or_else(|error| panic!("after {changes} changes: {error}"));
    history.check(&*disk, changes);
    drop(disk);
    (format.inspect)(&memory.bytes());

    // What the crash left behind must not come up in what is written from now on.
    let disk = (format.open)(Arc::clone(&memory)).unwrap();
    let mut content = vec![0; disk.size() as usize];
    disk.read_at(0, &mut content).unwrap();
    for _ in 0..4 {
        let offset = random.below(disk.size() / 512) * 512;
        let length = (512 + random.below(40_000)).min(disk.size() - offset);
        let data = vec![random.next() as u8; length as usize];
        disk.write_at(offset, &data).unwrap();
        content[offset as usize..(offset + length) as usize].copy_from_slice(&data);
    }
    drop(disk);
    let disk = (format.open)(Memory::read_only(memory.bytes())).unwrap();
    let mut now = vec![0; disk.size() as usize];
    disk.read_at(0, &mut now).unwrap();
    assert!(now == content, "after {changes} changes, writing on does not give what was written");
}

/// Fills the store at each of some points of a run of requests, makes room again, repeats what
/// failed, and sees to it that the disk holds what was written.
pub fn survives_a_full_store(format: &Format<'_>, seed: u64) {
    let mut random = Random(seed);
    let memory = Memory::of(Vec::new());
    let disk = (format.create)(Arc::clone(&memory));
    let mut content = vec![0; disk.size() as usize];
    for _ in 0..60 {
        let offset = random.below(disk.size() / 512) * 512;
        let length = (512 + random.below(100_000)).min(disk.size() - offset);
        let data = vec![random.next() as u8; length as usize];
        memory.set_room(Some(random.below(length * 2)));
        if let Err(error) = disk.write_at(offset, &data) {
            assert!(matches!(error, DiskError::Full { .. }), "{error}");
            // Another one comes in between.
            memory.set_room(None);
            let elsewhere = random.below(disk.size() / 512) * 512;
            disk.write_at(elsewhere, &[7; 512]).unwrap();
            content[elsewhere as usize..elsewhere as usize + 512].fill(7);
            disk.write_at(offset, &data).unwrap();
        }
        content[offset as usize..(offset + length) as usize].copy_from_slice(&data);
        if random.below(4) == 0 {
            memory.set_room(Some(random.below(5000)));
            if disk.flush().is_err() {
                memory.set_room(None);
                disk.flush().unwrap();
            }
        }
    }
    memory.set_room(None);
    drop(disk);
    let disk = (format.open)(Memory::read_only(memory.bytes())).unwrap();
    let mut now = vec![0; disk.size() as usize];
    disk.read_at(0, &mut now).unwrap();
    assert!(now == content, "what was written when there was room again is not there");
    (format.inspect)(&memory.bytes());
}
