//! ELF files, 32- and 64-bit, as boot protocols use them (System V ABI, "Object Files").
use crate::Loader;
use crate::error::BootError;
use crate::memory::FIRMWARE_END;
use crate::source::{Image, field, u16_at, u32_at, u64_at};
use std::ops::Range;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
/// Most bytes of notes looked through: a kernel has a few hundred.
const MAX_NOTES: u64 = 1 << 20;
/// Most sections handed to a multiboot kernel.
const MAX_SECTIONS: u16 = 1024;

/// A program header (an entry of the segment table).
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    kind: u32,
    offset: u64,
    pub virtual_address: u64,
    pub physical: u64,
    file_size: u64,
    pub memory_size: u64,
    align: u64,
}

/// What loading needs of an ELF file's headers.
#[derive(Debug)]
pub(crate) struct Elf {
    is64: bool,
    pub entry: u64,
    segments: Vec<Segment>,
    section_table: u64,
    section_size: u16,
    section_count: u16,
    section_names: u16,
}

/// The section headers as a kernel gets them: raw, with the addresses that the loader gave them.
pub(crate) struct Sections {
    pub count: u16,
    pub entry_size: u16,
    pub names: u16,
    pub headers: Vec<u8>,
}

impl Elf {
    /// Whether these first bytes are an ELF file's.
    pub(crate) fn is_elf(start: &[u8]) -> bool {
        start.starts_with(b"\x7fELF")
    }

    /// Reads the headers of an x86 executable.
    pub(crate) fn parse(kernel: &Image) -> Result<Self, BootError> {
        let header = kernel.prefix(64)?;
        kernel.check("the ELF header", 0, 52)?;
        let is64 = match field(&header, 4) {
            [1, 1] => false,
            [2, 1] => true,
            _ => return Err(kernel.unsupported("is an ELF that is not little-endian x86")),
        };
        if is64 {
            kernel.check("the ELF header", 0, 64)?;
        }
        if !matches!(u16_at(&header, 18), EM_386 | EM_X86_64) {
            return Err(kernel.unsupported("is an ELF for another processor; build it for x86"));
        }
        let word = |at64: usize, at32: usize| {
            if is64 { u64_at(&header, at64) } else { u32_at(&header, at32).into() }
        };
        let half = |at64: usize, at32: usize| u16_at(&header, if is64 { at64 } else { at32 });
        let mut elf = Self {
            is64,
            entry: word(24, 24),
            segments: Vec::new(),
            section_table: word(40, 32),
            section_size: half(58, 46),
            section_count: half(60, 48),
            section_names: half(62, 50),
        };
        elf.read_segments(kernel, word(32, 28), half(54, 42), half(56, 44))?;
        Ok(elf)
    }

    fn read_segments(
        &mut self,
        kernel: &Image,
        table: u64,
        entry_size: u16,
        count: u16,
    ) -> Result<(), BootError> {
        let minimum = if self.is64 { 56 } else { 32 };
        if count > 0 && entry_size < minimum {
            return Err(kernel.malformed("its program headers are too small"));
        }
        let what = "the table of program headers";
        kernel.check(what, table, u64::from(entry_size) * u64::from(count))?;
        for index in 0..count {
            let mut raw = [0u8; 56];
            let raw = raw.get_mut(..usize::from(minimum)).unwrap_or_default();
            kernel.read(what, table + u64::from(entry_size) * u64::from(index), raw)?;
            let segment = if self.is64 {
                Segment {
                    kind: u32_at(raw, 0),
                    offset: u64_at(raw, 8),
                    virtual_address: u64_at(raw, 16),
                    physical: u64_at(raw, 24),
                    file_size: u64_at(raw, 32),
                    memory_size: u64_at(raw, 40),
                    align: u64_at(raw, 48),
                }
            } else {
                Segment {
                    kind: u32_at(raw, 0),
                    offset: u32_at(raw, 4).into(),
                    virtual_address: u32_at(raw, 8).into(),
                    physical: u32_at(raw, 12).into(),
                    file_size: u32_at(raw, 16).into(),
                    memory_size: u32_at(raw, 20).into(),
                    align: u32_at(raw, 28).into(),
                }
            };
            if matches!(segment.kind, PT_LOAD | PT_NOTE) {
                self.segments.push(segment);
            }
        }
        Ok(())
    }

