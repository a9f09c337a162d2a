//! Where the devices are, for the firmware tables: the chipset's layout in the words of `boot`.
use boot::{Ecam, Platform};
use chipset::layout::{self, ports};

/// The machine as its ACPI tables describe it.
pub fn platform() -> Platform {
    let last_bus = layout::PCI_BUSES - 1;
    Platform {
        pm_base: ports::PM1A_EVENT,
        sci: layout::SCI_IRQ,
        reset: (ports::RESET_CONTROL, layout::RESET_VALUE),
        hpet: Some(layout::HPET.0),
        ioapic: layout::IOAPIC.0 as u32,
        lapic: layout::LAPIC.0 as u32,
        ecam: Some(Ecam { base: layout::PCI_ECAM.0, first_bus: 0, last_bus }),
        pci_mmio: layout::PCI_MMIO_START.0 as u32..layout::PCI_MMIO_END.0 as u32,
        century: layout::RTC_CENTURY_INDEX,
        com1: true,
        i8042: true,
        ..Platform::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_assume_what_the_chipset_has() {
        let platform = platform();
        // The FADT that `boot` writes has one base for the three blocks.
        assert_eq!(ports::PM1A_CONTROL, platform.pm_base + 4);
        assert_eq!(ports::PM_TIMER, platform.pm_base + 8);
        assert_eq!(u64::from(platform.pci_mmio.start), boot::LOW_RAM_END);
        assert_eq!(platform.ecam.map(|ecam| ecam.length()), Some(layout::PCI_ECAM_LENGTH_PER_BUS));
    }
}
