//! Initramfs archives: cpio "newc", as the Linux kernel unpacks them
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The same content always gives the same bytes: entries are sorted by path and carry no time,
//! owner or inode of the host.

use std::collections::BTreeMap;

/// File type bits of the mode field (inode(7)).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// The entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// Collects what an initramfs holds. Missing parent folders are made, mode 755; a path given
/// twice holds what was given last.
///
/// ```
/// let mut builder = image::initramfs::Builder::new();
/// builder.file("init", 0o755, "#!/bin/sh\n")?.symlink("bin/sh", "busybox")?;
/// assert_eq!(builder.cpio().len() % 4, 0);
/// # Ok::<(), image::initramfs::BuildError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Builder {
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    mode: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

/// Why something cannot go into an initramfs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BuildError {
    /// The path cannot be the path of an entry.
    #[error(
        "{path:?} cannot be a path in an initramfs; give names separated by /, without NUL, `.` \
         and `..`"
    )]
    Path {
        /// The path.
        path: String,
    },
    /// The format's size field has 32 bits.
    #[error("{path}: {size} bytes are too many for an initramfs; give a file below 4 GiB")]
    Size {
        /// The path of the entry.
        path: String,
        /// The size of the content in bytes.
        size: usize,
    },
}

impl Builder {
    /// An archive without entries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder with permission bits `mode`.
    ///
    /// # Errors
    /// Fails where the path is not one.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<&mut Self, BuildError> {
        self.add(path, Entry { mode: DIRECTORY | mode & 0o7777, ..Entry::default() })
    }

    /// Adds a regular file with permission bits `mode`.
    ///
    /// # Errors
    /// Fails where the path is not one or the content reaches 4 GiB.
    pub fn file(
        &mut self,
        path: &str,
        mode: u32,
        content: impl Into<Vec<u8>>,
    ) -> Result<&mut Self, BuildError> {
        let content = content.into();
        self.add(path, Entry { mode: REGULAR | mode & 0o7777, content, ..Entry::default() })
    }

    /// Adds a symbolic link to `target`.
    ///
    /// # Errors
    /// Fails where the path is not one.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self, BuildError> {
        let content = target.as_bytes().to_vec();
        self.add(path, Entry { mode: SYMLINK | 0o777, content, ..Entry::default() })
    }

    /// Adds a character device with permission bits `mode`.
    ///
    /// # Errors
    /// Fails where the path is not one.
    pub fn character_device(
        &mut self,
        path: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> Result<&mut Self, BuildError> {
        let mode = CHARACTER | mode & 0o7777;
        self.add(path, Entry { mode, device: (major, minor), ..Entry::default() })
    }

    fn add(&mut self, path: &str, entry: Entry) -> Result<&mut Self, BuildError> {
        let name = path.trim_start_matches('/').trim_end_matches('/');
        let bad = |part: &str| matches!(part, "" | "." | "..") || part.contains('\0');
        if name.split('/').any(bad) || name == TRAILER || name.len() > 4000 {
            return Err(BuildError::Path { path: path.to_owned() });
        }
        if u32::try_from(entry.content.len()).is_err() {
            return Err(BuildError::Size { path: path.to_owned(), size: entry.content.len() });
        }
        for (end, _) in name.match_indices('/') {
            let parent = name.get(..end).unwrap_or_default().to_owned();
            self.entries
                .entry(parent)
                .or_insert(Entry { mode: DIRECTORY | 0o755, ..Entry::default() });
        }
        self.entries.insert(name.to_owned(), entry);
        Ok(self)
    }

    /// The archive, uncompressed. (The kernel takes it so as it takes a compressed one, and the
    /// guest need not spend its boot on decompressing.)
    #[must_use]
    pub fn cpio(&self) -> Vec<u8> {
        let size: usize = self.entries.iter().map(|(path, e)| path.len() + e.content.len()).sum();
        let mut out = Vec::with_capacity(size + 128 * (self.entries.len() + 1));
        // Sorted by path, so a folder stands before what it holds.
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            append(&mut out, inode, path, entry);
        }
        append(&mut out, 0, TRAILER, &Entry::default());
        out
    }
}

/// One entry: header of 13 fields in hexadecimal, path with NUL, content; both padded to 4.
fn append(out: &mut Vec<u8>, inode: u32, path: &str, entry: &Entry) {
    let links = if entry.mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
    // Both fit: `add` bounds them.
    let (size, name_size) = (entry.content.len() as u32, path.len() as u32 + 1);
    let (major, minor) = entry.device;
    // ino, mode, uid, gid, nlink, mtime, filesize, major, minor, rmajor, rminor, namesize, check
    let fields = [inode, entry.mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(&entry.content);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_laid_out_as_the_buffer_format_says() {
        let mut builder = Builder::new();
        builder.file("a", 0o644, "hello").unwrap();
        let cpio = builder.cpio();
        let header = "070701\
            0000000100008\
            1A40000000000000000000000010000000000000005\
            00000000000000000000000000000000000000020000000\
            0";
        assert_eq!(std::str::from_utf8(&cpio[..110]).unwrap(), header);
        assert_eq!(&cpio[110..112], b"a\0");
        assert_eq!(&cpio[112..120], b"hello\0\0\0");
        assert_eq!(&cpio[230..240], b"TRAILER!!!");
        assert_eq!(cpio.len() % 4, 0);
    }

    #[test]
    fn folders_come_before_their_files_and_the_order_of_adding_does_not_matter() {
        let (mut one, mut other) = (Builder::new(), Builder::new());
        one.file("/bin/sh", 0o755, "x").unwrap().directory("tmp", 0o1777).unwrap();
        other.directory("tmp/", 0o1777).unwrap().file("bin/sh", 0o755, "x").unwrap();
        assert_eq!(one.cpio(), other.cpio());
        let paths: Vec<_> = one.entries.keys().collect();
        assert_eq!(paths, ["bin", "bin/sh", "tmp"]);
    }

    #[test]
    fn a_path_that_would_leave_the_root_or_end_the_archive_is_refused() {
        for path in ["", "/", "a//b", "../a", "a/./b", "a\0b", "TRAILER!!!"] {
            let error = Builder::new().file(path, 0o644, "").unwrap_err();
            assert_eq!(error, BuildError::Path { path: path.to_owned() });
        }
    }
}
