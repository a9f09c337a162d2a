//! The Differentiated System Description Table: what an operating system cannot probe.
use super::{OEM, OEM_TABLE, SLEEP_TYPE_OFF};
use crate::platform::Platform;
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, PackageBuilder, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

pub(super) fn dsdt(platform: &Platform) -> Sdt {
    let mut aml = Vec::new();
    // \_S5: the sleep types for PM1a and PM1b control (ACPI 6.5 §7.4.2.6).
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &SLEEP_TYPE_OFF, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &off).to_aml_bytes(&mut aml);

    let mut devices = pci_root(platform);
    if let Some(ecam) = &platform.ecam {
        // Kernels use the ECAM only where a system device reserves it (PCI firmware specification
        // 3.3 §4.1.2); its size fits 32 bits: it lies below 4 GiB.
        let range = Memory32Fixed::new(true, ecam.base as u32, ecam.length() as u32);
        devices.extend(device("MRES", "PNP0C02", &[&range]));
    }
    if let Some(base) = platform.hpet {
        let range = Memory32Fixed::new(true, base as u32, 0x400);
        devices.extend(device("HPET", "PNP0103", &[&range]));
    }
    let line = |number| Interrupt::new(true, true, false, false, number);
    devices.extend(device("RTC_", "PNP0B00", &[&IO::new(0x70, 0x70, 0, 2), &line(8)]));
    if platform.com1 {
        devices.extend(device("COM1", "PNP0501", &[&IO::new(0x3f8, 0x3f8, 0, 8), &line(4)]));
    }
    if platform.i8042 {
        let (data, command) = (IO::new(0x60, 0x60, 0, 1), IO::new(0x64, 0x64, 0, 1));
        devices.extend(device("KBD_", "PNP0303", &[&data, &command, &line(1)]));
    }
    aml.extend(Scope::raw("\\_SB_".into(), devices));

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, 1);
    table.append_slice(&aml);
    table
}

/// A device with fixed resources.
fn device(name: &str, id: &str, resources: &[&dyn Aml]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let hid = Name::new("_HID".into(), &EISAName::new(id));
    let uid = Name::new("_UID".into(), &ZERO);
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec()));
    Device::new(name.into(), vec![&hid, &uid, &crs]).to_aml_bytes(&mut bytes);
    bytes
}

/// The PCI host bridge (PCI firmware specification 3.3 §4.1 to §4.3).
fn pci_root(platform: &Platform) -> Vec<u8> {
    let express = EISAName::new("PNP0A08");
    let conventional = EISAName::new("PNP0A03");
    let hid = if platform.ecam.is_some() { &express } else { &conventional };
    let hid = Name::new("_HID".into(), hid);
    let cid = Name::new("_CID".into(), &conventional);
    let uid = Name::new("_UID".into(), &ZERO);
    let segment = Name::new("_SEG".into(), &ZERO);
    let bus = Name::new("_BBN".into(), &ZERO);

    let last_bus = platform.ecam.as_ref().map_or(255, |ecam| ecam.last_bus);
    let buses = AddressSpace::new_bus_number(0u16, last_bus.into());
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let low_ports = AddressSpace::new_io(0u16, 0xcf7, None);
    let high_ports = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let kind = AddressSpaceCacheable::NotCacheable;
    let mmio = &platform.pci_mmio;
    let window = AddressSpace::new_memory(kind, true, mmio.start, mmio.end.saturating_sub(1), None);
    let high_window = platform.pci_mmio64.as_ref().map(|mmio| {
        AddressSpace::new_memory(kind, true, mmio.start, mmio.end.saturating_sub(1), None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config, &low_ports, &high_ports, &window];
    if let Some(window) = &high_window {
        resources.push(window);
    }
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let prt = Name::new("_PRT".into(), &interrupt_routes(platform));

    let mut bytes = Vec::new();
    Device::new("PCI0".into(), vec![&hid, &cid, &uid, &segment, &bus, &crs, &prt])
        .to_aml_bytes(&mut bytes);
    bytes
}

/// `_PRT` (ACPI 6.5 §6.2.13): which GSI each pin of each slot is wired to.
fn interrupt_routes(platform: &Platform) -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for slot in 0..32u32 {
        for (pin, gsi) in (0u8..4).zip(platform.pci_gsi.iter().cycle().skip(slot as usize % 4)) {
            let address = slot << 16 | 0xffff;
            routes.add_element(&Package::new(vec![&address, &pin, &ZERO, gsi]));
        }
    }
    routes
}
