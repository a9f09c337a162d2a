//! What programs in the guest do with files.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod client;
use client::{APPEND, Client, EXCL, RDONLY, RDWR, ROOT, TRUNC, WRONLY, body, errno, op};
use client::{folder, options, request, u32_at, u64_at};
use share::{MAX_DATA, Owner, Server, ShareError};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::{fs, thread};

const REGULAR: u32 = 0o100000;

#[test]
fn a_file_that_the_guest_makes_is_one_on_the_host() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (node, handle) = client.create(ROOT, "a", RDWR, 0o666).unwrap();
    assert_eq!(client.write(handle, 0, b"hello"), Ok(5));
    assert_eq!(client.read(handle, 1, 100).unwrap(), b"ello");
    assert_eq!(client.ask(op::FSYNC, node, body().u64(handle).u32(0).u32(0)), Ok(vec![]));
    assert_eq!(client.ask(op::FSYNC, node, body().u64(handle).u32(1).u32(0)), Ok(vec![]));
    assert_eq!(client.ask(op::SYNCFS, ROOT, body().u64(0)), Ok(vec![]));
    client.release(handle).unwrap();
    assert_eq!(client.read(handle, 0, 1), Err(errno::BADF));
    let on_host = folder.path().join("a");
    assert_eq!(fs::read(&on_host).unwrap(), b"hello");
    // Whatever this process's umask is: the guest's kernel has applied its own.
    assert_eq!(fs::metadata(&on_host).unwrap().mode() & 0o7777, 0o666);
    let (again, found) = client.look_up(ROOT, "a").unwrap();
    assert_eq!((again, found.size, found.mode, found.links), (node, 5, REGULAR | 0o666, 1));
    assert_eq!(client.create(ROOT, "a", RDWR | EXCL, 0o600), Err(errno::EXIST));
    let (same, handle) = client.create(ROOT, "a", WRONLY | TRUNC, 0o600).unwrap();
    assert_eq!((same, client.get_attributes(node).unwrap().size), (node, 0));
    assert_eq!(client.read(handle, 0, 1), Err(errno::BADF), "opened for writing only");
}

#[test]
fn folders_links_and_special_files_are_made_and_removed() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (d, found) = client.make_folder(ROOT, "d", 0o777).unwrap();
    assert_eq!(found.mode, 0o40777);
    let (link, found) = client.make_link(d, "link", "../anywhere/at all").unwrap();
    assert_eq!(found.mode & 0o170000, 0o120000);
    assert_eq!(client.ask(op::READLINK, link, body()).unwrap(), b"../anywhere/at all");
    assert_eq!(client.ask(op::READLINK, d, body()), Err(errno::INVAL));
    let fifo = body().u32(0o010644).u32(0).u32(0).u32(0).name("fifo");
    let (fifo, found) = client.entry(op::MKNOD, d, fifo).unwrap();
    assert_eq!(found.mode, 0o010644);
    assert_eq!(client.open(fifo, RDONLY), Err(errno::PERM), "opening it would wait for ever");
    assert_eq!(client.create(d, "fifo", RDWR, 0o644), Err(errno::PERM));
    for device in [0o020600, 0o060600] {
        let body = body().u32(device).u32(0x0103).u32(0).u32(0).name("device");
        assert_eq!(client.entry(op::MKNOD, d, body), Err(errno::PERM));
    }
    assert_eq!(client.ask(op::RMDIR, ROOT, body().name("d")), Err(errno::NOTEMPTY));
    assert_eq!(client.ask(op::UNLINK, ROOT, body().name("d")), Err(errno::ISDIR));
    assert_eq!(client.ask(op::UNLINK, d, body().name("link")), Ok(vec![]));
    assert_eq!(client.ask(op::UNLINK, d, body().name("fifo")), Ok(vec![]));
    assert_eq!(client.ask(op::UNLINK, d, body().name("fifo")), Err(errno::NOENT));
    assert_eq!(client.ask(op::RMDIR, ROOT, body().name("d")), Ok(vec![]));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn renaming_replaces_refuses_or_exchanges_as_asked() {
    const NO_REPLACE: u32 = 1;
    const EXCHANGE: u32 = 2;
    const WHITEOUT: u32 = 4;
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    let read = |name: &str| fs::read_to_string(path(name)).unwrap();
    let client = Client::new(folder.path());
    fs::write(path("a"), "a").unwrap();
    fs::write(path("b"), "b").unwrap();
    let (d, _) = client.make_folder(ROOT, "d", 0o755).unwrap();
    assert_eq!(client.rename(ROOT, "a", ROOT, "b", NO_REPLACE), Err(errno::EXIST));
    assert_eq!(client.rename(ROOT, "a", ROOT, "b", WHITEOUT), Err(errno::INVAL));
    assert_eq!(client.rename(ROOT, "a", ROOT, "b", 0x100), Err(errno::INVAL));
    client.rename(ROOT, "a", ROOT, "b", EXCHANGE).unwrap();
    assert_eq!((read("a"), read("b")), ("b".into(), "a".into()));
    client.rename(ROOT, "a", d, "a", NO_REPLACE).unwrap();
    client.rename(ROOT, "b", d, "a", 0).unwrap();
    assert_eq!(read("d/a"), "a");
    // RENAME without flags, as Linux asks for a plain one.
    let body = body().u64(ROOT).name("a").name("c");
    client.ask(12, d, body).unwrap();
    assert_eq!(read("c"), "a");
}

