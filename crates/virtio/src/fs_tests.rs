use super::*;
use crate::testing::TestGuest;
use share::{Limits, Options};
use std::fs;
use std::path::Path;

fn device(folder: &Path) -> FileSystem {
    let limits = Limits { inodes: 100, descriptors: 16, handles: 16 };
    let options = Options { folder: folder.to_owned(), read_only: false, owner: None, limits };
    FileSystem::new(Tag::new("share0").unwrap(), Arc::new(Server::new(&options).unwrap()))
}

/// A FUSE request.
fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = (40 + body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.resize(40, 0);
    bytes.extend(body);
    bytes
}

fn init(guest: &mut TestGuest) {
    let mut body = [0xff; 64];
    body[..8].copy_from_slice(&[7, 0, 0, 0, 38, 0, 0, 0]);
    let reply = guest.request(1, &[&request(26, 0, &body)], &[80]);
    assert_eq!(reply[..8], [80, 0, 0, 0, 0, 0, 0, 0]);
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

#[test]
fn the_guest_reads_the_tag_and_the_number_of_queues() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = device(folder.path());
    let mut space = [0xff; 44];
    device.read_config(0, &mut space);
    assert_eq!(&space[..7], b"share0\0");
    assert_eq!(space[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(Tag::new("").is_err() && Tag::new("a\0").is_err());
    assert!(Tag::new(&"t".repeat(36)).is_ok() && Tag::new(&"t".repeat(37)).is_err());
}

#[test]
fn requests_in_any_cut_of_buffers_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = device(folder.path());
    let mut guest = TestGuest::with(&mut device);
    init(&mut guest);
    let mut create = vec![2, 0, 0, 0, 0xa4, 0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    create.extend(b"file\0");
    let create = request(35, 1, &create);
    let reply = guest.request(1, &[&create[..40], &create[40..43], &create[43..]], &[16, 100, 44]);
    assert_eq!(reply[4..8], [0; 4]);
    let handle = number(&reply[144..]);
    let mut write = handle.to_le_bytes().to_vec();
    write.extend([0; 8]);
    write.extend([5, 0, 0, 0]);
    write.resize(40, 0);
    guest.request(1, &[&request(16, 2, &[&write[..], b"hello"].concat())], &[24]);
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"hello");
    // FORGET on the queue of its own has no reply.
    guest.request(0, &[&request(2, 2, &1u64.to_le_bytes())], &[]);
    let reply = guest.request(1, &[&request(3, 2, &[0; 16])], &[120]);
    assert_eq!(reply[4..8], (-116i32).to_le_bytes(), "forgotten");
    assert!(!guest.transport.failed());
    guest.deactivate(&mut device);
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = device(folder.path());
    let mut guest = TestGuest::with(&mut device);
    init(&mut guest);
    let attributes = request(3, 1, &[0; 16]);
    for _ in 0..20 {
        for _ in 0..50 {
            guest.queues[1].add(&[&attributes], &[120]);
            guest.notify(1);
        }
        for _ in 0..50 {
            while guest.queues[1].take_used().is_none() {
                guest.transport.wait_used(1);
            }
        }
    }
    guest.deactivate(&mut device);
}

#[test]
fn a_session_survives_a_pause_and_a_restore_and_ends_with_a_reset() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "content").unwrap();
    let mut old = device(folder.path());
    let mut guest = TestGuest::with(&mut old);
    init(&mut guest);
    let found = guest.request(1, &[&request(1, 1, b"file\0")], &[144]);
    let node = number(&found[16..]);
    guest.deactivate(&mut old);
    guest.activate(&mut old);
    let attributes = request(3, node, &[0; 16]);
    assert_eq!(guest.request(1, &[&attributes], &[120])[4..8], [0; 4]);
    guest.deactivate(&mut old);
    let mut state = SavedState::new("virtio", 1);
    old.save(&mut state);

    let mut new = device(folder.path());
    let mut reader = state.reader("virtio", 1).unwrap();
    new.restore(&mut reader).unwrap();
    reader.finish().unwrap();
    guest.activate(&mut new);
    assert_eq!(guest.request(1, &[&attributes], &[120])[4..8], [0; 4]);
    guest.deactivate(&mut new);
    new.reset();
    guest.activate(&mut new);
    assert_ne!(guest.request(1, &[&attributes], &[120])[4..8], [0; 4], "no session");
    guest.deactivate(&mut new);

    let mut damaged = SavedState::new("virtio", 1);
    damaged.put("fs_session", &vec![1u8; 11]);
    let refused = new.restore(&mut damaged.reader("virtio", 1).unwrap());
    assert!(matches!(refused, Err(RestoreError::Range { .. })));
}

#[test]
fn requests_that_are_none_are_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = device(folder.path());
    let mut guest = TestGuest::with(&mut device);
    init(&mut guest);
    for (readable, room) in [(0, 64), (39, 64), (40, 0), (40, 15), (64, 16), (4000, 100)] {
        let bytes = vec![0x55; readable];
        let writable: &[usize] = if room == 0 { &[] } else { &[room] };
        guest.request(1, &[&bytes], writable);
    }
    assert!(!guest.transport.failed(), "a bad request is not a broken ring");
    guest.deactivate(&mut device);
}
