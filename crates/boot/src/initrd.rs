//! Telling an initrd from a file given by mistake, and a whole one from a truncated one.
use crate::error::BootError;
use crate::source::{Image, field};

/// What the kernel unpacks or mounts, by the first bytes (init/do_mounts_rd.c, lib/decompress.c,
/// init/initramfs.c).
const MAGICS: &[(usize, &[u8])] = &[
    (0, b"070701"),
    (0, b"070702"),
    (0, b"\x1f\x8b"),
    (0, b"\x1f\x9e"),
    (0, b"BZh"),
    (0, b"\xfd7zXZ\0"),
    (0, b"\x5d\0\0"),
    (0, b"\x89LZO\0"),
    (0, b"\x02\x21\x4c\x18"),
    (0, b"\x04\x22\x4d\x18"),
    (0, b"\x28\xb5\x2f\xfd"),
    (0, b"hsqs"),
    (0, b"-rom1fs-"),
    (0, b"\x45\x3d\xcd\x28"),
    (1080, b"\x53\xef"),
    (1040, b"\x7f\x13"),
    (1040, b"\x8f\x13"),
];

/// Entries of an archive looked at: beyond what an initramfs has, so that checking a hostile file
/// ends soon.
const MAX_ENTRIES: usize = 1 << 20;

/// Refuses what is not an initrd and what is cut off.
pub(crate) fn check(initrd: &Image) -> Result<(), BootError> {
    let start = initrd.prefix(2048)?;
    let known = MAGICS
        .iter()
        .any(|(offset, magic)| start.get(*offset..).is_some_and(|rest| rest.starts_with(magic)));
    if !known {
        return Err(BootError::ForeignInitrd { name: initrd.name().into() });
    }
    if start.starts_with(b"07070") { check_cpio(initrd) } else { Ok(()) }
}

/// Walks the first archive ("newc", Documentation/driver-api/early-userspace/buffer-format.rst) to
/// its trailer: cut off before it, the kernel would run with half a file system.
fn check_cpio(initrd: &Image) -> Result<(), BootError> {
    const HEADER: u64 = 110;
    let mut offset = 0u64;
    for _ in 0..MAX_ENTRIES {
        let mut header = [0u8; HEADER as usize];
        initrd.read("an entry of the cpio archive", offset, &mut header)?;
        if !matches!(&header[..6], b"070701" | b"070702") {
            return Err(initrd.malformed(format!("there is no cpio entry at byte {offset}")));
        }
        let number = |position: usize| {
            std::str::from_utf8(&field::<8>(&header, position))
                .ok()
                .and_then(|text| u32::from_str_radix(text, 16).ok())
                .map(u64::from)
                .ok_or_else(|| initrd.malformed(format!("its cpio entry at byte {offset}")))
        };
        let (file_size, name_size) = (number(54)?, number(94)?);
        let name_at = offset + HEADER;
        let mut name = [0u8; 11];
        let is_trailer = name_size == name.len() as u64 && {
            initrd.read("a name in the cpio archive", name_at, &mut name)?;
            &name == b"TRAILER!!!\0"
        };
        if is_trailer {
            return Ok(());
        }
        let data = (name_at + name_size).next_multiple_of(4);
        initrd.check("a file in the cpio archive", data, file_size)?;
        offset = (data + file_size).next_multiple_of(4);
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A cpio archive with one file.
    pub(crate) fn archive() -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, data) in [("init", &b"#!/bin/sh\n"[..]), ("TRAILER!!!", b"")] {
            let mut header = String::from("070701");
            for position in 0..13 {
                let value = match position {
                    6 => data.len(),
                    11 => name.len() + 1,
                    _ => 0,
                };
                header.push_str(&format!("{value:08X}"));
            }
            for part in [header.as_bytes(), name.as_bytes(), b"\0"] {
                bytes.extend_from_slice(part);
            }
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn an_archive_cut_anywhere_before_its_trailer_is_refused_without_a_panic() {
        let whole = archive();
        let image = |length: usize| Image::from_bytes("initrd".into(), whole[..length].to_vec());
        check(&image(whole.len()).unwrap()).unwrap();
        let trailer_ends = whole.windows(10).position(|w| w == b"TRAILER!!!").unwrap() + 11;
        for length in 1..trailer_ends {
            let error = check(&image(length).unwrap()).unwrap_err();
            let expected =
                matches!(error, BootError::Truncated { .. } | BootError::ForeignInitrd { .. });
            assert!(expected, "cut at {length}: {error}");
        }
    }

    #[test]
    fn text_is_not_an_initrd_and_gzip_is() {
        let foreign = Image::from_bytes("notes.txt".into(), b"hello".to_vec()).unwrap();
        let message = check(&foreign).unwrap_err().to_string();
        assert!(message.starts_with("notes.txt: not an initrd"), "{message}");
        let gzip = Image::from_bytes("i.gz".into(), b"\x1f\x8b\x08\0".to_vec()).unwrap();
        check(&gzip).unwrap();
    }
}
