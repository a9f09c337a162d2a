//! Operations on open files.
use crate::attributes::permitted;
use crate::handles::Handle;
use crate::inodes::{Inode, NodeId};
use crate::protocol::{FSYNC_DATA, OPEN_KILL_SUIDGID, WRITE_CACHE, WRITE_KILL_SUIDGID};
use crate::server::{Header, MAX_DATA, Server};
use crate::wire::{Outcome, Reader, Reply};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Most bytes that one COPY_FILE_RANGE copies, so that it ends soon: the guest asks again.
const MOST_COPIED: u64 = 64 << 20;

/// Which of the guest's flags of open(2) concern the host. O_APPEND comes with each write,
/// O_DIRECT is about the guest's page cache.
fn host_flags(guest: u32) -> Outcome<OFlags> {
    let kept = OFlags::TRUNC | OFlags::DSYNC | OFlags::SYNC;
    let guest = OFlags::from_bits_retain(guest);
    let access = match guest & OFlags::ACCMODE {
        access if access == OFlags::RDONLY => OFlags::RDONLY,
        access if access == OFlags::WRONLY => OFlags::WRONLY,
        access if access == OFlags::RDWR => OFlags::RDWR,
        _ => return Err(Errno::INVAL),
    };
    Ok(access | (guest & kept))
}

/// Whether a file so opened can be changed.
fn changes(flags: OFlags) -> bool {
    flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC)
}

/// Takes set-user-ID and set-group-ID off a file, as the host's kernel does by itself for all
/// but root.
pub(crate) fn kill_privileges(fd: impl AsFd) -> Outcome {
    let mode = rustix::fs::fstat(&fd)?.st_mode;
    let group = if mode & 0o010 != 0 { 0o2000 } else { 0 };
    let kept = mode & 0o7777 & !(0o4000 | group);
    if kept == mode & 0o7777 { Ok(()) } else { rustix::fs::fchmod(&fd, Mode::from_raw_mode(kept)) }
}

impl Server {
    fn file(&self, number: u64) -> Outcome<Arc<Handle>> {
        let handle = self.handles.get(number)?;
        if matches!(*handle, Handle::File(_)) { Ok(handle) } else { Err(Errno::BADF) }
    }

    /// Opens a file that the guest knows.
    pub(crate) fn open_inode(&self, inode: &Inode, flags: OFlags) -> Outcome<OwnedFd> {
        if self.read_only && changes(flags) {
            return Err(Errno::ROFS);
        }
        match inode.kind {
            FileType::RegularFile => self.reopen.open(&inode.fd, flags),
            FileType::Directory => Err(Errno::ISDIR),
            // The guest's kernel handles FIFOs, sockets, devices and links by itself.
            _ => Err(Errno::PERM),
        }
    }

    pub(crate) fn open(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let flags = host_flags(reader.u32()?)?;
        let kill = reader.u32()? & OPEN_KILL_SUIDGID != 0;
        self.handles.check_room()?;
        let inode = self.inodes.get(header.node)?;
        self.finish_open(header.node, &inode, flags, kill, reply)
    }

    fn finish_open(
        &self,
        node: NodeId,
        inode: &Inode,
        flags: OFlags,
        kill: bool,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let file = self.open_inode(inode, flags)?;
        if kill && flags.contains(OFlags::TRUNC) {
            kill_privileges(&file)?;
        }
        let number = self.handles.add(node, flags - OFlags::TRUNC, Handle::File(file))?;
        reply.u64(number);
        reply.zeroes(8);
        Ok(())
    }

