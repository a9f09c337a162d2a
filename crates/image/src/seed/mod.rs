//! What a guest is told at its start: its name, who may log in, which folders it sees.
//!
//! A [`Seed`] becomes a small disk. Foreign cloud images read it with cloud-init (its data source
//! "NoCloud": a FAT file system labelled `cidata`). Images of Bivisor's own recipes have
//! cloud-init as well, but it takes longer to start than all else together, so that what does
//! not need it reaches them by another disk (labelled `BIVISOR`), which their initramfs applies
//! before systemd starts. [`Seed::disk`] chooses.

mod values;

use crate::fat::{self, FatError};
use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

pub use values::{Hostname, Mount, NetworkConfig, SshKey, UserData};

/// The label by which cloud-init knows its disk.
const CLOUD_INIT_LABEL: &str = "cidata";
/// The label by which the initramfs of Bivisor's images knows its disk.
const BIVISOR_LABEL: &str = "BIVISOR";

/// How an image can be told things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeedReader {
    /// By cloud-init alone.
    CloudInit,
    /// By cloud-init, and quicker by the initramfs of Bivisor's recipes.
    Bivisor,
}

/// What a guest is told at its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    /// Names the machine for good: cloud-init does what it does once a machine when this changes.
    pub instance: String,
    /// The guest's name.
    pub hostname: Option<Hostname>,
    /// Who may log in over SSH, as root and as the image's default user where it has one.
    pub keys: Vec<SshKey>,
    /// The shared folders, and where the guest finds them.
    pub mounts: Vec<Mount>,
    /// The user's own cloud-init configuration, passed on as it is.
    pub user_data: Option<UserData>,
    /// The user's own network configuration for cloud-init, passed on as it is.
    pub network: Option<NetworkConfig>,
}

/// Why a guest cannot be told something.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// Not a host name.
    #[error(
        "{0:?} cannot be a host name; give up to 63 letters, digits and hyphens, not beginning or \
         ending with a hyphen"
    )]
    Hostname(String),
    /// A key or file that is not there.
    #[error("{}: cannot read the SSH key; give a public key or the path of its file", path.display())]
    KeyFile {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file that is no key.
    #[error(
        "{0}: not a public SSH key, as `ssh-keygen -t ed25519` makes one (the file ending in .pub)"
    )]
    Key(String),
    /// A private key.
    #[error("{0}: this is the private key, which never leaves you; give the file ending in .pub")]
    PrivateKey(String),
    /// A path in the guest that cannot be one.
    #[error(
        "{0:?} cannot be a place in the guest; give an absolute path without .. or control characters"
    )]
    Place(String),
    /// A name of a share that cannot be one.
    #[error("{0:?} cannot be the name of a shared folder; give 1 to 36 letters, digits, - and _")]
    Tag(String),
    /// The user's file cannot be read.
    #[error("{}: cannot read the file for cloud-init", path.display())]
    UserFile {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The user's file is nothing that cloud-init acts on.
    #[error(
        "{0}: cloud-init would ignore this file; its first line must say what it is, as \
         `#cloud-config` or `#!/bin/sh`"
    )]
    UserData(String),
    /// It is too much for the disk.
    #[error(transparent)]
    Fat(#[from] FatError),
}

impl Seed {
    /// Whether there is nothing to tell, so that no disk is needed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self { instance: self.instance.clone(), ..Self::default() }
    }

    /// The disk for an image that reads it in this way: a whole disk without partitions.
    ///
    /// # Errors
    /// Fails where the user's files are too large.
    pub fn disk(&self, reader: SeedReader) -> Result<Vec<u8>, SeedError> {
        let needs_cloud_init = self.user_data.is_some() || self.network.is_some();
        if reader == SeedReader::CloudInit || needs_cloud_init {
            self.cloud_init_disk()
        } else {
            self.bivisor_disk()
        }
    }

    /// cloud-init's "NoCloud" (its documentation, "NoCloud"). What does not come from the user
    /// goes into vendor data, so that the user's data stay what they are.
    fn cloud_init_disk(&self) -> Result<Vec<u8>, SeedError> {
        let meta = self.meta_data();
        let vendor = self.boot_hook();
        let user = self.user_data.as_ref().map_or(&b"#cloud-config\n{}\n"[..], UserData::bytes);
        let mut files = vec![("meta-data", meta.as_bytes()), ("user-data", user)];
        if !self.mounts.is_empty() {
            files.push(("vendor-data", vendor.as_bytes()));
        }
        if let Some(network) = &self.network {
            files.push(("network-config", network.bytes()));
        }
        Ok(fat::build(CLOUD_INIT_LABEL, &files)?)
    }

    /// Each file is what its name says, one item a line; `initrd.sh` reads them.
    fn bivisor_disk(&self) -> Result<Vec<u8>, SeedError> {
        let hostname = self.hostname.as_ref().map(|name| format!("{name}\n")).unwrap_or_default();
        let keys: String = self.keys.iter().map(|key| format!("{key}\n")).collect();
        let fstab: String = self.mounts.iter().map(Mount::fstab_line).collect();
        let all = [("hostname", hostname), ("keys", keys), ("fstab", fstab)];
        let given = all.iter().filter(|(_, text)| !text.is_empty());
        let files: Vec<_> = given.map(|(name, text)| (*name, text.as_bytes())).collect();
        Ok(fat::build(BIVISOR_LABEL, &files)?)
    }

    fn meta_data(&self) -> String {
        let mut text = format!("instance-id: {}\n", yaml_string(&self.instance));
        if let Some(name) = &self.hostname {
            // Writing to a String cannot fail, here and below.
            let _ = writeln!(text, "local-hostname: {}", yaml_string(&name.to_string()));
        }
        if !self.keys.is_empty() {
            text.push_str("public-keys:\n");
        }
        for key in &self.keys {
            let _ = writeln!(text, "  - {}", yaml_string(&key.to_string()));
        }
        text
    }

    /// Mounts the shared folders at each start. A script and not `mounts`, which the user's own
    /// data would replace and not add to.
    fn boot_hook(&self) -> String {
        let mut text = "#cloud-boothook\n#!/bin/sh\n".to_owned();
        for mount in &self.mounts {
            text.push_str(&mount.shell_lines());
        }
        text
    }
}

