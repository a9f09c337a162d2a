use super::connection::BUFFER;
use super::packet::{Credit, HEADER, HOST_CID, Header, Operation, Ports, shutdown};
use super::*;
use crate::testing::TestGuest;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

const CID: u64 = 42;

fn host(cid: u64, path: &Path) -> Result<VsockHost, VsockError> {
    VsockHost::new(&VsockOptions { path: path.to_owned(), cid })
}

struct Guest {
    device: Vsock,
    guest: TestGuest,
    folder: tempfile::TempDir,
    credit: Credit,
}

/// A packet that the guest got.
#[derive(Debug)]
struct Packet {
    operation: Operation,
    ports: Ports,
    flags: u32,
    credit: Credit,
    data: Vec<u8>,
}

impl Guest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let made = host(CID, &folder.path().join("vm")).unwrap();
        let mut device = Vsock::new(made);
        let mut guest = TestGuest::with(&mut device);
        for _ in 0..16 {
            guest.queues[0].add(&[], &[4096]);
        }
        guest.notify(0);
        Self { device, guest, folder, credit: Credit { buffer: 1 << 20, forwarded: 0 } }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn send(&mut self, ports: Ports, operation: Operation, flags: u32, data: &[u8]) {
        let header = Header {
            source: CID,
            destination: HOST_CID,
            // The sender's port comes first, whoever it is.
            ports: Ports { host: ports.guest, guest: ports.host },
            length: data.len() as u32,
            operation: Some(operation),
            stream: true,
            flags,
            credit: self.credit,
        };
        self.send_raw(&header.to_guest(), data);
    }

    fn send_raw(&mut self, header: &[u8], data: &[u8]) {
        self.guest.request(1, &[header, data], &[]);
    }

    fn receive(&mut self) -> Packet {
        loop {
            if let Some(used) = self.guest.queues[0].take_used() {
                let header = Header::from_guest(&used.data[..HEADER].try_into().unwrap());
                assert_eq!((header.source, header.destination, header.stream), (2, CID, true));
                assert_eq!(used.written, HEADER as u32 + header.length);
                let data = used.data[HEADER..HEADER + header.length as usize].to_vec();
                self.guest.queues[0].add(&[], &[4096]);
                self.guest.notify(0);
                let Ports { host, guest } = header.ports;
                return Packet {
                    operation: header.operation.unwrap(),
                    ports: Ports { host: guest, guest: host },
                    flags: header.flags,
                    credit: header.credit,
                    data,
                };
            }
            self.guest.transport.wait_used(0);
        }
    }

    fn expect(&mut self, operation: Operation, ports: Ports) -> Packet {
        let packet = self.receive();
        assert_eq!((packet.operation, packet.ports), (operation, ports), "{packet:?}");
        packet
    }

    /// A connection that a program on the host asked for.
    fn asked_by_host(&mut self, port: u32) -> (UnixStream, Ports) {
        let mut stream = UnixStream::connect(self.path("vm")).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let asked = self.receive();
        assert_eq!((asked.operation, asked.ports.guest), (Operation::Request, port));
        self.send(asked.ports, Operation::Response, 0, &[]);
        let mut line = [0; 14];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line.to_vec(), format!("OK {}\n", asked.ports.host).into_bytes());
        (stream, asked.ports)
    }

    /// A connection that a program in the guest asked for.
    fn asked_by_guest(&mut self, ports: Ports) -> UnixStream {
        let listener = UnixListener::bind(self.path(&format!("vm_{}", ports.host))).unwrap();
        self.send(ports, Operation::Request, 0, &[]);
        self.expect(Operation::Response, ports);
        listener.accept().unwrap().0
    }
}

const PORTS: Ports = Ports { host: 1000, guest: 2000 };

