//! An image's file on the host: what all formats read and write.
//!
//! All reads and writes name their position, so any number of threads can share one
//! [`ImageFile`]. A file that is open has a lock on it (see [`Lock`]). With [`FileOptions::direct`]
//! the host's page cache is bypassed for what is aligned to [`DIRECT_ALIGNMENT`], through a bounce
//! buffer where only the memory is not; the rest, small metadata above all, goes through a second,
//! cached descriptor of the same file, which the kernel keeps coherent with the first.
use crate::lock::{self, Lock};
use crate::{DiskError, Extent, ExtentKind};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What offsets, lengths and memory are multiples of where the page cache is bypassed, in bytes.
/// No storage of today needs more.
pub const DIRECT_ALIGNMENT: usize = 4096;

/// Bytes that are copied, or written as zeroes, at once.
const CHUNK: usize = 1 << 20;

/// Whether an image is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Read and written.
    Write,
}

/// How to open an image's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Whether it is written to.
    pub access: Access,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Whom else to admit.
    pub lock: Lock,
}

impl FileOptions {
    /// To read, cached, with other readers.
    #[must_use]
    pub fn read() -> Self {
        Self { access: Access::Read, direct: false, lock: Lock::Exclude }
    }

    /// To read and write, cached, alone.
    #[must_use]
    pub fn write() -> Self {
        Self { access: Access::Write, ..Self::read() }
    }
}

/// An open, locked file or block device.
#[derive(Debug)]
pub struct ImageFile {
    /// Through the page cache.
    cached: File,
    /// Past it.
    direct: Option<File>,
    path: PathBuf,
    access: Access,
    block_device: bool,
}

impl ImageFile {
    /// Opens a file or block device that exists.
    ///
    /// # Errors
    /// [`DiskError::InUse`], or [`DiskError::Host`] where it is not there, is no file, or may not
    /// be opened so.
    pub fn open(path: &Path, options: FileOptions) -> Result<Self, DiskError> {
        let write = options.access == Access::Write;
        let action = if write { "open it to write" } else { "open it" };
        Self::open_with(path, options, action, OpenOptions::new().read(true).write(write))
    }

    /// Makes a new, empty file, open to write.
    ///
    /// # Errors
    /// [`DiskError::Invalid`] where something of that name is there; otherwise as for
    /// [`ImageFile::open`].
    pub fn create(path: &Path, options: FileOptions) -> Result<Self, DiskError> {
        let options = FileOptions { access: Access::Write, ..options };
        let mut open = OpenOptions::new();
        open.read(true).write(true).create_new(true);
        match Self::open_with(path, options, "create it", &mut open) {
            Err(DiskError::Host { file, source, .. })
                if source.kind() == io::ErrorKind::AlreadyExists =>
            {
                let problem = "it exists already; remove it or choose another name".to_owned();
                Err(DiskError::Invalid { file, problem })
            }
            other => other,
        }
    }

