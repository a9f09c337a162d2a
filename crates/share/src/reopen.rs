//! Reaching an inode again through a descriptor of it.
//!
//! Inodes are held by `O_PATH` descriptors, which pin an inode without opening it. What needs
//! more goes through `/proc/self/fd/N`, which the host's kernel takes to that very inode, whatever
//! its names are by now.
use crate::wire::Outcome;
use rustix::fs::{AtFlags, Mode, OFlags, Timestamps};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

/// `/proc/self/fd`, held open.
pub(crate) struct Reopen {
    folder: OwnedFd,
}

impl Reopen {
    pub(crate) fn new() -> Outcome<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open("/proc/self/fd", flags, Mode::empty())?;
        Ok(Self { folder })
    }

    fn name(fd: impl AsFd) -> String {
        fd.as_fd().as_raw_fd().to_string()
    }

    /// Opens the inode itself. The caller knows that it is a regular file or a folder: opening
    /// anything else could wait for ever or reach a device.
    pub(crate) fn open(&self, fd: impl AsFd, flags: OFlags) -> Outcome<OwnedFd> {
        let flags = flags.difference(OFlags::CREATE | OFlags::NOFOLLOW) | OFlags::CLOEXEC;
        rustix::fs::openat(&self.folder, Self::name(fd), flags, Mode::empty())
    }

    pub(crate) fn chmod(&self, fd: impl AsFd, mode: Mode) -> Outcome {
        rustix::fs::chmodat(&self.folder, Self::name(fd), mode, AtFlags::empty())
    }

    pub(crate) fn set_times(&self, fd: impl AsFd, times: &Timestamps) -> Outcome {
        rustix::fs::utimensat(&self.folder, Self::name(fd), times, AtFlags::empty())
    }

    /// Gives the inode another name.
    pub(crate) fn link(&self, fd: impl AsFd, folder: impl AsFd, name: &CStr) -> Outcome {
        rustix::fs::linkat(&self.folder, Self::name(fd), folder, name, AtFlags::SYMLINK_FOLLOW)
    }

    /// A path to the inode, for calls that take nothing else.
    pub(crate) fn path(fd: impl AsFd) -> String {
        format!("/proc/self/fd/{}", Self::name(fd))
    }
}

/// Opens an entry of a folder as it is: a symbolic link stands for itself.
pub(crate) fn open_entry(folder: impl AsFd, name: &CStr) -> Outcome<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(folder, name, flags, Mode::empty())
}

/// Whether the descriptor is in a procfs, where files stand for the memory and the descriptors
/// of processes, this one's among them.
pub(crate) fn is_procfs(fd: impl AsFd) -> Outcome<bool> {
    let found = rustix::fs::fstatfs(fd)?.f_type;
    Ok(u64::try_from(found).is_ok_and(|kind| kind == rustix::fs::PROC_SUPER_MAGIC as u64))
}

/// What a guest is told where an inode can no longer be reached.
pub(crate) fn stale(errno: Errno) -> Errno {
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
        other => other,
    }
}
