//! VMDK against QEMU's tools, random use, crashes and hostile images.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/formats.rs"]
mod formats;
#[path = "support/recording.rs"]
mod recording;
mod support;

use disk::raw::Raw;
use disk::vmdk::{Variant, Vmdk, write_stream};
use disk::{Disk, DiskError, FileOptions, ImageFile, Store};
use recording::{Format, Memory};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

fn no_extents(name: &str) -> Result<Arc<dyn Store>, DiskError> {
    let problem = format!("there is no {name}");
    Err(DiskError::Invalid { file: "memory".to_owned(), problem })
}

fn open(memory: Arc<Memory>) -> Result<Box<dyn Disk>, DiskError> {
    Ok(Box::new(Vmdk::open_with(memory, &no_extents)?))
}

fn create(memory: Arc<Memory>) -> Box<dyn Disk> {
    Box::new(Vmdk::create_in(memory, 5 * MIB).unwrap())
}

/// An image that has no grain tables yet, for two of them.
fn create_without_tables(memory: Arc<Memory>) -> Box<dyn Disk> {
    drop(Vmdk::create_in(Arc::clone(&memory) as Arc<dyn Store>, 34 * MIB).unwrap());
    let bytes = memory.bytes();
    for place in [48, 56] {
        let sector = u64::from_le_bytes(bytes[place..place + 8].try_into().unwrap());
        memory.write_at(sector * 512, &[0; 8]).unwrap();
    }
    Box::new(Vmdk::open_with(memory, &no_extents).unwrap())
}

fn make_with_qemu(path: &Path, subformat: &str, size: u64) {
    let options = format!("subformat={subformat}");
    let (name, size) = (path.to_str().unwrap(), size.to_string());
    support::qemu("qemu-img", ["create", "-f", "vmdk", "-o", &options, name, &size]);
}

#[test]
fn images_of_qemu_are_read_and_written_as_qemu_does() {
    let size = 11 * MIB + 512 * 3;
    for (subformat, variant) in [
        ("monolithicSparse", Variant::MonolithicSparse),
        ("monolithicFlat", Variant::MonolithicFlat),
        ("twoGbMaxExtentSparse", Variant::SplitSparse),
        ("twoGbMaxExtentFlat", Variant::SplitFlat),
    ] {
        let folder = support::folder();
        let path = folder.path().join("disk.vmdk");
        make_with_qemu(&path, subformat, size);
        formats::have_qemu_write(&path, "vmdk", size, 14, 3);
        let mut model = formats::as_qemu_reads(&path, "vmdk");
        let disk = Vmdk::open(&path, FileOptions::read()).unwrap();
        assert_eq!(disk.variant(), variant);
        assert_eq!(disk.size(), formats::size_in_qemu(&path, "vmdk"));
        assert!(formats::read_all(&disk) == model, "{subformat}");
        drop(disk);

        let disk = Vmdk::open(&path, FileOptions::write()).unwrap();
        formats::use_at_random(&disk, &mut model, 60, 6);
        drop(disk);
        formats::check_with_qemu(&path, "vmdk");
        formats::compare_with_qemu(&path, "vmdk", &model);
    }
}

#[test]
fn a_request_across_two_extents_is_divided_between_them() {
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let folder = support::folder();
        let path = folder.path().join("disk.vmdk");
        let border = 2048 * MIB;
        make_with_qemu(&path, subformat, border + 8 * MIB);
        let write = format!("write -P 5 {} 2M", border - MIB);
        support::qemu("qemu-io", ["-f", "vmdk", "-c", &write, path.to_str().unwrap()]);
        let disk = Vmdk::open(&path, FileOptions::write()).unwrap();
        let mut content = vec![0; 2 << 20];
        disk.read_at(border - MIB, &mut content).unwrap();
        assert!(content.iter().all(|byte| *byte == 5));
        disk.write_at(border - 4096, &[6; 8192]).unwrap();
        drop(disk);
        let read = format!("read -P 6 {} 8k", border - 4096);
        let arguments = ["-f", "vmdk", "-c", &read, path.to_str().unwrap()];
        let printed = support::qemu("qemu-io", arguments);
        assert!(!printed.contains("failed"), "{printed}");
    }
}

