//! A guest for the tests: smoltcp behind a card that is plugged into a NAT.
use net::nat::{Nat, NatConfig};
use net::{Accepts, Checksum, Network, Nic, Offload, Packet, SegmentKind, Segmentation};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Only says that a test hangs.
const HANG: Duration = Duration::from_secs(60);

/// A small generator of numbers, the same for the same seed (xorshift64*).
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }
}

/// What kind of card the guest has, and what goes wrong with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kind {
    /// It takes and sends large frames without checksums.
    pub large: bool,
    /// It takes its IPv6 address from router advertisements.
    pub slaac: bool,
    /// One in so many frames for the guest is refused though there is room.
    pub refuses: Option<u64>,
    /// One in so many frames is taken and lost.
    pub loses: Option<u64>,
    /// Frames that it has room for.
    pub room: Option<usize>,
}

/// The guest's card.
pub struct Card {
    kind: Kind,
    queue: Mutex<VecDeque<Vec<u8>>>,
    arrived: Condvar,
    chance: Mutex<Rng>,
    refused: AtomicBool,
}

impl Nic for Card {
    fn accepts(&self) -> Accepts {
        Accepts { checksum: self.kind.large, tcp4: self.kind.large, tcp6: self.kind.large }
    }

    fn receive(&self, packet: Packet<'_>) -> bool {
        let mut queue = self.queue.lock().unwrap();
        let mut chance = self.chance.lock().unwrap();
        let refuses = self.kind.refuses.is_some_and(|one_in| chance.below(one_in) == 0);
        if refuses || queue.len() >= self.kind.room.unwrap_or(256) {
            self.refused.store(true, Ordering::SeqCst);
            self.arrived.notify_all();
            return false;
        }
        if !self.kind.large {
            assert_eq!(packet.offload, Offload::default(), "the card takes plain frames only");
            assert!(packet.frame.len() <= 1514, "{} bytes", packet.frame.len());
        }
        if self.kind.loses.is_none_or(|one_in| chance.below(one_in) != 0) {
            queue.push_back(packet.frame.to_vec());
        }
        self.arrived.notify_all();
        true
    }
}

/// The card as smoltcp sees it.
pub struct Port {
    pub card: Arc<Card>,
    pub nat: Arc<Nat>,
}

pub struct Rx(Vec<u8>);
pub struct Tx<'a>(&'a Port);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        let offload = if self.0.card.kind.large { offload_of(&frame) } else { Offload::default() };
        self.0.nat.transmit(Packet { frame: &frame, offload });
        result
    }
}

/// What a driver with offloads would say about a frame of TCP.
fn offload_of(frame: &[u8]) -> Offload {
    let (kind, start) = match ([frame[12], frame[13]], frame[14 + 9], frame[14 + 6]) {
        ([8, 0], 6, _) => (SegmentKind::Tcp4, 34),
        ([0x86, 0xdd], _, 6) => (SegmentKind::Tcp6, 54),
        _ => return Offload::default(),
    };
    let segmentation = Segmentation { kind, size: 1440, header: start + 20 };
    Offload {
        checksum: Some(Checksum { start, offset: 16 }),
        segmentation: (frame.len() > 1514).then_some(segmentation),
    }
}

impl Device for Port {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Moment) -> Option<(Rx, Tx<'_>)> {
        let frame = self.card.queue.lock().unwrap().pop_front()?;
        if self.card.refused.swap(false, Ordering::SeqCst) {
            self.nat.room();
        }
        Some((Rx(frame), Tx(self)))
    }

    fn transmit(&mut self, _: Moment) -> Option<Tx<'_>> {
        Some(Tx(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = if self.card.kind.large { 65_549 } else { 1514 };
        if self.card.kind.large {
            capabilities.checksum.tcp = phy::Checksum::None;
            capabilities.checksum.udp = phy::Checksum::Tx;
        }
        capabilities
    }
}

/// A guest.
pub struct Guest {
    pub port: Port,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    begun: Instant,
}

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

