//! The guest's RAM: how much, and where it comes from. [`boot::ram_ranges`] says where it lies.
#![allow(unsafe_code)]
use crate::Bytes;
use arch::address::PAGE_SIZE;
use engine::GuestMemory;
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap};

/// The least RAM with which a PC can do anything: the first megabyte, and room for a small kernel.
pub const LEAST: Bytes = Bytes::mib(2);

/// Why a guest cannot have its memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Less than any guest can use.
    #[error("--memory: {0} is too small for a guest; give it at least {LEAST}")]
    TooSmall(Bytes),
    /// Not a whole number of pages.
    #[error("--memory: {0} is not a multiple of 4KiB, the size of a page")]
    NotPages(Bytes),
    /// More than the host has.
    #[error("--memory: {asked} is more than this host's {host} of memory; ask for less")]
    LargerThanHost {
        /// What the guest was to have.
        asked: Bytes,
        /// What the host has.
        host: Bytes,
    },
    /// The host has it, but does not give it.
    #[error("--memory: the host does not give this process {0} of address space (see `ulimit -v`)")]
    Refused(Bytes, #[source] FromRangesError),
}

/// Checks a size against what guests need and the host has.
///
/// # Errors
/// Says which limit the size breaks.
pub fn check(size: Bytes) -> Result<(), MemoryError> {
    check_against(size, host_memory())
}

fn check_against(size: Bytes, host: Bytes) -> Result<(), MemoryError> {
    match size {
        _ if size < LEAST => Err(MemoryError::TooSmall(size)),
        _ if !size.0.is_multiple_of(PAGE_SIZE) => Err(MemoryError::NotPages(size)),
        _ if size > host => Err(MemoryError::LargerThanHost { asked: size, host }),
        _ => Ok(()),
    }
}

/// All memory of the host in whole MiB, used or not. Guests' pages are taken as they are touched, so that
/// more than the free part may be promised.
fn host_memory() -> Bytes {
    let info = rustix::system::sysinfo();
    // A field that the kernel's ABI makes as wide as `unsigned long`.
    #[allow(clippy::useless_conversion)]
    let total = u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit));
    Bytes(total & !(Bytes::mib(1).0 - 1))
}

/// Maps the guest's RAM: anonymous, private, all zero, and without a reservation in the host.
///
/// # Errors
/// As [`check`], or where the host refuses the mapping.
pub fn allocate(size: Bytes) -> Result<GuestMemory, MemoryError> {
    check(size)?;
    let ranges: Vec<_> = boot::ram_ranges(size.0)
        .into_iter()
        .map(|(start, length)| (GuestAddress(start), length as usize))
        .collect();
    let memory =
        GuestMemory::from_ranges(&ranges).map_err(|source| MemoryError::Refused(size, source))?;
    memory.iter().for_each(want_huge_pages);
    Ok(memory)
}

/// Asks the host for huge pages behind a region. An access of the guest's costs two translations
/// of its address, and the host's is the cheaper the larger its pages are. Where the host gives
/// none, all works as before.
fn want_huge_pages(region: &GuestRegionMmap<()>) {
    let (start, length) = (region.as_ptr().cast(), region.len() as usize);
    // Kernels without huge pages refuse it.
    // SAFETY: the advice changes no contents, and the range is the region's own mapping.
    let _ = unsafe { madvise(start, length, Advice::LinuxHugepage) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_work_is_refused_with_the_limit_it_breaks() {
        let host = Bytes(8 << 30);
        let message = |size| check_against(size, host).unwrap_err().to_string();
        assert!(message(Bytes(4096)).contains("at least 2MiB"));
        assert!(message(Bytes((16 << 20) + 1)).contains("multiple of 4KiB"));
        assert!(message(Bytes(9 << 30)).contains("this host's 8GiB"));
        assert!(check_against(host, host).is_ok());
    }

    #[test]
    fn allocated_memory_has_the_size_asked_for() {
        let memory = allocate(Bytes::mib(16)).unwrap();
        let total: u64 = memory.iter().map(|region| region.len()).sum();
        assert_eq!(total, 16 << 20);
        assert!(allocate(Bytes(1 << 60)).is_err());
    }
}