#[test]
fn an_open_file_outlives_its_name() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (node, handle) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    client.write(handle, 0, b"still here").unwrap();
    client.ask(op::UNLINK, ROOT, body().name("a")).unwrap();
    assert_eq!(client.read(handle, 0, 100).unwrap(), b"still here");
    assert_eq!(client.get_attributes(node).unwrap().links, 0);
    // Replaced by a rename, and pushed out of the descriptors by others.
    let (old, old_handle) = client.create(ROOT, "b", RDWR, 0o600).unwrap();
    client.write(old_handle, 0, b"old").unwrap();
    fs::write(folder.path().join("new"), "new").unwrap();
    client.rename(ROOT, "new", ROOT, "b", 0).unwrap();
    for n in 0..200 {
        fs::write(folder.path().join(format!("f{n}")), "").unwrap();
        client.look_up(ROOT, &format!("f{n}")).unwrap();
    }
    assert_eq!(client.read(old_handle, 0, 100).unwrap(), b"old");
    client.release(old_handle).unwrap();
    let again = client.open(old, RDONLY).unwrap();
    assert_eq!(client.read(again, 0, 100).unwrap(), b"old", "the guest knows it by its number");
    assert_eq!(client.set(old, 1, 0, 0o640).unwrap().mode, REGULAR | 0o640);
}

#[test]
fn attributes_are_changed_as_chmod_truncate_and_utimens_do() {
    const MODE: u32 = 1;
    const SIZE: u32 = 8;
    const TIMES: u32 = 0x30;
    const NOW: u32 = 0x180;
    let folder = folder();
    let client = Client::new(folder.path());
    let (node, handle) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    client.write(handle, 0, &[1; 100]).unwrap();
    assert_eq!(client.set(node, MODE, 0, 0o751).unwrap().mode, REGULAR | 0o751);
    assert_eq!(client.set(node, SIZE, 10, 0).unwrap().size, 10);
    assert_eq!(client.set(node, SIZE, 1 << 40, 0).unwrap().size, 1 << 40, "sparse");
    assert_eq!(client.set(node, TIMES, 0, 0).unwrap().modified, 5678);
    assert!(client.set(node, NOW | 0x30, 0, 0).unwrap().modified > 1_000_000_000);
    let host = fs::metadata(folder.path().join("a")).unwrap();
    assert_eq!((host.len(), host.permissions().mode() & 0o7777), (1 << 40, 0o751));
    let (link, _) = client.make_link(ROOT, "link", "a").unwrap();
    assert_eq!(client.set(link, TIMES, 0, 0).unwrap().modified, 5678, "the link's own");
    assert!(client.get_attributes(node).unwrap().modified > 1_000_000_000);
    assert_eq!(client.set(link, MODE, 0, 0o600), Err(errno::OPNOTSUPP));
    let bad = body().u32(0x20).u32(0).u64(0).u64(0).u64(0).u64(0).u64(1).u64(0).u32(0);
    let bad = bad.u32(1_000_000_000).u32(0).u32(0).bytes(&[0; 16]);
    assert_eq!(client.ask(op::SETATTR, node, bad), Err(errno::INVAL), "no such nanosecond");
}

