//! SMBIOS tables (DMTF DSP0134 3.6): who made the machine, for `dmidecode` and drivers' quirks.

/// One structure: its type, its body after the header, and its strings.
struct Structure<'a> {
    kind: u8,
    body: Vec<u8>,
    strings: &'a [&'a str],
}

/// Collects structures; handles count from 0 up by type and order.
#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    count: u16,
    largest: u16,
}

impl Table {
    /// Adds a structure (§6.1.2): header, body, strings, each ended by NUL, and one more NUL.
    fn add(&mut self, structure: &Structure<'_>) {
        let start = self.bytes.len();
        self.bytes.push(structure.kind);
        self.bytes.push((structure.body.len() + 4) as u8);
        self.bytes.extend_from_slice(&handle(structure.kind).to_le_bytes());
        self.bytes.extend_from_slice(&structure.body);
        for text in structure.strings {
            self.bytes.extend_from_slice(text.as_bytes());
            self.bytes.push(0);
        }
        if structure.strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.count += 1;
        self.largest = self.largest.max((self.bytes.len() - start) as u16);
    }
}

/// Each type occurs once: its handle.
fn handle(kind: u8) -> u16 {
    u16::from(kind) << 8
}

const MAKER: &str = "Bivisor";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The 2.1 entry point takes 31 bytes, the 3.0 one 24; the structures follow at 64.
const TABLE_OFFSET: u64 = 64;
const ENTRY3_OFFSET: usize = 32;

/// Both entry points and the structures, to lie at `base` (16-byte aligned, below 1 MiB).
pub(crate) fn tables(base: u64, vcpus: u32, memory: u64) -> Vec<u8> {
    let mut table = Table::default();
    for structure in identity().iter().chain(&resources(vcpus, memory)) {
        table.add(structure);
    }
    let address = base + TABLE_OFFSET;
    let mut bytes = entry_2_1(&table, address);
    bytes.resize(ENTRY3_OFFSET, 0);
    bytes.extend(entry_3(&table, address));
    bytes.resize(TABLE_OFFSET as usize, 0);
    bytes.extend(table.bytes);
    bytes
}

fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = crate::acpi::checksum(bytes);
    if let Some(slot) = bytes.get_mut(at) {
        *slot = sum;
    }
}

/// The 32-bit entry point (§5.2.1).
fn entry_2_1(table: &Table, address: u64) -> Vec<u8> {
    let mut intermediate = b"_DMI_\0".to_vec();
    intermediate.extend_from_slice(&(table.bytes.len() as u16).to_le_bytes());
    intermediate.extend_from_slice(&(address as u32).to_le_bytes());
    intermediate.extend_from_slice(&table.count.to_le_bytes());
    intermediate.push(0x28); // revision 2.8
    set_checksum(&mut intermediate, 5);
    let mut entry = b"_SM_\0".to_vec();
    entry.extend_from_slice(&[31, 2, 8]);
    entry.extend_from_slice(&table.largest.to_le_bytes());
    entry.extend_from_slice(&[0; 6]);
    entry.extend(intermediate);
    set_checksum(&mut entry, 4);
    entry
}

/// The 64-bit entry point (§5.2.2).
fn entry_3(table: &Table, address: u64) -> Vec<u8> {
    let mut entry = b"_SM3_\0".to_vec();
    entry.extend_from_slice(&[24, 3, 2, 0, 1, 0]);
    entry.extend_from_slice(&(table.bytes.len() as u32).to_le_bytes());
    entry.extend_from_slice(&address.to_le_bytes());
    set_checksum(&mut entry, 5);
    entry
}

/// Firmware, system and chassis.
fn identity() -> [Structure<'static>; 3] {
    // §7.1: vendor, version, segment, date, ROM size, characteristics (unsupported; virtual
    // machine), releases.
    let mut firmware = vec![1, 2, 0, 0, 3, 0];
    firmware.extend_from_slice(&(1u64 << 3).to_le_bytes());
    firmware.extend_from_slice(&[0, 1 << 4, 0xff, 0xff, 0xff, 0xff]);
    // §7.2: maker, product, version, serial number, UUID (none), wake-up by the power switch.
    let mut system = vec![1, 2, 3, 0];
    system.extend_from_slice(&[0; 16]);
    system.extend_from_slice(&[6, 0, 0]);
    // §7.4: maker, type (other), version, serial, tag, states (safe), security (none).
    let mut chassis = vec![1, 1, 2, 0, 0, 3, 3, 3, 2];
    chassis.extend_from_slice(&[0; 8]);
    [
        Structure { kind: 0, body: firmware, strings: &[MAKER, VERSION, "01/01/2026"] },
        Structure { kind: 1, body: system, strings: &[MAKER, "Virtual machine", VERSION] },
        Structure { kind: 3, body: chassis, strings: &[MAKER, VERSION] },
    ]
}

