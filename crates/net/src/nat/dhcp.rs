//! The DHCP server (RFC 2131, RFC 2132).
use super::config::{Layout, MOST_LEASES};
use crate::wire::{Mac, bytes_at};
use std::net::Ipv4Addr;

/// Where servers listen.
pub(crate) const SERVER_PORT: u16 = 67;
/// Where clients listen.
pub(crate) const CLIENT_PORT: u16 = 68;
/// Seconds.
const LEASE: u32 = 86_400;
/// What stands before the options.
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Where the options begin.
const OPTIONS: usize = 240;
/// The shortest reply that every client takes (RFC 1542 §2.1).
const SHORTEST: usize = 300;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// Gives addresses to Ethernet addresses, the first one the first.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// The place is the lease's number; when all are given, the longest unused goes to the next.
    holders: Vec<(Mac, u64)>,
    clock: u64,
}

impl Leases {
    fn of(&mut self, mac: Mac) -> u8 {
        self.clock += 1;
        let known = self.holders.iter().position(|holder| holder.0 == mac);
        let index = known.unwrap_or_else(|| {
            if self.holders.len() < usize::from(MOST_LEASES) {
                self.holders.push((mac, 0));
                return self.holders.len() - 1;
            }
            let oldest = self.holders.iter().enumerate().min_by_key(|(_, holder)| holder.1);
            oldest.map_or(0, |(index, _)| index)
        });
        if let Some(holder) = self.holders.get_mut(index) {
            *holder = (mac, self.clock);
        }
        index.min(usize::from(MOST_LEASES)) as u8
    }
}

/// A reply and where to.
#[derive(Debug)]
pub(crate) struct Reply {
    pub to: Mac,
    pub address: Ipv4Addr,
    pub message: Vec<u8>,
}

/// A client's message, read.
struct Message {
    kind: u8,
    client: Mac,
    transaction: [u8; 4],
    flags: [u8; 2],
    own_address: Ipv4Addr,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl Message {
    fn parse(bytes: &[u8]) -> Option<Self> {
        // A request of Ethernet, not relayed.
        if !bytes.starts_with(&[1, 1, 6]) || bytes_at(bytes, 236) != Some(COOKIE) {
            return None;
        }
        let mut message = Self {
            kind: 0,
            client: Mac(bytes_at(bytes, 28)?),
            transaction: bytes_at(bytes, 4)?,
            flags: bytes_at(bytes, 10)?,
            own_address: bytes_at::<4>(bytes, 12)?.into(),
            requested: None,
            server: None,
        };
        let mut options = bytes.get(OPTIONS..)?;
        loop {
            match *options {
                [0, ref rest @ ..] => options = rest,
                [255, ..] | [] | [_] => break,
                [code, length, ref rest @ ..] => {
                    let (value, rest) = rest.split_at_checked(usize::from(length))?;
                    match code {
                        50 => message.requested = bytes_at::<4>(value, 0).map(Into::into),
                        53 => message.kind = *value.first()?,
                        54 => message.server = bytes_at::<4>(value, 0).map(Into::into),
                        _ => {}
                    }
                    options = rest;
                }
            }
        }
        (!message.client.is_group()).then_some(message)
    }
}

/// Answers a client's message.
pub(crate) fn answer(
    layout: &Layout,
    hostname: Option<&str>,
    leases: &mut Leases,
    bytes: &[u8],
) -> Option<Reply> {
    let message = Message::parse(bytes)?;
    if message.server.is_some_and(|server| server != layout.gateway4) {
        return None;
    }
    if !matches!(message.kind, DISCOVER | REQUEST | INFORM) {
        // A release changes nothing: the same client gets the same address again.
        return None;
    }
    let address = layout.guest4(leases.of(message.client));
    let kind = match message.kind {
        DISCOVER => OFFER,
        REQUEST if message.requested.unwrap_or(message.own_address) != address => NAK,
        _ => ACK,
    };
    let given =
        if matches!(kind, NAK) || message.kind == INFORM { Ipv4Addr::UNSPECIFIED } else { address };
    let mut reply = header(&message, given);
    option(&mut reply, 53, &[kind]);
    option(&mut reply, 54, &layout.gateway4.octets());
    if kind != NAK {
        if message.kind != INFORM {
            option(&mut reply, 51, &LEASE.to_be_bytes());
        }
        option(&mut reply, 1, &[255, 255, 255, 0]);
        option(&mut reply, 3, &layout.gateway4.octets());
        option(&mut reply, 6, &layout.dns4.octets());
        if let Some(hostname) = hostname {
            option(&mut reply, 12, hostname.as_bytes());
        }
    }
    reply.push(255);
    reply.resize(reply.len().max(SHORTEST), 0);
    // A client that has its address takes a packet to it; others any (RFC 2131 §4.1).
    let has_address = message.own_address == address && kind != NAK;
    let to = if has_address { message.client } else { Mac::BROADCAST };
    let destination = if has_address { address } else { Ipv4Addr::BROADCAST };
    Some(Reply { to, address: destination, message: reply })
}

/// The fixed part of a reply, up to its options.
fn header(message: &Message, given: Ipv4Addr) -> Vec<u8> {
    let mut reply = vec![2, 1, 6, 0];
    reply.extend_from_slice(&message.transaction);
    reply.extend_from_slice(&[0, 0]);
    reply.extend_from_slice(&message.flags);
    reply.extend_from_slice(&message.own_address.octets());
    reply.extend_from_slice(&given.octets());
    reply.extend_from_slice(&[0; 8]);
    reply.extend_from_slice(&message.client.0);
    reply.resize(OPTIONS - COOKIE.len(), 0);
    reply.extend_from_slice(&COOKIE);
    reply
}

fn option(reply: &mut Vec<u8>, code: u8, value: &[u8]) {
    reply.push(code);
    reply.push(value.len().min(255) as u8);
    reply.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::super::config::NatConfig;
    use super::*;

    fn request(mac: Mac, options: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; OPTIONS];
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[4..8].copy_from_slice(b"xyzt");
        bytes[28..34].copy_from_slice(&mac.0);
        bytes[236..].copy_from_slice(&COOKIE);
        bytes.extend_from_slice(options);
        bytes
    }

