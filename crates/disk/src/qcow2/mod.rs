//! qcow2 images, versions 2 and 3 (QEMU, `docs/interop/qcow2.txt`), read and written.
//!
//! Where to start: `entry` is what a table entry means, `meta` the metadata of an open image and
//! how it is changed, `read` and `write` what a request does, `commit` the order in which changes
//! reach the file. `check` verifies and repairs. Locks are taken in this order: the turn to commit,
//! requests in flight, metadata.
//!
//! Not supported, and refused by name: encryption, external data files, extended L2 entries.
//! Internal snapshots are kept intact and listed, not made. Persistent bitmaps are declared
//! invalid when an image is opened to write, as the specification asks of those who do not
//! maintain them.

mod check;
mod commit;
mod compressed;
mod create;
mod entry;
mod header;
mod info;
mod meta;
mod read;
mod refcounts;
mod resize;
mod table_cache;
mod write;
mod zero;

pub use check::{CheckReport, Repair};
pub use create::CreateOptions;
pub use header::{BackingName, Compression, Version};
pub use info::{Info, Snapshot};
pub use resize::Shrink;

use crate::{Disk, DiskError, Extent, FileOptions, ImageFile, Store, check_range};
use compressed::Decompressor;
use header::{CORRUPT, DIRTY, Header, LAZY_REFCOUNTS};
use meta::Meta;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

/// An open qcow2 image.
pub struct Qcow2 {
    store: Box<dyn Store>,
    backing: Option<Arc<dyn Disk>>,
    version: Version,
    cluster_bits: u32,
    size: u64,
    lazy_refcounts: bool,
    /// Incompatible features, as the header has them.
    incompatible: AtomicU64,
    /// Whose turn it is to write changes; whether the header says that the image is in use.
    commit: Mutex<bool>,
    /// Shared by requests as long as they may use a host cluster that they looked up.
    in_flight: RwLock<()>,
    meta: Mutex<Meta>,
    /// A cluster is no longer being moved.
    moved: Condvar,
    decompressor: Decompressor,
}

/// Finds the disk below an image, from the name in its header.
pub type FindBacking<'a> = &'a dyn Fn(&BackingName) -> Result<Arc<dyn Disk>, DiskError>;

impl Qcow2 {
    /// Opens an image. If it has a backing file, `find_backing` opens that.
    ///
    /// An image to be written that was not closed properly is repaired first; one that is marked
    /// as corrupt can only be read.
    ///
    /// # Errors
    /// [`DiskError::NotThisFormat`], [`DiskError::Unsupported`] with the feature's name,
    /// [`DiskError::Damaged`], those of [`ImageFile::open`], and those of `find_backing`.
    pub fn open(
        path: &Path,
        options: FileOptions,
        find_backing: FindBacking<'_>,
    ) -> Result<Self, DiskError> {
        Self::open_in(open_file(path, options)?, find_backing)
    }

    /// Opens the image in a store, as [`Qcow2::open`] does that in a file.
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub fn open_in(
        store: impl Store + 'static,
        find_backing: FindBacking<'_>,
    ) -> Result<Self, DiskError> {
        let image = Self::open_as_is(store, Some(find_backing))?;
        if image.store.read_only() {
            return Ok(image);
        }
        if image.is_marked(CORRUPT) {
            let what = "it was marked as corrupt and can only be read".to_owned();
            return Err(DiskError::Damaged { file: image.store.name(), what });
        }
        if image.is_marked(DIRTY) {
            image.repair_after_crash()?;
        }
        Ok(image)
    }

