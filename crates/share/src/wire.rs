//! Fields of requests and replies: little-endian numbers and names that end with a zero.
use rustix::io::Errno;
use std::ffi::CStr;

/// What an operation answers: an error number for the guest, or that its reply is written.
pub(crate) type Outcome<T = ()> = Result<T, Errno>;

/// Most bytes of a name (NAME_MAX).
const NAME_MAX: usize = 255;
/// Most bytes of a symbolic link's target, its final zero included (PATH_MAX).
const TARGET_MAX: usize = 4096;

/// Takes fields off the front of a request. What is missing makes the request invalid.
#[derive(Clone)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(Errno::INVAL)?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u32(&mut self) -> Outcome<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Outcome<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Leaves `count` bytes out.
    pub(crate) fn skip(&mut self, count: usize) -> Outcome {
        self.rest = self.rest.get(count..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    /// All that is left.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn string(&mut self) -> Outcome<&'a CStr> {
        let string = CStr::from_bytes_until_nul(self.rest).map_err(|_| Errno::INVAL)?;
        self.skip(string.count_bytes() + 1)?;
        Ok(string)
    }

    /// The name of an entry of a directory: one component, and neither `.` nor `..`, so that
    /// the host's kernel, which gets it as it is, can only look within that directory.
    pub(crate) fn name(&mut self) -> Outcome<&'a CStr> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }

    /// The target of a symbolic link: any text, which only the guest will follow.
    pub(crate) fn target(&mut self) -> Outcome<&'a CStr> {
        let target = self.string()?;
        match target.count_bytes() {
            0 => Err(Errno::NOENT),
            TARGET_MAX.. => Err(Errno::NAMETOOLONG),
            _ => Ok(target),
        }
    }
}

/// A reply under construction. The transport's buffer is used again and again.
pub(crate) struct Reply<'a> {
    pub(crate) bytes: &'a mut Vec<u8>,
    /// Bytes that the guest's buffer has, header included.
    room: usize,
}

/// Bytes of `fuse_out_header`.
pub(crate) const OUT_HEADER: usize = 16;

impl<'a> Reply<'a> {
    /// An empty reply, with a place for its header.
    pub(crate) fn new(bytes: &'a mut Vec<u8>, room: usize) -> Self {
        bytes.clear();
        bytes.resize(OUT_HEADER, 0);
        Self { bytes, room }
    }

    /// Bytes that can still be added.
    pub(crate) fn room(&self) -> usize {
        self.room.saturating_sub(self.bytes.len())
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn slice(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn zeroes(&mut self, count: usize) {
        self.bytes.resize(self.bytes.len() + count, 0);
    }

    /// Fills in the header. A reply that the guest has no room for becomes an error.
    pub(crate) fn finish(self, unique: u64, outcome: Outcome) {
        let outcome =
            if self.bytes.len() > self.room { outcome.and(Err(Errno::IO)) } else { outcome };
        let error = match outcome {
            Ok(()) => 0,
            Err(errno) => {
                self.bytes.truncate(OUT_HEADER);
                -errno.raw_os_error()
            }
        };
        if self.room < OUT_HEADER {
            return self.bytes.clear();
        }
        // The reply is no longer than a request allows, far below 4 GiB.
        let length = self.bytes.len() as u32;
        let header = length.to_le_bytes().into_iter().chain(error.to_le_bytes());
        for (to, from) in self.bytes.iter_mut().zip(header.chain(unique.to_le_bytes())) {
            *to = from;
        }
    }
}
