//! Big-endian fields of headers and tables. A field that its bytes end before is zero: callers
//! check lengths first where that makes a difference.

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    field(bytes, at).map_or(0, u16::from_be_bytes)
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    field(bytes, at).map_or(0, u32::from_be_bytes)
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    field(bytes, at).map_or(0, u64::from_be_bytes)
}

/// Overwrites a part of `bytes`, which must be long enough; otherwise nothing happens.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    let place = at.checked_add(field.len()).and_then(|end| bytes.get_mut(at..end));
    debug_assert!(place.is_some());
    if let Some(place) = place {
        place.copy_from_slice(field);
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}
