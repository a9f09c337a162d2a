//! Overlays: a qcow2 image that holds what was written since, over a disk of any format that is
//! only read.
use crate::format::{self, Format, OpenOptions};
use crate::qcow2::{BackingName, CreateOptions, Qcow2};
use crate::{Disk, DiskError, FileOptions};
use std::path::{Path, absolute};
use std::sync::Arc;

/// Makes an overlay at `path` over the image `below`, which has the given format, and as large as
/// that. The overlay's header names it, so that [`format::open`] finds it again: relative to the
/// overlay's folder if it is in there or further down, else by its absolute path.
///
/// # Errors
/// `below` cannot be opened, or the overlay not be made.
pub fn create(path: &Path, below: &Path, format: Format) -> Result<(), DiskError> {
    let size = format::open(below, Some(format), OpenOptions::read())?.size();
    create_over(path, &name_from(path, below)?, format, size)
}

/// Makes an overlay at `path` over a disk of `size` bytes, which its header is to name `name`. It
/// need not be a file: [`open_over`] is told what to put below.
///
/// # Errors
/// As [`Qcow2::create`].
pub fn create_over(path: &Path, name: &str, format: Format, size: u64) -> Result<(), DiskError> {
    let format = Some(format.name_in_headers().to_owned());
    let backing = Some(BackingName { name: name.to_owned(), format });
    let options = CreateOptions { backing, ..CreateOptions::new(size) };
    Qcow2::create(path, &options, FileOptions::write())
}

/// Opens an overlay over `below`, whatever its header names.
///
/// # Errors
/// As [`Qcow2::open`].
pub fn open_over(
    path: &Path,
    options: FileOptions,
    below: &Arc<dyn Disk>,
) -> Result<Qcow2, DiskError> {
    Qcow2::open(path, options, &|_| Ok(below.clone()))
}

/// What the header of an image at `path` is to call the file `below`.
fn name_from(path: &Path, below: &Path) -> Result<String, DiskError> {
    let host = |source| DiskError::Host {
        file: below.display().to_string(),
        action: "find out where it is",
        source,
    };
    let folder = absolute(path).map_err(host)?;
    let below = absolute(below).map_err(host)?;
    let relative = folder.parent().and_then(|folder| below.strip_prefix(folder).ok());
    let name = relative.unwrap_or(&below).to_str().ok_or_else(|| DiskError::Invalid {
        file: below.display().to_string(),
        problem: "its path is not UTF-8, and a header cannot name it; rename it".to_owned(),
    })?;
    // Before a slash, a colon would make a protocol of what comes before it.
    let plain = !name.split('/').next().unwrap_or_default().contains(':');
    Ok(if plain { name.to_owned() } else { format!("./{name}") })
}
