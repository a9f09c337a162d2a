//! The headers of a VHDX image ([MS-VHDX] 2.2.2). There are two; the valid one with the higher
//! sequence number counts, and a change goes to the other.
use super::parts::{Guid, checksum, seal};
use crate::bytes::{array, le16, le32, le64, put};
use crate::create::random_id;
use crate::store::{Complain, Store};
use crate::{DiskError, SECTOR};

/// What starts the file ([MS-VHDX] 2.2.1).
pub(super) const FILE_TYPE: &[u8; 8] = b"vhdxfile";
/// Where the headers are.
const PLACES: [u64; 2] = [64 << 10, 128 << 10];
const HEADER: usize = 4096;
const SIGNATURE: &[u8; 4] = b"head";
const VERSION: u16 = 1;
/// Structures lie at multiples of this.
pub(super) const MIB: u64 = 1 << 20;
/// Bytes of the longest log that is read. Programs make logs of 1 MiB.
const MAX_LOG: u64 = 64 << 20;

mod field {
    pub(super) const SEQUENCE: usize = 8;
    pub(super) const FILE_WRITE: usize = 16;
    pub(super) const DATA_WRITE: usize = 32;
    pub(super) const LOG: usize = 48;
    pub(super) const LOG_VERSION: usize = 64;
    pub(super) const VERSION: usize = 66;
    pub(super) const LOG_LENGTH: usize = 68;
    pub(super) const LOG_OFFSET: usize = 72;
}

/// The header that counts.
#[derive(Clone, Debug)]
pub(super) struct Header {
    bytes: Vec<u8>,
    /// Which of the two places it is in.
    place: usize,
}

fn sequence(bytes: &[u8]) -> u64 {
    le64(bytes, field::SEQUENCE)
}

fn is_sound(bytes: &[u8]) -> bool {
    array(bytes, 0) == *SIGNATURE && le32(bytes, 4) == checksum(bytes)
}

impl Header {
    /// The header of a new image without a log entry.
    pub(super) fn new(log_offset: u64, log_length: u32) -> Result<Self, DiskError> {
        let mut bytes = vec![0; HEADER];
        put(&mut bytes, 0, SIGNATURE);
        put(&mut bytes, field::FILE_WRITE, &random_id()?);
        put(&mut bytes, field::DATA_WRITE, &random_id()?);
        put(&mut bytes, field::VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, field::LOG_LENGTH, &log_length.to_le_bytes());
        put(&mut bytes, field::LOG_OFFSET, &log_offset.to_le_bytes());
        Ok(Self { bytes, place: 1 })
    }

    /// Reads the header that counts.
    pub(super) fn read(store: &dyn Store) -> Result<Self, DiskError> {
        let mut found: Option<Self> = None;
        for (place, offset) in PLACES.into_iter().enumerate() {
            let mut bytes = vec![0; HEADER];
            store.read_or_zero_at(offset, &mut bytes)?;
            let later = |found: &Self| sequence(&found.bytes) >= sequence(&bytes);
            if is_sound(&bytes) && !found.as_ref().is_some_and(later) {
                found = Some(Self { bytes, place });
            }
        }
        let Some(header) = found else {
            return Err(store.damaged("both its headers are damaged".to_owned()));
        };
        header.check(store)?;
        Ok(header)
    }

    fn check(&self, store: &dyn Store) -> Result<(), DiskError> {
        let version = le16(&self.bytes, field::VERSION);
        if version != VERSION {
            return Err(store.unsupported(format!("version {version} of VHDX")));
        }
        let log_version = le16(&self.bytes, field::LOG_VERSION);
        if log_version != 0 && self.log_id() != [0; 16] {
            return Err(store.unsupported(format!("version {log_version} of VHDX's log")));
        }
        let (offset, length) = (self.log_offset(), self.log_length());
        if length > MAX_LOG {
            return Err(store.unsupported(format!("a log of {length} bytes")));
        }
        let aligned = offset.is_multiple_of(MIB) && length.is_multiple_of(MIB);
        let end = offset.checked_add(length).filter(|_| aligned && offset >= MIB && length > 0);
        if end.is_none_or(|end| end > store.size().unwrap_or(0)) {
            return Err(store.damaged(format!("its log of {length} bytes lies at {offset}")));
        }
        Ok(())
    }

    /// Which log entries count; all zeroes where none do.
    pub(super) fn log_id(&self) -> Guid {
        array(&self.bytes, field::LOG)
    }

    pub(super) fn log_offset(&self) -> u64 {
        le64(&self.bytes, field::LOG_OFFSET)
    }

    pub(super) fn log_length(&self) -> u64 {
        le32(&self.bytes, field::LOG_LENGTH).into()
    }

    /// Says that the file, and what the guest sees, are about to be changed.
    pub(super) fn set_changed(&mut self) -> Result<(), DiskError> {
        put(&mut self.bytes, field::FILE_WRITE, &random_id()?);
        put(&mut self.bytes, field::DATA_WRITE, &random_id()?);
        Ok(())
    }

    /// Says which log entries count.
    pub(super) fn set_log_id(&mut self, id: Guid) {
        put(&mut self.bytes, field::LOG, &id);
    }

    /// Makes this the header that counts, durably.
    pub(super) fn write(&mut self, store: &dyn Store) -> Result<(), DiskError> {
        let next = sequence(&self.bytes).wrapping_add(1);
        put(&mut self.bytes, field::SEQUENCE, &next.to_le_bytes());
        seal(&mut self.bytes);
        let place = 1 - self.place.min(1);
        let offset = PLACES.get(place).copied().unwrap_or_default();
        // One sector holds all that is not zero, so that it is there as a whole or not at all.
        debug_assert!(field::LOG_OFFSET + 8 <= SECTOR as usize);
        store.write_at(offset, &self.bytes)?;
        self.place = place;
        store.sync()
    }
}
