//! The folder of a switch: a socket for each machine on it.
use super::SwitchError;
use crate::choice::SwitchName;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    sockopt,
};
use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Most machines on a switch.
pub(super) const MOST_PORTS: usize = 256;
/// What a socket's name begins with; the lock's does not.
const PORT: &str = "port-";
/// Bytes that a connection holds before its sender has to wait; the host may allow less.
const SEND_BUFFER: usize = 1 << 20;

/// A machine's place in the folder, given up when dropped.
#[derive(Debug)]
pub(super) struct Membership(PathBuf);

impl Drop for Membership {
    fn drop(&mut self) {
        // Where it cannot be removed, the next to join finds that nobody listens there.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The user's runtime directory (XDG Base Directory Specification), `bivisor` in it.
pub(super) fn runtime_directory() -> Result<PathBuf, SwitchError> {
    let user = rustix::process::geteuid();
    let system = PathBuf::from(format!("/run/user/{}", user.as_raw()));
    let directory = match std::env::var_os("XDG_RUNTIME_DIR").filter(|value| !value.is_empty()) {
        Some(directory) => PathBuf::from(directory).join("bivisor"),
        None if system.is_dir() => system.join("bivisor"),
        None => std::env::temp_dir().join(format!("bivisor-{}", user.as_raw())),
    };
    Ok(directory)
}

/// Makes a folder of the user's alone, or sees that it is one.
fn own_folder(path: &Path) -> Result<(), SwitchError> {
    let failed = |source| SwitchError::Folder { path: path.to_owned(), source };
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let folder = std::fs::symlink_metadata(path).map_err(failed)?;
    if !folder.is_dir() || folder.uid() != rustix::process::geteuid().as_raw() {
        return Err(SwitchError::Foreign(path.to_owned()));
    }
    if folder.mode() & 0o077 != 0 {
        return Err(SwitchError::Open(path.to_owned()));
    }
    Ok(())
}

fn stream() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Prepares a connection to another machine.
pub(super) fn prepare(socket: &OwnedFd) {
    // The host's limit holds where this is more.
    let _ = sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER);
}

/// Joins a switch: answers the place in it, the socket at which later ones come, and connections to
/// those that are there.
pub(super) fn join(
    directory: &Path,
    name: &SwitchName,
) -> Result<(Membership, OwnedFd, Vec<OwnedFd>), SwitchError> {
    own_folder(directory)?;
    let switches = directory.join("switch");
    own_folder(&switches)?;
    let folder = switches.join(name.as_str());
    own_folder(&folder)?;
    let failed = |source| SwitchError::Folder { path: folder.clone(), source };
    let lock = open_lock(&folder.join("lock")).map_err(failed)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;

    let others = connect_to_others(&folder).map_err(failed)?;
    let number = RandomState::new().hash_one(std::process::id());
    let path = folder.join(format!("{PORT}{number:016x}"));
    let address = SocketAddrUnix::new(&path).map_err(|_| SwitchError::Long(path.clone()))?;
    let host = |error: Errno| SwitchError::Host { action: "open a socket", source: error.into() };
    let listener = stream().map_err(host)?;
    bind(&listener, &address).map_err(|error| failed(error.into()))?;
    let membership = Membership(path);
    listen(&listener, MOST_PORTS as i32).map_err(host)?;
    // The lock ends here, with its file.
    Ok((membership, listener, others))
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Connects to each socket in the folder, and removes those at which nobody listens.
fn connect_to_others(folder: &Path) -> io::Result<Vec<OwnedFd>> {
    let mut others = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PORT) || others.len() >= MOST_PORTS {
            continue;
        }
        let path = entry.path();
        let Ok(address) = SocketAddrUnix::new(&path) else { continue };
        let socket = stream()?;
        match connect(&socket, &address) {
            Ok(()) => {
                prepare(&socket);
                others.push(socket);
            }
            // Nobody can be about to listen there, as that happens under the lock.
            Err(Errno::CONNREFUSED) => std::fs::remove_file(&path)?,
            // One that left just now, or that cannot take more.
            Err(_) => {}
        }
    }
    Ok(others)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_that_others_can_enter_is_refused_with_the_fix() {
        let folder = tempfile::tempdir().unwrap();
        let open = folder.path().join("bivisor");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o755)).unwrap();
        let name = "lab".parse().unwrap();
        let error = join(&open, &name).err().unwrap();
        assert!(error.to_string().contains("chmod 700"), "{error}");
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o700)).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&open, &link).unwrap();
        assert!(matches!(join(&link, &name), Err(SwitchError::Foreign(_))));
        assert!(join(&open, &name).is_ok());
        let long = folder.path().join("x".repeat(100));
        assert!(matches!(join(&long, &name), Err(SwitchError::Long(_))));
    }

    #[test]
    fn the_socket_of_one_that_was_killed_is_cleared_away() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("bivisor");
        let name = "lab".parse().unwrap();
        let (first, listener, _) = join(&directory, &name).unwrap();
        // A killed process closes its sockets and removes nothing.
        drop(listener);
        let path = first.0.clone();
        std::mem::forget(first);
        let (_second, _, others) = join(&directory, &name).unwrap();
        assert!(others.is_empty());
        assert!(!path.exists());
    }
}
