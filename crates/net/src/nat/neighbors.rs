//! The link: who has which address there (ARP, RFC 826; NDP, RFC 4861), and the router
//! advertisements from which a guest gets its IPv6 addresses and DNS server (RFC 8106).
use super::config::{Layout, MTU};
use super::outbox::{Link, Outbox};
use crate::wire::icmp;
use crate::wire::ip::{ICMPV6, Ip, Pair};
use crate::wire::{ETHERTYPE_ARP, Headers, Mac, be16, bytes_at};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses remembered; a guest has a few.
const MOST: usize = 64;
/// Seconds for which an advertisement makes us the default router, and the DNS server valid.
const ROUTER_LIFETIME: u16 = 1800;
/// NDP is only believed from the link itself, as no router lets 255 pass (RFC 4861 §6.1).
const LINK_HOPS: u8 = 255;
/// All nodes on the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The guest's addresses.
#[derive(Debug, Default)]
pub(crate) struct Neighbors {
    /// The most recently used first.
    entries: Vec<(IpAddr, Mac)>,
}

impl Neighbors {
    /// Notes who has an address; answers whether that is news.
    pub fn learn(&mut self, address: IpAddr, mac: Mac) -> bool {
        if mac.is_group() || self.entries.first() == Some(&(address, mac)) {
            return false;
        }
        let known = self.entries.iter().position(|entry| entry.0 == address);
        let before = known.map(|index| self.entries.remove(index));
        self.entries.truncate(MOST - 1);
        self.entries.insert(0, (address, mac));
        before != Some((address, mac))
    }

    pub fn find(&self, address: IpAddr) -> Option<Mac> {
        self.entries.iter().find(|entry| entry.0 == address).map(|entry| entry.1)
    }

    pub fn clear(&mut self) {
        self.entries.clear();
    }
}

const REQUEST: u16 = 1;
const REPLY: u16 = 2;

/// An ARP packet for IPv4 over Ethernet, read.
struct Arp {
    operation: u16,
    sender: (Mac, Ipv4Addr),
    target: Ipv4Addr,
}

impl Arp {
    fn parse(packet: &[u8]) -> Option<Self> {
        if !packet.starts_with(&[0, 1, 8, 0, 6, 4]) {
            return None;
        }
        Some(Self {
            operation: be16(packet, 6)?,
            sender: (Mac(bytes_at(packet, 8)?), bytes_at::<4>(packet, 14)?.into()),
            target: bytes_at::<4>(packet, 24)?.into(),
        })
    }
}

fn arp_frame(operation: u16, from: (Mac, Ipv4Addr), to: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut frame = Headers::new(to.0, from.0, ETHERTYPE_ARP);
    frame.push(&[0, 1, 8, 0, 6, 4]);
    frame.push(&operation.to_be_bytes());
    for (mac, address) in [from, to] {
        frame.push(&mac.0);
        frame.push(&address.octets());
    }
    frame.as_slice().to_vec()
}

/// Asks who has the guest's address.
pub(crate) fn ask(layout: &Layout, address: Ipv4Addr, outbox: &mut Outbox) {
    let to = (Mac::BROADCAST, address);
    outbox.push(arp_frame(REQUEST, (layout.mac, layout.gateway4), to));
}

/// Handles an ARP packet; answers whether an address became known.
pub(crate) fn arp(
    layout: &Layout,
    packet: &[u8],
    neighbors: &mut Neighbors,
    outbox: &mut Outbox,
) -> bool {
    let Some(arp) = Arp::parse(packet) else { return false };
    let target = IpAddr::V4(arp.target);
    if arp.operation == REQUEST && (layout.is_gateway(target) || layout.is_dns(target)) {
        outbox.push(arp_frame(REPLY, (layout.mac, arp.target), arp.sender));
    }
    let sender = IpAddr::V4(arp.sender.1);
    layout.may_be_guest(sender) && neighbors.learn(sender, arp.sender.0)
}

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;

/// What came of an ICMPv6 message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ndp {
    /// It was not of NDP.
    No,
    /// Handled.
    Done,
    /// A router was asked for.
    Router,
}

/// Handles an ICMPv6 message if it is of NDP.
pub(crate) fn ndp(layout: &Layout, ip: &Ip<'_>, sender: Mac, outbox: &mut Outbox) -> Ndp {
    let Some(&kind) = ip.payload.first() else { return Ndp::Done };
    if !matches!(kind, ROUTER_SOLICITATION..=NEIGHBOR_ADVERTISEMENT) {
        return Ndp::No;
    }
    match (kind, ip.hops) {
        (ROUTER_SOLICITATION, LINK_HOPS) => Ndp::Router,
        (NEIGHBOR_SOLICITATION, LINK_HOPS) => {
            solicited(layout, ip, sender, outbox);
            Ndp::Done
        }
        _ => Ndp::Done,
    }
}

/// Answers a solicitation of one of our addresses.
fn solicited(layout: &Layout, ip: &Ip<'_>, sender: Mac, outbox: &mut Outbox) {
    let Some(target) = bytes_at::<16>(ip.payload, 8).map(Ipv6Addr::from) else { return };
    if !layout.is_gateway(target.into()) && !layout.is_dns(target.into()) {
        return;
    }
    let Pair::V6 { source, .. } = ip.addresses else { return };
    // Without a source the guest wants the address for itself (RFC 4862 §5.4): all learn it is ours.
    let (destination, flags) =
        if source.is_unspecified() { (ALL_NODES, 0xa0) } else { (source, 0xe0) };
    let mut message = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    message.extend_from_slice(&[2, 1]);
    message.extend_from_slice(&layout.mac.0);
    let mac = if destination == ALL_NODES { Mac::of_ipv6_group(ALL_NODES) } else { sender };
    send(layout, mac, Pair::V6 { source: target, destination }, message, outbox);
}

/// Tells all on the link their prefix, router and DNS server.
pub(crate) fn advertise(layout: &Layout, outbox: &mut Outbox) {
    let [high, low] = ROUTER_LIFETIME.to_be_bytes();
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0, high, low];
    message.extend_from_slice(&[0; 8]);
    // Source link-layer address; MTU (RFC 4861 §4.6).
    message.extend_from_slice(&[1, 1]);
    message.extend_from_slice(&layout.mac.0);
    message.extend_from_slice(&[5, 1, 0, 0]);
    message.extend_from_slice(&(MTU as u32).to_be_bytes());
    // The prefix, on this link and for addresses of one's own: valid a day, preferred four hours.
    message.extend_from_slice(&[3, 4, 64, 0xc0]);
    message.extend_from_slice(&86_400u32.to_be_bytes());
    message.extend_from_slice(&14_400u32.to_be_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&layout.prefix6.octets());
    // The DNS server (RFC 8106 §5.1).
    message.extend_from_slice(&[25, 3, 0, 0]);
    message.extend_from_slice(&u32::from(ROUTER_LIFETIME).to_be_bytes());
    message.extend_from_slice(&layout.dns6.octets());
    let addresses = Pair::V6 { source: layout.link_local, destination: ALL_NODES };
    send(layout, Mac::of_ipv6_group(ALL_NODES), addresses, message, outbox);
}

fn send(layout: &Layout, to: Mac, addresses: Pair, mut message: Vec<u8>, outbox: &mut Outbox) {
    icmp::complete(addresses, &mut message);
    outbox.ip(Link { to, from: layout.mac }, addresses, ICMPV6, LINK_HOPS, &message);
}
