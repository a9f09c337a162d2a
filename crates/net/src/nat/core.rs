//! What the NAT does with each frame of the guest and each event of the host, without threads and
//! with a clock that is handed in.
use super::config::{Layout, Limits, NatConfig};
use super::datagrams::{self, Datagrams, Resolvers};
use super::dhcp::{self, Leases};
use super::host::{self, Policy, Token};
use super::neighbors::{self, Ndp, Neighbors};
use super::outbox::{Link, Outbox};
use super::reassembly::Reassembly;
use super::tcp::{self, Tcp};
use super::udp_forward::UdpForward;
use crate::poller::Poller;
use crate::wire::icmp::{self, Echo};
use crate::wire::ip::{HOPS, ICMP, ICMPV6, Ip, Pair, TCP, UDP};
use crate::wire::udp::Datagram;
use crate::wire::{ETHERTYPE_ARP, Ethernet, Mac};
use crate::{Nic, Packet, SegmentKind};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connections taken from a listener before others have their turn.
const ACCEPTS: usize = 64;
/// When to look again at a listener whose connections could not be taken.
const RETRY: Duration = Duration::from_millis(100);
/// How often routers tell that they are there, of the half hour that it is valid.
const ADVERTISE: Duration = Duration::from_secs(300);
/// Datagrams in one large frame; Linux makes no more (UDP_MAX_SEGMENTS).
const MOST_DATAGRAMS: usize = 128;

/// A TCP port of the host that leads to one of the guest's.
#[derive(Debug)]
pub(crate) struct Listener {
    pub socket: OwnedFd,
    pub guest_port: u16,
    /// There may be connections that could not be taken yet.
    pub waiting: bool,
}

/// All that a NAT knows.
#[derive(Debug)]
pub(crate) struct Core {
    policy: Policy,
    hostname: Option<String>,
    poller: Arc<Poller>,
    outbox: Outbox,
    neighbors: Neighbors,
    leases: Leases,
    resolvers: Resolvers,
    tcp: Tcp,
    datagrams: Datagrams,
    reassembly: Reassembly,
    listeners: Vec<Listener>,
    udp_forwards: Vec<UdpForward>,
    /// When to advertise the router, once the guest was seen to use IPv6.
    advertise: Option<Instant>,
    /// When to look at waiting listeners.
    retry: Option<Instant>,
}

/// The parts of the core that TCP needs.
macro_rules! tcp_context {
    ($core:ident, $now:expr) => {
        tcp::Context {
            policy: &$core.policy,
            poller: &$core.poller,
            outbox: &mut $core.outbox,
            resolvers: &mut $core.resolvers,
            now: $now,
        }
    };
}

/// The parts of the core that datagrams need.
macro_rules! datagram_context {
    ($core:ident, $now:expr) => {
        datagrams::Context {
            policy: &$core.policy,
            poller: &$core.poller,
            outbox: &mut $core.outbox,
            resolvers: &mut $core.resolvers,
            forwards: &mut $core.udp_forwards,
            now: $now,
        }
    };
}

impl Core {
    pub fn new(
        layout: Layout,
        config: &NatConfig,
        poller: Arc<Poller>,
        listeners: Vec<Listener>,
        udp_forwards: Vec<UdpForward>,
        now: Instant,
    ) -> Self {
        let limits = Limits::of_process();
        Self {
            policy: Policy { layout, access: config.host_access },
            hostname: config.hostname.clone(),
            poller,
            outbox: Outbox::default(),
            neighbors: Neighbors::default(),
            leases: Leases::default(),
            resolvers: Resolvers::new(&config.resolv_conf),
            tcp: Tcp::new(limits.flows, now),
            datagrams: Datagrams::new(limits.datagrams, now),
            reassembly: Reassembly::default(),
            listeners,
            udp_forwards,
            advertise: None,
            retry: None,
        }
    }

    /// Connections and sockets of datagrams at present.
    pub fn census(&self) -> (usize, usize) {
        (self.tcp.len(), self.datagrams.len())
    }

    /// A frame from the guest.
    pub fn guest_frame(&mut self, packet: &Packet<'_>, now: Instant) {
        let Some(ethernet) = Ethernet::parse(packet.frame) else { return };
        let ours = ethernet.destination == self.policy.layout.mac;
        if ethernet.source.is_group() || !(ours || ethernet.destination.is_group()) {
            return;
        }
        if ethernet.ethertype == ETHERTYPE_ARP {
            let layout = &self.policy.layout;
            let (neighbors, outbox) = (&mut self.neighbors, &mut self.outbox);
            if neighbors::arp(layout, ethernet.payload, neighbors, outbox) {
                self.found_guest(now);
            }
        } else if let Some(ip) = Ip::parse(ethernet.ethertype, ethernet.payload) {
            self.ip(&ip, ethernet.source, ours, packet, now);
        }
    }