#[test]
fn images_written_here_are_in_order_for_qemu_and_hold_what_was_written() {
    let folder = support::folder();
    let path = folder.path().join("disk.vmdk");
    let size = 23 * MIB + 512;
    let mut model = vec![0; size as usize];
    let disk = Vmdk::create(&path, size, FileOptions::write()).unwrap();
    formats::use_at_random(&disk, &mut model, 150, 5);
    drop(disk);
    formats::check_with_qemu(&path, "vmdk");
    formats::compare_with_qemu(&path, "vmdk", &model);

    formats::have_qemu_write(&path, "vmdk", size, 10, 8);
    let mut model = formats::as_qemu_reads(&path, "vmdk");
    let disk = Vmdk::open(&path, FileOptions::write()).unwrap();
    formats::use_at_random(&disk, &mut model, 60, 6);
    drop(disk);
    formats::check_with_qemu(&path, "vmdk");
    formats::compare_with_qemu(&path, "vmdk", &model);
}

/// A raw disk with data in some places.
fn source(path: &Path, size: u64) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    let mut random = support::Random(size);
    for _ in 0..20 {
        let start = random.below(size) as usize;
        let end = (start + random.below(300_000) as usize).min(content.len());
        let compressible = random.below(2) == 0;
        for byte in &mut content[start..end] {
            *byte = if compressible { 77 } else { random.next() as u8 };
        }
    }
    fs::write(path, &content).unwrap();
    content
}

#[test]
fn stream_optimised_images_of_qemu_are_read() {
    let folder = support::folder();
    let (raw, path) = (folder.path().join("disk.raw"), folder.path().join("disk.vmdk"));
    let content = source(&raw, 75 * MIB + 512 * 5);
    let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
    let options = "subformat=streamOptimized";
    support::qemu("qemu-img", ["convert", "-f", "raw", "-O", "vmdk", "-o", options, from, to]);
    let disk = Vmdk::open(&path, FileOptions::read()).unwrap();
    assert_eq!(disk.variant(), Variant::StreamOptimized);
    assert!(formats::read_all(&disk) == content);
    formats::check_extents(&disk, &content);
    drop(disk);
    let disk = Vmdk::open(&path, FileOptions::write()).unwrap();
    assert!(disk.read_only() && disk.write_at(0, &[1]).is_err());
}

#[test]
fn stream_optimised_images_written_here_are_in_order_for_qemu() {
    let folder = support::folder();
    for size in [512, 75 * MIB + 512 * 5] {
        let (raw, path) = (folder.path().join("disk.raw"), folder.path().join("disk.vmdk"));
        let content = source(&raw, size);
        let disk = Raw::open(&raw, FileOptions::read()).unwrap();
        let file = ImageFile::create(&path, FileOptions::write()).unwrap();
        let mut last = 0;
        let mut progress = |progress: disk::convert::Progress| {
            assert!(progress.done >= last && progress.done <= progress.total);
            last = progress.done;
            ControlFlow::Continue(())
        };
        write_stream(&disk, &file, &mut progress).unwrap();
        assert_eq!(last, size);
        drop(file);
        formats::check_with_qemu(&path, "vmdk");
        formats::compare_with_qemu(&path, "vmdk", &content);
        let again = Vmdk::open(&path, FileOptions::read()).unwrap();
        assert!(formats::read_all(&again) == content);
        formats::check_extents(&again, &content);
        let taken = fs::metadata(&path).unwrap().len();
        assert!(taken < size / 4 + 200_000, "{taken} bytes for {size}");
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn writing_a_stream_can_be_broken_off() {
    let source = Memory::of(Vec::new());
    let disk = create(source);
    let target = Memory::of(Vec::new());
    let error = write_stream(&*disk, &*target, &mut |_| ControlFlow::Break(())).err().unwrap();
    assert!(matches!(error, DiskError::Cancelled));
}

#[test]
fn a_kill_at_any_point_leaves_an_image_that_opens_and_has_what_was_flushed() {
    let folder = support::folder();
    let path = folder.path().join("killed.vmdk");
    let inspect = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        formats::check_with_qemu(&path, "vmdk");
    };
    let format = Format { create: &create, open: &open, inspect: &inspect };
    recording::survives_being_killed(&format, 25, 18, 1);
    let look_first = |memory: Arc<Memory>| {
        inspect(&memory.bytes());
        open(memory)
    };
    let format = Format { create: &create, open: &look_first, inspect: &|_| {} };
    recording::survives_being_killed(&format, 15, 8, 2);
}

#[test]
fn a_kill_while_grain_tables_are_added_leaves_an_image_that_has_what_was_flushed() {
    let folder = support::folder();
    let path = folder.path().join("killed.vmdk");
    let inspect = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        formats::check_with_qemu(&path, "vmdk");
    };
    let format = Format { create: &create_without_tables, open: &open, inspect: &inspect };
    recording::survives_being_killed(&format, 10, 8, 1);
}

