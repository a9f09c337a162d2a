//! The server: takes requests apart, sends them to their operations, and starts a session.
use crate::attributes::{Owner, Ownership};
use crate::handles::Handles;
use crate::inodes::{Bounds, Inodes, NodeId};
use crate::protocol::{IN_HEADER, MAJOR, MINOR, OLDEST_MINOR, Opcode, init};
use crate::reopen::{Reopen, is_procfs};
use crate::wire::{Outcome, Reader, Reply};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Most bytes of file data that a READ asks for or a WRITE brings.
pub const MAX_DATA: usize = 1 << 20;

/// Most bytes of a request: a WRITE of [`MAX_DATA`], with its headers on a page of their own.
pub const MAX_REQUEST: usize = MAX_DATA + 4096;

/// Most bytes of a reply.
pub const MAX_REPLY: usize = MAX_DATA + 4096;

/// What a server shares, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder on the host.
    pub folder: PathBuf,
    /// Refuse all changes.
    pub read_only: bool,
    /// Whom the guest sees as the owner of what belongs to the user who runs the server; `None`
    /// keeps the user's numbers.
    pub owner: Option<Owner>,
    /// How much the guest can make the host hold.
    pub limits: Limits,
}

/// How much a guest can make the host hold for one share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Inodes that the guest knows, each up to 500 bytes of memory. Beyond it, lookups fail.
    pub inodes: usize,
    /// Descriptors of inodes that are kept open. Beyond it, those not used for long are closed and
    /// opened again when they are needed. As many again are kept for files without a name.
    pub descriptors: usize,
    /// Files and folders that the guest has open, a descriptor each. Beyond it, opening fails.
    pub handles: usize,
}

impl Limits {
    /// Limits for a share that may use this many of the process's descriptors.
    pub fn for_descriptors(descriptors: usize) -> Self {
        let quarter = descriptors / 4;
        Self { inodes: 1 << 20, descriptors: quarter.max(16), handles: (2 * quarter).max(32) }
    }
}

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It cannot be opened.
    #[error("{folder} cannot be shared; give a folder that exists and that you may open")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// It holds processes, not files.
    #[error(
        "{0} is a procfs, through which a guest would reach the memory of processes; share a \
         folder with files"
    )]
    Procfs(PathBuf),
    /// The host has no /proc.
    #[error("shared folders need /proc/self/fd; mount a procfs at /proc")]
    NoProc(#[source] std::io::Error),
}

/// A FUSE server for one folder. Any number of threads may serve requests at once.
pub struct Server {
    pub(crate) inodes: Inodes,
    pub(crate) handles: Handles,
    pub(crate) reopen: Reopen,
    pub(crate) ownership: Ownership,
    pub(crate) read_only: bool,
    pub(crate) started: AtomicBool,
}

/// A request's common part.
#[derive(Clone, Copy)]
pub(crate) struct Header {
    pub(crate) node: NodeId,
}

impl Server {
    /// Opens the folder.
    ///
    /// # Errors
    /// It is not there, is no folder, is a procfs, or the host has no `/proc`.
    pub fn new(options: &Options) -> Result<Self, ShareError> {
        let folder = |source: Errno| ShareError::Folder {
            folder: options.folder.clone(),
            source: source.into(),
        };
        let root = open_root(&options.folder).map_err(folder)?;
        if is_procfs(&root).map_err(folder)? {
            return Err(ShareError::Procfs(options.folder.clone()));
        }
        let bounds =
            Bounds { inodes: options.limits.inodes, descriptors: options.limits.descriptors };
        Ok(Self {
            inodes: Inodes::new(root, bounds).map_err(folder)?,
            handles: Handles::new(options.limits.handles),
            reopen: Reopen::new().map_err(|source| ShareError::NoProc(source.into()))?,
            ownership: Ownership::new(options.owner),
            read_only: options.read_only,
            started: AtomicBool::new(false),
        })
    }

    /// Serves one request. `reply` gets what is to be given back to the guest, no more than
    /// `room` bytes; it stays empty where the request has no answer. What the buffer held before
    /// is dropped, its memory is used again.
    ///
    /// The call may wait for the host's file system, and for nothing else.
    pub fn serve(&self, request: &[u8], room: usize, reply: &mut Vec<u8>) {
        let mut reader = Reader::new(request);
        let mut reply = Reply::new(reply, room.min(MAX_REPLY));
        let Ok(fields) = take_header(&mut reader) else {
            return reply.bytes.clear();
        };
        let outcome = if fields.length as usize == request.len() && request.len() <= MAX_REQUEST {
            self.dispatch(&fields, reader, &mut reply)
        } else {
            Err(Errno::INVAL)
        };
        let opcode = Opcode::of(fields.opcode);
        if let Some(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt) = opcode {
            return reply.bytes.clear();
        }
        reply.finish(fields.unique, outcome);
    }

    /// Ends the session: everything that is open is closed, everything known is forgotten.
    pub fn reset(&self) {
        self.started.store(false, Ordering::Release);
        self.handles.clear();
        self.inodes.clear();
    }

