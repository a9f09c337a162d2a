//! The host file back end.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::{Access, DiskError, ExtentKind, FileOptions, ImageFile, Lock};
use std::io::{Read, Write};
use std::process::Stdio;
use support::{Random, folder, qemu_command, try_qemu};

#[test]
fn an_image_that_is_open_to_write_is_refused_and_named() {
    let folder = folder();
    let path = folder.path().join("image");
    let writer = ImageFile::create(&path, FileOptions::write()).unwrap();
    for options in [FileOptions::read(), FileOptions::write()] {
        let refused = ImageFile::open(&path, options).unwrap_err();
        assert!(matches!(refused, DiskError::InUse { .. }), "{refused}");
        assert!(refused.to_string().contains("this same machine"), "{refused}");
    }
    let peek = FileOptions { lock: Lock::Ignore, ..FileOptions::read() };
    ImageFile::open(&path, peek).unwrap();
    drop(writer);
    ImageFile::open(&path, FileOptions::write()).unwrap();
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let folder = folder();
    let path = folder.path().join("image");
    drop(ImageFile::create(&path, FileOptions::write()).unwrap());
    let readers = [(); 2].map(|()| ImageFile::open(&path, FileOptions::read()).unwrap());
    let refused = ImageFile::open(&path, FileOptions::write()).unwrap_err();
    assert!(matches!(refused, DiskError::InUse { .. }), "{refused}");
    drop(readers);
    ImageFile::open(&path, FileOptions::write()).unwrap();
}

#[test]
fn locks_hold_against_qemu_both_ways() {
    let folder = folder();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let ours = ImageFile::open(&path, FileOptions::write()).unwrap();
    let output = try_qemu("qemu-io", ["-f", "raw", "-c", "read 0 512", path.to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("lock"), "{output:?}");
    drop(ours);

    let mut qemu = qemu_command("qemu-io")
        .args(["-f", "raw", path.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It answers this once it has the image.
    qemu.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut answer = [0; 1];
    qemu.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
    let refused = ImageFile::open(&path, FileOptions::write()).unwrap_err().to_string();
    assert!(refused.contains(&format!("process {} (qemu-io)", qemu.id())), "{refused}");
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    ImageFile::open(&path, FileOptions::write()).unwrap();
}

#[test]
fn direct_transfers_of_any_alignment_give_what_cached_ones_give() {
    let folder = folder();
    let mut random = Random(1);
    let mut model = vec![0; 1 << 20];
    let options = FileOptions { direct: true, ..FileOptions::write() };
    let file = ImageFile::create(&folder.path().join("image"), options).unwrap();
    file.set_size(model.len() as u64).unwrap();
    for round in 0..300_u64 {
        let unit = [1, 512, 4096][random.below(3) as usize];
        let start = (random.below(model.len() as u64 / unit) * unit) as usize;
        let length = ((random.below(64 * 1024) / unit + 1) * unit) as usize;
        let end = (start + length).min(model.len());
        if round.is_multiple_of(3) {
            random.fill(&mut model[start..end]);
            file.write_at(start as u64, &model[start..end]).unwrap();
        } else {
            let mut read = vec![0; end - start];
            file.read_at(start as u64, &mut read).unwrap();
            assert!(read == model[start..end], "{start} to {end} in round {round}");
        }
    }
    file.sync().unwrap();
    drop(file);
    assert!(std::fs::read(folder.path().join("image")).unwrap() == model);
}

#[test]
fn holes_are_made_found_and_read_as_zeroes() {
    let folder = folder();
    let file = ImageFile::create(&folder.path().join("image"), FileOptions::write()).unwrap();
    file.write_at(0, &vec![7; 3 << 20]).unwrap();
    let before = file.allocated().unwrap();
    file.write_zeroes(1 << 20, 1 << 20).unwrap();
    assert!(file.allocated().unwrap() < before);
    let first = file.extent(0, 3 << 20).unwrap();
    assert_eq!((first.kind, first.length), (ExtentKind::Data, 1 << 20));
    let second = file.extent(1 << 20, 3 << 20).unwrap();
    assert_eq!((second.kind, second.length), (ExtentKind::Zero, 1 << 20));
    let beyond = file.extent(5 << 20, 4096).unwrap();
    assert_eq!((beyond.kind, beyond.length), (ExtentKind::Zero, 4096));
    let mut read = vec![1; 3 << 20];
    file.read_at(0, &mut read).unwrap();
    let is_hole = |index: usize| (1 << 20..2 << 20).contains(&index);
    assert!(
        read.iter().enumerate().all(|(index, byte)| *byte == if is_hole(index) { 0 } else { 7 })
    );
    // Zeroes beyond the end extend the file.
    file.write_zeroes(3 << 20, 4096).unwrap();
    assert_eq!(file.size().unwrap(), (3 << 20) + 4096);
}

#[test]
fn what_is_no_image_is_refused_with_its_name() {
    let folder = folder();
    let missing = ImageFile::open(&folder.path().join("missing"), FileOptions::read());
    assert!(missing.unwrap_err().to_string().ends_with("missing: cannot open it"));
    let not_a_file = ImageFile::open(folder.path(), FileOptions::read());
    assert!(not_a_file.unwrap_err().to_string().contains("neither a file nor a block device"));
    let path = folder.path().join("image");
    std::fs::write(&path, b"here").unwrap();
    let again = ImageFile::create(&path, FileOptions::write());
    assert!(again.unwrap_err().to_string().contains("exists already"));
    let file = ImageFile::open(&path, FileOptions::read()).unwrap();
    let early = file.read_at(2, &mut [0; 4]).unwrap_err();
    assert!(matches!(early, DiskError::Damaged { .. }), "{early}");
    assert!(matches!(file.write_at(0, b"x"), Err(DiskError::ReadOnly)));
    assert_eq!(FileOptions::read().access, Access::Read);
}
