//! The folder where fetched files stay: atomic writes, one fetcher at a time.

use crate::{ImageError, Progress, Stage, Step};
use rustix::fs::{FlockOperation, flock};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Temporary files of [`Cache::write`] begin so; a fetcher that was killed may leave some.
const TEMPORARY: &str = ".tmp-";

/// A folder of fetched files, `$XDG_CACHE_HOME/bivisor` or `~/.cache/bivisor` (XDG Base
/// Directory Specification). Nothing in it is ever used half-written or unverified, and all of
/// it may be removed at any time.
#[derive(Clone, Debug)]
pub struct Cache {
    path: PathBuf,
}

/// The right to change the cache, until it is dropped or the process ends.
pub(crate) struct Lock {
    _file: File,
}

impl Cache {
    /// Opens the user's cache and makes its folder where it is missing.
    ///
    /// # Errors
    /// Fails where the environment names no folder or the folder cannot be made.
    pub fn open() -> Result<Self, ImageError> {
        let base = base_folder(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"))
            .ok_or(ImageError::NoCacheFolder)?;
        Self::at(base.join("bivisor"))
    }

    /// Opens a cache at `path` and makes the folder where it is missing.
    ///
    /// # Errors
    /// Fails where the folder cannot be made.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self, ImageError> {
        let path = path.into();
        make_folder(&path)?;
        Ok(Self { path })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until no other process changes the cache, and keeps others out.
    pub(crate) fn lock(&self, progress: &mut dyn Progress) -> Result<Lock, ImageError> {
        let path = self.path.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| ImageError::file(&path, "open the lock file", 0, source))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress.report(&Step { stage: Stage::Waiting, done: 0, total: None });
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
                .map_err(|errno| ImageError::file(&path, "lock the cache", 0, errno.into()))?;
        }
        Ok(Lock { _file: file })
    }

    /// Makes a folder of the cache.
    pub(crate) fn folder(&self, relative: &str) -> Result<PathBuf, ImageError> {
        let path = self.path.join(relative);
        make_folder(&path)?;
        Ok(path)
    }

    /// Removes what killed fetchers left half-written in a folder of the cache. The lock proves
    /// that no fetcher is at work.
    pub(crate) fn sweep(&self, _lock: &Lock, folder: &Path) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                // A leftover costs only space, and the next fetch tries again.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// The bytes that the cache's file system has free for this user, where it says so.
    pub(crate) fn free_space(&self) -> Option<u64> {
        let stat = rustix::fs::statvfs(&self.path).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }
}

/// Writes a whole file: readers see the old content or all of the new, also after a crash.
pub(crate) fn write(folder: &Path, name: &str, content: &[u8]) -> Result<PathBuf, ImageError> {
    atomically(folder, name, content).map_err(|source| {
        ImageError::file(&folder.join(name), "write the file", content.len() as u64, source)
    })
}

/// As [`write`], with the system's own error.
pub(crate) fn atomically(folder: &Path, name: &str, content: &[u8]) -> io::Result<PathBuf> {
    let path = folder.join(name);
    let temporary = folder.join(format!("{TEMPORARY}{}-{name}", std::process::id()));
    write_and_rename(folder, &temporary, &path, content).inspect_err(|_| {
        // The temporary file may not exist; the error that matters is the other.
        let _ = fs::remove_file(&temporary);
    })?;
    Ok(path)
}

fn write_and_rename(
    folder: &Path,
    temporary: &Path,
    path: &Path,
    content: &[u8],
) -> io::Result<()> {
    let mut file = File::create(temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    File::open(folder)?.sync_all()
}

fn make_folder(path: &Path) -> Result<(), ImageError> {
    fs::create_dir_all(path).map_err(|source| ImageError::file(path, "make the folder", 0, source))
}

/// The XDG rule: an absolute `XDG_CACHE_HOME`, or else `.cache` in the home folder.
fn base_folder(xdg: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let absolute = |value: OsString| Some(PathBuf::from(value)).filter(|path| path.is_absolute());
    xdg.and_then(absolute).or_else(|| Some(home.and_then(absolute)?.join(".cache")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_follows_the_xdg_rule() {
        let os = |text: &str| Some(OsString::from(text));
        assert_eq!(base_folder(os("/x"), os("/h")), Some(PathBuf::from("/x")));
        assert_eq!(base_folder(os("relative"), os("/h")), Some(PathBuf::from("/h/.cache")));
        assert_eq!(base_folder(None, os("/h")), Some(PathBuf::from("/h/.cache")));
        assert_eq!(base_folder(None, os("")), None);
    }

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "file", b"old").unwrap();
        let path = write(folder.path(), "file", b"new").unwrap();
        assert_eq!(fs::read(path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_may_not_be_made_names_the_path_and_the_fix() {
        // Nobody, root included, can make folders in sysfs.
        let error = Cache::at("/sys/bivisor-cache").unwrap_err();
        assert!(matches!(error, ImageError::NotWritable { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with("/sys/bivisor-cache: no permission"), "{text}");
        assert!(text.contains("XDG_CACHE_HOME"), "{text}");
    }

    #[test]
    fn a_second_fetcher_says_that_it_waits_and_goes_on_when_the_first_is_done() {
        struct Release(Option<Lock>);
        impl Progress for Release {
            fn report(&mut self, step: &Step) {
                assert_eq!(step.stage, Stage::Waiting);
                self.0 = None;
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let mut first = Release(Some(cache.lock(&mut crate::Quiet).unwrap()));
        cache.lock(&mut first).unwrap();
        assert!(first.0.is_none());
    }

    #[test]
    fn a_sweep_removes_only_what_a_killed_fetcher_left() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        let lock = cache.lock(&mut crate::Quiet).unwrap();
        fs::write(folder.path().join(".tmp-1-vmlinuz"), b"half").unwrap();
        fs::write(folder.path().join("vmlinuz"), b"whole").unwrap();
        cache.sweep(&lock, folder.path());
        assert!(!folder.path().join(".tmp-1-vmlinuz").exists());
        assert!(folder.path().join("vmlinuz").exists());
    }
}
