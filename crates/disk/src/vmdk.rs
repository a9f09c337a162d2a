//! VMDK, VMware's format.
//!
//! "Virtual Disk Format 5.0" (VMware, 2011). A descriptor (`descriptor`), in the image's file or
//! beside its data, names the extents that make up the disk: flat ones are a part of the disk as it
//! is, sparse ones (`header`, `sparse`) keep it in grains, stream-optimised ones (`stream`) keep
//! compressed grains and are only read. Delta disks, which need a parent, are refused.
//!
//! A descriptor is hostile as all of an image: the files it names are looked for in its own folder
//! only.
mod descriptor;
mod header;
mod sparse;
mod stream;

use crate::blocks::{self, Clear};
use crate::create::{check_size, new_file, random_id};
use crate::store::{Complain, Store};
use crate::{Disk, DiskError, Extent, ExtentKind, FileOptions, ImageFile, SECTOR, check_range};
use descriptor::{Descriptor, ExtentKind as Kind, ExtentLine, MAX_LENGTH, new_text};
use header::{DESCRIPTOR, DESCRIPTOR_LENGTH, GRAIN, Header, MAGIC, TABLE_ENTRIES};
use sparse::Sparse;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use stream::Stream;

pub use descriptor::Variant;
pub use stream::write_stream;

/// How a text descriptor starts.
const TEXT: &[u8] = b"# Disk DescriptorFile";

/// How an extent keeps its part of the disk.
enum Content {
    Zero,
    Flat { store: Arc<dyn Store>, offset: u64 },
    Sparse(Sparse),
    Stream(Stream),
}

/// A part of the disk. Places and lengths in bytes.
struct Part {
    start: u64,
    length: u64,
    content: Content,
}

/// An open VMDK image.
pub struct Vmdk {
    variant: Variant,
    parts: Vec<Part>,
    size: u64,
    read_only: bool,
    /// What the descriptor is in.
    descriptor: Arc<dyn Store>,
    /// Where the digits of the content identifier are, and how many there are.
    content_id: Option<(u64, usize)>,
    /// Whether the content identifier has changed since the image was opened.
    changed: AtomicBool,
}

/// Opens an extent's file by the name in the descriptor.
pub type FindExtent<'a> = &'a dyn Fn(&str) -> Result<Arc<dyn Store>, DiskError>;

impl Vmdk {
    /// Opens an image, with the files of its extents, which have to be in the same folder.
    ///
    /// # Errors
    /// As [`Vmdk::open_with`].
    pub fn open(path: &Path, options: FileOptions) -> Result<Self, DiskError> {
        let file = ImageFile::open(path, options)?;
        let find = |name: &str| -> Result<Arc<dyn Store>, DiskError> {
            Ok(Arc::new(ImageFile::open(&confine(path, name)?, options)?))
        };
        Self::open_with(Arc::new(file), &find)
    }

    /// Opens an image. `find` opens the files of its extents, if they are not in the first one.
    /// Stream-optimised images are read-only even where the store is not.
    ///
    /// # Errors
    /// [`DiskError::NotThisFormat`], [`DiskError::Unsupported`] for delta disks and the kinds of
    /// images that are not in [`Variant`], [`DiskError::Damaged`], [`DiskError::Invalid`] where an
    /// extent is not in the image's folder, or the host cannot read.
    pub fn open_with(store: Arc<dyn Store>, find: FindExtent<'_>) -> Result<Self, DiskError> {
        let mut head = vec![0; TEXT.len()];
        store.read_or_zero_at(0, &mut head)?;
        if head.starts_with(MAGIC) {
            Self::open_monolithic(store)
        } else if head.eq_ignore_ascii_case(TEXT) {
            Self::open_text(store, find)
        } else if head.starts_with(b"COWD") {
            Err(store.unsupported("extents of the kind VMFSSPARSE".to_owned()))
        } else {
            Err(DiskError::NotThisFormat { file: store.name(), format: "VMDK" })
        }
    }

