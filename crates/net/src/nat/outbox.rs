//! Frames on their way to the guest that are built whole: everything but bulk TCP data.
use super::config::MTU;
use crate::wire::icmp::{self, Unreachable};
use crate::wire::ip::{Fragment, HOPS, Pair, TCP, UDP};
use crate::wire::tcp::Fields;
use crate::wire::{Headers, Mac, put, tcp, udp};
use std::collections::VecDeque;

/// When so many bytes wait, nobody adds more who can wait; a link's queue does not grow either.
const FULL: usize = 1 << 20;
/// Room beyond [`FULL`] for what cannot wait, such as resets and answers to the guest itself.
const RESERVE: usize = 1 << 18;
/// What a frame costs beside its bytes.
const PER_FRAME: usize = 64;

/// Which stations a frame goes from and to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub to: Mac,
    pub from: Mac,
}

/// Frames that wait for the guest's card.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    next_id: u32,
}

impl Outbox {
    /// Whether who can wait may add a datagram.
    pub fn has_room(&self) -> bool {
        self.bytes < FULL
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Adds a frame; dropped where not even the reserve has room.
    pub fn push(&mut self, frame: Vec<u8>) {
        if self.bytes < FULL + RESERVE {
            self.bytes += frame.len() + PER_FRAME;
            self.frames.push_back(frame);
        }
    }

    /// Hands over frames in their order until `deliver` refuses one, which stays.
    pub fn drain(&mut self, mut deliver: impl FnMut(&[u8]) -> bool) -> bool {
        while let Some(frame) = self.frames.front() {
            if !deliver(frame) {
                return false;
            }
            self.bytes -= frame.len() + PER_FRAME;
            self.frames.pop_front();
        }
        true
    }

    /// Adds all of another's frames.
    pub fn append(&mut self, other: &mut Self) {
        self.frames.append(&mut other.frames);
        self.bytes += std::mem::take(&mut other.bytes);
        self.next_id = self.next_id.max(other.next_id);
    }

    pub fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }

    /// Adds an IP packet, in fragments where it exceeds the link.
    pub fn ip(&mut self, link: Link, addresses: Pair, protocol: u8, hops: u8, payload: &[u8]) {
        if addresses.header() + payload.len() <= MTU {
            let mut headers = Headers::new(link.to, link.from, addresses.ethertype());
            headers.ip(addresses, protocol, hops, payload.len());
            self.push([headers.as_slice(), payload].concat());
            return;
        }
        self.next_id = self.next_id.wrapping_add(1);
        // Offsets count in units of eight bytes; eight more are IPv6's fragment header.
        let piece = (MTU - addresses.header() - 8) & !7;
        let mut offset = 0;
        for part in payload.chunks(piece) {
            let more = offset + part.len() < payload.len();
            let fragment = Some(Fragment { id: self.next_id, offset, more });
            let mut headers = Headers::new(link.to, link.from, addresses.ethertype());
            headers.ip_fragment(addresses, protocol, hops, part.len(), fragment);
            self.push([headers.as_slice(), part].concat());
            offset += part.len();
        }
    }

    /// Adds a UDP datagram.
    pub fn udp(&mut self, link: Link, addresses: Pair, source: u16, destination: u16, data: &[u8]) {
        let header = udp::header(source, destination, data.len());
        let mut datagram = [&header[..], data].concat();
        let mut sum = addresses.pseudo(UDP, datagram.len());
        sum.add(&datagram);
        put(&mut datagram, 6, &udp::checksum(sum));
        self.ip(link, addresses, UDP, HOPS, &datagram);
    }

    /// Adds a TCP segment without data.
    pub fn tcp(&mut self, link: Link, addresses: Pair, fields: &Fields) {
        let mut headers = Headers::new(link.to, link.from, addresses.ethertype());
        headers.ip(addresses, TCP, HOPS, fields.header());
        let start = headers.len();
        headers.tcp(fields);
        let mut sum = addresses.pseudo(TCP, fields.header());
        sum.add(headers.as_slice().get(start..).unwrap_or_default());
        headers.patch(start + usize::from(tcp::CHECKSUM), &sum.finish());
        self.push(headers.as_slice().to_vec());
    }

    /// Says to the guest that its packet, whose addresses are given, went nowhere.
    pub fn unreachable(&mut self, link: Link, addresses: Pair, packet: &[u8], why: Unreachable) {
        let message = icmp::unreachable(addresses, packet, why);
        self.ip(link, addresses.reversed(), icmp::protocol(addresses), HOPS, &message);
    }
}
