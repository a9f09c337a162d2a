//! The formats of the protocols on the wire: reading what a guest sends without trusting any
//! length in it, and writing headers.
//!
//! Readers answer `None` for what is cut off or contradicts itself; nothing here panics or
//! allocates more than what it is given.

pub(crate) mod icmp;
pub(crate) mod ip;
pub(crate) mod tcp;
pub(crate) mod udp;

use std::fmt;
use std::net::IpAddr;

/// EtherType of IPv4.
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Mac(pub [u8; 6]);

impl Mac {
    /// Every station.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it names a group of stations, all of them included.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// The group that IPv6 maps a multicast address to (RFC 2464 §7).
    pub fn of_ipv6_group(group: std::net::Ipv6Addr) -> Self {
        let [.., a, b, c, d] = group.octets();
        Self([0x33, 0x33, a, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// `N` bytes at an offset.
pub(crate) fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// A 16-bit number in network order.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_be_bytes)
}

/// A 32-bit number in network order.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_be_bytes)
}

/// Overwrites bytes at an offset, if they are there.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at.saturating_add(value.len())) {
        place.copy_from_slice(value);
    }
}

/// An Ethernet frame's parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ethernet<'a> {
    pub destination: Mac,
    pub source: Mac,
    pub ethertype: u16,
    pub payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    /// Reads a frame.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        Some(Self {
            destination: Mac(bytes_at(frame, 0)?),
            source: Mac(bytes_at(frame, 6)?),
            ethertype: be16(frame, 12)?,
            payload: frame.get(ETHERNET..)?,
        })
    }
}

/// The Internet checksum under way (RFC 1071): a sum of 16-bit words in ones' complement.
///
/// Words are summed as the host stores them, four bytes at a time, and swapped at the end, which
/// the sum permits (RFC 1071 §2).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// The sum over an IP pseudo-header.
    pub fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let mut sum = Self::default();
        for address in [source, destination] {
            match address {
                IpAddr::V4(address) => sum.add(&address.octets()),
                IpAddr::V6(address) => sum.add(&address.octets()),
            }
        }
        sum.add(&u64::to_be_bytes(length as u64));
        sum.add(&[0, protocol]);
        sum
    }

    /// Adds bytes that begin at an even offset; an odd last one is padded.
    pub fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum = 0u64;
        for word in words {
            sum = sum.wrapping_add(u64::from(u32::from_ne_bytes(*word)));
        }
        let mut last = [0; 4];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        sum = sum.wrapping_add(u64::from(u32::from_ne_bytes(last)));
        // Each addition above is of 32 bits, so a frame cannot overflow 64; the running sum is
        // folded so that many additions cannot either.
        self.0 = (self.0 & 0xffff_ffff) + (self.0 >> 32) + (sum & 0xffff_ffff) + (sum >> 32);
    }

    /// The sum itself, as it stands in a checksum field that someone else is to complete.
    pub fn partial(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum: the complement of the sum.
    pub fn finish(self) -> [u8; 2] {
        let [a, b] = self.partial();
        [!a, !b]
    }
}

/// Room for the headers in front of a payload, built on the stack.
#[derive(Clone, Copy)]
pub(crate) struct Headers {
    bytes: [u8; Headers::ROOM],
    length: usize,
}

impl Headers {
    /// Most bytes of headers: Ethernet, IPv6 with a fragment header, TCP with our options.
    pub const ROOM: usize = 96;

    /// An Ethernet header to start with; its type is set by [`Headers::ip`].
    pub fn new(destination: Mac, source: Mac, ethertype: u16) -> Self {
        let mut headers = Self { bytes: [0; Self::ROOM], length: 0 };
        headers.push(&destination.0);
        headers.push(&source.0);
        headers.push(&ethertype.to_be_bytes());
        headers
    }

    /// Appends; what exceeds [`Headers::ROOM`] is left out, which no caller's headers do.
    pub fn push(&mut self, bytes: &[u8]) {
        debug_assert!(self.length + bytes.len() <= Self::ROOM);
        put(&mut self.bytes, self.length, bytes);
        self.length = (self.length + bytes.len()).min(Self::ROOM);
    }

    /// Overwrites bytes already there.
    pub fn patch(&mut self, at: usize, bytes: &[u8]) {
        put(&mut self.bytes, at, bytes);
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// What was written.
    pub fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 1071 §3.
    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        let mut sum = Sum::default();
        sum.add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.partial(), [0xdd, 0xf2]);
        assert_eq!(sum.finish(), [0x22, 0x0d]);
    }

    #[test]
    fn a_checksum_over_pieces_equals_that_over_the_whole() {
        let bytes: Vec<u8> = (0..4001u32).map(|n| (n * 7 % 251) as u8 | 0x80).collect();
        let mut whole = Sum::default();
        whole.add(&bytes);
        let mut pieces = Sum::default();
        for piece in bytes.chunks(6) {
            pieces.add(piece);
        }
        assert_eq!(whole.finish(), pieces.finish());
        let slow = bytes.chunks(2).fold(0u64, |sum, pair| {
            sum + (u64::from(pair[0]) << 8) + pair.get(1).map_or(0, |&low| u64::from(low))
        });
        let slow = (slow & 0xffff) + (slow >> 16);
        let slow = ((slow & 0xffff) + (slow >> 16)) as u16;
        assert_eq!(whole.partial(), slow.to_be_bytes());
    }
}