    /// Opens an image whatever its header says of its state. Without `find_backing`, its backing
    /// file is left alone and reads as zeroes.
    fn open_as_is(
        store: impl Store + 'static,
        find_backing: Option<FindBacking<'_>>,
    ) -> Result<Self, DiskError> {
        let header = Header::read(&store)?;
        let backing = match (&header.backing, find_backing) {
            (Some(name), Some(find)) => Some(find(name)?),
            _ => None,
        };
        let mut meta = Meta::load(&store, &header)?;
        info::protect_snapshots(&store, &header, &mut meta)?;
        if !store.read_only() && header.autoclear != 0 {
            // What Bivisor does not maintain must not be trusted by others any more.
            store.write_at(88, &0_u64.to_be_bytes())?;
            store.sync()?;
        }
        Ok(Self {
            backing,
            version: header.version,
            cluster_bits: header.cluster_bits,
            size: header.size,
            lazy_refcounts: header.compatible & LAZY_REFCOUNTS != 0,
            incompatible: AtomicU64::new(header.incompatible),
            commit: Mutex::new(header.incompatible & DIRTY != 0),
            in_flight: RwLock::new(()),
            meta: Mutex::new(meta),
            moved: Condvar::new(),
            decompressor: Decompressor::new(header.compression, header.cluster_size()),
            store: Box::new(store),
        })
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn cluster_len(&self) -> usize {
        1 << self.cluster_bits
    }

    fn is_marked(&self, bit: u64) -> bool {
        self.incompatible.load(Ordering::SeqCst) & bit != 0
    }

    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request to change something may proceed.
    fn check_change(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        check_range(offset, length, self.size)?;
        if self.store.read_only() {
            return Err(DiskError::ReadOnly);
        }
        if self.is_marked(CORRUPT) {
            let what = "metadata that contradicts itself was found while it was in use".to_owned();
            return Err(DiskError::Damaged { file: self.store.name(), what });
        }
        Ok(())
    }

    /// Passes the result of a change on. If it failed because metadata is damaged, the image is
    /// marked as corrupt, so that nobody makes it worse.
    fn watch<T>(&self, result: Result<T, DiskError>) -> Result<T, DiskError> {
        // Damage may also be in a backing file, which was read for a part of a cluster.
        let damaged =
            matches!(&result, Err(DiskError::Damaged { file, .. }) if *file == self.store.name());
        if damaged && !self.is_marked(CORRUPT) {
            self.mark(CORRUPT, true)?;
        }
        result
    }

    /// Writes changes if many wait.
    fn relieve(&self) -> Result<(), DiskError> {
        if self.meta().crowded() { self.commit(false) } else { Ok(()) }
    }
}

/// Opens an image's file. Only one that grows when it is written beyond its end can be written to.
fn open_file(path: &Path, options: FileOptions) -> Result<ImageFile, DiskError> {
    let file = ImageFile::open(path, options)?;
    if file.read_only() || file.is_regular() {
        return Ok(file);
    }
    let problem = "qcow2 on a block device can only be read; use `--format raw` there";
    Err(DiskError::Invalid { file: file.name(), problem: problem.to_owned() })
}

impl Disk for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.store.read_only()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        check_range(offset, buffer.len() as u64, self.size)?;
        self.read_range(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.check_change(offset, data.len() as u64)?;
        self.watch(self.write_range(offset, data))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.store.read_only() {
            return Ok(());
        }
        self.watch(self.commit(false))
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_change(offset, length)?;
        self.watch(self.discard_range(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_change(offset, length)?;
        self.watch(self.zero_range(offset, length))
    }

    fn unit(&self) -> u64 {
        self.cluster_size()
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        check_range(offset, length, self.size)?;
        self.extent_of(offset, length)
    }
}

impl Drop for Qcow2 {
    /// Closes the image. What was flushed is durable anyway; if this fails, the next one to open
    /// the image finds the mark of its use and repairs the refcounts.
    fn drop(&mut self) {
        if !self.store.read_only() && !self.is_marked(CORRUPT) {
            let _ = self.settle();
        }
    }
}

impl fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, cluster_bits, size, .. } = self;
        let name = self.store.name();
        write!(f, "Qcow2({name}, {version:?}, {cluster_bits} cluster bits, {size} bytes)")
    }
}
