//! Requests that are not what they should be.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod client;
mod fuzzing;
use client::{Client, RDWR, ROOT, body, errno, folder, op, request, u32_at};
use share::MAX_REQUEST;

#[test]
fn random_requests_neither_stop_the_server_nor_leave_the_folder() {
    let place = fuzzing::Place::new(env!("CARGO_TARGET_TMPDIR").as_ref());
    for seed in 0..40 {
        place.attack(seed, 1000);
        place.check();
    }
}

#[test]
fn requests_cut_off_at_any_byte_are_invalid() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (node, handle) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    let whole = [
        request(op::LOOKUP, ROOT, &body().name("a")),
        request(op::SETATTR, node, &body().bytes(&[0; 88])),
        request(op::WRITE, node, &body().u64(handle).u64(0).u32(5).bytes(&[0; 20]).name("five")),
        request(op::RENAME2, ROOT, &body().u64(ROOT).u64(0).name("a").name("b")),
        request(op::SETXATTR, node, &body().u32(2).u32(0).name("user.a").name("b")),
        request(op::CREATE, ROOT, &body().u64(0).u64(0).name("c")),
        request(op::INIT, 0, &body().u32(7).u32(38).u32(0).u32(0)),
    ];
    for whole in whole {
        for cut in 0..whole.len() {
            // Cut off, and cut off with a length that says so.
            let reply = client.raw(&whole[..cut], 4096);
            assert!(if cut < 40 { reply.is_empty() } else { u32_at(&reply, 4) as i32 == -22 });
            let mut shorter = whole[..cut].to_vec();
            if cut >= 40 {
                shorter[..4].copy_from_slice(&(cut as u32).to_le_bytes());
                let error = u32_at(&client.raw(&shorter, 4096), 4) as i32;
                assert_eq!(error, -errno::INVAL, "{cut} of {whole:?}");
            }
        }
    }
}

#[test]
fn names_that_are_not_one_component_are_refused() {
    let folder = folder();
    let client = Client::new(folder.path());
    for name in ["", ".", "..", "a/b", "/", "../a", "a/"] {
        assert_eq!(client.look_up(ROOT, name), Err(errno::INVAL), "{name:?}");
        assert_eq!(client.create(ROOT, name, RDWR, 0o600), Err(errno::INVAL));
        assert_eq!(client.make_folder(ROOT, name, 0o700), Err(errno::INVAL));
        assert_eq!(client.make_link(ROOT, name, "x"), Err(errno::INVAL));
        assert_eq!(client.ask(op::UNLINK, ROOT, body().name(name)), Err(errno::INVAL));
        assert_eq!(client.rename(ROOT, name, ROOT, "x", 0), Err(errno::INVAL));
    }
    assert_eq!(client.look_up(ROOT, &"n".repeat(256)), Err(errno::NAMETOOLONG));
    assert_eq!(client.make_link(ROOT, "l", &"t".repeat(4096)), Err(errno::NAMETOOLONG));
    assert_eq!(client.make_link(ROOT, "l", ""), Err(errno::NOENT));
}

#[test]
fn replies_keep_to_the_room_that_the_guest_gave() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (_, handle) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    client.write(handle, 0, &[7; 5000]).unwrap();
    let read = body().u64(handle).u64(0).u32(u32::MAX).u32(0).u64(0).u64(0);
    let reply = client.raw(&request(op::READ, ROOT, &read), 1016);
    assert_eq!((reply.len(), u32_at(&reply, 4)), (1016, 0));
    let look_up = request(op::LOOKUP, ROOT, &body().name("a"));
    let reply = client.raw(&look_up, 100);
    assert_eq!((reply.len(), u32_at(&reply, 4) as i32), (16, -errno::IO));
    assert!(client.raw(&look_up, 15).is_empty(), "not even an error has room");
    let count = request(op::BATCH_FORGET, 0, &body().u32(u32::MAX).u32(0).u64(9).u64(9));
    assert!(client.raw(&count, 4096).is_empty());
    let large = vec![0; MAX_REQUEST + 1];
    let mut large = request(op::WRITE, ROOT, &body().bytes(&large));
    assert_eq!(u32_at(&client.raw(&large, 4096), 4) as i32, -errno::INVAL);
    large.truncate(40);
}
