//! What can be wrong with what the user gave.
use std::io;
use thiserror::Error;

/// The machine cannot start with these files and these settings. Each message names the file or
/// flag, states the fact and says what to do.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages document the fields.
pub enum BootError {
    #[error("{name}: not found; check the path")]
    NotFound { name: String },
    #[error("{name}: is a directory; give a file")]
    Directory { name: String },
    #[error("{name}: cannot be opened; check that you may read it")]
    Open { name: String, source: io::Error },
    #[error("{name}: cannot be read; check the file and the disk that it is on")]
    Read { name: String, source: io::Error },
    #[error("{name}: is empty; fetch or build it again")]
    Empty { name: String },
    #[error(
        "{name}: truncated: {what} ends at byte {needed}, but the file has {actual} bytes; fetch \
         or build it again"
    )]
    Truncated { name: String, what: &'static str, needed: u64, actual: u64 },
    #[error(
        "{name}: not a kernel that can be booted here: {found}; give a bzImage, an ELF with a PVH \
         note, or a multiboot 1 or 2 image"
    )]
    ForeignKernel { name: String, found: &'static str },
    #[error(
        "{name}: not an initrd: it is neither a cpio archive nor a known compressed or filesystem \
         image; give the initrd of the kernel's distribution, or one made by `cpio -H newc`"
    )]
    ForeignInitrd { name: String },
    #[error("{name}: damaged: {what}; fetch or build it again")]
    Malformed { name: String, what: String },
    #[error("{name}: {what}")]
    Unsupported { name: String, what: String },
    #[error("{name}: needs at least {} of memory, but the machine has {}; raise --memory",
            mebibytes_up(*.needed), mebibytes(*.available))]
    MemoryTooSmall { name: String, needed: u64, available: u64 },
    #[error(
        "{name}: does not fit, beside what is loaded already, into the memory that the boot \
         protocol reaches (below 4 GiB, or less where the kernel says so); make it smaller"
    )]
    NoRoom { name: String },
    #[error(
        "{name}: wants to be loaded at {start:#x} to {end:#x}, where this machine has no RAM; \
         link it to an address in RAM from 1 MiB on"
    )]
    NotInRam { name: String, start: u64, end: u64 },
    #[error(
        "{name}: {what} {start:#x} to {end:#x} overlaps something loaded before it; link the \
             parts of the kernel to addresses of their own"
    )]
    Overlap { name: String, what: &'static str, start: u64, end: u64 },
    #[error("--cmdline: is {length} bytes long, but {name} takes at most {limit}; shorten it")]
    CommandLineTooLong { name: String, length: usize, limit: usize },
    #[error("--cmdline: contains a NUL byte, which ends a command line; remove it")]
    CommandLineNul,
    #[error("{name}: is a {kernel} kernel, which takes no modules; use --initrd")]
    TakesNoModules { name: String, kernel: &'static str },
    #[error("{name}: is a {kernel} kernel, which takes no initrd; use --module")]
    TakesNoInitrd { name: String, kernel: &'static str },
    #[error(
        "--cpus: the firmware tables for {vcpus} CPUs do not fit into the area for them; use \
             fewer CPUs (at most {limit})"
    )]
    TooManyCpus { vcpus: u32, limit: u32 },
    #[error(
        "--memory: guest memory at {address:#x} cannot be written; the machine needs RAM from \
             address 0 on"
    )]
    Memory { address: u64, source: vm_memory::GuestMemoryError },
}

/// Rounded down, for what the machine has.
fn mebibytes(bytes: u64) -> String {
    format!("{}MiB", bytes >> 20)
}

/// Rounded up, for what is needed.
fn mebibytes_up(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}
