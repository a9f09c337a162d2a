//! The store: the images that this user has, each a folder that never changes.
//!
//! ```text
//! images/
//!   lock              held by whoever adds or removes
//!   names/debian:12   the id of the image that has this name now
//!   ID/image.toml     what the image is, and the SHA-256 of its files; written last
//!   ID/disk.raw, ID/vmlinuz, ID/initrd.cpio
//!   ID/users/*        paths of the overlays that stand on the image
//!   .partial-*        downloads that go on the next time
//!   .tmp-*            what is being made, or what a killed process left
//! ```
//!
//! The id is made from the content, so a newer image of the same name is another folder and an
//! overlay never finds another disk below it. Everything appears by rename.

mod copy;
mod image;
mod import;
mod name;
mod staging;

use crate::cache;
use rustix::fs::{FlockOperation, flock};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

pub use disk::Format;
pub use image::{Hold, Image};
pub use import::{Boot, Import};
pub(crate) use name::format_name;
pub use name::{Name, NameError};
pub(crate) use staging::{Parts, Staging};

use crate::{Progress, Stage, Step};

/// Names within the store.
const NAMES: &str = "names";
const LOCK: &str = "lock";
/// What is being made begins so.
const TEMPORARY: &str = ".tmp-";
/// Downloads that are not whole begin so.
const PARTIAL: &str = ".partial-";

/// The images that this user has.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
}

/// The right to change the store, until it is dropped or the process ends.
pub(crate) struct Lock {
    _file: File,
}

/// An image as `bv image ls` shows it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its name, if it has one: an image that was replaced by a newer one has none.
    pub name: Option<Name>,
    /// The image.
    pub image: Image,
    /// The overlays that stand on it.
    pub users: Vec<PathBuf>,
    /// What its files take on disk, in bytes.
    pub on_disk: u64,
}

/// What [`Store::prune`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// How many images went.
    pub images: usize,
    /// The bytes that this gave back.
    pub bytes: u64,
}

/// Why the store cannot do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The environment names no place for the store.
    #[error(
        "no folder for images: neither XDG_DATA_HOME nor HOME is an absolute path; set \
         XDG_DATA_HOME to a folder that you may write to"
    )]
    NoFolder,
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is no image of this name here.
    #[error("there is no image {name} here; {}", list_names(.have))]
    NotHere {
        /// What was looked for.
        name: Name,
        /// What there is.
        have: Vec<Name>,
    },
    /// An image has this name already.
    #[error(
        "there is an image {0} already; choose another name, or remove it with `bv image rm {0}`"
    )]
    Exists(Name),
    /// A machine stands on the image.
    #[error("{name} is in use by {}; remove that machine first", name_user(.user.as_deref()))]
    InUse {
        /// The image.
        name: String,
        /// An overlay that stands on it; `None` if a running machine has none of its own.
        user: Option<PathBuf>,
    },
    /// The format of a disk is not known by its content.
    #[error(
        "{}: this is no qcow2, VMDK, VDI, VHD or VHDX image; if it is a raw disk, say so with \
         --format raw", path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// A file that the user named cannot be read.
    #[error("{}: cannot read the file; check its path and rights", path.display())]
    Given {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file system has no room.
    #[error(
        "{}: the disk is full; free about {} MB there (`bv image prune`), or set XDG_DATA_HOME \
         to a folder on another disk", path.display(), needed.div_ceil(1_000_000)
    )]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// About how many bytes are needed.
        needed: u64,
    },
    /// A file or folder refuses.
    #[error("{}: cannot {action}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// An image's record or files are not what was stored.
    #[error(
        "the image {name} is damaged ({fault}); get it again with `bv image pull --update {name}`"
    )]
    Damaged {
        /// The image.
        name: String,
        /// What is wrong.
        fault: String,
    },
}

impl StoreError {
    pub(crate) fn file(path: &Path, action: &'static str, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path, needed: 0 }
            }
            _ => Self::File { path, action, source },
        }
    }
}

impl Store {
    /// Opens the user's store, `$XDG_DATA_HOME/bivisor/images` or
    /// `~/.local/share/bivisor/images` (XDG Base Directory Specification).
    ///
    /// # Errors
    /// Fails where the environment names no folder or the folder cannot be made.
    pub fn open() -> Result<Self, StoreError> {
        let base = base_folder(std::env::var_os("XDG_DATA_HOME"), std::env::var_os("HOME"));
        Self::at(base.ok_or(StoreError::NoFolder)?.join("bivisor/images"))
    }

