//! Stream-optimised extents: each grain is compressed and has a marker in front, tables follow the
//! grains they are for, the directory comes last. They are written from front to back, once, and
//! read at will.
//!
//! "Virtual Disk Format 5.0" (VMware, 2011), "Stream-Optimized Compressed Sparse Extents".
use super::descriptor::{Variant, new_text};
use super::header::{AT_END, DESCRIPTOR, DESCRIPTOR_LENGTH, GRAIN, Header, TABLE_ENTRIES};
use super::sparse::Sparse;
use crate::blocks::Blocks;
use crate::bytes::{le32, le64, put};
use crate::convert::{OnProgress, Progress};
use crate::create::{check_size, random_id};
use crate::store::{Complain, Store};
use crate::table::lock;
use crate::{Disk, DiskError, Extent, ExtentKind, SECTOR};
use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

/// The kinds of markers in front of what is no grain.
const TABLE_MARKER: u32 = 1;
const DIRECTORY_MARKER: u32 = 2;
pub(super) const FOOTER_MARKER: u32 = 3;
/// Bytes of a grain's marker.
const GRAIN_MARKER: u64 = 12;
/// Bytes of decompressed grains that are kept.
const KEPT: usize = 2 << 20;
/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;
/// Bytes of the largest disk of a new image.
pub(super) const MAX_SIZE: u64 = 2047 << 30;

/// A grain and its number.
type Grain = (u64, Arc<Vec<u8>>);

/// An open stream-optimised extent.
pub(super) struct Stream {
    sparse: Sparse,
    kept: Mutex<VecDeque<Grain>>,
}

impl Stream {
    pub(super) fn new(sparse: Sparse) -> Self {
        Self { sparse, kept: Mutex::default() }
    }

    pub(super) fn header(&self) -> &Header {
        self.sparse.header()
    }

    /// As [`Disk::read_at`], for a range that is within the extent.
    pub(super) fn read(&self, mut offset: u64, mut buffer: &mut [u8]) -> Result<(), DiskError> {
        let size = self.header().grain;
        while !buffer.is_empty() {
            let (grain, within) = (offset / size, offset % size);
            let now = usize::try_from(size - within).unwrap_or(usize::MAX).min(buffer.len());
            let (part, rest) = buffer.split_at_mut(now);
            match self.sparse.find(grain)? {
                None => part.fill(0),
                Some(place) => {
                    let data = self.grain(grain, place)?;
                    let start = usize::try_from(within).unwrap_or(usize::MAX);
                    if let Some(data) = data.get(start..start.saturating_add(now)) {
                        part.copy_from_slice(data);
                    }
                }
            }
            buffer = rest;
            offset += now as u64;
        }
        Ok(())
    }

    /// A grain's content, which has all its bytes.
    fn grain(&self, grain: u64, place: u64) -> Result<Arc<Vec<u8>>, DiskError> {
        if let Some((_, data)) = lock(&self.kept).iter().find(|(kept, _)| *kept == grain) {
            return Ok(Arc::clone(data));
        }
        let data = Arc::new(self.decompress(grain, place)?);
        let mut kept = lock(&self.kept);
        kept.push_back((grain, Arc::clone(&data)));
        while kept.len() * data.len() > KEPT {
            kept.pop_front();
        }
        Ok(data)
    }

    fn decompress(&self, grain: u64, place: u64) -> Result<Vec<u8>, DiskError> {
        let (store, header) = (self.sparse.store(), self.header());
        let damaged = |what: &str| store.damaged(format!("grain {grain} at {place} {what}"));
        let mut marker = [0; GRAIN_MARKER as usize];
        store.read_at(place, &mut marker)?;
        let length = u64::from(le32(&marker, 8));
        if le64(&marker, 0).checked_mul(SECTOR) != Some(grain * header.grain) {
            return Err(damaged("is marked as another one"));
        }
        // Deflate makes nothing longer by more than this.
        if length > header.grain + header.grain / 8 + 64 {
            return Err(damaged("is longer than a grain can be"));
        }
        let mut compressed = vec![0; usize::try_from(length).unwrap_or_default()];
        store.read_at(place + GRAIN_MARKER, &mut compressed)?;
        let mut data = Vec::new();
        let read = ZlibDecoder::new(&*compressed).take(header.grain).read_to_end(&mut data);
        let needed = header.grain.min(header.size - grain * header.grain);
        if read.is_err() || (data.len() as u64) < needed {
            return Err(damaged("cannot be decompressed"));
        }
        data.resize(usize::try_from(header.grain).unwrap_or_default(), 0);
        Ok(data)
    }

