//! Locks on image files, so that no two programs write to one image, or one reads what another
//! writes.
//!
//! The locks are those of QEMU (its documentation, "Image locking", and `block/file-posix.c`):
//! open-file-description locks on single bytes, so that an image that is open in QEMU is refused
//! here and the other way round. Byte 100 + p says "I do p", byte 200 + p says "nobody else may do
//! p", where p is 0 to read, 1 to write, 3 to resize. All of them are read locks, which never
//! exclude each other: each user takes its own first and then looks whether someone holds a byte
//! that forbids what it does, or does what it forbids. They vanish with the descriptor, however
//! the process ends.
use crate::DiskError;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// First byte of "I do".
const DOES: i64 = 100;
/// First byte of "nobody else may".
const FORBIDS: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Whom else an open image admits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lock {
    /// Readers beside a reader, nobody beside a writer.
    #[default]
    Exclude,
    /// Anyone. Only for a look at an image that a machine may be using; what is read may change.
    Ignore,
}

/// Takes the locks of a reader or a writer on `file`.
pub(crate) fn acquire(file: &File, path: &Path, write: bool) -> Result<(), DiskError> {
    let does: &[i64] = if write { &[READ, WRITE, RESIZE] } else { &[READ] };
    let forbids = [WRITE, RESIZE];
    let host = |source: Errno| DiskError::Host {
        file: path.display().to_string(),
        action: "lock it; keep images on a file system that has locks",
        source: io::Error::from(source),
    };
    let own = does.iter().map(|p| DOES + p).chain(forbids.iter().map(|p| FORBIDS + p));
    for byte in own {
        fcntl(file, FcntlArg::F_OFD_SETLK(&one_byte(byte, libc::F_RDLCK))).map_err(host)?;
    }
    let conflicts = does.iter().map(|p| FORBIDS + p).chain(forbids.iter().map(|p| DOES + p));
    for byte in conflicts {
        let mut probe = one_byte(byte, libc::F_WRLCK);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).map_err(host)?;
        if i32::from(probe.l_type) != libc::F_UNLCK {
            return Err(DiskError::InUse {
                file: path.display().to_string(),
                holder: holder(file).unwrap_or_else(|| "another process".to_owned()),
            });
        }
    }
    Ok(())
}

fn one_byte(start: i64, kind: i32) -> libc::flock {
    // The constants of lock types fit their field; the C library declares them wider.
    let l_type = i16::try_from(kind).unwrap_or(i16::MAX);
    libc::flock { l_type, l_whence: 0, l_start: start, l_len: 1, l_pid: 0 }
}

/// Who has the file open. The kernel names no holder of such a lock, so this looks for processes
/// with the file among their descriptors, as far as this user may look.
fn holder(file: &File) -> Option<String> {
    let wanted = file.metadata().ok()?;
    let mut this_process = false;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        let holds = descriptors.flatten().any(|descriptor| {
            fs::metadata(descriptor.path())
                .is_ok_and(|open| open.dev() == wanted.dev() && open.ino() == wanted.ino())
        });
        if !holds {
            continue;
        }
        if pid == std::process::id() {
            this_process = true;
            continue;
        }
        let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        return Some(format!("process {pid} ({})", program.trim()));
    }
    this_process.then(|| "this same machine".to_owned())
}