/// Processors, memory, boot status and the end mark.
fn resources(vcpus: u32, memory: u64) -> [Structure<'static>; 6] {
    let bounded = |value: u64, most: u16| u16::try_from(value).unwrap_or(most).min(most);
    // §7.5: one socket with a core for each vCPU; speeds unknown; caches not described.
    let cores = bounded(vcpus.into(), 0xfffe).to_le_bytes();
    let core8 = vcpus.min(255) as u8;
    let mut processor = vec![1, 3, 1, 2]; // socket, CPU, family "other", maker
    processor.extend_from_slice(&[0; 8]); // CPUID: the operating system asks the CPU
    processor.extend_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 0x41, 1]);
    processor.extend_from_slice(&[0xff; 6]);
    processor.extend_from_slice(&[0, 0, 0, core8, core8, core8, 0x04, 0, 1, 0]);
    for _ in 0..3 {
        processor.extend_from_slice(&cores);
    }
    let kib = memory >> 10;
    let mib = memory >> 20;
    // §7.17: on the board, system memory, no correction, capacity, no error handle, one device.
    let mut array = vec![3, 3, 3];
    array.extend_from_slice(&(kib.min(0x8000_0000) as u32).to_le_bytes());
    array.extend_from_slice(&[0xfe, 0xff, 1, 0]);
    let extended = if kib >= 0x8000_0000 { memory } else { 0 };
    array.extend_from_slice(&extended.to_le_bytes());
    // §7.18: the one device; size in MiB, or in the extended field from 32 GiB - 1 MiB on.
    let mut device = handle(16).to_le_bytes().to_vec();
    device.extend_from_slice(&[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
    device.extend_from_slice(&bounded(mib, 0x7fff).to_le_bytes());
    device.extend_from_slice(&[9, 0, 1, 0, 7, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
    let extended = if mib >= 0x7fff { mib as u32 } else { 0 };
    device.extend_from_slice(&extended.to_le_bytes());
    device.extend_from_slice(&[0; 8]);
    // §7.20: the array's addresses, in KiB up to 4 TiB.
    let mut mapped = 0u32.to_le_bytes().to_vec();
    let last = u32::try_from(kib.saturating_sub(1)).unwrap_or(u32::MAX - 1);
    mapped.extend_from_slice(&last.to_le_bytes());
    mapped.extend_from_slice(&handle(16).to_le_bytes());
    mapped.push(1);
    mapped.extend_from_slice(&[0; 16]);
    [
        Structure { kind: 4, body: processor, strings: &["CPU 0", MAKER, "virtual"] },
        Structure { kind: 16, body: array, strings: &[] },
        Structure { kind: 17, body: device, strings: &["RAM", MAKER] },
        Structure { kind: 19, body: mapped, strings: &[] },
        Structure { kind: 32, body: vec![0; 7], strings: &[] }, // §7.33: no errors
        Structure { kind: 127, body: Vec::new(), strings: &[] },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::checksum;
    use crate::source::{u16_at, u32_at, u64_at};

    /// Type and body length of each structure, walked as an operating system does.
    fn walk(mut rest: &[u8]) -> Vec<(u8, usize)> {
        let mut found = Vec::new();
        while !rest.is_empty() {
            let length = usize::from(rest[1]);
            found.push((rest[0], length));
            let strings = rest[length..].windows(2).position(|w| w == [0, 0]).unwrap();
            rest = &rest[length + strings + 2..];
        }
        found
    }

    #[test]
    fn both_entry_points_lead_to_the_same_whole_table() {
        let bytes = tables(0xf_0000, 4, 512 << 20);
        assert_eq!((checksum(&bytes[..31]), checksum(&bytes[16..31])), (0, 0));
        assert_eq!(checksum(&bytes[32..56]), 0);
        assert!(bytes.starts_with(b"_SM_") && bytes[32..].starts_with(b"_SM3_"));
        assert_eq!(u64::from(u32_at(&bytes, 24)), u64_at(&bytes, 48));
        assert_eq!(u64_at(&bytes, 48), 0xf_0040);
        let length = u32_at(&bytes, 44) as usize;
        assert_eq!(usize::from(u16_at(&bytes, 22)), length);
        assert_eq!(bytes.len(), 64 + length);
        let structures = walk(&bytes[64..]);
        assert_eq!(usize::from(u16_at(&bytes, 28)), structures.len());
        let lengths =
            [(0, 24), (1, 27), (3, 21), (4, 48), (16, 23), (17, 40), (19, 31), (32, 11), (127, 4)];
        assert_eq!(structures, lengths);
    }

    #[test]
    fn sizes_too_large_for_the_old_fields_go_into_the_extended_ones() {
        for memory in [1 << 20, 31 << 30, 33 << 30, 3 << 40, 1 << 50] {
            let bytes = tables(0xf_0000, u32::MAX, memory);
            assert_eq!(walk(&bytes[64..]).len(), 9);
        }
    }
}