    fn dispatch(&self, fields: &Fields, mut reader: Reader<'_>, reply: &mut Reply<'_>) -> Outcome {
        let opcode = Opcode::of(fields.opcode).ok_or(Errno::NOSYS)?;
        if opcode == Opcode::Init {
            return self.init(&mut reader, reply);
        }
        if !self.started.load(Ordering::Acquire) {
            return Err(Errno::IO);
        }
        if self.read_only && opcode.changes() {
            return Err(Errno::ROFS);
        }
        if opcode.makes_inode() {
            self.inodes.check_room()?;
        }
        let header = Header { node: NodeId(fields.node) };
        let reader = &mut reader;
        match opcode {
            Opcode::Lookup => self.look_up(header, reader, reply),
            Opcode::Forget => self.forget(header, reader),
            Opcode::BatchForget => self.batch_forget(reader),
            Opcode::GetAttr => self.get_attributes(header, reader, reply),
            Opcode::SetAttr => self.set_attributes(header, reader, reply),
            Opcode::ReadLink => self.read_link(header, reply),
            Opcode::SymLink => self.make_link(header, reader, reply),
            Opcode::MkNod => self.make_node(header, reader, reply),
            Opcode::MkDir => self.make_folder(header, reader, reply),
            Opcode::Unlink => self.remove(header, reader, false),
            Opcode::RmDir => self.remove(header, reader, true),
            Opcode::Rename => self.rename(header, reader, false),
            Opcode::Rename2 => self.rename(header, reader, true),
            Opcode::Link => self.link(header, reader, reply),
            Opcode::Create => self.create(header, reader, reply),
            Opcode::Open => self.open(header, reader, reply),
            Opcode::Read => self.read(reader, reply),
            Opcode::Write => self.write(reader, reply),
            Opcode::Release | Opcode::ReleaseDir => self.release(reader),
            Opcode::Fsync | Opcode::FsyncDir => self.sync(reader),
            Opcode::SyncFs => self.sync_all(),
            Opcode::Fallocate => self.allocate(reader),
            Opcode::Lseek => self.seek(reader, reply),
            Opcode::CopyFileRange => self.copy_range(reader, reply),
            Opcode::StatFs => self.stat_filesystem(header, reply),
            Opcode::SetXattr => self.set_xattr(header, reader),
            Opcode::GetXattr => self.get_xattr(header, reader, reply),
            Opcode::ListXattr => self.list_xattrs(header, reader, reply),
            Opcode::RemoveXattr => self.remove_xattr(header, reader),
            Opcode::OpenDir => self.open_folder(header, reply),
            Opcode::ReadDir => self.read_folder(header, reader, reply, false),
            Opcode::ReadDirPlus => self.read_folder(header, reader, reply, true),
            Opcode::Destroy => {
                self.reset();
                Ok(())
            }
            Opcode::Init | Opcode::Interrupt => Ok(()),
        }
    }

    /// Agrees with the guest on the protocol. What was known from a session before is forgotten.
    ///
    /// Not asked for: FUSE_WRITEBACK_CACHE, with which the guest would not see that a file grew on
    /// the host; FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS, so that locks stay within the guest and
    /// cannot block the host's programs; FUSE_EXPORT_SUPPORT, so that `..` never comes.
    fn init(&self, reader: &mut Reader<'_>, reply: &mut Reply<'_>) -> Outcome {
        const WANTED: u32 = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::HANDLE_KILLPRIV_V2;
        const PAGE: usize = 4096;
        let (major, minor) = (reader.u32()?, reader.u32()?);
        let (read_ahead, offered) = (reader.u32()?, reader.u32()?);
        if major < MAJOR || (major == MAJOR && minor < OLDEST_MINOR) {
            return Err(Errno::PROTO);
        }
        self.reset();
        reply.u32(MAJOR);
        reply.u32(MINOR);
        // A newer major version is answered with the version only; the guest then asks again.
        if major == MAJOR {
            self.started.store(true, Ordering::Release);
        }
        reply.u32(read_ahead.min(MAX_DATA as u32));
        reply.u32(offered & WANTED);
        // Requests that the guest sends by itself, such as read-ahead, before it waits.
        reply.u16(64);
        reply.u16(48);
        reply.u32(MAX_DATA as u32);
        reply.u32(1);
        reply.u16((MAX_DATA / PAGE) as u16);
        reply.zeroes(34);
        Ok(())
    }
}

fn open_root(folder: &Path) -> Outcome<std::os::fd::OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty())
}

/// `fuse_in_header`, but for what this server does not ask: who in the guest makes the request.
struct Fields {
    length: u32,
    opcode: u32,
    unique: u64,
    node: u64,
}

fn take_header(reader: &mut Reader<'_>) -> Outcome<Fields> {
    let (length, opcode) = (reader.u32()?, reader.u32()?);
    let (unique, node) = (reader.u64()?, reader.u64()?);
    reader.skip(IN_HEADER - 24)?;
    Ok(Fields { length, opcode, unique, node })
}