    /// As [`Disk::extent`], for a range that is within the extent.
    pub(super) fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        let size = self.header().grain;
        let kind = |offset: u64| {
            let found = self.sparse.find(offset / size)?;
            Ok(if found.is_some() { ExtentKind::Data } else { ExtentKind::Zero })
        };
        let first = kind(offset)?;
        let mut known = size - offset % size;
        let limit = length.min(size * TABLE_ENTRIES);
        while known < limit && kind(offset + known)? == first {
            known += size;
        }
        Ok(Extent { kind: first, length: known.min(length) })
    }
}

/// Writes a stream-optimised image of all that `source` holds into a store that is empty. It is
/// durable when this returns.
///
/// # Errors
/// [`DiskError::Cancelled`] where `progress` broke it off, [`DiskError::Invalid`] where the format
/// cannot hold that much (2047 GiB), or what reading and writing may meet.
pub fn write_stream(
    source: &dyn Disk,
    store: &dyn Store,
    progress: OnProgress<'_>,
) -> Result<(), DiskError> {
    let size = source.size().next_multiple_of(SECTOR);
    check_size(&store.name(), size, MAX_SIZE)?;
    let mut writer = Writer {
        store,
        sectors: size / SECTOR,
        written: 0,
        buffer: Vec::new(),
        table: Vec::new(),
        directory: Vec::new(),
    };
    writer.begin()?;
    let grain_size = GRAIN * SECTOR;
    let mut data = vec![0; usize::try_from(grain_size).unwrap_or_default()];
    let (mut grain, grains) = (0, size.div_ceil(grain_size));
    // Up to where the source is known to hold zeroes.
    let mut zero_until = 0;
    while grain < grains {
        let start = grain * grain_size;
        let length = grain_size.min(source.size() - start);
        if grain.is_multiple_of(16)
            && progress(Progress { done: start, total: source.size() }).is_break()
        {
            return Err(DiskError::Cancelled);
        }
        if start >= zero_until {
            let extent = source.extent(start, source.size() - start)?;
            if extent.kind == ExtentKind::Zero {
                zero_until = start.saturating_add(extent.length);
            }
        }
        if start + length <= zero_until {
            writer.skip()?;
        } else {
            let part = data.get_mut(..usize::try_from(length).unwrap_or_default());
            let part = part.unwrap_or_default();
            source.read_at(start, part)?;
            if let Some(rest) = data.get_mut(usize::try_from(length).unwrap_or_default()..) {
                rest.fill(0);
            }
            writer.grain(grain, &data)?;
        }
        grain += 1;
    }
    writer.finish()?;
    // There is nothing left to break off.
    let _ = progress(Progress { done: source.size(), total: source.size() });
    Ok(())
}

/// An image that is being written from front to back.
struct Writer<'a> {
    store: &'a dyn Store,
    sectors: u64,
    /// Bytes that are in the store.
    written: u64,
    /// Bytes that come next.
    buffer: Vec<u8>,
    /// Sectors of the grains of the table that is under way; zero for those that are not there.
    table: Vec<u32>,
    /// Sectors of the tables before.
    directory: Vec<u32>,
}

