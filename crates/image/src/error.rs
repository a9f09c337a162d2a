//! Why an image cannot be had.

use crate::initramfs::BuildError;
use std::io;
use std::path::{Path, PathBuf};

/// What to do on a machine that cannot fetch.
const WITHOUT_FETCHING: &str =
    "run `bv run hello`, which needs no network, or name a kernel with `bv run --kernel FILE`";

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The environment names no place for the cache.
    #[error(
        "no folder for the cache: neither XDG_CACHE_HOME nor HOME is an absolute path; set \
         XDG_CACHE_HOME to a folder that you may write to"
    )]
    NoCacheFolder,
    /// The cache cannot be written to.
    #[error(
        "{}: no permission to write to the cache; make it yours (`sudo chown -R \"$USER\" \
         FOLDER`) or set XDG_CACHE_HOME to a folder that you may write to", path.display()
    )]
    NotWritable {
        /// The folder or file that was refused.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The cache's file system is full.
    #[error(
        "{}: the disk is full; free about {} MB or set XDG_CACHE_HOME to a folder on another \
         disk", path.display(), needed.div_ceil(1_000_000)
    )]
    DiskFull {
        /// The folder or file that found no room.
        path: PathBuf,
        /// How many bytes the fetch needs.
        needed: u64,
    },
    /// A file of the cache could not be read or written for another reason.
    #[error("{}: cannot {action}; remove the cache's folder and run the command again", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A program of the distribution is missing.
    #[error("this machine has no `{program}` to fetch Debian's packages with; {WITHOUT_FETCHING}")]
    NoProgram {
        /// The program.
        program: &'static str,
    },
    /// A program of the distribution could not be run.
    #[error("cannot run `{program}`; {WITHOUT_FETCHING}")]
    Run {
        /// The program.
        program: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Apt has no package lists, and this user may not refresh them.
    #[error(
        "apt has no package lists on this machine yet; run `sudo apt-get update` and then this \
         command again, or {WITHOUT_FETCHING}"
    )]
    NoLists,
    /// Refreshing apt's package lists failed.
    #[error(
        "apt cannot refresh its package lists; check the network and run `apt-get update` to \
         see more, or {WITHOUT_FETCHING}"
    )]
    Refresh {
        /// Apt's own words.
        #[source]
        source: AptSays,
    },
    /// The distribution does not have the package.
    #[error(
        "apt knows no package {package}: it is Debian's, and this machine's package sources do \
         not offer it; {WITHOUT_FETCHING}"
    )]
    NoPackage {
        /// The package.
        package: String,
    },
    /// Apt describes the package in a way that cannot be used.
    #[error("apt's description of {package} has no usable {field}; {WITHOUT_FETCHING}")]
    Description {
        /// The package.
        package: String,
        /// The field of the description.
        field: &'static str,
    },
    /// A download failed.
    #[error(
        "cannot download {package}; check the network, refresh the package lists with `sudo \
         apt-get update`, and run this command again, or {WITHOUT_FETCHING}"
    )]
    Download {
        /// The package.
        package: String,
        /// Apt's own words.
        #[source]
        source: AptSays,
    },
    /// What was downloaded is not what the package lists promise.
    #[error(
        "{package}: the downloaded file does not have the SHA-256 that the package lists \
         promise, twice; refresh the lists with `sudo apt-get update`, or {WITHOUT_FETCHING}"
    )]
    Mismatch {
        /// The package.
        package: String,
    },
    /// The package could not be unpacked or lacks a file.
    #[error("{package}: the package holds no readable {file}; {WITHOUT_FETCHING}")]
    Package {
        /// The package.
        package: String,
        /// The file looked for.
        file: String,
    },
    /// The initramfs cannot be built.
    #[error("the initramfs cannot be built from the packages' files; {WITHOUT_FETCHING}")]
    Initramfs(#[from] BuildError),
}

/// What apt wrote to its standard error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AptSays(pub String);

impl ImageError {
    /// The error for a failed action on a file of the cache; `needed` is what the whole fetch
    /// needs on disk.
    pub(crate) fn file(path: &Path, action: &'static str, needed: u64, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotWritable { path, source }
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path, needed }
            }
            _ => Self::File { path, action, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_refused_write_get_their_own_message() {
        let path = Path::new("/cache/file");
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let full = ImageError::file(path, "write", 41_000_001, full).to_string();
        assert!(full.starts_with("/cache/file: the disk is full; free about 42 MB"), "{full}");
        let refused = io::Error::from(io::ErrorKind::ReadOnlyFilesystem);
        let refused = ImageError::file(path, "write", 0, refused).to_string();
        assert!(refused.contains("XDG_CACHE_HOME"), "{refused}");
    }
}
