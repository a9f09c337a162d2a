//! What a guest can make the host hold.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod client;
use client::{Client, RDONLY, RDWR, ROOT, body, errno, folder, op, options};
use share::Limits;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counting the process's descriptors needs it to do nothing else.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn descriptors_and_inodes_are_bounded() {
    let _alone = alone();
    let folder = folder();
    for n in 0..300 {
        fs::create_dir(folder.path().join(format!("d{n}"))).unwrap();
        fs::write(folder.path().join(format!("d{n}/f")), n.to_string()).unwrap();
    }
    let limits = Limits { inodes: 501, descriptors: 20, handles: 10 };
    let client = Client::with(&share::Options { limits, ..options(folder.path()) });
    let before = open_descriptors();
    let mut known = Vec::new();
    for n in 0..250 {
        let (d, _) = client.look_up(ROOT, &format!("d{n}")).unwrap();
        let (f, _) = client.look_up(d, "f").unwrap();
        known.push((d, f));
    }
    assert!(open_descriptors() <= before + 21, "{} descriptors", open_descriptors() - before);
    assert_eq!(client.look_up(ROOT, "d299").map(drop), Err(errno::NFILE));
    // Every one of them is still there, whether it has a descriptor or not.
    for (n, &(d, f)) in known.iter().enumerate() {
        let handle = client.open(f, RDONLY).unwrap();
        assert_eq!(client.read(handle, 0, 10).unwrap(), n.to_string().as_bytes());
        client.release(handle).unwrap();
        assert_eq!(client.look_up(d, "f").unwrap().0, f);
        client.forget(f, 1);
    }
    // What moved is found where it is now.
    client.rename(ROOT, "d0", known[1].0, "moved", 0).unwrap();
    client.rename(known[0].0, "f", ROOT, "g", 0).unwrap();
    for &(_, file) in known.iter().skip(2) {
        client.get_attributes(file).unwrap();
    }
    let handle = client.open(known[0].1, RDONLY).unwrap();
    assert_eq!(client.read(handle, 0, 10).unwrap(), b"0");
    client.release(handle).unwrap();
    client.forget(known[0].1, 1);
    assert_eq!(client.get_attributes(known[0].1), Err(errno::STALE));
    client.look_up(ROOT, "d299").unwrap();
    let refused = client.make_folder(ROOT, "one-too-many", 0o755).map(drop);
    assert_eq!(refused, Err(errno::NFILE));
    assert!(!folder.path().join("one-too-many").exists(), "nothing was made for nothing");
    client.ask(op::DESTROY, ROOT, body()).unwrap();
    assert!(open_descriptors() <= before, "all is closed at the end");
}

#[test]
fn open_files_are_bounded() {
    let _alone = alone();
    let folder = folder();
    let limits = Limits { inodes: 1000, descriptors: 20, handles: 10 };
    let client = Client::with(&share::Options { limits, ..options(folder.path()) });
    let before = open_descriptors();
    for n in 0..10 {
        client.create(ROOT, &format!("g{n}"), RDWR, 0o600).unwrap();
    }
    let refused = client.create(ROOT, "one-too-many", RDWR, 0o600);
    assert_eq!(refused, Err(errno::NFILE));
    assert!(!folder.path().join("one-too-many").exists(), "nothing was made for nothing");
    assert_eq!(client.ask(op::OPENDIR, ROOT, body().u64(0)), Err(errno::NFILE));
    client.ask(op::DESTROY, ROOT, body()).unwrap();
    assert!(open_descriptors() <= before, "all is closed at the end");
}

#[test]
fn files_without_a_name_are_kept_up_to_the_limit() {
    let _alone = alone();
    let folder = folder();
    let limits = Limits { inodes: 1000, descriptors: 20, handles: 10 };
    let client = Client::with(&share::Options { limits, ..options(folder.path()) });
    let before = open_descriptors();
    for n in 0..200 {
        let (_, handle) = client.create(ROOT, &format!("f{n}"), RDWR, 0o600).unwrap();
        client.release(handle).unwrap();
        client.ask(op::UNLINK, ROOT, body().name(&format!("f{n}"))).unwrap();
    }
    assert!(open_descriptors() <= before + 41, "{} descriptors", open_descriptors() - before);
}
