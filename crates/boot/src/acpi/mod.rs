//! The ACPI tables (ACPI specification 6.5), in one piece for the BIOS area.
mod dsdt;
#[cfg(test)]
mod tests;

use crate::error::BootError;
use crate::platform::Platform;
use acpi_tables::sdt::{GenericAddress, Sdt};
use std::ops::Range;

/// Bytes of the root pointer, at the start of the tables (§5.2.5.3).
pub(crate) const RSDP_SIZE: usize = 36;
const OEM: [u8; 6] = *b"BIVISR";
const OEM_TABLE: [u8; 8] = *b"BIVISOR ";
/// Sleep type of the soft-off state in PM1 control and `\_S5`.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;

/// The tables as they lie in memory, the root pointer first.
#[derive(Debug)]
pub(crate) struct Tables {
    pub bytes: Vec<u8>,
}

impl Tables {
    /// Adds a table from a 64-byte boundary on (FACS needs that, others like it); its address.
    fn add(&mut self, area: &Range<u64>, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = area.start + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

/// Makes all tables, for `area`.
pub(crate) fn tables(
    area: Range<u64>,
    vcpus: u32,
    platform: &Platform,
) -> Result<Tables, BootError> {
    // The MADT alone grows with the CPUs: refuse absurd numbers before building it.
    let limit = max_vcpus(&area);
    if vcpus > limit {
        return Err(BootError::TooManyCpus { vcpus, limit });
    }
    let mut tables = Tables { bytes: vec![0; RSDP_SIZE] };
    let facs = tables.add(&area, &facs());
    let dsdt = tables.add(&area, &sealed(dsdt::dsdt(platform)));
    let fadt = tables.add(&area, &sealed(fadt(platform, facs, dsdt)));
    let mut listed = vec![fadt, tables.add(&area, &sealed(madt(platform, vcpus)))];
    if let Some(base) = platform.hpet {
        listed.push(tables.add(&area, &sealed(hpet(base))));
    }
    if let Some(mcfg) = mcfg(platform) {
        listed.push(tables.add(&area, &sealed(mcfg)));
    }
    let mut rsdt = table(b"RSDT", 1);
    let mut xsdt = table(b"XSDT", 1);
    for address in listed {
        rsdt.append_slice(&(address as u32).to_le_bytes());
        xsdt.append_slice(&address.to_le_bytes());
    }
    let rsdt = tables.add(&area, &sealed(rsdt));
    let xsdt = tables.add(&area, &sealed(xsdt));
    let rsdp = rsdp(rsdt, xsdt);
    if let Some(start) = tables.bytes.get_mut(..RSDP_SIZE) {
        start.copy_from_slice(&rsdp);
    }
    Ok(tables)
}

/// How many CPUs the area has room for: what is left beside the other tables, at 16 bytes each.
fn max_vcpus(area: &Range<u64>) -> u32 {
    const OTHERS: u64 = 0x4000;
    (area.end.saturating_sub(area.start).saturating_sub(OTHERS) / 16) as u32
}

fn table(signature: &[u8; 4], revision: u8) -> Sdt {
    Sdt::new(*signature, 36, revision, OEM, OEM_TABLE, 1)
}

fn sealed(mut table: Sdt) -> Vec<u8> {
    table.update_checksum();
    table.as_slice().to_vec()
}

/// The byte that makes the sum of all bytes zero.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// Root System Description Pointer (§5.2.5.3): the first 20 bytes have a checksum of their own.
fn rsdp(rsdt: u64, xsdt: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RSDP_SIZE);
    bytes.extend_from_slice(b"RSD PTR \0");
    bytes.extend_from_slice(&OEM);
    bytes.push(2);
    bytes.extend_from_slice(&(rsdt as u32).to_le_bytes());
    let first = checksum(&bytes);
    if let Some(slot) = bytes.get_mut(8) {
        *slot = first;
    }
    bytes.extend_from_slice(&(RSDP_SIZE as u32).to_le_bytes());
    bytes.extend_from_slice(&xsdt.to_le_bytes());
    let whole = checksum(&bytes);
    bytes.extend_from_slice(&[whole, 0, 0, 0]);
    bytes
}

/// Firmware ACPI Control Structure (§5.2.10).
fn facs() -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..4].copy_from_slice(b"FACS");
    bytes[4] = 64;
    bytes[32] = 2; // version
    bytes
}

