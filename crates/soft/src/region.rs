//! The memory of one vCPU: a stack for Rust helpers with the [`Cpu`] right above it, so that
//! translated code can use one register both to address the CPU and to call.
#![allow(unsafe_code)]
use crate::cpu::Cpu;
use engine::EngineError;
use std::ptr::NonNull;

/// Stack for helpers and the device models they call.
const STACK: usize = 1 << 20;
const GUARD: usize = 4096;

/// A mapping of guard page, stack and CPU. It stays mapped as long as the VM, since other threads
/// set the CPU's poll word through an address.
pub struct CpuRegion {
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: plain memory; who may touch which part is decided by its users.
unsafe impl Send for CpuRegion {}

impl CpuRegion {
    /// Maps zeroed memory, used page by page.
    ///
    /// # Errors
    /// The host gives no memory.
    pub fn new() -> Result<Self, EngineError> {
        let size = GUARD + STACK + size_of::<Cpu>().next_multiple_of(4096);
        // SAFETY: a fresh anonymous mapping; the result is checked.
        unsafe {
            let base = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            let failed = base == libc::MAP_FAILED;
            if failed || libc::mprotect(base, GUARD, libc::PROT_NONE) != 0 {
                return Err(EngineError::Host {
                    what: "cannot map memory for a vCPU; free memory or raise the limit".into(),
                    source: std::io::Error::last_os_error(),
                });
            }
            NonNull::new(base.cast())
                .map(|base| Self { base, size })
                .ok_or_else(|| EngineError::Defect("a mapping at address zero".into()))
        }
    }

    /// Where the CPU goes.
    pub fn cpu(&self) -> *mut Cpu {
        // SAFETY: inside the mapping, page-aligned.
        unsafe { self.base.as_ptr().add(GUARD + STACK).cast() }
    }
}

impl Drop for CpuRegion {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`; the VM is gone, and with it all who knew addresses.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.size);
        }
    }
}
