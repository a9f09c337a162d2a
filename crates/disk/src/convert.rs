//! Copying a disk into a new image of any format, and giving back what an image takes up for
//! nothing.
//!
//! What reads as zeroes is not written, so sparse stays sparse and becomes sparser. The new image
//! appears under its name only when it is whole and durable.
use crate::format::{self, Format};
use crate::{Disk, DiskError, ExtentKind};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Bytes that are read at once.
const CHUNK: u64 = 2 << 20;
/// Bytes of the pieces that are left out where they are zero.
const PIECE: usize = 64 << 10;

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the disk that are done.
    pub done: u64,
    /// Bytes of the disk.
    pub total: u64,
}

/// Who is told of the progress, and says whether to go on.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Copies `source` into a new image at `path`.
///
/// # Errors
/// [`DiskError::Cancelled`] where `progress` broke it off, [`DiskError::Invalid`] where there is
/// something at `path`, or what reading, making and writing may meet. Nothing is left behind then.
pub fn convert(
    source: &dyn Disk,
    path: &Path,
    format: Format,
    progress: OnProgress<'_>,
) -> Result<(), DiskError> {
    let exists = || DiskError::Invalid {
        file: path.display().to_string(),
        problem: "it exists already; remove it or choose another name".to_owned(),
    };
    if path.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let partial = Partial::beside(path)?;
    let target = format::create(&partial.file, format, source.size())?;
    copy(source, &*target, progress)?;
    target.flush()?;
    drop(target);
    let host =
        |action| move |source| DiskError::Host { file: path.display().to_string(), action, source };
    // The image is closed; what that wrote must be durable, too, before it has its name.
    let file = File::open(&partial.file).map_err(host("open it again"))?;
    file.sync_all().map_err(host("make its data durable"))?;
    match renameat_with(CWD, &partial.file, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST) => return Err(exists()),
        // Not every file system knows how to not replace.
        Err(rustix::io::Errno::INVAL) => {
            std::fs::rename(&partial.file, path).map_err(host("give it its name"))?;
        }
        Err(error) => return Err(host("give it its name")(io::Error::from(error))),
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = File::open(folder.unwrap_or(Path::new("."))).map_err(host("open its folder"))?;
    folder.sync_all().map_err(host("make its name durable"))
}

/// A file that is not yet what it will be: in a folder of its own beside its final place, under its
/// final name, since some formats write down the name. Removed where it does not become that.
struct Partial {
    folder: PathBuf,
    file: PathBuf,
}

impl Partial {
    fn beside(path: &Path) -> Result<Self, DiskError> {
        let host = |source| DiskError::Host {
            file: path.display().to_string(),
            action: "make a folder beside it to work in",
            source,
        };
        let name = path.file_name().ok_or_else(|| host(io::ErrorKind::InvalidInput.into()))?;
        let hidden = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let folder = path.with_file_name(hidden);
        std::fs::create_dir(&folder).map_err(host)?;
        Ok(Self { file: folder.join(name), folder })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Under its final name it is no longer here.
        let _ = std::fs::remove_file(&self.file);
        let _ = std::fs::remove_dir(&self.folder);
    }
}

/// Copies all of `source` into `target`, which reads as zeroes and is as large at least.
///
/// # Errors
/// [`DiskError::Cancelled`], or what reading and writing may meet.
pub fn copy(
    source: &dyn Disk,
    target: &dyn Disk,
    progress: OnProgress<'_>,
) -> Result<(), DiskError> {
    each_chunk(source, progress, |at, data| {
        for (offset, length) in data_runs(data, PIECE) {
            let part = data.get(offset..offset + length).unwrap_or_default();
            target.write_at(at + offset as u64, part)?;
        }
        Ok(())
    })
}

/// Makes an image's own zeroes take up no space: data that is zero is told to the format as zeroes,
/// in its units of allocation.
///
/// # Errors
/// [`DiskError::Cancelled`], or what reading and writing may meet.
pub fn compact(disk: &dyn Disk, progress: OnProgress<'_>) -> Result<(), DiskError> {
    let unit = usize::try_from(disk.unit().max(4096)).unwrap_or(PIECE);
    each_chunk(disk, progress, |at, data| {
        let mut zero_from = 0;
        let ends = std::iter::once((data.len(), 0));
        for (offset, length) in data_runs(data, unit).into_iter().chain(ends) {
            if offset > zero_from {
                disk.write_zeroes(at + zero_from as u64, (offset - zero_from) as u64)?;
            }
            zero_from = offset + length;
        }
        Ok(())
    })?;
    disk.flush()
}

/// Reads all stretches of data, in chunks that begin at multiples of the largest unit of
/// allocation, or where the stretch does.
fn each_chunk(
    disk: &dyn Disk,
    progress: OnProgress<'_>,
    mut handle: impl FnMut(u64, &[u8]) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let total = disk.size();
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(PIECE)];
    let mut done = 0;
    while done < total {
        if progress(Progress { done, total }).is_break() {
            return Err(DiskError::Cancelled);
        }
        let extent = disk.extent(done, total - done)?;
        // No format gives none; one that did would make this endless.
        let length = extent.length.clamp(1, total - done);
        if extent.kind == ExtentKind::Zero {
            done += length;
            continue;
        }
        let length = length.min(CHUNK - done % CHUNK);
        let data = buffer.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
        disk.read_at(done, data)?;
        handle(done, data)?;
        done += length;
    }
    let _ = progress(Progress { done: total, total });
    Ok(())
}

/// The stretches of `data` that are not zero, in pieces of `piece` bytes from its beginning on:
/// where they begin and how long they are.
fn data_runs(data: &[u8], piece: usize) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, part) in data.chunks(piece).enumerate() {
        if is_zero(part) {
            continue;
        }
        let offset = index * piece;
        match runs.last_mut() {
            Some((start, length)) if *start + *length == offset => *length += part.len(),
            _ => runs.push((offset, part.len())),
        }
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}
