//! How fast the NAT is, and what it costs: a guest that only makes and takes TCP segments, against
//! a socket of this host.
//!
//! `cargo run --release -p net --example nat_throughput [-- MIB]`
//!
//! Rows are the direction and the kind of card: "large" takes and gives frames of up to 64 KiB
//! without checksums, "plain" such of 1514 bytes with checksums. CPU time is counted by thread:
//! that of the NAT, that of the guest (which includes what the NAT does in `transmit`), and that
//! of the host's program. The first row is a connection of this host to itself without a NAT.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use net::nat::{Nat, NatConfig};
use net::{Accepts, Checksum, Network, Nic, Offload, Packet, SegmentKind, Segmentation};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

const GUEST: [u8; 4] = [10, 0, 2, 15];
const GATEWAY: [u8; 4] = [10, 0, 2, 2];
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
/// Bytes of headers: Ethernet, IPv4, TCP.
const HEADERS: usize = 54;
const MSS: usize = 1460;
/// The guest's window, and frames that its card has room for.
const WINDOW: usize = 4 << 20;
const ROOM: usize = 256;
const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// What the guest reads from a segment.
#[derive(Clone, Copy)]
struct Segment {
    seq: u32,
    ack: u32,
    flags: u8,
    window: usize,
    data: usize,
}

/// The guest's card: frames are copied to memory of its own, as a device would.
struct Card {
    large: bool,
    state: Mutex<(VecDeque<Segment>, Vec<u8>, bool)>,
    arrived: Condvar,
}

impl Nic for Card {
    fn accepts(&self) -> Accepts {
        Accepts { checksum: self.large, tcp4: self.large, tcp6: self.large }
    }

    fn receive(&self, packet: Packet<'_>) -> bool {
        let frame = packet.frame;
        let mut state = self.state.lock().unwrap();
        if state.0.len() >= ROOM {
            state.2 = true;
            return false;
        }
        if frame.len() < HEADERS || frame[12..14] != [8, 0] || frame[23] != 6 {
            return true;
        }
        state.1[..frame.len()].copy_from_slice(frame);
        let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
        state.0.push_back(Segment {
            seq: word(38),
            ack: word(42),
            flags: frame[47],
            window: usize::from(u16::from_be_bytes([frame[48], frame[49]])),
            data: frame.len() - 34 - usize::from(frame[46] >> 4) * 4,
        });
        drop(state);
        self.arrived.notify_one();
        true
    }
}

/// A guest with one connection.
struct Guest {
    nat: Arc<Nat>,
    card: Arc<Card>,
    frame: Vec<u8>,
    port: u16,
    next: u32,
    acknowledged: u32,
    expected: u32,
    window: usize,
}

impl Guest {
    fn connect(large: bool, port: u16) -> Self {
        let nat = Arc::new(Nat::new(&NatConfig::default()).unwrap());
        let memory = vec![0; 70_000];
        let state = Mutex::new((VecDeque::new(), memory, false));
        let card = Arc::new(Card { large, state, arrived: Condvar::new() });
        nat.plug(Some(Arc::clone(&card) as Arc<dyn Nic>));
        let frame = vec![0x55; HEADERS + 44 * MSS];
        let mut guest =
            Self { nat, card, frame, port, next: 1, acknowledged: 1, expected: 0, window: 0 };
        guest.send(SYN, 0);
        let answer = loop {
            let answer = guest.wait();
            if answer.flags & SYN != 0 {
                break answer;
            }
        };
        guest.expected = answer.seq.wrapping_add(1);
        (guest.next, guest.acknowledged) = (answer.ack, answer.ack);
        guest.window = answer.window;
        guest.send(ACK, 0);
        guest
    }

    /// Sends a segment with so many bytes of data.
    fn send(&mut self, flags: u8, data: usize) {
        let options: &[u8] = if flags & SYN != 0 { &[2, 4, 5, 0xb4, 1, 3, 3, 7] } else { &[] };
        let header = 20 + options.len();
        let ip = (20 + header + data) as u16;
        let frame = &mut self.frame;
        frame[..6].copy_from_slice(&GATEWAY_MAC);
        frame[6..12].copy_from_slice(&MAC);
        frame[12..18].copy_from_slice(&[8, 0, 0x45, 0, (ip >> 8) as u8, ip as u8]);
        frame[18..26].copy_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
        frame[26..30].copy_from_slice(&GUEST);
        frame[30..34].copy_from_slice(&GATEWAY);
        frame[34..36].copy_from_slice(&40_000u16.to_be_bytes());
        frame[36..38].copy_from_slice(&self.port.to_be_bytes());
        frame[38..42].copy_from_slice(&self.next.to_be_bytes());
        frame[42..46].copy_from_slice(&self.expected.to_be_bytes());
        let window = if flags & SYN != 0 { 0xffff } else { (WINDOW >> 7).min(0xffff) as u16 };
        frame[46..50].copy_from_slice(&[
            (header as u8 / 4) << 4,
            flags,
            (window >> 8) as u8,
            window as u8,
        ]);
        frame[50..54].copy_from_slice(&[0; 4]);
        frame[54..54 + options.len()].copy_from_slice(options);
        let size = MSS as u16;
        let segmentation = Segmentation { kind: SegmentKind::Tcp4, size, header: HEADERS as u16 };
        let offload = Offload {
            checksum: Some(Checksum { start: 34, offset: 16 }),
            segmentation: (data > MSS).then_some(segmentation),
        };
        let frame = &self.frame[..34 + header + data];
        self.nat.transmit(Packet { frame, offload });
    }

