//! The formats of images: their names, how they are told apart, and opening any of them.
//!
//! A format is told by an image's header, except for raw, which has none: its guest can write any
//! header into it. So a file without a known header is refused unless its user says that it is raw,
//! and the format of a backing file is taken from the header that names the file, never from the
//! file.
use crate::qcow2::{BackingName, CreateOptions, Qcow2};
use crate::raw::Raw;
use crate::vdi::{self, Vdi};
use crate::vhd::{self, Vhd};
use crate::vhdx::{self, Vhdx};
use crate::vmdk::Vmdk;
use crate::{Access, Disk, DiskError, FileOptions, ImageFile, Lock, SECTOR};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// Longest chain of backing files.
const MAX_DEPTH: usize = 64;

/// A format of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's.
    Qcow2,
    /// VMware's.
    Vmdk,
    /// VirtualBox's.
    Vdi,
    /// Virtual PC's and Azure's.
    Vhd,
    /// Hyper-V's.
    Vhdx,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 6] =
        [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vdi, Self::Vhd, Self::Vhdx];

    /// The format's name, as in `--format`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        }
    }

    /// The name that headers of qcow2 images have for it, QEMU's.
    #[must_use]
    pub fn name_in_headers(self) -> &'static str {
        match self {
            Self::Vhd => "vpc",
            other => other.name(),
        }
    }

    /// Tells an image's format by its header. What has none is not taken for raw.
    ///
    /// # Errors
    /// [`DiskError::UnknownFormat`], or the host cannot read.
    pub fn detect(file: &ImageFile) -> Result<Self, DiskError> {
        let mut head = [0; 512];
        file.read_or_zero_at(0, &mut head)?;
        let mut tail = [0; 512];
        let tail_at = file.size()?.saturating_sub(512);
        file.read_or_zero_at(tail_at, &mut tail)?;
        let is_vdi = head.get(64..68) == Some(&0xbeda_107f_u32.to_le_bytes());
        let found = match () {
            () if head.starts_with(b"QFI\xfb") => Self::Qcow2,
            () if head.starts_with(b"KDMV") => Self::Vmdk,
            () if head.starts_with(b"# Disk DescriptorFile") => Self::Vmdk,
            () if is_vdi => Self::Vdi,
            () if head.starts_with(b"vhdxfile") => Self::Vhdx,
            // A fixed VHD is a raw disk with this after it.
            () if head.starts_with(b"conectix") || tail.starts_with(b"conectix") => Self::Vhd,
            () => return Err(DiskError::UnknownFormat { file: file.name() }),
        };
        Ok(found)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No format has that name.
#[derive(Debug, thiserror::Error)]
#[error("no image format is called `{0}`; there are raw, qcow2, vmdk, vdi, vhd and vhdx")]
pub struct UnknownFormatName(String);

impl FromStr for Format {
    type Err = UnknownFormatName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|format| {
            name.eq_ignore_ascii_case(format.name())
                || name.eq_ignore_ascii_case(format.name_in_headers())
        });
        known.ok_or_else(|| UnknownFormatName(name.to_owned()))
    }
}

/// What to do with an image that stands on another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Open what its header names, and so on down. Whoever made the image then chooses which files
    /// of this user its guest may read: only for images that are trusted.
    Follow,
    /// Refuse such an image.
    Refuse,
}

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// How to open its own file. Those below it are only ever read.
    pub file: FileOptions,
    /// Whether files below it are opened.
    pub backing: Backing,
}

impl OpenOptions {
    /// To read, on any backing file.
    #[must_use]
    pub fn read() -> Self {
        Self { file: FileOptions::read(), backing: Backing::Follow }
    }

    /// To read and write, alone, on any backing file.
    #[must_use]
    pub fn write() -> Self {
        Self { file: FileOptions::write(), backing: Backing::Follow }
    }
}

/// Opens an image, with the files below it. Without `format` the header decides.
///
/// # Errors
/// [`DiskError::UnknownFormat`] where the header does not say, [`DiskError::Backing`] where a file
/// below cannot be opened, and those of the format.
pub fn open(
    path: &Path,
    format: Option<Format>,
    options: OpenOptions,
) -> Result<Box<dyn Disk>, DiskError> {
    Chain::default().open(path, format, options)
}

/// Opens the file below the image at `path`, to read.
pub(crate) fn open_below(path: &Path, name: &BackingName) -> Result<Arc<dyn Disk>, DiskError> {
    let mut chain = Chain::default();
    chain.enter(path)?;
    chain.open_below(path, name, OpenOptions::read())
}