#[test]
fn set_user_id_programs_cannot_be_left_on_the_host() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (node, _) = client.create(ROOT, "a", RDWR, 0o6755).unwrap();
    assert_eq!(client.get_attributes(node).unwrap().mode, REGULAR | 0o755);
    assert_eq!(client.set(node, 1, 0, 0o6711).unwrap().mode, REGULAR | 0o711);
    let body = body().u32(REGULAR | 0o4755).u32(0).u32(0).u32(0).name("b");
    assert_eq!(client.entry(op::MKNOD, ROOT, body).unwrap().1.mode, REGULAR | 0o755);
    let (_, found) = client.make_folder(ROOT, "d", 0o2775).unwrap();
    assert_eq!(found.mode, 0o42775, "a folder's group may be passed on");
    // What the host made loses the bits when the guest writes to it as an ordinary user.
    let host = folder.path().join("host");
    fs::write(&host, "x").unwrap();
    fs::set_permissions(&host, fs::Permissions::from_mode(0o4755)).unwrap();
    let (node, _) = client.look_up(ROOT, "host").unwrap();
    let handle = client.open(node, WRONLY).unwrap();
    client.write_with(handle, 0, b"y", 4, 0).unwrap();
    assert_eq!(client.get_attributes(node).unwrap().mode, REGULAR | 0o755);
}

#[test]
fn everything_belongs_to_one_owner_and_chown_leaves_it_so() {
    let folder = folder();
    let owner = Some(Owner { uid: 1234, gid: 4321 });
    let client = Client::with(&share::Options { owner, ..options(folder.path()) });
    let (node, _) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    let found = client.get_attributes(node).unwrap();
    assert_eq!((found.uid, found.gid), (1234, 4321));
    let found = client.set(node, 6, 0, 0).unwrap();
    assert_eq!((found.uid, found.gid), (1234, 4321));
    let host = fs::metadata(folder.path().join("a")).unwrap();
    assert_eq!(host.uid(), fs::metadata(folder.path()).unwrap().uid());
}

#[test]
fn writes_append_where_the_guest_appends() {
    const FROM_PAGE_CACHE: u32 = 1;
    let folder = folder();
    let client = Client::new(folder.path());
    let (_, handle) = client.create(ROOT, "a", RDWR | APPEND, 0o600).unwrap();
    client.write(handle, 0, b"0123").unwrap();
    // The host has added something that the guest does not know of yet.
    fs::write(folder.path().join("a"), "0123host").unwrap();
    client.write_with(handle, 4, b"guest", 0, APPEND).unwrap();
    // A page of a memory map is written through whatever handle there is, to its place.
    client.write_with(handle, 0, b"ABCD", FROM_PAGE_CACHE, APPEND).unwrap();
    assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"ABCDhostguest");
}

