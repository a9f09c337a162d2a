//! What the two multiboot protocols share: fixed-address images and modules.
use crate::elf::{Elf, Sections};
use crate::error::BootError;
use crate::memory::FIRMWARE_END;
use crate::{Loader, Module};
use std::ops::Range;

/// The name that kernels are told.
pub(crate) const LOADER_NAME: &str = concat!("Bivisor ", env!("CARGO_PKG_VERSION"));

/// The addresses that a header gives for an image that is not an ELF file ("a.out kludge",
/// Multiboot 0.6.96 §3.1.3, Multiboot2 §3.1.5).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    pub header: u32,
    pub load: u32,
    pub load_end: u32,
    pub bss_end: u32,
}

/// A module that was put into memory.
pub(crate) struct LoadedModule {
    pub start: u32,
    pub end: u32,
    pub arguments: String,
}

/// Loads the kernel's own memory: by the header's addresses, else as an ELF file. Gives the
/// range taken, the entry point, and for an ELF file its sections.
pub(crate) fn load_kernel(
    loader: &mut Loader<'_>,
    header_offset: u64,
    addresses: Option<Addresses>,
    entry: Option<u32>,
) -> Result<(Range<u64>, u32, Option<Sections>), BootError> {
    let kernel = loader.kernel;
    let (span, start, sections) = if let Some(addresses) = addresses {
        let entry = entry.ok_or_else(|| {
            kernel.malformed("its multiboot header has load addresses but no entry address")
        })?;
        (load_fixed(loader, header_offset, addresses)?, entry, None)
    } else {
        let start = kernel.prefix(64)?;
        if !Elf::is_elf(&start) {
            return Err(kernel.malformed(
                "its multiboot header has no load addresses, and it is not an ELF file",
            ));
        }
        let elf = Elf::parse(kernel)?;
        let span = elf.load(loader)?;
        let sections = elf.sections(loader)?;
        // Some higher-half kernels state their entry point as a virtual address.
        let stated = if span.contains(&elf.entry) { elf.entry } else { elf.physical(elf.entry) };
        let start = u32::try_from(stated)
            .map_err(|_| kernel.malformed("its entry point is not below 4 GiB"))?;
        (span, entry.unwrap_or(start), sections)
    };
    if !span.contains(&start.into()) {
        return Err(kernel.malformed("its entry point lies outside of what it loads"));
    }
    Ok((span, start, sections))
}

fn load_fixed(
    loader: &mut Loader<'_>,
    header_offset: u64,
    addresses: Addresses,
) -> Result<Range<u64>, BootError> {
    let kernel = loader.kernel;
    let wrong = || kernel.malformed("the load addresses in its multiboot header contradict");
    // A load address of FFFFFFFFH means: from the start of the file (Multiboot2 §3.1.5).
    let before = match addresses.load {
        u32::MAX => header_offset,
        load => addresses.header.checked_sub(load).ok_or_else(wrong)?.into(),
    };
    let offset = header_offset.checked_sub(before).ok_or_else(wrong)?;
    let load = u64::from(addresses.header).checked_sub(before).ok_or_else(wrong)?;
    let length = match addresses.load_end {
        0 => kernel.length().saturating_sub(offset),
        end => u64::from(end).checked_sub(load).ok_or_else(wrong)?,
    };
    let loaded_end = load.saturating_add(length);
    let end = match addresses.bss_end {
        0 => loaded_end,
        end => end.into(),
    };
    if end < loaded_end || load == end {
        return Err(wrong());
    }
    kernel.check("the kernel proper", offset, length)?;
    loader.claim_for_kernel("the image at", load..end)?;
    kernel.copy_to("the kernel proper", offset, length, &loader.ram, load)?;
    loader.ram.zero(loaded_end..end)?;
    Ok(load..end)
}

/// Puts the modules behind the kernel, in order, each from a page boundary on.
pub(crate) fn load_modules(
    loader: &mut Loader<'_>,
    modules: &[Module],
    kernel_end: u64,
) -> Result<Vec<LoadedModule>, BootError> {
    let mut loaded = Vec::new();
    let mut from = kernel_end.max(FIRMWARE_END);
    for module in modules {
        let length = module.image.length();
        let start = loader.below_4g(length, 4096, from, &module.image)?;
        module.image.copy_to("the module", 0, length, &loader.ram, start)?;
        from = start + length;
        // Below 4 GiB by the search above.
        let (start, end) = (start as u32, from as u32);
        loaded.push(LoadedModule { start, end, arguments: module.arguments.clone() });
    }
    Ok(loaded)
}

/// `mem_lower` and `mem_upper`: KiB from address 0 and from 1 MiB on.
pub(crate) fn basic_memory(loader: &Loader<'_>) -> (u32, u32) {
    let upper = loader.ram.low_end().saturating_sub(FIRMWARE_END) >> 10;
    ((crate::memory::EBDA_START >> 10) as u32, upper as u32)
}
