//! Disks by URL, through the machine's curl (so its proxies and certificates hold), and verified
//! before anything is done with them. A download that is cut off goes on the next time.

use crate::catalogue::Remote;
use crate::error::AptSays;
use crate::store::{Lock, Store, StoreError};
use crate::{ImageError, Programs, Progress, Stage, Step};
use sha2::{Digest, Sha512};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// curl's status where a server cannot go on from the middle (curl(1), EXIT CODES).
const CANNOT_RESUME: i32 = 33;
/// curl's status where it cannot write.
const CANNOT_WRITE: i32 = 23;

/// Why a disk cannot be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// curl cannot be run.
    #[error(transparent)]
    Run(#[from] ImageError),
    /// The machine lacks curl.
    #[error(
        "images are downloaded with curl, which this machine does not have; run `sudo apt-get install curl`"
    )]
    NoCurl,
    /// The download failed.
    #[error(
        "{url}: cannot be downloaded; check the network and run this command again, which goes on from here"
    )]
    Failed {
        /// What was downloaded.
        url: String,
        /// curl's words.
        #[source]
        source: AptSays,
    },
    /// It is not what the catalogue says.
    #[error(
        "{url}: this is not the file that the catalogue names: its SHA-512 begins with {found} and \
         not with {wanted}; nothing was kept of it"
    )]
    Mismatch {
        /// What was downloaded.
        url: String,
        /// The beginning of its sum.
        found: String,
        /// The beginning of the sum that it should have.
        wanted: String,
    },
}

/// Downloads a disk into a file of the store, which the caller moves on, and verifies it.
pub(crate) fn fetch(
    store: &Store,
    _lock: &Lock,
    remote: &Remote,
    programs: &Programs,
    progress: &mut dyn Progress,
) -> Result<PathBuf, DownloadError> {
    let path = store.partial(&remote.sha512);
    let failed = |source| StoreError::file(&path, "read the download", source);
    // It may be there whole, if the process was killed right before it was moved on.
    if fs::exists(&path).map_err(failed)? && sum(&path).map_err(failed)? == remote.sha512 {
        return Ok(path);
    }
    let mut resumes = true;
    loop {
        let (status, text) = curl(&path, remote, programs, progress)?;
        match status {
            Some(0) => break,
            Some(CANNOT_RESUME) if resumes => {
                resumes = false;
                fs::remove_file(&path).map_err(failed)?;
            }
            _ if is_full(&text) || status == Some(CANNOT_WRITE) => {
                return Err(StoreError::DiskFull { path, needed: 0 }.into());
            }
            _ => {
                let source = AptSays(text.lines().last().unwrap_or("curl says nothing").into());
                return Err(DownloadError::Failed { url: remote.url.clone(), source });
            }
        }
    }
    progress.report(&Step { stage: Stage::Verifying, done: 0, total: None });
    let found = sum(&path).map_err(failed)?;
    if found == remote.sha512 {
        return Ok(path);
    }
    fs::remove_file(&path).map_err(failed)?;
    let start = |sum: &str| sum.chars().take(16).collect();
    Err(DownloadError::Mismatch {
        url: remote.url.clone(),
        found: start(&found),
        wanted: start(&remote.sha512),
    })
}

/// Runs curl once. Its status, and what it said.
fn curl(
    path: &Path,
    remote: &Remote,
    programs: &Programs,
    progress: &mut dyn Progress,
) -> Result<(Option<i32>, String), DownloadError> {
    let start = size(path);
    let headers = path.with_extension("headers");
    let (file, dump) = (path.to_string_lossy(), headers.to_string_lossy());
    let arguments = [
        "--fail",
        "--location",
        "--silent",
        "--show-error",
        "--proto",
        "=http,https",
        "--continue-at",
        "-",
        "--dump-header",
        &dump,
        "--output",
        &file,
        "--url",
        &remote.url,
    ];
    let name = remote.url.rsplit('/').next().unwrap_or(&remote.url).to_owned();
    let stage = Stage::Downloading(name);
    let ran = programs.watch("curl", &arguments, Path::new("/"), || {
        let rest = fs::read_to_string(&headers).ok().and_then(|text| content_length(&text));
        let total = rest.and_then(|rest| start.checked_add(rest));
        progress.report(&Step { stage: stage.clone(), done: size(path), total });
    });
    // Only for the progress, and only while curl ran.
    let _ = fs::remove_file(&headers);
    match ran {
        Ok((status, text)) => Ok((status.code(), text)),
        Err(ImageError::NoProgram { .. }) => Err(DownloadError::NoCurl),
        Err(error) => Err(error.into()),
    }
}

/// The length that the last answer promises: those before it were redirections.
fn content_length(headers: &str) -> Option<u64> {
    let field = |line: &str| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    };
    headers.lines().rev().find_map(field)
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

fn is_full(text: &str) -> bool {
    text.contains("No space left on device")
}

fn sum(path: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut buffer) = (File::open(path)?, Sha512::new(), vec![0; 1 << 20]);
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        hash.update(buffer.get(..length).unwrap_or_default());
    }
    let mut text = String::with_capacity(128);
    for byte in hash.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_that_of_the_last_answer() {
        let headers = "HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\nHTTP/2 200\r\n\
            content-length: 1234\r\n\r\n";
        assert_eq!(content_length(headers), Some(1234));
        assert_eq!(content_length("HTTP/1.1 200 OK\r\nContent-Length: many\r\n"), None);
        assert_eq!(content_length(""), None);
    }

    #[test]
    fn sha512_of_abc_is_the_one_of_fips_180_4() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "abc").unwrap();
        assert!(sum(file.path()).unwrap().starts_with("ddaf35a193617abacc417349ae204131"));
    }
}
