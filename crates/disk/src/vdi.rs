//! VDI, VirtualBox's format: a header, a map with one entry for each block of (usually) 1 MiB, and
//! the blocks.
//!
//! There is no specification; the fields are those of VirtualBox's `VDICore.h`. Dynamic images
//! gain a block when it is first written to, static ones have all of them from the start;
//! differencing and undo images, which need a parent, are refused.
//!
//! The header holds the number of blocks in use, which has to fit the map. There is no log that
//! would change both at once; `Vdi::write_back` writes the header together with the map's first
//! page, and opening an image to write corrects a number that was left behind by a crash between
//! it and the other pages.
use crate::blocks::{Blocks, disk_of_blocks, flush_when_closed};
use crate::bytes::{array, le32, le64, put};
use crate::create::{check_size, new_file, random_id};
use crate::store::{Complain, Store};
use crate::table::{Changed, Le32, PAGE, Table, lock};
use crate::{DiskError, FileOptions, SECTOR};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const SIGNATURE: u32 = 0xbeda_107f;
/// The version that all of today's programs write, 1.1.
const VERSION: u32 = 0x0001_0001;
/// Bytes of the header with the text and signature before it.
const HEADER: u64 = 512;
/// The size of the header's body that belongs to version 1.1 without its latest field.
const HEADER_BODY: u32 = 0x180;
/// Map entries from here on say that a block is not in the file: "zero" and "free".
const FIRST_ABSENT: u32 = 0xffff_fffe;
const FREE: u32 = 0xffff_ffff;
/// Blocks that an image can have, as VirtualBox and QEMU limit it.
const MAX_BLOCKS: u64 = 0x2000_0000;
/// Block sizes that are accepted.
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = 4096..=256 << 20;
/// The block size of new images; QEMU reads no other.
const BLOCK_SIZE: u64 = 1 << 20;
/// Bytes of the largest disk in a new image.
const MAX_SIZE: u64 = MAX_BLOCKS * BLOCK_SIZE;

/// Where the fields are.
mod field {
    pub(super) const SIGNATURE: usize = 0x40;
    pub(super) const VERSION: usize = 0x44;
    pub(super) const HEADER_BODY: usize = 0x48;
    pub(super) const KIND: usize = 0x4c;
    pub(super) const MAP: usize = 0x154;
    pub(super) const DATA: usize = 0x158;
    pub(super) const SECTOR_SIZE: usize = 0x168;
    pub(super) const DISK_SIZE: usize = 0x170;
    pub(super) const BLOCK_SIZE: usize = 0x178;
    pub(super) const BLOCK_EXTRA: usize = 0x17c;
    pub(super) const BLOCKS: usize = 0x180;
    pub(super) const IN_USE: usize = 0x184;
    pub(super) const IMAGE_ID: usize = 0x188;
    pub(super) const MODIFICATION_ID: usize = 0x198;
    pub(super) const LINK_ID: usize = 0x1a8;
    pub(super) const PARENT_ID: usize = 0x1b8;
}

/// How an image takes up space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Blocks are added when they are first written to.
    Dynamic,
    /// All blocks have their place from the start.
    Static,
}

/// What a header says, checked.
#[derive(Clone, Debug)]
struct Header {
    variant: Variant,
    map: u64,
    data: u64,
    disk_size: u64,
    block_size: u64,
    blocks: u64,
    in_use: u64,
}