#[test]
fn a_power_cut_at_any_point_leaves_an_image_that_opens_and_has_what_was_flushed() {
    let format = Format { create: &create, open: &open, inspect: &|_| {} };
    for seed in 2..5 {
        recording::survives_losing_power(&format, 25, 10, seed);
    }
    let format = Format { create: &create_without_tables, open: &open, inspect: &|_| {} };
    recording::survives_losing_power(&format, 10, 6, 6);
}

#[test]
fn writes_that_found_no_room_can_be_repeated() {
    let format = Format { create: &create, open: &open, inspect: &|_| {} };
    for seed in 0..4 {
        recording::survives_a_full_store(&format, seed);
    }
}

/// The tables that a directory leads to.
fn tables(bytes: &[u8], directory_field: usize) -> Vec<Vec<u8>> {
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let directory = number(directory_field) * 512;
    let table = |index: usize| number(directory + index * 4) * 512;
    let count = number(12).div_ceil(128 * 512);
    (0..count).map(|index| bytes[table(index)..table(index) + 2048].to_vec()).collect()
}

#[test]
fn the_redundant_directory_is_kept_in_step_and_put_right_where_it_is_not() {
    let memory = Memory::of(Vec::new());
    let disk = create(Arc::clone(&memory));
    disk.write_at(MIB, &[1; 200_000]).unwrap();
    drop(disk);
    let bytes = memory.bytes();
    assert_eq!(tables(&bytes, 48), tables(&bytes, 56));
    assert!(tables(&bytes, 48)[0].iter().any(|byte| *byte != 0));

    // As if a crash had come between the two.
    let redundant = u32::from_le_bytes(bytes[48..52].try_into().unwrap()) as usize * 512;
    let table = u32::from_le_bytes(bytes[redundant..redundant + 4].try_into().unwrap());
    memory.write_at(u64::from(table) * 512, &[7; 64]).unwrap();
    let disk = open(Arc::clone(&memory)).unwrap();
    disk.write_at(3 * MIB, &[2; 512]).unwrap();
    drop(disk);
    let bytes = memory.bytes();
    assert_eq!(tables(&bytes, 48), tables(&bytes, 56));
}

#[test]
fn the_content_identifier_changes_with_the_content_only() {
    let memory = Memory::of(Vec::new());
    drop(create(Arc::clone(&memory)));
    let id = || {
        let text = String::from_utf8_lossy(&memory.bytes()[512..10752]).into_owned();
        text.lines().find(|line| line.starts_with("CID=")).unwrap().to_owned()
    };
    let first = id();
    let disk = open(Arc::clone(&memory)).unwrap();
    disk.flush().unwrap();
    drop(disk);
    assert_eq!(id(), first);
    let disk = open(Arc::clone(&memory)).unwrap();
    disk.write_at(0, &[1]).unwrap();
    drop(disk);
    assert_ne!(id(), first);
    assert_eq!(id().len(), first.len());
}

/// A descriptor of one flat extent.
fn descriptor(create_type: &str, parent: &str, extent: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={parent}\n\
         createType=\"{create_type}\"\n\n{extent}\n"
    )
}