    /// Opens an image of one file, with the descriptor in it.
    fn open_monolithic(store: Arc<dyn Store>) -> Result<Self, DiskError> {
        let header = Header::read(&*store)?;
        let length = header.descriptor_length.min(MAX_LENGTH);
        let mut text = vec![0; usize::try_from(length).unwrap_or_default()];
        store.read_or_zero_at(header.descriptor, &mut text)?;
        if text.iter().all(|byte| *byte == 0) {
            let problem = "it has no descriptor, so it is a part of an image; open the file that \
                           names its parts"
                .to_owned();
            return Err(DiskError::Invalid { file: store.name(), problem });
        }
        let descriptor = Descriptor::parse(&text, &*store)?;
        let [ExtentLine { writable, kind: Kind::Sparse { .. }, .. }] = descriptor.extents[..]
        else {
            let what = "its descriptor names other extents than the file itself".to_owned();
            return Err(store.damaged(what));
        };
        let (size, at) = (header.size, header.descriptor);
        let content = open_sparse(Arc::clone(&store), header)?;
        let parts = vec![Part { start: 0, length: size, content }];
        let content_id = descriptor.content_id.map(|(place, digits)| (at + place, digits));
        Ok(Self::assemble(store, descriptor.variant, parts, content_id, writable))
    }

    /// Opens an image whose descriptor is a file of its own.
    fn open_text(store: Arc<dyn Store>, find: FindExtent<'_>) -> Result<Self, DiskError> {
        let length = store.size()?;
        if length > MAX_LENGTH {
            return Err(store.damaged(format!("its descriptor has {length} bytes")));
        }
        let mut text = vec![0; usize::try_from(length).unwrap_or_default()];
        store.read_at(0, &mut text)?;
        let descriptor = Descriptor::parse(&text, &*store)?;
        let (mut parts, mut start) = (Vec::new(), 0);
        let mut writable = true;
        for line in &descriptor.extents {
            let length = line.sectors * SECTOR;
            parts.push(Part { start, length, content: open_extent(&*store, line, find)? });
            writable &= line.writable;
            start += length;
        }
        Ok(Self::assemble(store, descriptor.variant, parts, descriptor.content_id, writable))
    }

    fn assemble(
        descriptor: Arc<dyn Store>,
        variant: Variant,
        parts: Vec<Part>,
        content_id: Option<(u64, usize)>,
        writable: bool,
    ) -> Self {
        let fixed = parts.iter().any(|part| match &part.content {
            // What has no place to write to.
            Content::Stream(_) | Content::Zero => true,
            Content::Sparse(sparse) => sparse.is_fixed(),
            Content::Flat { .. } => false,
        });
        Self {
            variant,
            size: parts.last().map_or(0, |part| part.start + part.length),
            read_only: descriptor.read_only() || fixed || !writable,
            parts,
            descriptor,
            content_id,
            changed: AtomicBool::new(false),
        }
    }

    /// Makes a new image of `size` bytes in one file that grows (`monolithicSparse`), which reads
    /// as zeroes, and opens it to write.
    ///
    /// # Errors
    /// [`DiskError::Invalid`] for a size that the format does not have (at most 2047 GiB) or a file
    /// that exists, or the host cannot write.
    pub fn create(path: &Path, size: u64, options: FileOptions) -> Result<Self, DiskError> {
        new_file(path, options, |file| Self::create_in(Arc::new(file), size))
    }

    /// Makes a new image of an empty store, as [`Vmdk::create`] does of a file.
    ///
    /// # Errors
    /// As [`Vmdk::create`].
    pub fn create_in(store: Arc<dyn Store>, size: u64) -> Result<Self, DiskError> {
        check_size(&store.name(), size, stream::MAX_SIZE)?;
        lay_out(&*store, size)?;
        Self::open_monolithic(store)
    }

    /// What kind of image it is.
    #[must_use]
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// The part with a byte of the disk.
    fn part(&self, offset: u64) -> Option<&Part> {
        let index = self.parts.partition_point(|part| part.start + part.length <= offset);
        self.parts.get(index)
    }