#[test]
fn large_files_are_read_and_written_whole() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (_, handle) = client.create(ROOT, "large", RDWR, 0o600).unwrap();
    let data: Vec<u8> = (0..MAX_DATA).map(|n| (n * 7 + n / 251) as u8).collect();
    for n in 0..8 {
        assert_eq!(client.write(handle, n * MAX_DATA as u64, &data), Ok(MAX_DATA as u32));
    }
    assert_eq!(client.write(handle, 5 << 40, b"far"), Ok(3));
    for n in 0..8 {
        assert!(client.read(handle, n * MAX_DATA as u64, MAX_DATA as u32).unwrap() == data);
    }
    assert_eq!(client.read(handle, 5 << 40, 4096).unwrap(), b"far");
    let seek = |offset: u64, whence: u32| {
        let reply = client.ask(op::LSEEK, ROOT, body().u64(handle).u64(offset).u32(whence).u32(0));
        reply.map(|reply| u64_at(&reply, 0))
    };
    assert_eq!(seek(0, 4), Ok(8 << 20), "the hole");
    assert_eq!(seek(9 << 20, 3), Ok(5 << 40), "the data after it");
    assert_eq!(seek(0, 0), Err(errno::INVAL));
    let fallocate = |offset: u64, length: u64, mode: u32| {
        let body = body().u64(handle).u64(offset).u64(length).u32(mode).u32(0);
        client.ask(op::FALLOCATE, ROOT, body)
    };
    fallocate(0, 1 << 20, 3).unwrap();
    assert_eq!(client.read(handle, 0, 4).unwrap(), [0; 4], "punched out");
    assert_eq!(fallocate(0, 4096, 8), Err(errno::OPNOTSUPP));
    let (_, other) = client.create(ROOT, "copy", RDWR, 0o600).unwrap();
    let copy = body().u64(handle).u64(1 << 20).u64(ROOT).u64(other).u64(3).u64(1000).u64(0);
    assert_eq!(u32_at(&client.ask(op::COPY_FILE_RANGE, ROOT, copy).unwrap(), 0), 1000);
    assert!(client.read(other, 3, 2000).unwrap() == data[..1000]);
}

#[test]
fn listing_a_folder_finds_each_entry_once_in_replies_of_any_size() {
    let folder = folder();
    for n in 0..500 {
        fs::write(folder.path().join(format!("{n:0>width$}", width = 1 + n % 200)), "").unwrap();
    }
    fs::create_dir(folder.path().join("folder")).unwrap();
    let client = Client::new(folder.path());
    let mut names: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    for (size, plus) in [(4096, false), (100_000, false), (4096, true), (1 << 20, true)] {
        let mut entries = client.list(ROOT, size, plus).unwrap();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let dots: Vec<_> = entries.extract_if(.., |e| e.name.starts_with('.')).collect();
        assert_eq!(dots.len(), 2);
        assert!(dots.iter().all(|e| e.node == 0 && e.kind == 4), "they count as no lookup");
        assert!(entries.iter().map(|e| &e.name[..]).eq(names.iter().map(|n| n.to_str().unwrap())));
        for entry in &entries {
            assert_eq!(entry.kind, if entry.name == "folder" { 4 } else { 8 });
            if plus {
                assert_eq!(client.look_up(ROOT, &entry.name).unwrap().0, entry.node);
            }
        }
    }
    let handle = u64_at(&client.ask(op::OPENDIR, ROOT, body().u32(0).u32(0)).unwrap(), 0);
    let first = client.read_folder(ROOT, handle, 0, 4096, false).unwrap();
    let middle = client.read_folder(ROOT, handle, first[3].next, 4096, false).unwrap();
    assert_eq!(middle[0].name, first[4].name, "a position is one");
    assert_eq!(client.read_folder(ROOT, handle, 0, 20, false), Err(errno::INVAL));
    assert_eq!(client.read_folder(ROOT, 999, 0, 4096, false), Err(errno::BADF));
    assert_eq!(client.read(handle, 0, 10), Err(errno::BADF), "a folder is no file");
}

