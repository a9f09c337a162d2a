//! Names of images, and how the formats of disks are written.

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

/// How records and the catalogue write a disk's format: by its name.
pub(crate) mod format_name {
    use disk::Format;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    // The signature is serde's.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub fn serialize<S: Serializer>(format: &Format, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(format.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Format, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
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
}
