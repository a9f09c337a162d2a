//! Why a disk cannot be opened, read or written.
use std::io;

/// Why a disk cannot be opened, read or written. `file` is the image as its user named it.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A request goes beyond the disk's end. The guest made it.
    #[error("a request for {length} bytes at {offset} goes beyond the disk's end at {size}")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The disk's size.
        size: u64,
    },
    /// The disk is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The host's file system has no room for what is written.
    #[error("{file}: the host's disk is full; free some space there")]
    Full {
        /// The image.
        file: String,
    },
    /// Another process, or this one, has the image open in a way that excludes this use.
    #[error("{file} is in use by {holder}; stop that first, or give each machine an overlay")]
    InUse {
        /// The image.
        file: String,
        /// Who holds it, as far as can be seen: "process 12 (bv)" or "another process".
        holder: String,
    },
    /// The image contradicts itself or its format.
    #[error(
        "{file} is damaged: {what}; try `bv disk check --repair`, or go back to a copy of the image"
    )]
    Damaged {
        /// The image.
        file: String,
        /// What is wrong, with the place in the file where it helps.
        what: String,
    },
    /// The image uses something that is not supported.
    #[error(
        "{file} uses {feature}, which Bivisor does not support; convert the image without it, \
         with the program that made it"
    )]
    Unsupported {
        /// The image.
        file: String,
        /// The feature, by its name in the format's specification.
        feature: String,
    },
    /// The file is not an image of the format that was named.
    #[error("{file} is not a {format} image; name its format with `--format`")]
    NotThisFormat {
        /// The file.
        file: String,
        /// The format's name.
        format: &'static str,
    },
    /// No header says what the file is.
    #[error(
        "{file} has no header of a known image format; if it is a raw disk, say so with \
         `--format raw`"
    )]
    UnknownFormat {
        /// The file.
        file: String,
    },
    /// The file below an image cannot be used.
    #[error(
        "{file}: its backing file {backing} cannot be opened; put it back, or go back to a copy of \
         both"
    )]
    Backing {
        /// The image.
        file: String,
        /// The file below it.
        backing: String,
        /// Why not.
        #[source]
        source: Box<DiskError>,
    },
    /// What was asked for cannot be made.
    #[error("{file}: {problem}")]
    Invalid {
        /// The image.
        file: String,
        /// What cannot be and what can.
        problem: String,
    },
    /// The work was stopped on request; nothing was left behind.
    #[error("cancelled")]
    Cancelled,
    /// The host refused something.
    #[error("{file}: cannot {action}")]
    Host {
        /// The image.
        file: String,
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// Refuses a range that does not lie within a disk of `size` bytes.
///
/// # Errors
/// [`DiskError::OutOfRange`].
pub fn check_range(offset: u64, length: u64, size: u64) -> Result<(), DiskError> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DiskError::OutOfRange { offset, length, size }),
    }
}