/// Fixed ACPI Description Table (§5.2.9).
fn fadt(platform: &Platform, facs: u64, dsdt: u64) -> Sdt {
    let mut fadt = Sdt::new(*b"FACP", 276, 6, OEM, OEM_TABLE, 1);
    fadt.write_u32(36, facs as u32);
    fadt.write_u32(40, dsdt as u32);
    fadt.write_u8(45, 4); // preferred profile: enterprise server
    fadt.write_u16(46, platform.sci.into());
    // No SMI command port: the machine is in ACPI mode from the start (§5.2.9, SMI_CMD).
    let (event, control, timer) = (platform.pm_base, platform.pm_base + 4, platform.pm_base + 8);
    fadt.write_u32(56, event.into());
    fadt.write_u32(64, control.into());
    fadt.write_u32(76, timer.into());
    fadt.write_u8(88, 4); // PM1_EVT_LEN
    fadt.write_u8(89, 2); // PM1_CNT_LEN
    fadt.write_u8(91, 4); // PM_TMR_LEN
    fadt.write_u16(96, 101); // C2 not supported
    fadt.write_u16(98, 1001); // C3 not supported
    fadt.write_u8(108, platform.century);
    // IA-PC boot architecture (§5.2.9.3): ISA devices, 8042, no VGA.
    let i8042 = u16::from(platform.i8042) << 1;
    fadt.write_u16(109, 1 | i8042 | 1 << 2);
    // Flags (table 5.10): WBINVD works, C1 on all processors, no sleep button in the fixed
    // registers, no RTC wake in them, PM timer of 32 bits, reset register. The power button is a
    // fixed one.
    let timer_32 = u32::from(platform.pm_timer_32) << 8;
    fadt.write_u32(112, 1 | 1 << 2 | 1 << 5 | 1 << 6 | timer_32 | 1 << 10);
    let (reset_port, reset_value) = platform.reset;
    fadt.write(116, GenericAddress::io_port_address::<u8>(reset_port));
    fadt.write_u8(128, reset_value);
    fadt.write_u8(131, 5); // minor version
    fadt.write_u64(140, dsdt);
    fadt.write(148, GenericAddress::io_port_address::<u32>(event));
    fadt.write(172, GenericAddress::io_port_address::<u16>(control));
    fadt.write(208, GenericAddress::io_port_address::<u32>(timer));
    if let Some((port, length)) = platform.gpe0 {
        fadt.write_u32(80, port.into());
        fadt.write_u8(92, length);
        fadt.write(220, gpe_block(port, length));
    }
    fadt.write_bytes(268, b"Bivisor\0");
    fadt
}

/// The extended address of an event block of `length` bytes, accessed by bytes (§5.2.3.2).
fn gpe_block(port: u16, length: u8) -> GenericAddress {
    GenericAddress {
        register_bit_width: length.saturating_mul(8),
        ..GenericAddress::io_port_address::<u8>(port)
    }
}

/// Multiple APIC Description Table (§5.2.12).
fn madt(platform: &Platform, vcpus: u32) -> Sdt {
    const ENABLED: u32 = 1;
    let mut body = Vec::new();
    body.extend_from_slice(&platform.lapic.to_le_bytes());
    body.extend_from_slice(&1u32.to_le_bytes()); // PCAT_COMPAT: there are 8259s too
    for id in 0..vcpus {
        // An xAPIC id has 8 bits, of which 255 means all (§5.2.12.12).
        match u8::try_from(id) {
            Ok(id) if id < 255 => {
                body.extend_from_slice(&[0, 8, id, id]);
                body.extend_from_slice(&ENABLED.to_le_bytes());
            }
            _ => {
                body.extend_from_slice(&[9, 16, 0, 0]);
                for word in [id, ENABLED, id] {
                    body.extend_from_slice(&word.to_le_bytes());
                }
            }
        }
    }
    body.extend_from_slice(&[1, 12, 0, 0]); // I/O APIC 0, its lines from GSI 0 on
    body.extend_from_slice(&platform.ioapic.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // The PIT's line is GSI 2; the SCI is level-triggered, active high.
    const LEVEL_HIGH: u16 = 0b1101;
    for (line, gsi, flags) in [(0, 2u32, 0u16), (platform.sci, platform.sci.into(), LEVEL_HIGH)] {
        body.extend_from_slice(&[2, 10, 0, line]);
        body.extend_from_slice(&gsi.to_le_bytes());
        body.extend_from_slice(&flags.to_le_bytes());
    }
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]); // NMI on LINT1 of all processors
    if vcpus > 255 {
        body.extend_from_slice(&[10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    let mut madt = table(b"APIC", 5);
    madt.append_slice(&body);
    madt
}

/// HPET description (IA-PC HPET specification 1.0a §3.2.4).
fn hpet(base: u64) -> Sdt {
    let mut hpet = table(b"HPET", 1);
    // Intel's block: three comparators, 64-bit counter, legacy replacement, revision 1.
    hpet.append_slice(&0x8086_a201u32.to_le_bytes());
    hpet.append_slice(&[0, 64, 0, 0]); // in memory, 64 bits wide
    hpet.append_slice(&base.to_le_bytes());
    hpet.append_slice(&[0]); // HPET number
    hpet.append_slice(&100u16.to_le_bytes()); // least ticks in periodic mode
    hpet.append_slice(&[0]); // no page protection
    hpet
}

/// PCI Express memory-mapped configuration space (PCI firmware specification 3.3 §4.1.2).
fn mcfg(platform: &Platform) -> Option<Sdt> {
    let ecam = platform.ecam.as_ref()?;
    let mut mcfg = table(b"MCFG", 1);
    mcfg.append_slice(&[0; 8]);
    mcfg.append_slice(&ecam.base.to_le_bytes());
    mcfg.append_slice(&[0, 0, ecam.first_bus, ecam.last_bus, 0, 0, 0, 0]);
    Some(mcfg)
}
