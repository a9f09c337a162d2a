//! What goes over a connection between two machines: a header and a frame, as one message.
use crate::wire::{be16, bytes_at};
use crate::{Checksum, Offload, Packet, SegmentKind, Segmentation};

/// Says what it is and in which version.
const MAGIC: [u8; 4] = *b"bvs1";
/// Bytes of the header.
pub(super) const HEADER: usize = 14;

const CHECKSUM: u8 = 1;
const TCP4: u8 = 2;
const TCP6: u8 = 4;
const UDP: u8 = 8;

/// The header of a packet.
pub(super) fn header(offload: &Offload) -> [u8; HEADER] {
    let checksum = offload.checksum.unwrap_or(Checksum { start: 0, offset: 0 });
    let mut flags = if offload.checksum.is_some() { CHECKSUM } else { 0 };
    let mut sizes = (0, 0);
    if let Some(segmentation) = offload.segmentation {
        flags |= match segmentation.kind {
            SegmentKind::Tcp4 => TCP4,
            SegmentKind::Tcp6 => TCP6,
            SegmentKind::Udp => UDP,
        };
        sizes = (segmentation.size, segmentation.header);
    }
    let [m, n, o, p] = MAGIC;
    let [a, b] = checksum.start.to_be_bytes();
    let [c, d] = checksum.offset.to_be_bytes();
    let [e, f] = u16::to_be_bytes(sizes.0);
    let [g, h] = u16::to_be_bytes(sizes.1);
    [m, n, o, p, flags, 0, a, b, c, d, e, f, g, h]
}

/// Reads a message; whether the frame fits what is said of it is still to be checked.
pub(super) fn parse(message: &[u8]) -> Option<Packet<'_>> {
    if bytes_at(message, 0) != Some(MAGIC) {
        return None;
    }
    let flags = *message.get(4)?;
    let kind = match flags & (TCP4 | TCP6 | UDP) {
        0 => None,
        TCP4 => Some(SegmentKind::Tcp4),
        TCP6 => Some(SegmentKind::Tcp6),
        UDP => Some(SegmentKind::Udp),
        _ => return None,
    };
    let (size, header) = (be16(message, 10)?, be16(message, 12)?);
    let (start, offset) = (be16(message, 6)?, be16(message, 8)?);
    Some(Packet {
        frame: message.get(HEADER..)?,
        offload: Offload {
            checksum: (flags & CHECKSUM != 0).then_some(Checksum { start, offset }),
            segmentation: kind.map(|kind| Segmentation { kind, size, header }),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_remains_to_be_done_survives_the_way() {
        let checksum = Some(Checksum { start: 34, offset: 16 });
        let kinds = [SegmentKind::Tcp4, SegmentKind::Tcp6, SegmentKind::Udp];
        let large = kinds.map(|kind| Some(Segmentation { kind, size: 1448, header: 66 }));
        for segmentation in large.into_iter().chain([None]) {
            for checksum in [checksum, None] {
                let offload = Offload { checksum, segmentation };
                let message = [&header(&offload)[..], b"frame"].concat();
                let packet = parse(&message).unwrap();
                assert_eq!((packet.frame, packet.offload), (&b"frame"[..], offload));
            }
        }
        assert!(parse(b"bvs1").is_none());
        assert!(parse(&[0; 40]).is_none());
    }
}
