//! IPv4 (RFC 791) and IPv6 (RFC 8200).
use super::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, Headers, Sum, be16, be32, bytes_at};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// ICMP for IPv4.
pub(crate) const ICMP: u8 = 1;
/// TCP.
pub(crate) const TCP: u8 = 6;
/// UDP.
pub(crate) const UDP: u8 = 17;
/// ICMP for IPv6.
pub(crate) const ICMPV6: u8 = 58;
/// The fragment header of IPv6.
pub(crate) const IPV6_FRAGMENT: u8 = 44;
/// Bytes of the IPv4 header that is written.
pub(crate) const IPV4_HEADER: usize = 20;
/// Bytes of an IPv6 header.
pub(crate) const IPV6_HEADER: usize = 40;
/// Hop limit of what is sent as a router on behalf of others.
pub(crate) const HOPS: u8 = 64;
/// More extension headers than any sender uses; a chain that is longer is not followed.
const MOST_EXTENSIONS: usize = 8;

/// Source and destination, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Pair {
    V4 { source: Ipv4Addr, destination: Ipv4Addr },
    V6 { source: Ipv6Addr, destination: Ipv6Addr },
}

impl Pair {
    /// Of two addresses, if they are of one family.
    pub fn of(source: IpAddr, destination: IpAddr) -> Option<Self> {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Some(Self::V4 { source, destination }),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Some(Self::V6 { source, destination }),
            _ => None,
        }
    }

    pub fn source(self) -> IpAddr {
        match self {
            Self::V4 { source, .. } => source.into(),
            Self::V6 { source, .. } => source.into(),
        }
    }

    pub fn destination(self) -> IpAddr {
        match self {
            Self::V4 { destination, .. } => destination.into(),
            Self::V6 { destination, .. } => destination.into(),
        }
    }

    /// The way back.
    pub fn reversed(self) -> Self {
        match self {
            Self::V4 { source, destination } => {
                Self::V4 { source: destination, destination: source }
            }
            Self::V6 { source, destination } => {
                Self::V6 { source: destination, destination: source }
            }
        }
    }

    /// Bytes of the IP header that [`Headers::ip`] writes.
    pub fn header(self) -> usize {
        match self {
            Self::V4 { .. } => IPV4_HEADER,
            Self::V6 { .. } => IPV6_HEADER,
        }
    }

    pub fn ethertype(self) -> u16 {
        match self {
            Self::V4 { .. } => ETHERTYPE_IPV4,
            Self::V6 { .. } => ETHERTYPE_IPV6,
        }
    }

    /// The checksum over the pseudo-header.
    pub fn pseudo(self, protocol: u8, length: usize) -> Sum {
        Sum::pseudo(self.source(), self.destination(), protocol, length)
    }
}

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub id: u32,
    /// In bytes, a multiple of eight.
    pub offset: usize,
    pub more: bool,
}

/// A packet, its headers read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ip<'a> {
    pub addresses: Pair,
    pub protocol: u8,
    pub hops: u8,
    pub fragment: Option<Fragment>,
    /// What comes after all IP headers.
    pub payload: &'a [u8],
    /// The packet from its IP header on, without padding of the link.
    pub packet: &'a [u8],
}

impl<'a> Ip<'a> {
    /// Reads a packet of the EtherType's version.
    pub fn parse(ethertype: u16, packet: &'a [u8]) -> Option<Self> {
        match ethertype {
            ETHERTYPE_IPV4 => Self::parse_v4(packet),
            ETHERTYPE_IPV6 => Self::parse_v6(packet),
            _ => None,
        }
    }

    fn parse_v4(packet: &'a [u8]) -> Option<Self> {
        let first = *packet.first()?;
        let header = usize::from(first & 0xf) * 4;
        let packet = packet.get(..usize::from(be16(packet, 2)?))?;
        if first >> 4 != 4 || header < IPV4_HEADER {
            return None;
        }
        let flags = be16(packet, 6)?;
        let (offset, more) = (usize::from(flags & 0x1fff) * 8, flags & 0x2000 != 0);
        let id = u32::from(be16(packet, 4)?);
        Some(Self {
            addresses: Pair::V4 {
                source: bytes_at::<4>(packet, 12)?.into(),
                destination: bytes_at::<4>(packet, 16)?.into(),
            },
            protocol: *packet.get(9)?,
            hops: *packet.get(8)?,
            fragment: (more || offset != 0).then_some(Fragment { id, offset, more }),
            payload: packet.get(header..)?,
            packet,
        })
    }

