//! VHD against QEMU's tools, random use, crashes and hostile images.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/formats.rs"]
mod formats;
#[path = "support/recording.rs"]
mod recording;
mod support;

use disk::vhd::{Variant, Vhd};
use disk::{Disk, DiskError, FileOptions};
use recording::{Format, Memory};
use std::fs;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn open(memory: Arc<Memory>) -> Result<Box<dyn Disk>, DiskError> {
    Ok(Box::new(Vhd::open(memory)?))
}

fn create(memory: Arc<Memory>) -> Box<dyn Disk> {
    Box::new(Vhd::create_in(memory, 9 * MIB, Variant::Dynamic).unwrap())
}

#[test]
fn images_of_qemu_read_as_qemu_reads_them() {
    let folder = support::folder();
    for options in [
        "subformat=dynamic,force_size=on",
        "subformat=dynamic,force_size=off",
        "subformat=fixed,force_size=on",
        "subformat=fixed,force_size=off",
    ] {
        let path = folder.path().join(options);
        let asked = 11 * MIB + 512 * 3;
        support::qemu(
            "qemu-img",
            ["create", "-f", "vpc", "-o", options, path.to_str().unwrap(), &asked.to_string()],
        );
        let size = formats::size_in_qemu(&path, "vpc");
        formats::have_qemu_write(&path, "vpc", size, 14, 3);
        let disk = Vhd::open(formats::file(&path, FileOptions::read())).unwrap();
        assert_eq!(disk.size(), size, "{options}");
        assert!(formats::read_all(&disk) == formats::as_qemu_reads(&path, "vpc"), "{options}");
    }
}

#[test]
fn sizes_are_those_that_qemu_says_by_geometry_or_exactly() {
    let folder = support::folder();
    for size in [512, 68 * 512, 504 * MIB + 512, 3 * GIB - 512, 130 * GIB, 2040 * GIB] {
        for force in ["on", "off"] {
            let path = folder.path().join(format!("{size}-{force}"));
            let options = format!("force_size={force}");
            let (name, asked) = (path.to_str().unwrap(), size.to_string());
            support::qemu("qemu-img", ["create", "-f", "vpc", "-o", &options, name, &asked]);
            let disk = Vhd::open(formats::file(&path, FileOptions::read())).unwrap();
            assert_eq!(disk.size(), formats::size_in_qemu(&path, "vpc"), "{size} {force}");
        }
        let path = folder.path().join(format!("{size}-own"));
        drop(Vhd::create(&path, size, Variant::Dynamic, FileOptions::write()).unwrap());
        assert_eq!(formats::size_in_qemu(&path, "vpc"), size);
    }
}

#[test]
fn images_written_here_hold_for_qemu_what_was_written() {
    let folder = support::folder();
    for variant in [Variant::Dynamic, Variant::Fixed] {
        let path = folder.path().join(format!("{variant:?}.vhd"));
        let size = 23 * MIB + 512;
        let mut model = vec![0; size as usize];
        let disk = Vhd::create(&path, size, variant, FileOptions::write()).unwrap();
        assert_eq!(disk.variant(), variant);
        formats::use_at_random(&disk, &mut model, 150, 5);
        drop(disk);
        formats::compare_with_qemu(&path, "vpc", &model);

        // QEMU goes on, and so does Bivisor.
        formats::have_qemu_write(&path, "vpc", size, 10, 8);
        let mut model = formats::as_qemu_reads(&path, "vpc");
        let disk = Vhd::open(formats::file(&path, FileOptions::write())).unwrap();
        formats::use_at_random(&disk, &mut model, 60, 6);
        drop(disk);
        formats::compare_with_qemu(&path, "vpc", &model);
    }
}

#[test]
fn sectors_that_a_blocks_bitmap_calls_unwritten_read_as_zeroes_until_they_are_written() {
    let memory = Memory::of(Vec::new());
    let disk = create(Arc::clone(&memory));
    disk.write_at(0, &[9; 8192]).unwrap();
    drop(disk);
    let mut bytes = memory.bytes();
    let entry = u32::from_be_bytes(bytes[1536..1540].try_into().unwrap()) as usize;
    // Sectors 0 to 3 and 8 were written, the others not.
    bytes[entry * 512..entry * 512 + 512].fill(0);
    bytes[entry * 512] = 0b1111_0000;
    bytes[entry * 512 + 1] = 0b1000_0000;
    let expected = |sector: u64| if sector < 4 || sector == 8 { 9 } else { 0 };

    let disk = open(Memory::read_only(bytes.clone())).unwrap();
    let mut now = vec![0; 16384];
    disk.read_at(0, &mut now).unwrap();
    for (at, sector) in now.chunks(512).enumerate() {
        assert!(sector.iter().all(|byte| *byte == expected(at as u64)), "sector {at}");
    }
    let mut odd = vec![0; 700];
    disk.read_at(3 * 512 + 100, &mut odd).unwrap();
    assert!(odd == now[3 * 512 + 100..3 * 512 + 800]);

    let memory = Memory::of(bytes);
    let disk = open(Arc::clone(&memory)).unwrap();
    disk.write_at(5 * 512 + 7, &[3; 10]).unwrap();
    now[5 * 512 + 7..5 * 512 + 17].fill(3);
    drop(disk);
    let disk = open(Memory::read_only(memory.bytes())).unwrap();
    let mut again = vec![0; 16384];
    disk.read_at(0, &mut again).unwrap();
    assert!(again == now);
}

