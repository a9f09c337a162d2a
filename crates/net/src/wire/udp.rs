//! UDP datagrams (RFC 768).
use super::be16;

/// Bytes of a UDP header.
pub(crate) const HEADER: usize = 8;

/// A datagram, read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagram<'a> {
    pub source: u16,
    pub destination: u16,
    pub payload: &'a [u8],
}

impl<'a> Datagram<'a> {
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        Some(Self {
            source: be16(bytes, 0)?,
            destination: be16(bytes, 2)?,
            payload: bytes.get(HEADER..usize::from(be16(bytes, 4)?))?,
        })
    }

    /// Reads a frame that holds several datagrams' data: its length field is not to be trusted.
    pub fn parse_large(bytes: &'a [u8]) -> Option<Self> {
        Some(Self {
            source: be16(bytes, 0)?,
            destination: be16(bytes, 2)?,
            payload: bytes.get(HEADER..)?,
        })
    }
}

/// The header of a datagram, with a checksum of zero.
pub(crate) fn header(source: u16, destination: u16, payload: usize) -> [u8; HEADER] {
    let [a, b] = source.to_be_bytes();
    let [c, d] = destination.to_be_bytes();
    let [e, f] = ((HEADER + payload).min(0xffff) as u16).to_be_bytes();
    [a, b, c, d, e, f, 0, 0]
}

/// A checksum as UDP writes it: zero means none (RFC 768), so it is written as its other form.
pub(crate) fn checksum(sum: super::Sum) -> [u8; 2] {
    match sum.finish() {
        [0, 0] => [0xff, 0xff],
        checksum => checksum,
    }
}
