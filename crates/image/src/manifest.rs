//! What a fetched image consists of: the record by which cached files are verified.

use crate::{ImageError, cache};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The manifest's file name.
const NAME: &str = "manifest";
/// Its first line. A cache of another layout is fetched anew.
const HEADER: &str = "bivisor-image 1";

/// The version of an image and the SHA-256 of each of its files. It is written after the files,
/// so a fetch that was cut off has none.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub version: String,
    files: Vec<(String, String)>,
}

impl Manifest {
    pub fn new(version: String) -> Self {
        Self { version, files: Vec::new() }
    }

    /// Writes a file of the image and records it.
    pub fn add(&mut self, folder: &Path, name: &str, content: &[u8]) -> Result<(), ImageError> {
        cache::write(folder, name, content)?;
        self.files.push((name.to_owned(), sha256(content)));
        Ok(())
    }

    /// Writes the manifest: the image is complete.
    pub fn save(&self, folder: &Path) -> Result<(), ImageError> {
        let mut text = format!("{HEADER}\nversion {}\n", self.version);
        for (name, hash) in &self.files {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{hash} {name}");
        }
        cache::write(folder, NAME, text.as_bytes()).map(drop)
    }

    /// Reads the manifest; `None` where there is none that this version understands.
    pub fn load(folder: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(folder.join(NAME)).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next()? != HEADER {
            return None;
        }
        let version = lines.next()?.strip_prefix("version ")?.to_owned();
        let file = |line: &str| {
            line.split_once(' ').map(|(hash, name)| (name.to_owned(), hash.to_owned()))
        };
        Some(Self { version, files: lines.map(file).collect::<Option<_>>()? })
    }

    /// A file of the image, if it is there and is what was recorded.
    pub fn read(&self, folder: &Path, name: &str) -> Option<Vec<u8>> {
        let (_, hash) = self.files.iter().find(|(recorded, _)| recorded == name)?;
        let content = fs::read(folder.join(name)).ok()?;
        (sha256(&content) == *hash).then_some(content)
    }

    /// Whether the image has a file of this name.
    pub fn has(&self, name: &str) -> bool {
        self.files.iter().any(|(recorded, _)| recorded == name)
    }
}

/// The SHA-256 of `content` in hexadecimal, as package lists write it.
pub(crate) fn sha256(content: &[u8]) -> String {
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(content) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_of_abc_is_the_one_of_fips_180_4() {
        assert_eq!(
            sha256(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn a_saved_image_reads_back_and_a_changed_file_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::new("6.1 (6.1.2-3)".into());
        manifest.add(folder.path(), "vmlinuz", b"kernel").unwrap();
        manifest.save(folder.path()).unwrap();
        let loaded = Manifest::load(folder.path()).unwrap();
        assert_eq!(loaded, manifest);
        assert_eq!(loaded.read(folder.path(), "vmlinuz").unwrap(), b"kernel");
        assert_eq!(loaded.read(folder.path(), "other"), None);
        fs::write(folder.path().join("vmlinuz"), b"kernem").unwrap();
        assert_eq!(loaded.read(folder.path(), "vmlinuz"), None);
    }

    #[test]
    fn a_manifest_of_another_layout_or_cut_off_counts_as_none() {
        for text in ["", "bivisor-image 0\nversion 1\n", "bivisor-image 1\n", "\0\u{ff}"] {
            assert_eq!(Manifest::parse(text), None, "{text:?}");
        }
    }
}