impl Header {
    fn parse(bytes: &[u8], store: &dyn Store) -> Result<Self, DiskError> {
        if le32(bytes, field::SIGNATURE) != SIGNATURE {
            return Err(DiskError::NotThisFormat { file: store.name(), format: "VDI" });
        }
        let version = le32(bytes, field::VERSION);
        if version != VERSION {
            let (major, minor) = (version >> 16, version & 0xffff);
            return Err(store.unsupported(format!("version {major}.{minor} of VDI")));
        }
        let variant = match le32(bytes, field::KIND) {
            1 => Variant::Dynamic,
            2 => Variant::Static,
            3 => return Err(store.unsupported("an undo image of VDI, which needs a parent".into())),
            4 => {
                let feature = "a differencing image of VDI, which needs a parent".into();
                return Err(store.unsupported(feature));
            }
            kind => return Err(store.damaged(format!("its kind of image is {kind}"))),
        };
        let parents = [field::LINK_ID, field::PARENT_ID];
        if parents.iter().any(|at| array::<16>(bytes, *at) != [0; 16]) {
            return Err(store.unsupported("a VDI image's link to a parent".into()));
        }
        let header = Self {
            variant,
            map: le32(bytes, field::MAP).into(),
            data: le32(bytes, field::DATA).into(),
            disk_size: le64(bytes, field::DISK_SIZE),
            block_size: le32(bytes, field::BLOCK_SIZE).into(),
            blocks: le32(bytes, field::BLOCKS).into(),
            in_use: le32(bytes, field::IN_USE).into(),
        };
        if u64::from(le32(bytes, field::SECTOR_SIZE)) != SECTOR {
            return Err(store.unsupported("sectors of another size than 512 bytes".into()));
        }
        if le32(bytes, field::BLOCK_EXTRA) != 0 {
            return Err(store.unsupported("extra data in front of blocks of a VDI image".into()));
        }
        header.check(store)?;
        Ok(header)
    }

    fn check(&self, store: &dyn Store) -> Result<(), DiskError> {
        let size = store.size()?;
        let map_end = self.map.saturating_add(self.blocks * 4);
        let problem =
            if !self.block_size.is_power_of_two() || !BLOCK_SIZES.contains(&self.block_size) {
                format!("its block size is {}", self.block_size)
            } else if self.blocks > MAX_BLOCKS || self.disk_size > self.blocks * self.block_size {
                let Self { disk_size, blocks, .. } = self;
                format!("its {blocks} blocks do not fit a disk of {disk_size} bytes")
            } else if self.map < HEADER || map_end > size {
                format!("its map lies at {}..{map_end} of {size} bytes", self.map)
            } else if self.data < map_end || !self.data.is_multiple_of(SECTOR) {
                format!("its data begins at {}, and its map ends at {map_end}", self.data)
            } else {
                return Ok(());
            };
        Err(store.damaged(problem))
    }

    /// Where a block in use is in the file.
    fn place(&self, index: u64) -> u64 {
        self.data + index * self.block_size
    }
}

/// What is in use.
#[derive(Debug, Default)]
struct Allocation {
    /// Entries of the map that lead to a block.
    in_use: u64,
    /// The place after the last one in use.
    end: u64,
    /// Places before it that are not in use. Other programs leave none; where there are any, they
    /// have to be filled first, as no entry may be greater than the number of blocks.
    gaps: Vec<u64>,
    /// Whether the file is known to end where the blocks do, or before.
    trimmed: bool,
}

/// An open VDI image.
pub struct Vdi {
    store: Box<dyn Store>,
    header: Header,
    header_bytes: Vec<u8>,
    map: Table<Le32>,
    allocation: Mutex<Allocation>,
    /// Held while the map is written, so that no older copy of a page follows a newer one.
    writing_back: Mutex<()>,
    /// Where the last block ends that can be read.
    end: AtomicU64,
}

impl Vdi {
    /// Opens an image.
    ///
    /// # Errors
    /// [`DiskError::NotThisFormat`], [`DiskError::Unsupported`] for images with a parent,
    /// [`DiskError::Damaged`], or the host cannot read.
    pub fn open(store: impl Store + 'static) -> Result<Self, DiskError> {
        let mut header_bytes = vec![0; HEADER as usize];
        store.read_or_zero_at(0, &mut header_bytes)?;
        let header = Header::parse(&header_bytes, &store)?;
        let image = Self {
            map: Table::new(header.map, header.blocks),
            end: AtomicU64::new(store.size()?),
            allocation: Mutex::default(),
            writing_back: Mutex::default(),
            header,
            header_bytes,
            store: Box::new(store),
        };
        if !image.store.read_only() {
            let allocation = image.survey()?;
            if allocation.in_use != image.header.in_use {
                image.write_header(allocation.in_use, &[])?;
            }
            *lock(&image.allocation) = allocation;
        }
        Ok(image)
    }

