//! A host file system without room: the request fails, nothing is lost, and it can be repeated.
//!
//! The tests run themselves again in a mount namespace of their own with a small file system.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::format::{self, OpenOptions};
use disk::qcow2::{CreateOptions, Qcow2, Repair};
use disk::{Disk, DiskError, FileOptions, Format};
use std::fs;
use std::path::Path;
use std::process::Command;
use support::{Model, Random, folder};

/// Bytes of the small file system.
const ROOM: u64 = 4 << 20;

/// Runs a test again where the folder in `DISK_SMALL` is a file system of `ROOM` bytes; there, runs
/// `work` in it.
fn in_a_small_file_system(test: &str, work: fn(&Path)) {
    if let Some(small) = std::env::var_os("DISK_SMALL") {
        return work(Path::new(&small));
    }
    let folder = folder();
    let mount = format!("mount -t tmpfs -o size={ROOM} small \"$DISK_SMALL\" && exec \"$@\"");
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", &mount, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("DISK_SMALL", folder.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "the test needs namespaces of an ordinary user (`sysctl user.max_user_namespaces` says how \
         many there may be): {output:?}"
    );
}

/// Fills a disk until there is no room, makes room, and goes on.
fn fills_up_and_goes_on(small: &Path, disk: &dyn Disk) -> Model {
    let ballast = small.join("ballast");
    fs::write(&ballast, vec![1; 2 << 20]).unwrap();
    let mut model = Model { bytes: vec![0; disk.size() as usize] };
    let mut random = Random(5);
    let mut refused = 0;
    while refused < 50 {
        let length = (1 + random.below(64)) * 512;
        let offset = random.below((model.bytes.len() as u64 - length) / 512) * 512;
        let range = offset as usize..(offset + length) as usize;
        let data = random.bytes(length as usize);
        match disk.write_at(offset, &data).and_then(|()| disk.flush()) {
            Ok(()) => model.bytes[range].copy_from_slice(&data),
            Err(error) => {
                assert!(matches!(error, DiskError::Full { .. }), "{error}");
                refused += 1;
                // Sector by sector it is what it was or what it should become.
                let mut now = vec![0; length as usize];
                disk.read_at(offset, &mut now).unwrap();
                let sectors = now.chunks(512).zip(data.chunks(512));
                for ((now, new), old) in sectors.zip(model.bytes[range.clone()].chunks(512)) {
                    assert!(now == new || now == old);
                }
                model.bytes[range].copy_from_slice(&now);
            }
        }
    }
    model.compare(disk);
    fs::remove_file(ballast).unwrap();
    for index in 0..20 {
        let data = random.bytes(4096);
        let offset = index * 8192;
        disk.write_at(offset as u64, &data).unwrap();
        model.bytes[offset..offset + 4096].copy_from_slice(&data);
    }
    disk.flush().unwrap();
    model.compare(disk);
    model
}

#[test]
fn a_qcow2_image_survives_a_full_host() {
    in_a_small_file_system("a_qcow2_image_survives_a_full_host", |small| {
        let path = small.join("image.qcow2");
        let options = CreateOptions { cluster_size: 4096, ..CreateOptions::new(8 << 20) };
        Qcow2::create(&path, &options, FileOptions::write()).unwrap();
        let open = || format::open(&path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
        let model = fills_up_and_goes_on(small, &*open());
        model.compare(&*open());
        let report = Qcow2::check(&path, Repair::Nothing, FileOptions::read()).unwrap();
        assert!(report.is_clean(), "{report:?}");
    });
}

#[test]
fn a_raw_image_survives_a_full_host() {
    in_a_small_file_system("a_raw_image_survives_a_full_host", |small| {
        let path = small.join("image.raw");
        let disk = format::create(&path, Format::Raw, 8 << 20).unwrap();
        let model = fills_up_and_goes_on(small, &*disk);
        drop(disk);
        assert!(fs::read(&path).unwrap() == model.bytes);
    });
}
