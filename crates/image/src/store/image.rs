//! One image of the store: its record, its files, and who stands on it.

use super::{Format, StoreError, format_name};
use crate::cache;
use crate::manifest::sha256;
use crate::seed::SeedReader;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The record's file name.
pub(super) const RECORD: &str = "image.toml";
pub(super) const KERNEL: &str = "vmlinuz";
pub(super) const INITRD: &str = "initrd.cpio";
const USERS: &str = "users";
/// The version of the record's form.
const FORM: u32 = 1;
/// The longest record that is read.
const LONGEST: u64 = 64 << 10;

/// An image, whose files never change.
#[derive(Clone, Debug)]
pub struct Image {
    folder: PathBuf,
    record: Record,
}

/// What is stored about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    form: u32,
    pub description: String,
    #[serde(with = "format_name")]
    pub format: Format,
    pub disk: Sum,
    pub kernel: Option<Sum>,
    pub initrd: Option<Sum>,
    pub cmdline: Option<String>,
    /// The digest of the recipe that it was built by.
    pub recipe: Option<String>,
    /// Whether the initramfs reads the quick seed.
    pub quick_seed: bool,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sum {
    pub bytes: u64,
    pub sha256: String,
}

/// Keeps an image from being removed, as long as it lives.
#[derive(Debug)]
pub struct Hold {
    _file: File,
}

impl Record {
    pub fn new(description: String, format: Format, disk: Sum) -> Self {
        Self {
            form: FORM,
            description,
            format,
            disk,
            kernel: None,
            initrd: None,
            cmdline: None,
            recipe: None,
            quick_seed: false,
        }
    }

    /// As it is written. An id is made from this.
    pub fn text(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}

impl Sum {
    pub fn of(content: &[u8]) -> Self {
        Self { bytes: content.len() as u64, sha256: sha256(content) }
    }
}

impl Image {
    /// Reads the image in `folder`, and looks that its files are there in their sizes. `called`
    /// is what the user calls it.
    pub(super) fn load(folder: &Path, called: &str) -> Result<Self, StoreError> {
        let damaged = |fault: String| StoreError::Damaged { name: called.to_owned(), fault };
        let path = folder.join(RECORD);
        let size = fs::metadata(&path).map_err(|error| damaged(format!("{RECORD}: {error}")))?;
        if size.len() > LONGEST {
            return Err(damaged(format!("{RECORD} is too long")));
        }
        let text = fs::read_to_string(&path).map_err(|error| damaged(error.to_string()))?;
        let record: Record =
            toml::from_str(&text).map_err(|error| damaged(error.message().to_owned()))?;
        if record.form != FORM {
            return Err(damaged(format!("it is of form {}, not {FORM}", record.form)));
        }
        let image = Self { folder: folder.to_path_buf(), record };
        for (path, sum) in image.files() {
            let size = fs::metadata(&path).map(|file| file.len());
            if size.ok() != Some(sum.bytes) {
                return Err(damaged(format!("{} is not whole", path.display())));
            }
        }
        Ok(image)
    }

    /// What tells it from all other images.
    #[must_use]
    pub fn id(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it is, in a few words, with versions.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.record.description
    }

    /// The disk. Nothing may write to it: a machine writes to an overlay on it.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.folder.join(format!("disk.{}", self.record.format))
    }

    /// The disk's format.
    #[must_use]
    pub fn format(&self) -> Format {
        self.record.format
    }

    /// The kernel to boot it with, if it came with one.
    #[must_use]
    pub fn kernel(&self) -> Option<PathBuf> {
        self.record.kernel.as_ref().map(|_| self.folder.join(KERNEL))
    }

    /// The kernel's initial RAM disk, if it came with one.
    #[must_use]
    pub fn initrd(&self) -> Option<PathBuf> {
        self.record.initrd.as_ref().map(|_| self.folder.join(INITRD))
    }

    /// The kernel's command line, which names the root file system. The console is not in it.
    #[must_use]
    pub fn cmdline(&self) -> Option<&str> {
        self.record.cmdline.as_deref()
    }

    /// The digest of the recipe that it was built by, if it was built ([`crate::Recipe::digest`]).
    #[must_use]
    pub fn recipe(&self) -> Option<&str> {
        self.record.recipe.as_deref()
    }

