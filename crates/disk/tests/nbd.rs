//! The NBD client against QEMU's server, and against servers that lack things, lie, or go away.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/formats.rs"]
mod formats;
#[path = "support/nbd_server.rs"]
mod nbd_server;
#[path = "support/recording.rs"]
mod recording;
mod support;

use disk::nbd::{Nbd, Options, Url};
use disk::{Access, Disk, DiskError, ExtentKind};
use nbd_server::{Behaviour, Server};
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A running `qemu-nbd`.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(arguments: &[&str]) -> Self {
        Self(support::qemu_command("qemu-nbd").arg("-t").args(arguments).spawn().unwrap())
    }

    /// Connects as soon as the server listens.
    fn connect(&mut self, url: &str, access: Access) -> Nbd {
        loop {
            match Nbd::open(&url.parse().unwrap(), Options::new(access)) {
                Ok(disk) => return disk,
                Err(error) => {
                    let error = chain(&error);
                    assert!(error.contains("cannot connect"), "{error}");
                    assert!(self.0.try_wait().unwrap().is_none(), "qemu-nbd ended: {error}");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn url(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn chain(error: &DiskError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {source}")
}

fn open(socket: &Path) -> Result<Nbd, DiskError> {
    let url: Url = url(socket, "").parse().unwrap();
    Nbd::open(&url, Options::new(Access::Write))
}

#[test]
fn what_is_written_to_qemus_server_is_read_back_and_in_its_image() {
    let folder = support::folder();
    let (raw, socket) = (folder.path().join("disk.raw"), folder.path().join("socket"));
    let size = 9 * MIB + 512;
    fs::write(&raw, vec![0; size as usize]).unwrap();
    let (image, name) = (raw.to_str().unwrap(), socket.to_str().unwrap());
    let arguments = ["-f", "raw", "-k", name, "-x", "an export", "-e", "4"];
    let mut server = QemuNbd::start(&[&arguments[..], &["--discard=unmap", image]].concat());
    let disk = server.connect(&url(&socket, "an%20export"), Access::Write);
    assert_eq!(disk.size(), size);
    let mut model = vec![0; size as usize];
    formats::use_at_random(&disk, &mut model, 150, 3);
    disk.flush().unwrap();
    assert!(formats::read_all(&disk) == model);
    drop(disk);
    assert!(fs::read(&raw).unwrap() == model);
}

#[test]
fn tcp_works_as_sockets_do() {
    let folder = support::folder();
    let raw = folder.path().join("disk.raw");
    fs::write(&raw, vec![9; MIB as usize]).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let port_text = port.to_string();
    let image = raw.to_str().unwrap();
    let mut server =
        QemuNbd::start(&["-f", "raw", "-b", "127.0.0.1", "-p", &port_text, "-r", image]);
    let disk = server.connect(&format!("nbd://127.0.0.1:{port}"), Access::Write);
    assert!(formats::read_all(&disk) == vec![9; MIB as usize]);
    assert!(disk.read_only(), "the server has it read-only");
    assert!(matches!(disk.write_at(0, &[1]), Err(DiskError::ReadOnly)));
}

#[test]
fn holes_of_an_image_on_a_server_are_holes_here() {
    let folder = support::folder();
    let (image, socket) = (folder.path().join("disk.qcow2"), folder.path().join("socket"));
    let (name, at) = (image.to_str().unwrap(), socket.to_str().unwrap());
    support::qemu("qemu-img", ["create", "-f", "qcow2", name, "8G"]);
    support::qemu("qemu-io", ["-f", "qcow2", "-c", "write -P 4 5G 1M", name]);
    let mut server = QemuNbd::start(&["-f", "qcow2", "-k", at, name]);
    let disk = server.connect(&url(&socket, ""), Access::Read);
    let (mut offset, mut data) = (0, Vec::new());
    while offset < disk.size() {
        let extent = disk.extent(offset, disk.size() - offset).unwrap();
        if extent.kind == ExtentKind::Data {
            data.push((offset, extent.length));
        }
        offset += extent.length;
    }
    assert_eq!(data, [(5 << 30, MIB)]);
}

#[test]
fn many_requests_are_under_way_at_once() {
    let folder = support::folder();
    let socket = folder.path().join("socket");
    // The server answers none before it has eight, and then the last one first.
    // Without flush, which would come alone when the disk is closed.
    let behaviour = Behaviour { batch: 8, flags: 1, ..Behaviour::default() };
    let _server = Server::start(&socket, 1, behaviour);
    let disk = open(&socket).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let disk = &disk;
            scope.spawn(move || {
                for round in 0..50 {
                    let place = thread * 100_000 + round * 700;
                    let value = (thread * 50 + round) as u8;
                    disk.write_at(place, &[value; 700]).unwrap();
                    let mut now = [0; 700];
                    disk.read_at(place, &mut now).unwrap();
                    assert_eq!(now, [value; 700]);
                }
            });
        }
    });
}

#[test]
fn servers_that_lack_things_are_used_without_them() {
    let full = Behaviour::default();
    for (name, behaviour) in [
        ("structured replies", Behaviour { structured: false, ..full.clone() }),
        ("go", Behaviour { go: false, ..full.clone() }),
        ("trim and zeroes", Behaviour { flags: 1, ..full.clone() }),
        ("bytes", Behaviour { minimum: 4096, ..full.clone() }),
        ("nothing", full.clone()),
    ] {
        let folder = support::folder();
        let socket = folder.path().join("socket");
        let server = Server::start(&socket, 1, behaviour);
        let disk = open(&socket).unwrap();
        let mut model = vec![0; MIB as usize];
        formats::use_at_random(&disk, &mut model, 120, 5);
        assert!(formats::read_all(&disk) == model, "{name}");
        drop(disk);
        assert!(*server.content.lock().unwrap() == model, "{name}");
    }
}

#[test]
fn a_server_that_refuses_is_quoted() {
    let folder = support::folder();
    let (raw, socket) = (folder.path().join("disk.raw"), folder.path().join("socket"));
    fs::write(&raw, [0; 512]).unwrap();
    let name = socket.to_str().unwrap();
    let image = raw.to_str().unwrap();
    let mut server = QemuNbd::start(&["-f", "raw", "-k", name, "-x", "there", "-e", "4", image]);
    drop(server.connect(&url(&socket, "there"), Access::Read));
    let gone = url(&socket, "gone").parse().unwrap();
    let error = chain(&Nbd::open(&gone, Options::new(Access::Read)).err().unwrap());
    assert!(error.contains("has no export \"gone\""), "{error}");

    let nobody = url(&folder.path().join("nobody"), "").parse().unwrap();
    let error = chain(&Nbd::open(&nobody, Options::new(Access::Read)).err().unwrap());
    assert!(error.contains("cannot connect to its NBD server"), "{error}");
}

#[test]
fn a_server_that_goes_away_fails_all_requests_with_the_reason() {
    let folder = support::folder();
    let (raw, socket) = (folder.path().join("disk.raw"), folder.path().join("socket"));
    fs::write(&raw, vec![0; MIB as usize]).unwrap();
    let (image, name) = (raw.to_str().unwrap(), socket.to_str().unwrap());
    let mut server = QemuNbd::start(&["-f", "raw", "-k", name, image]);
    let disk = server.connect(&url(&socket, ""), Access::Write);
    disk.write_at(0, &[1; 512]).unwrap();
    drop(server);
    for _ in 0..2 {
        let error = chain(&disk.read_at(0, &mut [0; 512]).unwrap_err());
        assert!(error.contains("open the disk again"), "{error}");
        assert!(disk.flush().is_err());
    }
}

#[test]
fn errors_of_the_server_are_those_of_the_request_only() {
    let folder = support::folder();
    for structured in [true, false] {
        let socket = folder.path().join(format!("{structured}"));
        // It says that it has more than it has.
        let behaviour = Behaviour { size: 1 << 30, structured, ..Behaviour::default() };
        let _server = Server::start(&socket, 1, behaviour);
        let disk = open(&socket).unwrap();
        let error = chain(&disk.read_at(100 << 20, &mut [0; 512]).unwrap_err());
        assert!(error.contains("Invalid argument"), "{error}");
        disk.write_at(0, &[3; 512]).unwrap();
        let mut now = [0; 512];
        disk.read_at(0, &mut now).unwrap();
        assert_eq!(now, [3; 512]);
    }
}

/// A chunk of a structured reply to the request that is under way.
fn chunk(flags: u16, kind: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(b"COOKIE__");
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn replies_that_break_the_protocol_cost_the_connection_and_nothing_else() {
    let at = |offset: u64, length: usize| [&offset.to_be_bytes()[..], &vec![1; length]].concat();
    let hole =
        |offset: u64, length: u32| [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
    let simple = [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], b"COOKIE__", &[1; 512]].concat();
    let other = [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], b"whatever"].concat();
    let mut huge = chunk(0, 1, &at(4096, 8));
    huge[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    let folder = support::folder();
    for (index, (instead, word)) in [
        (b"garbage garbage garbage".to_vec(), "no reply"),
        (simple, "without saying where"),
        (other, "was not asked"),
        (chunk(1, 1, &at(0, 512)), "was not asked for"),
        (chunk(1, 1, &at(4096, 513)), "was not asked for"),
        (chunk(1, 1, &at(4096, 100)), "less data"),
        (chunk(1, 2, &hole(4096, 4096)), "was not asked for"),
        (chunk(1, 2, &hole(u64::MAX, u32::MAX)), "was not asked for"),
        (chunk(1, 2, &hole(4096, 0)), "was not asked for"),
        ([chunk(0, 1, &at(4096, 512)), chunk(1, 1, &at(4096, 512))].concat(), "was not asked for"),
        (chunk(0, 0, &[]), "unknown kind"),
        (chunk(1, 77, &[]), "unknown kind"),
        (huge, "was not asked for"),
        ([chunk(1, 0, &[]), chunk(1, 0, &[])].concat(), "less data"),
        (chunk(0, 1 << 15 | 1, &[0, 0, 0, 5, 0, 0]).repeat(100), "does not end"),
        (Vec::new(), "closed the connection"),
    ]
    .into_iter()
    .enumerate()
    {
        let socket = folder.path().join(format!("{index}"));
        let behaviour = Behaviour { instead: Some(instead), ..Behaviour::default() };
        let server = Server::start(&socket, 1, behaviour);
        let disk = open(&socket).unwrap();
        let error = chain(&disk.read_at(4096, &mut [0; 512]).unwrap_err());
        assert!(error.contains(word), "{index}: {error}");
        let again = chain(&disk.read_at(4096, &mut [0; 512]).unwrap_err());
        assert!(again.contains(word), "{index}: {again}");
        drop(disk);
        drop(server);
    }
}

#[test]
fn exports_that_cannot_be_are_refused() {
    let folder = support::folder();
    let full = Behaviour::default();
    for (index, behaviour) in [
        Behaviour { size: u64::MAX, ..full.clone() },
        Behaviour { minimum: 3, ..full.clone() },
        Behaviour { minimum: 0, ..full.clone() },
        Behaviour { minimum: 1 << 31, ..full.clone() },
        Behaviour { minimum: 4096, size: 4097, ..full.clone() },
    ]
    .into_iter()
    .enumerate()
    {
        let socket = folder.path().join(format!("{index}"));
        let _server = Server::start(&socket, 1, behaviour);
        let error = chain(&open(&socket).err().unwrap());
        assert!(error.contains("breaks the protocol"), "{index}: {error}");
    }
}

#[test]
fn greetings_that_are_none_or_do_not_end_are_refused() {
    let folder = support::folder();
    let magic = [b"NBDMAGIC".as_slice(), b"IHAVEOPT", &[0, 3]].concat();
    let reply = |kind: u32, length: u32| {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        bytes.extend(8_u32.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    };
    for (index, (greeting, word)) in [
        (b"SSH-2.0-OpenSSH".to_vec(), "no NBD server"),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53".to_vec(), "before 2011"),
        (b"NBDMAGICIHAVEOPT\x00\x00".to_vec(), "before 2012"),
        ([magic.clone(), reply(3, u32::MAX)].concat(), "too long"),
        ([magic.clone(), reply(3, 0).repeat(1000)].concat(), "do not end"),
        ([magic.clone(), vec![7; 100]].concat(), "none that was sent"),
        // And then nothing more.
        (magic, "does not answer"),
    ]
    .into_iter()
    .enumerate()
    {
        let socket = folder.path().join(format!("{index}"));
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // The client may have seen enough before all is sent.
            let _ = stream.write_all(&greeting);
            stream
        });
        let url: Url = url(&socket, "").parse().unwrap();
        let patience = Duration::from_millis(if word == "does not answer" { 50 } else { 60_000 });
        let options = Options { patience, ..Options::new(Access::Read) };
        let error = chain(&Nbd::open(&url, options).err().unwrap());
        assert!(error.contains(word), "{index}: {error}");
        drop(server.join().unwrap());
    }
}

#[test]
fn garbled_conversations_do_no_harm() {
    let folder = support::folder();
    let mut used = 0;
    for (round, one_of) in [30, 300, 2000].into_iter().enumerate() {
        for structured in [true, false] {
            let socket = folder.path().join(format!("{round}-{structured}"));
            let garble = Some((round as u64 * 1000, one_of));
            let behaviour = Behaviour { garble, structured, ..Behaviour::default() };
            let count = 60;
            let _server = Server::start(&socket, count, behaviour);
            for _ in 0..count {
                let url: Url = url(&socket, "").parse().unwrap();
                // A length that is garbled has the client wait for what does not come.
                let patience = Duration::from_millis(20);
                let options = Options { patience, ..Options::new(Access::Write) };
                let Ok(disk) = Nbd::open(&url, options) else { continue };
                let size = disk.size();
                for offset in [0, size / 2, size.saturating_sub(5000)] {
                    let mut buffer = vec![0; 5000_u64.min(size) as usize];
                    if disk.read_at(offset, &mut buffer).is_ok() {
                        used += 1;
                    }
                    let _ = disk.write_at(offset, &buffer);
                    let _ = disk.extent(offset, size - offset);
                }
            }
        }
    }
    assert!(used > 50, "only {used} requests came so far");
}
