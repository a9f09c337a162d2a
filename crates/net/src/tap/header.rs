//! The header before each frame of a tap device: struct virtio_net_hdr (virtio 1.2 §5.1.6) without
//! its last field, in the host's byte order.
use crate::{Checksum, Offload, SegmentKind, Segmentation};

/// Bytes of the header.
pub(super) const SIZE: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const NONE: u8 = 0;
const TCP4: u8 = 1;
const TCP6: u8 = 4;
const UDP: u8 = 5;
/// A flag of the kind: the segments' ECN bits are set, which changes nothing here.
const ECN: u8 = 0x80;

/// The header of a packet for the device.
pub(super) fn write(offload: &Offload) -> [u8; SIZE] {
    let flags = if offload.checksum.is_some() { NEEDS_CHECKSUM } else { 0 };
    let checksum = offload.checksum.unwrap_or(Checksum { start: 0, offset: 0 });
    let (kind, header, size) = match offload.segmentation {
        None => (NONE, 0, 0),
        Some(large) => {
            let kind = match large.kind {
                SegmentKind::Tcp4 => TCP4,
                SegmentKind::Tcp6 => TCP6,
                SegmentKind::Udp => UDP,
            };
            (kind, large.header, large.size)
        }
    };
    let [a, b] = u16::to_ne_bytes(header);
    let [c, d] = u16::to_ne_bytes(size);
    let [e, f] = checksum.start.to_ne_bytes();
    let [g, h] = checksum.offset.to_ne_bytes();
    [flags, kind, a, b, c, d, e, f, g, h]
}

/// What the header of a packet from the device says; `None` for kinds that were not asked for.
pub(super) fn read(bytes: &[u8; SIZE]) -> Option<Offload> {
    let [flags, kind, a, b, c, d, e, f, g, h] = *bytes;
    let (header, size) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
    let large = |kind| Some(Segmentation { kind, size, header });
    let checksum =
        Checksum { start: u16::from_ne_bytes([e, f]), offset: u16::from_ne_bytes([g, h]) };
    Some(Offload {
        checksum: (flags & NEEDS_CHECKSUM != 0).then_some(checksum),
        segmentation: match kind & !ECN {
            NONE => None,
            TCP4 => large(SegmentKind::Tcp4),
            TCP6 => large(SegmentKind::Tcp6),
            UDP => large(SegmentKind::Udp),
            _ => return None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let checksum = Some(Checksum { start: 34, offset: 16 });
        for kind in [SegmentKind::Tcp4, SegmentKind::Tcp6, SegmentKind::Udp] {
            let segmentation = Some(Segmentation { kind, size: 1448, header: 66 });
            let offload = Offload { checksum, segmentation };
            assert_eq!(read(&write(&offload)), Some(offload));
        }
        assert_eq!(read(&write(&Offload::default())), Some(Offload::default()));
        assert_eq!(read(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
