//! The parts of a seed, checked where they enter: after that, none can mean anything else in
//! YAML, in a shell or in fstab.

use super::SeedError;
use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

/// How the lines of public keys begin (OpenSSH, sshd(8), "AUTHORIZED_KEYS FILE FORMAT").
const KEY_TYPES: [&str; 4] = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"];
/// The longest line that is taken for a key; RSA keys of 16384 bits have 2.8 kB.
const LONGEST_KEY: usize = 8192;
/// The longest file of keys that is read.
const LONGEST_FILE: u64 = 1 << 20;
/// The longest tag that virtio-fs carries, in bytes (virtio 1.2 §5.11.4).
const LONGEST_TAG: usize = 36;
/// How what cloud-init acts on begins (its documentation, "User-data formats").
const USER_DATA: [&[u8]; 10] = [
    b"#cloud-config",
    b"#!",
    b"#include",
    b"#cloud-boothook",
    b"#part-handler",
    b"## template: jinja",
    b"Content-Type:",
    b"MIME-Version:",
    b"#cloud-config-archive",
    b"\x1f\x8b",
];

/// A host name of one label (RFC 1123 §2.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hostname(String);

impl FromStr for Hostname {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        let fits = !text.is_empty()
            && text.len() <= 63
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !text.starts_with('-')
            && !text.ends_with('-');
        if fits { Ok(Self(text.to_owned())) } else { Err(SeedError::Hostname(text.to_owned())) }
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// A public SSH key, one line as in `authorized_keys`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshKey(String);

impl SshKey {
    /// The keys in a file, or the one key that the text itself is.
    ///
    /// # Errors
    /// Fails where the file cannot be read or holds something else.
    pub fn from_file_or_text(text: &str) -> Result<Vec<Self>, SeedError> {
        if KEY_TYPES.iter().any(|kind| text.starts_with(kind)) && text.contains(' ') {
            return Ok(vec![text.parse()?]);
        }
        let path = Path::new(text);
        let failed = |source| SeedError::KeyFile { path: path.to_path_buf(), source };
        if fs::metadata(path).map_err(failed)?.len() > LONGEST_FILE {
            return Err(SeedError::Key(text.to_owned()));
        }
        let content = fs::read(path).map_err(failed)?;
        let content = String::from_utf8_lossy(&content);
        if content.contains("PRIVATE KEY-----") {
            return Err(SeedError::PrivateKey(text.to_owned()));
        }
        let lines = content.lines().map(str::trim);
        let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        let keys: Vec<Self> = lines
            .map(|line| line.parse().map_err(|_| SeedError::Key(text.to_owned())))
            .collect::<Result<_, _>>()?;
        if keys.is_empty() { Err(SeedError::Key(text.to_owned())) } else { Ok(keys) }
    }
}

impl FromStr for SshKey {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        let text = text.trim();
        let mut words = text.split(' ');
        let kind = words.next().is_some_and(|word| KEY_TYPES.iter().any(|k| word.starts_with(k)));
        let base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
        let key = words.next().is_some_and(|word| word.len() > 8 && word.bytes().all(base64));
        if kind && key && text.len() <= LONGEST_KEY && !text.contains(char::is_control) {
            return Ok(Self(text.to_owned()));
        }
        let shown: String = text.chars().take(40).collect();
        Err(SeedError::Key(shown))
    }
}

impl fmt::Display for SshKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// A shared folder, and where the guest finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    tag: String,
    place: String,
    read_only: bool,
}

impl Mount {
    /// The virtio-fs device with this tag, at this place in the guest.
    ///
    /// # Errors
    /// Fails where the tag cannot be one, or the place is not a clean absolute path.
    pub fn new(tag: &str, place: &str, read_only: bool) -> Result<Self, SeedError> {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if tag.is_empty() || tag.len() > LONGEST_TAG || !tag.bytes().all(letter) {
            return Err(SeedError::Tag(tag.to_owned()));
        }
        let clean = place.starts_with('/')
            && place != "/"
            && !place.contains(char::is_control)
            && place.split('/').all(|name| name != "..");
        if !clean {
            return Err(SeedError::Place(place.to_owned()));
        }
        Ok(Self { tag: tag.to_owned(), place: place.to_owned(), read_only })
    }

    fn options(&self) -> &'static str {
        if self.read_only { "ro" } else { "rw" }
    }

    /// A line of fstab(5). `x-bivisor` marks it as the host's, which replaces it at each start.
    pub(super) fn fstab_line(&self) -> String {
        // Control characters are not in it; space and backslash are what is left to escape, and
        // a # that begins a field would begin a comment.
        let place = self.place.replace('\\', "\\134").replace(' ', "\\040").replace('#', "\\043");
        format!("{} {place} virtiofs {},nofail,x-bivisor 0 0\n", self.tag, self.options())
    }

    /// The same for a shell.
    pub(super) fn shell_lines(&self) -> String {
        let place = format!("'{}'", self.place.replace('\'', "'\\''"));
        format!(
            "mkdir -p {place}\nmountpoint -q {place} || \
             mount -t virtiofs -o {} '{}' {place}\n",
            self.options(),
            self.tag
        )
    }
}

