//! Attributes of inodes: what the host says and what the guest sees of it.
use crate::wire::{Outcome, Reply};
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};
use std::os::fd::AsFd;

/// How long the guest may take what it was told for true, in seconds: as long as a change on the
/// host may take to be seen.
const VALID: u64 = 1;

/// Who an inode that belongs to nobody the guest could know is shown as (`nobody`, `nogroup`), as
/// user namespaces do.
const OVERFLOW_ID: u32 = 65534;

/// Bits that a guest can set on files: not set-user-ID and set-group-ID, with which it could
/// leave programs that others on the host run as the user.
const FILE_BITS: u32 = 0o1777;
/// Bits that a guest can set on folders.
const FOLDER_BITS: u32 = 0o3777;

/// Whom the guest sees as the owner of what belongs to the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The user's own ids and those the guest sees in their place.
pub(crate) struct Ownership {
    host: Owner,
    guest: Owner,
}

impl Ownership {
    /// `None` keeps the user's numbers.
    pub(crate) fn new(guest: Option<Owner>) -> Self {
        let host = Owner {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        Self { host, guest: guest.unwrap_or(host) }
    }

    fn shown(&self, uid: u32, gid: u32) -> Owner {
        Owner {
            uid: if uid == self.host.uid { self.guest.uid } else { OVERFLOW_ID },
            gid: if gid == self.host.gid { self.guest.gid } else { OVERFLOW_ID },
        }
    }

    /// Whether an inode belongs to the user, who alone may give it away (to itself).
    pub(crate) fn is_users(&self, attributes: &Statx) -> bool {
        attributes.stx_uid == self.host.uid
    }

    /// Writes `fuse_attr`.
    pub(crate) fn write(&self, reply: &mut Reply<'_>, attributes: &Statx) {
        let owner = self.shown(attributes.stx_uid, attributes.stx_gid);
        reply.u64(attributes.stx_ino);
        reply.u64(attributes.stx_size);
        reply.u64(attributes.stx_blocks);
        let times = [&attributes.stx_atime, &attributes.stx_mtime, &attributes.stx_ctime];
        for time in times {
            reply.u64(time.tv_sec.cast_unsigned());
        }
        for time in times {
            reply.u32(time.tv_nsec);
        }
        reply.u32(attributes.stx_mode.into());
        reply.u32(attributes.stx_nlink);
        reply.u32(owner.uid);
        reply.u32(owner.gid);
        reply.u32(device_number(attributes.stx_rdev_major, attributes.stx_rdev_minor));
        reply.u32(attributes.stx_blksize);
        reply.u32(0);
    }

    /// Writes `fuse_attr_out`.
    pub(crate) fn write_attr_out(&self, reply: &mut Reply<'_>, attributes: &Statx) {
        reply.u64(VALID);
        reply.zeroes(8);
        self.write(reply, attributes);
    }

    /// Writes `fuse_entry_out`.
    pub(crate) fn write_entry_out(&self, reply: &mut Reply<'_>, node: u64, attributes: &Statx) {
        reply.u64(node);
        // Node numbers are never used again: one generation is enough.
        reply.u64(0);
        reply.u64(VALID);
        reply.u64(VALID);
        reply.zeroes(8);
        self.write(reply, attributes);
    }
}

/// Bytes of `fuse_entry_out`.
pub(crate) const ENTRY_OUT: usize = 128;

/// A device number as Linux passes it in 32 bits (`new_encode_dev`).
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xfff00) << 12
}

/// The host's attributes of what a descriptor stands for, a symbolic link included.
pub(crate) fn of(fd: impl AsFd) -> Outcome<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted)
}

/// What kind of inode it is.
pub(crate) fn kind(attributes: &Statx) -> FileType {
    FileType::from_raw_mode(attributes.stx_mode.into())
}

/// The permission bits that a guest's wish becomes.
pub(crate) fn permitted(kind: FileType, mode: u32) -> u32 {
    mode & if kind == FileType::Directory { FOLDER_BITS } else { FILE_BITS }
}
