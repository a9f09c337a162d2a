//! The session's state, for snapshots of the VM: what the guest knows and has open, by names.
//!
//! Restoring finds each inode again by its name. What the host has removed or replaced meanwhile,
//! and files that were open without a name, are stale for the guest afterwards (`ESTALE`, `EBADF`),
//! as on a network file system.
use crate::handles::Handle;
use crate::inodes::{Known, NodeId};
use crate::server::Server;
use crate::wire::{Outcome, Reader};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// A state that is not one of a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved state of a shared folder is damaged or too large; mount the folder anew")]
pub struct StateError;

impl Server {
    /// The session's state. No request may be under way.
    pub fn save(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |number: u64| bytes.extend_from_slice(&number.to_le_bytes());
        put(self.started.load(Ordering::Acquire).into());
        let (open, next) = self.handles.list();
        put(next);
        put(open.len() as u64);
        for (number, node, access) in open {
            put(number);
            put(node.0);
            put(access.bits().into());
        }
        let (known, next) = self.inodes.list();
        put(next);
        put(known.len() as u64);
        for Known { id, folder, name, lookups } in known {
            for number in [id.0, folder.0, lookups] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(name.as_bytes_with_nul());
        }
        bytes
    }

    /// Goes on with a saved session, in place of the present one. No request may be under way.
    ///
    /// # Errors
    /// The state is damaged, or holds more than the limits allow; the session is then ended.
    pub fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        self.reset();
        self.take(Reader::new(state)).map_err(|_| {
            self.reset();
            StateError
        })
    }

    fn take(&self, mut reader: Reader<'_>) -> Outcome {
        let started = reader.u64()?;
        let mut open = Vec::new();
        let next_handle = reader.u64()?;
        // Both loops end with the bytes, whatever the counts say.
        for _ in 0..reader.u64()? {
            open.push((reader.u64()?, NodeId(reader.u64()?), reader.u64()?));
        }
        let mut known = Vec::new();
        let next = reader.u64()?;
        for _ in 0..reader.u64()? {
            let (id, folder) = (NodeId(reader.u64()?), NodeId(reader.u64()?));
            let (lookups, name) = (reader.u64()?, reader.name()?.to_owned());
            if id.0 <= NodeId::ROOT.0 || id.0 >= next {
                return Err(Errno::INVAL);
            }
            known.push(Known { id, folder, name, lookups });
        }
        if !reader.rest().is_empty() || started > 1 {
            return Err(Errno::INVAL);
        }
        self.inodes.know(known, next)?;
        self.handles.begin_at(next_handle);
        for (number, node, access) in open {
            let access = u32::try_from(access).map_err(|_| Errno::INVAL)?;
            self.open_again(number, node, OFlags::from_bits_retain(access))?;
        }
        self.started.store(started == 1, Ordering::Release);
        Ok(())
    }

    fn open_again(&self, number: u64, node: NodeId, access: OFlags) -> Outcome {
        let kept = OFlags::ACCMODE | OFlags::SYNC | OFlags::DSYNC | OFlags::DIRECTORY;
        let access = access & kept;
        let Ok(inode) = self.inodes.get(node) else { return Ok(()) };
        let handle = if access.contains(OFlags::DIRECTORY) {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            self.reopen.open(&inode.fd, flags).map(|fd| Handle::Folder(fd, Mutex::new(Some(0))))
        } else {
            self.open_inode(&inode, access).map(Handle::File)
        };
        // A handle that cannot be opened again is a bad one for the guest.
        let Ok(handle) = handle else { return Ok(()) };
        self.handles.add_as(number, node, access, handle)
    }
}
