//! Virtual disks: the formats that images come in, and how a machine reads and writes them.
//!
//! A [`Disk`] is an array of bytes that a guest sees as its disk. Every format implements it over
//! a file, and an overlay over another `Disk`. Its calls block; they can be made from any number
//! of threads at once. Image files are hostile input: no length, offset or count in them steers
//! an allocation or a loop before it was checked against the file's size and the format's limits.
//!
//! Start reading at [`Disk`], then [`mod@file`], on which every format stands. [`mod@format`] opens an
//! image of any format, [`overlay`] puts a qcow2 image over one, [`mod@convert`] copies between
//! formats, [`manage`] checks and resizes, [`requests`] is what a block device uses. [`vdi`] is the simplest of the formats that
//! divide a disk into blocks; what they share is in `blocks` and `table`. [`nbd`] is a disk
//! somewhere else.
#![forbid(unsafe_code)]

mod blocks;
mod bytes;
pub mod convert;
mod create;
mod error;
pub mod file;
pub mod format;
mod lock;
pub mod manage;
pub mod memory;
pub mod nbd;
pub mod overlay;
pub mod qcow2;
pub mod raw;
pub mod requests;
mod store;
mod table;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

pub use error::{DiskError, check_range};
pub use file::{Access, FileOptions, ImageFile};
pub use format::Format;
pub use lock::Lock;
pub use store::Store;

/// Bytes of a sector, the unit of offsets and lengths that a guest uses.
pub const SECTOR: u64 = 512;

/// A virtual disk. Offsets and lengths are in bytes and need not be aligned; a range that ends
/// beyond [`Disk::size`] is refused with [`DiskError::OutOfRange`] and changes nothing.
pub trait Disk: Send + Sync {
    /// The size that the guest sees, in bytes.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Fills `buffer` from the disk.
    ///
    /// # Errors
    /// The host cannot read, or metadata that the range needs is damaged.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError>;

    /// Writes `data`. It is durable only after the next [`Disk::flush`]. Overlapping requests that
    /// are under way at once take effect in any order, but sectors outside them are never touched.
    ///
    /// # Errors
    /// The host cannot write ([`DiskError::Full`] where its file system has no room: what was
    /// there before is then still there or the new data is, sector by sector, and the write can be
    /// repeated), or the disk is read-only.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError>;

    /// Makes all writes durable that ended before this call, with the metadata that finds them.
    ///
    /// # Errors
    /// The host cannot.
    fn flush(&self) -> Result<(), DiskError>;

    /// Says that the content of a range no longer matters. Whole units of allocation within it
    /// may be given back to the host and read as zeroes afterwards; the rest keeps its content.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Makes a range read as zeroes, allocating nothing where the format can say so.
    ///
    /// # Errors
    /// As [`Disk::write_at`].
    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Bytes of the unit in which the format allocates: an aligned piece of this size can be
    /// discarded, or made zero, so that it takes up no space. A power of two.
    fn unit(&self) -> u64 {
        4096
    }

    /// What the disk holds from `offset` on: the kind of the first bytes there and for how many
    /// (at least one, at most `length`) it stays the same. What cannot be known counts as data.
    ///
    /// # Errors
    /// As [`Disk::read_at`].
    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError>;
}

/// A stretch of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// What is there.
    pub kind: ExtentKind,
    /// Bytes.
    pub length: u64,
}

/// What a stretch of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data.
    Data,
    /// Reads as zeroes: never written, or discarded, here and in everything below.
    Zero,
}
