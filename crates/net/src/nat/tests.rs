//! The core with a clock that is turned by hand: what it does when a guest is silent.
use super::config::{Layout, NatConfig};
use super::core::Core;
use super::host::Token;
use crate::poller::Poller;
use crate::wire::ip::{Ip, Pair, TCP};
use crate::wire::tcp::{ACK, FIN, Fields, RST, SYN, Segment, Seq};
use crate::wire::{Ethernet, Headers, Mac};
use crate::{Accepts, Nic, Offload, Packet};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
const SECOND: Duration = Duration::from_secs(1);

/// A segment that came to the guest.
#[derive(Clone, Debug)]
struct Seen {
    seq: Seq,
    ack: Seq,
    flags: u8,
    data: Vec<u8>,
}

#[derive(Default)]
struct Card(Mutex<Vec<Seen>>);

impl Card {
    fn see(&self, frame: &[u8]) {
        let ethernet = Ethernet::parse(frame).unwrap();
        let Some(ip) = Ip::parse(ethernet.ethertype, ethernet.payload) else { return };
        if ip.protocol != TCP {
            return;
        }
        let segment = Segment::parse(ip.payload).unwrap();
        self.0.lock().unwrap().push(Seen {
            seq: segment.seq,
            ack: segment.ack,
            flags: segment.flags,
            data: segment.payload.to_vec(),
        });
    }
}

impl Nic for Card {
    fn accepts(&self) -> Accepts {
        Accepts::default()
    }

    fn receive(&self, packet: Packet<'_>) -> bool {
        self.see(packet.frame);
        true
    }
}

/// A guest's connection to a program of the host's.
struct Bench {
    core: Core,
    poller: Arc<Poller>,
    card: Card,
    now: Instant,
    layout: Layout,
    port: u16,
    next: Seq,
    expected: Seq,
    stream: TcpStream,
}

impl Bench {
    /// Connects with a window of so many bytes.
    fn new(window: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let config = NatConfig::default();
        let layout = Layout::new(&config).unwrap();
        let poller = Arc::new(Poller::new().unwrap());
        let now = Instant::now();
        let mut core = Core::new(layout, &config, Arc::clone(&poller), vec![], vec![], now);
        let card = Card::default();
        let syn = frame(&layout, port, SYN, Seq(1000), Seq(0), window, b"");
        core.guest_frame(&Packet { frame: &syn, offload: Offload::default() }, now);
        let stream = listener.accept().unwrap().0;
        let (next, expected) = (Seq(1001), Seq(0));
        let mut bench = Self { core, poller, card, now, layout, port, next, expected, stream };
        let answer = bench.host_until(|seen| seen.flags & SYN != 0);
        assert_eq!(answer.ack, Seq(1001));
        bench.expected = answer.seq + 1;
        bench.send(ACK, window, b"");
        bench
    }

    fn send(&mut self, flags: u8, window: u16, data: &[u8]) {
        let (next, expected) = (self.next, self.expected);
        let frame = frame(&self.layout, self.port, flags, next, expected, window, data);
        self.next = next + data.len() + usize::from(flags & FIN != 0);
        self.core.guest_frame(&Packet { frame: &frame, offload: Offload::default() }, self.now);
        self.turns();
    }

    /// What there is for the guest goes to it.
    fn turns(&mut self) {
        assert!(self.core.turns(&self.card, usize::MAX, self.now));
        let mut outbox = self.core.take_outbox();
        outbox.drain(|frame| {
            self.card.see(frame);
            true
        });
    }

    /// Handles events of the host until the guest gets what is wanted.
    fn host_until(&mut self, wanted: impl Fn(&Seen) -> bool) -> Seen {
        let mut events = Vec::with_capacity(16);
        loop {
            self.turns();
            if let Some(found) = self.take().into_iter().find(|seen| wanted(seen)) {
                return found;
            }
            self.poller.wait(&mut events, Some(30 * SECOND));
            assert!(!events.is_empty(), "nothing comes");
            for event in &events {
                self.core.host_event(Token::from_bits(event.data.u64()), event.flags, self.now);
            }
        }
    }

    fn take(&mut self) -> Vec<Seen> {
        std::mem::take(&mut self.card.0.lock().unwrap())
    }

    /// Turns the clock on to the next deadline, and answers what the guest got then.
    fn next_deadline(&mut self) -> (Duration, Vec<Seen>) {
        let before = self.now;
        loop {
            self.now = self.core.deadline().unwrap().max(self.now + Duration::from_millis(1));
            self.core.tick(self.now);
            self.turns();
            let seen = self.take();
            if !seen.is_empty() || self.core.census().0 == 0 {
                return (self.now - before, seen);
            }
        }
    }
}

