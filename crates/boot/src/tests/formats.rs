//! What a guest finds when it starts, by format.
use super::*;
use crate::source::{u16_at, u32_at, u64_at};
use crate::{KernelKind, application_processor, detect, initrd};
use arch::registers::{cr0, efer, gpr};
use arch::{MpState, SegmentName};

#[test]
fn each_format_is_told_by_its_headers() {
    let kinds = [
        KernelKind::Linux64,
        KernelKind::Linux32,
        KernelKind::Pvh,
        KernelKind::Pvh,
        KernelKind::Multiboot1,
        KernelKind::Multiboot1,
        KernelKind::Multiboot1,
        KernelKind::Multiboot2,
        KernelKind::Multiboot2,
    ];
    for ((name, bytes), kind) in all_formats().into_iter().zip(kinds) {
        assert_eq!(detect(&image(&bytes)).unwrap(), kind, "{name}");
        let entry = boot(&memory(16), &bytes, None, &[], "").unwrap();
        assert_eq!(entry.kind, kind, "{name}");
    }
}

#[test]
fn a_64_bit_linux_starts_in_long_mode_with_itself_mapped() {
    let ram = memory(64);
    let initrd = Image::from_bytes("initrd".into(), initrd::tests::archive()).unwrap();
    let state = boot(&ram, &bzimage(true), Some(&initrd), &[], "console=ttyS0").unwrap().state;
    assert_eq!(state.rip, 0x20_0200);
    assert_eq!(state.efer, efer::LME | efer::LMA);
    assert_eq!(state.cr0 & (cr0::PE | cr0::PG), cr0::PE | cr0::PG);
    let code = state.segments[SegmentName::Cs];
    assert!(code.selector == 0x10 && code.long() && !code.db());
    assert_eq!(read(&ram, 0x20_0000, 4096), bzimage(true)[2560..]);
    // 3 GiB + 5 MiB, walked as the CPU does.
    let entry = |table: u64, index: u64| {
        let entry = u64_at(&read(&ram, table + index * 8, 8), 0);
        assert_eq!(entry & 1, 1);
        entry & !0xfff
    };
    assert_eq!(entry(entry(entry(state.cr3, 0), 3), 2), 0xc040_0000);

    let page = read(&ram, state.gpr[gpr::RSI], 4096);
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(page[0x210], 0xff);
    assert_eq!(text(&ram, u32_at(&page, 0x228).into()), "console=ttyS0");
    let (at, size) = (u32_at(&page, 0x218), u32_at(&page, 0x21c));
    assert_eq!(u64::from(size), initrd.length());
    assert_eq!(at, (64 << 20) - 4096, "as high as it goes");
    assert_eq!(read(&ram, at.into(), size as usize), initrd::tests::archive());
    assert_eq!(read(&ram, u64_at(&page, 0x70), 8), b"RSD PTR ");
    let last = 0x2d0 + 20 * (usize::from(page[0x1e8]) - 1);
    assert_eq!(u64_at(&page, last), 0xe000_0000, "the map ends with the ECAM");
}

#[test]
fn a_32_bit_linux_starts_in_protected_mode() {
    let state = boot(&memory(16), &bzimage(false), None, &[], "").unwrap().state;
    assert_eq!((state.rip, state.cr0 & cr0::PG, state.efer), (0x20_0000, 0, 0));
    assert!(state.segments[SegmentName::Cs].db());
    assert_eq!(state.gpr[gpr::RBX], 0);
}

#[test]
fn a_relocatable_linux_moves_when_its_preferred_place_is_not_ram() {
    let mut bytes = bzimage(true);
    put(&mut bytes, 0x258, &0x4000_0000u64.to_le_bytes());
    let state = boot(&memory(16), &bytes, None, &[], "").unwrap().state;
    assert_eq!(state.rip, 0x20_0200);
    put(&mut bytes, 0x234, &[0]);
    let error = boot(&memory(16), &bytes, None, &[], "").unwrap_err().to_string();
    assert_eq!(
        error,
        "kernel: needs at least 1025MiB of memory, but the machine has 16MiB; raise --memory"
    );
}

