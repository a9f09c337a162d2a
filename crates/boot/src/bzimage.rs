//! Linux kernels in the bzImage format (Documentation/arch/x86/boot.rst, "boot.rst" below).
use crate::error::BootError;
use crate::initrd;
use crate::memory::{FIRMWARE_END, HIGH_RAM_START};
use crate::source::{Image, field, u16_at, u32_at, u64_at};
use crate::state;
use crate::{Entry, KernelKind, Loader};
use arch::registers::gpr;

/// Offset of the setup header, in the file and in the zero page alike.
const SETUP_HEADER: usize = 0x1f1;
/// Bytes of the file that hold every field of the setup header that is known.
const HEADER_END: usize = 0x290;
/// Protocol 2.0x had no `cmdline_size` before 2.06: 255 then.
const OLD_CMDLINE_LIMIT: u32 = 255;
/// `initrd_addr_max` before protocol 2.03.
const OLD_INITRD_MAX: u32 = 0x37ff_ffff;

/// The fields of the setup header that loading needs (boot.rst, "Details of Header Fields").
#[derive(Debug, Clone)]
struct Header {
    /// The raw header from 1F1H on, to be copied into the zero page.
    raw: Vec<u8>,
    version: u16,
    /// Offset of the protected-mode kernel in the file.
    code_offset: u64,
    /// Bytes of the protected-mode kernel in the file.
    code_length: u64,
    /// `XLF_KERNEL_64`: a 64-bit entry point at 200H.
    entry64: bool,
    /// `XLF_CAN_BE_LOADED_ABOVE_4G`: the initrd may be there too.
    above_4g: bool,
    relocatable: bool,
    alignment: u64,
    preferred: u64,
    /// Memory that the kernel needs from its load address on before it reads the memory map.
    init_size: u64,
    initrd_max: u64,
    cmdline_limit: u32,
}

/// Whether these first bytes are a Linux kernel's.
pub(crate) fn is_bzimage(start: &[u8]) -> bool {
    u16_at(start, 0x1fe) == 0xaa55 && field(start, 0x202) == *b"HdrS"
}

fn parse(kernel: &Image) -> Result<Header, BootError> {
    let start = kernel.prefix(HEADER_END)?;
    kernel.check("the setup header", 0, 0x250)?;
    let version = u16_at(&start, 0x206);
    let loadflags = start.get(0x211).copied().unwrap_or(0);
    if version < 0x200 || loadflags & 1 == 0 {
        return Err(kernel.unsupported(
            "is a zImage, which loads below 640 KiB; build the kernel with `make bzImage`",
        ));
    }
    let since = |minimum: u16| version >= minimum;
    let setup_sectors = match start.get(SETUP_HEADER).copied().unwrap_or(0) {
        0 => 4,
        sectors => sectors,
    };
    let code_offset = (u64::from(setup_sectors) + 1) * 512;
    let paragraphs =
        if since(0x204) { u32_at(&start, 0x1f4) } else { u16_at(&start, 0x1f4).into() };
    let stated = u64::from(paragraphs) * 16;
    // The size is in paragraphs of 16 bytes: the file may end within the last one.
    kernel.check("the kernel proper", code_offset, stated.saturating_sub(15).max(1))?;
    let code_length = stated.min(kernel.length() - code_offset);
    let xloadflags = if since(0x20c) { u16_at(&start, 0x236) } else { 0 };
    let alignment = if since(0x205) { u64::from(u32_at(&start, 0x230)) } else { 0 };
    let relocatable = since(0x205) && start.get(0x234).is_some_and(|flag| *flag != 0);
    if relocatable && !alignment.is_power_of_two() {
        return Err(kernel.malformed("its kernel_alignment is not a power of two"));
    }
    // The header ends where the jump over it leads (boot.rst, "jump"), within the known fields.
    let header_end = 0x202 + usize::from(start.get(0x201).copied().unwrap_or(0));
    let raw = start.get(SETUP_HEADER..header_end.clamp(0x204, start.len())).unwrap_or_default();
    let header = Header {
        raw: raw.to_vec(),
        version,
        code_offset,
        code_length,
        entry64: xloadflags & 1 != 0,
        above_4g: xloadflags & 2 != 0,
        relocatable,
        alignment: alignment.max(1),
        preferred: if since(0x20a) { u64_at(&start, 0x258) } else { FIRMWARE_END },
        init_size: code_length.max(if since(0x20a) { u32_at(&start, 0x260).into() } else { 0 }),
        initrd_max: if since(0x203) { u32_at(&start, 0x22c) } else { OLD_INITRD_MAX }.into(),
        cmdline_limit: if since(0x206) { u32_at(&start, 0x238) } else { OLD_CMDLINE_LIMIT },
    };
    if header.entry64 && code_length <= 0x200 {
        return Err(kernel.malformed("it has no room for its own 64-bit entry point"));
    }
    Ok(header)
}

/// Finds and takes the memory for the kernel: its preferred address, or any other that fits where
/// it is relocatable (boot.rst, "pref_address", "kernel_alignment").
fn place_kernel(loader: &mut Loader<'_>, header: &Header) -> Result<u64, BootError> {
    let preferred = header.preferred.max(FIRMWARE_END);
    let end = preferred.saturating_add(header.init_size);
    if end <= HIGH_RAM_START && loader.placement.claim(&(preferred..end)) {
        return Ok(preferred);
    }
    let window = FIRMWARE_END..HIGH_RAM_START;
    let moved = header
        .relocatable
        .then(|| loader.placement.lowest(header.init_size, header.alignment, window))
        .flatten();
    let lowest = if header.relocatable {
        FIRMWARE_END.next_multiple_of(header.alignment)
    } else {
        preferred
    };
    moved.ok_or_else(|| loader.too_small(loader.kernel, lowest.saturating_add(header.init_size)))
}

