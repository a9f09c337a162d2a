//! A FUSE client that does what a guest's kernel does, and what no kernel would.
#![allow(dead_code, reason = "each test program uses its part")]
use share::{Limits, MAX_REPLY, Options, Server};
use std::path::Path;

pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

pub mod errno {
    pub const PERM: i32 = 1;
    pub const NOENT: i32 = 2;
    pub const IO: i32 = 5;
    pub const BADF: i32 = 9;
    pub const ACCES: i32 = 13;
    pub const EXIST: i32 = 17;
    pub const NOTDIR: i32 = 20;
    pub const ISDIR: i32 = 21;
    pub const INVAL: i32 = 22;
    pub const NFILE: i32 = 23;
    pub const ROFS: i32 = 30;
    pub const NAMETOOLONG: i32 = 36;
    pub const NOSYS: i32 = 38;
    pub const NOTEMPTY: i32 = 39;
    pub const NODATA: i32 = 61;
    pub const PROTO: i32 = 71;
    pub const OPNOTSUPP: i32 = 95;
    pub const STALE: i32 = 116;
}

pub const ROOT: u64 = 1;
pub const RDONLY: u32 = 0;
pub const WRONLY: u32 = 1;
pub const RDWR: u32 = 2;
pub const EXCL: u32 = 0o200;
pub const TRUNC: u32 = 0o1000;
pub const APPEND: u32 = 0o2000;

pub type Answer<T = Vec<u8>> = Result<T, i32>;

/// Fields of a request.
#[derive(Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub fn name(mut self, name: &str) -> Self {
        self.0.extend(name.as_bytes());
        self.0.push(0);
        self
    }
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