    fn ip(&mut self, ip: &Ip<'_>, mac: Mac, unicast: bool, packet: &Packet<'_>, now: Instant) {
        let source = ip.addresses.source();
        if self.policy.layout.may_be_guest(source) {
            if self.neighbors.learn(source, mac) {
                self.found_guest(now);
            }
        } else if !source.is_unspecified() {
            return;
        }
        if let Some(fragment) = ip.fragment {
            if unicast && let Some((protocol, payload)) = self.reassembly.add(ip, fragment, now) {
                let whole = Ip { protocol, payload: &payload, fragment: None, ..*ip };
                self.transport(&whole, mac, unicast, packet, now);
            }
            return;
        }
        self.transport(ip, mac, unicast, packet, now);
    }

    fn transport(
        &mut self,
        ip: &Ip<'_>,
        mac: Mac,
        unicast: bool,
        packet: &Packet<'_>,
        now: Instant,
    ) {
        if ip.protocol == UDP && self.dhcp(ip) {
            return;
        }
        if ip.protocol == ICMPV6 {
            match neighbors::ndp(&self.policy.layout, ip, mac, &mut self.outbox) {
                Ndp::No => {}
                Ndp::Done => return,
                Ndp::Router => {
                    self.advertise = Some(now);
                    return;
                }
            }
        }
        // A router passes on only what is sent to it, from an address that can be answered.
        let destination = ip.addresses.destination();
        if !unicast || destination.is_multicast() || ip.addresses.source().is_unspecified() {
            return;
        }
        match ip.protocol {
            TCP => {
                if let Some(segment) = crate::wire::tcp::Segment::parse(ip.payload) {
                    let context = &mut tcp_context!(self, now);
                    self.tcp.guest_segment(ip.addresses, &segment, mac, ip.packet, context);
                }
            }
            UDP => self.udp(ip, mac, packet, now),
            ICMP | ICMPV6 if ip.protocol == icmp::protocol(ip.addresses) => {
                if let Some(echo) = Echo::parse(ip.addresses, ip.payload) {
                    self.echo(ip, &echo, mac, now);
                }
            }
            _ => {}
        }
    }

    /// Answers a message for the DHCP server; answers whether it was one.
    fn dhcp(&mut self, ip: &Ip<'_>) -> bool {
        let Pair::V4 { destination, .. } = ip.addresses else { return false };
        let layout = &self.policy.layout;
        if destination != Ipv4Addr::BROADCAST && destination != layout.gateway4 {
            return false;
        }
        let Some(datagram) = Datagram::parse(ip.payload) else { return false };
        if datagram.destination != dhcp::SERVER_PORT {
            return false;
        }
        let hostname = self.hostname.as_deref();
        let reply = dhcp::answer(layout, hostname, &mut self.leases, datagram.payload);
        if let Some(dhcp::Reply { to, address, message }) = reply {
            let addresses = Pair::V4 { source: layout.gateway4, destination: address };
            let link = Link::between(layout.mac, to);
            let (from, to) = (dhcp::SERVER_PORT, dhcp::CLIENT_PORT);
            self.outbox.udp(link, addresses, from, to, &message);
        }
        true
    }

    fn udp(&mut self, ip: &Ip<'_>, mac: Mac, packet: &Packet<'_>, now: Instant) {
        let context = &mut datagram_context!(self, now);
        let size = match packet.offload.segmentation {
            Some(large) if large.kind == SegmentKind::Udp => usize::from(large.size),
            _ => {
                if let Some(datagram) = Datagram::parse(ip.payload) {
                    self.datagrams.udp(ip.addresses, &datagram, mac, ip.packet, context);
                }
                return;
            }
        };
        let Some(large) = Datagram::parse_large(ip.payload) else { return };
        if size == 0 || large.payload.len().div_ceil(size) > MOST_DATAGRAMS {
            return;
        }
        for payload in large.payload.chunks(size) {
            let datagram = Datagram { payload, ..large };
            self.datagrams.udp(ip.addresses, &datagram, mac, ip.packet, context);
        }
    }

    fn echo(&mut self, ip: &Ip<'_>, echo: &Echo<'_>, mac: Mac, now: Instant) {
        let layout = &self.policy.layout;
        let destination = ip.addresses.destination();
        if layout.is_gateway(destination) || layout.is_dns(destination) {
            let link = Link::between(layout.mac, mac);
            let (reply, protocol) = (echo.reply(ip.addresses), ip.protocol);
            self.outbox.ip(link, ip.addresses.reversed(), protocol, HOPS, &reply);
            return;
        }
        let context = &mut datagram_context!(self, now);
        self.datagrams.echo(ip.addresses, echo, mac, ip.packet, context);
    }

