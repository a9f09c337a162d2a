//! What is done to an image as a whole, whatever its format: `bv disk info`, `check`, `resize` and
//! `compact`.
//! (Making one is [`crate::format::create`] or [`crate::overlay::create`].)
use crate::convert::{self, OnProgress};
use crate::format::{self, Backing, Format, OpenOptions};
use crate::qcow2::{self, CheckReport, Qcow2, Repair, Shrink};
use crate::raw::Raw;
use crate::{Access, Disk, DiskError, ExtentKind, FileOptions, ImageFile, Lock};
use std::path::Path;

/// What is known of an image without opening what is below it.
#[derive(Clone, Debug)]
pub struct Info {
    /// Its format.
    pub format: Format,
    /// The disk's size, in bytes.
    pub size: u64,
    /// Bytes that its file takes up on the host.
    pub allocated: u64,
    /// What only qcow2 has.
    pub qcow2: Option<qcow2::Info>,
}

/// Looks at an image, even while a machine uses it. Without `format` the header decides.
///
/// # Errors
/// As [`format::open`].
pub fn info(path: &Path, format: Option<Format>) -> Result<Info, DiskError> {
    let peek = FileOptions { lock: Lock::Ignore, ..FileOptions::read() };
    let format = known(path, format)?;
    let allocated = ImageFile::open(path, peek)?.allocated()?;
    if format == Format::Qcow2 {
        let found = Qcow2::info(path, peek)?;
        return Ok(Info { format, size: found.size, allocated, qcow2: Some(found) });
    }
    let options = OpenOptions { file: peek, backing: Backing::Refuse };
    let size = format::open(path, Some(format), options)?.size();
    Ok(Info { format, size, allocated, qcow2: None })
}

/// Checks an image's metadata, and repairs it if asked. Formats other than qcow2 count no
/// references that could be wrong: what is checked there is that the image opens and that all of
/// its disk can be located.
///
/// # Errors
/// As [`format::open`]; for qcow2 as [`Qcow2::check`].
pub fn check(
    path: &Path,
    format: Option<Format>,
    repair: Repair,
) -> Result<CheckReport, DiskError> {
    let format = known(path, format)?;
    let access = if repair == Repair::Nothing { Access::Read } else { Access::Write };
    let file = FileOptions { access, ..FileOptions::read() };
    if format == Format::Qcow2 {
        return Qcow2::check(path, repair, file);
    }
    // Opening to write replays a log and puts the like in order.
    let disk = format::open(path, Some(format), OpenOptions { file, backing: Backing::Refuse })?;
    let mut report = CheckReport::default();
    let mut at = 0;
    while at < disk.size() {
        match disk.extent(at, disk.size() - at) {
            Ok(extent) => at += extent.length.max(1),
            Err(error @ DiskError::Damaged { .. }) => {
                report.errors = 1;
                report.described.push(error.to_string());
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(report)
}

/// Changes the size of an image's disk, in bytes; it is rounded up to sectors. What is new reads as
/// zeroes.
///
/// # Errors
/// [`DiskError::Invalid`] where the disk would shrink and may not, and where the format has no way
/// to another size; otherwise as [`format::open`].
pub fn resize(
    path: &Path,
    format: Option<Format>,
    size: u64,
    shrink: Shrink,
) -> Result<(), DiskError> {
    match known(path, format)? {
        Format::Raw => {
            let mut disk = Raw::open(path, FileOptions::write())?;
            check_shrinking(&disk, &path.display().to_string(), size, shrink)?;
            disk.resize(size)?;
            disk.flush()
        }
        Format::Qcow2 => {
            let follow = |name: &qcow2::BackingName| format::open_below(path, name);
            Qcow2::open(path, FileOptions::write(), &follow)?.resize(size, shrink)
        }
        other => Err(DiskError::Invalid {
            file: path.display().to_string(),
            problem: format!(
                "{other} images cannot change their size; convert it to qcow2 or raw with \
                 `bv disk convert` and resize that"
            ),
        }),
    }
}

/// Makes an image take up no space for what reads as zeroes or is not used.
///
/// # Errors
/// [`DiskError::Cancelled`], or those of [`format::open`] and of reading and writing.
pub fn compact(
    path: &Path,
    format: Option<Format>,
    progress: OnProgress<'_>,
) -> Result<(), DiskError> {
    let format = known(path, format)?;
    if format != Format::Qcow2 {
        let disk = format::open(path, Some(format), OpenOptions::write())?;
        return convert::compact(&*disk, progress);
    }
    let follow = |name: &qcow2::BackingName| format::open_below(path, name);
    let mut image = Qcow2::open(path, FileOptions::write(), &follow)?;
    convert::compact(&image, progress)?;
    image.give_back_free()
}

/// Refuses to cut off a disk where that is not asked for, or where there is data.
pub(crate) fn check_shrinking(
    disk: &dyn Disk,
    file: &str,
    size: u64,
    shrink: Shrink,
) -> Result<(), DiskError> {
    let former = disk.size();
    let invalid = |problem: String| Err(DiskError::Invalid { file: file.to_owned(), problem });
    if size >= former {
        return Ok(());
    }
    if shrink == Shrink::Refuse {
        return invalid(format!(
            "it has {former} bytes and {size} are fewer; say so if it is to shrink"
        ));
    }
    let mut at = size;
    while at < former {
        let extent = disk.extent(at, former - at)?;
        if extent.kind == ExtentKind::Data {
            return invalid(format!(
                "it cannot shrink to {size} bytes: there is data at {at}; free it in the guest and \
                 discard it there (`fstrim`)"
            ));
        }
        at += extent.length.max(1);
    }
    Ok(())
}

fn known(path: &Path, format: Option<Format>) -> Result<Format, DiskError> {
    let peek = FileOptions { lock: Lock::Ignore, ..FileOptions::read() };
    format.map_or_else(|| Format::detect(&ImageFile::open(path, peek)?), Ok)
}
