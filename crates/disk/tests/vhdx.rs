//! VHDX against QEMU's tools, random use, crashes, its log, and hostile images.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/formats.rs"]
mod formats;
#[path = "support/mutants.rs"]
mod mutants;
#[path = "support/recording.rs"]
mod recording;
mod support;

use disk::vhdx::{CreateOptions, Variant, Vhdx};
use disk::{Disk, DiskError, FileOptions};
use recording::{Format, Memory};
use std::fs;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
/// Where new images have their block table.
const TABLE: usize = 3 << 20;
/// Where the log's identifier is in each header.
const LOG_IDS: [std::ops::Range<usize>; 2] =
    [(64 << 10) + 48..(64 << 10) + 64, (128 << 10) + 48..(128 << 10) + 64];

fn open(memory: Arc<Memory>) -> Result<Box<dyn Disk>, DiskError> {
    Ok(Box::new(Vhdx::open(memory)?))
}

fn create(memory: Arc<Memory>) -> Box<dyn Disk> {
    Box::new(Vhdx::create_in(memory, 5 * MIB, CreateOptions::default()).unwrap())
}

#[test]
fn images_of_qemu_read_as_qemu_reads_them() {
    let folder = support::folder();
    for options in [
        "subformat=dynamic,block_size=1M",
        "subformat=dynamic,block_size=8M,log_size=2M",
        "subformat=dynamic,block_size=256M",
        "subformat=fixed,block_size=2M",
    ] {
        let path = folder.path().join(options);
        let size = 19 * MIB;
        support::qemu(
            "qemu-img",
            ["create", "-f", "vhdx", "-o", options, path.to_str().unwrap(), &size.to_string()],
        );
        formats::have_qemu_write(&path, "vhdx", size, 14, 3);
        let disk = Vhdx::open(formats::file(&path, FileOptions::read())).unwrap();
        assert_eq!(disk.size(), formats::size_in_qemu(&path, "vhdx"));
        assert!(formats::read_all(&disk) == formats::as_qemu_reads(&path, "vhdx"), "{options}");
    }
}

#[test]
fn images_written_here_are_in_order_for_qemu_and_hold_what_was_written() {
    let folder = support::folder();
    let dynamic = CreateOptions::default();
    for (name, create) in [
        ("small", dynamic),
        ("large", CreateOptions { block_size: Some(32 * MIB), ..dynamic }),
        ("fixed", CreateOptions { variant: Variant::Fixed, ..dynamic }),
    ] {
        let path = folder.path().join(name);
        let size = 23 * MIB + 512;
        let mut model = vec![0; size as usize];
        let disk = Vhdx::create(&path, size, create, FileOptions::write()).unwrap();
        assert_eq!(disk.variant(), create.variant);
        formats::use_at_random(&disk, &mut model, 120, 5);
        drop(disk);
        formats::check_with_qemu(&path, "vhdx");
        formats::compare_with_qemu(&path, "vhdx", &model);

        // QEMU goes on, and so does Bivisor.
        formats::have_qemu_write(&path, "vhdx", size, 10, 8);
        let mut model = formats::as_qemu_reads(&path, "vhdx");
        let disk = Vhdx::open(formats::file(&path, FileOptions::write())).unwrap();
        formats::use_at_random(&disk, &mut model, 50, 6);
        drop(disk);
        formats::check_with_qemu(&path, "vhdx");
        formats::compare_with_qemu(&path, "vhdx", &model);
    }
}

#[test]
fn large_disks_with_bitmap_entries_in_their_table_are_laid_out_as_qemu_reads_them() {
    let folder = support::folder();
    for (size, block_size) in [(16 << 30, MIB), (40 << 40, 256 * MIB), (64 << 40, 32 * MIB)] {
        let path = folder.path().join(format!("{size}-{block_size}"));
        let create = CreateOptions { block_size: Some(block_size), ..CreateOptions::default() };
        let disk = Vhdx::create(&path, size, create, FileOptions::write()).unwrap();
        let places = [0, size / 2, size - 8192 - 512, size - 512];
        for place in places {
            disk.write_at(place, &[(place >> 20) as u8 | 1; 512]).unwrap();
        }
        drop(disk);
        formats::check_with_qemu(&path, "vhdx");
        assert_eq!(formats::size_in_qemu(&path, "vhdx"), size);
        let reads = places.iter().flat_map(|place| {
            let pattern = (place >> 20) as u8 | 1;
            ["-c".to_owned(), format!("read -P {pattern} {place} 512")]
        });
        let arguments = ["-f".to_owned(), "vhdx".to_owned()].into_iter().chain(reads);
        let arguments = arguments.chain([path.display().to_string()]);
        let printed = support::qemu("qemu-io", arguments);
        assert!(!printed.contains("failed"), "{printed}");
    }
}

