//! qcow2 images that QEMU made are read as QEMU reads them, and what cannot be read is refused.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::format::{self, Backing, OpenOptions};
use disk::qcow2::{Qcow2, Repair};
use disk::{Disk, DiskError, FileOptions, Format};
use std::fs;
use std::path::{Path, PathBuf};
use support::{Model, Random, folder, qemu};

const SIZE: u64 = 6 << 20;

/// A raw file with data, holes and text that compresses, and its content.
fn raw_disk(folder: &Path, seed: u64) -> (PathBuf, Vec<u8>) {
    let mut random = Random(seed);
    let mut bytes = vec![0; SIZE as usize];
    for _ in 0..40 {
        let start = random.below(SIZE - 70_000) as usize;
        let length = random.below(70_000) as usize;
        let part = &mut bytes[start..start + length];
        if random.below(2) == 0 { random.fill(part) } else { part.fill(random.next() as u8) }
    }
    let path = folder.join(format!("source-{seed}.raw"));
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

fn open(path: &Path, options: OpenOptions) -> Result<Box<dyn Disk>, DiskError> {
    format::open(path, Some(Format::Qcow2), options)
}

fn expect_error(path: &Path) -> String {
    let Err(error) = open(path, OpenOptions::read()) else { panic!("{path:?} opened") };
    let mut message = error.to_string();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        message = format!("{message}: {source}");
        cause = source;
    }
    message
}

/// Converts a raw disk with qemu-img and reads the result, then writes to it.
fn reads_what_qemu_writes(seed: u64, options: &str, compress: bool) {
    let folder = folder();
    let (raw, bytes) = raw_disk(folder.path(), seed);
    let image = folder.path().join("image.qcow2");
    let mut arguments = vec!["convert", "-O", "qcow2", "-f", "raw", "-o", options];
    if compress {
        arguments.push("-c");
    }
    arguments.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
    qemu("qemu-img", arguments);
    let mut model = Model { bytes };
    model.compare(&*open(&image, OpenOptions::read()).unwrap());
    let disk = open(&image, OpenOptions::write()).unwrap();
    let mut random = Random(seed);
    for _ in 0..150 {
        model.step(&*disk, &mut random);
    }
    model.compare(&*disk);
    drop(disk);
    model.compare_with_qemu(folder.path(), &image, "qcow2");
}

#[test]
fn plain_images_of_both_versions_are_read_bit_equal() {
    reads_what_qemu_writes(1, "compat=1.1", false);
    reads_what_qemu_writes(2, "compat=0.10", false);
    reads_what_qemu_writes(3, "cluster_size=512", false);
    reads_what_qemu_writes(4, "cluster_size=2M,lazy_refcounts=on", false);
}

#[test]
fn images_with_refcounts_of_any_width_are_read_bit_equal() {
    for bits in [1, 2, 4, 8, 32, 64] {
        reads_what_qemu_writes(bits, &format!("refcount_bits={bits},cluster_size=4k"), false);
    }
}

#[test]
fn compressed_images_are_read_bit_equal() {
    reads_what_qemu_writes(5, "compat=0.10", true);
    reads_what_qemu_writes(6, "compression_type=zstd", true);
    reads_what_qemu_writes(7, "compression_type=zlib,cluster_size=4k", true);
    reads_what_qemu_writes(8, "compression_type=zstd,cluster_size=2M", true);
}

#[test]
fn preallocated_images_are_read_bit_equal() {
    reads_what_qemu_writes(9, "preallocation=metadata", false);
    reads_what_qemu_writes(10, "preallocation=falloc,cluster_size=4k", false);
}

#[test]
fn overlays_show_what_is_below_and_hide_what_was_overwritten() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let (base, bytes) = raw_disk(folder.path(), 11);
    // A larger overlay than its base, by relative names, in three storeys of three formats.
    fs::create_dir(path("sub")).unwrap();
    let middle = path("sub/middle.qcow2");
    let relative = format!("../{}", base.file_name().unwrap().to_str().unwrap());
    let middle_name = middle.to_str().unwrap();
    qemu("qemu-img", ["create", "-f", "qcow2", "-b", &relative, "-F", "raw", middle_name, "7M"]);
    qemu("qemu-io", ["-c", "write -P 0x77 1000k 3000k", "-c", "write -z 64k 640k", middle_name]);
    let top = path("top.qcow2");
    let top_name = top.to_str().unwrap();
    qemu("qemu-img", ["create", "-f", "qcow2", "-b", middle_name, "-F", "qcow2", top_name]);
    let mut model = Model { bytes };
    model.bytes.resize(7 << 20, 0);
    model.bytes[1000 << 10..4000 << 10].fill(0x77);
    model.bytes[64 << 10..704 << 10].fill(0);
    model.compare(&*open(&top, OpenOptions::read()).unwrap());
    let disk = open(&top, OpenOptions::write()).unwrap();
    let mut random = Random(12);
    for _ in 0..200 {
        model.step(&*disk, &mut random);
    }
    model.compare(&*disk);
    drop(disk);
    model.compare_with_qemu(folder.path(), &top, "qcow2");
    assert!(fs::read(&base).unwrap().len() as u64 == SIZE, "the base is never written to");
}