pub fn body() -> Body {
    Body::default()
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A request as bytes.
pub fn request(opcode: u32, node: u64, body: &Body) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((40 + body.0.len() as u32).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(77u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(&body.0);
    bytes
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    pub inode: u64,
    pub size: u64,
    pub modified: u64,
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
}

pub fn attributes(at: &[u8]) -> Attributes {
    Attributes {
        inode: u64_at(at, 0),
        size: u64_at(at, 8),
        modified: u64_at(at, 32),
        mode: u32_at(at, 60),
        links: u32_at(at, 64),
        uid: u32_at(at, 68),
        gid: u32_at(at, 72),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub name: String,
    pub kind: u32,
    pub next: u64,
}

/// A folder on the disk that builds go to: not every tmpfs has extended attributes.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub struct Client {
    pub server: Server,
}

pub fn options(folder: &Path) -> Options {
    let limits = Limits { inodes: 10_000, descriptors: 64, handles: 64 };
    Options { folder: folder.to_owned(), read_only: false, owner: None, limits }
}

impl Client {
    pub fn new(folder: &Path) -> Self {
        Self::with(&options(folder))
    }

    pub fn with(options: &Options) -> Self {
        let client = Self { server: Server::new(options).unwrap() };
        let found = client.init(7, 38).unwrap();
        assert_eq!((u32_at(&found, 0), u32_at(&found, 4), found.len()), (7, 38, 64));
        client
    }

    pub fn init(&self, major: u32, minor: u32) -> Answer {
        let flags = u32::MAX >> 1;
        self.ask(op::INIT, 0, body().u32(major).u32(minor).u32(1 << 17).u32(flags).bytes(&[0; 48]))
    }

    pub fn raw(&self, request: &[u8], room: usize) -> Vec<u8> {
        let mut reply = vec![0xaa; 100];
        self.server.serve(request, room, &mut reply);
        reply
    }

    pub fn ask(&self, opcode: u32, node: u64, body: Body) -> Answer {
        let reply = self.raw(&request(opcode, node, &body), MAX_REPLY);
        assert_eq!(u32_at(&reply, 0) as usize, reply.len(), "the length is right");
        assert_eq!(u64_at(&reply, 8), 77, "it answers this request");
        match u32_at(&reply, 4) as i32 {
            0 => Ok(reply[16..].to_vec()),
            error => Err(-error),
        }
    }

    pub fn entry(&self, opcode: u32, node: u64, body: Body) -> Answer<(u64, Attributes)> {
        let reply = self.ask(opcode, node, body)?;
        Ok((u64_at(&reply, 0), attributes(&reply[40..])))
    }

    pub fn look_up(&self, folder: u64, name: &str) -> Answer<(u64, Attributes)> {
        self.entry(op::LOOKUP, folder, body().name(name))
    }

    pub fn forget(&self, node: u64, count: u64) {
        let reply = self.raw(&request(op::FORGET, node, &body().u64(count)), MAX_REPLY);
        assert!(reply.is_empty(), "FORGET has no answer");
    }

    pub fn get_attributes(&self, node: u64) -> Answer<Attributes> {
        let reply = self.ask(op::GETATTR, node, body().u32(0).u32(0).u64(0))?;
        Ok(attributes(&reply[16..]))
    }

    /// SETATTR with size and mode; other fields are zero.
    pub fn set(&self, node: u64, valid: u32, size: u64, mode: u32) -> Answer<Attributes> {
        let body = body().u32(valid).u32(0).u64(0).u64(size).u64(0).u64(1234).u64(5678).u64(0);
        let body = body.u32(5).u32(6).u32(0).u32(mode).u32(0).u32(1).u32(1).u32(0);
        let reply = self.ask(op::SETATTR, node, body)?;
        Ok(attributes(&reply[16..]))
    }

    pub fn create(&self, folder: u64, name: &str, flags: u32, mode: u32) -> Answer<(u64, u64)> {
        let body = body().u32(flags).u32(mode).u32(0).u32(0).name(name);
        let reply = self.ask(op::CREATE, folder, body)?;
        Ok((u64_at(&reply, 0), u64_at(&reply, 128)))
    }

    pub fn open(&self, node: u64, flags: u32) -> Answer<u64> {
        Ok(u64_at(&self.ask(op::OPEN, node, body().u32(flags).u32(0))?, 0))
    }

    pub fn release(&self, handle: u64) -> Answer {
        self.ask(op::RELEASE, ROOT, body().u64(handle).u32(0).u32(0).u64(0))
    }

    pub fn read(&self, handle: u64, offset: u64, size: u32) -> Answer {
        let body = body().u64(handle).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0);
        self.ask(op::READ, ROOT, body)
    }

    pub fn write(&self, handle: u64, offset: u64, data: &[u8]) -> Answer<u32> {
        self.write_with(handle, offset, data, 0, 0)
    }

    pub fn write_with(
        &self,
        handle: u64,
        offset: u64,
        data: &[u8],
        how: u32,
        flags: u32,
    ) -> Answer<u32> {
        let body = body().u64(handle).u64(offset).u32(data.len() as u32).u32(how).u64(0);
        let reply = self.ask(op::WRITE, ROOT, body.u32(flags).u32(0).bytes(data))?;
        Ok(u32_at(&reply, 0))
    }

    pub fn make_folder(&self, folder: u64, name: &str, mode: u32) -> Answer<(u64, Attributes)> {
        self.entry(op::MKDIR, folder, body().u32(mode).u32(0).name(name))
    }

    pub fn make_link(&self, folder: u64, name: &str, target: &str) -> Answer<(u64, Attributes)> {
        self.entry(op::SYMLINK, folder, body().name(name).name(target))
    }

    pub fn rename(&self, from: u64, old: &str, to: u64, new: &str, flags: u32) -> Answer {
        let body = body().u64(to).u32(flags).u32(0).name(old).name(new);
        self.ask(op::RENAME2, from, body)
    }

    /// All entries of a folder, read in replies of `size` bytes.
    pub fn list(&self, folder: u64, size: u32, plus: bool) -> Answer<Vec<Entry>> {
        let handle = u64_at(&self.ask(op::OPENDIR, folder, body().u32(0).u32(0))?, 0);
        let (mut entries, mut offset) = (Vec::new(), 0);
        loop {
            let part = self.read_folder(folder, handle, offset, size, plus)?;
            let Some(last) = part.last() else { break };
            offset = last.next;
            entries.extend(part);
        }
        self.release(handle)?;
        Ok(entries)
    }

    pub fn read_folder(
        &self,
        folder: u64,
        handle: u64,
        offset: u64,
        size: u32,
        plus: bool,
    ) -> Answer<Vec<Entry>> {
        let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
        let body = body().u64(handle).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0);
        let reply = self.ask(opcode, folder, body)?;
        assert!(reply.len() <= size as usize, "no more than was asked for");
        let (mut entries, mut rest) = (Vec::new(), &reply[..]);
        while !rest.is_empty() {
            let (head, entry) = rest.split_at(if plus { 128 } else { 0 });
            let length = u32_at(entry, 16) as usize;
            entries.push(Entry {
                node: if plus { u64_at(head, 0) } else { 0 },
                name: String::from_utf8(entry[24..24 + length].to_vec()).unwrap(),
                kind: u32_at(entry, 20),
                next: u64_at(entry, 8),
            });
            rest = &entry[(24 + length).next_multiple_of(8)..];
        }
        Ok(entries)
    }
}
