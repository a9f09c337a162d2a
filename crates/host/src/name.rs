//! Names of machines.
use std::fmt;
use std::str::FromStr;

/// The longest name: it is the guest's host name, too (RFC 1035 2.3.4).
const LONGEST: usize = 63;

/// The name of a machine, which can be a host name and a file's name: 1 to 63 lower-case letters,
/// digits and hyphens, beginning and ending with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MachineName(String);

/// What cannot be a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot be a machine's name; give 1 to 63 lower-case letters, digits and hyphens, as web-1"
)]
pub struct NotAName(String);

impl FromStr for MachineName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let ends = [text.bytes().next(), text.bytes().next_back()];
        let fits = text.len() <= LONGEST
            && ends.into_iter().all(|end| end.is_some_and(letter))
            && text.bytes().all(|byte| letter(byte) || byte == b'-');
        match fits {
            true => Ok(Self(text.to_owned())),
            false => Err(NotAName(text.chars().take(2 * LONGEST).collect())),
        }
    }
}

impl fmt::Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl MachineName {
    /// The name that a machine from the image `image` has if its user gives none: `debian-12` for
    /// `debian:12`.
    ///
    /// # Errors
    /// Nothing of the image's name can be in a machine's.
    pub fn from_image(image: &str) -> Result<Self, NotAName> {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let name: String = image.chars().map(plain).take(LONGEST).collect();
        name.trim_matches('-').parse()
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_called_like_a_host_and_never_like_a_path() {
        for good in ["web", "web-1", "0", "debian-12"] {
            assert_eq!(good.parse::<MachineName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "..", "a/b", "Web", "a b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<MachineName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_images_name_makes_a_machines() {
        let name = |image| MachineName::from_image(image).map(|name| name.to_string());
        assert_eq!(name("debian:12").as_deref(), Ok("debian-12"));
        assert_eq!(name("my_image.v2").as_deref(), Ok("my-image-v2"));
        assert!(name("::").is_err());
    }
}