#[test]
fn an_initrd_stays_below_the_kernels_limit() {
    let mut bytes = bzimage(true);
    put(&mut bytes, 0x22c, &0x7f_ffffu32.to_le_bytes());
    let initrd = Image::from_bytes("initrd".into(), initrd::tests::archive()).unwrap();
    let ram = memory(64);
    let state = boot(&ram, &bytes, Some(&initrd), &[], "").unwrap().state;
    let page = read(&ram, state.gpr[gpr::RSI], 4096);
    assert_eq!(u32_at(&page, 0x218), 0x7f_f000);
}

fn modules() -> Vec<Module> {
    ["first a b", "second"]
        .map(|name| Module {
            image: Image::from_bytes(name.into(), name.as_bytes().to_vec()).unwrap(),
            arguments: name.into(),
        })
        .into()
}

#[test]
fn a_pvh_kernel_gets_start_info_with_modules_and_map() {
    let ram = memory(32);
    let kernel = elf(true, 0x10_0000, &CODE, &pvh_notes(0x10_0010));
    let state = boot(&ram, &kernel, None, &modules(), "hi").unwrap().state;
    assert_eq!((state.rip, state.cr0), (0x10_0010, cr0::PE | cr0::ET));
    let info = read(&ram, state.gpr[gpr::RBX], 56);
    assert_eq!((u32_at(&info, 0), u32_at(&info, 4), u32_at(&info, 12)), (0x336e_c578, 1, 2));
    assert_eq!(text(&ram, u64_at(&info, 24)), "hi");
    assert_eq!(read(&ram, u64_at(&info, 32), 8), b"RSD PTR ");
    let list = read(&ram, u64_at(&info, 16), 64);
    assert_eq!(read(&ram, u64_at(&list, 32), 6), b"second");
    assert_eq!(u64_at(&list, 40), 6);
    assert_eq!(text(&ram, u64_at(&list, 16)), "first a b");
    assert_eq!(u32_at(&info, 48), 5);
    let map = read(&ram, u64_at(&info, 40), 24);
    assert_eq!((u64_at(&map, 0), u64_at(&map, 8), u32_at(&map, 16)), (0, 0x9_fc00, 1));
}

#[test]
fn a_multiboot_1_kernel_gets_its_information() {
    let ram = memory(32);
    let kernel = elf(false, 0x10_0000, &headed(&multiboot1(3, &[])), &[]);
    let state = boot(&ram, &kernel, None, &modules(), "hi").unwrap().state;
    assert_eq!(state.gpr[gpr::RAX], 0x2bad_b002);
    let info = read(&ram, state.gpr[gpr::RBX], 116);
    assert_eq!(u32_at(&info, 0), 0b10_0100_1101);
    assert_eq!((u32_at(&info, 4), u32_at(&info, 8)), (639, 31 << 10));
    assert_eq!(text(&ram, u32_at(&info, 16).into()), "hi");
    assert_eq!(u32_at(&info, 20), 2);
    let list = read(&ram, u32_at(&info, 24).into(), 32);
    let (start, end) = (u32_at(&list, 16), u32_at(&list, 20));
    assert_eq!((start % 4096, end - start), (0, 6));
    assert_eq!(read(&ram, start.into(), 6), b"second");
    assert_eq!(text(&ram, u32_at(&list, 8).into()), "first a b");
    assert_eq!(u32_at(&info, 44), 24 * 5);
}

#[test]
fn a_flat_multiboot_image_is_loaded_where_its_header_says() {
    let ram = memory(16);
    ram.write_slice(&[7; 64], GuestAddress(0x10_1000)).unwrap();
    let (_, kernel) = all_formats().into_iter().find(|(n, _)| *n == "multiboot 1, flat").unwrap();
    let state = boot(&ram, &kernel, None, &[], "").unwrap().state;
    assert_eq!(state.rip, 0x10_0020);
    assert_eq!(read(&ram, 0x10_0000, kernel.len()), kernel);
    assert_eq!(read(&ram, 0x10_1000, 64), [0; 64], "memory behind the file is zeroed");
}

