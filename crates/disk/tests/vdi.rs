//! VDI against QEMU's tools, random use, crashes and hostile images.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/formats.rs"]
mod formats;
#[path = "support/recording.rs"]
mod recording;
mod support;

use disk::vdi::{Variant, Vdi};
use disk::{Disk, DiskError, FileOptions};
use recording::{Format, Memory};
use std::fs;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

fn open(memory: Arc<Memory>) -> Result<Box<dyn Disk>, DiskError> {
    Ok(Box::new(Vdi::open(memory)?))
}

fn create(size: u64) -> impl Fn(Arc<Memory>) -> Box<dyn Disk> {
    move |memory| Box::new(Vdi::create_in(memory, size, Variant::Dynamic).unwrap())
}

#[test]
fn images_of_qemu_read_as_qemu_reads_them() {
    let folder = support::folder();
    for (name, options) in [("dynamic", "static=off"), ("static", "static=on")] {
        let path = folder.path().join(name);
        let size = 11 * MIB + 512 * 3;
        support::qemu(
            "qemu-img",
            ["create", "-f", "vdi", "-o", options, path.to_str().unwrap(), &size.to_string()],
        );
        formats::have_qemu_write(&path, "vdi", size, 14, 3);
        let disk = Vdi::open(formats::file(&path, FileOptions::read())).unwrap();
        assert_eq!(disk.size(), formats::size_in_qemu(&path, "vdi"));
        assert!(formats::read_all(&disk) == formats::as_qemu_reads(&path, "vdi"), "{name}");
    }
}

#[test]
fn images_written_here_are_in_order_for_qemu_and_hold_what_was_written() {
    let folder = support::folder();
    for variant in [Variant::Dynamic, Variant::Static] {
        let path = folder.path().join(format!("{variant:?}.vdi"));
        let size = 23 * MIB + 512;
        let mut model = vec![0; size as usize];
        let disk = Vdi::create(&path, size, variant, FileOptions::write()).unwrap();
        formats::use_at_random(&disk, &mut model, 150, 5);
        drop(disk);
        formats::check_with_qemu(&path, "vdi");
        formats::compare_with_qemu(&path, "vdi", &model);

        // QEMU goes on, and so does Bivisor.
        formats::have_qemu_write(&path, "vdi", size, 10, 8);
        let mut model = formats::as_qemu_reads(&path, "vdi");
        model.truncate(size as usize);
        let disk = Vdi::open(formats::file(&path, FileOptions::write())).unwrap();
        formats::use_at_random(&disk, &mut model, 60, 6);
        drop(disk);
        formats::check_with_qemu(&path, "vdi");
        formats::compare_with_qemu(&path, "vdi", &model);
    }
}

#[test]
fn a_kill_at_any_point_leaves_an_image_that_opens_and_has_what_was_flushed() {
    let folder = support::folder();
    let path = folder.path().join("killed.vdi");
    let inspect = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        formats::check_with_qemu(&path, "vdi");
    };
    let format = Format { create: &create(5 * MIB), open: &open, inspect: &inspect };
    recording::survives_being_killed(&format, 25, 30, 1);
}

#[test]
fn a_power_cut_at_any_point_leaves_an_image_that_opens_and_has_what_was_flushed() {
    let format = Format { create: &create(5 * MIB), open: &open, inspect: &|_| {} };
    for seed in 2..5 {
        recording::survives_losing_power(&format, 25, 20, seed);
    }
}

#[test]
fn writes_that_found_no_room_can_be_repeated() {
    let folder = support::folder();
    let path = folder.path().join("full.vdi");
    let inspect = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        formats::check_with_qemu(&path, "vdi");
    };
    let format = Format { create: &create(5 * MIB), open: &open, inspect: &inspect };
    for seed in 0..4 {
        recording::survives_a_full_store(&format, seed);
    }
}

#[test]
fn hostile_headers_and_maps_do_no_harm() {
    let memory = Memory::of(Vec::new());
    let disk = Vdi::create_in(Arc::clone(&memory), 6 * MIB, Variant::Dynamic).unwrap();
    disk.write_at(MIB * 2 - 100, &[5; 200]).unwrap();
    drop(disk);
    let bytes = memory.bytes();
    formats::survives_mutation(&bytes, &[0x40..0x60, 0x150..0x200, 0x200..0x218], &open, 1500, 9);
}

#[test]
fn images_with_a_parent_are_refused_by_name() {
    let memory = Memory::of(Vec::new());
    drop(Vdi::create_in(Arc::clone(&memory), MIB, Variant::Dynamic).unwrap());
    let mut bytes = memory.bytes();
    bytes[0x4c] = 4;
    let error = open(Memory::of(bytes.clone())).err().unwrap().to_string();
    assert!(error.contains("differencing image"), "{error}");
    bytes[0x4c] = 1;
    bytes[0x1b8] = 1;
    let error = open(Memory::of(bytes)).err().unwrap().to_string();
    assert!(error.contains("parent"), "{error}");
}

#[test]
fn a_count_of_blocks_that_a_crash_left_behind_is_corrected() {
    let memory = Memory::of(Vec::new());
    let disk = Vdi::create_in(Arc::clone(&memory), 4 * MIB, Variant::Dynamic).unwrap();
    disk.write_at(0, &[1; 512]).unwrap();
    drop(disk);
    let mut bytes = memory.bytes();
    bytes[0x184] = 3;
    let memory = Memory::of(bytes);
    drop(open(Arc::clone(&memory)).unwrap());
    assert_eq!(memory.bytes()[0x184], 1);
}
