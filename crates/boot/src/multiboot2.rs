//! Multiboot2 2.0.
use crate::elf::Sections;
use crate::error::BootError;
use crate::multiboot::{self, Addresses, LOADER_NAME, LoadedModule};
use crate::source::{Image, u16_at, u32_at};
use crate::state;
use crate::{Entry, KernelKind, Loader, MAX_CMDLINE, Module};
use arch::registers::gpr;

const MAGIC: u32 = 0xe852_50d6;
/// EAX at the entry point.
const LOADED_MAGIC: u32 = 0x36d7_6289;
/// The header lies in this much of the file (§3.1.1).
pub(crate) const SEARCH: usize = 32768;
/// The highest type of information tag that the specification defines.
const LAST_INFORMATION: u32 = 21;

/// Where the header is in the first bytes of a file, if there is one.
pub(crate) fn header_offset(start: &[u8]) -> Option<usize> {
    let searched = start.get(..start.len().min(SEARCH)).unwrap_or_default();
    (0..searched.len().saturating_sub(15)).step_by(8).find(|at| {
        let word = |index: usize| u32_at(searched, at + index * 4);
        let sum = (0..4).fold(0u32, |sum, index| sum.wrapping_add(word(index)));
        word(0) == MAGIC && word(1) == 0 && sum == 0
    })
}

/// What the header's tags ask for.
#[derive(Debug, Default)]
struct Wishes {
    addresses: Option<Addresses>,
    entry: Option<u32>,
}

/// Reads the header's tags (§3.1.3 to §3.1.13).
fn parse(kernel: &Image, header: &[u8]) -> Result<Wishes, BootError> {
    let mut wishes = Wishes::default();
    let mut at = 16;
    while at + 8 <= header.len() {
        let (kind, flags) = (u16_at(header, at), u16_at(header, at + 2));
        let size = u32_at(header, at + 4) as usize;
        let optional = flags & 1 != 0;
        let tag = at
            .checked_add(size)
            .filter(|_| size >= 8)
            .and_then(|end| header.get(at..end))
            .ok_or_else(|| kernel.malformed("a tag of its multiboot2 header has a wrong size"))?;
        let word = |index: usize| u32_at(tag, 8 + index * 4);
        let long_enough = |words: usize| {
            if tag.len() < 8 + words * 4 {
                return Err(kernel.malformed("a tag of its multiboot2 header is too short"));
            }
            Ok(())
        };
        match kind {
            0 => return Ok(wishes),
            1 => check_requests(kernel, tag, optional)?,
            2 => {
                long_enough(4)?;
                let (header, load) = (word(0), word(1));
                let (load_end, bss_end) = (word(2), word(3));
                wishes.addresses = Some(Addresses { header, load, load_end, bss_end });
            }
            3 => {
                long_enough(1)?;
                wishes.entry = Some(word(0));
            }
            // Console flags: bit 0 requires a console that the loader knows.
            4 if !optional && word(0) & 1 != 0 => return Err(no_display(kernel)),
            5 if !optional => return Err(no_display(kernel)),
            // Console, framebuffer (optional), page-aligned modules, and what concerns EFI.
            4..=9 => {}
            // Relocatable: it may be moved, but need not.
            10 => {}
            _ if optional => {}
            _ => {
                return Err(kernel.unsupported(format!(
                    "its multiboot2 header requires tag {kind}, which the specification does not \
                     define; mark it optional (flag 0)"
                )));
            }
        }
        at = (at + size).next_multiple_of(8);
    }
    Err(kernel.malformed("its multiboot2 header has no end tag"))
}

fn no_display(kernel: &Image) -> BootError {
    kernel.unsupported(
        "its multiboot2 header requires a display, but this machine has none; mark the console \
         and framebuffer tags optional (flag 0)",
    )
}

