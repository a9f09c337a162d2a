//! Memory for translated code: the same pages mapped twice, once writable and once executable, so
//! that no page is ever both.
#![allow(unsafe_code)]
use engine::EngineError;
use std::ptr::NonNull;

/// A region of code memory.
pub struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    used: usize,
    /// Bytes from the start for which memory was taken.
    populated: usize,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Reserves `size` bytes, at least 64 KiB; memory is taken as it is used.
    ///
    /// # Errors
    /// The host refuses memory or executable mappings.
    pub fn new(size: usize) -> Result<Self, EngineError> {
        // Any single block fits into the least size.
        let size = size.next_multiple_of(4096).max(64 << 10);
        let host = |what: &str| EngineError::Host {
            what: format!(
                "cannot map {} MiB for translated code: {what} failed; raise the memory limit, or \
                 allow executable memory for bv",
                size >> 20
            ),
            source: std::io::Error::last_os_error(),
        };
        // SAFETY: plain system calls; results are checked, and the descriptor is closed once
        // both mappings hold the pages.
        unsafe {
            let fd = libc::memfd_create(c"bivisor-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(host("memfd_create"));
            }
            if libc::ftruncate(fd, size as libc::off_t) != 0 {
                let error = host("ftruncate");
                libc::close(fd);
                return Err(error);
            }
            let map = |protection| {
                let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
                libc::mmap(std::ptr::null_mut(), size, protection, flags, fd, 0)
            };
            let writable = map(libc::PROT_READ | libc::PROT_WRITE);
            let executable = map(libc::PROT_READ | libc::PROT_EXEC);
            let failed = writable == libc::MAP_FAILED || executable == libc::MAP_FAILED;
            let error = host("mmap");
            libc::close(fd);
            match (NonNull::new(writable.cast()), NonNull::new(executable.cast())) {
                (Some(writable), Some(executable)) if !failed => {
                    Ok(Self { writable, executable, size, used: 0, populated: 0 })
                }
                _ => Err(error),
            }
        }
    }

    /// Appends code; returns its executable address, or `None` when the region is full.
    pub fn install(&mut self, code: &[u8]) -> Option<u64> {
        let start = self.used.next_multiple_of(16);
        if start + code.len() > self.size {
            return None;
        }
        self.populate(start + code.len());
        // SAFETY: the range was just checked to lie in the writable mapping, and nothing runs
        // there yet.
        unsafe {
            let to = self.writable.as_ptr().add(start);
            std::ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
        }
        let before = self.used;
        self.used = start + code.len();
        self.unmap_written(before);
        Some(self.executable.as_ptr() as u64 + start as u64)
    }

    /// Takes memory for the next stretch of code at one go, so that not each page of it has to
    /// be asked for by two page faults. Where the host does not know how, those will do.
    fn populate(&mut self, end: usize) {
        const CHUNK: usize = 128 << 10;
        while self.populated < end {
            let len = CHUNK.min(self.size - self.populated);
            // SAFETY: inside the own mappings; only makes pages present.
            unsafe {
                let (writable, executable) = (self.writable.as_ptr(), self.executable.as_ptr());
                libc::madvise(writable.add(self.populated).cast(), len, libc::MADV_POPULATE_WRITE);
                libc::madvise(executable.add(self.populated).cast(), len, libc::MADV_POPULATE_READ);
            }
            self.populated += len;
        }
    }

    /// Takes pages that are full out of the writable view, where they would count as memory of
    /// this process a second time. A later patch brings a page back.
    fn unmap_written(&mut self, before: usize) {
        const CHUNK: usize = 1 << 20;
        let (from, to) = (before / CHUNK * CHUNK, self.used / CHUNK * CHUNK);
        if from < to {
            // SAFETY: inside the own mapping; dropping pages of a shared mapping loses nothing.
            unsafe {
                let start = self.writable.as_ptr().add(from);
                libc::madvise(start.cast(), to - from, libc::MADV_DONTNEED);
            }
        }
    }

    /// Changes the 32-bit displacement at executable address `at` so that the jump it belongs to
    /// lands at `target`, another executable address.
    pub fn patch(&mut self, at: u64, target: u64) {
        let offset = at.wrapping_sub(self.executable.as_ptr() as u64) as usize;
        if offset + 4 > self.used {
            return;
        }
        let displacement = target.wrapping_sub(at + 4) as i32;
        // SAFETY: in the writable mapping by the check above. The code cache belongs to one vCPU,
        // and that is not running translated code now.
        unsafe {
            self.writable.as_ptr().add(offset).cast::<i32>().write_unaligned(displacement);
        }
    }

    /// The executable range, for the signal handler.
    pub fn range(&self) -> (u64, u64) {
        let start = self.executable.as_ptr() as u64;
        (start, start + self.size as u64)
    }

    /// Gives all code up and its memory back to the host.
    pub fn clear(&mut self) {
        // SAFETY: whole own mapping; no translated code is running.
        unsafe {
            libc::madvise(
                self.writable.as_ptr().cast(),
                self.populated.max(self.used.next_multiple_of(4096)),
                libc::MADV_REMOVE,
            );
        }
        self.used = 0;
        self.populated = 0;
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `new` with this size and are used by nobody else.
        unsafe {
            libc::munmap(self.writable.as_ptr().cast(), self.size);
            libc::munmap(self.executable.as_ptr().cast(), self.size);
        }
    }
}
