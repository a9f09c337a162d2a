//! Requests (§5.2.6): what a chain asks for, and the answer.
use super::{MAX_CLEAR, MAX_TRANSFER, SERIAL};
use crate::Chain;
use disk::SECTOR;
use disk::requests::Operation;

/// Request types.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}
/// Bytes of the header: type, reserved, sector.
const HEADER: usize = 16;
/// The flag of a write-zeroes segment; a discard's has none.
const UNMAP: u32 = 1;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// It failed, or cannot be.
    IoError = 1,
    /// There are no such requests.
    Unsupported = 2,
}

/// What to do with a request.
#[derive(Debug)]
pub enum Task {
    /// Something for the disk.
    Disk(Operation),
    /// The serial number.
    Identify,
    /// Nothing: this is the answer.
    Answer(Status),
}

/// Bytes that the device may write before the status.
pub fn room(chain: &Chain) -> Option<usize> {
    chain.writer().remaining().checked_sub(1)
}

/// Reads a request. `buffer` gives a buffer of so many bytes for its data.
pub fn parse(chain: &Chain, room: usize, buffer: impl FnOnce(usize) -> Vec<u8>) -> Task {
    let mut reader = chain.reader();
    let Some(header) = reader.read_array::<HEADER>() else {
        return Task::Answer(Status::IoError);
    };
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let data = reader.remaining();
    let offset = u64::from_le_bytes(sector).checked_mul(SECTOR);
    let whole = |length: usize| (length as u64).is_multiple_of(SECTOR) && length <= MAX_TRANSFER;
    match (u32::from_le_bytes([k0, k1, k2, k3]), offset) {
        (kind::IN, Some(offset)) if whole(room) && room > 0 => {
            Task::Disk(Operation::Read { offset, buffer: buffer(room) })
        }
        (kind::OUT, Some(offset)) if whole(data) && data > 0 => {
            let mut data = buffer(data);
            reader.read(&mut data);
            Task::Disk(Operation::Write { offset, data })
        }
        (kind::FLUSH, _) => Task::Disk(Operation::Flush),
        (kind::GET_ID, _) => Task::Identify,
        (kind @ (kind::DISCARD | kind::WRITE_ZEROES), _) => match reader.read_array::<16>() {
            Some(segment) if reader.remaining() == 0 => clear(kind, segment),
            _ => Task::Answer(Status::IoError),
        },
        (kind::IN | kind::OUT, _) => Task::Answer(Status::IoError),
        _ => Task::Answer(Status::Unsupported),
    }
}

/// A discard or write-zeroes of one segment: sector, count, flags.
fn clear(kind: u32, segment: [u8; 16]) -> Task {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let (count, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes(flags));
    let known = if kind == kind::WRITE_ZEROES { UNMAP } else { 0 };
    if flags & !known != 0 {
        return Task::Answer(Status::Unsupported);
    }
    let length = u64::from(count) * SECTOR;
    match sector.checked_mul(SECTOR) {
        Some(offset) if count <= MAX_CLEAR && kind == kind::DISCARD => {
            Task::Disk(Operation::Discard { offset, length })
        }
        Some(offset) if count <= MAX_CLEAR => Task::Disk(Operation::WriteZeroes { offset, length }),
        _ => Task::Answer(Status::IoError),
    }
}

/// Writes data and status; answers how many bytes of the chain are filled.
pub fn answer(chain: &Chain, room: usize, data: &[u8], status: Status) -> u32 {
    let mut writer = chain.writer();
    let filled = writer.write(data.get(..room.min(data.len())).unwrap_or_default());
    let gap = room - filled;
    writer.skip(gap);
    writer.write(&[status as u8]);
    // A driver may trust no more than what is filled without a gap.
    if gap == 0 { writer.written() } else { filled as u32 }
}

/// A serial number as requests ask for it: padded with zeroes.
pub fn serial(text: &str) -> [u8; SERIAL] {
    let mut serial = [0; SERIAL];
    serial.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    serial
}
