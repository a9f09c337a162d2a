//! Kernels with a PVH entry point (Xen, docs/misc/pvh.pandoc and
//! xen/include/public/arch-x86/hvm/start_info.h): Linux's vmlinux, FreeBSD, Xen, small guests.
use crate::elf::Elf;
use crate::error::BootError;
use crate::initrd;
use crate::memory::{FIRMWARE_END, HIGH_RAM_START};
use crate::source::Image;
use crate::state;
use crate::{Entry, KernelKind, Loader, MAX_CMDLINE, Module};
use arch::registers::gpr;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note with the physical address of the 32-bit entry point.
const PHYS32_ENTRY: u32 = 18;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_SIZE: u64 = 56;

/// The entry point, where this ELF file has one.
pub(crate) fn entry(kernel: &Image, elf: &Elf) -> Result<Option<u64>, BootError> {
    elf.note(kernel, b"Xen\0", PHYS32_ENTRY)
}

pub(crate) fn load(
    loader: &mut Loader<'_>,
    initrd: Option<&Image>,
    modules: &[Module],
) -> Result<Entry, BootError> {
    let kernel = loader.kernel;
    loader.check_cmdline(MAX_CMDLINE)?;
    let elf = Elf::parse(kernel)?;
    let entry = entry(kernel, &elf)?
        .and_then(|entry| u32::try_from(entry).ok())
        .ok_or_else(|| kernel.malformed("its PVH entry point is not below 4 GiB"))?;
    let span = elf.load(loader)?;
    if !span.contains(&entry.into()) {
        return Err(kernel.malformed("its PVH entry point lies outside of what it loads"));
    }

    // The initrd is the first module (Linux reads exactly that one); placed as high as possible,
    // out of the way of kernels that use memory after their end without asking.
    if let Some(image) = initrd {
        initrd::check(image)?;
    }
    let mut list = Vec::new();
    let files = initrd
        .iter()
        .map(|image| (*image, ""))
        .chain(modules.iter().map(|module| (&module.image, module.arguments.as_str())));
    for (image, arguments) in files {
        let length = image.length();
        let start = loader
            .placement
            .highest(length, 4096, FIRMWARE_END..HIGH_RAM_START)
            .ok_or_else(|| loader.too_small(image, span.end.saturating_add(length)))?;
        image.copy_to("the file", 0, length, &loader.ram, start)?;
        let text = loader.place_string(arguments)?;
        for value in [start, length, text, 0] {
            list.extend_from_slice(&value.to_le_bytes());
        }
    }
    let module_count = (list.len() / 32) as u32;
    let module_list = if module_count == 0 { 0 } else { loader.place_low(&list)? };

    let map: Vec<u8> = loader
        .ram
        .map
        .iter()
        .flat_map(|e| [e.start, e.length, e.kind as u64].map(u64::to_le_bytes).concat())
        .collect();
    let map_entries = (map.len() / 24) as u32;
    let map = loader.place_low(&map)?;
    let cmdline = loader.place_cmdline()?;
    let mut info = Vec::new();
    for value in [START_INFO_MAGIC, 1, 0, module_count] {
        info.extend_from_slice(&value.to_le_bytes());
    }
    for value in [module_list, cmdline, loader.rsdp, map, map_entries.into()] {
        info.extend_from_slice(&value.to_le_bytes());
    }
    debug_assert_eq!(info.len() as u64, START_INFO_SIZE);
    let info = loader.place_low(&info)?;
    let gdt = loader.low(state::GDT_SIZE, 16)?;
    let state = state::protected_mode(&loader.ram, gdt, entry)?;
    Ok(Entry { state: state::with_registers(state, &[(gpr::RBX, info)]), kind: KernelKind::Pvh })
}
