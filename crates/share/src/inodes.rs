//! The inodes that the guest knows.
//!
//! A guest names inodes by numbers that it got from a lookup, and says how often it forgets them.
//! Each has a *place*, the folder and name under which it was last seen, and while it is used an
//! `O_PATH` descriptor. There are fewer descriptors than a guest may know inodes: those not used
//! for long are closed, and opened again from their place, one name at a time and never through
//! a symbolic link. A [`Key`] tells whether what is found there is still the same inode; if not,
//! the guest's number is stale.
use crate::attributes;
use crate::reopen::{is_procfs, open_entry, stale};
use crate::wire::Outcome;
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The guest's number of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NodeId(pub(crate) u64);

impl NodeId {
    /// The shared folder itself (FUSE_ROOT_ID).
    pub(crate) const ROOT: Self = Self(1);
}

/// Deepest chain of folders that is opened again from an ancestor.
const DEEPEST: usize = 4096;

/// Which inode of the host it is. The time of its creation tells a file from a later one that got
/// the same number, where the file system has it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    device: (u32, u32),
    inode: u64,
    birth: (i64, u32),
}

impl Key {
    fn of(attributes: &Statx) -> Self {
        Self {
            mount: attributes.stx_mnt_id,
            device: (attributes.stx_dev_major, attributes.stx_dev_minor),
            inode: attributes.stx_ino,
            birth: (attributes.stx_btime.tv_sec, attributes.stx_btime.tv_nsec),
        }
    }
}

/// Where an inode was last seen.
#[derive(Clone)]
struct Place {
    folder: NodeId,
    name: CString,
}

struct Node {
    /// `None` after a restore, until it is found again.
    key: Option<Key>,
    kind: FileType,
    /// `None` for the root only.
    place: Option<Place>,
    /// How often the guest was told of it and has not forgotten it.
    lookups: u64,
    open: Option<Arc<OwnedFd>>,
    /// Used since the hand of the clock passed.
    used: bool,
    /// Its name is gone: the descriptor is the only way to it and stays open.
    pinned: bool,
}

/// An inode in use.
#[derive(Clone)]
pub(crate) struct Inode {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) kind: FileType,
    mount: u64,
}

impl Inode {
    fn new(fd: OwnedFd, found: &Statx) -> Self {
        Self { fd: Arc::new(fd), kind: attributes::kind(found), mount: found.stx_mnt_id }
    }

    /// As a folder.
    pub(crate) fn folder(self) -> Outcome<Arc<OwnedFd>> {
        if self.kind == FileType::Directory { Ok(self.fd) } else { Err(Errno::NOTDIR) }
    }
}

/// An inode that the guest knows, in a form that outlives the process.
pub(crate) struct Known {
    pub(crate) id: NodeId,
    pub(crate) folder: NodeId,
    pub(crate) name: CString,
    pub(crate) lookups: u64,
}

/// How much a guest can make the host hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) inodes: usize,
    pub(crate) descriptors: usize,
}

struct Table {
    nodes: HashMap<NodeId, Node>,
    by_key: HashMap<Key, NodeId>,
    /// Nodes with a descriptor that may be closed, in the order of the clock's hand; some may be
    /// gone by now.
    clock: VecDeque<NodeId>,
    /// Nodes with a descriptor, the root and pinned ones excepted.
    open: usize,
    pinned: usize,
    next: u64,
}

/// The table of inodes. Its lock is held for no system call but the closing of descriptors.
pub(crate) struct Inodes {
    table: Mutex<Table>,
    bounds: Bounds,
}

