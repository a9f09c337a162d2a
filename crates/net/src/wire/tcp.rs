//! TCP segments (RFC 9293 §3.1), with the options that matter here: maximum segment size and
//! window scale (RFC 7323 §2).
use super::{Headers, be16, be32};
use std::ops::Add;

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;
/// Bytes of a TCP header without options.
pub(crate) const HEADER: usize = 20;
/// Where the checksum is in a TCP header.
pub(crate) const CHECKSUM: u16 = 16;
/// The largest window scale (RFC 7323 §2.3).
const MOST_SCALE: u8 = 14;

/// A sequence number; compared modulo 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Seq(pub u32);

impl Seq {
    /// How far `self` lies after `earlier`; negative if before.
    pub fn since(self, earlier: Self) -> i64 {
        i64::from(self.0.wrapping_sub(earlier.0) as i32)
    }

    /// How far `self` lies after `earlier`, which is known not to be later.
    pub fn span(self, earlier: Self) -> usize {
        self.0.wrapping_sub(earlier.0) as usize
    }

    pub fn is_after(self, other: Self) -> bool {
        self.since(other) > 0
    }
}

impl Add<usize> for Seq {
    type Output = Self;

    fn add(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(bytes as u32))
    }
}

/// A segment, read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    pub source: u16,
    pub destination: u16,
    pub seq: Seq,
    pub ack: Seq,
    pub flags: u8,
    /// As in the header, not scaled.
    pub window: u16,
    pub mss: Option<u16>,
    pub scale: Option<u8>,
    pub payload: &'a [u8],
}

impl<'a> Segment<'a> {
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = usize::from(bytes.get(12)? >> 4) * 4;
        let mut segment = Self {
            source: be16(bytes, 0)?,
            destination: be16(bytes, 2)?,
            seq: Seq(be32(bytes, 4)?),
            ack: Seq(be32(bytes, 8)?),
            flags: *bytes.get(13)?,
            window: be16(bytes, 14)?,
            mss: None,
            scale: None,
            payload: bytes.get(header..)?,
        };
        let options = bytes.get(HEADER..header)?;
        if segment.has(SYN) {
            segment.options(options);
        }
        Some(segment)
    }

    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The sequence numbers that it takes up.
    pub fn length(&self) -> usize {
        self.payload.len() + usize::from(self.has(SYN)) + usize::from(self.has(FIN))
    }

    /// Reads options until one does not fit.
    fn options(&mut self, mut options: &[u8]) {
        loop {
            match *options {
                [1, ref rest @ ..] => options = rest,
                [2, 4, high, low, ref rest @ ..] => {
                    self.mss = Some(u16::from_be_bytes([high, low]));
                    options = rest;
                }
                [3, 3, scale, ref rest @ ..] => {
                    self.scale = Some(scale.min(MOST_SCALE));
                    options = rest;
                }
                // Not zero and at least two, so that the loop ends.
                [kind, length @ 2..=255, ..] if kind != 0 => {
                    let Some(rest) = options.get(usize::from(length)..) else { return };
                    options = rest;
                }
                _ => return,
            }
        }
    }
}

/// What a header to be written says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields {
    pub source: u16,
    pub destination: u16,
    pub seq: Seq,
    pub ack: Seq,
    pub flags: u8,
    pub window: u16,
    /// In a SYN only.
    pub mss: Option<u16>,
    /// In a SYN only.
    pub scale: Option<u8>,
}

impl Fields {
    /// Bytes of the header.
    pub fn header(&self) -> usize {
        let mss = if self.mss.is_some() { 4 } else { 0 };
        HEADER + mss + if self.scale.is_some() { 4 } else { 0 }
    }
}

impl Headers {
    /// Appends a TCP header; its checksum is zero.
    pub fn tcp(&mut self, fields: &Fields) {
        self.push(&fields.source.to_be_bytes());
        self.push(&fields.destination.to_be_bytes());
        self.push(&fields.seq.0.to_be_bytes());
        self.push(&fields.ack.0.to_be_bytes());
        self.push(&[(fields.header() as u8 / 4) << 4, fields.flags]);
        self.push(&fields.window.to_be_bytes());
        self.push(&[0; 4]);
        if let Some(mss) = fields.mss {
            self.push(&[2, 4]);
            self.push(&mss.to_be_bytes());
        }
        if let Some(scale) = fields.scale {
            self.push(&[1, 3, 3, scale]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_lie_about_their_length_end_the_reading() {
        for options in [&[2u8, 0, 5, 0][..], &[3, 3, 200, 2], &[8, 255, 0, 0], &[2, 4, 1, 0]] {
            let mut bytes = vec![0; HEADER];
            bytes[12] = 6 << 4;
            bytes[13] = SYN;
            bytes.extend_from_slice(options);
            let segment = Segment::parse(&bytes).unwrap();
            assert!(segment.scale.is_none_or(|scale| scale <= MOST_SCALE));
        }
        let mut cut_off = vec![0; HEADER];
        cut_off[12] = 15 << 4;
        assert!(Segment::parse(&cut_off).is_none());
        cut_off[12] = 4 << 4;
        assert!(Segment::parse(&cut_off).is_none(), "a header shorter than its fields");
    }

    #[test]
    fn sequence_numbers_compare_across_the_end_of_their_range() {
        let before = Seq(u32::MAX - 1);
        assert!((before + 4).is_after(before));
        assert_eq!((before + 4).span(before), 4);
        assert_eq!(before.since(before + 4), -4);
    }
}
