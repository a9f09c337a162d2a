//! Doing in software what a sender left to do ([`Offload`]), for a receiver that cannot take it.
use crate::wire::ip::{IPV4_HEADER, Ip, Pair, TCP, UDP};
use crate::wire::{ETHERNET, Ethernet, Sum, be16, be32, put, tcp, udp};
use crate::{Accepts, Offload, Packet, SegmentKind, Segmentation};

/// Most bytes of a frame that is handed over: an IP packet of the largest size with its Ethernet
/// header, and room for two VLAN tags.
pub(crate) const LARGEST_FRAME: usize = ETHERNET + 65_535 + 8;

/// The fewest bytes of payload in a segment that is cut here. A guest cannot make one frame into
/// more than a few hundred.
const SMALLEST_SEGMENT: u16 = 88;

/// What stands in a frame that is to be cut.
struct Large<'a> {
    /// All headers.
    headers: &'a [u8],
    payload: &'a [u8],
    /// Where the IP packet's header and the transport's begin.
    transport: usize,
    addresses: Pair,
    protocol: u8,
}

impl<'a> Large<'a> {
    /// Reads a frame of the kind that `segmentation` names.
    fn parse(frame: &'a [u8], segmentation: &Segmentation) -> Option<Self> {
        let ethernet = Ethernet::parse(frame)?;
        let ip = Ip::parse(ethernet.ethertype, ethernet.payload)?;
        if ip.fragment.is_some() {
            return None;
        }
        let transport = ETHERNET + ip.packet.len() - ip.payload.len();
        let header = match (segmentation.kind, ip.addresses, ip.protocol) {
            (SegmentKind::Tcp4, Pair::V4 { .. }, TCP)
            | (SegmentKind::Tcp6, Pair::V6 { .. }, TCP) => {
                let header = usize::from(ip.payload.get(12)? >> 4) * 4;
                if header < tcp::HEADER {
                    return None;
                }
                header
            }
            (SegmentKind::Udp, _, UDP) => udp::HEADER,
            _ => return None,
        };
        let frame = frame.get(..ETHERNET + ip.packet.len())?;
        let (headers, payload) = frame.split_at_checked(transport + header)?;
        Some(Self { headers, payload, transport, addresses: ip.addresses, protocol: ip.protocol })
    }

    /// Writes the segment that has `part` of the payload, which begins at `offset`, to `out`.
    fn segment(&self, part: &[u8], offset: usize, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(self.headers);
        out.extend_from_slice(part);
        let length = out.len().saturating_sub(self.transport);
        let packet = out.len().saturating_sub(ETHERNET).min(0xffff) as u16;
        match self.addresses {
            Pair::V4 { .. } => {
                put(out, ETHERNET + 2, &packet.to_be_bytes());
                put(out, ETHERNET + 10, &[0, 0]);
                let mut sum = Sum::default();
                sum.add(out.get(ETHERNET..self.transport).unwrap_or_default());
                put(out, ETHERNET + 10, &sum.finish());
            }
            Pair::V6 { .. } => put(out, ETHERNET + 4, &(packet.saturating_sub(40)).to_be_bytes()),
        }
        let checksum = if self.protocol == TCP {
            let seq = be32(out, self.transport + 4).unwrap_or(0).wrapping_add(offset as u32);
            put(out, self.transport + 4, &seq.to_be_bytes());
            // FIN and PSH stay with the last segment, CWR with the first (RFC 3168 §6.1.2).
            let mut flags = out.get(self.transport + 13).copied().unwrap_or(0);
            if offset + part.len() < self.payload.len() {
                flags &= !(tcp::FIN | tcp::PSH);
            }
            if offset > 0 {
                flags &= !0x80;
            }
            put(out, self.transport + 13, &[flags]);
            self.transport + usize::from(tcp::CHECKSUM)
        } else {
            put(out, self.transport + 4, &(length.min(0xffff) as u16).to_be_bytes());
            self.transport + 6
        };
        put(out, checksum, &[0, 0]);
        let mut sum = self.addresses.pseudo(self.protocol, length);
        sum.add(out.get(self.transport..).unwrap_or_default());
        let sum = if self.protocol == UDP { udp::checksum(sum) } else { sum.finish() };
        put(out, checksum, &sum);
    }
}

/// Whether what a packet says about itself fits it: every offset lies inside the frame, and what
/// is to be cut is of the kind it says. A receiver's driver may rely on it.
pub(crate) fn is_sound(packet: &Packet<'_>) -> bool {
    let length = packet.frame.len();
    if !(ETHERNET..=LARGEST_FRAME).contains(&length) {
        return false;
    }
    if let Some(checksum) = packet.offload.checksum {
        let field = usize::from(checksum.start) + usize::from(checksum.offset);
        if usize::from(checksum.start) < ETHERNET + IPV4_HEADER || field + 2 > length {
            return false;
        }
    }
    match &packet.offload.segmentation {
        None => true,
        Some(segmentation) => {
            packet.offload.checksum.is_some()
                && segmentation.size >= SMALLEST_SEGMENT
                && Large::parse(packet.frame, segmentation).is_some()
        }
    }
}

/// Calls `emit` with the packet in forms that `accepts` names, until it answers `false`; `scratch`
/// is memory to build them in. A packet that is not sound is dropped.
///
/// Answers whether all were emitted.
pub(crate) fn adapt(
    packet: Packet<'_>,
    accepts: Accepts,
    scratch: &mut Vec<u8>,
    mut emit: impl FnMut(Packet<'_>) -> bool,
) -> bool {
    if !is_sound(&packet) {
        return true;
    }
    if let Some(segmentation) = &packet.offload.segmentation {
        let taken = match segmentation.kind {
            SegmentKind::Tcp4 => accepts.tcp4 && accepts.checksum,
            SegmentKind::Tcp6 => accepts.tcp6 && accepts.checksum,
            SegmentKind::Udp => false,
        };
        if taken {
            return emit(packet);
        }
        let Some(large) = Large::parse(packet.frame, segmentation) else { return true };
        let size = usize::from(segmentation.size);
        let mut parts = large.payload.chunks(size).enumerate();
        return parts.all(|(index, part)| {
            large.segment(part, index * size, scratch);
            emit(Packet { frame: scratch, offload: Offload::default() })
        });
    }
    match packet.offload.checksum {
        Some(checksum) if !accepts.checksum => {
            scratch.clear();
            scratch.extend_from_slice(packet.frame);
            complete(scratch, usize::from(checksum.start), usize::from(checksum.offset));
            emit(Packet { frame: scratch, offload: Offload::default() })
        }
        _ => emit(packet),
    }
}

/// Completes a checksum: the field holds the sum over the pseudo-header already.
fn complete(frame: &mut [u8], start: usize, offset: usize) {
    let mut sum = Sum::default();
    sum.add(frame.get(start..).unwrap_or_default());
    let is_udp = offset == 6 && be16(frame, start + 4).is_some();
    let sum = if is_udp { udp::checksum(sum) } else { sum.finish() };
    put(frame, start.saturating_add(offset), &sum);
}