#[test]
fn the_guest_reads_its_address_and_reserved_ones_are_refused() {
    let mut guest = Guest::new();
    let mut space = [0xff; 10];
    guest.device.read_config(0, &mut space);
    assert_eq!(space, [42, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        assert!(matches!(host(cid, "/nowhere".as_ref()), Err(VsockError::Cid(_))));
    }
}

#[test]
fn a_program_in_the_guest_reaches_one_on_the_host() {
    let mut guest = Guest::new();
    let mut program = guest.asked_by_guest(PORTS);
    guest.send(PORTS, Operation::Data, 0, b"hello");
    let mut hello = [0; 5];
    program.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    program.write_all(b"and back").unwrap();
    assert_eq!(guest.expect(Operation::Data, PORTS).data, b"and back");
    guest.send(PORTS, Operation::Shutdown, shutdown::BOTH, &[]);
    guest.expect(Operation::Reset, PORTS);
    assert_eq!(program.read(&mut hello).unwrap(), 0, "closed");
}

#[test]
fn a_program_on_the_host_reaches_one_in_the_guest() {
    let mut guest = Guest::new();
    let (mut program, ports) = guest.asked_by_host(22);
    program.write_all(b"question").unwrap();
    assert_eq!(guest.expect(Operation::Data, ports).data, b"question");
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Operation::Shutdown, ports).flags, shutdown::SEND);
    guest.send(ports, Operation::Data, 0, b"answer");
    let mut answer = [0; 6];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer", "one way is still open");
    drop(program);
    assert_eq!(guest.expect(Operation::Shutdown, ports).flags, shutdown::BOTH);
    guest.send(ports, Operation::Reset, 0, &[]);
    guest.send(ports, Operation::Data, 0, b"x");
    guest.expect(Operation::Reset, ports);
}

#[test]
fn what_cannot_be_reached_is_refused() {
    let mut guest = Guest::new();
    guest.send(PORTS, Operation::Request, 0, &[]);
    guest.expect(Operation::Reset, PORTS);
    fs::write(guest.path("vm_1001"), "no socket").unwrap();
    let ports = Ports { host: 1001, ..PORTS };
    guest.send(ports, Operation::Request, 0, &[]);
    guest.expect(Operation::Reset, ports);
    // Nobody listens in the guest: the program on the host sees the end.
    let mut stream = UnixStream::connect(guest.path("vm")).unwrap();
    stream.write_all(b"CONNECT 22\nignored").unwrap();
    let asked = guest.receive();
    guest.send(asked.ports, Operation::Reset, 0, &[]);
    let mut left = Vec::new();
    // Unread data makes it an error instead of an end.
    assert!(stream.read_to_end(&mut left).is_err() || left.is_empty());
    for line in ["HELLO\n", "CONNECT x\n", "CONNECT 4294967296\n", &"CONNECT ".repeat(10)] {
        let mut stream = UnixStream::connect(guest.path("vm")).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        let mut left = Vec::new();
        assert!(stream.read_to_end(&mut left).is_err() || left.is_empty(), "{line:?}");
    }
}

