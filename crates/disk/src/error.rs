//! Why a disk cannot be opened, read or written.
use std::io;

/// Why a disk cannot be opened, read or written.
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