    /// The guest's Ethernet address became known.
    fn found_guest(&mut self, now: Instant) {
        if let Some(mac) = self.neighbors.find(self.policy.layout.guest4(0).into()) {
            self.tcp.found(mac);
        }
        self.advertise = self.advertise.or(Some(now));
    }

    /// Something happened to a socket of the host.
    pub fn host_event(&mut self, token: Token, flags: EventFlags, now: Instant) {
        match token {
            Token::Wake => {}
            Token::Flow(key) => self.tcp.host_event(key, flags, &mut tcp_context!(self, now)),
            Token::Listener(index) => self.accept(index as usize, now),
            Token::Datagram(key) => {
                self.datagrams.host_event(key, &mut datagram_context!(self, now));
            }
            Token::UdpForward(index) => {
                if let Some(forward) = self.udp_forwards.get_mut(index as usize) {
                    forward.receive(&self.policy, &self.neighbors, &mut self.outbox, now);
                }
            }
        }
    }

    /// Takes the connections that wait at a listener.
    fn accept(&mut self, index: usize, now: Instant) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        let guest = IpAddr::V4(self.policy.layout.guest4(0));
        let mac = self.neighbors.find(guest);
        listener.waiting = false;
        for _ in 0..ACCEPTS {
            if self.tcp.is_full() {
                break;
            }
            match host::accept(&listener.socket) {
                Ok((socket, peer)) => {
                    let client = self.policy.client(peer);
                    let guest = SocketAddr::new(guest, listener.guest_port);
                    let context = &mut tcp_context!(self, now);
                    self.tcp.accepted(socket, client, guest, mac, context);
                    if mac.is_none() {
                        let guest = self.policy.layout.guest4(0);
                        neighbors::ask(&self.policy.layout, guest, &mut self.outbox);
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                // The process has no more sockets. The client waits.
                Err(_) => break,
            }
        }
        listener.waiting = true;
        self.retry = Some(self.retry.map_or(now + RETRY, |retry| retry.min(now + RETRY)));
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        if self.retry.is_some_and(|retry| retry <= now) {
            self.retry = None;
            for index in 0..self.listeners.len() {
                if self.listeners.get(index).is_some_and(|listener| listener.waiting) {
                    self.accept(index, now);
                }
            }
        }
        if self.advertise.is_some_and(|advertise| advertise <= now) {
            self.advertise = Some(now + ADVERTISE);
            neighbors::advertise(&self.policy.layout, &mut self.outbox);
        }
        let asks = self.tcp.tick(&mut tcp_context!(self, now));
        if asks {
            let guest = self.policy.layout.guest4(0);
            neighbors::ask(&self.policy.layout, guest, &mut self.outbox);
        }
        self.datagrams.tick(&mut datagram_context!(self, now));
    }

    /// When [`Core::tick`] is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let own = [self.retry, self.advertise, self.tcp.deadline(), self.datagrams.deadline()];
        own.into_iter().flatten().min()
    }

    /// Whether something waits for the guest's card.
    pub fn has_work(&self) -> bool {
        self.tcp.has_work() || !self.outbox.is_empty() || self.waits_for_outbox()
    }

    fn waits_for_outbox(&self) -> bool {
        self.datagrams.has_pending() || self.udp_forwards.iter().any(|forward| forward.pending)
    }

    /// Lets what waits go to the guest, at most `most` turns of connections. Answers `false` once
    /// the card has refused something; [`Core::take_outbox`] has the rest.
    pub fn turns(&mut self, nic: &dyn Nic, most: usize, now: Instant) -> bool {
        if self.waits_for_outbox() && self.outbox.has_room() {
            self.datagrams.resume(&mut datagram_context!(self, now));
            for forward in self.udp_forwards.iter_mut().filter(|forward| forward.pending) {
                forward.receive(&self.policy, &self.neighbors, &mut self.outbox, now);
            }
        }
        self.tcp.turns(nic, most, &mut tcp_context!(self, now))
    }

    /// Frames that are to be handed over next.
    pub fn take_outbox(&mut self) -> Outbox {
        std::mem::take(&mut self.outbox)
    }

    /// Puts back what could not be handed over.
    pub fn put_back(&mut self, mut rest: Outbox) {
        rest.append(&mut self.outbox);
        self.outbox = rest;
    }

    /// The card is gone, and what was meant for it.
    pub fn unplugged(&mut self) {
        self.outbox.clear();
        self.neighbors.clear();
    }
}
