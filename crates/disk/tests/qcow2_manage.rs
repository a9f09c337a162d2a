//! Resizing, checking, repairing and compacting qcow2 images; many threads at once.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::format::{self, OpenOptions};
use disk::qcow2::{CreateOptions, Qcow2, Repair, Shrink};
use disk::{Disk, FileOptions, Format, convert, overlay};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use support::{Model, Random, folder, qemu, try_qemu};

fn new_image(folder: &Path, options: &CreateOptions) -> PathBuf {
    let path = folder.join("image.qcow2");
    Qcow2::create(&path, options, FileOptions::write()).unwrap();
    path
}

fn open(path: &Path) -> Qcow2 {
    Qcow2::open(path, FileOptions::write(), &|_| unreachable!()).unwrap()
}

#[test]
fn many_threads_write_to_the_same_clusters_at_once() {
    let folder = folder();
    let base = folder.path().join("base.raw");
    let bytes = Random(1).bytes(6 << 20);
    fs::write(&base, &bytes).unwrap();
    let path = folder.path().join("image.qcow2");
    overlay::create(&path, &base, Format::Raw).unwrap();
    let disk = format::open(&path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
    let model = Mutex::new(bytes);
    let threads = 8;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (disk, model) = (&*disk, &model);
            scope.spawn(move || {
                // Sectors of its own, in the same clusters as everybody's; the last part of the
                // disk whole, cluster by cluster, where clusters come and go.
                let mut random = Random(thread);
                let mut own = model.lock().unwrap().clone();
                for _ in 0..400 {
                    let sector = random.below(1000) * threads + thread;
                    let at = sector as usize * 512;
                    match random.below(10) {
                        0 => disk.flush().unwrap(),
                        1..3 => {
                            disk.write_zeroes(at as u64, 512).unwrap();
                            own[at..at + 512].fill(0);
                        }
                        3..6 => {
                            let mut now = [0; 512];
                            disk.read_at(at as u64, &mut now).unwrap();
                            assert!(now == own[at..at + 512], "sector {sector}");
                        }
                        6 => {
                            let place = (4 << 20) + thread * (256 << 10);
                            let length = 64 << (10 + random.below(3));
                            let range = place as usize..(place + length) as usize;
                            disk.discard(place, length).unwrap();
                            let data = random.bytes(4096);
                            own[range.clone()].fill(0);
                            own[range.start..range.start + 4096].copy_from_slice(&data);
                            disk.write_zeroes(place, length).unwrap();
                            disk.write_at(place, &data).unwrap();
                        }
                        _ => {
                            random.fill(&mut own[at..at + 512]);
                            disk.write_at(at as u64, &own[at..at + 512]).unwrap();
                        }
                    }
                }
                let mut model = model.lock().unwrap();
                for sector in (thread as usize..8000).step_by(8) {
                    let range = sector * 512..(sector + 1) * 512;
                    model[range.clone()].copy_from_slice(&own[range]);
                }
                let place = (4 << 20) + thread as usize * (256 << 10);
                let range = place..place + (256 << 10);
                model[range.clone()].copy_from_slice(&own[range]);
            });
        }
    });
    let model = Model { bytes: model.into_inner().unwrap() };
    model.compare(&*disk);
    drop(disk);
    model.compare_with_qemu(folder.path(), &path, "qcow2");
}

