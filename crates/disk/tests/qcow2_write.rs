//! qcow2 images that Bivisor makes and writes are what QEMU takes them for.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::qcow2::{CreateOptions, Qcow2, Repair, Version};
use disk::{DiskError, FileOptions};
use support::{Model, Random, folder};

/// Random operations, with the image opened anew now and then, and past the page cache or not.
fn random_operations(options: &CreateOptions, seed: u64) {
    let folder = folder();
    let path = folder.path().join("image.qcow2");
    Qcow2::create(&path, options, FileOptions::write()).unwrap();
    let mut random = Random(seed);
    let mut model = Model { bytes: vec![0; options.size as usize] };
    for round in 0..4 {
        let direct = FileOptions { direct: round == 3, ..FileOptions::write() };
        let disk = Qcow2::open(&path, direct, &|_| unreachable!()).unwrap();
        for _ in 0..100 {
            model.step(&disk, &mut random);
        }
        if round % 2 == 0 {
            model.compare(&disk);
        }
        drop(disk);
        let report = Qcow2::check(&path, Repair::Nothing, FileOptions::read()).unwrap();
        assert!(report.is_clean(), "{report:?}");
        model.compare_with_qemu(folder.path(), &path, "qcow2");
    }
}

#[test]
fn random_operations_leave_what_qemu_expects() {
    random_operations(&CreateOptions::new(8 << 20), 1);
}

#[test]
fn random_operations_with_the_smallest_clusters() {
    // An odd size; the refcount table has to grow twice.
    random_operations(&CreateOptions { cluster_size: 512, ..CreateOptions::new(20_000_256) }, 2);
}

#[test]
fn random_operations_with_the_largest_clusters() {
    random_operations(&CreateOptions { cluster_size: 2 << 20, ..CreateOptions::new(33 << 20) }, 3);
}

#[test]
fn random_operations_in_version_2() {
    let options = CreateOptions { version: Version::V2, ..CreateOptions::new(8 << 20) };
    random_operations(&CreateOptions { cluster_size: 4096, ..options }, 4);
}

#[test]
fn random_operations_with_lazy_refcounts() {
    let options = CreateOptions { lazy_refcounts: true, ..CreateOptions::new(8 << 20) };
    random_operations(&CreateOptions { cluster_size: 4096, ..options }, 5);
}

#[test]
fn what_cannot_be_made_is_refused_with_what_can() {
    let folder = folder();
    let path = folder.path().join("image.qcow2");
    let refuse = |options: CreateOptions| {
        let error = Qcow2::create(&path, &options, FileOptions::write()).unwrap_err();
        assert!(matches!(error, DiskError::Invalid { .. }), "{error}");
        assert!(!path.exists());
        error.to_string()
    };
    let options = CreateOptions::new(1 << 52);
    assert!(refuse(options.clone()).contains("larger clusters"));
    assert!(
        refuse(CreateOptions { cluster_size: 1000, ..options.clone() }).contains("power of two")
    );
    let lazy = CreateOptions { lazy_refcounts: true, version: Version::V2, ..options };
    assert!(refuse(lazy).contains("version 3"));
}
