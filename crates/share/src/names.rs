//! Operations on names: looking up, making, removing, renaming.
use crate::attributes::{self, permitted};
use crate::inodes::{Inode, NodeId};
use crate::reopen::open_entry;
use crate::server::{Header, Server};
use crate::wire::{Outcome, Reader, Reply};
use rustix::fs::{AtFlags, FileType, Mode, RenameFlags, Statx};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

impl Server {
    pub(crate) fn folder(&self, node: NodeId) -> Outcome<Arc<OwnedFd>> {
        self.inodes.get(node)?.folder()
    }

    pub(crate) fn look_up(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let (node, _, found) = self.inodes.look_up(header.node, reader.name()?)?;
        self.ownership.write_entry_out(reply, node.0, &found);
        Ok(())
    }

    pub(crate) fn forget(&self, header: Header, reader: &mut Reader<'_>) -> Outcome {
        self.inodes.forget(header.node, reader.u64()?);
        Ok(())
    }

    pub(crate) fn batch_forget(&self, reader: &mut Reader<'_>) -> Outcome {
        let count = reader.u32()?;
        reader.skip(4)?;
        // The loop ends with the request, whatever the count says.
        for _ in 0..count {
            let node = NodeId(reader.u64()?);
            self.inodes.forget(node, reader.u64()?);
        }
        Ok(())
    }

    pub(crate) fn read_link(&self, header: Header, reply: &mut Reply<'_>) -> Outcome {
        let inode = self.inodes.get(header.node)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&inode.fd, c"", Vec::new())?;
        reply.slice(target.as_bytes());
        Ok(())
    }

    pub(crate) fn make_link(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let (name, target) = (reader.name()?, reader.target()?);
        rustix::fs::symlinkat(target, self.folder(header.node)?, name)?;
        self.tell(header.node, name, None, reply).map(drop)
    }

    /// Regular files, FIFOs and sockets, which the guest keeps to itself. Devices are refused.
    pub(crate) fn make_node(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let mode = reader.u32()?;
        reader.skip(12)?;
        let name = reader.name()?;
        let kind = match FileType::from_raw_mode(mode) {
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        };
        let wanted = permitted(kind, mode);
        let folder = self.folder(header.node)?;
        rustix::fs::mknodat(&folder, name, kind, Mode::from_raw_mode(wanted), 0)?;
        self.tell(header.node, name, Some(wanted), reply).map(drop)
    }

    pub(crate) fn make_folder(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let wanted = permitted(FileType::Directory, reader.u32()?);
        reader.skip(4)?;
        let name = reader.name()?;
        rustix::fs::mkdirat(self.folder(header.node)?, name, Mode::from_raw_mode(wanted))?;
        self.tell(header.node, name, Some(wanted), reply).map(drop)
    }

    /// Looks up what was just made and tells the guest of it. The guest's kernel has applied the
    /// umask of its process to `mode`; what this process's own took off as well is put back.
    pub(crate) fn tell(
        &self,
        folder: NodeId,
        name: &CStr,
        mode: Option<u32>,
        reply: &mut Reply<'_>,
    ) -> Outcome<(NodeId, Inode)> {
        let (node, inode, mut found) = self.inodes.look_up(folder, name)?;
        if let Some(mode) = mode {
            found = self.put_mode_back(&inode, mode, found);
        }
        self.ownership.write_entry_out(reply, node.0, &found);
        Ok((node, inode))
    }

    fn put_mode_back(&self, inode: &Inode, wanted: u32, found: Statx) -> Statx {
        // The host passes set-group-ID on to new folders.
        let inherited = u32::from(found.stx_mode) & 0o2000;
        let wanted = wanted | inherited;
        if u32::from(found.stx_mode) & 0o7777 == wanted {
            return found;
        }
        // A file system without such bits keeps its own, and the reply says which.
        match self.reopen.chmod(&inode.fd, Mode::from_raw_mode(wanted)) {
            Ok(()) => attributes::of(&inode.fd).unwrap_or(found),
            Err(_) => found,
        }
    }

    pub(crate) fn link(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
    ) -> Outcome {
        let old = self.inodes.get(NodeId(reader.u64()?))?;
        let name = reader.name()?;
        if old.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        self.reopen.link(&old.fd, self.folder(header.node)?, name)?;
        self.tell(header.node, name, None, reply).map(drop)
    }

    pub(crate) fn remove(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        is_folder: bool,
    ) -> Outcome {
        let name = reader.name()?;
        let folder = self.folder(header.node)?;
        let held = open_entry(&folder, name)?;
        let flags = if is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&folder, name, flags)?;
        self.inodes.pin(held);
        Ok(())
    }

    /// RENAME and RENAME2, which has flags. Both folders are ones the guest knows, so nothing
    /// leaves the share.
    pub(crate) fn rename(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        has_flags: bool,
    ) -> Outcome {
        let to_node = NodeId(reader.u64()?);
        let raw = if has_flags { reader.u32()? } else { 0 };
        if has_flags {
            reader.skip(4)?;
        }
        let flags = match RenameFlags::from_bits(raw) {
            Some(flags) if !flags.contains(RenameFlags::WHITEOUT) => flags,
            _ => return Err(Errno::INVAL),
        };
        let (old, new) = (reader.name()?, reader.name()?);
        let (from, to) = (self.folder(header.node)?, self.folder(to_node)?);
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let replaced = if exchange { None } else { open_entry(&to, new).ok() };
        rustix::fs::renameat_with(&from, old, &to, new, flags)?;
        if let Some(held) = replaced {
            self.inodes.pin(held);
        }
        self.inodes.note_place(to_node, new);
        if exchange {
            self.inodes.note_place(header.node, old);
        }
        Ok(())
    }
}