    fn parse_v6(packet: &'a [u8]) -> Option<Self> {
        if packet.first()? >> 4 != 6 {
            return None;
        }
        let packet = packet.get(..IPV6_HEADER + usize::from(be16(packet, 4)?))?;
        let mut ip = Self {
            addresses: Pair::V6 {
                source: bytes_at::<16>(packet, 8)?.into(),
                destination: bytes_at::<16>(packet, 24)?.into(),
            },
            protocol: *packet.get(6)?,
            hops: *packet.get(7)?,
            fragment: None,
            payload: packet.get(IPV6_HEADER..)?,
            packet,
        };
        for _ in 0..MOST_EXTENSIONS {
            let header = match ip.protocol {
                // Hop-by-hop options, routing, destination options (RFC 8200 §4).
                0 | 43 | 60 => (usize::from(*ip.payload.get(1)?) + 1) * 8,
                IPV6_FRAGMENT => {
                    let flags = be16(ip.payload, 2)?;
                    let (offset, more) = (usize::from(flags & 0xfff8), flags & 1 != 0);
                    // A fragment that is the whole datagram is none (RFC 6946).
                    if more || offset != 0 {
                        ip.fragment = Some(Fragment { id: be32(ip.payload, 4)?, offset, more });
                    }
                    8
                }
                _ => return Some(ip),
            };
            ip.protocol = *ip.payload.first()?;
            ip.payload = ip.payload.get(header..)?;
            if ip.fragment.is_some_and(|fragment| fragment.offset != 0) {
                // Further headers are in the first fragment.
                return Some(ip);
            }
        }
        None
    }
}

impl Headers {
    /// Appends an IP header for a packet that is not fragmented. `payload` is in bytes.
    pub fn ip(&mut self, addresses: Pair, protocol: u8, hops: u8, payload: usize) {
        self.ip_fragment(addresses, protocol, hops, payload, None);
    }

    /// Appends an IP header, and for IPv6 the fragment header.
    pub fn ip_fragment(
        &mut self,
        addresses: Pair,
        protocol: u8,
        hops: u8,
        payload: usize,
        fragment: Option<Fragment>,
    ) {
        match addresses {
            Pair::V4 { source, destination } => {
                let total = (IPV4_HEADER + payload).min(0xffff) as u16;
                let (id, flags) = match fragment {
                    Some(Fragment { id, offset, more }) => {
                        (id as u16, (offset / 8) as u16 | (u16::from(more) << 13))
                    }
                    // An atomic datagram needs no identification (RFC 6864 §4.1).
                    None => (0, 0x4000),
                };
                let start = self.len();
                self.push(&[0x45, 0]);
                self.push(&total.to_be_bytes());
                self.push(&id.to_be_bytes());
                self.push(&flags.to_be_bytes());
                self.push(&[hops, protocol, 0, 0]);
                self.push(&source.octets());
                self.push(&destination.octets());
                let mut sum = Sum::default();
                sum.add(self.as_slice().get(start..).unwrap_or_default());
                self.patch(start + 10, &sum.finish());
            }
            Pair::V6 { source, destination } => {
                let extension = if fragment.is_some() { 8 } else { 0 };
                let next = if fragment.is_some() { IPV6_FRAGMENT } else { protocol };
                self.push(&[0x60, 0, 0, 0]);
                self.push(&((payload + extension).min(0xffff) as u16).to_be_bytes());
                self.push(&[next, hops]);
                self.push(&source.octets());
                self.push(&destination.octets());
                if let Some(Fragment { id, offset, more }) = fragment {
                    self.push(&[protocol, 0]);
                    self.push(&(offset as u16 | u16::from(more)).to_be_bytes());
                    self.push(&id.to_be_bytes());
                }
            }
        }
    }
}
