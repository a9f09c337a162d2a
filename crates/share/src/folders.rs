//! Reading folders.
use crate::attributes::ENTRY_OUT;
use crate::handles::Handle;
use crate::inodes::NodeId;
use crate::protocol::UNKNOWN_INODE;
use crate::server::{Header, Server};
use crate::wire::{Outcome, Reader, Reply};
use rustix::fs::{FileType, OFlags, RawDir, RawDirEntry, SeekFrom};
use rustix::io::Errno;
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

/// Bytes that the host's kernel fills with entries at once.
const BATCH: usize = 32 << 10;

/// Bytes of `fuse_dirent` before the name.
const ENTRY: usize = 24;

/// A multiple of eight, to which entries are filled up.
fn padded(length: usize) -> usize {
    length.next_multiple_of(8)
}

impl Server {
    pub(crate) fn open_folder(&self, header: Header, reply: &mut Reply<'_>) -> Outcome {
        self.handles.check_room()?;
        let inode = self.folder(header.node)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let handle = Handle::Folder(self.reopen.open(&inode, flags)?, Mutex::new(Some(0)));
        reply.u64(self.handles.add(header.node, OFlags::DIRECTORY, handle)?);
        reply.zeroes(8);
        Ok(())
    }

    /// READDIR, and READDIRPLUS, which looks each entry up as well. As many entries as fit,
    /// from the position that the guest names: one that came with an entry before.
    pub(crate) fn read_folder(
        &self,
        header: Header,
        reader: &mut Reader<'_>,
        reply: &mut Reply<'_>,
        plus: bool,
    ) -> Outcome {
        let (number, offset) = (reader.u64()?, reader.u64()?);
        let most = (reader.u32()? as usize).min(reply.room());
        let handle = self.handles.get(number)?;
        let Handle::Folder(fd, position) = &*handle else { return Err(Errno::NOTDIR) };
        let mut position = position.lock().unwrap_or_else(PoisonError::into_inner);
        if *position != Some(offset) {
            rustix::fs::seek(fd, SeekFrom::Start(offset))?;
        }
        *position = None;
        let end = reply.bytes.len() + most;
        let first = reply.bytes.len();
        let mut buffer = vec![MaybeUninit::uninit(); BATCH.min(most.max(4096))];
        let mut entries = RawDir::new(fd, &mut buffer);
        let mut at = offset;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // What was read so far is told; the error comes again.
                Err(_) if reply.bytes.len() > first => return Ok(()),
                Err(errno) => return Err(errno),
            };
            let next = entry.next_entry_cookie();
            let head = if plus { ENTRY_OUT } else { 0 };
            let length = padded(head + ENTRY + entry.file_name().count_bytes());
            if reply.bytes.len() + length > end {
                return if reply.bytes.len() > first { Ok(()) } else { Err(Errno::INVAL) };
            }
            self.add_entry(header.node, &entry, reply, plus);
            at = next;
        }
        *position = Some(at);
        Ok(())
    }

    fn add_entry(
        &self,
        folder: NodeId,
        entry: &RawDirEntry<'_>,
        reply: &mut Reply<'_>,
        plus: bool,
    ) {
        let name = entry.file_name();
        let (mut kind, mut inode) = (entry.file_type(), entry.ino());
        match name.to_bytes() {
            // What is above the folder does not concern the guest.
            b".." => {
                inode = UNKNOWN_INODE;
                reply.zeroes(if plus { ENTRY_OUT } else { 0 });
            }
            b"." => reply.zeroes(if plus { ENTRY_OUT } else { 0 }),
            _ if plus => match self.inodes.look_up(folder, name) {
                Ok((node, looked_up, found)) => {
                    kind = looked_up.kind;
                    inode = found.stx_ino;
                    self.ownership.write_entry_out(reply, node.0, &found);
                }
                // Gone meanwhile, or not for the guest: it will look the name up by itself.
                Err(_) => reply.zeroes(ENTRY_OUT),
            },
            _ => {}
        }
        reply.u64(inode);
        reply.u64(entry.next_entry_cookie());
        // A name has at most 255 bytes.
        reply.u32(name.count_bytes() as u32);
        reply.u32(if kind == FileType::Unknown { 0 } else { kind.as_raw_mode() >> 12 });
        reply.slice(name.to_bytes());
        reply.zeroes(padded(name.count_bytes()) - name.count_bytes());
    }
}