#[test]
fn neither_side_sends_more_than_the_other_has_room_for() {
    let mut guest = Guest::new();
    guest.credit.buffer = 1000;
    let (mut program, ports) = guest.asked_by_host(22);
    program.write_all(&[7; 3000]).unwrap();
    assert_eq!(guest.expect(Operation::Data, ports).data.len(), 1000);
    guest.expect(Operation::CreditRequest, ports);
    guest.credit.forwarded = 600;
    guest.send(ports, Operation::CreditUpdate, 0, &[]);
    assert_eq!(guest.expect(Operation::Data, ports).data.len(), 600);
    guest.expect(Operation::CreditRequest, ports);
    guest.credit = Credit { buffer: 1 << 20, forwarded: 1600 };
    guest.send(ports, Operation::CreditUpdate, 0, &[]);
    assert_eq!(guest.expect(Operation::Data, ports).data.len(), 1400);

    // The program on the host reads nothing: the kernel's buffer fills, then the device's.
    let mut sent = 0u32;
    let told = loop {
        guest.send(ports, Operation::Data, 0, &[1; 4096]);
        sent += 4096;
        guest.send(ports, Operation::CreditRequest, 0, &[]);
        let mut credit = guest.expect(Operation::CreditUpdate, ports).credit;
        assert_eq!(credit.buffer, BUFFER);
        // Two may come for one.
        if sent - credit.forwarded + 4096 > BUFFER {
            guest.send(ports, Operation::CreditRequest, 0, &[]);
            credit = guest.expect(Operation::CreditUpdate, ports).credit;
            if sent - credit.forwarded + 4096 > BUFFER {
                break credit.forwarded;
            }
        }
    };
    assert!(sent - told <= BUFFER);
    let mut all = vec![0; sent as usize];
    program.read_exact(&mut all).unwrap();
    let update = guest.expect(Operation::CreditUpdate, ports);
    assert!(update.credit.forwarded > told, "it tells of the room without being asked");
    // Who sends more than that loses the connection.
    for _ in 0..200 {
        guest.send(ports, Operation::Data, 0, &[1; 4096]);
    }
    while guest.receive().operation != Operation::Reset {}
    assert!(!guest.guest.transport.failed());
}

#[test]
fn much_data_arrives_whole_in_both_directions() {
    const LENGTH: usize = 2 << 20;
    let mut guest = Guest::new();
    let mut program = guest.asked_by_guest(PORTS);
    let data: Vec<u8> = (0..LENGTH).map(|n| (n / 251 + n) as u8).collect();
    let (expected, mut writer) = (data.clone(), program.try_clone().unwrap());
    let sender = std::thread::spawn(move || {
        writer.write_all(&data).unwrap();
        let mut back = vec![0; LENGTH];
        program.read_exact(&mut back).unwrap();
        back
    });
    let mut got = Vec::<u8>::new();
    while got.len() < LENGTH {
        let packet = guest.receive();
        got.extend(&packet.data);
        guest.credit.forwarded = got.len() as u32;
        if packet.operation == Operation::CreditRequest || got.len() % (1 << 18) < 4096 {
            guest.send(PORTS, Operation::CreditUpdate, 0, &[]);
        }
    }
    assert!(got == expected);
    let mut told = 0;
    for (n, part) in expected.chunks(4096).enumerate() {
        while n as u32 * 4096 - told + 4096 > BUFFER {
            told = guest.receive().credit.forwarded;
        }
        guest.send(PORTS, Operation::Data, 0, part);
    }
    assert!(sender.join().unwrap() == expected);
}

#[test]
fn connections_last_over_a_pause_and_not_over_a_reset() {
    let mut guest = Guest::new();
    let (mut program, ports) = guest.asked_by_host(22);
    guest.guest.deactivate(&mut guest.device);
    program.write_all(b"meanwhile").unwrap();
    guest.guest.activate(&mut guest.device);
    assert_eq!(guest.expect(Operation::Data, ports).data, b"meanwhile");
    guest.guest.deactivate(&mut guest.device);
    guest.device.reset();
    let mut left = Vec::new();
    assert!(program.read_to_end(&mut left).is_err() || left.is_empty());
}

#[test]
fn after_a_restore_the_driver_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let (_program, ports) = guest.asked_by_host(22);
    guest.guest.deactivate(&mut guest.device);
    let mut state = SavedState::new("virtio", 1);
    guest.device.save(&mut state);
    let mut reader = state.reader("virtio", 1).unwrap();
    guest.device.restore(&mut reader).unwrap();
    reader.finish().unwrap();
    // Paused once more before the driver has given a buffer.
    guest.guest.activate(&mut guest.device);
    guest.guest.deactivate(&mut guest.device);
    guest.guest.activate(&mut guest.device);
    assert_eq!(guest.guest.request(2, &[], &[8])[..4], [0; 4]);
    guest.send(ports, Operation::Data, 0, b"x");
    guest.expect(Operation::Reset, ports);
}