/// The tags of multiboot 2 boot information: type and content.
fn tags(info: &[u8]) -> Vec<(u32, &[u8])> {
    let mut at = 8;
    let mut found = Vec::new();
    while at < info.len() {
        let size = u32_at(info, at + 4) as usize;
        found.push((u32_at(info, at), &info[at + 8..at + size]));
        at = (at + size).next_multiple_of(8);
    }
    found
}

#[test]
fn a_multiboot_2_kernel_gets_its_tags() {
    let ram = memory(32);
    let kernel = elf(true, 0x10_0000, &headed(&multiboot2(&[(5, 1, &[0; 3])])), &[]);
    let state = boot(&ram, &kernel, None, &modules(), "hi").unwrap().state;
    assert_eq!(state.gpr[gpr::RAX], 0x36d7_6289);
    let at = state.gpr[gpr::RBX];
    let size = u32_at(&read(&ram, at, 4), 0) as usize;
    let info = read(&ram, at, size);
    let tags = tags(&info);
    let kinds: Vec<_> = tags.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [1, 2, 3, 3, 4, 6, 14, 15, 21, 0]);
    assert_eq!(tags[0].1, b"hi\0");
    assert_eq!(&tags[3].1[8..], b"second\0");
    assert_eq!(read(&ram, u32_at(tags[3].1, 0).into(), 6), b"second");
    assert_eq!(tags[7].1.len(), 36);
    assert_eq!(u64_at(tags[5].1, 8 + 24), 0x9_fc00);
}

#[test]
fn multiboot_2_hands_over_the_sections_with_symbols_loaded() {
    let mut kernel = elf(true, 0x10_0000, &headed(&multiboot2(&[])), &[]);
    let symbols = kernel.len() as u64;
    kernel.extend(b"symbols!");
    put(&mut kernel, 40, &(symbols + 8).to_le_bytes());
    put(&mut kernel, 58, &[64, 0, 2, 0, 1, 0]);
    kernel.extend([0; 64]);
    let mut section = [0u8; 64];
    put(&mut section, 4, &[2]);
    put(&mut section, 24, &symbols.to_le_bytes());
    put(&mut section, 32, &[8]);
    kernel.extend(section);
    let ram = memory(32);
    let state = boot(&ram, &kernel, None, &[], "").unwrap().state;
    let at = state.gpr[gpr::RBX];
    let info = read(&ram, at, u32_at(&read(&ram, at, 4), 0) as usize);
    let (_, sections) = tags(&info).into_iter().find(|(kind, _)| *kind == 9).unwrap();
    assert_eq!((u32_at(sections, 0), u32_at(sections, 4), u32_at(sections, 8)), (2, 64, 1));
    assert_eq!(read(&ram, u64_at(sections, 12 + 64 + 16), 8), b"symbols!");
}

#[test]
fn the_bios_data_area_and_smbios_are_there_for_kernels_that_look() {
    let ram = memory(16);
    boot(&ram, &bzimage(true), None, &[], "").unwrap();
    assert_eq!(u16_at(&read(&ram, 0x400, 2), 0), 0x3f8);
    assert_eq!(u16_at(&read(&ram, 0x40e, 2), 0), 0x9fc0);
    assert_eq!(read(&ram, 0xf_0000, 4), b"_SM_");
    assert_eq!(read(&ram, 0xf_0020, 5), b"_SM3_");
}

#[test]
fn application_processors_wait_and_have_the_boot_processors_memory_types() {
    let other = application_processor(3);
    let first = boot(&memory(16), &bzimage(true), None, &[], "").unwrap().state;
    assert_eq!(other.mp, MpState::WaitForSipi);
    assert_eq!(other.msrs, first.msrs);
    assert_eq!((other.lapic.registers[2], first.lapic.registers[2]), (3 << 24, 0));
}
