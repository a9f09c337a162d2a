//! The numbers of the protocol: FUSE 7.31 and later, as in Linux's `include/uapi/linux/fuse.h`.

/// The protocol's major version.
pub(crate) const MAJOR: u32 = 7;
/// The newest minor version whose requests are known here.
pub(crate) const MINOR: u32 = 38;
/// The oldest minor version served: that of the first Linux with virtio-fs, 5.4.
pub(crate) const OLDEST_MINOR: u32 = 31;

/// Bytes of `fuse_in_header`.
pub(crate) const IN_HEADER: usize = 40;

macro_rules! opcodes {
    ($($name:ident = $number:literal,)*) => {
        /// What a request asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Opcode { $($name = $number,)* }

        impl Opcode {
            /// The operation of a number, `None` where this server does not know it.
            pub(crate) fn of(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

opcodes! {
    Lookup = 1,
    Forget = 2,
    GetAttr = 3,
    SetAttr = 4,
    ReadLink = 5,
    SymLink = 6,
    MkNod = 8,
    MkDir = 9,
    Unlink = 10,
    RmDir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    StatFs = 17,
    Release = 18,
    Fsync = 20,
    SetXattr = 21,
    GetXattr = 22,
    ListXattr = 23,
    RemoveXattr = 24,
    Init = 26,
    OpenDir = 27,
    ReadDir = 28,
    ReleaseDir = 29,
    FsyncDir = 30,
    Create = 35,
    Interrupt = 36,
    Destroy = 38,
    BatchForget = 42,
    Fallocate = 43,
    ReadDirPlus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    SyncFs = 50,
}

impl Opcode {
    /// Whether the operation makes an inode of which the guest is told.
    pub(crate) fn makes_inode(self) -> bool {
        matches!(self, Self::Create | Self::MkNod | Self::MkDir | Self::SymLink)
    }

    /// Whether the operation changes the folder whatever its arguments are.
    pub(crate) fn changes(self) -> bool {
        matches!(
            self,
            Self::SetAttr
                | Self::SymLink
                | Self::MkNod
                | Self::MkDir
                | Self::Unlink
                | Self::RmDir
                | Self::Rename
                | Self::Rename2
                | Self::Link
                | Self::Write
                | Self::SetXattr
                | Self::RemoveXattr
                | Self::Create
                | Self::Fallocate
                | Self::CopyFileRange
        )
    }
}

/// Flags of INIT.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u32 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub(crate) const BIG_WRITES: u32 = 1 << 5;
    pub(crate) const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u32 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub(crate) const ASYNC_DIO: u32 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(crate) const MAX_PAGES: u32 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u32 = 1 << 23;
    pub(crate) const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// Bits of `fuse_setattr_in.valid`.
pub(crate) mod set {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const HANDLE: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// GETATTR names an open file.
pub(crate) const GETATTR_HANDLE: u32 = 1 << 0;
/// OPEN and CREATE: take set-user-ID and set-group-ID off the file.
pub(crate) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// WRITE comes from the guest's page cache, through any of the file's handles.
pub(crate) const WRITE_CACHE: u32 = 1 << 0;
/// WRITE: take set-user-ID and set-group-ID off the file.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FSYNC: the data is enough.
pub(crate) const FSYNC_DATA: u32 = 1 << 0;
/// The inode number of a directory entry that is not known.
pub(crate) const UNKNOWN_INODE: u64 = 0xffff_ffff;
