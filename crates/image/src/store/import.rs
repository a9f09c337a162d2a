//! Images that the user brings.

use super::copy;
use super::{Format, Image, Name, Parts, Staging, Store, StoreError};
use crate::{Progress, Stage, Step};
use disk::{DiskError, FileOptions, ImageFile, Lock};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// An image that the user brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// The disk.
    pub disk: PathBuf,
    /// Its format, which raw disks need.
    pub format: Option<Format>,
    /// What to boot it with, if it cannot boot itself.
    pub boot: Option<Boot>,
}

/// What boots a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line, which names the root file system.
    pub cmdline: String,
}

impl Store {
    /// Copies a disk into the store under a new name.
    ///
    /// # Errors
    /// Fails where the name is taken, the format is not known, or the copy cannot be made.
    pub fn import(
        &self,
        import: &Import,
        name: &Name,
        progress: &mut dyn Progress,
    ) -> Result<Image, StoreError> {
        let path = &import.disk;
        let failed = |source| StoreError::Given { path: path.clone(), source };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::other("it is not a file")));
        }
        let detected = detect(path).map_err(failed)?;
        let format = import.format.or(detected);
        let format = format.ok_or_else(|| StoreError::Format { path: path.clone() })?;
        let parts = import.boot.as_ref().map_or_else(|| Ok(Parts::default()), Boot::parts)?;

        let lock = self.lock(progress)?;
        // No file is there: even a name whose image is damaged is taken.
        if fs::exists(self.name_file(name)).map_err(failed)? {
            return Err(StoreError::Exists(name.clone()));
        }
        let needed = metadata.blocks().saturating_mul(512);
        if self.free_space().is_some_and(|free| free < needed) {
            return Err(StoreError::DiskFull { path: self.path.clone(), needed });
        }
        let staging = Staging::new(self, &lock)?;
        let disk = staging.disk(format)?;
        let total = Some(metadata.len());
        let sum = copy::copy(&file, &disk, |done| {
            progress.report(&Step { stage: Stage::Copying(name.to_string()), done, total });
        });
        let sum = sum.map_err(|source| staging.disk_error(format, needed, source))?;
        let from = path.file_name().unwrap_or_default().to_string_lossy();
        staging.finish(name, format!("imported from {from}"), format, Some(sum), parts)
    }
}

impl Boot {
    fn parts(&self) -> Result<Parts, StoreError> {
        let read = |path: &Path| {
            fs::read(path).map_err(|source| StoreError::Given { path: path.to_path_buf(), source })
        };
        Ok(Parts {
            kernel: Some(read(&self.kernel)?),
            initrd: self.initrd.as_deref().map(read).transpose()?,
            cmdline: Some(self.cmdline.clone()),
            ..Parts::default()
        })
    }
}

/// The format that a disk shows.
fn detect(path: &Path) -> io::Result<Option<Format>> {
    let options = FileOptions { lock: Lock::Ignore, ..FileOptions::read() };
    match ImageFile::open(path, options).and_then(|file| Format::detect(&file)) {
        Ok(format) => Ok(Some(format)),
        Err(DiskError::UnknownFormat { .. }) => Ok(None),
        Err(error) => Err(io::Error::other(error)),
    }
}