    fn open_with(
        path: &Path,
        options: FileOptions,
        action: &'static str,
        open: &mut OpenOptions,
    ) -> Result<Self, DiskError> {
        let host = |action| {
            move |source| DiskError::Host { file: path.display().to_string(), action, source }
        };
        // Not to wait for the other end where the name is a pipe's, which is then refused.
        open.custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        let cached = open.open(path).map_err(host(action))?;
        let kind = cached.metadata().map_err(host("inspect it"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let problem = "it is neither a file nor a block device".to_owned();
            return Err(DiskError::Invalid { file: path.display().to_string(), problem });
        }
        if options.lock == Lock::Exclude {
            lock::acquire(&cached, path, options.access == Access::Write)?;
        }
        let direct = if options.direct {
            // By descriptor, so that it is the same file whatever the name stands for by now.
            let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&cached));
            let file = OpenOptions::new()
                .read(true)
                .write(options.access == Access::Write)
                .custom_flags(OFlags::DIRECT.bits().cast_signed())
                .open(again)
                .map_err(host(
                    "bypass the page cache on its file system; open it without direct",
                ))?;
            Some(file)
        } else {
            None
        };
        Ok(Self {
            cached,
            direct,
            path: path.to_owned(),
            access: options.access,
            block_device: kind.is_block_device(),
        })
    }

    /// The file's name, as it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's name for messages.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.access == Access::Read
    }

    /// Whether it is a file, whose end moves when it is written beyond and which has zeroes there,
    /// and not a block device.
    #[must_use]
    pub fn is_regular(&self) -> bool {
        !self.block_device
    }

    /// Bytes in the file, or on the device.
    ///
    /// # Errors
    /// The host does not say.
    pub fn size(&self) -> Result<u64, DiskError> {
        let found = if self.block_device {
            seek(&self.cached, SeekFrom::End(0)).map_err(io::Error::from)
        } else {
            self.cached.metadata().map(|metadata| metadata.len())
        };
        found.map_err(|source| self.host("find its size", source))
    }

    /// Bytes that the file takes up on the host.
    ///
    /// # Errors
    /// The host does not say.
    pub fn allocated(&self) -> Result<u64, DiskError> {
        use std::os::unix::fs::MetadataExt;
        let metadata = self.cached.metadata();
        Ok(metadata.map_err(|source| self.host("inspect it", source))?.blocks().saturating_mul(512))
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// [`DiskError::Damaged`] where the file ends before that, or the host cannot read.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let length = buffer.len();
        let read = self.read_some(offset, buffer)?;
        if read < length {
            let what = format!("it ends before {length} bytes that are expected at {offset}");
            return Err(DiskError::Damaged { file: self.name(), what });
        }
        Ok(())
    }

    /// Fills `buffer`, with zeroes beyond the file's end.
    ///
    /// # Errors
    /// The host cannot read.
    pub fn read_or_zero_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let read = self.read_some(offset, buffer)?;
        buffer.get_mut(read..).unwrap_or_default().fill(0);
        Ok(())
    }

    /// Reads until `buffer` is full or the file ends; how much it was.
    fn read_some(&self, mut offset: u64, buffer: &mut [u8]) -> Result<usize, DiskError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let read = match self.direct_for(offset, rest.len()) {
                Some(direct) if aligned_memory(rest) => direct.read_at(rest, offset),
                Some(direct) => read_through_bounce(direct, offset, rest),
                None => self.cached.read_at(rest, offset),
            };
            match read {
                Ok(0) => break,
                Ok(read) => {
                    done += read;
                    offset = offset.saturating_add(read as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.host("read it", source)),
            }
        }
        Ok(done)
    }

    /// Writes all of `data`, extending the file where it ends before that.
    ///
    /// # Errors
    /// [`DiskError::Full`], [`DiskError::ReadOnly`], or the host cannot write.
    pub fn write_at(&self, mut offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.check_writable()?;
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let written = match self.direct_for(offset, rest.len()) {
                Some(direct) if aligned_memory(rest) => direct.write_at(rest, offset),
                Some(direct) => write_through_bounce(direct, offset, rest),
                None => self.cached.write_at(rest, offset),
            };
            match written {
                Ok(0) => return Err(DiskError::Full { file: self.name() }),
                Ok(written) => {
                    done += written;
                    offset = offset.saturating_add(written as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.host("write to it", source)),
            }
        }
        Ok(())
    }

    /// Makes all writes that ended before durable, with the size.
    ///
    /// # Errors
    /// The host cannot.
    pub fn sync(&self) -> Result<(), DiskError> {
        if self.read_only() {
            return Ok(());
        }
        self.cached.sync_data().map_err(|source| self.host("make its data durable", source))
    }

    /// Cuts the file off at `size`, or extends it with zeroes that take up no space. The caller
    /// sees to it that no write beyond `size` is under way: it would be cut off.
    ///
    /// # Errors
    /// [`DiskError::Full`], [`DiskError::ReadOnly`], or the host cannot.
    pub fn set_size(&self, size: u64) -> Result<(), DiskError> {
        self.check_writable()?;
        self.cached.set_len(size).map_err(|source| self.host("change its size", source))
    }

    /// Gives a range back to the host where it can take it. What is given back reads as zeroes;
    /// the rest keeps its content.
    ///
    /// # Errors
    /// The host fails in another way than by not knowing how.
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_writable()?;
        self.punch(offset, length)?;
        Ok(())
    }

    /// Makes a range read as zeroes, without taking up space where the host can do that. The file
    /// is extended where it ends before that.
    ///
    /// # Errors
    /// As [`ImageFile::write_at`].
    pub fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_writable()?;
        let end = offset.saturating_add(length);
        if length == 0 {
            return Ok(());
        }
        if !self.block_device && self.size()? < end {
            // Written, and not set as the size: another thread may have written further meanwhile.
            self.write_at(end - 1, &[0])?;
        }
        if self.punch(offset, length)? {
            return Ok(());
        }
        let flags = FallocateFlags::ZERO_RANGE;
        match fallocate(&self.cached, flags, offset, length) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            Err(error) => return Err(self.host("write zeroes to it", error.into())),
        }
        let zeroes = vec![0; CHUNK.min(usize::try_from(length).unwrap_or(CHUNK))];
        let mut at = offset;
        while at < end {
            let now = (end - at).min(zeroes.len() as u64);
            let chunk = zeroes.get(..usize::try_from(now).unwrap_or(zeroes.len()));
            self.write_at(at, chunk.unwrap_or(&zeroes))?;
            at += now;
        }
        Ok(())
    }

    /// Makes a hole; whether the host could.
    fn punch(&self, offset: u64, length: u64) -> Result<bool, DiskError> {
        if length == 0 {
            return Ok(true);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.cached, flags, offset, length) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
            Err(error) => Err(self.host("make a hole in it", error.into())),
        }
    }

    /// What the file holds from `offset` on, for at most `length` bytes: data, or a hole. Beyond
    /// its end it is a hole.
    ///
    /// # Errors
    /// The host does not say.
    pub fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        let data = |length| Extent { kind: ExtentKind::Data, length };
        let zero = |length| Extent { kind: ExtentKind::Zero, length };
        if self.block_device {
            return Ok(data(length));
        }
        match seek(&self.cached, SeekFrom::Data(offset)) {
            Ok(start) if start > offset => return Ok(zero(length.min(start - offset))),
            Ok(_) => {}
            Err(Errno::NXIO) => return Ok(zero(length)),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(data(length)),
            Err(error) => return Err(self.host("look for holes in it", error.into())),
        }
        match seek(&self.cached, SeekFrom::Hole(offset)) {
            Ok(end) if end > offset => Ok(data(length.min(end - offset))),
            // It became a hole between the two questions.
            Ok(_) | Err(Errno::NXIO) => Ok(zero(length)),
            Err(error) => Err(self.host("look for holes in it", error.into())),
        }
    }

    /// The descriptor that bypasses the cache, if there is one and the request's place admits it.
    fn direct_for(&self, offset: u64, length: usize) -> Option<&File> {
        let alignment = DIRECT_ALIGNMENT as u64;
        let admitted = offset.is_multiple_of(alignment) && length.is_multiple_of(DIRECT_ALIGNMENT);
        self.direct.as_ref().filter(|_| admitted)
    }

    fn check_writable(&self) -> Result<(), DiskError> {
        if self.read_only() { Err(DiskError::ReadOnly) } else { Ok(()) }
    }

    fn host(&self, action: &'static str, source: io::Error) -> DiskError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                DiskError::Full { file: self.name() }
            }
            _ => DiskError::Host { file: self.name(), action, source },
        }
    }
}