/// An image that was cut off after its log got the block table's change and before the table did,
/// and what its disk holds.
fn cut_off_before_the_table() -> (Vec<u8>, Vec<u8>) {
    let memory = Memory::of(Vec::new());
    let disk = create(Arc::clone(&memory));
    let mut model = vec![0; 5 << 20];
    for (at, value) in [(0, 1), (2 * MIB as usize + 100, 2), (3 * MIB as usize, 3)] {
        disk.write_at(at as u64, &[value; 1000]).unwrap();
        model[at..at + 1000].fill(value);
        disk.flush().unwrap();
    }
    disk.write_at(4 * MIB, &[4; 5000]).unwrap();
    model[4 << 20..(4 << 20) + 5000].fill(4);
    let before = memory.bytes();
    disk.flush().unwrap();
    let mut bytes = memory.bytes();
    let table = TABLE..TABLE + 4096;
    assert!(bytes[table.clone()] != before[table.clone()], "the table was to be changed");
    bytes[table.clone()].copy_from_slice(&before[table]);
    (bytes, model)
}

#[test]
fn what_an_image_that_was_not_closed_has_in_its_log_is_done_when_it_is_opened() {
    let (bytes, model) = cut_off_before_the_table();
    // Also where nothing can be written.
    let disk = open(Memory::read_only(bytes.clone())).unwrap();
    assert!(formats::read_all(&*disk) == model);
    formats::check_extents(&*disk, &model);

    let memory = Memory::of(bytes);
    let disk = open(Arc::clone(&memory)).unwrap();
    assert!(formats::read_all(&*disk) == model);
    drop(disk);
    let disk = open(Memory::read_only(memory.bytes())).unwrap();
    assert!(formats::read_all(&*disk) == model);
}

#[test]
fn the_log_of_an_image_that_was_not_closed_reads_for_qemu_as_it_does_here() {
    let folder = support::folder();
    let path = folder.path().join("cut-off.vhdx");
    let (bytes, model) = cut_off_before_the_table();
    fs::write(&path, bytes).unwrap();
    support::qemu("qemu-img", ["check", "-r", "all", "-f", "vhdx", path.to_str().unwrap()]);
    formats::compare_with_qemu(&path, "vhdx", &model);
    formats::check_with_qemu(&path, "vhdx");
}

#[test]
fn an_entry_of_the_log_that_qemu_wrote_is_replayed() {
    let folder = support::folder();
    let path = folder.path().join("log-of-qemu.vhdx");
    let name = path.to_str().unwrap();
    support::qemu("qemu-img", ["create", "-f", "vhdx", "-o", "block_size=1M", name, "6M"]);
    support::qemu("qemu-io", ["-f", "vhdx", "-c", "write -P 8 3M 64k", name]);
    let before = fs::read(&path).unwrap();
    support::qemu("qemu-io", ["-f", "vhdx", "-c", "write -P 7 0 1M", name]);
    let mut bytes = fs::read(&path).unwrap();
    // QEMU empties its log at once. As if it had been stopped before, and before the table was
    // changed: the header names the log, and the table is what it was.
    let log = 1 << 20;
    let id: [u8; 16] = bytes[log + 32..log + 48].try_into().unwrap();
    assert!(bytes[log..].starts_with(b"loge") && id != [0; 16], "QEMU left no log");
    for place in [64 << 10, 128 << 10] {
        bytes[place + 48..place + 64].copy_from_slice(&id);
        mutants::seal_vhdx(&mut bytes[place..place + 4096]);
    }
    let tables: Vec<usize> = (2..before.len() >> 20)
        .map(|at| at << 20)
        .filter(|at| bytes[*at..*at + 4096] != before[*at..*at + 4096])
        .collect();
    let [table] = tables[..] else { panic!("several parts changed: {tables:x?}") };
    bytes[table..table + 4096].copy_from_slice(&before[table..table + 4096]);

    let mut expected = vec![0; 6 << 20];
    expected[..1 << 20].fill(7);
    expected[3 << 20..(3 << 20) + (64 << 10)].fill(8);
    assert!(formats::read_all(&*open(Memory::read_only(bytes.clone())).unwrap()) == expected);
    let memory = Memory::of(bytes);
    assert!(formats::read_all(&*open(Arc::clone(&memory)).unwrap()) == expected);
    assert!(LOG_IDS.iter().any(|id| memory.bytes()[id.clone()] == [0; 16]));
}