/// A string of YAML 1.1 and 1.2 in double quotes (YAML 1.2 §7.3.1), whatever is in it.
fn yaml_string(text: &str) -> String {
    let mut quoted = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            ' '..='~' => quoted.push(letter),
            _ => {
                let _ = write!(quoted, "\\U{:08x}", u32::from(letter));
            }
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(disk: &[u8], text: &str) -> bool {
        disk.windows(text.len()).any(|part| part == text.as_bytes())
    }

    fn seed() -> Seed {
        Seed {
            instance: "vm-1".into(),
            hostname: Some("web".parse().unwrap()),
            keys: vec!["ssh-ed25519 AAAAC3NzaC1lZDI1 me@\"home\"".parse().unwrap()],
            mounts: vec![Mount::new("share0", "/my src", true).unwrap()],
            ..Seed::default()
        }
    }

    #[test]
    fn strings_of_yaml_cannot_break_out_of_their_quotes() {
        assert_eq!(yaml_string("a: 'b' #c"), "\"a: 'b' #c\"");
        assert_eq!(yaml_string("\"\\\n\u{e9}"), "\"\\\"\\\\\\U0000000a\\U000000e9\"");
    }

    #[test]
    fn an_image_of_ours_gets_what_needs_no_cloud_init_the_quick_way() {
        let disk = seed().disk(SeedReader::Bivisor).unwrap();
        assert!(holds(&disk, "BIVISOR") && !holds(&disk, "cidata"));
        assert!(holds(&disk, "web\n") && holds(&disk, "ssh-ed25519 AAAAC3NzaC1lZDI1 me@"));
        assert!(holds(&disk, "share0 /my\\040src virtiofs ro,nofail,x-bivisor 0 0\n"));
    }

    #[test]
    fn a_foreign_image_gets_all_by_cloud_init() {
        let disk = seed().disk(SeedReader::CloudInit).unwrap();
        assert!(holds(&disk, "cidata"));
        assert!(holds(&disk, "instance-id: \"vm-1\"\nlocal-hostname: \"web\"\npublic-keys:\n"));
        assert!(holds(&disk, "  - \"ssh-ed25519 AAAAC3NzaC1lZDI1 me@\\\"home\\\"\"\n"));
        assert!(holds(&disk, "#cloud-boothook\n#!/bin/sh\n"));
        assert!(holds(&disk, "mount -t virtiofs -o ro 'share0' '/my src'\n"));
        assert!(holds(&disk, "#cloud-config\n{}\n"));
    }

    #[test]
    fn the_users_own_data_reach_cloud_init_unchanged() {
        let text = b"#cloud-config\nmounts: []\n\xff".to_vec();
        let user_data = Some(UserData::new("u", text.clone()).unwrap());
        let network = Some(NetworkConfig::new(b"version: 2\n".to_vec()));
        let seed = Seed { user_data, network, ..seed() };
        let disk = seed.disk(SeedReader::Bivisor).unwrap();
        assert!(disk.windows(text.len()).any(|part| part == text));
        assert!(holds(&disk, "cidata") && holds(&disk, "version: 2\n"));
    }

    #[test]
    fn only_an_instance_is_nothing_to_tell() {
        assert!(Seed { instance: "x".into(), ..Seed::default() }.is_empty());
        assert!(!seed().is_empty());
    }
}