#[test]
fn internal_snapshots_are_listed_and_survive_writes() {
    let folder = folder();
    let (raw, bytes) = raw_disk(folder.path(), 13);
    let image = folder.path().join("image.qcow2");
    let name = image.to_str().unwrap();
    for compat in ["0.10", "1.1"] {
        let _ = fs::remove_file(&image);
        let options = format!("compat={compat},cluster_size=4k");
        let raw = raw.to_str().unwrap();
        qemu("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", "-o", &options, raw, name]);
        qemu("qemu-img", ["snapshot", "-c", "before", name]);
        let mut model = Model { bytes: bytes.clone() };
        let mut random = Random(14);
        for _ in 0..2 {
            let disk = open(&image, OpenOptions::write()).unwrap();
            for _ in 0..100 {
                model.step(&*disk, &mut random);
            }
        }
        model.compare_with_qemu(folder.path(), &image, "qcow2");
        let info = Qcow2::info(&image, FileOptions::read()).unwrap();
        let names: Vec<_> = info.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
        assert_eq!(names, ["before"]);
        assert!(info.snapshots[0].seconds > 1_700_000_000);
        qemu("qemu-img", ["snapshot", "-a", "before", name]);
        Model { bytes: bytes.clone() }.compare_with_qemu(folder.path(), &image, "qcow2");
        assert!(Qcow2::check(&image, Repair::Nothing, FileOptions::read()).unwrap().is_clean());
        Model { bytes: bytes.clone() }.compare(&*open(&image, OpenOptions::read()).unwrap());
    }
}

#[test]
fn bitmaps_count_as_used_until_someone_writes_who_does_not_maintain_them() {
    let folder = folder();
    let image = folder.path().join("image.qcow2");
    let name = image.to_str().unwrap();
    qemu("qemu-img", ["create", "-f", "qcow2", name, "1M"]);
    qemu("qemu-img", ["bitmap", "--add", name, "changes"]);
    assert!(Qcow2::check(&image, Repair::Nothing, FileOptions::read()).unwrap().is_clean());
    open(&image, OpenOptions::write()).unwrap().write_at(0, &[1; 512]).unwrap();
    let report = Qcow2::check(&image, Repair::Leaks, FileOptions::write()).unwrap();
    assert!(report.is_clean() && report.repaired > 0, "{report:?}");
    qemu("qemu-img", ["check", name]);
}

#[test]
fn features_that_are_not_supported_are_refused_by_name() {
    let folder = folder();
    let image = folder.path().join("image.qcow2");
    let name = image.to_str().unwrap();
    let make = |arguments: &[&str]| {
        let _ = fs::remove_file(&image);
        qemu("qemu-img", [&["create", "-f", "qcow2"], arguments, &[name, "1M"]].concat());
    };
    make(&["-o", "extended_l2=on"]);
    assert!(expect_error(&image).contains("uses extended L2 entries (subclusters)"));
    let data = folder.path().join("data");
    make(&["-o", &format!("data_file={}", data.to_str().unwrap())]);
    assert!(expect_error(&image).contains("uses an external data file"));
    make(&[]);
    let mut bytes = fs::read(&image).unwrap();
    bytes[35] = 2;
    fs::write(&image, &bytes).unwrap();
    assert!(expect_error(&image).contains("uses encryption"));
    // An unknown bit, with the name that the image itself has for it.
    make(&[]);
    let mut bytes = fs::read(&image).unwrap();
    bytes[72] = 0x40;
    fs::write(&image, &bytes).unwrap();
    assert!(expect_error(&image).contains("uses the incompatible feature (bit 62)"));
    let table = bytes.windows(4).position(|four| four == 0x6803_f857_u32.to_be_bytes()).unwrap();
    bytes[table + 8..table + 10].copy_from_slice(&[0, 62]);
    bytes[table + 10..table + 20].copy_from_slice(b"wormholes\0");
    fs::write(&image, &bytes).unwrap();
    assert!(expect_error(&image).contains("uses the incompatible feature \"wormholes\" (bit 62)"));
    fs::write(&image, b"QFI\xfb\0\0\0\x01").unwrap();
    assert!(expect_error(&image).contains("version 1"));
    fs::write(&image, vec![0; 4096]).unwrap();
    assert!(expect_error(&image).contains("is not a qcow2 image"));
}

