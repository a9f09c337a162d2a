//! The ring in which KVM tells which pages a vCPU has written (api.rst §8.29,
//! KVM_CAP_DIRTY_LOG_RING).
#![allow(unsafe_code)]
use engine::EngineError;
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use std::io;
use std::os::fd::AsRawFd as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Flags of an entry: KVM has filled it; it has been collected.
const DIRTY: u32 = 1;
const COLLECTED: u32 = 2;
/// An entry's slot number has the address space above this bit; a PC's CPUs use space 0 here.
const SLOT_BITS: u32 = 16;
const PAGE_SIZE: u32 = arch::address::PAGE_SIZE as u32;

/// One vCPU's ring, as this process sees it.
pub struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    bytes: usize,
    next: usize,
}

// SAFETY: the mapping belongs to this value alone; KVM writes to it from any thread already.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of a vCPU, which has `bytes` bytes.
    ///
    /// # Errors
    /// The host does not map it.
    pub fn map(vcpu: &VcpuFd, bytes: u32) -> Result<Self, EngineError> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let bytes = bytes as usize;
        // SAFETY: a new mapping at an address of the host's choice; the result is checked.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                access,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(base.cast()) {
            Some(entries) if base != libc::MAP_FAILED => Ok(Self { entries, bytes, next: 0 }),
            _ => Err(EngineError::Host {
                what: "KVM does not let a vCPU's dirty ring be mapped (KVM_CAP_DIRTY_LOG_RING)"
                    .into(),
                source: io::Error::last_os_error(),
            }),
        }
    }

    /// Collects what is in the ring: calls `each` with slot and page in it. Answers whether that
    /// is all: KVM keeps some entries free, so that a full ring is one that it has overrun.
    pub fn collect(&mut self, mut each: impl FnMut(u32, u64)) -> bool {
        let count = self.bytes / size_of::<kvm_dirty_gfn>();
        for _ in 0..count {
            // SAFETY: `next` is below the number of entries in the mapping.
            let entry = unsafe { self.entries.add(self.next) };
            // SAFETY: inside the mapping, aligned as the structure is; KVM accesses the flags
            // atomically too.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry.as_ptr()).flags) };
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                return true;
            }
            // SAFETY: as above; KVM leaves an entry alone once it is dirty, until it is reset.
            let (slot, page) = unsafe { ((*entry.as_ptr()).slot, (*entry.as_ptr()).offset) };
            each(slot & ((1 << SLOT_BITS) - 1), page);
            flags.store(COLLECTED, Ordering::Release);
            self.next = (self.next + 1) % count;
        }
        false
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `map`, which nothing refers to any more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.bytes) };
    }
}