    fn layout() -> Layout {
        Layout::new(&NatConfig::default()).unwrap()
    }

    fn kind(reply: &Reply) -> u8 {
        reply.message[OPTIONS + 2]
    }

    #[test]
    fn a_lease_is_offered_and_given_with_name_router_and_dns() {
        let (layout, mut leases) = (layout(), Leases::default());
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        let mut answer = |options: &[u8]| {
            answer(&layout, Some("web"), &mut leases, &request(mac, options)).unwrap()
        };
        let offer = answer(&[53, 1, DISCOVER, 255]);
        assert_eq!(kind(&offer), OFFER);
        assert_eq!(offer.message[16..20], [10, 0, 2, 15]);
        let ack = answer(&[53, 1, REQUEST, 50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2, 255]);
        assert_eq!(kind(&ack), ACK);
        for option in [&[3, 4, 10, 0, 2, 2][..], &[6, 4, 10, 0, 2, 3], &[12, 3, b'w', b'e', b'b']] {
            assert!(ack.message.windows(option.len()).any(|bytes| bytes == option), "{option:?}");
        }
        let nak = answer(&[53, 1, REQUEST, 50, 4, 192, 168, 0, 9, 255]);
        assert_eq!((kind(&nak), &nak.message[16..20]), (NAK, &[0, 0, 0, 0][..]));
    }

    #[test]
    fn a_guest_with_many_cards_does_not_get_more_addresses_than_there_are() {
        let (layout, mut leases) = (layout(), Leases::default());
        for n in 0..1000u32 {
            let [a, b, c, d] = n.to_be_bytes();
            let bytes = request(Mac([2, 0, a, b, c, d]), &[53, 1, DISCOVER, 255]);
            let reply = answer(&layout, None, &mut leases, &bytes).unwrap();
            assert!((15..79).contains(&reply.message[19]), "{}", reply.message[19]);
        }
        assert_eq!(leases.holders.len(), usize::from(MOST_LEASES));
    }

    #[test]
    fn options_that_are_cut_off_are_not_answered() {
        let (layout, mut leases) = (layout(), Leases::default());
        for options in [&[53, 200, 1][..], &[53, 0, 255], &[50, 4, 1], &[], &[53], &[0, 0, 12]] {
            let bytes = request(Mac([2; 6]), options);
            assert!(answer(&layout, None, &mut leases, &bytes).is_none(), "{options:?}");
        }
        let whole = request(Mac([2; 6]), &[53, 1, DISCOVER, 255]);
        for length in 0..OPTIONS {
            assert!(answer(&layout, None, &mut leases, &whole[..length]).is_none());
        }
    }
}
