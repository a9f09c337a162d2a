//! Damaged and malicious images: they give errors, never a panic, an endless loop or a huge
//! allocation. Seeds are fixed; `examples/fuzz_images.rs` goes on from there.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::format::{self, OpenOptions};
use disk::qcow2::{CreateOptions, Qcow2, Repair};
use disk::{DiskError, FileOptions, Format};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use support::fuzz::{Corpus, exercise};
use support::{folder, qemu};

#[test]
fn mutated_images_give_errors_and_nothing_worse() {
    // In memory, where nothing has to wait for a disk.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| folder());
    let corpus = Corpus::with_qemu(folder.path(), &|arguments| {
        qemu("qemu-img", arguments);
    });
    let mutants = 300;
    let opened = (0..mutants).filter(|seed| exercise(&corpus.mutant(*seed), folder.path(), *seed));
    // Many must get far enough to do harm.
    let opened = opened.count() as u64;
    assert!(opened > mutants / 3 && opened < mutants, "{opened} of {mutants} were opened");
}

/// Overwrites a number in a file.
fn poke(path: &Path, offset: u64, number: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&number.to_be_bytes(), offset).unwrap();
}

fn new_image(folder: &Path, options: &CreateOptions) -> std::path::PathBuf {
    let path = folder.join("image.qcow2");
    let _ = fs::remove_file(&path);
    Qcow2::create(&path, options, FileOptions::write()).unwrap();
    path
}

fn refused(path: &Path) -> String {
    match format::open(path, Some(Format::Qcow2), OpenOptions::write()) {
        Ok(_) => panic!("it opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn tables_that_no_image_can_have_are_refused_before_they_are_read() {
    let folder = folder();
    let options = CreateOptions::new(1 << 30);
    let path = new_image(folder.path(), &options);
    poke(&path, 36, u64::from(u32::MAX) << 32);
    assert!(refused(&path).contains("L1 table"), "{}", refused(&path));
    let path = new_image(folder.path(), &options);
    poke(&path, 40, 1 << 62);
    assert!(refused(&path).contains("beyond the file's end"), "{}", refused(&path));
    let path = new_image(folder.path(), &options);
    poke(&path, 56, u64::from(u32::MAX) << 32);
    assert!(refused(&path).contains("refcount table"), "{}", refused(&path));
    let path = new_image(folder.path(), &options);
    poke(&path, 60, u64::MAX);
    assert!(refused(&path).contains("snapshots"), "{}", refused(&path));
    let path = new_image(folder.path(), &options);
    poke(&path, 24, 1 << 60);
    assert!(refused(&path).contains("L1 table has 2 entries"), "{}", refused(&path));
}

#[test]
fn guest_data_mapped_onto_tables_does_not_overwrite_them() {
    let folder = folder();
    let path = new_image(folder.path(), &CreateOptions::new(1 << 20));
    let disk = format::open(&path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
    disk.write_at(0, &[1; 4096]).unwrap();
    drop(disk);
    let image = fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let l1 = number(40);
    let l2 = number(l1 as usize) & 0x00ff_ffff_ffff_fe00;
    let copied = 1_u64 << 63;
    for table in [l1, l2, number(48), number(number(48) as usize)] {
        fs::write(&path, &image).unwrap();
        poke(&path, l2, copied | table);
        let disk = format::open(&path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
        let error = disk.write_at(0, &[0xff; 512]).unwrap_err();
        assert!(matches!(error, DiskError::Damaged { .. }), "{error}");
        // Now it is marked, and nothing is written to it any more, now or later.
        assert!(disk.write_at(512 << 10, &[0xff; 512]).is_err());
        drop(disk);
        assert!(refused(&path).contains("marked as corrupt"));
        format::open(&path, Some(Format::Qcow2), OpenOptions::read()).unwrap();
    }
}

#[test]
fn wrong_refcounts_do_not_have_tables_allocated() {
    let folder = folder();
    let path = new_image(folder.path(), &CreateOptions::new(1 << 20));
    let image = fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    // All refcounts are zero: every cluster counts as free.
    poke(&path, number(number(48) as usize), 0);
    let disk = format::open(&path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
    let error = disk.write_at(0, &[0xff; 512]).unwrap_err();
    assert!(error.to_string().contains("holds a table"), "{error}");
    drop(disk);
    let report = Qcow2::check(&path, Repair::Everything, FileOptions::write()).unwrap();
    assert!(report.is_clean() && report.repaired == 4, "{report:?}");
    let disk = format::open(&path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
    disk.write_at(0, &[0xff; 512]).unwrap();
    drop(disk);
    qemu("qemu-img", ["check", path.to_str().unwrap()]);
}

#[test]
fn a_table_named_over_and_over_does_not_make_a_check_endless() {
    let folder = folder();
    // A huge sparse disk: 4 Mi L1 entries, all of one L2 table that is full of one entry.
    let options = CreateOptions { cluster_size: 2 << 20, ..CreateOptions::new(1 << 60) };
    let path = new_image(folder.path(), &options);
    let image = fs::File::options().read(true).write(true).open(&path).unwrap();
    let mut field = [0; 8];
    image.read_exact_at(&mut field, 40).unwrap();
    let l1 = u64::from_be_bytes(field);
    let table = image.metadata().unwrap().len();
    image.write_all_at(&(table | 1 << 63).to_be_bytes().repeat(2 << 20), l1).unwrap();
    let data = table + (2 << 20);
    image.write_all_at(&(data | 1 << 63).to_be_bytes().repeat((2 << 20) / 8), table).unwrap();
    image.write_all_at(&[1], data).unwrap();
    let report = Qcow2::check(&path, Repair::Nothing, FileOptions::read()).unwrap();
    assert!(report.errors > 0 && report.described.len() <= 20);
}