#[test]
fn what_a_guest_writes_to_the_first_sector_of_a_fixed_image_does_not_make_it_another_one() {
    let dynamic = Memory::of(Vec::new());
    drop(create(Arc::clone(&dynamic)));
    let fixed = Memory::of(Vec::new());
    let disk = Vhd::create_in(Arc::clone(&fixed), 9 * MIB, Variant::Fixed).unwrap();
    disk.write_at(0, &dynamic.bytes()).unwrap();
    drop(disk);
    assert_eq!(Vhd::open(fixed).unwrap().variant(), Variant::Fixed);
}

#[test]
fn a_kill_at_any_point_leaves_an_image_that_opens_and_has_what_was_flushed() {
    let folder = support::folder();
    let path = folder.path().join("killed.vhd");
    // QEMU has no check for this format, but refuses what is not whole.
    let inspect = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        assert_eq!(formats::size_in_qemu(&path, "vpc"), 9 * MIB);
    };
    let format = Format { create: &create, open: &open, inspect: &inspect };
    recording::survives_being_killed(&format, 25, 20, 1);
}

#[test]
fn a_kill_at_any_point_leaves_an_image_that_qemu_opens_as_it_is() {
    let folder = support::folder();
    let path = folder.path().join("killed.vhd");
    let look_first = |memory: Arc<Memory>| {
        fs::write(&path, memory.bytes()).unwrap();
        assert_eq!(formats::size_in_qemu(&path, "vpc"), 9 * MIB);
        open(memory)
    };
    let format = Format { create: &create, open: &look_first, inspect: &|_| {} };
    recording::survives_being_killed(&format, 14, 10, 4);
}

#[test]
fn a_power_cut_at_any_point_leaves_an_image_that_opens_and_has_what_was_flushed() {
    let format = Format { create: &create, open: &open, inspect: &|_| {} };
    for seed in 2..5 {
        recording::survives_losing_power(&format, 25, 15, seed);
    }
}

#[test]
fn writes_that_found_no_room_can_be_repeated() {
    let format = Format { create: &create, open: &open, inspect: &|_| {} };
    for seed in 0..4 {
        recording::survives_a_full_store(&format, seed);
    }
}

#[test]
fn hostile_headers_tables_and_bitmaps_do_no_harm() {
    let memory = Memory::of(Vec::new());
    let disk = create(Arc::clone(&memory));
    disk.write_at(2 * MIB - 100, &[5; 200]).unwrap();
    drop(disk);
    let bytes = memory.bytes();
    let resum = |memory: Arc<Memory>| Vhd::open(Arc::new(Resummed(memory)));
    let open = |memory| Ok(Box::new(resum(memory)?) as Box<dyn Disk>);
    let places = [8..64, 68..80, 512 + 16..512 + 40, 1536..1556, 3584..4096];
    formats::survives_mutation(&bytes, &places, &open, 1500, 9);
}

#[test]
fn differencing_images_are_refused_by_name() {
    let memory = Memory::of(Vec::new());
    drop(Vhd::create_in(Arc::clone(&memory), MIB, Variant::Fixed).unwrap());
    let mut bytes = memory.bytes();
    let at = MIB as usize + 60;
    bytes[at + 3] = 4;
    bytes[at + 7] -= 2;
    let error = open(Memory::of(bytes)).err().unwrap().to_string();
    assert!(error.contains("differencing image"), "{error}");
}

#[test]
fn a_footer_whose_checksum_is_wrong_is_no_footer_and_the_other_copy_serves() {
    let memory = Memory::of(Vec::new());
    let disk = create(Arc::clone(&memory));
    disk.write_at(MIB, &[7; 512]).unwrap();
    drop(disk);
    let good = memory.bytes();
    for at in [50, good.len() - 512 + 50] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        let memory = Memory::of(bytes.clone());
        let disk = open(Arc::clone(&memory)).unwrap();
        let mut sector = [0; 512];
        disk.read_at(MIB, &mut sector).unwrap();
        assert_eq!(sector, [7; 512]);
        drop(disk);
        assert!(memory.bytes() == good, "the footer is not put right");
    }
    let mut bytes = good.clone();
    let tail = bytes.len() - 512 + 50;
    bytes[50] ^= 1;
    bytes[tail] ^= 1;
    let error = open(Memory::of(bytes)).err().unwrap().to_string();
    assert!(error.contains("checksum"), "{error}");
}

/// A store whose checksums fit what is in it, so that mutations get past them.
struct Resummed(Arc<Memory>);

impl disk::Store for Resummed {
    fn name(&self) -> String {
        self.0.name()
    }

    fn read_only(&self) -> bool {
        self.0.read_only()
    }

    fn size(&self) -> Result<u64, DiskError> {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.0.read_at(offset, buffer)?;
        if buffer.starts_with(b"cxsparse") && buffer.len() == 1024 {
            resum(buffer, 36);
        }
        Ok(())
    }

    fn read_or_zero_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.0.read_or_zero_at(offset, buffer)?;
        if buffer.starts_with(b"conectix") && buffer.len() == 512 {
            resum(buffer, 64);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.0.write_at(offset, data)
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.0.sync()
    }

    fn set_size(&self, size: u64) -> Result<(), DiskError> {
        self.0.set_size(size)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.0.discard(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.0.write_zeroes(offset, length)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<disk::Extent, DiskError> {
        self.0.extent(offset, length)
    }
}

fn resum(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}
