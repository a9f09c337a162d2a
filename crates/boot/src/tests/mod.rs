//! Tests over synthetic images of every format.
mod formats;
mod refusals;

use crate::{BootError, BootRequest, Entry, Image, Module, Platform, load, ram_ranges};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory of this many MiB.
pub(super) fn memory(mib: u64) -> GuestMemoryMmap<()> {
    let ranges: Vec<_> =
        ram_ranges(mib << 20).into_iter().map(|(at, n)| (GuestAddress(at), n as usize)).collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

pub(super) fn image(bytes: &[u8]) -> Image {
    Image::from_bytes("kernel".into(), bytes.to_vec()).unwrap()
}

/// Boots an image in `mib` MiB with one CPU.
pub(super) fn boot(
    memory: &GuestMemoryMmap<()>,
    kernel: &[u8],
    initrd: Option<&Image>,
    modules: &[Module],
    cmdline: &str,
) -> Result<Entry, BootError> {
    let (kernel, platform) = (image(kernel), Platform::default());
    let request =
        BootRequest { kernel: &kernel, initrd, modules, cmdline, vcpus: 1, platform: &platform };
    load(memory, &request)
}

pub(super) fn read(memory: &GuestMemoryMmap<()>, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

pub(super) fn text(memory: &GuestMemoryMmap<()>, at: u64) -> String {
    let bytes = read(memory, at, 256);
    let end = bytes.iter().position(|b| *b == 0).unwrap();
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage of protocol 2.15: 4 setup sectors, 4 KiB of kernel, 1 MiB needed at 2 MiB.
pub(super) fn bzimage(entry64: bool) -> Vec<u8> {
    let mut bytes = vec![0u8; 5 * 512];
    bytes.extend((0..4096u32).map(|i| i as u8));
    put(&mut bytes, 0x1f1, &[4]);
    put(&mut bytes, 0x1f4, &256u32.to_le_bytes());
    put(&mut bytes, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut bytes, 0x202, b"HdrS");
    put(&mut bytes, 0x206, &0x20fu16.to_le_bytes());
    put(&mut bytes, 0x211, &[1]);
    put(&mut bytes, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut bytes, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut bytes, 0x234, &[1]);
    put(&mut bytes, 0x236, &u16::from(entry64).to_le_bytes());
    put(&mut bytes, 0x238, &2047u32.to_le_bytes());
    put(&mut bytes, 0x258, &0x20_0000u64.to_le_bytes());
    put(&mut bytes, 0x260, &0x10_0000u32.to_le_bytes());
    bytes
}

/// An ELF file with one segment of `code` at `at`, 4 KiB of zeros behind it, and notes.
pub(super) fn elf(is64: bool, at: u64, code: &[u8], notes: &[u8]) -> Vec<u8> {
    let (header, entry) = if is64 { (64usize, 56usize) } else { (52, 32) };
    let notes_at = header + 2 * entry;
    let code_at = (notes_at + notes.len()).next_multiple_of(64);
    let word = |value: u64| value.to_le_bytes()[..if is64 { 8 } else { 4 }].to_vec();
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 1 + u8::from(is64), 1, 1];
    bytes.resize(16, 0);
    bytes.extend([2, 0, if is64 { 62 } else { 3 }, 0, 1, 0, 0, 0]);
    for value in [at, header as u64, 0] {
        bytes.extend(word(value));
    }
    bytes.extend([0; 4]);
    for value in [header, entry, 2, 0, 0, 0] {
        bytes.extend((value as u16).to_le_bytes());
    }
    let size = code.len() as u64;
    let segments = [
        (1u32, code_at as u64, at, size, size + 4096),
        (4, notes_at as u64, 0, notes.len() as u64, 0),
    ];
    for (kind, offset, address, in_file, in_memory) in segments {
        bytes.extend(kind.to_le_bytes());
        if is64 {
            bytes.extend([7, 0, 0, 0]);
        }
        for value in [offset, address, address, in_file, in_memory] {
            bytes.extend(word(value));
        }
        if !is64 {
            bytes.extend([7, 0, 0, 0]);
        }
        bytes.extend(word(4));
    }
    assert_eq!(bytes.len(), notes_at);
    bytes.extend(notes);
    bytes.resize(code_at, 0);
    bytes.extend(code);
    bytes
}

/// The note that names a PVH entry point, behind one of another owner.
pub(super) fn pvh_notes(entry: u32) -> Vec<u8> {
    let mut notes = Vec::new();
    for (owner, kind, value) in [(b"GNU\0", 3u32, 7u32), (b"Xen\0", 18, entry)] {
        for word in [4, 4, kind] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(owner);
        notes.extend(value.to_le_bytes());
    }
    notes
}

pub(super) const CODE: [u8; 64] = [0xf4; 64];

/// A multiboot 1 header with these flags and, with flag 16, these words behind it.
pub(super) fn multiboot1(flags: u32, words: &[u32]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    let sum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
    [MAGIC, flags, sum].iter().chain(words).flat_map(|w| w.to_le_bytes()).collect()
}

/// A multiboot 2 header with these tags (type, flags, words), and an end tag.
pub(super) fn multiboot2(tags: &[(u16, u16, &[u32])]) -> Vec<u8> {
    const MAGIC: u32 = 0xe852_50d6;
    let mut body = Vec::new();
    for (kind, flags, words) in tags.iter().chain(&[(0, 0, &[][..])]) {
        body.extend(kind.to_le_bytes());
        body.extend(flags.to_le_bytes());
        body.extend((8 + words.len() as u32 * 4).to_le_bytes());
        body.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        body.resize(body.len().next_multiple_of(8), 0);
    }
    let length = 16 + body.len() as u32;
    let sum = 0u32.wrapping_sub(MAGIC).wrapping_sub(length);
    let mut bytes: Vec<u8> = [MAGIC, 0, length, sum].iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.extend(body);
    bytes
}

/// Code that starts with this header.
pub(super) fn headed(header: &[u8]) -> Vec<u8> {
    [header, &CODE].concat()
}

/// One valid image of every format, by name.
pub(super) fn all_formats() -> Vec<(&'static str, Vec<u8>)> {
    let fixed = [0x10_0000, 0x10_0000, 0, 0x10_2000, 0x10_0020];
    vec![
        ("bzImage, 64-bit", bzimage(true)),
        ("bzImage, 32-bit", bzimage(false)),
        ("ELF64 with PVH", elf(true, 0x10_0000, &CODE, &pvh_notes(0x10_0000))),
        ("ELF32 with PVH", elf(false, 0x10_0000, &CODE, &pvh_notes(0x10_0000))),
        ("multiboot 1, ELF32", elf(false, 0x10_0000, &headed(&multiboot1(3, &[])), &[])),
        ("multiboot 1, ELF64", elf(true, 0x10_0000, &headed(&multiboot1(3, &[])), &[])),
        ("multiboot 1, flat", headed(&multiboot1(1 << 16, &fixed))),
        ("multiboot 2, ELF64", elf(true, 0x10_0000, &headed(&multiboot2(&[(1, 0, &[6])])), &[])),
        ("multiboot 2, flat", headed(&multiboot2(&[(2, 0, &fixed[..4]), (3, 0, &fixed[4..])]))),
    ]
}