impl Writer<'_> {
    fn begin(&mut self) -> Result<(), DiskError> {
        let mut front = Header::stream_bytes(self.sectors, AT_END);
        let id = le32(&random_id()?, 0);
        let path = self.store.name();
        let name = path.rsplit('/').next().unwrap_or_default();
        front.extend(new_text(Variant::StreamOptimized, self.sectors, name, id).into_bytes());
        debug_assert!(front.len() as u64 <= (DESCRIPTOR + DESCRIPTOR_LENGTH) * SECTOR);
        front.resize(usize::try_from(GRAIN * SECTOR).unwrap_or_default(), 0);
        self.put(&front)
    }

    /// The sector at which comes what is put next.
    fn here(&self) -> Result<u32, DiskError> {
        let sector = (self.written + self.buffer.len() as u64) / SECTOR;
        u32::try_from(sector).map_err(|_| DiskError::Invalid {
            file: self.store.name(),
            problem: "the compressed image becomes larger than 2 TiB; choose another format"
                .to_owned(),
        })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.buffer.extend(bytes);
        let sector = usize::try_from(SECTOR).unwrap_or(1);
        self.buffer.resize(self.buffer.len().next_multiple_of(sector), 0);
        if self.buffer.len() >= BUFFER { self.drain() } else { Ok(()) }
    }

    fn drain(&mut self) -> Result<(), DiskError> {
        self.store.write_at(self.written, &self.buffer)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// A marker in front of `sectors`.
    fn put_marker(&mut self, sectors: u64, kind: u32) -> Result<(), DiskError> {
        let mut marker = [0; SECTOR as usize];
        put(&mut marker, 0, &sectors.to_le_bytes());
        put(&mut marker, 12, &kind.to_le_bytes());
        self.put(&marker)
    }

    /// Leaves a grain out.
    fn skip(&mut self) -> Result<(), DiskError> {
        self.enter(0)
    }

    /// Adds a grain, unless it is zero.
    fn grain(&mut self, grain: u64, data: &[u8]) -> Result<(), DiskError> {
        if data.iter().all(|byte| *byte == 0) {
            return self.skip();
        }
        let here = self.here()?;
        let mut bytes = vec![0; GRAIN_MARKER as usize];
        let mut encoder = ZlibEncoder::new(&mut bytes, Compression::default());
        // Memory takes all.
        let _ = encoder.write_all(data).and_then(|()| encoder.try_finish());
        drop(encoder);
        let length = u32::try_from(bytes.len() as u64 - GRAIN_MARKER).unwrap_or(u32::MAX);
        put(&mut bytes, 0, &(grain * GRAIN).to_le_bytes());
        put(&mut bytes, 8, &length.to_le_bytes());
        self.put(&bytes)?;
        self.enter(here)
    }

    fn enter(&mut self, sector: u32) -> Result<(), DiskError> {
        self.table.push(sector);
        if self.table.len() as u64 == TABLE_ENTRIES { self.end_table() } else { Ok(()) }
    }

    fn end_table(&mut self) -> Result<(), DiskError> {
        let mut table = std::mem::take(&mut self.table);
        if table.iter().all(|sector| *sector == 0) {
            self.directory.push(0);
            return Ok(());
        }
        table.resize(usize::try_from(TABLE_ENTRIES).unwrap_or_default(), 0);
        let bytes: Vec<u8> = table.into_iter().flat_map(u32::to_le_bytes).collect();
        self.put_marker(bytes.len() as u64 / SECTOR, TABLE_MARKER)?;
        let here = self.here()?;
        self.directory.push(here);
        self.put(&bytes)
    }

    fn finish(&mut self) -> Result<(), DiskError> {
        if !self.table.is_empty() {
            self.end_table()?;
        }
        let directory: Vec<u8> = self.directory.iter().flat_map(|at| at.to_le_bytes()).collect();
        self.put_marker((directory.len() as u64).div_ceil(SECTOR), DIRECTORY_MARKER)?;
        let here = self.here()?;
        self.put(&directory)?;
        self.put_marker(1, FOOTER_MARKER)?;
        self.put(&Header::stream_bytes(self.sectors, here.into()))?;
        // The end of the stream.
        self.put_marker(0, 0)?;
        self.drain()?;
        self.store.sync()
    }
}