    /// Opens a store at `path` and makes the folder where it is missing.
    ///
    /// # Errors
    /// Fails where the folder cannot be made.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let path = path.into();
        let names = path.join(NAMES);
        fs::create_dir_all(&names)
            .map_err(|source| StoreError::file(&names, "make the folder", source))?;
        Ok(Self { path })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image that has this name, if there is one.
    ///
    /// # Errors
    /// Fails where the image's record cannot be read, or its files are missing.
    pub fn get(&self, name: &Name) -> Result<Option<Image>, StoreError> {
        let path = self.name_file(name);
        match fs::read_to_string(&path) {
            Ok(id) => Image::load(&self.path.join(id.trim()), &name.to_string()).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::file(&path, "read the file", source)),
        }
    }

    /// All images, by name, and then those without one, but for damaged ones.
    ///
    /// # Errors
    /// Fails where the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let mut listed = Vec::new();
        for id in self.ids()? {
            let name = self.names()?.into_iter().find(|(_, named)| *named == id);
            let name = name.map(|(name, _)| name);
            let Ok(image) = Image::load(&self.path.join(&id), &id) else { continue };
            let (users, on_disk) = (image.users(), image.on_disk());
            listed.push(Listed { name, image, users, on_disk });
        }
        let key = |listed: &Listed| listed.name.as_ref().map(Name::to_string);
        listed.sort_by_key(|listed| (listed.name.is_none(), key(listed)));
        Ok(listed)
    }

    /// What is wrong with the images that are damaged and have a name.
    ///
    /// # Errors
    /// Fails where the folder cannot be read.
    pub fn damaged(&self) -> Result<Vec<StoreError>, StoreError> {
        let names = self.names()?.into_iter();
        Ok(names.filter_map(|(name, _)| self.get(&name).err()).collect())
    }

    /// Removes an image, and says how many bytes that gave back.
    ///
    /// # Errors
    /// Fails where there is none of this name, or a machine stands on it.
    pub fn remove(&self, name: &Name, progress: &mut dyn Progress) -> Result<u64, StoreError> {
        let lock = self.lock(progress)?;
        let path = self.name_file(name);
        let Ok(id) = fs::read_to_string(&path) else {
            let have = self.names()?.into_iter().map(|(name, _)| name).collect();
            return Err(StoreError::NotHere { name: name.clone(), have });
        };
        let bytes = self.remove_folder(&lock, id.trim(), &name.to_string())?;
        fs::remove_file(&path)
            .map_err(|source| StoreError::file(&path, "remove the file", source))?;
        Ok(bytes)
    }

    /// Removes what killed processes left and the images that have no name and no user; with
    /// `all`, those with a name and no user too.
    ///
    /// # Errors
    /// Fails where something cannot be removed.
    pub fn prune(&self, all: bool, progress: &mut dyn Progress) -> Result<Pruned, StoreError> {
        let lock = self.lock(progress)?;
        let left = self.sweep(&lock)?.saturating_add(self.drop_partial(&lock)?);
        let mut pruned = Pruned { images: 0, bytes: left };
        let names = self.names()?;
        for id in self.ids()? {
            let name = names.iter().find(|(_, named)| *named == id).map(|(name, _)| name);
            if name.is_some() && !all {
                continue;
            }
            match self.remove_folder(&lock, &id, &id) {
                Ok(bytes) => {
                    pruned.images += 1;
                    pruned.bytes += bytes;
                }
                Err(StoreError::InUse { .. }) => continue,
                Err(error) => return Err(error),
            }
            if let Some(name) = name {
                let path = self.name_file(name);
                fs::remove_file(&path)
                    .map_err(|source| StoreError::file(&path, "remove the file", source))?;
            }
        }
        Ok(pruned)
    }

    /// Waits until no other process changes the store, and keeps others out.
    pub(crate) fn lock(&self, progress: &mut dyn Progress) -> Result<Lock, StoreError> {
        let path = self.path.join(LOCK);
        let failed = |source| StoreError::file(&path, "lock the store", source);
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress.report(&Step { stage: Stage::Waiting, done: 0, total: None });
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
                .map_err(|errno| failed(errno.into()))?;
        }
        Ok(Lock { _file: file })
    }

    /// Gives an image its name. An image that had it before is removed, or loses its name where
    /// a machine stands on it.
    pub(crate) fn set_name(&self, lock: &Lock, name: &Name, id: &str) -> Result<(), StoreError> {
        let path = self.name_file(name);
        let before = fs::read_to_string(&path).ok();
        cache::atomically(&self.path.join(NAMES), &name.to_string(), id.as_bytes())
            .map_err(|source| StoreError::file(&path, "write the file", source))?;
        let named = |id: &str| self.names().is_ok_and(|names| names.iter().any(|(_, n)| n == id));
        match before.as_deref().map(str::trim) {
            Some(before) if before != id && !named(before) => {
                match self.remove_folder(lock, before, before) {
                    Ok(_) | Err(StoreError::InUse { .. }) => Ok(()),
                    Err(error) => Err(error),
                }
            }
            _ => Ok(()),
        }
    }

    /// Removes what killed processes left half made. The lock proves that none is at work.
    pub(crate) fn sweep(&self, _lock: &Lock) -> Result<u64, StoreError> {
        let mut bytes = 0;
        for name in self.folders()?.into_iter().filter(|name| name.starts_with(TEMPORARY)) {
            let path = self.path.join(name);
            bytes += image::size_on_disk(&path);
            fs::remove_dir_all(&path)
                .map_err(|source| StoreError::file(&path, "remove the folder", source))?;
        }
        Ok(bytes)
    }

    /// Where a download is, until it is whole and verified.
    pub(crate) fn partial(&self, sha512: &str) -> PathBuf {
        let start: String = sha512.chars().take(32).collect();
        self.path.join(format!("{PARTIAL}{start}"))
    }

    /// Removes downloads that were cut off.
    fn drop_partial(&self, _lock: &Lock) -> Result<u64, StoreError> {
        let failed = |path: &Path, source| StoreError::file(path, "remove the file", source);
        let entries = fs::read_dir(&self.path).map_err(|source| failed(&self.path, source))?;
        let mut bytes = 0;
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
                bytes += entry.metadata().map_or(0, |file| file.len());
                fs::remove_file(entry.path()).map_err(|source| failed(&entry.path(), source))?;
            }
        }
        Ok(bytes)
    }

    /// The bytes that the store's file system has free for this user, where it says so.
    pub(crate) fn free_space(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.path).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }

    fn remove_folder(&self, _lock: &Lock, id: &str, called: &str) -> Result<u64, StoreError> {
        let path = self.path.join(id);
        // What cannot be loaded can have no machine that started with it.
        let image = Image::load(&path, called).ok();
        let _exclusive = image.as_ref().map(|image| image.claim(called)).transpose()?;
        let bytes = image::size_on_disk(&path);
        // First out of sight, so that a removal that is cut off leaves no half image.
        let grave = self.path.join(format!("{TEMPORARY}removed-{id}"));
        match fs::rename(&path, &grave).and_then(|()| fs::remove_dir_all(&grave)) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(source) => Err(StoreError::file(&path, "remove the folder", source)),
        }
    }

    fn name_file(&self, name: &Name) -> PathBuf {
        self.path.join(NAMES).join(name.to_string())
    }

    /// The names with the ids of their images.
    fn names(&self) -> Result<Vec<(Name, String)>, StoreError> {
        let folder = self.path.join(NAMES);
        let entries = fs::read_dir(&folder)
            .map_err(|source| StoreError::file(&folder, "read the folder", source))?;
        let name = |entry: fs::DirEntry| {
            let name = entry.file_name().to_str()?.parse().ok()?;
            Some((name, fs::read_to_string(entry.path()).ok()?.trim().to_owned()))
        };
        Ok(entries.flatten().filter_map(name).collect())
    }

    fn ids(&self) -> Result<Vec<String>, StoreError> {
        let mut ids = self.folders()?;
        ids.retain(|name| name != NAMES && !name.starts_with('.'));
        Ok(ids)
    }

    fn folders(&self) -> Result<Vec<String>, StoreError> {
        let entries = fs::read_dir(&self.path)
            .map_err(|source| StoreError::file(&self.path, "read the folder", source))?;
        let folders = entries.flatten().filter(|entry| entry.path().is_dir());
        Ok(folders.filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }
}

/// The XDG rule: an absolute `XDG_DATA_HOME`, or else `.local/share` in the home folder.
fn base_folder(xdg: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let absolute = |value: OsString| Some(PathBuf::from(value)).filter(|path| path.is_absolute());
    xdg.and_then(absolute).or_else(|| Some(home.and_then(absolute)?.join(".local/share")))
}

fn list_names(names: &[Name]) -> String {
    let names: Vec<String> = names.iter().map(Name::to_string).collect();
    match names.as_slice() {
        [] => "there are no images yet; `bv image ls --available` shows what can be had".to_owned(),
        names => format!("there are {}", names.join(", ")),
    }
}

fn name_user(path: Option<&Path>) -> String {
    path.map_or_else(|| "a running machine".to_owned(), |path| path.display().to_string())
}

#[cfg(test)]
mod tests;
