//! Fields of fixed width in headers and tables. What lies beyond the bytes that there are reads
//! as zero and is not written, so that no place in a hostile header can make this fail.

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let found = at.checked_add(N).and_then(|end| bytes.get(at..end));
    found.and_then(|found| found.try_into().ok()).unwrap_or([0; N])
}

/// The field's bytes.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    field(bytes, at)
}

pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(field(bytes, at))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

/// Puts a field's bytes into a header.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let place = at.checked_add(value.len()).and_then(|end| bytes.get_mut(at..end));
    if let Some(place) = place {
        place.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_beyond_the_bytes_reads_as_zero_and_is_not_written() {
        let mut bytes = [1, 2, 3, 4, 5];
        assert_eq!(le32(&bytes, 1), 0x0504_0302);
        assert_eq!(be32(&bytes, 1), 0x0203_0405);
        assert_eq!(le32(&bytes, 2), 0);
        assert_eq!(be64(&bytes, usize::MAX), 0);
        put(&mut bytes, 4, &[9, 9]);
        put(&mut bytes, usize::MAX, &[9]);
        assert_eq!(bytes, [1, 2, 3, 4, 5]);
    }
}
