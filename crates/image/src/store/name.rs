//! Names of images, and formats of disks.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The longest name.
const LONGEST: usize = 100;

/// The name of an image, as `debian:12`: lower-case letters, digits, `.`, `_` and `-`, once with
/// a colon in between. It is a file's name in the store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

/// What cannot be a name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} cannot be an image's name; give lower-case letters, digits, dots, hyphens and at most \
     one colon, as debian:12"
)]
pub struct NameError(String);

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let part = |part: &str| {
            part.bytes().next().is_some_and(letter)
                && part.bytes().all(|byte| letter(byte) || b"._-".contains(&byte))
        };
        let fits = match text.split_once(':') {
            Some((name, version)) => part(name) && part(version),
            None => part(text),
        };
        if fits && text.len() <= LONGEST {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.chars().take(LONGEST).collect()))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// The format of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes, one after the other.
    Raw,
    /// QEMU's.
    Qcow2,
    /// VMware's.
    Vmdk,
    /// VirtualBox's.
    Vdi,
    /// Microsoft's older one.
    Vhd,
    /// Microsoft's newer one.
    Vhdx,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vdi, Self::Vhd, Self::Vhdx];

    /// What it is called, and how its files end.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        }
    }

    /// The format that the first and last sector of a file show. A raw disk shows none: whatever
    /// its guest wrote there could look like any other.
    pub(crate) fn detect(first: &[u8], last: &[u8]) -> Option<Self> {
        let at = |offset: usize, magic: &[u8]| {
            first.get(offset..offset + magic.len()).is_some_and(|bytes| bytes == magic)
        };
        if at(0, b"QFI\xfb") {
            Some(Self::Qcow2)
        } else if at(0, b"KDMV") || at(0, b"# Disk DescriptorFile") {
            Some(Self::Vmdk)
        } else if at(64, &[0x7f, 0x10, 0xda, 0xbe]) {
            Some(Self::Vdi)
        } else if at(0, b"vhdxfile") {
            Some(Self::Vhdx)
        } else if at(0, b"conectix") || last.starts_with(b"conectix") {
            Some(Self::Vhd)
        } else {
            None
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name() == text);
        let names = Self::ALL.map(Self::name).join(", ");
        found.ok_or_else(|| format!("there is no disk format {text:?}; the formats are {names}"))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_always_a_harmless_file_name() {
        for name in ["debian:12", "a", "my.image_1-x", &"x".repeat(100)] {
            assert_eq!(name.parse::<Name>().unwrap().to_string(), name);
        }
        let bad = ["", ":", "a:", ":a", "a:b:c", "A", ".x", "a/b", "a:../b", "-a", "a b", "a\n"];
        for name in bad {
            assert!(name.parse::<Name>().is_err(), "{name:?}");
        }
        assert!("x".repeat(101).parse::<Name>().is_err());
    }

    #[test]
    fn formats_are_known_by_their_magic_and_raw_never() {
        assert_eq!(Format::detect(b"QFI\xfb\0\0\0\x03", b""), Some(Format::Qcow2));
        assert_eq!(Format::detect(b"KDMV", b""), Some(Format::Vmdk));
        assert_eq!(Format::detect(b"vhdxfile", b""), Some(Format::Vhdx));
        assert_eq!(Format::detect(&[0; 512], b"conectix"), Some(Format::Vhd));
        let mut vdi = [0; 512];
        vdi[64..68].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        assert_eq!(Format::detect(&vdi, b""), Some(Format::Vdi));
        assert_eq!(Format::detect(&[0; 512], &[0; 512]), None);
        assert_eq!(Format::detect(b"", b""), None);
    }

    #[test]
    fn an_unknown_format_is_refused_with_all_there_are() {
        let error = "qcow".parse::<Format>().unwrap_err();
        assert!(error.contains("raw, qcow2, vmdk"), "{error}");
    }
}