/// The information request (§3.1.4): what is defined may be absent from a machine that has it
/// not, what is not defined cannot be given.
fn check_requests(kernel: &Image, tag: &[u8], optional: bool) -> Result<(), BootError> {
    let requested = tag.get(8..).unwrap_or_default().chunks_exact(4).map(|word| u32_at(word, 0));
    match requested.into_iter().find(|kind| *kind > LAST_INFORMATION) {
        Some(kind) if !optional => Err(kernel.unsupported(format!(
            "its multiboot2 header requests information of type {kind}, which the specification \
             does not define; mark the request optional (flag 0)"
        ))),
        _ => Ok(()),
    }
}

pub(crate) fn load(loader: &mut Loader<'_>, modules: &[Module]) -> Result<Entry, BootError> {
    let kernel = loader.kernel;
    loader.check_cmdline(MAX_CMDLINE)?;
    let start = kernel.prefix(SEARCH)?;
    let offset =
        header_offset(&start).ok_or_else(|| kernel.malformed("its multiboot2 header has gone"))?;
    let length = u32_at(&start, offset + 8);
    kernel.check("the multiboot2 header", offset as u64, length.into())?;
    let header = start
        .get(offset..offset.saturating_add(length as usize))
        .ok_or_else(|| kernel.malformed("its multiboot2 header leaves the first 32 KiB"))?;
    let wishes = parse(kernel, header)?;
    let (span, entry, sections) =
        multiboot::load_kernel(loader, offset as u64, wishes.addresses, wishes.entry)?;
    let modules = multiboot::load_modules(loader, modules, span.end)?;
    let info = information(loader, &modules, sections.as_ref(), span.start);
    let place = loader.low_or_after(info.len() as u64, 8, span.end)?;
    loader.ram.write(place, &info)?;
    let gdt = loader.low(state::GDT_SIZE, 16)?;
    let state = state::protected_mode(&loader.ram, gdt, entry)?;
    let registers = [(gpr::RAX, LOADED_MAGIC.into()), (gpr::RBX, place)];
    Ok(Entry { state: state::with_registers(state, &registers), kind: KernelKind::Multiboot2 })
}

/// The boot information (§3.6): a list of tags, each from a multiple of 8 on.
struct Information(Vec<u8>);

impl Information {
    fn tag(&mut self, kind: u32, parts: &[&[u8]]) {
        let size = 8 + parts.iter().map(|part| part.len()).sum::<usize>();
        self.0.extend_from_slice(&kind.to_le_bytes());
        self.0.extend_from_slice(&(size as u32).to_le_bytes());
        for part in parts {
            self.0.extend_from_slice(part);
        }
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }
}

fn information(
    loader: &Loader<'_>,
    modules: &[LoadedModule],
    sections: Option<&Sections>,
    kernel_start: u64,
) -> Vec<u8> {
    let words = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut info = Information(vec![0; 8]);
    info.tag(1, &[loader.cmdline.as_bytes(), b"\0"]);
    info.tag(2, &[LOADER_NAME.as_bytes(), b"\0"]);
    for module in modules {
        let range = words(&[module.start, module.end]);
        info.tag(3, &[&range, module.arguments.as_bytes(), b"\0"]);
    }
    let (lower, upper) = multiboot::basic_memory(loader);
    info.tag(4, &[&words(&[lower, upper])]);
    let mut map = words(&[24, 0]);
    for entry in &loader.ram.map {
        map.extend_from_slice(&entry.start.to_le_bytes());
        map.extend_from_slice(&entry.length.to_le_bytes());
        map.extend_from_slice(&words(&[entry.kind as u32, 0]));
    }
    info.tag(6, &[&map]);
    if let Some(s) = sections {
        let head = words(&[s.count.into(), s.entry_size.into(), s.names.into()]);
        info.tag(9, &[&head, &s.headers]);
    }
    info.tag(14, &[loader.rsdp_bytes.get(..20).unwrap_or_default()]);
    info.tag(15, &[&loader.rsdp_bytes]);
    info.tag(21, &[&words(&[kernel_start as u32])]);
    info.tag(0, &[]);
    let size = words(&[info.0.len() as u32]);
    if let Some(head) = info.0.get_mut(..4) {
        head.copy_from_slice(&size);
    }
    info.0
}
