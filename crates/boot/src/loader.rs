//! What all formats share while a guest is being loaded.
use crate::error::BootError;
use crate::memory::{
    EBDA_START, FIRMWARE_END, FIRMWARE_START, GuestRam, HIGH_RAM_START, LEGACY_HOLE_START,
    Placement,
};
use crate::platform::Platform;
use crate::source::Image;
use crate::{acpi, smbios};
use std::ops::Range;
use vm_memory::GuestMemoryMmap;

/// Where the ACPI tables are.
const ACPI_AREA: Range<u64> = FIRMWARE_START..SMBIOS_START;
/// Where the SMBIOS tables are: kernels look for their anchors here (SMBIOS 3.6 §5.2).
const SMBIOS_START: u64 = 0xf_0000;
/// Small structures go below the EBDA, above what kernels' own trampolines use.
const LOW_WINDOW: Range<u64> = 0x1_0000..EBDA_START;
/// The least memory that holds the firmware's tables and anything above 1 MiB.
const MINIMUM: u64 = FIRMWARE_END + (1 << 20);

/// A guest being loaded: its memory, what of it is taken, and what was asked for.
pub(crate) struct Loader<'a> {
    pub ram: GuestRam<'a>,
    pub placement: Placement,
    pub kernel: &'a Image,
    pub cmdline: &'a str,
    /// Address and copy of the ACPI root pointer.
    pub rsdp: u64,
    pub rsdp_bytes: Vec<u8>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(
        memory: &'a GuestMemoryMmap<()>,
        kernel: &'a Image,
        cmdline: &'a str,
        platform: &Platform,
    ) -> Result<Self, BootError> {
        let ram = GuestRam::new(memory, platform);
        let placement = Placement::new(&ram.map);
        let loader = Self { ram, placement, kernel, cmdline, rsdp: 0, rsdp_bytes: Vec::new() };
        if loader.ram.low_end() < MINIMUM {
            return Err(loader.too_small(kernel, MINIMUM));
        }
        Ok(loader)
    }

    /// Writes what firmware leaves in memory: tables and the BIOS data area.
    pub(crate) fn write_firmware(
        &mut self,
        vcpus: u32,
        platform: &Platform,
    ) -> Result<(), BootError> {
        let tables = acpi::tables(ACPI_AREA, vcpus, platform)?;
        self.ram.zero(EBDA_START..LEGACY_HOLE_START)?;
        self.ram.zero(FIRMWARE_START..FIRMWARE_END)?;
        self.ram.write(ACPI_AREA.start, &tables.bytes)?;
        self.rsdp = ACPI_AREA.start;
        self.rsdp_bytes = tables.bytes.get(..acpi::RSDP_SIZE).unwrap_or_default().to_vec();
        self.ram.write(SMBIOS_START, &smbios::tables(SMBIOS_START, vcpus, self.ram.total()))?;
        // BIOS data area: port of COM1, segment of the EBDA, KiB of conventional memory.
        let com1: u16 = if platform.com1 { 0x3f8 } else { 0 };
        self.ram.write(0x400, &com1.to_le_bytes())?;
        self.ram.write(0x40e, &((EBDA_START >> 4) as u16).to_le_bytes())?;
        self.ram.write(0x413, &((EBDA_START >> 10) as u16).to_le_bytes())?;
        // The EBDA starts with its own size in KiB.
        self.ram.write(EBDA_START, &[((LEGACY_HOLE_START - EBDA_START) >> 10) as u8])
    }

    /// The error for a file that needs `needed` bytes of memory in all, or, where there are as
    /// many, has found no room in the part of them that it can use.
    pub(crate) fn too_small(&self, image: &Image, needed: u64) -> BootError {
        let (name, available) = (image.name().into(), self.ram.total());
        if needed <= available {
            return BootError::NoRoom { name };
        }
        BootError::MemoryTooSmall { name, needed, available }
    }

    /// Checks the command line against the kernel's limit, in bytes without the closing NUL.
    pub(crate) fn check_cmdline(&self, limit: usize) -> Result<(), BootError> {
        let length = self.cmdline.len();
        let limit = limit.min(crate::MAX_CMDLINE);
        if length > limit {
            let name = self.kernel.name().into();
            return Err(BootError::CommandLineTooLong { name, length, limit });
        }
        Ok(())
    }

    /// Takes low memory for a small structure.
    pub(crate) fn low(&mut self, length: u64, align: u64) -> Result<u64, BootError> {
        self.low_or_after(length, align, FIRMWARE_END)
    }

    /// Takes low memory, or where a kernel has taken that or it does not suffice, memory from
    /// `after` on.
    pub(crate) fn low_or_after(
        &mut self,
        length: u64,
        align: u64,
        after: u64,
    ) -> Result<u64, BootError> {
        let low = self.placement.lowest(length, align, LOW_WINDOW);
        match low {
            Some(place) => Ok(place),
            None => self.below_4g(length, align, after, self.kernel),
        }
    }

    /// Takes the lowest memory from `from` on and below 4 GiB; `image` is what needs it.
    pub(crate) fn below_4g(
        &mut self,
        length: u64,
        align: u64,
        from: u64,
        image: &Image,
    ) -> Result<u64, BootError> {
        self.placement
            .lowest(length, align, from..HIGH_RAM_START)
            .ok_or_else(|| self.too_small(image, from.saturating_add(length)))
    }

    /// Takes low memory for these bytes and writes them.
    pub(crate) fn place_low(&mut self, bytes: &[u8]) -> Result<u64, BootError> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let place = self.low(bytes.len() as u64, 8)?;
        self.ram.write(place, bytes)?;
        Ok(place)
    }

    /// Places text with a closing NUL.
    pub(crate) fn place_string(&mut self, text: &str) -> Result<u64, BootError> {
        self.place_low(&[text.as_bytes(), b"\0"].concat())
    }

    /// Places the kernel's command line.
    pub(crate) fn place_cmdline(&mut self) -> Result<u64, BootError> {
        self.place_string(self.cmdline)
    }

    /// Takes exactly this range for a part of the kernel, or says why it cannot have it.
    pub(crate) fn claim_for_kernel(
        &mut self,
        what: &'static str,
        range: Range<u64>,
    ) -> Result<(), BootError> {
        if self.placement.claim(&range) {
            return Ok(());
        }
        let name = self.kernel.name().to_string();
        let (start, end) = (range.start, range.end);
        let holds = |entry: &crate::MapEntry| {
            entry.kind == crate::RangeKind::Ram
                && entry.start <= start
                && end <= entry.start.saturating_add(entry.length)
        };
        if self.ram.map.iter().any(holds) && start >= 0x1000 {
            return Err(BootError::Overlap { name, what, start, end });
        }
        let more_ram_helps = start >= FIRMWARE_END && end <= crate::LOW_RAM_END;
        if more_ram_helps && end > self.ram.low_end() {
            return Err(self.too_small(self.kernel, end));
        }
        Err(BootError::NotInRam { name, start, end })
    }
}
