//! How a user says what is shared: `HOST:GUEST[:ro]`.
use std::path::PathBuf;
use std::str::FromStr;

/// A folder of the host, and where the guest finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The folder on the host.
    pub host: PathBuf,
    /// The place in the guest: an absolute path other than `/`, without `.` and `..`.
    pub guest: String,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// A text that does not say what is shared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// It has no such parts.
    #[error("write HOST:GUEST or HOST:GUEST:ro, as in ~/src:/src")]
    Form,
    /// The place in the guest cannot be one.
    #[error("{0:?} cannot be a place in the guest; give an absolute path like /src")]
    Guest(String),
}

impl FromStr for Mount {
    type Err = MountError;

    fn from_str(text: &str) -> Result<Self, MountError> {
        let (rest, read_only) = match text.rsplit_once(':') {
            Some((rest, "ro")) => (rest, true),
            Some((rest, "rw")) => (rest, false),
            _ => (text, false),
        };
        // A path of the host may have a colon, one of the guest may not.
        let (host, guest) = rest.rsplit_once(':').ok_or(MountError::Form)?;
        if host.is_empty() || guest.is_empty() {
            return Err(MountError::Form);
        }
        let mut names = guest.split('/');
        let clean = names.next() == Some("")
            && names.all(|name| !matches!(name, "" | "." | ".."))
            && !guest.contains(char::is_control);
        if !clean {
            return Err(MountError::Guest(guest.to_owned()));
        }
        Ok(Self { host: host.into(), guest: guest.to_owned(), read_only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_a_folder_a_place_and_perhaps_read_only() {
        let mount = |text: &str| {
            let Mount { host, guest, read_only } = text.parse().unwrap();
            (host.to_str().unwrap().to_owned(), guest, read_only)
        };
        let parts = |host: &str, guest: &str, ro| (host.to_owned(), guest.to_owned(), ro);
        assert_eq!(mount("src:/src"), parts("src", "/src", false));
        assert_eq!(mount("/a b:/x/y z:ro"), parts("/a b", "/x/y z", true));
        assert_eq!(mount("/a:/b:rw"), parts("/a", "/b", false));
        assert_eq!(mount("/with:colon:/b"), parts("/with:colon", "/b", false));
    }

    #[test]
    fn what_is_no_mount_is_told_with_the_form() {
        let error = |text: &str| text.parse::<Mount>().unwrap_err();
        for text in ["", "src", "src:", ":/src", "src:ro", "/a::ro"] {
            assert_eq!(error(text), MountError::Form, "{text:?}");
        }
        for text in ["a:b", "a:/", "a:/b/", "a:/b/../c", "a:/./b", "a://b", "a:/b\n", "a:/b:rx"] {
            assert!(matches!(error(text), MountError::Guest(_)), "{text:?}");
        }
    }
}
