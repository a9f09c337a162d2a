//! Multiboot 0.6.96 ("multiboot 1").
use crate::error::BootError;
use crate::multiboot::{self, Addresses, LOADER_NAME};
use crate::source::u32_at;
use crate::state;
use crate::{Entry, KernelKind, Loader, MAX_CMDLINE, Module};
use arch::registers::gpr;

const MAGIC: u32 = 0x1bad_b002;
/// EAX at the entry point.
const LOADED_MAGIC: u32 = 0x2bad_b002;
/// The header lies in this much of the file (§3.1).
const SEARCH: usize = 8192;

mod flag {
    /// Modules on page boundaries: always so here.
    pub const PAGE_ALIGN: u32 = 1 << 0;
    pub const MEMORY_INFO: u32 = 1 << 1;
    pub const VIDEO: u32 = 1 << 2;
    pub const ADDRESSES: u32 = 1 << 16;
    /// Bits that a loader must refuse when it does not know them (§3.1.2).
    pub const REQUIRED: u32 = 0xffff;
}

/// Where the header is in the first bytes of a file, if there is one.
pub(crate) fn header_offset(start: &[u8]) -> Option<usize> {
    let searched = start.get(..start.len().min(SEARCH)).unwrap_or_default();
    (0..searched.len().saturating_sub(11)).step_by(4).find(|at| {
        let word = |index: usize| u32_at(searched, at + index * 4);
        word(0) == MAGIC && word(0).wrapping_add(word(1)).wrapping_add(word(2)) == 0
    })
}

pub(crate) fn load(loader: &mut Loader<'_>, modules: &[Module]) -> Result<Entry, BootError> {
    let kernel = loader.kernel;
    loader.check_cmdline(MAX_CMDLINE)?;
    let start = kernel.prefix(SEARCH + 48)?;
    let offset =
        header_offset(&start).ok_or_else(|| kernel.malformed("its multiboot header has gone"))?;
    let word = |index: usize| u32_at(&start, offset + index * 4);
    let flags = word(1);
    let unknown = flags & flag::REQUIRED & !(flag::PAGE_ALIGN | flag::MEMORY_INFO | flag::VIDEO);
    if unknown != 0 {
        return Err(kernel.unsupported(format!(
            "its multiboot header requires features {unknown:#x} that the specification does not \
             define; clear these flags"
        )));
    }
    if flags & flag::VIDEO != 0 {
        return Err(kernel.unsupported(
            "its multiboot header requires a video mode, but this machine has no display; clear \
             flag 2",
        ));
    }
    let fixed = flags & flag::ADDRESSES != 0;
    if fixed {
        kernel.check("the multiboot header", offset as u64, 32)?;
    }
    let addresses = fixed.then(|| Addresses {
        header: word(3),
        load: word(4),
        load_end: word(5),
        bss_end: word(6),
    });
    let entry = fixed.then(|| word(7));
    let (span, entry, sections) = multiboot::load_kernel(loader, offset as u64, addresses, entry)?;
    let info = info(loader, modules, span.end, sections)?;
    let gdt = loader.low(state::GDT_SIZE, 16)?;
    let state = state::protected_mode(&loader.ram, gdt, entry)?;
    let registers = [(gpr::RAX, LOADED_MAGIC.into()), (gpr::RBX, info)];
    Ok(Entry { state: state::with_registers(state, &registers), kind: KernelKind::Multiboot1 })
}

/// Writes the information structure (§3.3) and all that it points to.
fn info(
    loader: &mut Loader<'_>,
    modules: &[Module],
    kernel_end: u64,
    sections: Option<crate::elf::Sections>,
) -> Result<u64, BootError> {
    let modules = multiboot::load_modules(loader, modules, kernel_end)?;
    let mut list = Vec::new();
    for module in &modules {
        let arguments = loader.place_string(&module.arguments)? as u32;
        for value in [module.start, module.end, arguments, 0] {
            list.extend_from_slice(&value.to_le_bytes());
        }
    }
    let list = loader.place_low(&list)? as u32;
    let mut map = Vec::new();
    for entry in &loader.ram.map {
        map.extend_from_slice(&20u32.to_le_bytes());
        map.extend_from_slice(&entry.start.to_le_bytes());
        map.extend_from_slice(&entry.length.to_le_bytes());
        map.extend_from_slice(&(entry.kind as u32).to_le_bytes());
    }
    let map_length = map.len() as u32;
    let map = loader.place_low(&map)? as u32;
    let cmdline = loader.place_cmdline()? as u32;
    let loader_name = loader.place_string(LOADER_NAME)? as u32;
    let (lower, upper) = multiboot::basic_memory(loader);

    let mut words = [0u32; 29];
    // Memory, command line, modules, memory map, loader's name.
    words[0] = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
    (words[1], words[2]) = (lower, upper);
    words[4] = cmdline;
    (words[5], words[6]) = (modules.len() as u32, list);
    if let Some(sections) = sections {
        words[0] |= 1 << 5;
        (words[7], words[8]) = (sections.count.into(), sections.entry_size.into());
        words[9] = loader.place_low(&sections.headers)? as u32;
        words[10] = sections.names.into();
    }
    (words[11], words[12]) = (map_length, map);
    words[16] = loader_name;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    loader.place_low(&bytes)
}
