//! How a user names a network: `nat`, `none`, `tap=NAME`, `switch=NAME`.
use std::fmt;
use std::str::FromStr;

/// What a machine's card is plugged into, as a user chooses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkChoice {
    /// The process's own NAT, [`crate::nat`].
    Nat,
    /// No card at all.
    None,
    /// An existing tap device, [`crate::tap`].
    Tap(TapName),
    /// A switch among the machines of one user, [`crate::switch`].
    Switch(SwitchName),
}

/// The name of a tap device: 1 to 15 bytes, as Linux permits them (`dev_valid_name`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapName(String);

/// The name of a switch: 1 to 32 of `a-z A-Z 0-9 . _ -`, not beginning with a dot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchName(String);

/// Why a network's name is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    /// None of the forms.
    #[error("{0:?} is no network; use nat, none, tap=NAME or switch=NAME")]
    Unknown(String),
    /// Not a name that Linux gives to a device.
    #[error(
        "{0:?} is no name of a tap device; use 1 to 15 characters without '/', ':' and spaces, \
         as `ip link` lists it"
    )]
    TapName(String),
    /// Not a switch's name.
    #[error(
        "{0:?} is no name of a switch; use 1 to 32 letters, digits, '.', '_' or '-', no dot first"
    )]
    SwitchName(String),
}

impl FromStr for NetworkChoice {
    type Err = ChoiceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            None if text == "nat" => Ok(Self::Nat),
            None if text == "none" => Ok(Self::None),
            Some(("tap", name)) => Ok(Self::Tap(name.parse()?)),
            Some(("switch", name)) => Ok(Self::Switch(name.parse()?)),
            _ => Err(ChoiceError::Unknown(text.to_owned())),
        }
    }
}

impl fmt::Display for NetworkChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nat => f.write_str("nat"),
            Self::None => f.write_str("none"),
            Self::Tap(name) => write!(f, "tap={name}"),
            Self::Switch(name) => write!(f, "switch={name}"),
        }
    }
}

impl FromStr for TapName {
    type Err = ChoiceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=15).contains(&text.len()) && !matches!(text, "." | "..");
        // A percent sign would have the kernel choose a number.
        let odd = |c: char| matches!(c, '/' | ':' | '%' | '\0') || c.is_whitespace();
        if !fits || text.contains(odd) {
            return Err(ChoiceError::TapName(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for SwitchName {
    type Err = ChoiceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=32).contains(&text.len()) && !text.starts_with('.');
        if !fits || !text.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c)) {
            return Err(ChoiceError::SwitchName(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TapName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SwitchName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SwitchName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_read_and_written_alike() {
        for text in ["nat", "none", "tap=tap0", "switch=lab-1"] {
            assert_eq!(text.parse::<NetworkChoice>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_network_is_refused_with_the_forms_there_are() {
        for text in ["", "nat=x", "none=", "bridge", "NAT", "tap", "switch"] {
            let error = text.parse::<NetworkChoice>().unwrap_err();
            assert!(
                error.to_string().contains("use nat, none, tap=NAME or switch=NAME"),
                "{error}"
            );
        }
    }

    #[test]
    fn names_that_would_leave_their_folder_or_confuse_the_kernel_are_refused() {
        for name in ["", "..", "../x", "a/b", "sixteen-letters-", "tap%d", "a b", "a:b"] {
            assert!(format!("tap={name}").parse::<NetworkChoice>().is_err(), "{name:?}");
        }
        for name in ["", "..", ".x", "a/b", "a b", "ä", &"x".repeat(33)] {
            assert!(format!("switch={name}").parse::<NetworkChoice>().is_err(), "{name:?}");
        }
    }
}
