//! Where the machine's devices are, as the firmware tables state it.
use std::ops::Range;

/// PCI configuration space in memory (PCI Express base specification 5.0 §7.2.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// Address of bus `first_bus`.
    pub base: u64,
    /// First bus decoded.
    pub first_bus: u8,
    /// Last bus decoded.
    pub last_bus: u8,
}

impl Ecam {
    /// Bytes: 1 MiB a bus.
    pub fn length(&self) -> u64 {
        (u64::from(self.last_bus.saturating_sub(self.first_bus)) + 1) << 20
    }
}

/// Addresses and lines that the tables publish. The default is what the chipset has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// First port of the ACPI power-management block: PM1a event at +0, control at +4, timer at +8.
    pub pm_base: u16,
    /// Whether the PM timer counts 32 bits, not 24.
    pub pm_timer_32: bool,
    /// The general-purpose event block's first port and length in bytes, where there is one.
    pub gpe0: Option<(u16, u8)>,
    /// The system control interrupt's GSI (level-triggered, active high).
    pub sci: u8,
    /// The fixed reset register's port and value.
    pub reset: (u16, u8),
    /// The HPET's registers, where there is one.
    pub hpet: Option<u64>,
    /// The I/O APIC's registers.
    pub ioapic: u32,
    /// The local APICs' registers.
    pub lapic: u32,
    /// PCI configuration space in memory, where there is one.
    pub ecam: Option<Ecam>,
    /// The window for PCI devices' memory below 4 GiB.
    pub pci_mmio: Range<u32>,
    /// The window for PCI devices' memory above 4 GiB, where there is one.
    pub pci_mmio64: Option<Range<u64>>,
    /// The GSIs that INTA to INTD of PCI slot 0 are wired to; slot `n`'s pins are rotated by `n`.
    pub pci_gsi: [u32; 4],
    /// The CMOS register that holds the century.
    pub century: u8,
    /// Whether there is a 16550 at 3F8H, line 4.
    pub com1: bool,
    /// Whether there is an 8042 keyboard controller.
    pub i8042: bool,
}

impl Default for Platform {
    fn default() -> Self {
        Self {
            pm_base: 0x600,
            pm_timer_32: true,
            gpe0: Some((0x620, 4)),
            sci: 9,
            reset: (0xcf9, 6),
            hpet: Some(0xfed0_0000),
            ioapic: 0xfec0_0000,
            lapic: 0xfee0_0000,
            ecam: Some(Ecam { base: 0xe000_0000, first_bus: 0, last_bus: 255 }),
            pci_mmio: 0xc000_0000..0xe000_0000,
            pci_mmio64: None,
            pci_gsi: [16, 17, 18, 19],
            century: 0x32,
            com1: true,
            i8042: true,
        }
    }
}