fn frame(
    layout: &Layout,
    port: u16,
    flags: u8,
    seq: Seq,
    ack: Seq,
    window: u16,
    data: &[u8],
) -> Vec<u8> {
    let addresses = Pair::V4 { source: layout.guest4(0), destination: layout.gateway4 };
    let mss = (flags & SYN != 0).then_some(1000);
    let fields =
        Fields { source: 40_000, destination: port, seq, ack, flags, window, mss, scale: None };
    let mut headers = Headers::new(layout.mac, MAC, addresses.ethertype());
    headers.ip(addresses, TCP, 64, fields.header() + data.len());
    headers.tcp(&fields);
    [headers.as_slice(), data].concat()
}

#[test]
fn what_is_not_acknowledged_is_sent_again_ever_more_seldom_and_given_up_in_the_end() {
    let mut bench = Bench::new(5000);
    bench.stream.write_all(b"hello").unwrap();
    let first = bench.host_until(|seen| !seen.data.is_empty());
    assert_eq!(first.data, b"hello");
    let mut intervals = Vec::new();
    loop {
        let (interval, seen) = bench.next_deadline();
        if seen.iter().any(|seen| seen.flags & RST != 0) {
            break;
        }
        assert_eq!((seen[0].seq, &seen[0].data), (first.seq, &first.data));
        intervals.push(interval.as_secs());
        assert!(intervals.len() < 100, "never given up");
    }
    assert_eq!(intervals[..7], [1, 2, 4, 8, 16, 32, 60]);
    assert!(intervals.iter().sum::<u64>() > 600, "a busy guest is given time");
    assert_eq!(bench.core.census().0, 0);
    bench.stream.read_exact(&mut [0; 1]).unwrap_err();
}

#[test]
fn three_acknowledgements_of_the_same_byte_bring_the_next_ones_again_at_once() {
    let mut bench = Bench::new(60_000);
    bench.stream.write_all(&[7; 5000]).unwrap();
    let first = bench.host_until(|seen| !seen.data.is_empty());
    bench.take();
    for _ in 0..2 {
        bench.send(ACK, 60_000, b"");
    }
    assert!(bench.take().iter().all(|seen| seen.data.is_empty()));
    bench.send(ACK, 60_000, b"");
    let again = bench.take();
    assert_eq!((again[0].seq, again[0].data.len()), (first.seq, 1000));
    // The guest had the rest but for the last segment, which is missing too.
    bench.expected = bench.expected + 4000;
    bench.send(ACK, 60_000, b"");
    assert_eq!(bench.take()[0].seq, first.seq + 4000);
    bench.expected = bench.expected + 1000;
    bench.send(ACK, 60_000, b"");
    assert!(bench.take().is_empty());
}

#[test]
fn a_closed_window_is_asked_about_until_it_opens() {
    let mut bench = Bench::new(2000);
    bench.stream.write_all(&[7; 3000]).unwrap();
    // Both segments that the window admits.
    assert_eq!(bench.host_until(|seen| !seen.data.is_empty()).data.len(), 1000);
    bench.expected = bench.expected + 2000;
    bench.send(ACK, 0, b"");
    for expected in [1, 2, 4] {
        let (interval, seen) = bench.next_deadline();
        assert_eq!(interval.as_secs(), expected);
        assert!(seen[0].data.is_empty());
        assert_eq!(seen[0].seq + 1, bench.expected, "an old number, so that the guest answers");
    }
    bench.send(ACK, 2000, b"");
    assert_eq!(bench.take()[0].data.len(), 1000);
}

#[test]
fn a_connection_at_rest_is_asked_after_two_hours_whether_the_guest_is_still_there() {
    let mut bench = Bench::new(2000);
    let (interval, seen) = bench.next_deadline();
    assert_eq!((interval.as_secs(), seen.len()), (7200, 1));
    // It is.
    bench.send(ACK, 2000, b"");
    assert_eq!(bench.next_deadline().0.as_secs(), 7200);
    // Now it is not.
    while bench.core.census().0 > 0 {
        bench.next_deadline();
    }
    bench.stream.read_exact(&mut [0; 1]).unwrap_err();
}

#[test]
fn what_comes_out_of_order_or_twice_is_taken_once() {
    let mut bench = Bench::new(2000);
    bench.send(ACK, 2000, b"abc");
    bench.next = bench.next + 3;
    bench.send(ACK, 2000, b"ghi");
    assert_eq!(bench.take().last().unwrap().ack, Seq(1004), "what is missing is named");
    bench.next = Seq(1002);
    bench.send(ACK, 2000, b"bcdef");
    bench.send(ACK | FIN, 2000, b"ghi");
    let mut all = String::new();
    bench.stream.read_to_string(&mut all).unwrap();
    assert_eq!(all, "abcdefghi");
}
