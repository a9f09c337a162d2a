//! Guests and peers that do not keep to any rule. What they do depends on a seed only, but for the
//! order of threads.
use net::nat::{Nat, NatConfig};
use net::{
    Accepts, Checksum, HostForward, Network, Nic, Offload, Packet, Protocol, SegmentKind,
    Segmentation,
};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A small generator of numbers, the same for the same seed (xorshift64*).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 16) as usize % end.max(1)
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}

/// Takes what it likes, and remembers it.
struct Card {
    state: Mutex<(Rng, VecDeque<Vec<u8>>)>,
    accepts: Mutex<Accepts>,
}

impl Nic for Card {
    fn accepts(&self) -> Accepts {
        *self.accepts.lock().unwrap()
    }

    fn receive(&self, packet: Packet<'_>) -> bool {
        let mut state = self.state.lock().unwrap();
        if state.0.one_in(4) {
            return false;
        }
        let frame = packet.frame.get(..packet.frame.len().min(120)).unwrap_or_default();
        state.1.push_back(frame.to_vec());
        if state.1.len() > 64 {
            state.1.pop_front();
        }
        true
    }
}

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const ROUTER: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];

/// A guest that sends nonsense, and peers on the host that answer with nonsense.
pub struct Fuzz {
    rng: Rng,
    nat: Arc<Nat>,
    card: Arc<Card>,
    tcp: SocketAddr,
    udp: SocketAddr,
    stop: Arc<AtomicBool>,
    peers: Vec<std::thread::JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Fuzz {
    pub fn new(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (tcp_address, udp_address) =
            (listener.local_addr().unwrap(), udp.local_addr().unwrap());
        let resolv_conf = folder.path().join("resolv.conf");
        let line = format!("nameserver [127.0.0.1]:{}\n", udp_address.port());
        std::fs::write(&resolv_conf, line).unwrap();
        let forward = |protocol| HostForward {
            bind: "127.0.0.1:0".parse().unwrap(),
            guest_port: 80.try_into().unwrap(),
            protocol,
        };
        let forwards = vec![forward(Protocol::Tcp), forward(Protocol::Udp)];
        let config = NatConfig { forwards, resolv_conf, ..NatConfig::default() };
        let nat = Arc::new(Nat::new(&config).unwrap());
        let card = Arc::new(Card {
            state: Mutex::new((Rng::new(seed ^ 0xabc), VecDeque::new())),
            accepts: Mutex::default(),
        });
        nat.plug(Some(Arc::clone(&card) as Arc<dyn Nic>));
        let stop = Arc::new(AtomicBool::new(false));
        let mut fuzz = Self {
            rng: Rng::new(seed),
            tcp: tcp_address,
            udp: udp_address,
            stop,
            peers: Vec::new(),
            _folder: folder,
            nat,
            card,
        };
        let forwarded = (fuzz.nat.forwards()[0].bind, fuzz.nat.forwards()[1].bind);
        fuzz.peer(seed ^ 1, move |rng| serve(rng, &listener));
        fuzz.peer(seed ^ 2, move |rng| answer(rng, &udp));
        fuzz.peer(seed ^ 3, move |rng| knock(rng, forwarded.0, forwarded.1));
        fuzz
    }

    fn peer(&mut self, seed: u64, mut step: impl FnMut(&mut Rng) + Send + 'static) {
        let stop = Arc::clone(&self.stop);
        self.peers.push(std::thread::spawn(move || {
            let mut rng = Rng::new(seed);
            while !stop.load(Ordering::Relaxed) {
                step(&mut rng);
            }
        }));
    }

    /// One frame from the guest, or something else that it can do.
    pub fn step(&mut self) {
        let mut frame = match self.rng.below(12) {
            0 => {
                let length = self.rng.below(200);
                self.rng.bytes(length)
            }
            1 => self.arp(),
            2 => self.dhcp(),
            3 => self.dns(),
            4 => self.udp(),
            5 => self.icmp(),
            6 | 7 => self.syn(),
            8..=10 => self.answer_segment(),
            _ => self.fragment(),
        };
        if self.rng.one_in(3) {
            self.mutate(&mut frame);
        }
        let offload = self.offload();
        self.nat.transmit(Packet { frame: &frame, offload });
        if self.rng.one_in(8) {
            self.nat.room();
        }
        if self.rng.one_in(500) {
            let large = self.rng.one_in(2);
            *self.card.accepts.lock().unwrap() =
                Accepts { checksum: large, tcp4: large, tcp6: large };
        }
        if self.rng.one_in(2000) {
            self.nat.plug(None);
            self.nat.plug(Some(Arc::clone(&self.card) as Arc<dyn Nic>));
        }
    }

    fn offload(&mut self) -> Offload {
        if !self.rng.one_in(4) {
            return Offload::default();
        }
        let kinds = [SegmentKind::Tcp4, SegmentKind::Tcp6, SegmentKind::Udp];
        let kind = kinds[self.rng.below(3)];
        let size = if self.rng.one_in(3) { 0 } else { self.rng.next() as u16 };
        let (start, offset) = (self.rng.next() as u16, self.rng.next() as u16);
        Offload {
            checksum: self.rng.one_in(2).then_some(Checksum { start, offset }),
            segmentation: self.rng.one_in(2).then_some(Segmentation { kind, size, header: start }),
        }
    }

    fn mutate(&mut self, frame: &mut Vec<u8>) {
        for _ in 0..=self.rng.below(4) {
            match self.rng.below(4) {
                0 => frame.truncate(self.rng.below(frame.len() + 1)),
                1 => {
                    let length = self.rng.below(64);
                    let more = self.rng.bytes(length);
                    frame.extend(more);
                }
                _ if frame.is_empty() => {}
                2 => {
                    let at = self.rng.below(frame.len());
                    frame[at] = [0, 1, 0x7f, 0x80, 0xff][self.rng.below(5)];
                }
                _ => {
                    let at = self.rng.below(frame.len());
                    frame[at] ^= 1 << self.rng.below(8);
                }
            }
        }
    }

    fn ethernet(&mut self, kind: u16) -> Vec<u8> {
        let to = if self.rng.one_in(8) { [0xff; 6] } else { ROUTER };
        [&to[..], &MAC, &kind.to_be_bytes()].concat()
    }

    fn ipv4(&mut self, to: [u8; 4], protocol: u8, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = self.ethernet(0x0800);
        let length = (20 + payload.len()) as u16;
        frame.extend([0x45, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([0, self.rng.below(4) as u8]);
        frame.extend(flags.to_be_bytes());
        frame.extend([64, protocol, 0, 0, 10, 0, 2, 15]);
        frame.extend(to);
        frame.extend(payload);
        frame
    }

    fn arp(&mut self) -> Vec<u8> {
        let mut frame = self.ethernet(0x0806);
        frame.extend([0, 1, 8, 0, 6, 4, 0, 1 + self.rng.below(2) as u8]);
        frame.extend(MAC);
        frame.extend([10, 0, 2, [15, 16, 2][self.rng.below(3)]]);
        frame.extend([0; 6]);
        frame.extend([10, 0, 2, [2, 3, 9][self.rng.below(3)]]);
        frame
    }

    fn dhcp(&mut self) -> Vec<u8> {
        let mut message = vec![0; 240];
        message[..3].copy_from_slice(&[1, 1, 6]);
        message[28..34].copy_from_slice(&MAC);
        message[33] = self.rng.next() as u8;
        message[236..].copy_from_slice(&[99, 130, 83, 99]);
        message.extend([53, 1, self.rng.below(10) as u8]);
        let length = self.rng.below(40);
        message.extend(self.rng.bytes(length));
        let payload = udp(68, 67, &message);
        self.ipv4([255; 4], 17, 0, &payload)
    }

    fn dns(&mut self) -> Vec<u8> {
        let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        let length = self.rng.below(80);
        query.extend(self.rng.bytes(length));
        let payload = udp(self.rng.next() as u16 | 1, 53, &query);
        self.ipv4([10, 0, 2, 3], 17, 0, &payload)
    }

    fn udp(&mut self) -> Vec<u8> {
        let length = self.rng.below(3000);
        let data = self.rng.bytes(length);
        let to = if self.rng.one_in(4) { self.rng.next() as u16 } else { self.udp.port() };
        let payload = udp(self.rng.next() as u16, to, &data);
        self.ipv4([10, 0, 2, 2], 17, 0, &payload)
    }

    fn icmp(&mut self) -> Vec<u8> {
        if self.rng.one_in(2) {
            let mut message = vec![8, 0, 0, 0];
            let length = self.rng.below(100);
            message.extend(self.rng.bytes(length));
            let to = [[10, 0, 2, 2], [127, 0, 0, 1], [192, 0, 2, 1]][self.rng.below(3)];
            return self.ipv4(to, 1, 0, &message);
        }
        let mut frame = self.ethernet(0x86dd);
        let mut message = vec![[128, 133, 135, 136][self.rng.below(4)], 0, 0, 0, 0, 0, 0, 0];
        message.extend([0xfd, 0x62, 0x69, 0x76, 0x69, 0x73, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        frame.extend([0x60, 0, 0, 0, 0, message.len() as u8, 58, 255]);
        frame.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        frame.extend([0xfd, 0x62, 0x69, 0x76, 0x69, 0x73, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        frame.extend(message);
        frame
    }

    fn syn(&mut self) -> Vec<u8> {
        let mut segment = Vec::new();
        segment.extend((20_000 + self.rng.below(64) as u16).to_be_bytes());
        segment.extend(self.tcp.port().to_be_bytes());
        segment.extend((self.rng.next() as u32).to_be_bytes());
        segment.extend([0; 4]);
        segment.extend([7 << 4, 2, self.rng.next() as u8, 0, 0, 0, 0, 0]);
        segment.extend([2, 4]);
        segment.extend((self.rng.next() as u16).to_be_bytes());
        segment.extend([1, 3, 3, self.rng.next() as u8]);
        self.ipv4([10, 0, 2, 2], 6, 0, &segment)
    }

    /// A segment that answers one of the NAT's, more or less.
    fn answer_segment(&mut self) -> Vec<u8> {
        let mut state = self.card.state.lock().unwrap();
        let index = self.rng.below(state.1.len());
        let frame = state.1.remove(index);
        drop(state);
        let Some(frame) = frame.filter(|frame| frame.len() >= 54 && frame[23] == 6) else {
            return self.syn();
        };
        let word = |at: usize| {
            u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
        };
        let length = u32::from(u16::from_be_bytes([frame[16], frame[17]])).saturating_sub(40);
        let flags = frame[47];
        let begins = u32::from(flags & 2 != 0) + u32::from(flags & 1 != 0);
        let mut ack = word(38).wrapping_add(length).wrapping_add(begins);
        let mut seq = word(42);
        if self.rng.one_in(4) {
            ack = ack.wrapping_add(self.rng.below(5000) as u32).wrapping_sub(2500);
        }
        if self.rng.one_in(4) {
            seq = seq.wrapping_add(self.rng.below(5000) as u32).wrapping_sub(2500);
        }
        let mut answer = Vec::new();
        answer.extend(&frame[36..38]);
        answer.extend(&frame[34..36]);
        answer.extend(seq.to_be_bytes());
        answer.extend(ack.to_be_bytes());
        let answers_syn = flags & 0x12 == 2;
        let flags = match self.rng.below(20) {
            _ if answers_syn => 0x12,
            0 => 0x14,
            1 => 0x11,
            2 => self.rng.next() as u8,
            _ => 0x10,
        };
        answer.extend([5 << 4, flags]);
        let window = if self.rng.one_in(4) { 0 } else { self.rng.next() as u16 };
        answer.extend(window.to_be_bytes());
        answer.extend([0; 4]);
        if !answers_syn {
            let data = if self.rng.one_in(8) { 40_000 } else { 3000 };
            let data = self.rng.below(data);
            answer.extend(self.rng.bytes(data));
        }
        let to = [frame[26], frame[27], frame[28], frame[29]];
        self.ipv4(to, 6, 0, &answer)
    }

    fn fragment(&mut self) -> Vec<u8> {
        let length = self.rng.below(200) * 8;
        let data = self.rng.bytes(length);
        let flags = (self.rng.next() as u16) & 0x3fff;
        let flags = if self.rng.one_in(2) { flags & 0x203f } else { flags };
        self.ipv4([10, 0, 2, 2], 17, flags, &data)
    }

    /// Asks who the gateway is until it answers: the NAT is alive and hears its guest.
    pub fn check(&self) {
        let begun = Instant::now();
        let request = [
            &[0xff; 6][..],
            &MAC,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &MAC,
            &[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2],
        ]
        .concat();
        self.card.state.lock().unwrap().1.clear();
        loop {
            self.nat.transmit(Packet { frame: &request, offload: Offload::default() });
            self.nat.room();
            std::thread::sleep(Duration::from_millis(1));
            let state = self.card.state.lock().unwrap();
            if state.1.iter().any(|frame| frame[12..14] == [8, 6] && frame[21] == 2) {
                break;
            }
            drop(state);
            assert!(begun.elapsed() < Duration::from_secs(30), "the gateway does not answer");
        }
        let (flows, sockets) = self.nat.census();
        assert!(flows <= 4096 && sockets <= 1024, "{flows} connections, {sockets} sockets");
    }

    /// Connections and sockets of datagrams at present.
    #[allow(dead_code, reason = "the example reports it, the tests do not")]
    pub fn census(&self) -> (usize, usize) {
        self.nat.census()
    }
}

impl Drop for Fuzz {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.nat.plug(None);
        for peer in self.peers.drain(..) {
            // A peer that failed has said so; the run itself is judged by `check`.
            let _ = peer.join();
        }
    }
}

fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let length = (8 + data.len()) as u16;
    let header = [from.to_be_bytes(), to.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    [&header[..], data].concat()
}

/// Does something to a connection, or ends it in some way.
fn handle(rng: &mut Rng, stream: &mut TcpStream) {
    let _ = stream.set_read_timeout(Some(Duration::from_millis(1)));
    let _ = stream.set_write_timeout(Some(Duration::from_millis(1)));
    for _ in 0..rng.below(6) {
        let length = if rng.one_in(6) { 200_000 } else { rng.below(4000) };
        let _ = match rng.below(4) {
            0 | 1 => stream.write(&vec![0x5a; length]),
            2 => stream.read(&mut vec![0; length.max(1)]),
            _ => stream.shutdown(Shutdown::Write).map(|()| 0),
        };
    }
}

/// A server that takes a connection now and then.
fn serve(rng: &mut Rng, listener: &TcpListener) {
    listener.set_nonblocking(true).unwrap();
    match listener.accept() {
        Ok((mut stream, _)) => {
            let _ = stream.set_nonblocking(false);
            handle(rng, &mut stream);
        }
        Err(_) => std::thread::sleep(Duration::from_micros(200)),
    }
}

/// A peer that answers datagrams, DNS queries among them, with more or less of the same.
fn answer(rng: &mut Rng, socket: &UdpSocket) {
    let _ = socket.set_read_timeout(Some(Duration::from_millis(5)));
    let mut message = vec![0; 4000];
    let Ok((length, from)) = socket.recv_from(&mut message) else { return };
    message.truncate(length);
    if let Some(flags) = message.get_mut(2)
        && rng.one_in(2)
    {
        *flags |= 0x80;
    }
    let length = rng.below(100);
    message.extend(rng.bytes(length));
    for _ in 0..rng.below(4) {
        let _ = socket.send_to(&message, from);
    }
}

/// A client of the forwards.
fn knock(rng: &mut Rng, tcp: SocketAddr, udp: SocketAddr) {
    if rng.one_in(2) {
        if let Ok(mut stream) = TcpStream::connect_timeout(&tcp, Duration::from_millis(20)) {
            handle(rng, &mut stream);
        }
    } else {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let length = rng.below(5000);
        let _ = socket.send_to(&rng.bytes(length), udp);
    }
    std::thread::sleep(Duration::from_micros(500));
}