/// The user's own data for cloud-init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserData(Vec<u8>);

impl UserData {
    /// The data of a file.
    ///
    /// # Errors
    /// Fails where the file cannot be read or is nothing that cloud-init acts on.
    pub fn read(path: &Path) -> Result<Self, SeedError> {
        Self::new(&path.display().to_string(), read(path)?)
    }

    /// These data; `name` is what to call them in an error.
    ///
    /// # Errors
    /// Fails where they are nothing that cloud-init acts on.
    pub fn new(name: &str, bytes: Vec<u8>) -> Result<Self, SeedError> {
        if USER_DATA.iter().any(|start| bytes.starts_with(start)) {
            return Ok(Self(bytes));
        }
        Err(SeedError::UserData(name.to_owned()))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The user's own network configuration for cloud-init (version 1 or 2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig(Vec<u8>);

impl NetworkConfig {
    /// The configuration of a file.
    ///
    /// # Errors
    /// Fails where the file cannot be read.
    pub fn read(path: &Path) -> Result<Self, SeedError> {
        Ok(Self::new(read(path)?))
    }

    /// This configuration.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

fn read(path: &Path) -> Result<Vec<u8>, SeedError> {
    fs::read(path).map_err(|source| SeedError::UserFile { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ+x me@home";

    #[test]
    fn host_names_are_those_of_rfc_1123() {
        for name in ["a", "web-1", "9lives", &"x".repeat(63)] {
            assert_eq!(name.parse::<Hostname>().unwrap().to_string(), name);
        }
        for name in ["", "-a", "a-", "a.b", "a b", "a\n", "\u{e9}", &"x".repeat(64)] {
            assert!(name.parse::<Hostname>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_key_is_given_as_text_or_as_a_file_of_several() {
        assert_eq!(SshKey::from_file_or_text(KEY).unwrap()[0].to_string(), KEY);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("id.pub");
        fs::write(&path, format!("# mine\n{KEY}\n\n{KEY} too\n")).unwrap();
        assert_eq!(SshKey::from_file_or_text(path.to_str().unwrap()).unwrap().len(), 2);
    }

    #[test]
    fn what_is_no_public_key_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("id");
        let error = |content: &str| {
            fs::write(&path, content).unwrap();
            SshKey::from_file_or_text(path.to_str().unwrap()).unwrap_err().to_string()
        };
        assert!(error("-----BEGIN OPENSSH PRIVATE KEY-----\nx").contains("never leaves you"));
        assert!(error("Dear reader").contains("not a public SSH key"));
        assert!(error("").contains("not a public SSH key"));
        assert!(error(&format!("{KEY}\nrubbish\n")).contains("not a public SSH key"));
        let missing = SshKey::from_file_or_text("/no/such.pub").unwrap_err().to_string();
        assert!(missing.contains("/no/such.pub: cannot read"), "{missing}");
        for key in ["ssh-ed25519", "ssh-ed25519 x", "ssh-rsa AAAA$(reboot)AAAA"] {
            assert!(key.parse::<SshKey>().is_err(), "{key}");
        }
        assert!(format!("{KEY}\nssh-rsa AAAABBBBCCCC").parse::<SshKey>().is_err());
    }

    #[test]
    fn places_and_tags_that_could_mean_something_else_are_refused_or_quoted() {
        for place in ["", "src", "/", "/a/../b", "/a\nb"] {
            assert!(matches!(Mount::new("t", place, false), Err(SeedError::Place(_))), "{place:?}");
        }
        for tag in ["", "a b", "a,b", &"x".repeat(37)] {
            assert!(matches!(Mount::new(tag, "/a", false), Err(SeedError::Tag(_))), "{tag:?}");
        }
        let mount = Mount::new("t", "/it's #1\\x", false).unwrap();
        let place = "/it's\\040\\0431\\134x";
        assert_eq!(mount.fstab_line(), format!("t {place} virtiofs rw,nofail,x-bivisor 0 0\n"));
        assert!(mount.shell_lines().starts_with("mkdir -p '/it'\\''s #1\\x'\n"));
    }

    #[test]
    fn data_that_cloud_init_would_ignore_are_refused() {
        for text in ["#cloud-config\n", "#!/bin/sh\n", "#include x", "Content-Type: multipart/x"] {
            assert!(UserData::new("u", text.into()).is_ok(), "{text:?}");
        }
        for text in ["", "hostname: x\n", " #cloud-config\n"] {
            let error = UserData::new("u.yaml", text.into()).unwrap_err().to_string();
            assert!(error.starts_with("u.yaml: cloud-init would ignore"), "{error}");
        }
    }
}
