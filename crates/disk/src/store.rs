//! What an image is kept in: an [`ImageFile`], or something else that reads and writes at any
//! position, as the memory in which tests record what a format writes to cut it off anywhere.
use crate::{DiskError, Extent, ImageFile};
use std::sync::Arc;

/// Bytes that can be read, written, cut off and extended at any position, from many threads at
/// once. Offsets, lengths and sizes are in bytes.
pub trait Store: Send + Sync {
    /// Its name for messages.
    fn name(&self) -> String;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// How many bytes there are.
    ///
    /// # Errors
    /// The host does not say.
    fn size(&self) -> Result<u64, DiskError>;

    /// Fills `buffer`.
    ///
    /// # Errors
    /// [`DiskError::Damaged`] where the end comes before that, or the host cannot read.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError>;

    /// Fills `buffer`, with zeroes beyond the end.
    ///
    /// # Errors
    /// The host cannot read.
    fn read_or_zero_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError>;

    /// Writes all of `data`, extending what ends before that.
    ///
    /// # Errors
    /// [`DiskError::Full`], [`DiskError::ReadOnly`], or the host cannot write.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError>;

    /// Makes all writes durable that ended before, with the size.
    ///
    /// # Errors
    /// The host cannot.
    fn sync(&self) -> Result<(), DiskError>;

    /// Cuts off at `size`, or extends with zeroes that take up no space.
    ///
    /// # Errors
    /// As [`Store::write_at`].
    fn set_size(&self, size: u64) -> Result<(), DiskError>;

    /// Gives a range back where that can be. What is given back reads as zeroes; the rest keeps
    /// its content.
    ///
    /// # Errors
    /// As [`Store::write_at`].
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Makes a range read as zeroes, extending what ends before its end.
    ///
    /// # Errors
    /// As [`Store::write_at`].
    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// What is there from `offset` on, for at most `length` bytes: data, or a hole.
    ///
    /// # Errors
    /// The host does not say.
    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError>;
}

/// A store with words for what is wrong with the image in it.
pub(crate) trait Complain: Store {
    /// The error of an image that contradicts itself.
    fn damaged(&self, what: String) -> DiskError {
        DiskError::Damaged { file: self.name(), what }
    }

    /// The error of an image that uses what is not supported.
    fn unsupported(&self, feature: String) -> DiskError {
        DiskError::Unsupported { file: self.name(), feature }
    }
}

impl<S: Store + ?Sized> Complain for S {}

impl Store for ImageFile {
    fn name(&self) -> String {
        self.name()
    }

    fn read_only(&self) -> bool {
        self.read_only()
    }

    fn size(&self) -> Result<u64, DiskError> {
        self.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.read_at(offset, buffer)
    }

    fn read_or_zero_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.read_or_zero_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.write_at(offset, data)
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.sync()
    }

    fn set_size(&self, size: u64) -> Result<(), DiskError> {
        self.set_size(size)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.discard(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, length)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        self.extent(offset, length)
    }
}

impl<S: Store + ?Sized> Store for Arc<S> {
    fn name(&self) -> String {
        (**self).name()
    }

    fn read_only(&self) -> bool {
        (**self).read_only()
    }

    fn size(&self) -> Result<u64, DiskError> {
        (**self).size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        (**self).read_at(offset, buffer)
    }

    fn read_or_zero_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        (**self).read_or_zero_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        (**self).write_at(offset, data)
    }

    fn sync(&self) -> Result<(), DiskError> {
        (**self).sync()
    }

    fn set_size(&self, size: u64) -> Result<(), DiskError> {
        (**self).set_size(size)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        (**self).discard(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        (**self).write_zeroes(offset, length)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        (**self).extent(offset, length)
    }
}