#[test]
fn packets_that_are_none_are_ignored_or_refused() {
    let mut guest = Guest::new();
    let (mut program, ports) = guest.asked_by_host(22);
    guest.send_raw(&[0xff; 20], &[]);
    guest.send_raw(&[0xff; HEADER], &[]);
    let good = Header {
        source: CID,
        destination: HOST_CID,
        ports: Ports { host: ports.guest, guest: ports.host },
        length: 0,
        operation: None,
        stream: true,
        flags: 0,
        credit: guest.credit,
    };
    guest.send_raw(&Header { source: 41, ..good }.to_guest(), &[]);
    program.write_all(b"still there").unwrap();
    assert_eq!(guest.expect(Operation::Data, ports).data, b"still there");
    // More data announced than there is.
    let operation = Some(Operation::Data);
    guest.send_raw(&Header { operation, length: u32::MAX, ..good }.to_guest(), b"x");
    guest.expect(Operation::Reset, ports);
    for elsewhere in [0, 1, 3, u64::MAX] {
        let operation = Some(Operation::Request);
        guest.send_raw(&Header { operation, destination: elsewhere, ..good }.to_guest(), &[]);
        guest.expect(Operation::Reset, ports);
    }
    guest.send_raw(&Header { stream: false, ..good }.to_guest(), &[]);
    // `to_guest` always writes a stream; the operation is the unknown one.
    guest.expect(Operation::Reset, ports);
    assert!(!guest.guest.transport.failed());
}

#[test]
fn a_guest_that_takes_no_refusals_cannot_make_the_host_keep_them() {
    let folder = tempfile::tempdir().unwrap();
    let made = host(CID, &folder.path().join("vm")).unwrap();
    let mut device = Vsock::new(made);
    let guest = TestGuest::with(&mut device);
    let mut guest = Guest { device, guest, folder, credit: Credit::default() };
    for n in 0..256 {
        guest.send(Ports { host: 1, guest: n }, Operation::Data, 0, &[]);
    }
    // The next ones stay in the queue until there are buffers for the answers.
    let header = [0u8; HEADER];
    let last = guest.guest.queues[1].add(&[&header], &[]);
    guest.guest.notify(1);
    for _ in 0..64 {
        guest.guest.queues[0].add(&[], &[64]);
    }
    guest.guest.notify(0);
    for n in 0..64 {
        guest.expect(Operation::Reset, Ports { host: 1, guest: n });
    }
    while guest.guest.queues[1].take_used().is_none_or(|used| used.head != last) {
        guest.guest.transport.wait_used(1);
    }
}

#[test]
fn a_socket_left_by_a_process_that_ended_is_replaced_and_one_in_use_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let made = host(CID, &path).unwrap();
    let refused = host(CID, &path).err().unwrap();
    assert!(refused.to_string().contains("no other VM uses"), "{refused}");
    drop(made);
    assert!(!path.exists(), "tidied up");
    fs::write(&path, "something else").unwrap();
    assert!(host(CID, &path).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"something else");
}

#[test]
fn many_connections_are_kept_apart() {
    let mut guest = Guest::new();
    let mut programs = Vec::new();
    for n in 0..100 {
        programs.push(guest.asked_by_host(1000 + n));
    }
    for (n, (program, ports)) in programs.iter_mut().enumerate() {
        guest.send(*ports, Operation::Data, 0, format!("{n}\n").as_bytes());
        let mut line = String::new();
        BufReader::new(&mut *program).read_line(&mut line).unwrap();
        assert_eq!(line, format!("{n}\n"));
        program.write_all(line.as_bytes()).unwrap();
        assert_eq!(guest.expect(Operation::Data, *ports).data, line.as_bytes());
    }
}
