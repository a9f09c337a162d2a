//! Folders of the host that a guest shares, made ready before the machine is.
use crate::VmmError;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use share::{Limits, Mount, Options, Server};
use std::sync::Arc;
use virtio::fs::{FsConfig, Tag};

/// Most descriptors that one share may use, however many there are: what is beyond is opened
/// again when it is needed.
const MOST: u64 = 1 << 16;

/// Opens the folders. The guest mounts the first by the tag `share0`, the second by `share1` and
/// so on; whoever starts the guest tells it where ([`Mount::guest`]).
///
/// Each inode that a guest uses takes a descriptor, so the process's limit of them is raised as
/// far as an ordinary user may.
///
/// # Errors
/// Names the folder that cannot be shared, and the fix.
pub fn open_shares(mounts: &[Mount]) -> Result<Vec<FsConfig>, VmmError> {
    if mounts.is_empty() {
        return Ok(Vec::new());
    }
    let half = raised_limit() / 2;
    let each = (half / mounts.len() as u64).min(MOST);
    // At most MOST.
    let limits = Limits::for_descriptors(each as usize);
    let open = |(number, mount): (usize, &Mount)| {
        let folder = mount.host.clone();
        let options = Options { folder, read_only: mount.read_only, owner: None, limits };
        let server = Arc::new(Server::new(&options)?);
        Ok(FsConfig { tag: Tag::numbered(number), server })
    };
    mounts.iter().enumerate().map(open).collect()
}

/// How many descriptors the process may have, as many as it can get.
fn raised_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // What cannot be raised stays as it is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    getrlimit(Resource::Nofile).current.or(current).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_named_by_their_number_and_a_missing_folder_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let mount = |host: &std::path::Path| Mount {
            host: host.to_owned(),
            guest: "/src".into(),
            read_only: false,
        };
        let shares = open_shares(&[mount(folder.path()), mount(folder.path())]).unwrap();
        let tags: Vec<_> = shares.iter().map(|share| share.tag.to_string()).collect();
        assert_eq!(tags, ["share0", "share1"]);
        let error = open_shares(&[mount(&folder.path().join("none"))]).unwrap_err();
        assert!(error.is_bad_input());
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.to_string().starts_with("--mount"), "{error}");
        assert!(cause.contains("/none cannot be shared"), "{cause}");
    }
}