#[test]
fn a_disk_grows_with_zeroes_and_shrinks_only_where_it_is_empty() {
    let folder = folder();
    for cluster_size in [512, 64 << 10] {
        let options = CreateOptions { cluster_size, ..CreateOptions::new((1 << 20) + 512) };
        let path = new_image(folder.path(), &options);
        let mut disk = open(&path);
        let mut model = Model { bytes: vec![0; (1 << 20) + 512] };
        let mut random = Random(3);
        for size in [3 << 20, (3 << 20) + 1024, 40 << 20] {
            for _ in 0..50 {
                model.step(&disk, &mut random);
            }
            disk.resize(size, Shrink::Refuse).unwrap();
            model.bytes.resize(size as usize, 0);
            model.compare(&disk);
        }
        disk.write_at(20 << 20, &[1; 512]).unwrap();
        let refused = disk.resize(10 << 20, Shrink::Refuse).unwrap_err().to_string();
        assert!(refused.contains("41943040 bytes and 10485760 are fewer"), "{refused}");
        let refused = disk.resize(10 << 20, Shrink::IfUnused).unwrap_err().to_string();
        assert!(refused.contains("there is data at 2097"), "{refused}");
        disk.write_zeroes(0, 40 << 20).unwrap();
        disk.resize(10 << 20, Shrink::IfUnused).unwrap();
        disk.resize(11 << 20, Shrink::Refuse).unwrap();
        drop(disk);
        Model { bytes: vec![0; 11 << 20] }.compare_with_qemu(folder.path(), &path, "qcow2");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_grown_overlay_does_not_show_what_is_below_its_former_end() {
    let folder = folder();
    let base = folder.path().join("base.raw");
    fs::write(&base, Random(1).bytes(1 << 20)).unwrap();
    let path = folder.path().join("image.qcow2");
    overlay::create_over(&path, "base.raw", Format::Raw, 100 << 10).unwrap();
    let below = format::open(&base, Some(Format::Raw), OpenOptions::read()).unwrap().into();
    let mut disk = overlay::open_over(&path, FileOptions::write(), &below).unwrap();
    disk.write_at(98 << 10, &[7; 1024]).unwrap();
    disk.resize(2 << 20, Shrink::Refuse).unwrap();
    let mut bytes = fs::read(&base).unwrap();
    bytes.resize(2 << 20, 0);
    bytes[100 << 10..].fill(0);
    bytes[98 << 10..99 << 10].fill(7);
    let model = Model { bytes };
    model.compare(&disk);
    drop(disk);
    model.compare_with_qemu(folder.path(), &path, "qcow2");
}

#[test]
fn leaks_and_wrong_refcounts_are_found_and_repaired_as_qemu_sees_them() {
    let folder = folder();
    let options = CreateOptions { cluster_size: 4096, ..CreateOptions::new(4 << 20) };
    let path = new_image(folder.path(), &options);
    let mut model = Model { bytes: vec![0; 4 << 20] };
    let mut random = Random(8);
    let disk = open(&path);
    for _ in 0..100 {
        model.step(&disk, &mut random);
    }
    drop(disk);
    let image = fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize;
    let block = number(number(48));
    for round in 0..6 {
        let mut damaged = image.clone();
        for _ in 0..=round {
            let cluster = random.below(image.len() as u64 / 4096) as usize;
            let count = random.below(3) as u16;
            let place = block + cluster * 2;
            damaged[place..place + 2].copy_from_slice(&count.to_be_bytes());
        }
        fs::write(&path, &damaged).unwrap();
        let report = Qcow2::check(&path, Repair::Nothing, FileOptions::read()).unwrap();
        let status = try_qemu("qemu-img", ["check", path.to_str().unwrap()]).status.code();
        let expected = match (report.errors, report.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => 2,
        };
        assert_eq!(status, Some(expected), "{report:?}");
        let after = Qcow2::check(&path, Repair::Everything, FileOptions::write()).unwrap();
        assert!(after.is_clean() && after.repaired == report.errors + report.leaks, "{after:?}");
        model.compare_with_qemu(folder.path(), &path, "qcow2");
    }
}

#[test]
fn compacting_gives_zeroes_and_free_clusters_back() {
    let folder = folder();
    let path = new_image(folder.path(), &CreateOptions::new(16 << 20));
    let disk = open(&path);
    let mut model = Model { bytes: vec![0; 16 << 20] };
    disk.write_at(0, &Random(1).bytes(8 << 20)).unwrap();
    disk.write_at(0, &vec![0; 6 << 20]).unwrap();
    disk.write_at(100, &[1]).unwrap();
    disk.flush().unwrap();
    model.bytes[..8 << 20].copy_from_slice(&Random(1).bytes(8 << 20));
    model.bytes[..6 << 20].fill(0);
    model.bytes[100] = 1;
    let before =
        Qcow2::info(&path, FileOptions { lock: disk::Lock::Ignore, ..FileOptions::read() });
    let before = before.unwrap().allocated;
    convert::compact(&disk, &mut |_| ControlFlow::Continue(())).unwrap();
    model.compare(&disk);
    drop(disk);
    let after = Qcow2::info(&path, FileOptions::read()).unwrap().allocated;
    assert!(before > 8 << 20 && after < 3 << 20, "{before} {after}");
    model.compare_with_qemu(folder.path(), &path, "qcow2");
}

#[test]
fn an_image_in_use_is_dirty_and_a_closed_one_is_not() {
    let folder = folder();
    let path = new_image(folder.path(), &CreateOptions::new(1 << 20));
    let peek = || {
        let options = FileOptions { lock: disk::Lock::Ignore, ..FileOptions::read() };
        Qcow2::info(&path, options).unwrap()
    };
    let disk = open(&path);
    assert!(!peek().dirty);
    disk.write_at(0, &[1; 512]).unwrap();
    disk.flush().unwrap();
    assert!(peek().dirty);
    drop(disk);
    assert!(!peek().dirty);
    assert!(qemu("qemu-img", ["info", path.to_str().unwrap()]).contains("corrupt: false"));
}