#[test]
fn a_log_in_which_the_entries_go_round_many_times_stays_in_order() {
    let size = 2 << 40;
    // Blocks that are far apart, so that every flush changes another page of the table.
    let folder = support::folder();
    let path = folder.path().join("log.vhdx");
    let disk = Vhdx::create(&path, size, CreateOptions::default(), FileOptions::write()).unwrap();
    let page = 512 * 32 * MIB;
    for round in 0..300 {
        let place = (round % (size / page)) * page + round / (size / page) * 64 * MIB;
        disk.write_at(place, &[round as u8; 512]).unwrap();
        disk.flush().unwrap();
    }
    let bytes_of_log = {
        let mut bytes = vec![0; MIB as usize];
        std::os::unix::fs::FileExt::read_at(&fs::File::open(&path).unwrap(), &mut bytes, MIB)
            .unwrap();
        bytes
    };
    let entries = bytes_of_log.chunks(4096).filter(|sector| sector.starts_with(b"loge")).count();
    assert!(entries > 100, "{entries} entries");
    // Not closed: the lock goes with a copy.
    let copy = path.with_extension("copy");
    support::qemu("cp", ["--sparse=always", path.to_str().unwrap(), copy.to_str().unwrap()]);
    support::qemu("qemu-img", ["check", "-r", "all", "-f", "vhdx", copy.to_str().unwrap()]);
    drop(disk);
    formats::check_with_qemu(&path, "vhdx");
    let again = Vhdx::open(formats::file(&path, FileOptions::read())).unwrap();
    for round in 0..300 {
        let place = (round % (size / page)) * page + round / (size / page) * 64 * MIB;
        let mut sector = [0; 512];
        again.read_at(place, &mut sector).unwrap();
        assert_eq!(sector, [round as u8; 512], "round {round}");
    }
}

#[test]
fn a_kill_at_any_point_leaves_an_image_that_opens_and_has_what_was_flushed() {
    let folder = support::folder();
    let path = folder.path().join("killed.vhdx");
    let inspect = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        formats::check_with_qemu(&path, "vhdx");
    };
    let format = Format { create: &create, open: &open, inspect: &inspect };
    recording::survives_being_killed(&format, 25, 25, 1);
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
fn differencing_images_and_sectors_of_4_kib_are_refused_by_name() {
    let memory = Memory::of(Vec::new());
    drop(create(Arc::clone(&memory)));
    let good = memory.bytes();
    let items = (2 << 20) + (64 << 10);
    for (place, value, word) in
        [(items + 4, 2, "differencing image"), (items + 8 + 8 + 16 + 1, 16, "4096")]
    {
        let mut bytes = good.clone();
        bytes[place] = value;
        let error = open(Memory::of(bytes)).err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn one_damaged_header_or_region_table_is_made_up_for_by_the_other() {
    let memory = Memory::of(Vec::new());
    let disk = create(Arc::clone(&memory));
    disk.write_at(MIB, &[7; 512]).unwrap();
    drop(disk);
    let good = memory.bytes();
    for places in [[64 << 10, 192 << 10], [128 << 10, 256 << 10]] {
        let mut bytes = good.clone();
        for place in places {
            bytes[place + 100] ^= 1;
        }
        let disk = open(Memory::of(bytes)).unwrap();
        let mut sector = [0; 512];
        disk.read_at(MIB, &mut sector).unwrap();
        assert_eq!(sector, [7; 512]);
    }
}

#[test]
fn hostile_headers_metadata_logs_and_tables_do_no_harm() {
    mutants::vhdx_subject().survives(200);
}

#[test]
fn threads_that_write_to_the_same_blocks_at_once_do_not_lose_anything() {
    let folder = support::folder();
    let path = folder.path().join("disk");
    let disk =
        Vhdx::create(&path, 9 * MIB, CreateOptions::default(), FileOptions::write()).unwrap();
    let model = formats::use_from_many_threads(&disk);
    drop(disk);
    formats::check_with_qemu(&path, "vhdx");
    formats::compare_with_qemu(&path, "vhdx", &model);
}