impl Guest {
    /// A guest with the address that DHCP would give it.
    pub fn new(config: &NatConfig, kind: Kind) -> Self {
        let mut guest = Self::without_address(config, kind);
        guest.interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24)).unwrap();
        });
        let gateway = Ipv4Address::new(10, 0, 2, 2);
        guest.interface.routes_mut().add_default_ipv4_route(gateway).unwrap();
        guest
    }

    pub fn without_address(config: &NatConfig, kind: Kind) -> Self {
        let nat = Arc::new(Nat::new(config).unwrap());
        let card = Arc::new(Card {
            kind,
            queue: Mutex::default(),
            arrived: Condvar::new(),
            chance: Mutex::new(Rng::new(7)),
            refused: AtomicBool::new(false),
        });
        nat.plug(Some(Arc::clone(&card) as Arc<dyn Nic>));
        let mut port = Port { card, nat };
        let mut config = Config::new(EthernetAddress(MAC).into());
        config.random_seed = 11;
        config.slaac = kind.slaac;
        let mut interface = Interface::new(config, &mut port, Moment::ZERO);
        interface.update_ip_addrs(|addresses| {
            let link_local = IpAddress::v6(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfe12, 0x3456);
            addresses.push(IpCidr::new(link_local, 64)).unwrap();
        });
        let sockets = SocketSet::new(Vec::new());
        Self { port, interface, sockets, begun: Instant::now() }
    }

    /// The next frame for the guest, past its stack.
    pub fn take_frame(&mut self) -> Option<Vec<u8>> {
        self.port.card.queue.lock().unwrap().pop_front()
    }

    pub fn nat(&self) -> &Nat {
        &self.port.nat
    }

    fn moment(&self) -> Moment {
        Moment::from_micros(self.begun.elapsed().as_micros() as i64)
    }

    /// Lets the stack do what there is to do.
    pub fn step(&mut self) {
        let moment = self.moment();
        let _ = self.interface.poll(moment, &mut self.port, &mut self.sockets);
    }

    /// Lets the stack do what there is to do, and waits a little if there is nothing.
    pub fn poll(&mut self) {
        self.step();
        let delay = self.interface.poll_delay(self.moment(), &self.sockets);
        let delay = delay.map_or(2000, |delay| delay.total_micros().min(2000));
        let queue = self.port.card.queue.lock().unwrap();
        if queue.is_empty() {
            // A card that had refused by chance has room as soon as it is looked at.
            if self.port.card.refused.swap(false, Ordering::SeqCst) {
                self.port.nat.room();
            }
            let arrived = &self.port.card.arrived;
            drop(arrived.wait_timeout(queue, Duration::from_micros(delay)).unwrap());
        }
    }

    /// Lets the guest run until `done` answers something.
    pub fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(result) = done(self) {
                return result;
            }
            assert!(begun.elapsed() < HANG, "no end of: {what}");
            self.poll();
        }
    }

    pub fn tcp_socket(&mut self, buffer: usize) -> SocketHandle {
        let ring = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut socket = tcp::Socket::new(ring(), ring());
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Begins to connect.
    pub fn connect(&mut self, to: (IpAddress, u16), from: u16, buffer: usize) -> SocketHandle {
        let handle = self.tcp_socket(buffer);
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), to, from).unwrap();
        handle
    }

    /// Sends all of `data`.
    pub fn send(&mut self, handle: SocketHandle, data: &[u8]) {
        let mut sent = 0;
        self.until("sending", |guest| {
            let socket = guest.tcp(handle);
            if socket.can_send() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            (sent == data.len()).then_some(())
        });
    }

    /// Receives until the other side ends.
    pub fn receive_all(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut data = Vec::new();
        self.until("receiving", |guest| {
            let socket = guest.tcp(handle);
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), data.extend_from_slice(bytes))).unwrap();
            }
            (!socket.may_recv() && socket.state() != tcp::State::SynSent).then_some(())
        });
        data
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.port.nat.plug(None);
    }
}

pub const GATEWAY: IpAddress = IpAddress::Ipv4(Ipv4Address::new(10, 0, 2, 2));
pub const DNS: IpAddress = IpAddress::Ipv4(Ipv4Address::new(10, 0, 2, 3));
