use super::*;
use crate::source::{u32_at, u64_at};

const AREA: Range<u64> = 0xe_0000..0xf_0000;

fn build(vcpus: u32) -> Vec<u8> {
    tables(AREA, vcpus, &Platform::default()).unwrap().bytes
}

/// The table at a guest address, its length taken from its header and its checksum verified.
fn table_at(bytes: &[u8], address: u64) -> &[u8] {
    let start = (address - AREA.start) as usize;
    let table = &bytes[start..start + u32_at(bytes, start + 4) as usize];
    if !table.starts_with(b"FACS") {
        assert_eq!(checksum(table), 0, "{:?}", std::str::from_utf8(&table[..4]));
    }
    table
}

fn listed(bytes: &[u8]) -> Vec<&[u8]> {
    let xsdt = table_at(bytes, u64_at(bytes, 24));
    (36..xsdt.len()).step_by(8).map(|at| table_at(bytes, u64_at(xsdt, at))).collect()
}

fn find<'a>(bytes: &'a [u8], signature: &[u8]) -> &'a [u8] {
    listed(bytes).into_iter().find(|t| t.starts_with(signature)).unwrap()
}

#[test]
fn every_table_is_reached_from_the_root_pointer_with_a_right_checksum() {
    let bytes = build(2);
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!((checksum(&bytes[..20]), checksum(&bytes[..36])), (0, 0));
    let names: Vec<_> = listed(&bytes).iter().map(|t| t[..4].to_vec()).collect();
    assert_eq!(names, [b"FACP", b"APIC", b"HPET", b"MCFG"]);
    let rsdt = table_at(&bytes, u32_at(&bytes, 16).into());
    let xsdt = table_at(&bytes, u64_at(&bytes, 24));
    let narrow: Vec<_> =
        (36..rsdt.len()).step_by(4).map(|at| u64::from(u32_at(rsdt, at))).collect();
    let wide: Vec<_> = (36..xsdt.len()).step_by(8).map(|at| u64_at(xsdt, at)).collect();
    assert_eq!(narrow, wide);
}

#[test]
fn the_fixed_table_names_the_power_registers_and_the_other_tables() {
    let bytes = build(1);
    let fadt = find(&bytes, b"FACP");
    assert_eq!(fadt.len(), 276);
    assert_eq!((u32_at(fadt, 56), u32_at(fadt, 64), u32_at(fadt, 76)), (0x600, 0x604, 0x608));
    assert!(table_at(&bytes, u32_at(fadt, 40).into()).starts_with(b"DSDT"));
    assert_eq!((u32_at(fadt, 80), fadt[92]), (0x620, 4));
    let facs = u64::from(u32_at(fadt, 36));
    assert!(table_at(&bytes, facs).starts_with(b"FACS"));
    assert_eq!(facs % 64, 0);
    assert_eq!((fadt[46], fadt[108]), (9, 0x32));
    assert_eq!((u64_at(fadt, 120), fadt[128]), (0xcf9, 6));
}

/// The type and bytes of each entry of the interrupt controller table.
fn controllers(madt: &[u8]) -> Vec<&[u8]> {
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, after) = rest.split_at(rest[1].into());
        entries.push(entry);
        rest = after;
    }
    entries
}

#[test]
fn processors_from_255_on_are_listed_as_x2apics() {
    let bytes = build(258);
    let entries = controllers(find(&bytes, b"APIC"));
    let count = |kind| entries.iter().filter(|e| e[0] == kind).count();
    assert_eq!((count(0), count(9), count(1), count(10)), (255, 3, 1, 1));
    let x2: Vec<_> = entries.iter().filter(|e| e[0] == 9).map(|e| u32_at(e, 4)).collect();
    assert_eq!(x2, [255, 256, 257]);
}

#[test]
fn the_timer_is_overridden_to_line_2_and_the_sci_is_level_triggered() {
    let bytes = build(1);
    let overrides: Vec<_> = controllers(find(&bytes, b"APIC"))
        .into_iter()
        .filter(|e| e[0] == 2)
        .map(|e| (e[3], u32_at(e, 4), e[8]))
        .collect();
    assert_eq!(overrides, [(0, 2, 0), (9, 9, 0b1101)]);
}

#[test]
fn what_the_platform_has_not_is_not_announced() {
    let platform =
        Platform { hpet: None, ecam: None, com1: false, i8042: false, ..Platform::default() };
    let bytes = tables(AREA, 1, &platform).unwrap().bytes;
    let names: Vec<_> = listed(&bytes).iter().map(|t| t[..4].to_vec()).collect();
    assert_eq!(names, [b"FACP", b"APIC"]);
    let dsdt = table_at(&bytes, u32_at(find(&bytes, b"FACP"), 40).into());
    let has = |name: &[u8]| dsdt.windows(4).any(|w| w == name);
    assert!(has(b"_S5_") && has(b"PCI0") && has(b"RTC_"));
    assert!(!has(b"COM1") && !has(b"KBD_") && !has(b"MRES") && !has(b"HPET"));
}

#[test]
fn the_largest_number_of_processors_fits_and_one_more_is_refused() {
    let limit = max_vcpus(&AREA);
    assert!(limit >= 1024);
    assert!(build(limit).len() as u64 <= AREA.end - AREA.start);
    let error = tables(AREA, limit + 1, &Platform::default()).unwrap_err();
    assert!(error.to_string().starts_with("--cpus:"), "{error}");
}

#[test]
fn soft_off_is_sleep_type_five_in_the_form_that_simple_kernels_scan_for() {
    let bytes = build(1);
    let dsdt = table_at(&bytes, u32_at(find(&bytes, b"FACP"), 40).into());
    let at = dsdt.windows(4).position(|w| w == b"_S5_").unwrap();
    assert_eq!(dsdt[at - 1], 0x08, "NameOp");
    assert_eq!((dsdt[at + 4], dsdt[at + 6]), (0x12, 4), "a package of four");
    assert_eq!(dsdt[at + 7..at + 9], [0x0a, SLEEP_TYPE_OFF]);
}
