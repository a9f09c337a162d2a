//! Copies into new images.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::convert::{Progress, convert};
use disk::format::{self, OpenOptions};
use disk::{DiskError, Format};
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use support::{Model, Random, folder};

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn a_disk_goes_through_every_format_and_stays_sparse() {
    let folder = folder();
    let mut bytes = vec![0; 24 << 20];
    for index in 0..8 {
        let at = index * 3_000_000;
        Random(index as u64).fill(&mut bytes[at..at + 50_000]);
    }
    let model = Model { bytes };
    let first = folder.path().join("first");
    let disk = format::create(&first, Format::Raw, 24 << 20).unwrap();
    disk.write_at(0, &model.bytes).unwrap();
    drop(disk);
    let mut source = (first, Format::Raw);
    for target in Format::ALL.into_iter().rev() {
        let path = folder.path().join(target.name());
        let disk = format::open(&source.0, Some(source.1), OpenOptions::read()).unwrap();
        let mut told = Vec::new();
        convert(&*disk, &path, target, &mut |progress| {
            told.push(progress);
            go_on(progress)
        })
        .unwrap();
        assert!(told.windows(2).all(|two| two[0].done < two[1].done));
        assert_eq!(told.last(), Some(&Progress { done: 24 << 20, total: 24 << 20 }));
        model.compare_with_qemu(folder.path(), &path, target.name_in_headers());
        let known = (target == Format::Raw).then_some(target);
        model.compare(&*format::open(&path, known, OpenOptions::read()).unwrap());
        let taken = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(taken < 20 << 20, "{target} takes {taken} bytes");
        // Some formats write their own name down.
        let image = fs::read(&path).unwrap();
        assert!(!image[..64 << 10].windows(7).any(|word| word == b"partial"), "{target}");
        source = (path, target);
    }
}

#[test]
fn a_cancelled_copy_leaves_nothing_behind() {
    let folder = folder();
    let source = format::create(&folder.path().join("source"), Format::Raw, 24 << 20).unwrap();
    source.write_at(0, &vec![1; 24 << 20]).unwrap();
    let path = folder.path().join("copy.qcow2");
    let error = convert(&*source, &path, Format::Qcow2, &mut |progress| {
        assert!(!path.exists());
        if progress.done > 8 << 20 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(error, Err(DiskError::Cancelled)));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_is_there_is_not_replaced() {
    let folder = folder();
    let source = format::create(&folder.path().join("source"), Format::Raw, 1 << 20).unwrap();
    let path = folder.path().join("copy");
    fs::write(&path, b"precious").unwrap();
    let error = convert(&*source, &path, Format::Qcow2, &mut go_on).unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}