/// Places the initrd as high as the kernel reads it, and loads it.
fn load_initrd(loader: &mut Loader<'_>, header: &Header, initrd: &Image) -> Result<u64, BootError> {
    initrd::check(initrd)?;
    let length = initrd.length();
    let limit = header.initrd_max.saturating_add(1).min(HIGH_RAM_START);
    let mut place = loader.placement.highest(length, 4096, FIRMWARE_END..limit);
    if place.is_none() && header.above_4g && header.entry64 {
        place = loader.placement.highest(length, 4096, HIGH_RAM_START..u64::MAX);
    }
    let Some(start) = place else {
        let below_limit = FIRMWARE_END + length <= limit;
        return Err(if below_limit {
            let used = header.preferred.max(FIRMWARE_END).saturating_add(header.init_size);
            loader.too_small(initrd, used.saturating_add(length))
        } else {
            initrd.unsupported(format!(
                "is too large: {} reads an initrd of at most {} bytes; shrink it",
                loader.kernel.name(),
                limit - FIRMWARE_END
            ))
        });
    };
    initrd.copy_to("the initrd", 0, length, &loader.ram, start)?;
    Ok(start)
}

pub(crate) fn load(loader: &mut Loader<'_>, initrd: Option<&Image>) -> Result<Entry, BootError> {
    let kernel = loader.kernel;
    let header = parse(kernel)?;
    loader.check_cmdline(header.cmdline_limit as usize)?;

    let gdt = loader.low(state::GDT_SIZE, 16)?;
    let zero_page = loader.low(4096, 4096)?;
    let page_tables = loader.low(state::PAGE_TABLES_SIZE, 4096)?;
    let cmdline = loader.place_cmdline()?;
    let start = place_kernel(loader, &header)?;
    kernel.copy_to(
        "the kernel proper",
        header.code_offset,
        header.code_length,
        &loader.ram,
        start,
    )?;
    let initrd = match initrd {
        Some(image) => Some((load_initrd(loader, &header, image)?, image.length())),
        None => None,
    };
    let page = boot_params(loader, &header, start, cmdline, initrd);
    loader.ram.write(zero_page, &page)?;

    // RSI points to the zero page; EBP, EDI and EBX are zero in the 32-bit protocol.
    let registers = [(gpr::RSI, zero_page)];
    if header.entry64 {
        let state = state::long_mode(&loader.ram, gdt, page_tables, start + 0x200)?;
        let state = state::with_registers(state, &registers);
        return Ok(Entry { state, kind: KernelKind::Linux64 });
    }
    let entry = u32::try_from(start).map_err(|_| kernel.malformed("it loads above 4 GiB"))?;
    let state = state::protected_mode(&loader.ram, gdt, entry)?;
    Ok(Entry { state: state::with_registers(state, &registers), kind: KernelKind::Linux32 })
}

/// The zero page (Documentation/arch/x86/zero-page.rst).
fn boot_params(
    loader: &Loader<'_>,
    header: &Header,
    start: u64,
    cmdline: u64,
    initrd: Option<(u64, u64)>,
) -> Vec<u8> {
    let mut page = vec![0u8; 4096];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(target) = page.get_mut(offset..offset + bytes.len()) {
            target.copy_from_slice(bytes);
        }
    };
    put(SETUP_HEADER, &header.raw);
    let low = |value: u64| (value as u32).to_le_bytes();
    let high = |value: u64| ((value >> 32) as u32).to_le_bytes();
    put(0x1fa, &0xffffu16.to_le_bytes()); // vid_mode: normal
    put(0x210, &[0xff]); // type_of_loader: none with an assigned number
    put(0x214, &low(start)); // code32_start
    put(0x228, &low(cmdline));
    let (initrd_start, initrd_length) = initrd.unwrap_or((0, 0));
    put(0x218, &low(initrd_start));
    put(0x21c, &low(initrd_length));
    put(0x0c0, &high(initrd_start));
    put(0x0c4, &high(initrd_length));
    // The zero page's field is older than the header's version that announces it (2.14); kernels
    // that do not know it skip it.
    if header.version >= 0x20e {
        put(0x070, &loader.rsdp.to_le_bytes());
    }
    let low_kib = loader.ram.low_end().saturating_sub(FIRMWARE_END) >> 10;
    put(0x1e0, &low(low_kib)); // alt_mem_k
    let mut entries = 0u8;
    for entry in loader.ram.map.iter().take(128) {
        let offset = 0x2d0 + usize::from(entries) * 20;
        put(offset, &entry.start.to_le_bytes());
        put(offset + 8, &entry.length.to_le_bytes());
        put(offset + 16, &(entry.kind as u32).to_le_bytes());
        entries += 1;
    }
    put(0x1e8, &[entries]);
    page
}

/// How the kernel is entered.
pub(crate) fn kind(kernel: &Image) -> Result<KernelKind, BootError> {
    let header = parse(kernel)?;
    Ok(if header.entry64 { KernelKind::Linux64 } else { KernelKind::Linux32 })
}
