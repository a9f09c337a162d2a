//! The footer of a VHD image, and the header that dynamic images have besides.
//!
//! "Virtual Hard Disk Image Format Specification" 1.0 (Microsoft, 2006), sections "Hard Disk
//! Footer Format", "Dynamic Disk Header Format" and "CHS Calculation". All numbers are big-endian.
use crate::bytes::{array, be16, be32, be64, put};
use crate::create::random_id;
use crate::store::{Complain, Store};
use crate::{DiskError, SECTOR};
use std::time::{Duration, SystemTime};

/// Bytes of a footer.
pub(super) const FOOTER: u64 = 512;
/// Bytes of the header of a dynamic image.
pub(super) const DYNAMIC_HEADER: u64 = 1024;
/// Sectors of the largest disk, 2040 GiB.
pub(super) const MAX_SECTORS: u64 = 0xff00_0000;
/// Sectors of a disk whose geometry is the largest that there is: its size is told otherwise.
const MAX_GEOMETRY: u64 = 65535 * 16 * 255;
/// Block sizes that are accepted.
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = 64 << 10..=256 << 20;
/// The block size of new images, which some programs take for granted.
pub(super) const BLOCK_SIZE: u64 = 2 << 20;
/// Where a new dynamic image has its header.
pub(super) const NEW_HEADER: u64 = FOOTER;
/// Where a new dynamic image has its table.
pub(super) const NEW_TABLE: u64 = NEW_HEADER + DYNAMIC_HEADER;

const COOKIE: &[u8; 8] = b"conectix";
const DYNAMIC_COOKIE: &[u8; 8] = b"cxsparse";
const VERSION: u32 = 0x0001_0000;
/// Seconds from 1970 to 2000, from when on the format counts.
const EPOCH: u64 = 946_684_800;
/// Programs that write the disk's exact size into the footer. All others, Virtual PC first of
/// them, round the disk to its geometry. This is how QEMU tells them apart.
const EXACT: [&[u8; 4]; 5] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"];

mod field {
    pub(super) const FEATURES: usize = 8;
    pub(super) const VERSION: usize = 12;
    pub(super) const DATA_OFFSET: usize = 16;
    pub(super) const TIME: usize = 24;
    pub(super) const CREATOR: usize = 28;
    pub(super) const CREATOR_VERSION: usize = 32;
    pub(super) const CREATOR_HOST: usize = 36;
    pub(super) const ORIGINAL_SIZE: usize = 40;
    pub(super) const CURRENT_SIZE: usize = 48;
    pub(super) const CYLINDERS: usize = 56;
    pub(super) const HEADS: usize = 58;
    pub(super) const SECTORS: usize = 59;
    pub(super) const KIND: usize = 60;
    pub(super) const CHECKSUM: usize = 64;
    pub(super) const ID: usize = 68;
}

mod dynamic_field {
    pub(super) const DATA_OFFSET: usize = 8;
    pub(super) const TABLE: usize = 16;
    pub(super) const VERSION: usize = 24;
    pub(super) const ENTRIES: usize = 28;
    pub(super) const BLOCK_SIZE: usize = 32;
    pub(super) const CHECKSUM: usize = 36;
}

/// How an image takes up space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The disk as it is, with a footer behind it.
    Fixed,
    /// Blocks are added when they are first written to.
    Dynamic,
}

/// What a footer says.
#[derive(Clone, Debug)]
pub(super) struct Footer {
    pub bytes: Vec<u8>,
    pub variant: Variant,
    pub disk_size: u64,
    /// Where the header of a dynamic image is.
    pub header: u64,
}

