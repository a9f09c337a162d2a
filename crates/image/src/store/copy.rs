//! Files of many gigabytes: their sums, and copies in which holes stay holes.

use super::image::Sum;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// The SHA-256 of a file.
pub(super) fn sum(path: &Path) -> io::Result<Sum> {
    walk(&File::open(path)?, |_, _| Ok(()))
}

/// Copies `from` to `to`, an empty file, and gives the sum. `progress` gets the bytes done.
pub(super) fn copy(from: &File, to: &File, mut progress: impl FnMut(u64)) -> io::Result<Sum> {
    let sum = walk(from, |offset, data| {
        progress(offset);
        // What is all zeroes need not be written: the file's size will say that it is there.
        if data.iter().any(|byte| *byte != 0) { to.write_all_at(data, offset) } else { Ok(()) }
    })?;
    to.set_len(sum.bytes)?;
    progress(sum.bytes);
    Ok(sum)
}

/// Reads a file, calls `each` with all of it but holes, and gives its sum.
fn walk(file: &File, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<Sum> {
    let size = file.metadata()?.len();
    let (mut hash, mut buffer, mut at) = (Sha256::new(), vec![0; CHUNK], 0);
    let zeroes = vec![0; CHUNK];
    let most = |from: u64, to: u64| usize::try_from(to - from).map_or(CHUNK, |n| n.min(CHUNK));
    while at < size {
        let data = next(file, SeekFrom::Data(at), size)?;
        while at < data {
            let length = most(at, data);
            hash.update(&zeroes[..length]);
            at += length as u64;
        }
        let end = next(file, SeekFrom::Hole(at), size)?;
        while at < end {
            let part = &mut buffer[..most(at, end)];
            file.read_exact_at(part, at)?;
            hash.update(&*part);
            each(at, part)?;
            at += part.len() as u64;
        }
    }
    let mut sha256 = String::with_capacity(64);
    for byte in hash.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(sha256, "{byte:02x}");
    }
    Ok(Sum { bytes: size, sha256 })
}

/// Where the next data or hole begins, at most at `size`. A file system that knows no holes has
/// data everywhere.
fn next(file: &File, from: SeekFrom, size: u64) -> io::Result<u64> {
    match seek(file, from) {
        Ok(at) => Ok(at.min(size)),
        Err(Errno::NXIO) => Ok(size),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(match from {
            SeekFrom::Data(at) => at,
            _ => size,
        }),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_is_the_same_and_its_holes_take_no_room() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::NamedTempFile::new().unwrap());
        from.write_all_at(b"begin", 0).unwrap();
        from.write_all_at(&[0; 4 << 20], 8 << 20).unwrap();
        from.write_all_at(b"end", (40 << 20) + 17).unwrap();
        let mut done = Vec::new();
        let copied = copy(&from, to.as_file(), |bytes| done.push(bytes)).unwrap();
        assert_eq!(copied, sum(to.path()).unwrap());
        assert_eq!((copied.bytes, done.last()), ((40 << 20) + 20, Some(&copied.bytes)));
        let mut text = [0; 3];
        to.as_file().read_exact_at(&mut text, (40 << 20) + 17).unwrap();
        assert_eq!(&text, b"end");
        let taken = to.as_file().metadata().unwrap().blocks() * 512;
        assert!(taken < 3 << 20, "{taken} bytes");
    }

    #[test]
    fn the_sum_is_that_of_the_whole_file_whatever_its_holes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((3 << 20) + 1).unwrap();
        let whole = Sum::of(&vec![0; (3 << 20) + 1]);
        assert_eq!(sum(file.path()).unwrap(), whole);
        file.as_file().set_len(0).unwrap();
        assert_eq!(sum(file.path()).unwrap(), Sum::of(b""));
    }
}