    /// Makes a file, or opens the one that is there, and tells the guest of both in one reply.
    /// What is there is opened only after it is known to be a file: a FIFO would never answer.
    pub(crate) fn create(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let guest_flags = reader.u32()?;
        let wanted = permitted(FileType::RegularFile, reader.u32()?);
        reader.skip(4)?;
        let kill = reader.u32()? & OPEN_KILL_SUIDGID != 0;
        let name = reader.name()?;
        let flags = host_flags(guest_flags)?;
        self.handles.check_room()?;
        let folder = self.folder(header.node)?;
        let new = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&folder, name, new, Mode::from_raw_mode(wanted)) {
            Ok(file) => {
                let (node, _) = self.tell(header.node, name, Some(wanted), reply)?;
                let number = self.handles.add(node, flags - OFlags::TRUNC, Handle::File(file));
                reply.u64(self.or_forget(node, number)?);
                reply.zeroes(8);
                Ok(())
            }
            Err(Errno::EXIST) if guest_flags & OFlags::EXCL.bits() == 0 => {
                let (node, inode) = self.tell(header.node, name, None, reply)?;
                let opened = self.finish_open(node, &inode, flags, kill, reply);
                self.or_forget(node, opened)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Takes back that the guest was told of an inode, where it will get an error instead.
    fn or_forget<T>(&self, node: NodeId, outcome: Outcome<T>) -> Outcome<T> {
        if outcome.is_err() {
            self.inodes.forget(node, 1);
        }
        outcome
    }

    pub(crate) fn read(&self, reader: &mut Reader<'_>, reply: &mut Reply<'_>) -> Outcome {
        let (number, offset) = (reader.u64()?, reader.u64()?);
        let size = (reader.u32()? as usize).min(MAX_DATA).min(reply.room());
        let handle = self.file(number)?;
        let start = reply.bytes.len();
        reply.zeroes(size);
        let mut done = 0;
        while let Some(rest) = reply.bytes.get_mut(start + done..).filter(|rest| !rest.is_empty()) {
            let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            match rustix::io::pread(handle.fd(), rest, at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        reply.bytes.truncate(start + done);
        Ok(())
    }

    pub(crate) fn write(&self, reader: &mut Reader<'_>, reply: &mut Reply<'_>) -> Outcome {
        let (number, offset) = (reader.u64()?, reader.u64()?);
        let (size, write_flags) = (reader.u32()?, reader.u32()?);
        reader.skip(8)?;
        let open_flags = OFlags::from_bits_retain(reader.u32()?);
        reader.skip(4)?;
        let data = reader.rest();
        if data.len() != size as usize || data.len() > MAX_DATA {
            return Err(Errno::INVAL);
        }
        let handle = self.file(number)?;
        if write_flags & WRITE_KILL_SUIDGID != 0 {
            kill_privileges(handle.fd())?;
        }
        // What comes from the guest's page cache has its place, whatever handle carries it.
        let append = open_flags.contains(OFlags::APPEND) && write_flags & WRITE_CACHE == 0;
        let how = if append { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.checked_add(done as u64).ok_or(Errno::FBIG)?;
            match rustix::io::pwritev2(handle.fd(), &[IoSlice::new(rest)], at, how) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        // No more than the data, which is at most MAX_DATA.
        reply.u32(done as u32);
        reply.u32(0);
        Ok(())
    }

    pub(crate) fn release(&self, reader: &mut Reader<'_>) -> Outcome {
        self.handles.remove(reader.u64()?)
    }

    pub(crate) fn sync(&self, reader: &mut Reader<'_>) -> Outcome {
        let handle = self.handles.get(reader.u64()?)?;
        if reader.u32()? & FSYNC_DATA != 0 {
            rustix::fs::fdatasync(handle.fd())
        } else {
            rustix::fs::fsync(handle.fd())
        }
    }

    /// The guest's sync(2): what it wrote is durable, as it is on a disk of its own.
    pub(crate) fn sync_all(&self) -> Outcome {
        let root = self.inodes.get(NodeId::ROOT)?;
        rustix::fs::syncfs(self.reopen.open(&root.fd, OFlags::RDONLY | OFlags::DIRECTORY)?)
    }

    pub(crate) fn allocate(&self, reader: &mut Reader<'_>) -> Outcome {
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let handle = self.file(reader.u64()?)?;
        let (offset, length) = (reader.u64()?, reader.u64()?);
        let mode = FallocateFlags::from_bits_retain(reader.u32()?);
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        rustix::fs::fallocate(handle.fd(), mode, offset, length)
    }

    /// SEEK_DATA and SEEK_HOLE; the others are the guest's own affair.
    pub(crate) fn seek(&self, reader: &mut Reader<'_>, reply: &mut Reply<'_>) -> Outcome {
        const DATA: u32 = 3;
        const HOLE: u32 = 4;
        let handle = self.file(reader.u64()?)?;
        let (offset, whence) = (reader.u64()?, reader.u32()?);
        let target = match whence {
            DATA => SeekFrom::Data(offset),
            HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        reply.u64(rustix::fs::seek(handle.fd(), target)?);
        Ok(())
    }

    pub(crate) fn copy_range(&self, reader: &mut Reader<'_>, reply: &mut Reply<'_>) -> Outcome {
        let from = self.file(reader.u64()?)?;
        let mut from_offset = reader.u64()?;
        reader.skip(8)?;
        let to = self.file(reader.u64()?)?;
        let (mut to_offset, length, flags) = (reader.u64()?, reader.u64()?, reader.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        let length = length.min(MOST_COPIED) as usize;
        let copied = rustix::fs::copy_file_range(
            from.fd(),
            Some(&mut from_offset),
            to.fd(),
            Some(&mut to_offset),
            length,
        )?;
        // At most MOST_COPIED.
        reply.u32(copied as u32);
        reply.u32(0);
        Ok(())
    }
}