/// Makes a new image of `size` bytes, rounded up to sectors, which reads as zeroes and grows with
/// what is written, and opens it to write.
///
/// # Errors
/// [`DiskError::Invalid`] where the format cannot hold that, or something of that name is there.
pub fn create(path: &Path, format: Format, size: u64) -> Result<Box<dyn Disk>, DiskError> {
    let options = FileOptions::write();
    let size = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
    match format {
        Format::Raw => Ok(Box::new(Raw::create(path, size, options)?)),
        Format::Qcow2 => {
            Qcow2::create(path, &CreateOptions::new(size), options)?;
            open(path, Some(format), OpenOptions::write())
        }
        Format::Vmdk => Ok(Box::new(Vmdk::create(path, size, options)?)),
        Format::Vdi => Ok(Box::new(Vdi::create(path, size, vdi::Variant::Dynamic, options)?)),
        Format::Vhd => Ok(Box::new(Vhd::create(path, size, vhd::Variant::Dynamic, options)?)),
        Format::Vhdx => {
            let create = vhdx::CreateOptions { variant: vhdx::Variant::Dynamic, block_size: None };
            Ok(Box::new(Vhdx::create(path, size, create, options)?))
        }
    }
}

/// The files of an image and of those that stand on it.
#[derive(Default)]
struct Chain {
    /// Which files they are: device and inode.
    files: Vec<(u64, u64)>,
}

impl Chain {
    fn open(
        mut self,
        path: &Path,
        format: Option<Format>,
        options: OpenOptions,
    ) -> Result<Box<dyn Disk>, DiskError> {
        self.enter(path)?;
        let format = match format {
            Some(format) => format,
            None => {
                let peek = FileOptions { lock: Lock::Ignore, ..FileOptions::read() };
                Format::detect(&ImageFile::open(path, peek)?)?
            }
        };
        match format {
            Format::Raw => Ok(Box::new(Raw::open(path, options.file)?)),
            Format::Qcow2 => {
                let find = |name: &BackingName| self.open_below(path, name, options);
                Ok(Box::new(Qcow2::open(path, options.file, &find)?))
            }
            Format::Vmdk => Ok(Box::new(Vmdk::open(path, options.file)?)),
            Format::Vdi => Ok(Box::new(Vdi::open(ImageFile::open(path, options.file)?)?)),
            Format::Vhd => Ok(Box::new(Vhd::open(ImageFile::open(path, options.file)?)?)),
            Format::Vhdx => Ok(Box::new(Vhdx::open(ImageFile::open(path, options.file)?)?)),
        }
    }

    fn enter(&mut self, path: &Path) -> Result<(), DiskError> {
        let invalid = |problem: &str| DiskError::Invalid {
            file: path.display().to_string(),
            problem: problem.to_owned(),
        };
        if self.files.len() >= MAX_DEPTH {
            return Err(invalid(
                "more than 64 images stand on each other here; convert one of them",
            ));
        }
        // A file that cannot be inspected cannot be opened either, and that says why.
        let Ok(file) = std::fs::metadata(path) else { return Ok(()) };
        let identity = (file.dev(), file.ino());
        if self.files.contains(&identity) {
            return Err(invalid("the chain of backing files comes back to it; it has no content"));
        }
        self.files.push(identity);
        Ok(())
    }

    /// Opens the file below the image at `path`.
    fn open_below(
        &self,
        path: &Path,
        name: &BackingName,
        options: OpenOptions,
    ) -> Result<Arc<dyn Disk>, DiskError> {
        let below = locate(path, name, options.backing)?;
        let (below, format) = below;
        let file = FileOptions { access: Access::Read, ..options.file };
        let chain = Self { files: self.files.clone() };
        match chain.open(&below, Some(format), OpenOptions { file, ..options }) {
            Ok(disk) => Ok(Arc::from(disk)),
            Err(source) => Err(DiskError::Backing {
                file: path.display().to_string(),
                backing: below.display().to_string(),
                source: Box::new(source),
            }),
        }
    }
}

/// Where the file below an image is and what it is, by the name in the image's header.
fn locate(
    path: &Path,
    name: &BackingName,
    policy: Backing,
) -> Result<(PathBuf, Format), DiskError> {
    let invalid =
        |problem: String| DiskError::Invalid { file: path.display().to_string(), problem };
    let shown = name.name.escape_debug();
    if policy == Backing::Refuse {
        return Err(invalid(format!(
            "it stands on {shown}, and only images of their own are accepted here; make one with \
             `bv disk convert`"
        )));
    }
    // "nbd://host", "json:{...}" and the like. A colon after a slash is a part of a path.
    let protocol = name.name.split_once(':').filter(|(before, _)| !before.contains('/'));
    if protocol.is_some() {
        let feature = format!("a backing file that is not a path, {shown}");
        return Err(DiskError::Unsupported { file: path.display().to_string(), feature });
    }
    let Some(format) = &name.format else {
        return Err(invalid(format!(
            "its header does not say which format its backing file {shown} has, and guessing is \
             not safe; set it with `qemu-img rebase -u -b FILE -F FORMAT`"
        )));
    };
    let format = format.parse().map_err(|_| {
        let feature = format!("a backing file of the format \"{}\"", format.escape_debug());
        DiskError::Unsupported { file: path.display().to_string(), feature }
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    Ok((folder.join(&name.name), format))
}