    /// Calls `each` with the pieces of a range, each within a part: the part, the offset within it,
    /// and how much was done before, and its length.
    fn pieces(
        &self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(&Part, u64, u64, u64) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let mut done = 0;
        while done < length {
            let Some(part) = self.part(offset + done) else { return Ok(()) };
            let within = offset + done - part.start;
            let now = (length - done).min(part.length - within);
            each(part, within, done, now)?;
            done += now;
        }
        Ok(())
    }

    /// Refuses a change that cannot be; before the first one that can, gives the content another
    /// identifier, by which delta disks see that they no longer fit.
    fn before_change(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        check_range(offset, length, self.size)?;
        if self.changed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let Some((place, digits)) = self.content_id else { return Ok(()) };
        let id = format!("{:08x}", crate::bytes::le32(&random_id()?, 0));
        let id = id.get(..digits).unwrap_or_default();
        let done = self.descriptor.write_at(place, id.as_bytes());
        if done.is_err() {
            self.changed.store(false, Ordering::Release);
        }
        done
    }

    fn clear(&self, offset: u64, length: u64, how: Clear) -> Result<(), DiskError> {
        self.before_change(offset, length)?;
        self.pieces(offset, length, |part, within, _, now| match &part.content {
            Content::Zero => Ok(()),
            Content::Stream(_) => Err(DiskError::ReadOnly),
            Content::Sparse(sparse) => blocks::clear(sparse, within, now, how),
            Content::Flat { store, offset } if how == Clear::Discard => {
                store.discard(offset + within, now)
            }
            Content::Flat { store, offset } => store.write_zeroes(offset + within, now),
        })
    }
}

impl Disk for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let length = buffer.len() as u64;
        check_range(offset, length, self.size)?;
        self.pieces(offset, length, |part, within, done, now| {
            let range = usize::try_from(done).ok().zip(usize::try_from(done + now).ok());
            let buffer = range.and_then(|(start, end)| buffer.get_mut(start..end));
            let buffer = buffer.unwrap_or_default();
            match &part.content {
                Content::Zero => buffer.fill(0),
                Content::Flat { store, offset } => store.read_at(offset + within, buffer)?,
                Content::Sparse(sparse) => blocks::read(sparse, within, buffer)?,
                Content::Stream(stream) => stream.read(within, buffer)?,
            }
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.before_change(offset, data.len() as u64)?;
        self.pieces(offset, data.len() as u64, |part, within, done, now| {
            let range = usize::try_from(done).ok().zip(usize::try_from(done + now).ok());
            let data = range.and_then(|(start, end)| data.get(start..end)).unwrap_or_default();
            match &part.content {
                Content::Stream(_) | Content::Zero => Err(DiskError::ReadOnly),
                Content::Flat { store, offset } => store.write_at(offset + within, data),
                Content::Sparse(sparse) => blocks::write(sparse, within, data),
            }
        })
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        for part in &self.parts {
            match &part.content {
                Content::Zero | Content::Stream(_) => {}
                Content::Flat { store, .. } => store.sync()?,
                Content::Sparse(sparse) => sparse.write_back()?,
            }
        }
        self.descriptor.sync()
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.clear(offset, length, Clear::Discard)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.clear(offset, length, Clear::Zero)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        check_range(offset, length, self.size)?;
        let Some(part) = self.part(offset).filter(|_| length > 0) else {
            return Ok(Extent { kind: ExtentKind::Zero, length: 0 });
        };
        let within = offset - part.start;
        let length = length.min(part.length - within);
        match &part.content {
            Content::Zero => Ok(Extent { kind: ExtentKind::Zero, length }),
            Content::Flat { store, offset } => store.extent(offset + within, length),
            Content::Sparse(sparse) => blocks::extent(sparse, within, length),
            Content::Stream(stream) => stream.extent(within, length),
        }
    }
}

blocks::flush_when_closed!(Vmdk);

