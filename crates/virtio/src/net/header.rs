//! The header of a packet (§5.1.6).
use ::net::{Checksum, Offload, SegmentKind, Segmentation};

/// Bytes of the header.
pub const LENGTH: usize = 12;

/// `flags`: the checksum is not complete.
const NEEDS_CHECKSUM: u8 = 1;
/// `gso_type`.
mod segments {
    pub const NONE: u8 = 0;
    pub const TCP4: u8 = 1;
    pub const UDP: u8 = 3;
    pub const TCP6: u8 = 4;
}

/// What a driver's header says; `None` where it makes no sense.
pub fn parse(header: [u8; LENGTH]) -> Option<Offload> {
    let [flags, kind, h0, h1, size0, size1, start0, start1, offset0, offset1, _, _] = header;
    let checksum = (flags & NEEDS_CHECKSUM != 0).then(|| Checksum {
        start: u16::from_le_bytes([start0, start1]),
        offset: u16::from_le_bytes([offset0, offset1]),
    });
    let size = u16::from_le_bytes([size0, size1]);
    let header = u16::from_le_bytes([h0, h1]);
    let cut = |kind| (size > 0).then_some(Some(Segmentation { kind, size, header }));
    let segmentation = match kind {
        segments::NONE => None,
        segments::TCP4 => cut(SegmentKind::Tcp4)?,
        segments::TCP6 => cut(SegmentKind::Tcp6)?,
        segments::UDP => cut(SegmentKind::Udp)?,
        _ => return None,
    };
    Some(Offload { checksum, segmentation })
}

/// The header of a packet for the driver, which lies in `buffers` buffers.
pub fn build(offload: Offload, buffers: u16) -> [u8; LENGTH] {
    let mut header = [0; LENGTH];
    let mut put = |at: usize, value: u16| {
        header.iter_mut().skip(at).zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    };
    let flags = if offload.checksum.is_some() { NEEDS_CHECKSUM } else { 0 };
    let kind = offload.segmentation.map_or(segments::NONE, |cut| match cut.kind {
        SegmentKind::Tcp4 => segments::TCP4,
        SegmentKind::Tcp6 => segments::TCP6,
        SegmentKind::Udp => segments::UDP,
    });
    put(0, u16::from_le_bytes([flags, kind]));
    if let Some(cut) = offload.segmentation {
        put(2, cut.header);
        put(4, cut.size);
    }
    if let Some(checksum) = offload.checksum {
        put(6, checksum.start);
        put(8, checksum.offset);
    }
    put(10, buffers);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_survive_the_header() {
        let checksum = Some(Checksum { start: 34, offset: 16 });
        for kind in [SegmentKind::Tcp4, SegmentKind::Tcp6, SegmentKind::Udp] {
            let segmentation = Some(Segmentation { kind, size: 1448, header: 66 });
            let offload = Offload { checksum, segmentation };
            assert_eq!(parse(build(offload, 3)), Some(offload));
        }
        assert_eq!(parse([0; LENGTH]), Some(Offload::default()));
        assert_eq!(build(Offload::default(), 0x201)[10..], [1, 2]);
    }

    #[test]
    fn segments_of_no_size_or_kind_make_no_sense() {
        assert_eq!(parse([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(parse([0, 2, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
