//! Raw images: the file is the disk, byte by byte.
//!
//! A raw image has no header, and its guest can write any header into it; so nothing here or
//! elsewhere guesses that a file is raw, its user says so.
use crate::{Disk, DiskError, Extent, FileOptions, ImageFile, SECTOR, check_range};
use std::path::Path;

/// An open raw image, or block device.
#[derive(Debug)]
pub struct Raw {
    file: ImageFile,
    size: u64,
}

impl Raw {
    /// Opens one. A file that ends within a sector is a disk with that sector filled up with
    /// zeroes.
    ///
    /// # Errors
    /// As [`ImageFile::open`].
    pub fn open(path: &Path, options: FileOptions) -> Result<Self, DiskError> {
        Self::over(ImageFile::open(path, options)?)
    }

    /// Makes one of `size` bytes, rounded up to sectors, that reads as zeroes and takes up no
    /// space.
    ///
    /// # Errors
    /// As [`ImageFile::create`].
    pub fn create(path: &Path, size: u64, options: FileOptions) -> Result<Self, DiskError> {
        let file = ImageFile::create(path, options)?;
        file.set_size(whole_sectors(size))?;
        Self::over(file)
    }

    /// Takes an open file as a raw disk.
    ///
    /// # Errors
    /// The host does not tell its size.
    pub fn over(file: ImageFile) -> Result<Self, DiskError> {
        let size = whole_sectors(file.size()?);
        Ok(Self { file, size })
    }

    /// Grows the disk, or cuts it off.
    ///
    /// # Errors
    /// As [`ImageFile::set_size`].
    pub fn resize(&mut self, size: u64) -> Result<(), DiskError> {
        let size = whole_sectors(size);
        self.file.set_size(size)?;
        self.size = size;
        Ok(())
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &ImageFile {
        &self.file
    }
}

fn whole_sectors(size: u64) -> u64 {
    size.checked_next_multiple_of(SECTOR).unwrap_or(size)
}

impl Disk for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.file.read_only()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        check_range(offset, buffer.len() as u64, self.size)?;
        self.file.read_or_zero_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        check_range(offset, data.len() as u64, self.size)?;
        self.file.write_at(offset, data)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.file.sync()
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        check_range(offset, length, self.size)?;
        self.file.discard(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        check_range(offset, length, self.size)?;
        self.file.write_zeroes(offset, length)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        check_range(offset, length, self.size)?;
        self.file.extent(offset, length)
    }
}
