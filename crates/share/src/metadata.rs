//! Attributes, extended attributes and the file system's figures.
use crate::attributes::{self, permitted};
use crate::files::kill_privileges;
use crate::handles::Handle;
use crate::inodes::{Inode, NodeId};
use crate::protocol::{GETATTR_HANDLE, set};
use crate::reopen::Reopen;
use crate::server::{Header, Server};
use crate::wire::{Outcome, Reader, Reply};
use rustix::fs::{FileType, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::AsFd;

/// Most bytes of an extended attribute, or of the list of their names (XATTR_SIZE_MAX).
const XATTR_MAX: usize = 65536;

/// The fields of `fuse_setattr_in` that are looked at.
struct Changes {
    valid: u32,
    handle: u64,
    size: u64,
    accessed: (u64, u32),
    modified: (u64, u32),
    mode: u32,
}

impl Changes {
    fn take(reader: &mut Reader<'_>) -> Outcome<Self> {
        let valid = reader.u32()?;
        reader.skip(4)?;
        let (handle, size) = (reader.u64()?, reader.u64()?);
        reader.skip(8)?;
        let (accessed, modified) = (reader.u64()?, reader.u64()?);
        reader.skip(8)?;
        let (accessed_nanoseconds, modified_nanoseconds) = (reader.u32()?, reader.u32()?);
        reader.skip(4)?;
        let mode = reader.u32()?;
        reader.skip(16)?;
        Ok(Self {
            valid,
            handle,
            size,
            accessed: (accessed, accessed_nanoseconds),
            modified: (modified, modified_nanoseconds),
            mode,
        })
    }

    fn has(&self, bits: u32) -> bool {
        self.valid & bits != 0
    }

    /// One of the two times, as utimensat(2) takes it.
    fn time(&self, given: u32, now: u32, (seconds, nanoseconds): (u64, u32)) -> Outcome<Timespec> {
        let (seconds, nanoseconds) = match (self.has(now), self.has(given)) {
            (true, _) => (0, UTIME_NOW),
            (false, true) if nanoseconds < 1_000_000_000 => {
                (seconds.cast_signed(), nanoseconds.into())
            }
            (false, true) => return Err(Errno::INVAL),
            (false, false) => (0, UTIME_OMIT),
        };
        Ok(Timespec { tv_sec: seconds, tv_nsec: nanoseconds })
    }
}

impl Server {
    pub(crate) fn get_attributes(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let flags = reader.u32()?;
        reader.skip(4)?;
        let found = if flags & GETATTR_HANDLE != 0 {
            attributes::of(self.handles.get(reader.u64()?)?.fd())?
        } else {
            attributes::of(&self.inodes.get(header.node)?.fd)?
        };
        self.ownership.write_attr_out(reply, &found);
        Ok(())
    }

    pub(crate) fn set_attributes(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let changes = Changes::take(reader)?;
        let handle =
            if changes.has(set::HANDLE) { Some(self.handles.get(changes.handle)?) } else { None };
        let inode = self.inodes.get(header.node)?;
        if changes.has(set::UID | set::GID) {
            self.give_away(&inode)?;
        }
        if changes.has(set::SIZE) {
            self.set_size(&inode, handle.as_deref(), &changes)?;
        }
        if changes.has(set::MODE) {
            if inode.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            let mode = Mode::from_raw_mode(permitted(inode.kind, changes.mode));
            self.reopen.chmod(&inode.fd, mode)?;
        }
        if changes.has(set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW) {
            let times = Timestamps {
                last_access: changes.time(set::ATIME, set::ATIME_NOW, changes.accessed)?,
                last_modification: changes.time(set::MTIME, set::MTIME_NOW, changes.modified)?,
            };
            self.reopen.set_times(&inode.fd, &times)?;
        }
        self.ownership.write_attr_out(reply, &attributes::of(&inode.fd)?);
        Ok(())
    }

    /// All users of the guest are one on the host, so giving a file to another one changes
    /// nothing; only what is not the user's cannot be given.
    fn give_away(&self, inode: &Inode) -> Outcome {
        let found = attributes::of(&inode.fd)?;
        if !self.ownership.is_users(&found) {
            return Err(Errno::PERM);
        }
        // As chown(2) does. A file the user cannot open keeps its bits only if it had them from
        // the host.
        let special = u32::from(found.stx_mode) & 0o6000 != 0;
        if special && inode.kind == FileType::RegularFile {
            let mode = permitted(inode.kind, found.stx_mode.into());
            self.reopen.chmod(&inode.fd, Mode::from_raw_mode(mode))?;
        }
        Ok(())
    }

    fn set_size(&self, inode: &Inode, handle: Option<&Handle>, changes: &Changes) -> Outcome {
        let resize = |fd: &dyn AsFd| {
            rustix::fs::ftruncate(fd.as_fd(), changes.size)?;
            if changes.has(set::KILL_SUIDGID) { kill_privileges(fd.as_fd()) } else { Ok(()) }
        };
        match handle {
            Some(Handle::File(file)) => resize(file),
            Some(Handle::Folder(..)) => Err(Errno::ISDIR),
            None => resize(&self.open_inode(inode, OFlags::WRONLY)?),
        }
    }

    pub(crate) fn stat_filesystem(&self, header: Header, reply: &mut Reply<'_>) -> Outcome {
        let inode = self.inodes.get(header.node).or_else(|_| self.inodes.get(NodeId::ROOT))?;
        let found = rustix::fs::fstatvfs(&inode.fd)?;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        for value in [found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree] {
            reply.u64(value);
        }
        reply.u32(narrow(found.f_bsize));
        reply.u32(narrow(found.f_namemax));
        reply.u32(narrow(found.f_frsize));
        reply.zeroes(28);
        Ok(())
    }

    /// The inode of a request about extended attributes, as a path. Links and special files have
    /// none of the kind that is shared.
    fn with_xattrs(&self, header: Header) -> Outcome<(Inode, String)> {
        let inode = self.inodes.get(header.node)?;
        match inode.kind {
            FileType::RegularFile | FileType::Directory => {
                let path = Reopen::path(&inode.fd);
                Ok((inode, path))
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    pub(crate) fn set_xattr(&self, header: Header, reader: &mut Reader<'_>) -> Outcome {
        let (size, flags) = (reader.u32()?, reader.u32()?);
        let name = user_name(reader)?;
        let value = reader.rest();
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if value.len() != size as usize {
            return Err(Errno::INVAL);
        }
        if value.len() > XATTR_MAX {
            return Err(Errno::TOOBIG);
        }
        let (_inode, path) = self.with_xattrs(header)?;
        rustix::fs::setxattr(path, name, value, flags)
    }

    pub(crate) fn get_xattr(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let size = reader.u32()? as usize;
        reader.skip(4)?;
        let name = user_name(reader)?;
        let (_inode, path) = self.with_xattrs(header)?;
        if size == 0 {
            // At most XATTR_MAX.
            reply.u32(rustix::fs::getxattr_query(path, name)? as u32);
            reply.u32(0);
            return Ok(());
        }
        let mut value = vec![0; size.min(XATTR_MAX)];
        let length = rustix::fs::getxattr(path, name, &mut value[..])?;
        reply.slice(value.get(..length).ok_or(Errno::IO)?);
        Ok(())
    }

    pub(crate) fn list_xattrs(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let size = reader.u32()? as usize;
        let (_inode, path) = self.with_xattrs(header)?;
        let mut list = vec![0; XATTR_MAX];
        let length = rustix::fs::listxattr(path, &mut list[..])?;
        list.truncate(length);
        let shared: Vec<&[u8]> = list
            .split_inclusive(|&byte| byte == 0)
            .filter(|name| name.starts_with(USER.as_bytes()))
            .collect();
        let length = shared.iter().map(|name| name.len()).sum::<usize>();
        if size == 0 {
            reply.u32(length as u32);
            reply.u32(0);
        } else if length > size {
            return Err(Errno::RANGE);
        } else {
            shared.iter().for_each(|name| reply.slice(name));
        }
        Ok(())
    }

    pub(crate) fn remove_xattr(&self, header: Header, reader: &mut Reader<'_>) -> Outcome {
        let name = user_name(reader)?;
        let (_inode, path) = self.with_xattrs(header)?;
        rustix::fs::removexattr(path, name)
    }
}

/// The names that are shared. All others mean something to the host: capabilities, access control
/// lists, labels of security modules.
const USER: &str = "user.";

fn user_name<'a>(reader: &mut Reader<'a>) -> Outcome<&'a CStr> {
    let name = reader.string()?;
    let bytes = name.to_bytes();
    if !bytes.starts_with(USER.as_bytes()) {
        return Err(Errno::OPNOTSUPP);
    }
    if bytes.len() == USER.len() { Err(Errno::INVAL) } else { Ok(name) }
}
