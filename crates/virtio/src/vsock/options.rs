//! How a user says how a guest's sockets are reached: `PATH[,cid=N]`.
use std::path::PathBuf;
use std::str::FromStr;

/// The address of a guest whose user gives none. It means something only to programs in the guest,
/// so that any number of guests may have the same one.
const DEFAULT_CID: u64 = 3;

/// Where programs on the host reach a guest, and its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockOptions {
    /// The Unix socket.
    pub path: PathBuf,
    /// The guest's address.
    pub cid: u64,
}

/// A text that does not say that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write the path of a socket, perhaps with the guest's address, as in vm.sock,cid=3")]
pub struct NotVsockOptions;

impl FromStr for VsockOptions {
    type Err = NotVsockOptions;

    fn from_str(text: &str) -> Result<Self, NotVsockOptions> {
        let (path, cid) = match text.rsplit_once(",cid=") {
            Some((path, cid)) => (path, cid.parse().map_err(|_| NotVsockOptions)?),
            None => (text, DEFAULT_CID),
        };
        if path.is_empty() { Err(NotVsockOptions) } else { Ok(Self { path: path.into(), cid }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_a_path_and_perhaps_an_address() {
        let options = |path: &str, cid| Ok(VsockOptions { path: path.into(), cid });
        assert_eq!("vm.sock".parse(), options("vm.sock", 3));
        assert_eq!("/a,b,cid=77".parse(), options("/a,b", 77));
        for text in ["", ",cid=3", "a,cid=x", "a,cid="] {
            assert_eq!(text.parse::<VsockOptions>(), Err(NotVsockOptions), "{text:?}");
        }
    }
}