#[test]
fn backing_files_that_cannot_be_are_refused_with_the_fix() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let make = |name: &str, options: &[&str]| {
        let image = path(name);
        let _ = fs::remove_file(&image);
        let name = image.to_str().unwrap().to_owned();
        let create = ["create", "-q", "-u", "-f", "qcow2"].iter().chain(options).copied();
        qemu("qemu-img", create.chain([name.as_str(), "1M"]).collect::<Vec<_>>());
        image
    };
    let missing = make("a.qcow2", &["-b", "missing.raw", "-F", "raw"]);
    let message = expect_error(&missing);
    assert!(message.contains("its backing file") && message.contains("missing.raw"), "{message}");
    assert!(message.contains("No such file"), "{message}");
    let looping = make("a.qcow2", &["-b", "b.qcow2", "-F", "qcow2"]);
    make("b.qcow2", &["-b", "a.qcow2", "-F", "qcow2"]);
    assert!(expect_error(&looping).contains("comes back to it"), "{}", expect_error(&looping));
    let network = make("a.qcow2", &["-b", "nbd://localhost", "-F", "raw"]);
    assert!(expect_error(&network).contains("not a path, nbd://localhost"));
    let odd = make("a.qcow2", &["-b", "b.qcow2", "-F", "qed"]);
    assert!(expect_error(&odd).contains("a backing file of the format \"qed\""));
    // Without a format QEMU guesses, and warns of it.
    let unnamed = make("a.qcow2", &["-b", "b.qcow2", "-F", "qcow2"]);
    let mut bytes = fs::read(&unnamed).unwrap();
    let extension =
        bytes.windows(4).position(|four| four == 0xe279_2aca_u32.to_be_bytes()).unwrap();
    bytes[extension] = 0x12;
    fs::write(&unnamed, bytes).unwrap();
    assert!(expect_error(&unnamed).contains("does not say which format"));
    let deep = 70;
    make("0.qcow2", &[]);
    for level in 1..deep {
        let below = format!("{}.qcow2", level - 1);
        make(&format!("{level}.qcow2"), &["-b", &below, "-F", "qcow2"]);
    }
    assert!(expect_error(&path("69.qcow2")).contains("more than 64 images"));
    open(&path("60.qcow2"), OpenOptions::read()).unwrap();
    let refuse = OpenOptions { backing: Backing::Refuse, ..OpenOptions::read() };
    let Err(error) = open(&path("1.qcow2"), refuse) else { panic!("it opened") };
    assert!(error.to_string().contains("stands on 0.qcow2"), "{error}");
}

#[test]
fn formats_are_told_by_their_headers_and_raw_is_not_guessed() {
    let folder = folder();
    for (format, name) in [
        (Format::Qcow2, "qcow2"),
        (Format::Vmdk, "vmdk"),
        (Format::Vdi, "vdi"),
        (Format::Vhd, "vpc"),
        (Format::Vhdx, "vhdx"),
    ] {
        let path = folder.path().join(name);
        qemu("qemu-img", ["create", "-f", name, path.to_str().unwrap(), "8M"]);
        let file = disk::ImageFile::open(&path, FileOptions::read()).unwrap();
        assert_eq!(Format::detect(&file).unwrap(), format);
        assert_eq!(name.parse::<Format>().unwrap(), format);
    }
    let fixed = folder.path().join("fixed");
    let options = ["-f", "vpc", "-o", "subformat=fixed", fixed.to_str().unwrap(), "8M"];
    qemu("qemu-img", ["create"].iter().chain(&options));
    let file = disk::ImageFile::open(&fixed, FileOptions::read()).unwrap();
    assert_eq!(Format::detect(&file).unwrap(), Format::Vhd);
    let raw = folder.path().join("disk");
    fs::write(&raw, vec![0; 1 << 20]).unwrap();
    let Err(error) = format::open(&raw, None, OpenOptions::read()) else { panic!("it opened") };
    assert!(error.to_string().contains("--format raw"), "{error}");
    assert_eq!(format::open(&raw, Some(Format::Raw), OpenOptions::read()).unwrap().size(), 1 << 20);
}
