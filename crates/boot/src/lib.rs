//! Loads a guest into memory and says in which state its first CPU starts.
//!
//! [`load`] does all of it: it tells the kernel's format ([`detect`]), puts kernel, initrd and
//! modules where the format's boot protocol wants them, writes what firmware leaves for an
//! operating system (address map, ACPI and SMBIOS tables, BIOS data area) and gives the state of
//! the boot vCPU. Files are hostile: every offset and length in them is checked against the file
//! and against the guest's RAM, and none of them sizes an allocation.
#![forbid(unsafe_code)]

mod acpi;
mod bzimage;
mod elf;
mod error;
mod initrd;
mod loader;
mod memory;
mod multiboot;
mod multiboot1;
mod multiboot2;
mod platform;
mod pvh;
mod smbios;
mod source;
mod state;
#[cfg(test)]
mod tests;

pub use error::BootError;
pub(crate) use loader::Loader;
pub use memory::{HIGH_RAM_START, LOW_RAM_END, MapEntry, RangeKind, ram_ranges};
pub use platform::{Ecam, Platform};
pub use source::Image;
pub use state::application_processor;

use arch::VcpuState;
use elf::Elf;
use std::fmt;
use vm_memory::GuestMemoryMmap;

/// Longest command line, in bytes, for kernels that state no limit of their own.
const MAX_CMDLINE: usize = 65_535;

/// A file for a multiboot or PVH kernel, with the text that goes with it.
#[derive(Debug)]
pub struct Module {
    /// The file.
    pub image: Image,
    /// Its command line: by convention its path and then arguments.
    pub arguments: String,
}

/// What to boot, and on what machine.
#[derive(Debug)]
pub struct BootRequest<'a> {
    /// The kernel.
    pub kernel: &'a Image,
    /// The initial RAM disk, for Linux kernels.
    pub initrd: Option<&'a Image>,
    /// Modules, in order.
    pub modules: &'a [Module],
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// How many vCPUs there are; their APIC ids count from 0.
    pub vcpus: u32,
    /// Where the devices are.
    pub platform: &'a Platform,
}

/// A kernel's format and how it is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// A bzImage, entered in long mode.
    Linux64,
    /// A bzImage, entered in protected mode.
    Linux32,
    /// An ELF file with a PVH entry point.
    Pvh,
    /// A multiboot 1 image.
    Multiboot1,
    /// A multiboot 2 image.
    Multiboot2,
}

impl fmt::Display for KernelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linux64 => "Linux (64-bit)",
            Self::Linux32 => "Linux (32-bit)",
            Self::Pvh => "PVH",
            Self::Multiboot1 => "multiboot",
            Self::Multiboot2 => "multiboot2",
        })
    }
}

/// How the machine starts.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The boot vCPU's state at the kernel's first instruction. All others start as
    /// [`application_processor`] says.
    pub state: VcpuState,
    /// What was found.
    pub kind: KernelKind,
}

/// Tells the format of a kernel from its headers. An ELF file with several headers is taken as
/// PVH before multiboot 2 before multiboot 1: in the order of how much they tell the kernel.
///
/// # Errors
/// The file is not a kernel, or its headers are truncated or damaged.
pub fn detect(kernel: &Image) -> Result<KernelKind, BootError> {
    let start = kernel.prefix(multiboot2::SEARCH)?;
    if bzimage::is_bzimage(&start) {
        return bzimage::kind(kernel);
    }
    let multiboot = if multiboot2::header_offset(&start).is_some() {
        Some(KernelKind::Multiboot2)
    } else {
        multiboot1::header_offset(&start).map(|_| KernelKind::Multiboot1)
    };
    if Elf::is_elf(&start) {
        let pvh = match Elf::parse(kernel) {
            Ok(elf) => pvh::entry(kernel, &elf)?.map(|_| KernelKind::Pvh),
            // A multiboot header with addresses makes the ELF headers meaningless.
            Err(_) if multiboot.is_some() => None,
            Err(error) => return Err(error),
        };
        if let Some(kind) = pvh {
            return Ok(kind);
        }
    }
    multiboot.ok_or_else(|| BootError::ForeignKernel {
        name: kernel.name().into(),
        found: describe(&start),
    })
}

/// What a file that is no kernel looks like.
fn describe(start: &[u8]) -> &'static str {
    const KNOWN: &[(usize, &[u8], &str)] = &[
        (0, b"\x7fELF", "it is an ELF file without a PVH note or multiboot header"),
        (0x38, b"ARM\x64", "it is an ARM64 kernel"),
        (0, b"MZ", "it is an EFI or DOS program"),
        (0, b"\x1f\x8b", "it is compressed with gzip"),
        (0, b"\xfd7zXZ", "it is compressed with xz"),
        (0, b"\x28\xb5\x2f\xfd", "it is compressed with zstd"),
        (0, b"BZh", "it is compressed with bzip2"),
        (0, b"07070", "it is a cpio archive, perhaps the initrd"),
        (0, b"#!", "it is a script"),
        (0, b"!<arch>", "it is an archive or a Debian package"),
        (0, b"QFI\xfb", "it is a qcow2 disk image"),
        (0x1fe, b"\x55\xaa", "it is a boot sector or disk image"),
    ];
    KNOWN
        .iter()
        .find(|(at, magic, _)| start.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
        .map_or("its format is unknown", |(_, _, text)| text)
}

/// Loads a guest.
///
/// `memory` is laid out as [`ram_ranges`] says. Only what this function places is written;
/// memory of an earlier run is otherwise left as it is.
///
/// # Errors
/// A file is not what it should be, or memory is too small: see [`BootError`].
pub fn load(memory: &GuestMemoryMmap<()>, request: &BootRequest<'_>) -> Result<Entry, BootError> {
    let kind = detect(request.kernel)?;
    let (name, kernel) = (request.kernel.name(), request.kernel);
    match kind {
        KernelKind::Linux64 | KernelKind::Linux32 if !request.modules.is_empty() => {
            return Err(BootError::TakesNoModules { name: name.into(), kernel: "Linux" });
        }
        KernelKind::Multiboot1 | KernelKind::Multiboot2 if request.initrd.is_some() => {
            return Err(BootError::TakesNoInitrd { name: name.into(), kernel: "multiboot" });
        }
        _ => {}
    }
    if request.cmdline.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    let mut loader = Loader::new(memory, kernel, request.cmdline, request.platform)?;
    loader.write_firmware(request.vcpus, request.platform)?;
    match kind {
        KernelKind::Linux64 | KernelKind::Linux32 => bzimage::load(&mut loader, request.initrd),
        KernelKind::Pvh => pvh::load(&mut loader, request.initrd, request.modules),
        KernelKind::Multiboot1 => multiboot1::load(&mut loader, request.modules),
        KernelKind::Multiboot2 => multiboot2::load(&mut loader, request.modules),
    }
}