fn aligned_memory(memory: &[u8]) -> bool {
    memory.as_ptr().addr().is_multiple_of(DIRECT_ALIGNMENT)
}

/// Memory with `length` aligned bytes in it, and where they begin.
fn bounce_buffer(length: usize) -> (Vec<u8>, usize) {
    let memory = vec![0_u8; length + DIRECT_ALIGNMENT];
    let start = memory.as_ptr().addr().next_multiple_of(DIRECT_ALIGNMENT) - memory.as_ptr().addr();
    (memory, start)
}

fn read_through_bounce(direct: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let length = buffer.len().min(CHUNK);
    let (mut memory, start) = bounce_buffer(length);
    let aligned = memory.get_mut(start..start + length).unwrap_or_default();
    let read = direct.read_at(aligned, offset)?;
    if let (Some(to), Some(from)) = (buffer.get_mut(..read), aligned.get(..read)) {
        to.copy_from_slice(from);
    }
    Ok(read)
}

fn write_through_bounce(direct: &File, offset: u64, data: &[u8]) -> io::Result<usize> {
    let length = data.len().min(CHUNK);
    let (mut memory, start) = bounce_buffer(length);
    let aligned = memory.get_mut(start..start + length).unwrap_or_default();
    if let Some(data) = data.get(..length) {
        aligned.copy_from_slice(data);
    }
    direct.write_at(aligned, offset)
}