#[test]
fn extents_outside_of_the_descriptors_folder_are_refused() {
    let folder = support::folder();
    let inner = folder.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, [9; 4096]).unwrap();
    fs::write(inner.join("own"), [8; 4096]).unwrap();
    std::os::unix::fs::symlink(&secret, inner.join("link")).unwrap();
    std::os::unix::fs::symlink("own", inner.join("own-link")).unwrap();
    let path = inner.join("disk.vmdk");
    let open = |name: &str| {
        let extent = format!("RW 8 FLAT \"{name}\" 0");
        fs::write(&path, descriptor("monolithicFlat", "ffffffff", &extent)).unwrap();
        Vmdk::open(&path, FileOptions::read())
    };
    let absolute = secret.display().to_string();
    for name in ["../secret", &absolute, "link", "../inner/own", "x/../own", ".", "..", "/"] {
        let error = open(name).err().unwrap_or_else(|| panic!("{name} is opened")).to_string();
        assert!(error.contains("folder"), "{name}: {error}");
    }
    let absolute = inner.canonicalize().unwrap().join("own").display().to_string();
    for name in ["own", "own-link", &absolute] {
        let mut byte = [0];
        open(name).unwrap().read_at(4095, &mut byte).unwrap();
        assert_eq!(byte, [8]);
    }
    let error = open("gone").err().unwrap().to_string();
    assert!(error.contains("gone") && error.contains("part of an image"), "{error}");
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let extent = "RW 8 FLAT \"x\" 0";
    for (text, word) in [
        (descriptor("monolithicFlat", "0badcafe", extent), "delta disk"),
        (descriptor("fullDevice", "ffffffff", extent), "fullDevice"),
        (descriptor("vmfsSparse", "ffffffff", extent), "vmfsSparse"),
        (descriptor("monolithicFlat", "ffffffff", "RW 8 SESPARSE \"x\""), "SESPARSE"),
    ] {
        let error = open(Memory::of(text.into_bytes())).err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
    let error = open(Memory::of(b"COWD".to_vec())).err().unwrap().to_string();
    assert!(error.contains("VMFSSPARSE"), "{error}");
}

#[test]
fn a_part_of_a_split_image_is_not_taken_for_an_image() {
    let folder = support::folder();
    let path = folder.path().join("disk.vmdk");
    make_with_qemu(&path, "twoGbMaxExtentSparse", 4 * MIB);
    let part = folder.path().join("disk-s001.vmdk");
    let error = Vmdk::open(&part, FileOptions::read()).err().unwrap().to_string();
    assert!(error.contains("part of an image"), "{error}");
}

#[test]
fn hostile_headers_directories_and_tables_do_no_harm() {
    let memory = Memory::of(Vec::new());
    let disk = create(Arc::clone(&memory));
    disk.write_at(2 * MIB - 100, &[5; 200]).unwrap();
    drop(disk);
    let bytes = memory.bytes();
    let place =
        |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize * 512;
    let (redundant, directory) = (place(48), place(56));
    let places = [
        4..80,
        512..900,
        redundant..redundant + 8,
        directory..directory + 8,
        place(directory) + 120..place(directory) + 136,
    ];
    formats::survives_mutation(&bytes, &places, &open, 1500, 9);
}

#[test]
fn hostile_streams_do_no_harm() {
    let memory = Memory::of(Vec::new());
    let disk = create(memory);
    disk.write_at(MIB, &support::Random(4).bytes(100_000)).unwrap();
    disk.write_at(3 * MIB, &[5; 100_000]).unwrap();
    let target = Memory::of(Vec::new());
    write_stream(&*disk, &*target, &mut |_| ControlFlow::Continue(())).unwrap();
    let bytes = target.bytes();
    let end = bytes.len();
    let places =
        [4..80, 512..900, 65536..65560, 66000..70000, end - 6000..end, end - 1024..end - 512];
    formats::survives_mutation(&bytes, &places, &open, 1500, 9);
}

#[test]
fn hostile_descriptors_do_no_harm() {
    let extents = "RW 100 FLAT \"x\" 0\nRW 8 ZERO\nRW 100 FLAT \"x\" 8";
    let bytes = descriptor("twoGbMaxExtentFlat", "ffffffff", extents).into_bytes();
    let extent = |_: &str| Ok(Memory::of(vec![1; 100_000]) as Arc<dyn Store>);
    let open =
        |memory: Arc<Memory>| Ok(Box::new(Vmdk::open_with(memory, &extent)?) as Box<dyn Disk>);
    let place = 20..bytes.len();
    formats::survives_mutation(&bytes, std::slice::from_ref(&place), &open, 1500, 9);
}
