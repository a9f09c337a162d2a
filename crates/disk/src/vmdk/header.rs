//! The header of a sparse extent of a VMDK image: "Virtual Disk Format 5.0" (VMware, 2011),
//! "Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse Extents". Numbers are
//! little-endian, places and lengths in sectors.
use crate::bytes::{array, le16, le32, le64, put};
use crate::store::{Complain, Store};
use crate::{DiskError, SECTOR};

pub(super) const MAGIC: &[u8; 4] = b"KDMV";
/// Bytes of a header.
pub(super) const HEADER: usize = 512;
/// Instead of the grain directory's place: the header is repeated at the end, with the place.
pub(super) const AT_END: u64 = u64::MAX;
/// Entries of a grain table.
pub(super) const TABLE_ENTRIES: u64 = 512;
/// The grain size of new images, in sectors.
pub(super) const GRAIN: u64 = 128;
/// Where new images have their descriptor, and its length, in sectors.
pub(super) const DESCRIPTOR: u64 = 1;
pub(super) const DESCRIPTOR_LENGTH: u64 = 20;
/// Entries of the longest grain directory that is read: 8 TiB in grains of 64 KiB.
const MAX_DIRECTORY: u64 = 1 << 18;
/// Grain sizes that are accepted, in sectors.
const GRAINS: std::ops::RangeInclusive<u64> = 8..=2048;
/// The line ends by which a header shows that no transfer as text has damaged it.
const LINE_ENDS: [u8; 4] = *b"\n \r\n";

/// The line ends are there.
const HAS_LINE_ENDS: u32 = 1;
/// There is a second grain directory with tables of its own.
const HAS_REDUNDANT: u32 = 1 << 1;
/// An entry of 1 says that a grain is zero.
const HAS_ZERO_GRAINS: u32 = 1 << 2;
const IS_COMPRESSED: u32 = 1 << 16;
const HAS_MARKERS: u32 = 1 << 17;
const DEFLATE: u16 = 1;

mod field {
    pub(super) const VERSION: usize = 4;
    pub(super) const FLAGS: usize = 8;
    pub(super) const CAPACITY: usize = 12;
    pub(super) const GRAIN: usize = 20;
    pub(super) const DESCRIPTOR: usize = 28;
    pub(super) const DESCRIPTOR_LENGTH: usize = 36;
    pub(super) const TABLE_ENTRIES: usize = 44;
    pub(super) const REDUNDANT: usize = 48;
    pub(super) const DIRECTORY: usize = 56;
    pub(super) const OVERHEAD: usize = 64;
    pub(super) const LINE_ENDS: usize = 73;
    pub(super) const COMPRESSION: usize = 77;
}

/// What a header says, checked. Places and lengths are in bytes.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub version: u32,
    pub size: u64,
    pub grain: u64,
    pub descriptor: u64,
    pub descriptor_length: u64,
    pub table_entries: u64,
    pub directory: u64,
    pub redundant: Option<u64>,
    pub overhead: u64,
    pub compressed: bool,
    pub zero_grains: bool,
}

impl Header {
    /// Reads the header of an extent, or the one at its end that replaces it.
    pub(super) fn read(store: &dyn Store) -> Result<Self, DiskError> {
        let mut bytes = vec![0; HEADER];
        store.read_or_zero_at(0, &mut bytes)?;
        if le64(&bytes, field::DIRECTORY) == AT_END {
            // The end is a marker, the header, and another marker, a sector each.
            let mut end = vec![0; 3 * HEADER];
            let size = store.size()?;
            let at = size.checked_sub(end.len() as u64).unwrap_or(size);
            store.read_or_zero_at(at, &mut end)?;
            let footer = end.get(HEADER..2 * HEADER).unwrap_or_default();
            let same = [field::CAPACITY..field::TABLE_ENTRIES, 0..field::FLAGS];
            if le32(&end, 12) != super::stream::FOOTER_MARKER
                || same.iter().any(|part| footer.get(part.clone()) != bytes.get(part.clone()))
            {
                let what = "its end is missing, where its grain directory is".to_owned();
                return Err(store.damaged(what));
            }
            bytes = footer.to_vec();
        }
        Self::parse(&bytes, store)
    }