#[test]
fn user_attributes_are_kept_and_all_others_refused() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (node, _) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    let set = |name: &str, value: &[u8], flags: u32| {
        let head = body().u32(value.len() as u32).u32(flags);
        client.ask(op::SETXATTR, node, head.name(name).bytes(value))
    };
    let get =
        |name: &str, size: u32| client.ask(op::GETXATTR, node, body().u32(size).u32(0).name(name));
    set("user.one", b"value", 0).unwrap();
    set("user.two", b"", 1).unwrap();
    assert_eq!(set("user.one", b"x", 1), Err(errno::EXIST));
    assert_eq!(set("user.none", b"x", 2), Err(errno::NODATA));
    assert_eq!(u32_at(&get("user.one", 0).unwrap(), 0), 5);
    assert_eq!(get("user.one", 64).unwrap(), b"value");
    assert_eq!(get("user.one", 3), Err(34), "ERANGE");
    for name in ["security.capability", "system.posix_acl_access", "trusted.overlay.opaque", "a"] {
        assert_eq!(set(name, b"x", 0), Err(errno::OPNOTSUPP));
        assert_eq!(get(name, 64), Err(errno::OPNOTSUPP));
    }
    let list = client.ask(op::LISTXATTR, node, body().u32(1000).u32(0)).unwrap();
    assert_eq!(list, b"user.one\0user.two\0");
    let size = client.ask(op::LISTXATTR, node, body().u32(0).u32(0)).unwrap();
    assert_eq!(u32_at(&size, 0) as usize, list.len());
    client.ask(op::REMOVEXATTR, node, body().name("user.one")).unwrap();
    assert_eq!(get("user.one", 64), Err(errno::NODATA));
    let (link, _) = client.make_link(ROOT, "link", "a").unwrap();
    let through = client.ask(op::LISTXATTR, link, body().u32(1000).u32(0));
    assert_eq!(through, Err(errno::OPNOTSUPP), "a link is not followed");
}

#[test]
fn hard_links_are_one_inode() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (node, _) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    let (other, found) = client.entry(op::LINK, ROOT, body().u64(node).name("b")).unwrap();
    assert_eq!((other, found.links), (node, 2));
    let (link, _) = client.make_link(ROOT, "l", "/etc/passwd").unwrap();
    let (same, found) = client.entry(op::LINK, ROOT, body().u64(link).name("m")).unwrap();
    assert_eq!((same, found.links, found.mode & 0o170000), (link, 2, 0o120000));
    let (d, _) = client.make_folder(ROOT, "d", 0o755).unwrap();
    assert_eq!(client.entry(op::LINK, ROOT, body().u64(d).name("e")), Err(errno::PERM));
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let folder = folder();
    fs::write(folder.path().join("a"), "content").unwrap();
    let client = Client::with(&share::Options { read_only: true, ..options(folder.path()) });
    let (node, _) = client.look_up(ROOT, "a").unwrap();
    let handle = client.open(node, RDONLY).unwrap();
    assert_eq!(client.read(handle, 0, 100).unwrap(), b"content");
    for flags in [WRONLY, RDWR, RDONLY | TRUNC] {
        assert_eq!(client.open(node, flags), Err(errno::ROFS));
    }
    assert_eq!(client.create(ROOT, "a", RDONLY, 0o600), Err(errno::ROFS));
    assert_eq!(client.write(handle, 0, b"x"), Err(errno::ROFS));
    assert_eq!(client.set(node, 1, 0, 0o600), Err(errno::ROFS));
    assert_eq!(client.make_folder(ROOT, "d", 0o755), Err(errno::ROFS));
    assert_eq!(client.make_link(ROOT, "l", "a"), Err(errno::ROFS));
    assert_eq!(client.rename(ROOT, "a", ROOT, "b", 0), Err(errno::ROFS));
    assert_eq!(client.ask(op::UNLINK, ROOT, body().name("a")), Err(errno::ROFS));
    assert_eq!(client.entry(op::LINK, ROOT, body().u64(node).name("b")), Err(errno::ROFS));
    assert_eq!(client.ask(op::STATFS, ROOT, body()).unwrap().len(), 80);
    assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"content");
}

#[test]
fn several_threads_serve_one_session() {
    let folder = folder();
    let client = Client::new(folder.path());
    thread::scope(|scope| {
        for t in 0..4 {
            let client = &client;
            scope.spawn(move || {
                for n in 0..100 {
                    let name = format!("{t}-{n}");
                    let (node, handle) = client.create(ROOT, &name, RDWR, 0o600).unwrap();
                    client.write(handle, 0, name.as_bytes()).unwrap();
                    client.rename(ROOT, &name, ROOT, &format!("new-{name}"), 0).unwrap();
                    assert_eq!(client.read(handle, 0, 100).unwrap(), name.as_bytes());
                    client.release(handle).unwrap();
                    client.forget(node, 1);
                }
            });
        }
    });
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 400);
}

