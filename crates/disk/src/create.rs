//! What all formats do alike when they make an image.
use crate::{DiskError, FileOptions, ImageFile, SECTOR};
use std::path::Path;

/// Makes a new file and has `fill` make an image of it. Nothing is left behind where that fails.
pub(crate) fn new_file<T>(
    path: &Path,
    options: FileOptions,
    fill: impl FnOnce(ImageFile) -> Result<T, DiskError>,
) -> Result<T, DiskError> {
    let file = ImageFile::create(path, options)?;
    fill(file).inspect_err(|_| {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(path);
    })
}

/// Refuses a size of a disk that an image cannot have.
pub(crate) fn check_size(file: &str, size: u64, limit: u64) -> Result<(), DiskError> {
    let problem = if size == 0 || !size.is_multiple_of(SECTOR) {
        format!("a disk of {size} bytes cannot be; choose a multiple of {SECTOR}")
    } else if size > limit {
        format!("a disk of {size} bytes cannot be; this format holds at most {limit}")
    } else {
        return Ok(());
    };
    Err(DiskError::Invalid { file: file.to_owned(), problem })
}

/// An identifier that no other image has: RFC 9562, version 4, in the order of its bytes there.
pub(crate) fn random_id() -> Result<[u8; 16], DiskError> {
    let mut id = [0; 16];
    let read = std::fs::File::open("/dev/urandom")
        .and_then(|mut source| std::io::Read::read_exact(&mut source, &mut id));
    read.map_err(|source| DiskError::Host {
        file: "/dev/urandom".to_owned(),
        action: "read random bytes for an image's identifier",
        source,
    })?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}
