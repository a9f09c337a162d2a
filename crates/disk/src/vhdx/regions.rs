//! Where the parts of a VHDX image are (its region table, [MS-VHDX] 2.2.3), and what its metadata
//! say about the disk (2.6).
use super::header::MIB;
use super::parts::{Guid, checksum, guid, seal};
use crate::bytes::{array, le16, le32, le64, put};
use crate::create::random_id;
use crate::store::{Complain, Store};
use crate::{DiskError, SECTOR};
use std::ops::Range;

/// Bytes of a region table, and of the table of metadata.
const TABLE: usize = 64 << 10;
/// Where the two copies of the region table are.
const PLACES: [u64; 2] = [192 << 10, 256 << 10];
/// Entries that a table can have.
const MAX_ENTRIES: u32 = 2047;
const ENTRY: usize = 32;
const BLOCK_TABLE: Guid = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA: Guid = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);

const FILE_PARAMETERS: Guid = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const DISK_SIZE: Guid = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const DISK_ID: Guid = guid(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);
const LOGICAL_SECTOR: Guid = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: Guid = guid(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);
const PARENT_LOCATOR: Guid = guid(0xa8d3_5f2d, 0xb30b, 0x454d, 0xabf7_d3d8_4834_ab0c);

/// Bytes of the largest disk.
pub(super) const MAX_SIZE: u64 = 64 << 40;
/// Block sizes that the format has.
pub(super) const BLOCK_SIZES: std::ops::RangeInclusive<u64> = MIB..=256 * MIB;
/// The physical sector size of new images, in bytes.
const NEW_PHYSICAL_SECTOR: u32 = 4096;
/// Sectors for which one block holds a bitmap ([MS-VHDX] 2.4).
const SECTORS_PER_BITMAP: u64 = 1 << 23;

/// The parts of an image's file.
#[derive(Clone, Debug, Default)]
pub(super) struct Regions {
    pub block_table: Range<u64>,
    pub metadata: Range<u64>,
    /// Parts that are not known and not required.
    pub others: Vec<Range<u64>>,
}

impl Regions {
    pub(super) fn read(store: &dyn Store) -> Result<Self, DiskError> {
        for place in PLACES {
            let mut bytes = vec![0; TABLE];
            store.read_or_zero_at(place, &mut bytes)?;
            if array(&bytes, 0) == *b"regi" && le32(&bytes, 4) == checksum(&bytes) {
                return Self::parse(&bytes, store);
            }
        }
        Err(store.damaged("both its region tables are damaged".to_owned()))
    }

    fn parse(bytes: &[u8], store: &dyn Store) -> Result<Self, DiskError> {
        let size = store.size()?;
        let (mut regions, mut block_table, mut metadata) = (Self::default(), None, None);
        for entry in entries(bytes, 16, le32(bytes, 8), store)? {
            let (offset, length) = (le64(entry, 16), u64::from(le32(entry, 24)));
            let aligned = offset.is_multiple_of(MIB) && length.is_multiple_of(MIB);
            let end = offset.checked_add(length).filter(|_| aligned && offset >= MIB && length > 0);
            let Some(end) = end.filter(|end| *end <= size) else {
                let what = format!("a region of {length} bytes lies at {offset}");
                return Err(store.damaged(what));
            };
            match array(entry, 0) {
                BLOCK_TABLE => block_table = Some(offset..end),
                METADATA => metadata = Some(offset..end),
                id if le32(entry, 28) & 1 != 0 => {
                    return Err(store.unsupported(format!("the region {id:02x?} of VHDX")));
                }
                _ => regions.others.push(offset..end),
            }
        }
        let missing = || store.damaged("its block table or its metadata are missing".to_owned());
        regions.block_table = block_table.ok_or_else(missing)?;
        regions.metadata = metadata.ok_or_else(missing)?;
        Ok(regions)
    }

    /// Writes both copies of a new image's table.
    pub(super) fn write(&self, store: &dyn Store) -> Result<(), DiskError> {
        let mut bytes = vec![0; TABLE];
        put(&mut bytes, 0, b"regi");
        put(&mut bytes, 8, &2_u32.to_le_bytes());
        let parts = [(BLOCK_TABLE, &self.block_table), (METADATA, &self.metadata)];
        for (index, (id, place)) in parts.into_iter().enumerate() {
            let at = 16 + index * ENTRY;
            let length = u32::try_from(place.end - place.start).unwrap_or(u32::MAX);
            put(&mut bytes, at, &id);
            put(&mut bytes, at + 16, &place.start.to_le_bytes());
            put(&mut bytes, at + 24, &length.to_le_bytes());
            put(&mut bytes, at + 28, &1_u32.to_le_bytes());
        }
        seal(&mut bytes);
        PLACES.iter().try_for_each(|place| store.write_at(*place, &bytes))
    }
}

/// The entries of a table that begin at `start`.
fn entries<'a>(
    bytes: &'a [u8],
    start: usize,
    count: u32,
    store: &dyn Store,
) -> Result<impl Iterator<Item = &'a [u8]>, DiskError> {
    if count > MAX_ENTRIES {
        return Err(store.damaged(format!("a table of it has {count} entries")));
    }
    let entries = bytes.get(start..).unwrap_or_default().chunks_exact(ENTRY);
    Ok(entries.take(usize::try_from(count).unwrap_or_default()))
}

