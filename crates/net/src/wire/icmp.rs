//! ICMP (RFC 792) and ICMPv6 (RFC 4443).
use super::ip::{ICMP, ICMPV6, Pair};
use super::{Sum, be16, put};

/// Why something is unreachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreachable {
    /// No route to the network.
    Network,
    /// The host does not answer, or is not one to be reached from here.
    Host,
    /// A policy forbids it.
    Prohibited,
    /// Nothing listens at the port.
    Port,
}

impl Unreachable {
    /// The codes of ICMP (RFC 792, RFC 1812 §5.2.7.1) and ICMPv6 (RFC 4443 §3.1).
    fn codes(self) -> (u8, u8) {
        match self {
            Self::Network => (0, 0),
            Self::Host => (1, 3),
            Self::Prohibited => (13, 1),
            Self::Port => (3, 4),
        }
    }
}

/// An echo request, read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Echo<'a> {
    pub identifier: u16,
    /// The message from its type on.
    pub message: &'a [u8],
}

/// The type of an echo request and of its reply.
fn echo_types(addresses: Pair) -> (u8, u8) {
    match addresses {
        Pair::V4 { .. } => (8, 0),
        Pair::V6 { .. } => (128, 129),
    }
}

/// The protocol's number.
pub(crate) fn protocol(addresses: Pair) -> u8 {
    match addresses {
        Pair::V4 { .. } => ICMP,
        Pair::V6 { .. } => ICMPV6,
    }
}

impl<'a> Echo<'a> {
    /// Reads an echo request.
    pub fn parse(addresses: Pair, message: &'a [u8]) -> Option<Self> {
        let kind = *message.first()?;
        let identifier = be16(message, 4)?;
        be16(message, 6)?;
        (kind == echo_types(addresses).0).then_some(Self { identifier, message })
    }

    /// The reply to it.
    pub fn reply(&self, addresses: Pair) -> Vec<u8> {
        let mut reply = self.message.to_vec();
        put(&mut reply, 0, &[echo_types(addresses).1]);
        complete(addresses.reversed(), &mut reply);
        reply
    }
}

/// Turns a reply that a ping socket received into what the guest expects: with the identifier that
/// it had sent. Answers whether it is one.
pub(crate) fn translate_reply(towards_guest: Pair, message: &mut [u8], identifier: u16) -> bool {
    if message.len() < 8 || message.first() != Some(&echo_types(towards_guest).1) {
        return false;
    }
    put(message, 4, &identifier.to_be_bytes());
    complete(towards_guest, message);
    true
}

/// Writes a message's checksum.
pub(crate) fn complete(addresses: Pair, message: &mut [u8]) {
    put(message, 2, &[0, 0]);
    let mut sum = match addresses {
        Pair::V4 { .. } => Sum::default(),
        Pair::V6 { .. } => addresses.pseudo(ICMPV6, message.len()),
    };
    sum.add(message);
    put(message, 2, &sum.finish());
}

/// Says to the sender of `packet`, whose addresses are given, that it went nowhere; the answer is
/// a message from the packet's destination.
pub(crate) fn unreachable(addresses: Pair, packet: &[u8], why: Unreachable) -> Vec<u8> {
    // As much of the packet as fits in what every host takes: 576 bytes (RFC 1812 §4.3.2.3), 1280
    // (RFC 4443 §2.4).
    let (v4, v6) = why.codes();
    let (kind, code, quote) = match addresses {
        Pair::V4 { .. } => (3, v4, 548),
        Pair::V6 { .. } => (1, v6, 1232),
    };
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(packet.get(..quote).unwrap_or(packet));
    complete(addresses.reversed(), &mut message);
    message
}