#[test]
fn a_session_goes_on_after_a_restore() {
    let folder = folder();
    let client = Client::new(folder.path());
    let (d, _) = client.make_folder(ROOT, "d", 0o755).unwrap();
    let (node, handle) = client.create(d, "a", RDWR, 0o600).unwrap();
    client.write(handle, 0, b"content").unwrap();
    let listing = u64_at(&client.ask(op::OPENDIR, d, body().u32(0).u32(0)).unwrap(), 0);
    let (gone, gone_handle) = client.create(ROOT, "gone", RDWR, 0o600).unwrap();
    let state = client.server.save();
    fs::remove_file(folder.path().join("gone")).unwrap();

    let restored = Client { server: Server::new(&options(folder.path())).unwrap() };
    restored.server.restore(&state).unwrap();
    assert_eq!(restored.read(handle, 0, 100).unwrap(), b"content");
    assert_eq!(restored.read_folder(d, listing, 0, 4096, false).unwrap().len(), 3);
    assert_eq!(restored.look_up(d, "a").unwrap().0, node, "numbers stay what they were");
    assert_eq!(restored.get_attributes(gone), Err(errno::STALE));
    assert_eq!(restored.read(gone_handle, 0, 1), Err(errno::BADF));
    let (new, new_handle) = restored.create(ROOT, "new", RDWR, 0o600).unwrap();
    assert!(new > gone && new_handle > gone_handle, "and none is used twice");
    restored.forget(node, 2);
    assert_eq!(restored.get_attributes(node), Err(errno::STALE));
    for cut in 0..state.len() {
        assert!(restored.server.restore(&state[..cut]).is_err(), "cut off at {cut}");
    }
}

#[test]
fn a_session_begins_with_an_agreement() {
    let folder = folder();
    let client = Client { server: Server::new(&options(folder.path())).unwrap() };
    assert_eq!(client.get_attributes(ROOT), Err(errno::IO), "not before");
    assert_eq!(client.init(7, 30), Err(errno::PROTO));
    assert_eq!(client.init(6, 99), Err(errno::PROTO));
    assert_eq!(u32_at(&client.init(8, 0).unwrap(), 0), 7, "the guest asks again");
    assert_eq!(client.get_attributes(ROOT), Err(errno::IO));
    let reply = client.init(7, 31).unwrap();
    let flags = u32_at(&reply, 12);
    assert_eq!(flags & (1 << 16), 0, "no write-back cache");
    assert_eq!(flags & (1 << 4), 0, "no lookups of ..");
    assert_eq!(u32_at(&reply, 20) as usize, MAX_DATA);
    let (node, _) = client.create(ROOT, "a", RDWR, 0o600).unwrap();
    client.ask(op::DESTROY, ROOT, body()).unwrap();
    assert_eq!(client.get_attributes(ROOT), Err(errno::IO));
    client.init(7, 38).unwrap();
    assert_eq!(client.get_attributes(node), Err(errno::STALE), "a new session knows nothing");
    assert_eq!(client.ask(9999, ROOT, body()), Err(errno::NOSYS));
    assert!(client.raw(&request(36, ROOT, &body().u64(1)), 100).is_empty(), "INTERRUPT");
}

#[test]
fn a_folder_that_cannot_be_shared_is_refused_with_the_fix() {
    let folder = folder();
    let missing = Server::new(&options(&folder.path().join("none"))).err().unwrap();
    assert!(matches!(&missing, ShareError::Folder { .. }), "{missing}");
    assert!(missing.to_string().contains("give a folder that exists"), "{missing}");
    fs::write(folder.path().join("file"), "").unwrap();
    assert!(Server::new(&options(&folder.path().join("file"))).is_err());
    let procfs = Server::new(&options("/proc".as_ref())).err().unwrap();
    assert!(matches!(procfs, ShareError::Procfs(_)));
}
