//! Guest RAM between pages that nobody may touch.
#![allow(unsafe_code)]
use engine::{EngineError, GuestMemory};
use std::ptr;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

/// Bytes of patterned pages on either side of RAM.
const ZONE: usize = 64 << 10;
/// Bytes without any access on either side of those.
const WALL: usize = 16 << 20;
const PATTERN: u8 = 0xa5;

/// The pages around a guest's RAM. They outlive the guest: the mapping is never undone, because
/// the guest's memory shares it.
pub struct RedZone {
    before: *const u8,
    after: *const u8,
}
// SAFETY: the pointers lead to a mapping that stays for the life of the process and that only
// the CPU under test could change.
unsafe impl Send for RedZone {}

/// Guest memory of `size` bytes from address 0, with red zones around it in host memory.
///
/// # Errors
/// Fails where the host refuses the memory.
pub fn guarded_memory(size: u64) -> Result<(GuestMemory, RedZone), EngineError> {
    let size = size as usize;
    let total = size + 2 * (ZONE + WALL);
    let refuse = |what: &str| EngineError::Host {
        what: format!("{what} of {total} bytes for guest memory with red zones"),
        source: std::io::Error::last_os_error(),
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(ptr::null_mut(), total, libc::PROT_NONE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(refuse("mmap"));
    }
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: within the mapping made above.
    let before = unsafe { start.cast::<u8>().add(WALL) };
    // SAFETY: as above.
    if unsafe { libc::mprotect(before.cast(), size + 2 * ZONE, access) } != 0 {
        return Err(refuse("mprotect"));
    }
    // SAFETY: both zones lie in the part that was just made accessible.
    let (ram, after) = unsafe { (before.add(ZONE), before.add(ZONE + size)) };
    // SAFETY: as above.
    unsafe {
        ptr::write_bytes(before, PATTERN, ZONE);
        ptr::write_bytes(after, PATTERN, ZONE);
    }
    // SAFETY: `ram` is the start of `size` accessible bytes that stay mapped for ever.
    let region = unsafe { MmapRegion::<()>::build_raw(ram, size, access, flags) };
    let memory = region
        .ok()
        .and_then(|region| GuestRegionMmap::new(region, GuestAddress(0)))
        .and_then(|region| GuestMemory::from_regions(vec![region]).ok())
        .ok_or_else(|| refuse("a guest memory region"))?;
    Ok((memory, RedZone { before, after }))
}

impl RedZone {
    /// The first damaged byte, as an offset from the start of its zone.
    pub fn damage(&self) -> Option<usize> {
        [self.before, self.after].into_iter().find_map(|zone| {
            // SAFETY: the zone stays mapped and readable.
            let bytes = unsafe { std::slice::from_raw_parts(zone, ZONE) };
            bytes.iter().position(|b| *b != PATTERN)
        })
    }
}