/// What the metadata say.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    pub disk_size: u64,
    pub block_size: u64,
    /// All blocks keep their place for good.
    pub fixed: bool,
}

/// Reads an item of metadata of at most 16 bytes.
fn read_item(
    store: &dyn Store,
    region: &Range<u64>,
    entry: &[u8],
    length: usize,
) -> Result<[u8; 16], DiskError> {
    let (offset, stated) = (u64::from(le32(entry, 16)), u64::from(le32(entry, 20)));
    let place = region.start.saturating_add(offset);
    let end = place.saturating_add(stated);
    if offset < TABLE as u64 || stated < length as u64 || end > region.end {
        return Err(store.damaged(format!("a part of its metadata lies at {place}")));
    }
    let mut value = [0; 16];
    store.read_at(place, value.get_mut(..length).unwrap_or_default())?;
    Ok(value)
}

impl Metadata {
    pub(super) fn read(store: &dyn Store, region: &Range<u64>) -> Result<Self, DiskError> {
        let mut bytes = vec![0; TABLE];
        store.read_at(region.start, &mut bytes)?;
        if array(&bytes, 0) != *b"metadata" {
            return Err(store.damaged(format!("there are no metadata at {}", region.start)));
        }
        let (mut parameters, mut size, mut sector) = (None, None, None);
        for entry in entries(&bytes, 32, le16(&bytes, 10).into(), store)? {
            match array(entry, 0) {
                FILE_PARAMETERS => parameters = Some(read_item(store, region, entry, 8)?),
                DISK_SIZE => size = Some(le64(&read_item(store, region, entry, 8)?, 0)),
                LOGICAL_SECTOR => sector = Some(le32(&read_item(store, region, entry, 4)?, 0)),
                DISK_ID | PHYSICAL_SECTOR | PARENT_LOCATOR => {}
                id if le32(entry, 24) & 4 != 0 => {
                    return Err(store.unsupported(format!("the metadata {id:02x?} of VHDX")));
                }
                _ => {}
            }
        }
        let (Some(parameters), Some(disk_size), Some(sector)) = (parameters, size, sector) else {
            return Err(store.damaged("its metadata lack the disk's measures".to_owned()));
        };
        let (block_size, flags) = (u64::from(le32(&parameters, 0)), le32(&parameters, 4));
        if flags & 2 != 0 {
            let feature = "a differencing image of VHDX, which needs a parent".to_owned();
            return Err(store.unsupported(feature));
        }
        if sector == 4096 {
            return Err(store.unsupported("logical sectors of 4096 bytes".to_owned()));
        }
        if u64::from(sector) != SECTOR
            || !block_size.is_power_of_two()
            || !BLOCK_SIZES.contains(&block_size)
            || disk_size > MAX_SIZE
            || !disk_size.is_multiple_of(SECTOR)
        {
            let what = format!("{disk_size} bytes in blocks of {block_size}, sectors of {sector}");
            return Err(store.damaged(what));
        }
        Ok(Self { disk_size, block_size, fixed: flags & 1 != 0 })
    }

    /// Writes the metadata of a new image.
    pub(super) fn write(&self, store: &dyn Store, region: &Range<u64>) -> Result<(), DiskError> {
        let block_size = u32::try_from(self.block_size).unwrap_or(u32::MAX);
        let parameters = [block_size.to_le_bytes(), u32::from(self.fixed).to_le_bytes()].concat();
        let sector = u32::try_from(SECTOR).unwrap_or_default();
        // The flags: 4 is required, 2 says that it is about the disk, not the file.
        let items: [(Guid, u32, Vec<u8>); 5] = [
            (FILE_PARAMETERS, 4, parameters),
            (DISK_SIZE, 6, self.disk_size.to_le_bytes().to_vec()),
            (DISK_ID, 6, random_id()?.to_vec()),
            (LOGICAL_SECTOR, 6, sector.to_le_bytes().to_vec()),
            (PHYSICAL_SECTOR, 6, NEW_PHYSICAL_SECTOR.to_le_bytes().to_vec()),
        ];
        let mut bytes = vec![0; TABLE + 4096];
        put(&mut bytes, 0, b"metadata");
        put(&mut bytes, 10, &5_u16.to_le_bytes());
        let mut value_at = TABLE;
        for (index, (id, flags, value)) in items.iter().enumerate() {
            let at = 32 + index * ENTRY;
            let low = |value: usize| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
            put(&mut bytes, at, id);
            put(&mut bytes, at + 16, &low(value_at));
            put(&mut bytes, at + 20, &low(value.len()));
            put(&mut bytes, at + 24, &flags.to_le_bytes());
            put(&mut bytes, value_at, value);
            value_at += value.len();
        }
        store.write_at(region.start, &bytes)
    }

    /// Blocks of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.disk_size.div_ceil(self.block_size)
    }

    /// After how many blocks' entries comes one of a block of bitmaps.
    fn chunk(&self) -> u64 {
        SECTORS_PER_BITMAP * SECTOR / self.block_size
    }

    /// The place of a block's entry in the block table.
    pub(super) fn entry(&self, block: u64) -> u64 {
        block + block / self.chunk()
    }

    /// Entries that the block table has.
    pub(super) fn entries(&self) -> u64 {
        self.blocks().checked_sub(1).map_or(0, |last| self.entry(last) + 1)
    }
}
