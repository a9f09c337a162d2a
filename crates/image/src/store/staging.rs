//! An image that is being made: a folder out of sight, that ends as an image or goes.

use super::image::{INITRD, KERNEL, RECORD, Record, Sum};
use super::{Format, Image, Lock, Name, Store, StoreError, TEMPORARY, copy};
use crate::manifest::sha256;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Hexadecimal digits of an id.
const ID: usize = 12;

/// An image that is being made. Dropped before [`Staging::finish`], it leaves nothing.
pub(crate) struct Staging<'a> {
    store: &'a Store,
    lock: &'a Lock,
    folder: PathBuf,
}

/// What an image is made of, beside its disk.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub kernel: Option<Vec<u8>>,
    pub initrd: Option<Vec<u8>>,
    pub cmdline: Option<String>,
    pub recipe: Option<String>,
    pub quick_seed: bool,
}

impl<'a> Staging<'a> {
    /// Begins one, after what killed processes left is gone.
    pub fn new(store: &'a Store, lock: &'a Lock) -> Result<Self, StoreError> {
        store.sweep(lock)?;
        let folder = store.path.join(format!("{TEMPORARY}{}", std::process::id()));
        fs::create_dir(&folder)
            .map_err(|source| StoreError::file(&folder, "make the folder", source))?;
        Ok(Self { store, lock, folder })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes the disk's file, empty.
    pub fn disk(&self, format: Format) -> Result<File, StoreError> {
        let path = self.disk_path(format);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path);
        file.map_err(|source| StoreError::file(&path, "make the file", source))
    }

    /// The error for something that failed on the disk's file.
    pub fn disk_error(&self, format: Format, needed: u64, source: io::Error) -> StoreError {
        match StoreError::file(&self.disk_path(format), "write the disk", source) {
            StoreError::DiskFull { path, .. } => StoreError::DiskFull { path, needed },
            error => error,
        }
    }

    /// Makes the image of what is in the folder, and gives it its name. `sum` is the disk's, if
    /// that is known already.
    pub fn finish(
        self,
        name: &Name,
        description: String,
        format: Format,
        sum: Option<Sum>,
        parts: Parts,
    ) -> Result<Image, StoreError> {
        let path = self.disk_path(format);
        let failed = |source| StoreError::file(&path, "read the disk", source);
        let sum = sum.map_or_else(|| copy::sum(&path), Ok).map_err(failed)?;
        let mut record = Record::new(description, format, sum);
        record.cmdline = parts.cmdline;
        record.recipe = parts.recipe;
        record.quick_seed = parts.quick_seed;
        record.kernel = parts.kernel.map(|kernel| self.write(KERNEL, &kernel)).transpose()?;
        record.initrd = parts.initrd.map(|initrd| self.write(INITRD, &initrd)).transpose()?;
        let text = record.text().map_err(|error| {
            StoreError::file(&path, "describe the image", io::Error::other(error))
        })?;
        self.write(RECORD, text.as_bytes())?;
        self.seal(&path)?;
        let id: String = sha256(text.as_bytes()).chars().take(ID).collect();
        self.place(&id)?;
        self.store.set_name(self.lock, name, &id)?;
        Image::load(&self.store.path.join(id), &name.to_string())
    }

    /// Writes a file that is durable before the image appears.
    fn write(&self, name: &str, content: &[u8]) -> Result<Sum, StoreError> {
        let path = self.folder.join(name);
        fs::write(&path, content)
            .map_err(|source| StoreError::file(&path, "write the file", source))?;
        self.seal(&path)?;
        Ok(Sum::of(content))
    }

    /// Makes a file durable, and read-only so that no mistake changes what overlays stand on.
    fn seal(&self, path: &Path) -> Result<(), StoreError> {
        let sealed = File::open(path).and_then(|file| {
            file.sync_all()?;
            file.set_permissions(Permissions::from_mode(0o444))
        });
        sealed.map_err(|source| StoreError::file(path, "write the file", source))
    }

    /// Moves the folder to its place. Where that is taken, the same image is there already.
    fn place(&self, id: &str) -> Result<(), StoreError> {
        let place = self.store.path.join(id);
        if Image::load(&place, id).is_ok_and(|image| image.is_whole()) {
            return Ok(());
        }
        self.store.remove_folder(self.lock, id, id)?;
        let moved = fs::rename(&self.folder, &place)
            .and_then(|()| File::open(&self.store.path)?.sync_all());
        moved.map_err(|source| StoreError::file(&place, "put the image there", source))
    }

    fn disk_path(&self, format: Format) -> PathBuf {
        self.folder.join(format!("disk.{format}"))
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        // Gone if it became an image; what cannot be removed goes with the next sweep.
        let _ = fs::remove_dir_all(&self.folder);
    }
}