    /// The segments that take memory.
    pub(crate) fn loadable(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_size > 0)
    }

    /// The physical address of a virtual one, by the segments; the same where none holds it.
    pub(crate) fn physical(&self, address: u64) -> u64 {
        self.loadable()
            .find_map(|s| {
                let offset = address.checked_sub(s.virtual_address)?;
                (offset < s.memory_size).then(|| s.physical.wrapping_add(offset))
            })
            .unwrap_or(address)
    }

    /// The description of the note with this owner and type, as an address of 4 or 8 bytes.
    pub(crate) fn note(
        &self,
        kernel: &Image,
        owner: &[u8; 4],
        kind: u32,
    ) -> Result<Option<u64>, BootError> {
        for segment in self.segments.iter().filter(|s| s.kind == PT_NOTE) {
            let align = if segment.align == 8 { 8 } else { 4 };
            let end = segment.file_size.min(MAX_NOTES);
            kernel.check("the notes", segment.offset, end)?;
            let mut at = 0u64;
            while at + 16 <= end {
                let mut header = [0u8; 16];
                kernel.read("the notes", segment.offset + at, &mut header)?;
                let name_size = u64::from(u32_at(&header, 0));
                let size = u64::from(u32_at(&header, 4));
                let description = (at + 12 + name_size).next_multiple_of(align);
                let found = u32_at(&header, 8) == kind
                    && name_size == 4
                    && field::<4>(&header, 12) == *owner;
                if found && matches!(size, 4 | 8) && description + size <= end {
                    let mut value = [0u8; 8];
                    let bytes = value.get_mut(..size as usize).unwrap_or_default();
                    kernel.read("the notes", segment.offset + description, bytes)?;
                    return Ok(Some(u64::from_le_bytes(value)));
                }
                at = (description + size).next_multiple_of(align);
            }
        }
        Ok(None)
    }

    /// Takes memory for all segments and loads them; gives the range from the first to the last.
    pub(crate) fn load(&self, loader: &mut Loader<'_>) -> Result<Range<u64>, BootError> {
        let kernel = loader.kernel;
        let (mut lowest, mut highest) = (u64::MAX, 0);
        for segment in self.loadable() {
            if segment.file_size > segment.memory_size {
                return Err(kernel.malformed("a segment is larger in the file than in memory"));
            }
            let end = segment
                .physical
                .checked_add(segment.memory_size)
                .ok_or_else(|| kernel.malformed("a segment ends past the last address"))?;
            kernel.check("a segment", segment.offset, segment.file_size)?;
            loader.claim_for_kernel("a segment at", segment.physical..end)?;
            let (offset, size) = (segment.offset, segment.file_size);
            kernel.copy_to("a segment", offset, size, &loader.ram, segment.physical)?;
            loader.ram.zero(segment.physical + segment.file_size..end)?;
            lowest = lowest.min(segment.physical);
            highest = highest.max(end);
        }
        if lowest >= highest {
            return Err(kernel.unsupported("is an ELF with nothing to load; link it as a kernel"));
        }
        Ok(lowest..highest)
    }

    /// The section headers, with the sections that no segment loaded (symbols, strings) put into
    /// free memory and their addresses set, as boot loaders do (Multiboot2 §3.6.7).
    pub(crate) fn sections(&self, loader: &mut Loader<'_>) -> Result<Option<Sections>, BootError> {
        const SHT_NOBITS: u32 = 8;
        let kernel = loader.kernel;
        let (count, entry_size) = (self.section_count, self.section_size);
        let minimum: u16 = if self.is64 { 64 } else { 40 };
        if count == 0 || self.section_table == 0 {
            return Ok(None);
        }
        if entry_size < minimum || entry_size > 256 || count > MAX_SECTIONS {
            return Err(kernel.malformed("its table of sections"));
        }
        let bytes = usize::from(count) * usize::from(entry_size);
        let what = "the table of sections";
        kernel.check(what, self.section_table, bytes as u64)?;
        let mut headers = vec![0u8; bytes];
        kernel.read(what, self.section_table, &mut headers)?;
        for header in headers.chunks_exact_mut(entry_size.into()) {
            let (address, offset, size) = if self.is64 {
                (u64_at(header, 16), u64_at(header, 24), u64_at(header, 32))
            } else {
                let at = |offset| u64::from(u32_at(header, offset));
                (at(12), at(16), at(20))
            };
            let kind = u32_at(header, 4);
            if address != 0 || size == 0 || kind == 0 || kind == SHT_NOBITS {
                continue;
            }
            kernel.check("a section", offset, size)?;
            let place = loader.below_4g(size, 4096, FIRMWARE_END, kernel)?;
            kernel.copy_to("a section", offset, size, &loader.ram, place)?;
            let field = if self.is64 { header.get_mut(16..24) } else { header.get_mut(12..16) };
            if let Some(field) = field {
                let width = field.len();
                field.copy_from_slice(place.to_le_bytes().get(..width).unwrap_or_default());
            }
        }
        Ok(Some(Sections { count, entry_size, names: self.section_names, headers }))
    }
}
