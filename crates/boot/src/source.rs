//! Files as the user gives them: hostile until checked.
use crate::error::BootError;
use crate::memory::GuestRam;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Most bytes taken from something without a size of its own (a pipe): beyond any kernel or initrd.
const MAX_STREAM: u64 = 1 << 30;

/// A file to load, or its bytes, with the name that messages call it by.
#[derive(Debug)]
pub struct Image {
    name: String,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// A regular file, read where it is needed, directly into guest memory.
    File {
        file: File,
        length: u64,
    },
    Owned(Vec<u8>),
    Static(&'static [u8]),
}

impl Image {
    /// Opens a file. A pipe is read to its end.
    ///
    /// # Errors
    /// The file is missing, empty, a directory, or cannot be read.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let name = path.display().to_string();
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(BootError::NotFound { name }),
            Err(source) => return Err(BootError::Open { name, source }),
        };
        let read_error = |source| BootError::Read { name: name.clone(), source };
        let metadata = file.metadata().map_err(read_error)?;
        if metadata.is_dir() {
            return Err(BootError::Directory { name });
        }
        let content = if metadata.is_file() {
            Content::File { file, length: metadata.len() }
        } else {
            let mut bytes = Vec::new();
            file.by_ref().take(MAX_STREAM + 1).read_to_end(&mut bytes).map_err(read_error)?;
            if bytes.len() as u64 > MAX_STREAM {
                let what = "is a stream of more than 1 GiB; give a regular file".into();
                return Err(BootError::Unsupported { name, what });
            }
            Content::Owned(bytes)
        };
        Self { name, content }.not_empty()
    }

    /// An image that the program carries in itself.
    pub const fn embedded(name: String, bytes: &'static [u8]) -> Self {
        Self { name, content: Content::Static(bytes) }
    }

    /// An image that is in memory.
    ///
    /// # Errors
    /// It is empty.
    pub fn from_bytes(name: String, bytes: Vec<u8>) -> Result<Self, BootError> {
        Self { name, content: Content::Owned(bytes) }.not_empty()
    }

    fn not_empty(self) -> Result<Self, BootError> {
        if self.length() == 0 {
            return Err(BootError::Empty { name: self.name });
        }
        Ok(self)
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    pub fn length(&self) -> u64 {
        match &self.content {
            Content::File { length, .. } => *length,
            Content::Owned(bytes) => bytes.len() as u64,
            Content::Static(bytes) => bytes.len() as u64,
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::File { .. } => &[],
            Content::Owned(bytes) => bytes,
            Content::Static(bytes) => bytes,
        }
    }

    /// The error for damage that `what` describes.
    pub(crate) fn malformed(&self, what: impl Into<String>) -> BootError {
        BootError::Malformed { name: self.name.clone(), what: what.into() }
    }

    /// The error for a kernel that wants what this machine has not.
    pub(crate) fn unsupported(&self, what: impl Into<String>) -> BootError {
        BootError::Unsupported { name: self.name.clone(), what: what.into() }
    }

    /// Checks that `length` bytes from `offset` on are in the file; `what` is their name.
    pub(crate) fn check(
        &self,
        what: &'static str,
        offset: u64,
        length: u64,
    ) -> Result<(), BootError> {
        let needed = offset.saturating_add(length);
        if needed > self.length() {
            let (name, actual) = (self.name.clone(), self.length());
            return Err(BootError::Truncated { name, what, needed, actual });
        }
        Ok(())
    }

    /// Fills `buffer` from `offset` on, or says that the file is truncated.
    pub(crate) fn read(
        &self,
        what: &'static str,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BootError> {
        self.check(what, offset, buffer.len() as u64)?;
        match &self.content {
            Content::File { file, .. } => file
                .read_exact_at(buffer, offset)
                .map_err(|source| BootError::Read { name: self.name.clone(), source }),
            Content::Owned(_) | Content::Static(_) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                if let Some(bytes) = self.bytes().get(start..start.saturating_add(buffer.len())) {
                    buffer.copy_from_slice(bytes);
                }
                Ok(())
            }
        }
    }

    /// Reads up to `limit` bytes from the start: all that there are.
    pub(crate) fn prefix(&self, limit: usize) -> Result<Vec<u8>, BootError> {
        let length = usize::try_from(self.length()).unwrap_or(usize::MAX).min(limit);
        let mut buffer = vec![0; length];
        self.read("the start", 0, &mut buffer)?;
        Ok(buffer)
    }

    /// Copies `length` bytes from `offset` on to guest memory at `target`, without a copy between.
    pub(crate) fn copy_to(
        &self,
        what: &'static str,
        offset: u64,
        length: u64,
        ram: &GuestRam<'_>,
        target: u64,
    ) -> Result<(), BootError> {
        self.check(what, offset, length)?;
        let read_error = |source| BootError::Read { name: self.name.clone(), source };
        match &self.content {
            Content::File { file, .. } => {
                let mut file = file;
                file.seek(SeekFrom::Start(offset)).map_err(read_error)?;
                ram.read_from(&self.name, target, file, length)
            }
            Content::Owned(_) | Content::Static(_) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let count = usize::try_from(length).unwrap_or(usize::MAX);
                let bytes = self.bytes().get(start..start.saturating_add(count));
                ram.write(target, bytes.unwrap_or_default())
            }
        }
    }
}

/// Little-endian field readers over a header already in memory; a field past the end reads as 0,
/// which the caller's length check excludes.
pub(crate) fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    offset
        .checked_add(N)
        .and_then(|end| bytes.get(offset..end))
        .and_then(|slice| slice.try_into().ok())
        .unwrap_or([0; N])
}
pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(field(bytes, offset))
}
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(field(bytes, offset))
}
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(field(bytes, offset))
}