/// The ones' complement of the sum of all bytes but the checksum's own.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let counted = bytes.iter().enumerate().filter(|(index, _)| !(at..at + 4).contains(index));
    !counted.fold(0_u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

impl Footer {
    /// Whether the bytes are a footer that was not damaged.
    pub(super) fn is_sound(bytes: &[u8]) -> bool {
        array(bytes, 0) == *COOKIE
            && be32(bytes, field::CHECKSUM) == checksum(bytes, field::CHECKSUM)
    }

    /// Whether the bytes were meant to be a footer.
    pub(super) fn has_cookie(bytes: &[u8]) -> bool {
        array(bytes, 0) == *COOKIE
    }

    /// Reads a footer that is sound.
    pub(super) fn parse(bytes: Vec<u8>, store: &dyn Store) -> Result<Self, DiskError> {
        let version = be32(&bytes, field::VERSION);
        if version >> 16 != VERSION >> 16 {
            let (major, minor) = (version >> 16, version & 0xffff);
            return Err(store.unsupported(format!("version {major}.{minor} of VHD")));
        }
        let variant = match be32(&bytes, field::KIND) {
            2 => Variant::Fixed,
            3 => Variant::Dynamic,
            4 => {
                let feature = "a differencing image of VHD, which needs a parent".into();
                return Err(store.unsupported(feature));
            }
            kind => return Err(store.damaged(format!("its kind of image is {kind}"))),
        };
        let geometry = u64::from(be16(&bytes, field::CYLINDERS))
            * u64::from(array::<1>(&bytes, field::HEADS)[0])
            * u64::from(array::<1>(&bytes, field::SECTORS)[0]);
        let creator = array(&bytes, field::CREATOR);
        let exact = geometry == MAX_GEOMETRY || EXACT.iter().any(|known| **known == creator);
        let sectors = if exact { be64(&bytes, field::CURRENT_SIZE) / SECTOR } else { geometry };
        if sectors > MAX_SECTORS {
            return Err(store.damaged(format!("its disk has {sectors} sectors")));
        }
        let header = be64(&bytes, field::DATA_OFFSET);
        Ok(Self { variant, disk_size: sectors * SECTOR, header, bytes })
    }

    /// The footer of a new image.
    pub(super) fn new(size: u64, variant: Variant) -> Result<Self, DiskError> {
        let mut bytes = vec![0; FOOTER as usize];
        let (kind, header) = match variant {
            Variant::Fixed => (2_u32, u64::MAX),
            Variant::Dynamic => (3, NEW_HEADER),
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let time = now.saturating_sub(Duration::from_secs(EPOCH)).as_secs();
        let (cylinders, heads, sectors) = geometry(size / SECTOR);
        put(&mut bytes, 0, COOKIE);
        put(&mut bytes, field::FEATURES, &2_u32.to_be_bytes());
        put(&mut bytes, field::VERSION, &VERSION.to_be_bytes());
        put(&mut bytes, field::DATA_OFFSET, &header.to_be_bytes());
        put(&mut bytes, field::TIME, &u32::try_from(time).unwrap_or(u32::MAX).to_be_bytes());
        // What Hyper-V writes, by which all programs know to take the size as it is.
        put(&mut bytes, field::CREATOR, b"win ");
        put(&mut bytes, field::CREATOR_VERSION, &0x000a_0000_u32.to_be_bytes());
        put(&mut bytes, field::CREATOR_HOST, b"Wi2k");
        put(&mut bytes, field::ORIGINAL_SIZE, &size.to_be_bytes());
        put(&mut bytes, field::CURRENT_SIZE, &size.to_be_bytes());
        put(&mut bytes, field::CYLINDERS, &cylinders.to_be_bytes());
        put(&mut bytes, field::HEADS, &[heads]);
        put(&mut bytes, field::SECTORS, &[sectors]);
        put(&mut bytes, field::KIND, &kind.to_be_bytes());
        put(&mut bytes, field::ID, &random_id()?);
        let sum = checksum(&bytes, field::CHECKSUM);
        put(&mut bytes, field::CHECKSUM, &sum.to_be_bytes());
        Ok(Self { bytes, variant, disk_size: size, header })
    }
}

/// Cylinders, heads and sectors of a disk, as the specification calculates them. The disk may be
/// a little larger than what they reach.
fn geometry(sectors: u64) -> (u16, u8, u8) {
    let total = sectors.min(MAX_GEOMETRY);
    let (tracks, heads, per_track) = if total >= 65535 * 16 * 63 {
        (total / 255, 16, 255)
    } else {
        let heads = (total / 17).div_ceil(1024).max(4);
        if heads <= 16 && total / 17 < heads * 1024 {
            (total / 17, heads, 17)
        } else if total / 31 < 16 * 1024 {
            (total / 31, 16, 31)
        } else {
            (total / 63, 16, 63)
        }
    };
    let cylinders = u16::try_from(tracks / heads).unwrap_or(u16::MAX);
    (cylinders, u8::try_from(heads).unwrap_or(u8::MAX), per_track)
}

/// What the header of a dynamic image says, checked.
#[derive(Clone, Debug)]
pub(super) struct DynamicHeader {
    pub offset: u64,
    pub table: u64,
    /// Entries of the table that the disk needs.
    pub blocks: u64,
    pub table_end: u64,
    pub block_size: u64,
}

impl DynamicHeader {
    pub(super) fn read(store: &dyn Store, footer: &Footer) -> Result<Self, DiskError> {
        let size = store.size()?;
        let offset = footer.header;
        if offset.checked_add(DYNAMIC_HEADER).is_none_or(|end| end > size) {
            return Err(store.damaged(format!("its header lies at {offset} of {size} bytes")));
        }
        let mut bytes = vec![0; DYNAMIC_HEADER as usize];
        store.read_at(offset, &mut bytes)?;
        if array(&bytes, 0) != *DYNAMIC_COOKIE {
            return Err(store.damaged(format!("there is no header at {offset}")));
        }
        if be32(&bytes, dynamic_field::CHECKSUM) != checksum(&bytes, dynamic_field::CHECKSUM) {
            return Err(store.damaged(format!("the checksum of the header at {offset} is wrong")));
        }
        let table = be64(&bytes, dynamic_field::TABLE);
        let entries = u64::from(be32(&bytes, dynamic_field::ENTRIES));
        let block_size = u64::from(be32(&bytes, dynamic_field::BLOCK_SIZE));
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            return Err(store.damaged(format!("its block size is {block_size}")));
        }
        let blocks = footer.disk_size.div_ceil(block_size);
        if blocks > entries {
            let what = format!("its table has {entries} entries, and its disk {blocks} blocks");
            return Err(store.damaged(what));
        }
        match table.checked_add(entries * 4).filter(|end| *end <= size) {
            Some(end) => {
                let table_end = end.next_multiple_of(SECTOR);
                Ok(Self { offset, table, blocks, table_end, block_size })
            }
            None => Err(store.damaged(format!("its table lies at {table} of {size} bytes"))),
        }
    }

    /// The bytes of a new image's header.
    pub(super) fn new_bytes(blocks: u64) -> Vec<u8> {
        let mut bytes = vec![0; DYNAMIC_HEADER as usize];
        let low = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();
        put(&mut bytes, 0, DYNAMIC_COOKIE);
        put(&mut bytes, dynamic_field::DATA_OFFSET, &u64::MAX.to_be_bytes());
        put(&mut bytes, dynamic_field::TABLE, &NEW_TABLE.to_be_bytes());
        put(&mut bytes, dynamic_field::VERSION, &VERSION.to_be_bytes());
        put(&mut bytes, dynamic_field::ENTRIES, &low(blocks));
        put(&mut bytes, dynamic_field::BLOCK_SIZE, &low(BLOCK_SIZE));
        let sum = checksum(&bytes, dynamic_field::CHECKSUM);
        put(&mut bytes, dynamic_field::CHECKSUM, &sum.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_are_those_of_the_specification() {
        // 10 MiB, 1 GiB, 8 GiB, 127 GiB, 2040 GiB.
        assert_eq!(geometry(20_480), (301, 4, 17));
        assert_eq!(geometry(2_097_152), (2080, 16, 63));
        assert_eq!(geometry(16_777_216), (16_644, 16, 63));
        assert_eq!(geometry(266_338_304), (65_278, 16, 255));
        assert_eq!(geometry(MAX_SECTORS), (65_535, 16, 255));
    }
}