    fn parse(bytes: &[u8], store: &dyn Store) -> Result<Self, DiskError> {
        if array(bytes, 0) != *MAGIC {
            return Err(DiskError::NotThisFormat { file: store.name(), format: "VMDK" });
        }
        let version = le32(bytes, field::VERSION);
        if !(1..=3).contains(&version) {
            return Err(store.unsupported(format!("version {version} of sparse extents")));
        }
        let flags = le32(bytes, field::FLAGS);
        let line_ends: [u8; 4] = array(bytes, field::LINE_ENDS);
        if flags & HAS_LINE_ENDS != 0 && line_ends != LINE_ENDS {
            let what = "its line ends were converted when it was transferred as text".to_owned();
            return Err(store.damaged(what));
        }
        let compressed = flags & IS_COMPRESSED != 0;
        if compressed && flags & HAS_MARKERS == 0 {
            return Err(store.unsupported("compressed grains without markers".to_owned()));
        }
        let compression = le16(bytes, field::COMPRESSION);
        if compressed && compression != DEFLATE {
            return Err(store.unsupported(format!("the compression algorithm {compression}")));
        }
        let sectors = |at| le64(bytes, at).checked_mul(SECTOR);
        let has_redundant = flags & HAS_REDUNDANT != 0 && !compressed;
        let places = || {
            Some(Self {
                version,
                size: sectors(field::CAPACITY)?,
                grain: sectors(field::GRAIN)?,
                descriptor: sectors(field::DESCRIPTOR)?,
                descriptor_length: sectors(field::DESCRIPTOR_LENGTH)?,
                table_entries: le32(bytes, field::TABLE_ENTRIES).into(),
                directory: sectors(field::DIRECTORY)?,
                redundant: if has_redundant { Some(sectors(field::REDUNDANT)?) } else { None },
                overhead: sectors(field::OVERHEAD)?,
                compressed,
                zero_grains: flags & HAS_ZERO_GRAINS != 0,
            })
        };
        let out_of_range = || store.damaged("numbers of its header are out of range".to_owned());
        let header = places().ok_or_else(out_of_range)?;
        header.check(store)?;
        Ok(header)
    }

    fn check(&self, store: &dyn Store) -> Result<(), DiskError> {
        let grain = self.grain / SECTOR;
        if !grain.is_power_of_two() || !GRAINS.contains(&grain) {
            return Err(store.damaged(format!("its grains have {} bytes", self.grain)));
        }
        if self.table_entries == 0 || self.table_entries > TABLE_ENTRIES {
            let what = format!("its grain tables have {} entries", self.table_entries);
            return Err(store.damaged(what));
        }
        let tables = self.tables();
        if tables > MAX_DIRECTORY {
            return Err(store.unsupported(format!("a grain directory of {tables} entries")));
        }
        let file = store.size()?;
        for directory in [Some(self.directory), self.redundant].into_iter().flatten() {
            let end = directory.checked_add(tables * 4);
            if directory < SECTOR || end.is_none_or(|end| end > file) {
                let what = format!("a grain directory of it lies at {directory} of {file} bytes");
                return Err(store.damaged(what));
            }
        }
        Ok(())
    }

    /// Bytes of the disk for which a grain table stands.
    pub(super) fn table_covers(&self) -> u64 {
        self.table_entries * self.grain
    }

    /// How many grain tables there are.
    pub(super) fn tables(&self) -> u64 {
        self.size.div_ceil(self.table_covers())
    }

    /// The bytes of a header whose grain directory is at the end, or, with `directory`, of the one
    /// there.
    pub(super) fn stream_bytes(sectors: u64, directory: u64) -> Vec<u8> {
        let flags = HAS_LINE_ENDS | IS_COMPRESSED | HAS_MARKERS;
        let mut bytes = new_bytes(3, flags, sectors, directory, GRAIN);
        put(&mut bytes, field::COMPRESSION, &DEFLATE.to_le_bytes());
        bytes
    }

    /// The bytes of a header of an image that can be written to; places in sectors.
    pub(super) fn sparse_bytes(
        sectors: u64,
        directory: u64,
        redundant: u64,
        overhead: u64,
    ) -> Vec<u8> {
        let flags = HAS_LINE_ENDS | HAS_REDUNDANT;
        let mut bytes = new_bytes(1, flags, sectors, directory, overhead);
        put(&mut bytes, field::REDUNDANT, &redundant.to_le_bytes());
        bytes
    }
}

fn new_bytes(version: u32, flags: u32, sectors: u64, directory: u64, overhead: u64) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    let table_entries = u32::try_from(TABLE_ENTRIES).unwrap_or_default();
    put(&mut bytes, 0, MAGIC);
    put(&mut bytes, field::VERSION, &version.to_le_bytes());
    put(&mut bytes, field::FLAGS, &flags.to_le_bytes());
    put(&mut bytes, field::CAPACITY, &sectors.to_le_bytes());
    put(&mut bytes, field::GRAIN, &GRAIN.to_le_bytes());
    put(&mut bytes, field::DESCRIPTOR, &DESCRIPTOR.to_le_bytes());
    put(&mut bytes, field::DESCRIPTOR_LENGTH, &DESCRIPTOR_LENGTH.to_le_bytes());
    put(&mut bytes, field::TABLE_ENTRIES, &table_entries.to_le_bytes());
    put(&mut bytes, field::DIRECTORY, &directory.to_le_bytes());
    put(&mut bytes, field::OVERHEAD, &overhead.to_le_bytes());
    put(&mut bytes, field::LINE_ENDS, &LINE_ENDS);
    bytes
}
