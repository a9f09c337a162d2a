//! What all structures of VHDX are made with: identifiers and the checksum.
use crate::bytes::put;

/// An identifier as it is in the file: [MS-DTYP] 2.3.4.2, the first three fields little-endian.
pub(super) type Guid = [u8; 16];

/// An identifier from the form in which specifications write it.
pub(super) const fn guid(first: u32, second: u16, third: u16, rest: u64) -> Guid {
    let (a, b, c) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes());
    let d = rest.to_be_bytes();
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// The polynomial of CRC-32C (RFC 3720, 12.1), reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 != 0 { value >> 1 ^ POLYNOMIAL } else { value >> 1 };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
};

fn extend(sum: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(sum, |sum, byte| sum >> 8 ^ TABLE[usize::from(sum as u8 ^ byte)])
}

/// CRC-32C of a structure whose checksum is in its bytes 4 to 7, which count as zero.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let (start, rest) = bytes.split_at(4.min(bytes.len()));
    let sum = extend(extend(u32::MAX, start), &[0; 4]);
    !extend(sum, rest.get(4..).unwrap_or_default())
}

/// Puts the checksum in its place.
pub(super) fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes);
    put(bytes, 4, &sum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_3720() {
        assert_eq!(!extend(u32::MAX, b"123456789"), 0xe306_9283);
        assert_eq!(!extend(u32::MAX, &[0; 32]), 0x8a91_36aa);
    }
}