fn open_sparse(store: Arc<dyn Store>, header: Header) -> Result<Content, DiskError> {
    let sparse = Sparse::open(Box::new(store), header)?;
    let compressed = sparse.header().compressed;
    Ok(if compressed { Content::Stream(Stream::new(sparse)) } else { Content::Sparse(sparse) })
}

/// Opens an extent that `image`'s descriptor names.
fn open_extent(
    image: &dyn Store,
    line: &ExtentLine,
    find: FindExtent<'_>,
) -> Result<Content, DiskError> {
    let length = line.sectors * SECTOR;
    match &line.kind {
        Kind::Zero => Ok(Content::Zero),
        Kind::Flat { file, offset } => {
            let store = find(file)?;
            let there = store.size()?;
            if offset.checked_add(length).is_none_or(|end| end > there) {
                let what =
                    format!("it has {there} bytes, of which an image wants {length} at {offset}");
                return Err(store.damaged(what));
            }
            Ok(Content::Flat { store, offset: *offset })
        }
        Kind::Sparse { file } => {
            let store = find(file)?;
            let header = Header::read(&*store)?;
            if header.size != length {
                let what = format!("{file:?} has {} bytes of the {length} there", header.size);
                return Err(image.damaged(what));
            }
            open_sparse(store, header)
        }
    }
}

/// The path of a file that the descriptor at `path` names: in the descriptor's own folder, whatever
/// links there are.
fn confine(path: &Path, name: &str) -> Result<PathBuf, DiskError> {
    let refuse = |why: &str| DiskError::Invalid {
        file: path.display().to_string(),
        problem: format!(
            "it wants {name:?}, {why}; move the image's files into one folder, and take the folder \
             off the names in its descriptor"
        ),
    };
    let host =
        |action| move |source| DiskError::Host { file: path.display().to_string(), action, source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder =
        folder.unwrap_or(Path::new(".")).canonicalize().map_err(host("find its folder"))?;
    let wanted = Path::new(name);
    let file = match wanted.file_name() {
        Some(file) if wanted.is_absolute() && wanted.parent() == Some(&*folder) => file,
        Some(file) if wanted.components().eq([Component::Normal(file)]) => file,
        _ => return Err(refuse("which is not in its folder")),
    };
    let extent = folder.join(file);
    let real = match extent.canonicalize() {
        Ok(real) => real,
        Err(source) => {
            let file = extent.display().to_string();
            return Err(DiskError::Host { file, action: "find this part of an image", source });
        }
    };
    if real.parent() != Some(&*folder) {
        return Err(refuse("which is a link to another folder"));
    }
    Ok(real)
}

/// Writes all of a new image but its grains.
fn lay_out(store: &dyn Store, size: u64) -> Result<(), DiskError> {
    let sectors = size / SECTOR;
    let tables = sectors.div_ceil(GRAIN * TABLE_ENTRIES);
    let (directory_length, table_length) =
        ((tables * 4).div_ceil(SECTOR), TABLE_ENTRIES * 4 / SECTOR);
    let redundant = DESCRIPTOR + DESCRIPTOR_LENGTH;
    let directory = redundant + directory_length + tables * table_length;
    let end = directory + directory_length + tables * table_length;
    let overhead = end.next_multiple_of(GRAIN);
    store.set_size(overhead * SECTOR)?;
    for at in [redundant, directory] {
        let first = at + directory_length;
        let entry = |table| u32::try_from(first + table * table_length).unwrap_or(u32::MAX);
        let bytes: Vec<u8> = (0..tables).flat_map(|table| entry(table).to_le_bytes()).collect();
        store.write_at(at * SECTOR, &bytes)?;
    }
    let path = store.name();
    let name = path.rsplit('/').next().unwrap_or_default();
    let id = crate::bytes::le32(&random_id()?, 0);
    let text = new_text(Variant::MonolithicSparse, sectors, name, id);
    store.write_at(DESCRIPTOR * SECTOR, text.as_bytes())?;
    store.sync()?;
    // Last, so that a file without it is no image yet.
    store.write_at(0, &Header::sparse_bytes(sectors, directory, redundant, overhead))?;
    store.sync()
}
