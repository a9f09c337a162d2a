//! VHD, the format of Virtual PC and of Hyper-V before VHDX; QEMU calls it `vpc`.
//!
//! "Virtual Hard Disk Image Format Specification" 1.0 (Microsoft, 2006). A fixed image is the disk
//! with a footer of 512 bytes behind it (`footer`). A dynamic one has a copy of the footer in
//! front, a header, a table, and blocks that are added when they are first written to
//! (`dynamic`). Differencing images, which need a parent, are refused.
//!
//! **Size.** Virtual PC rounds a disk down to its geometry, others take the size that the footer
//! names. Images are read as QEMU reads them: by the program that made them. New ones have the
//! exact size.
//!
//! The footer at the end decides what an image is: in front of a fixed image is what the guest
//! wrote there.
mod dynamic;
mod footer;

use crate::blocks::{Blocks, disk_of_blocks, flush_when_closed};
use crate::create::{check_size, new_file};
use crate::store::{Complain, Store};
use crate::{DiskError, FileOptions, SECTOR};
use dynamic::Dynamic;
use footer::{BLOCK_SIZE, DynamicHeader, FOOTER, Footer, MAX_SECTORS, NEW_HEADER, NEW_TABLE};
use std::path::Path;

pub use footer::Variant;

/// Table entries that a new image is given at once.
const ENTRIES_AT_ONCE: u64 = 1 << 16;

/// An open VHD image.
pub struct Vhd {
    store: Box<dyn Store>,
    disk_size: u64,
    /// The blocks of a dynamic image; a fixed one is a single block.
    dynamic: Option<Dynamic>,
}

impl Vhd {
    /// Opens an image.
    ///
    /// # Errors
    /// [`DiskError::NotThisFormat`], [`DiskError::Unsupported`] for differencing images,
    /// [`DiskError::Damaged`], or the host cannot read.
    pub fn open(store: impl Store + 'static) -> Result<Self, DiskError> {
        let size = store.size()?;
        let tail_at = size.saturating_sub(FOOTER);
        let (mut head, mut tail) = (vec![0; FOOTER as usize], vec![0; FOOTER as usize]);
        store.read_or_zero_at(0, &mut head)?;
        store.read_or_zero_at(tail_at, &mut tail)?;
        let has_tail = Footer::is_sound(&tail);
        let footer = if has_tail {
            Footer::parse(tail, &store)?
        } else if Footer::is_sound(&head) {
            Footer::parse(head.clone(), &store)?
        } else if Footer::has_cookie(&tail) || Footer::has_cookie(&head) {
            return Err(store.damaged("the checksum of its footer is wrong".to_owned()));
        } else {
            return Err(DiskError::NotThisFormat { file: store.name(), format: "VHD" });
        };
        let dynamic = match footer.variant {
            Variant::Fixed if !has_tail || footer.disk_size > tail_at => {
                let what = format!("it has {tail_at} bytes for a disk of {}", footer.disk_size);
                return Err(store.damaged(what));
            }
            Variant::Fixed => None,
            Variant::Dynamic => {
                if !store.read_only() && head != footer.bytes {
                    store.write_at(0, &footer.bytes)?;
                }
                Some(Dynamic::open(&store, &footer, has_tail)?)
            }
        };
        Ok(Self { store: Box::new(store), disk_size: footer.disk_size, dynamic })
    }

    /// Makes a new image of `size` bytes, which reads as zeroes, and opens it to write.
    ///
    /// # Errors
    /// [`DiskError::Invalid`] for a size that the format does not have (at most 2040 GiB) or a
    /// file that exists, or the host cannot write.
    pub fn create(
        path: &Path,
        size: u64,
        variant: Variant,
        options: FileOptions,
    ) -> Result<Self, DiskError> {
        new_file(path, options, |file| Self::create_in(file, size, variant))
    }

    /// Makes a new image of an empty store, as [`Vhd::create`] does of a file.
    ///
    /// # Errors
    /// As [`Vhd::create`].
    pub fn create_in(
        store: impl Store + 'static,
        size: u64,
        variant: Variant,
    ) -> Result<Self, DiskError> {
        check_size(&store.name(), size, MAX_SECTORS * SECTOR)?;
        let footer = Footer::new(size, variant)?;
        match variant {
            Variant::Fixed => store.write_at(size, &footer.bytes)?,
            Variant::Dynamic => lay_out_dynamic(&store, &footer)?,
        }
        store.sync()?;
        Self::open(store)
    }

    /// How the image takes up space.
    #[must_use]
    pub fn variant(&self) -> Variant {
        if self.dynamic.is_some() { Variant::Dynamic } else { Variant::Fixed }
    }

    /// Bytes of a dynamic image's block.
    #[must_use]
    pub fn block_bytes(&self) -> Option<u64> {
        self.dynamic.as_ref().map(Dynamic::block_size)
    }

    fn disk_size(&self) -> u64 {
        self.disk_size
    }

    fn write_back(&self) -> Result<(), DiskError> {
        match &self.dynamic {
            None => self.store.sync(),
            Some(dynamic) => dynamic.write_back(&*self.store),
        }
    }
}

/// Writes all of a dynamic image that has no blocks.
fn lay_out_dynamic(store: &dyn Store, footer: &Footer) -> Result<(), DiskError> {
    let blocks = footer.disk_size.div_ceil(BLOCK_SIZE);
    store.write_at(NEW_HEADER, &DynamicHeader::new_bytes(blocks))?;
    // The table is filled up to a sector's end.
    let entries = blocks.next_multiple_of(SECTOR / 4);
    let mut done = 0;
    while done < entries {
        let now = (entries - done).min(ENTRIES_AT_ONCE);
        let bytes = vec![0xff; usize::try_from(now * 4).unwrap_or_default()];
        store.write_at(NEW_TABLE + done * 4, &bytes)?;
        done += now;
    }
    store.write_at(NEW_TABLE + entries * 4, &footer.bytes)?;
    store.sync()?;
    // Last, so that a file without it is no image yet.
    store.write_at(0, &footer.bytes)
}

impl Blocks for Vhd {
    fn store(&self) -> &dyn Store {
        &*self.store
    }

    fn block_size(&self) -> u64 {
        match &self.dynamic {
            None => self.disk_size.max(1),
            Some(dynamic) => dynamic.block_size(),
        }
    }

    fn find(&self, block: u64) -> Result<Option<u64>, DiskError> {
        match &self.dynamic {
            None => Ok(Some(0)),
            Some(dynamic) => dynamic.find(&*self.store, block),
        }
    }

    fn find_to_write(&self, block: u64) -> Result<Option<u64>, DiskError> {
        match &self.dynamic {
            None => Ok(Some(0)),
            Some(dynamic) => dynamic.find_to_write(&*self.store, block),
        }
    }

    fn add(&self, block: u64, within: u64, data: &[u8]) -> Result<(), DiskError> {
        match &self.dynamic {
            None => self.store.write_at(within, data),
            Some(dynamic) => dynamic.add(&*self.store, block, within, data),
        }
    }

    fn mask(&self, block: u64, within: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        match &self.dynamic {
            None => Ok(()),
            Some(dynamic) => dynamic.mask(&*self.store, block, within, buffer),
        }
    }
}

disk_of_blocks!(Vhd);
flush_when_closed!(Vhd);