impl Inodes {
    pub(crate) fn new(root: OwnedFd, bounds: Bounds) -> Outcome<Self> {
        let found = attributes::of(&root)?;
        let key = Key::of(&found);
        let root = Node {
            key: Some(key),
            kind: attributes::kind(&found),
            place: None,
            lookups: 1,
            open: Some(Arc::new(root)),
            used: true,
            pinned: false,
        };
        let table = Table {
            nodes: HashMap::from([(NodeId::ROOT, root)]),
            by_key: HashMap::from([(key, NodeId::ROOT)]),
            clock: VecDeque::new(),
            open: 0,
            pinned: 0,
            next: NodeId::ROOT.0 + 1,
        };
        Ok(Self { table: Mutex::new(table), bounds })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The inode of a number, opened again if need be.
    ///
    /// # Errors
    /// `ESTALE` where there is no such inode, or no longer.
    pub(crate) fn get(&self, id: NodeId) -> Outcome<Inode> {
        let mut chain = Vec::new();
        let mut inode = {
            let mut table = self.lock();
            let mut at = id;
            loop {
                let node = table.nodes.get_mut(&at).ok_or(Errno::STALE)?;
                node.used = true;
                if let (Some(fd), Some(key)) = (&node.open, node.key) {
                    break Inode { fd: Arc::clone(fd), kind: node.kind, mount: key.mount };
                }
                let place = node.place.clone().ok_or(Errno::STALE)?;
                if chain.len() == DEEPEST {
                    return Err(Errno::STALE);
                }
                chain.push((at, place.name, node.key));
                at = place.folder;
            }
        };
        while let Some((at, name, key)) = chain.pop() {
            let fd = open_entry(&inode.folder()?, &name).map_err(stale)?;
            let found = attributes::of(&fd)?;
            let found_key = Key::of(&found);
            if key.is_some_and(|key| key != found_key) {
                return Err(Errno::STALE);
            }
            inode = Inode::new(fd, &found);
            let mut table = self.lock();
            table.identify(at, found_key, inode.kind);
            table.keep_open(at, &inode.fd, self.bounds);
        }
        Ok(inode)
    }

    /// Looks a name up in a folder and counts that the guest is told of it.
    ///
    /// # Errors
    /// As the host finds it; `ENFILE` where the guest knows as many inodes as it may.
    pub(crate) fn look_up(&self, folder: NodeId, name: &CStr) -> Outcome<(NodeId, Inode, Statx)> {
        let parent = self.get(folder)?;
        let mount = parent.mount;
        let fd = open_entry(&parent.folder()?, name)?;
        let found = attributes::of(&fd)?;
        if found.stx_mnt_id != mount && is_procfs(&fd)? {
            return Err(Errno::ACCESS);
        }
        let inode = Inode::new(fd, &found);
        let id = self.lock().tell(Key::of(&found), folder, name, &inode, self.bounds)?;
        Ok((id, inode, found))
    }

    /// Whether the guest can know one more inode: asked before one is made for it.
    ///
    /// # Errors
    /// `ENFILE`.
    pub(crate) fn check_room(&self) -> Outcome {
        if self.lock().nodes.len() < self.bounds.inodes { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// The guest forgets `count` of what it was told of an inode.
    pub(crate) fn forget(&self, id: NodeId, count: u64) {
        if id != NodeId::ROOT {
            self.lock().forget(id, count);
        }
    }

    /// Forgets everything but the root.
    pub(crate) fn clear(&self) {
        let mut table = self.lock();
        let ids: Vec<_> = table.nodes.keys().copied().filter(|&id| id != NodeId::ROOT).collect();
        for id in ids {
            table.forget(id, u64::MAX);
        }
        table.clock = VecDeque::new();
    }

    /// Keeps an inode at hand that has just lost a name, if the guest knows it: it may go on using
    /// it. `held` was opened while it had the name.
    pub(crate) fn pin(&self, held: OwnedFd) {
        if let Ok(found) = attributes::of(&held) {
            self.lock().pin(Key::of(&found), held, self.bounds);
        }
    }

    /// What the guest knows, and the next number.
    pub(crate) fn list(&self) -> (Vec<Known>, u64) {
        let table = self.lock();
        let mut known: Vec<_> = table
            .nodes
            .iter()
            .filter(|(_, node)| !node.pinned)
            .filter_map(|(&id, node)| {
                let Place { folder, name } = node.place.clone()?;
                Some(Known { id, folder, name, lookups: node.lookups })
            })
            .collect();
        known.sort_unstable_by_key(|known| known.id.0);
        (known, table.next)
    }

    /// Knows again what was listed before, in place of what is known, and looks for it.
    ///
    /// # Errors
    /// `ENFILE` where it is more than the guest may know.
    pub(crate) fn know(&self, known: Vec<Known>, next: u64) -> Outcome {
        self.clear();
        let ids: Vec<_> = known.iter().map(|known| known.id).collect();
        {
            let mut table = self.lock();
            if known.len() >= self.bounds.inodes {
                return Err(Errno::NFILE);
            }
            table.next = next;
            for Known { id, folder, name, lookups } in known {
                let place = Some(Place { folder, name });
                let kind = FileType::Unknown;
                let node =
                    Node { key: None, kind, place, lookups, open: None, used: true, pinned: false };
                table.nodes.insert(id, node);
            }
        }
        for id in ids {
            // What is no longer there is stale, now and when the guest asks for it.
            let _ = self.get(id);
        }
        Ok(())
    }

    /// Notes that an inode the guest may know is now found under this name.
    pub(crate) fn note_place(&self, folder: NodeId, name: &CStr) {
        let Ok(parent) = self.get(folder).and_then(Inode::folder) else { return };
        let Ok(fd) = open_entry(&parent, name) else { return };
        let Ok(found) = attributes::of(&fd) else { return };
        let mut table = self.lock();
        let id = table.by_key.get(&Key::of(&found)).copied();
        if let Some(node) = id.and_then(|id| table.nodes.get_mut(&id)) {
            node.move_to(folder, name);
        }
    }
}

impl Node {
    fn move_to(&mut self, folder: NodeId, name: &CStr) {
        // The root has no place, however it is reached.
        if let Some(place) = &mut self.place
            && (place.folder != folder || place.name.as_c_str() != name)
        {
            *place = Place { folder, name: name.to_owned() };
        }
    }
}

impl Table {
    /// Counts one more lookup of an inode, which may be new.
    fn tell(
        &mut self,
        key: Key,
        folder: NodeId,
        name: &CStr,
        inode: &Inode,
        bounds: Bounds,
    ) -> Outcome<NodeId> {
        if let Some(&id) = self.by_key.get(&key)
            && let Some(node) = self.nodes.get_mut(&id)
        {
            node.lookups = node.lookups.saturating_add(1);
            node.move_to(folder, name);
            self.keep_open(id, &inode.fd, bounds);
            return Ok(id);
        }
        if self.nodes.len() >= bounds.inodes {
            return Err(Errno::NFILE);
        }
        let id = NodeId(self.next);
        self.next = self.next.checked_add(1).ok_or(Errno::NFILE)?;
        let place = Some(Place { folder, name: name.to_owned() });
        let node = Node {
            key: Some(key),
            kind: inode.kind,
            place,
            lookups: 1,
            open: None,
            used: true,
            pinned: false,
        };
        self.nodes.insert(id, node);
        self.by_key.insert(key, id);
        self.keep_open(id, &inode.fd, bounds);
        Ok(id)
    }

    /// Notes which inode a restored node is.
    fn identify(&mut self, id: NodeId, key: Key, kind: FileType) {
        if let Some(node) = self.nodes.get_mut(&id)
            && node.key.is_none()
        {
            node.key = Some(key);
            node.kind = kind;
            self.by_key.entry(key).or_insert(id);
        }
    }

    /// Keeps a descriptor for a node that has none; closes another one if there are too many.
    fn keep_open(&mut self, id: NodeId, fd: &Arc<OwnedFd>, bounds: Bounds) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.used = true;
        if node.open.is_some() {
            return;
        }
        node.open = Some(Arc::clone(fd));
        self.clock.push_back(id);
        self.open += 1;
        while self.open > bounds.descriptors && self.close_one() {}
        if self.clock.len() > 2 * bounds.descriptors {
            let nodes = &self.nodes;
            self.clock.retain(|id| nodes.get(id).is_some_and(|n| n.open.is_some() && !n.pinned));
        }
    }

    /// Turns the clock until a descriptor is closed; `false` if there is none.
    fn close_one(&mut self) -> bool {
        while let Some(id) = self.clock.pop_front() {
            let Some(node) = self.nodes.get_mut(&id) else { continue };
            if node.pinned {
                continue;
            }
            if node.used {
                node.used = false;
                self.clock.push_back(id);
            } else if node.open.take().is_some() {
                self.open -= 1;
                return true;
            }
        }
        false
    }

    fn forget(&mut self, id: NodeId, count: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return;
        }
        if let Some(node) = self.nodes.remove(&id) {
            // Another node may have taken the key over, where a restore found one inode twice.
            if let Some(key) = node.key
                && self.by_key.get(&key) == Some(&id)
            {
                self.by_key.remove(&key);
            }
            if node.pinned {
                self.pinned -= 1;
            } else if node.open.is_some() {
                self.open -= 1;
            }
        }
    }

    fn pin(&mut self, key: Key, fd: OwnedFd, bounds: Bounds) {
        // A guest that keeps more removed files than this finds the last ones stale.
        if self.pinned >= bounds.descriptors {
            return;
        }
        let Some(&id) = self.by_key.get(&key) else { return };
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.pinned || id == NodeId::ROOT {
            return;
        }
        if node.open.is_none() {
            node.open = Some(Arc::new(fd));
        } else {
            self.open -= 1;
        }
        node.pinned = true;
        self.pinned += 1;
    }
}