    /// Makes a new image of `size` bytes, which reads as zeroes, and opens it to write.
    ///
    /// # Errors
    /// [`DiskError::Invalid`] for a size that the format does not have or a file that exists, or
    /// the host cannot write.
    pub fn create(
        path: &Path,
        size: u64,
        variant: Variant,
        options: FileOptions,
    ) -> Result<Self, DiskError> {
        new_file(path, options, |file| Self::create_in(file, size, variant))
    }

    /// Makes a new image of an empty store, as [`Vdi::create`] does of a file.
    ///
    /// # Errors
    /// As [`Vdi::create`].
    pub fn create_in(
        store: impl Store + 'static,
        size: u64,
        variant: Variant,
    ) -> Result<Self, DiskError> {
        check_size(&store.name(), size, MAX_SIZE)?;
        lay_out(&store, size, variant)?;
        Self::open(store)
    }

    /// How the image takes up space.
    #[must_use]
    pub fn variant(&self) -> Variant {
        self.header.variant
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.header.block_size
    }

    fn disk_size(&self) -> u64 {
        self.header.disk_size
    }

    /// Looks at the whole map.
    fn survey(&self) -> Result<Allocation, DiskError> {
        let mut allocation = Allocation::default();
        let blocks = self.header.blocks;
        let mut used = vec![0_u64; usize::try_from(blocks.div_ceil(64)).unwrap_or_default()];
        self.map.scan(&*self.store, |block, index| {
            if index >= FIRST_ABSENT.into() {
                return Ok(());
            }
            let word = usize::try_from(index / 64).ok().and_then(|word| used.get_mut(word));
            let Some(word) = word.filter(|_| index < blocks) else {
                return Err(self.out_of_range(block, index));
            };
            if *word & 1 << (index % 64) != 0 {
                let what = format!("two blocks of its map lead to place {index}, one is {block}");
                return Err(self.store.damaged(what));
            }
            *word |= 1 << (index % 64);
            allocation.in_use += 1;
            allocation.end = allocation.end.max(index + 1);
            Ok(())
        })?;
        if allocation.end > allocation.in_use {
            let free = |index: &u64| {
                let word = usize::try_from(index / 64).ok().and_then(|word| used.get(word));
                word.is_some_and(|word| word & 1 << (index % 64) == 0)
            };
            allocation.gaps = (0..allocation.end).rev().filter(free).collect();
        }
        Ok(allocation)
    }

    fn out_of_range(&self, block: u64, index: u64) -> DiskError {
        self.store.damaged(format!("block {block} is said to be at place {index}, which is none"))
    }

    /// Writes the header, and what follows it up to the end of `first_page` if that is given, in
    /// one go.
    fn write_header(&self, in_use: u64, first_page: &[u8]) -> Result<(), DiskError> {
        let mut bytes = self.header_bytes.clone();
        put(&mut bytes, field::IN_USE, &u32::try_from(in_use).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(first_page);
        self.store.write_at(0, &bytes)
    }

    /// Writes what refers to blocks, after the blocks.
    fn write_back(&self) -> Result<(), DiskError> {
        let _one = lock(&self.writing_back);
        let (pages, in_use, end) = {
            let allocation = lock(&self.allocation);
            (self.map.take_changed(), allocation.in_use, self.header.place(allocation.end))
        };
        let done = self.write_pages(&pages, in_use, end);
        if done.is_err() {
            self.map.put_back(&pages);
        }
        done
    }

    fn write_pages(&self, pages: &[Changed], in_use: u64, end: u64) -> Result<(), DiskError> {
        if pages.is_empty() {
            return self.store.sync();
        }
        if self.store.size()? < end {
            self.store.set_size(end)?;
        }
        self.store.sync()?;
        let (mut first_page, mut others) = (&[][..], pages);
        if let Some((first, rest)) = pages.split_first()
            && first.offset == HEADER
        {
            (first_page, others) = (&first.bytes, rest);
        }
        for page in others {
            self.store.write_at(page.offset, &page.bytes)?;
        }
        self.write_header(in_use, first_page)?;
        self.store.sync()
    }

    /// The place for another block, empty.
    fn make_room(&self, allocation: &mut Allocation) -> Result<u64, DiskError> {
        if !allocation.trimmed {
            // Blocks of which a crash kept the map from knowing.
            let end = self.header.place(allocation.end);
            if self.store.size()? > end {
                self.store.set_size(end)?;
            }
            allocation.trimmed = true;
        }
        match allocation.gaps.last() {
            Some(gap) => {
                self.store.write_zeroes(self.header.place(*gap), self.header.block_size)?;
                Ok(*gap)
            }
            None => Ok(allocation.end),
        }
    }
}

impl Blocks for Vdi {
    fn store(&self) -> &dyn Store {
        &*self.store
    }