    /// How it can be told things.
    #[must_use]
    pub fn seed_reader(&self) -> SeedReader {
        if self.record.quick_seed { SeedReader::Bivisor } else { SeedReader::CloudInit }
    }

    /// When it was made or imported, where the file system says so.
    #[must_use]
    pub fn made(&self) -> Option<SystemTime> {
        fs::metadata(self.folder.join(RECORD)).ok()?.modified().ok()
    }

    /// Keeps the image from being removed, as a running machine must.
    ///
    /// # Errors
    /// Fails where the image was removed in the meantime.
    pub fn hold(&self) -> Result<Hold, StoreError> {
        let path = self.folder.join(RECORD);
        let failed = |source| StoreError::file(&path, "open the file", source);
        let file = File::open(&path).map_err(failed)?;
        flock(&file, FlockOperation::NonBlockingLockShared)
            .map_err(|errno| StoreError::file(&path, "keep the image", errno.into()))?;
        // It may have gone between opening and locking.
        fs::metadata(&path).map_err(failed)?;
        Ok(Hold { _file: file })
    }

    /// Records that an overlay stands on the image, so that it stays as long as the overlay does.
    ///
    /// # Errors
    /// Fails where that cannot be written.
    pub fn attach(&self, overlay: &Path) -> Result<(), StoreError> {
        let failed = |path: &Path, source| StoreError::file(path, "record the overlay", source);
        let overlay = std::path::absolute(overlay).map_err(|source| failed(overlay, source))?;
        let text = overlay.as_os_str().as_encoded_bytes();
        let folder = self.folder.join(USERS);
        fs::create_dir_all(&folder).map_err(|source| failed(&folder, source))?;
        cache::atomically(&folder, &sha256(text), text)
            .map(drop)
            .map_err(|source| failed(&folder, source))
    }

    /// The overlays that stand on it: those recorded that are still there.
    #[must_use]
    pub fn users(&self) -> Vec<PathBuf> {
        use std::os::unix::ffi::OsStringExt;
        let Ok(entries) = fs::read_dir(self.folder.join(USERS)) else { return Vec::new() };
        let path = |entry: fs::DirEntry| {
            let path = std::ffi::OsString::from_vec(fs::read(entry.path()).ok()?);
            Some(PathBuf::from(path)).filter(|path| path.exists())
        };
        let mut users: Vec<PathBuf> = entries.flatten().filter_map(path).collect();
        users.sort();
        users
    }

    /// The right to remove it, which nobody has while a machine stands on it.
    pub(super) fn claim(&self, called: &str) -> Result<Hold, StoreError> {
        let in_use = |user| StoreError::InUse { name: called.to_owned(), user };
        if let Some(user) = self.users().into_iter().next() {
            return Err(in_use(Some(user)));
        }
        let path = self.folder.join(RECORD);
        let file =
            File::open(&path).map_err(|source| StoreError::file(&path, "open it", source))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| in_use(None))?;
        Ok(Hold { _file: file })
    }

    /// Whether each file is what was stored. This reads them all.
    pub(crate) fn is_whole(&self) -> bool {
        self.files()
            .into_iter()
            .all(|(path, sum)| super::copy::sum(&path).is_ok_and(|found| found == *sum))
    }

    /// What its files take on disk, in bytes.
    pub(super) fn on_disk(&self) -> u64 {
        size_on_disk(&self.folder)
    }

    fn files(&self) -> Vec<(PathBuf, &Sum)> {
        let disk = Some((self.disk(), &self.record.disk));
        let kernel = self.record.kernel.as_ref().map(|sum| (self.folder.join(KERNEL), sum));
        let initrd = self.record.initrd.as_ref().map(|sum| (self.folder.join(INITRD), sum));
        [disk, kernel, initrd].into_iter().flatten().collect()
    }
}

/// What the files of a folder take on disk, in bytes.
pub(super) fn size_on_disk(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let files = entries.flatten().filter_map(|entry| entry.metadata().ok());
    // In units of 512 bytes, whatever the file system's blocks are (stat(2)).
    files.filter(fs::Metadata::is_file).map(|file| file.blocks() * 512).sum()
}