    /// The next segment.
    fn wait(&self) -> Segment {
        let state = self.card.state.lock().unwrap();
        let mut state = self.card.arrived.wait_while(state, |state| state.0.is_empty()).unwrap();
        let segment = state.0.pop_front().unwrap();
        let refused = std::mem::take(&mut state.2);
        drop(state);
        if refused {
            self.nat.room();
        }
        segment
    }

    fn more(&self) -> bool {
        !self.card.state.lock().unwrap().0.is_empty()
    }

    fn upload(&mut self, total: usize) {
        let most = if self.card.large { 44 * MSS } else { MSS };
        let mut left = total;
        while left > 0 || self.acknowledged != self.next {
            let under_way = self.next.wrapping_sub(self.acknowledged) as usize;
            let data = left.min(most);
            if data > 0 && under_way + data <= self.window {
                self.send(ACK, data);
                self.next = self.next.wrapping_add(data as u32);
                left -= data;
                if !self.more() {
                    continue;
                }
            }
            let segment = self.wait();
            self.acknowledged = segment.ack;
            self.window = segment.window << 7;
        }
        self.send(ACK | FIN, 0);
    }

    fn download(&mut self, total: usize) {
        let (mut received, mut unacknowledged) = (0, 0);
        while received < total {
            let segment = self.wait();
            if segment.seq == self.expected {
                self.expected = self.expected.wrapping_add(segment.data as u32);
                received += segment.data;
                unacknowledged += segment.data;
            }
            if unacknowledged >= 2 * 44 * MSS || !self.more() {
                self.send(ACK, 0);
                unacknowledged = 0;
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.nat.plug(None);
    }
}

/// CPU seconds so far of the threads whose name begins so; this thread's is "nat_throughput".
fn cpu(name: &str) -> f64 {
    let mut seconds = 0.0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if read("comm").trim() == name {
            let time = read("schedstat");
            seconds += time.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0.0) / 1e9;
        }
    }
    seconds
}

/// The host's program: takes all, or sends so many bytes.
fn program(listener: TcpListener, sends: Option<usize>) -> std::thread::JoinHandle<f64> {
    let run = move || {
        let mut stream = listener.accept().unwrap().0;
        let mut buffer = vec![0xaa; 256 << 10];
        match sends {
            Some(mut left) => {
                while left > 0 {
                    let count = left.min(buffer.len());
                    stream.write_all(&buffer[..count]).unwrap();
                    left -= count;
                }
            }
            None => while stream.read(&mut buffer).unwrap() > 0 {},
        }
        cpu("program")
    };
    std::thread::Builder::new().name("program".to_owned()).spawn(run).unwrap()
}

fn report(name: &str, total: usize, begun: Instant, nat: f64, guest: f64, host: f64) {
    let gigabytes = total as f64 / 1e9;
    let rate = total as f64 / 1e6 / begun.elapsed().as_secs_f64();
    println!(
        "{name:<22}{rate:>8.0}{:>10.3}{:>10.3}{:>10.3}",
        nat / gigabytes,
        guest / gigabytes,
        host / gigabytes
    );
}

fn main() {
    let mib = std::env::args().nth(1).map_or(2048, |mib| mib.parse().unwrap());
    let total: usize = mib << 20;
    println!("{:<22}{:>8}{:>10}{:>10}{:>10}", "", "MB/s", "NAT", "guest", "host");
    println!("{:<22}{:>8}{:>30}", "", "", "CPU seconds per GB");
    let listen = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    };
    let (listener, port) = listen();
    let server = program(listener, None);
    let (begun, before) = (Instant::now(), cpu("nat_throughput"));
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let buffer = vec![0x55; 64_240];
    for _ in 0..total / buffer.len() {
        stream.write_all(&buffer).unwrap();
    }
    drop(stream);
    let host = server.join().unwrap();
    report("loopback", total, begun, 0.0, cpu("nat_throughput") - before, host);
    for (name, large, up) in [
        ("guest to host, large", true, true),
        ("host to guest, large", true, false),
        ("guest to host, plain", false, true),
        ("host to guest, plain", false, false),
    ] {
        let total = if large { total } else { total / 4 };
        let (listener, port) = listen();
        let server = program(listener, (!up).then_some(total));
        let before = cpu("nat_throughput");
        let mut guest = Guest::connect(large, port);
        let begun = Instant::now();
        if up {
            guest.upload(total)
        } else {
            guest.download(total)
        }
        let nat = cpu("nat");
        let host = server.join().unwrap();
        report(name, total, begun, nat, cpu("nat_throughput") - before, host);
    }
}