    fn block_size(&self) -> u64 {
        self.header.block_size
    }

    fn find(&self, block: u64) -> Result<Option<u64>, DiskError> {
        let index = self.map.get(&*self.store, block)?.unwrap_or(FREE.into());
        if index >= FIRST_ABSENT.into() {
            return Ok(None);
        }
        let place = self.header.place(index);
        if index >= self.header.blocks
            || place + self.header.block_size > self.end.load(Ordering::Acquire)
        {
            return Err(self.out_of_range(block, index));
        }
        Ok(Some(place))
    }

    fn add(&self, block: u64, within: u64, data: &[u8]) -> Result<(), DiskError> {
        let mut allocation = lock(&self.allocation);
        if let Some(place) = self.find(block)? {
            return self.store.write_at(place + within, data);
        }
        let index = self.make_room(&mut allocation)?;
        let place = self.header.place(index);
        // Should anything fail from here on, the place is emptied before it is used again.
        allocation.trimmed = false;
        self.store.write_at(place + within, data)?;
        self.end.fetch_max(place + self.header.block_size, Ordering::AcqRel);
        self.map.set(&*self.store, block, index)?;
        allocation.trimmed = true;
        if allocation.gaps.pop().is_none() {
            allocation.end += 1;
        }
        allocation.in_use += 1;
        Ok(())
    }
}

disk_of_blocks!(Vdi);
flush_when_closed!(Vdi);

/// Writes the header and the map of an image without data.
fn lay_out(store: &dyn Store, size: u64, variant: Variant) -> Result<(), DiskError> {
    let blocks = size.div_ceil(BLOCK_SIZE);
    let data = (HEADER + blocks * 4).next_multiple_of(BLOCK_SIZE);
    let (kind, in_use) = match variant {
        Variant::Dynamic => (1_u32, 0),
        Variant::Static => (2, blocks),
    };
    let low = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    let mut header = vec![0; HEADER as usize];
    put(&mut header, 0, b"<<< Bivisor Virtual Disk Image >>>\n");
    put(&mut header, field::SIGNATURE, &SIGNATURE.to_le_bytes());
    put(&mut header, field::VERSION, &VERSION.to_le_bytes());
    put(&mut header, field::HEADER_BODY, &HEADER_BODY.to_le_bytes());
    put(&mut header, field::KIND, &kind.to_le_bytes());
    put(&mut header, field::MAP, &low(HEADER));
    put(&mut header, field::DATA, &low(data));
    put(&mut header, field::SECTOR_SIZE, &low(SECTOR));
    put(&mut header, field::DISK_SIZE, &size.to_le_bytes());
    put(&mut header, field::BLOCK_SIZE, &low(BLOCK_SIZE));
    put(&mut header, field::BLOCKS, &low(blocks));
    put(&mut header, field::IN_USE, &low(in_use));
    put(&mut header, field::IMAGE_ID, &random_id()?);
    put(&mut header, field::MODIFICATION_ID, &random_id()?);
    if variant == Variant::Static {
        store.set_size(data + blocks * BLOCK_SIZE)?;
    }
    let mut index = 0;
    while index < blocks {
        let count = (blocks - index).min(PAGE * 16);
        let entry = |index| if variant == Variant::Static { low(index) } else { low(u64::MAX) };
        let bytes: Vec<u8> = (index..index + count).flat_map(entry).collect();
        store.write_at(HEADER + index * 4, &bytes)?;
        index += count;
    }
    if store.size()? < data {
        store.set_size(data)?;
    }
    store.sync()?;
    // Last, so that a file without it is no image yet.
    store.write_at(0, &header)?;
    store.sync()
}
