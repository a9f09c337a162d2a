//! Ways out of the folder.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod client;
use client::{Client, RDONLY, RDWR, ROOT, TRUNC, body, errno, folder, op};
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// A folder with a share in it, a secret beside it.
fn place() -> (tempfile::TempDir, Client) {
    let outer = folder();
    fs::create_dir(outer.path().join("share")).unwrap();
    fs::write(outer.path().join("secret"), "secret").unwrap();
    fs::create_dir(outer.path().join("private")).unwrap();
    fs::write(outer.path().join("private/key"), "key").unwrap();
    let client = Client::new(&outer.path().join("share"));
    (outer, client)
}

#[test]
fn symbolic_links_are_text_and_never_followed() {
    let (outer, client) = place();
    symlink(outer.path(), outer.path().join("share/host-made")).unwrap();
    for target in ["/etc", "..", "../secret", "/proc/self/root", "/proc/self/fd/0"] {
        let (link, _) = client.make_link(ROOT, "out", target).unwrap();
        assert_eq!(client.open(link, RDONLY), Err(errno::PERM));
        assert_eq!(client.ask(op::OPENDIR, link, body().u64(0)), Err(errno::NOTDIR));
        assert_eq!(client.look_up(link, "passwd"), Err(errno::NOTDIR));
        assert_eq!(client.create(link, "made", RDWR, 0o600), Err(errno::NOTDIR));
        assert_eq!(client.create(ROOT, "out", RDWR | TRUNC, 0o600), Err(errno::PERM));
        assert_eq!(client.set(link, 8, 0, 0), Err(errno::PERM), "not truncated through it");
        client.ask(op::UNLINK, ROOT, body().name("out")).unwrap();
    }
    let (link, _) = client.look_up(ROOT, "host-made").unwrap();
    assert_eq!(client.look_up(link, "secret"), Err(errno::NOTDIR));
    assert_eq!(fs::read(outer.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn nothing_is_renamed_or_linked_to_where_the_guest_was_not_told_of() {
    let (outer, client) = place();
    let (node, _) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    for unknown in [0, 99, u64::MAX] {
        assert_eq!(client.rename(ROOT, "a", unknown, "a", 0), Err(errno::STALE));
        assert_eq!(client.rename(unknown, "secret", ROOT, "s", 0), Err(errno::STALE));
        let body = body().u64(unknown).name("b");
        assert_eq!(client.entry(op::LINK, ROOT, body), Err(errno::STALE));
    }
    assert_eq!(client.rename(ROOT, "a", node, "b", 0), Err(errno::NOTDIR));
    assert_eq!(client.rename(ROOT, "a", ROOT, "../a", 0), Err(errno::INVAL));
    assert!(!outer.path().join("a").exists());
}

#[test]
fn a_folder_that_becomes_a_link_on_the_host_is_not_followed() {
    let (outer, client) = place();
    let share = outer.path().join("share");
    let (d, _) = client.make_folder(ROOT, "d", 0o755).unwrap();
    let (key, _) = client.create(d, "key", RDWR, 0o600).unwrap();
    // Push the descriptors of both out.
    for n in 0..200 {
        fs::write(share.join(format!("f{n}")), "").unwrap();
        client.look_up(ROOT, &format!("f{n}")).unwrap();
    }
    fs::remove_dir_all(share.join("d")).unwrap();
    symlink("../private", share.join("d")).unwrap();
    assert_eq!(client.look_up(d, "key").map(drop), Err(errno::STALE));
    assert_eq!(client.open(key, RDONLY), Err(errno::STALE));
    assert_eq!(client.create(d, "new", RDWR, 0o600), Err(errno::STALE));
}

#[test]
fn races_on_the_host_do_not_lead_out() {
    let (outer, client) = place();
    let share = outer.path().join("share");
    fs::create_dir(share.join("d")).unwrap();
    fs::write(share.join("d/key"), "share").unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fs::rename(share.join("d"), share.join("real")).unwrap();
                symlink("../private", share.join("d")).unwrap();
                thread::yield_now();
                fs::remove_file(share.join("d")).unwrap();
                fs::rename(share.join("real"), share.join("d")).unwrap();
            }
        });
        for _ in 0..3000 {
            let Ok((d, _)) = client.look_up(ROOT, "d") else { continue };
            let Ok((key, _)) = client.look_up(d, "key") else { continue };
            if let Ok(handle) = client.open(key, RDONLY) {
                assert_eq!(client.read(handle, 0, 100).unwrap(), b"share");
                client.release(handle).unwrap();
            }
            client.forget(key, 1);
            client.forget(d, 1);
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_procfs_below_the_folder_is_out_of_reach() {
    let client = Client::new("/".as_ref());
    let refused = client.look_up(ROOT, "proc").map(drop);
    assert_eq!(refused, Err(errno::ACCES));
    let entries = client.list(ROOT, 1 << 16, true).unwrap();
    let proc = entries.iter().find(|entry| entry.name == "proc").unwrap();
    assert_eq!(proc.node, 0, "listed, but not told of");
}
