//! Files and folders that the guest has open.
use crate::inodes::NodeId;
use crate::wire::Outcome;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is open.
pub(crate) enum Handle {
    /// A regular file.
    File(OwnedFd),
    /// A folder, and the position that its descriptor has, where it is known.
    Folder(OwnedFd, Mutex<Option<u64>>),
}

impl Handle {
    pub(crate) fn fd(&self) -> &OwnedFd {
        match self {
            Self::File(fd) | Self::Folder(fd, _) => fd,
        }
    }
}

struct Entry {
    node: NodeId,
    access: OFlags,
    handle: Arc<Handle>,
}

/// The table of open files, of bounded size.
pub(crate) struct Handles {
    table: Mutex<(HashMap<u64, Entry>, u64)>,
    most: usize,
}

impl Handles {
    pub(crate) fn new(most: usize) -> Self {
        Self { table: Mutex::new((HashMap::new(), 1)), most }
    }

    fn lock(&self) -> MutexGuard<'_, (HashMap<u64, Entry>, u64)> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether another file can be opened: asked before something is created for it.
    ///
    /// # Errors
    /// `ENFILE`.
    pub(crate) fn check_room(&self) -> Outcome {
        if self.lock().0.len() < self.most { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Numbers an open file.
    ///
    /// # Errors
    /// `ENFILE` where the guest has as many as it may.
    pub(crate) fn add(&self, node: NodeId, access: OFlags, handle: Handle) -> Outcome<u64> {
        let (entries, next) = &mut *self.lock();
        if entries.len() >= self.most {
            return Err(Errno::NFILE);
        }
        let number = *next;
        *next = next.checked_add(1).ok_or(Errno::NFILE)?;
        entries.insert(number, Entry { node, access, handle: Arc::new(handle) });
        Ok(number)
    }

    /// All that is open, as number, inode and flags, and the next number.
    pub(crate) fn list(&self) -> (Vec<(u64, NodeId, OFlags)>, u64) {
        let (entries, next) = &*self.lock();
        let mut list: Vec<_> = entries.iter().map(|(&n, e)| (n, e.node, e.access)).collect();
        list.sort_unstable_by_key(|&(number, ..)| number);
        (list, *next)
    }

    /// Numbers what is opened from here on.
    pub(crate) fn begin_at(&self, next: u64) {
        self.lock().1 = next;
    }

    /// Opens one again under the number it had.
    ///
    /// # Errors
    /// `ENFILE`, as [`Handles::add`].
    pub(crate) fn add_as(
        &self,
        number: u64,
        node: NodeId,
        access: OFlags,
        handle: Handle,
    ) -> Outcome {
        let (entries, next) = &mut *self.lock();
        if entries.len() >= self.most {
            return Err(Errno::NFILE);
        }
        *next = (*next).max(number.checked_add(1).ok_or(Errno::NFILE)?);
        entries.insert(number, Entry { node, access, handle: Arc::new(handle) });
        Ok(())
    }

    /// What a number stands for.
    ///
    /// # Errors
    /// `EBADF`.
    pub(crate) fn get(&self, number: u64) -> Outcome<Arc<Handle>> {
        let table = self.lock();
        table.0.get(&number).map(|entry| Arc::clone(&entry.handle)).ok_or(Errno::BADF)
    }

    /// Closes one, once nothing uses it any more.
    pub(crate) fn remove(&self, number: u64) -> Outcome {
        let entry = self.lock().0.remove(&number);
        entry.map(drop).ok_or(Errno::BADF)
    }

    /// Closes all.
    pub(crate) fn clear(&self) {
        let entries = std::mem::take(&mut self.lock().0);
        drop(entries);
    }
}
