//! Requests on a connection, of which any number can be under way: "The NBD protocol"
//! (`doc/proto.md`), "Transmission phase".
//!
//! There is no thread of the connection's own. Of the threads that wait for their replies, one
//! reads whatever comes, for all of them; when its own is there, another takes over. So a lone
//! request costs no change of threads.
use super::Stream;
use super::handshake::{Offer, silence, violation};
use crate::bytes::{be16, be32, be64};
use crate::table::lock;
use std::collections::HashMap;
use std::io::{self, IoSlice, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// No more chunks follow.
const DONE: u16 = 1;
/// Chunks of a reply that carry no data.
const MAX_EMPTY_CHUNKS: u32 = 64;
/// Bytes of the longest chunk that says what went wrong, or what is where.
const MAX_INFORMATION: u32 = 64 << 10;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    BlockStatus,
}

impl Command {
    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
        }
    }

    fn flags(self) -> u16 {
        // Of the states, only the first one is asked for.
        if self == Self::BlockStatus { 1 << 3 } else { 0 }
    }
}

mod chunk {
    pub(super) const NONE: u16 = 0;
    pub(super) const DATA: u16 = 1;
    pub(super) const HOLE: u16 = 2;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const ERROR: u16 = 1 << 15;
}

/// A request whose reply is not there yet, or not all of it.
struct Pending {
    command: Command,
    offset: u64,
    /// What was read; of its full length from the start.
    data: Vec<u8>,
    /// Bytes of it that came.
    came: u64,
    empty_chunks: u32,
    status: Option<(u32, u32)>,
    /// What the server says went wrong, as an error number of the protocol.
    error: u32,
    done: bool,
}

#[derive(Default)]
struct State {
    pending: HashMap<u64, Pending>,
    /// Whether one of the waiting threads reads.
    reading: bool,
    /// Why there is no connection any more.
    lost: Option<(io::ErrorKind, String)>,
}

/// What became of a request.
pub(super) enum Failure {
    /// The server says so: an error number of the protocol.
    Server(u32),
    /// The connection is lost.
    Lost(io::Error),
}

/// A connection that is past its negotiation.
pub(super) struct Connection {
    stream: Stream,
    structured: bool,
    allocation: Option<u32>,
    next: AtomicU64,
    /// Held while a request is sent.
    sending: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Connection {
    pub(super) fn new(stream: Stream, offer: &Offer) -> Self {
        Self {
            stream,
            structured: offer.structured,
            allocation: offer.allocation,
            next: AtomicU64::new(1),
            sending: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Makes a request without data in its reply.
    pub(super) fn ask(
        &self,
        command: Command,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<(), Failure> {
        self.request(command, offset, length, data).map(|_| ())
    }

    /// Reads.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Failure> {
        let length = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        let pending = self.request(Command::Read, offset, length, &[])?;
        if pending.data.len() == buffer.len() {
            buffer.copy_from_slice(&pending.data);
        }
        Ok(())
    }

    /// What is at `offset`: for how many bytes, and the flags of its state.
    pub(super) fn block_status(&self, offset: u64, length: u32) -> Result<(u32, u32), Failure> {
        let pending = self.request(Command::BlockStatus, offset, length, &[])?;
        match pending.status {
            Some((found, flags)) if found > 0 => Ok((found.min(length), flags)),
            _ => Err(self.lose(violation("it does not say what state the export is in"))),
        }
    }

    /// Says that no more requests come.
    pub(super) fn disconnect(&self) {
        let message = message(Command::Disconnect, 0, 0, 0);
        let _one = lock(&self.sending);
        // There is nobody left to tell.
        let _ = (&mut &self.stream).write_all(&message);
        self.stream.shut_down();
    }

    fn request(
        &self,
        command: Command,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<Pending, Failure> {
        let cookie = self.next.fetch_add(1, Ordering::Relaxed);
        let expected = if command == Command::Read { length } else { 0 };
        let pending = Pending {
            command,
            offset,
            data: vec![0; usize::try_from(expected).unwrap_or_default()],
            came: 0,
            empty_chunks: 0,
            status: None,
            error: 0,
            done: false,
        };
        {
            let mut state = lock(&self.state);
            if let Some(lost) = &state.lost {
                return Err(Failure::Lost(lost_error(lost)));
            }
            state.pending.insert(cookie, pending);
        }
        if let Err(error) = self.send(&message(command, cookie, offset, length), data) {
            return Err(self.lose(error));
        }
        let pending = self.wait(cookie)?;
        if pending.error != 0 {
            return Err(Failure::Server(pending.error));
        }
        Ok(pending)
    }

    fn send(&self, head: &[u8], data: &[u8]) -> io::Result<()> {
        let _one = lock(&self.sending);
        let total = head.len() + data.len();
        let mut done =
            (&mut &self.stream).write_vectored(&[IoSlice::new(head), IoSlice::new(data)])?;
        if done < head.len() {
            (&mut &self.stream).write_all(head.get(done..).unwrap_or_default())?;
            done = head.len();
        }
        if done < total {
            (&mut &self.stream).write_all(data.get(done - head.len()..).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Waits for a request's reply, reading others' meanwhile if nobody else does.
    fn wait(&self, cookie: u64) -> Result<Pending, Failure> {
        let mut state = lock(&self.state);
        loop {
            if state.pending.get(&cookie).is_some_and(|pending| pending.done)
                && let Some(pending) = state.pending.remove(&cookie)
            {
                return Ok(pending);
            }
            if let Some(lost) = &state.lost {
                return Err(Failure::Lost(lost_error(lost)));
            }
            if state.reading {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.reading = true;
            drop(state);
            let read = self.read_reply();
            state = lock(&self.state);
            state.reading = false;
            if let Err(error) = read {
                drop(state);
                return Err(self.lose(error));
            }
            self.changed.notify_all();
        }
    }

    /// Gives up the connection.
    fn lose(&self, error: io::Error) -> Failure {
        self.stream.shut_down();
        let mut state = lock(&self.state);
        let lost = state.lost.get_or_insert_with(|| match error.kind() {
            io::ErrorKind::WouldBlock => (io::ErrorKind::TimedOut, silence().to_string()),
            io::ErrorKind::UnexpectedEof => {
                (io::ErrorKind::UnexpectedEof, "the server closed the connection".to_owned())
            }
            kind => (kind, error.to_string()),
        });
        let error = lost_error(lost);
        state.pending.clear();
        self.changed.notify_all();
        Failure::Lost(error)
    }

    /// Reads a simple reply, or a chunk of a structured one.
    fn read_reply(&self) -> io::Result<()> {
        let mut head = [0; 16];
        self.stream.fill(&mut head)?;
        match be32(&head, 0) {
            SIMPLE_MAGIC => {
                let (error, cookie) = (be32(&head, 4), be64(&head, 8));
                let mut pending = self.take(cookie)?;
                pending.error = error;
                pending.done = true;
                if pending.command == Command::Read && error == 0 {
                    if self.structured {
                        return Err(violation("it sends data without saying where they belong"));
                    }
                    self.stream.fill(&mut pending.data)?;
                }
                self.put_back(cookie, pending);
                Ok(())
            }
            CHUNK_MAGIC if self.structured => {
                let (flags, kind, cookie) = (be16(&head, 4), be16(&head, 6), be64(&head, 8));
                let mut length = [0; 4];
                self.stream.fill(&mut length)?;
                let mut pending = self.take(cookie)?;
                self.read_chunk(&mut pending, kind, u32::from_be_bytes(length), flags)?;
                if flags & DONE != 0 {
                    let short = pending.came != pending.data.len() as u64;
                    if pending.error == 0 && short {
                        return Err(violation("it sends less data than it was asked for"));
                    }
                    pending.done = true;
                }
                self.put_back(cookie, pending);
                Ok(())
            }
            _ => Err(violation("something that is no reply comes from it")),
        }
    }

    fn take(&self, cookie: u64) -> io::Result<Pending> {
        let pending = lock(&self.state).pending.remove(&cookie);
        let pending = pending.filter(|pending| !pending.done);
        pending.ok_or_else(|| violation("it replies to what it was not asked"))
    }

    fn put_back(&self, cookie: u64, pending: Pending) {
        lock(&self.state).pending.insert(cookie, pending);
    }

    fn read_chunk(
        &self,
        pending: &mut Pending,
        kind: u16,
        length: u32,
        flags: u16,
    ) -> io::Result<()> {
        match kind {
            chunk::NONE if length == 0 && flags & DONE != 0 => Ok(()),
            chunk::DATA if length > 8 => {
                let mut offset = [0; 8];
                self.stream.fill(&mut offset)?;
                let place = place(pending, u64::from_be_bytes(offset), u64::from(length) - 8)?;
                pending.came += place.len() as u64;
                self.stream.fill(pending.data.get_mut(place).unwrap_or_default())
            }
            chunk::HOLE if length == 12 => {
                let mut hole = [0; 12];
                self.stream.fill(&mut hole)?;
                let place = place(pending, be64(&hole, 0), be32(&hole, 8).into())?;
                pending.came += place.len() as u64;
                pending.data.get_mut(place).unwrap_or_default().fill(0);
                Ok(())
            }
            chunk::BLOCK_STATUS | chunk::ERROR.. if length <= MAX_INFORMATION => {
                pending.empty_chunks += 1;
                if pending.empty_chunks > MAX_EMPTY_CHUNKS {
                    return Err(violation("a reply of it does not end"));
                }
                let mut data = vec![0; usize::try_from(length).unwrap_or_default()];
                self.stream.fill(&mut data)?;
                if kind != chunk::BLOCK_STATUS {
                    // Zero would be no error.
                    pending.error = be32(&data, 0).max(1);
                } else if self.allocation == Some(be32(&data, 0)) {
                    pending.status = Some((be32(&data, 4), be32(&data, 8)));
                }
                Ok(())
            }
            _ => Err(violation("a part of a reply is of an unknown kind or length")),
        }
    }
}

/// Where in a request's data something belongs.
fn place(pending: &Pending, offset: u64, length: u64) -> io::Result<std::ops::Range<usize>> {
    let expected = pending.data.len() as u64;
    let start = offset.checked_sub(pending.offset).filter(|_| length > 0);
    let range = start.and_then(|start| Some(start..start.checked_add(length)?));
    let range = range
        .filter(|range| range.end <= expected && pending.came.saturating_add(length) <= expected);
    let range = range.ok_or_else(|| violation("it sends data that it was not asked for"))?;
    let index = |value| usize::try_from(value).unwrap_or(usize::MAX);
    Ok(index(range.start)..index(range.end))
}

fn message(command: Command, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut message = REQUEST_MAGIC.to_be_bytes().to_vec();
    message.extend(command.flags().to_be_bytes());
    message.extend(command.number().to_be_bytes());
    message.extend(cookie.to_be_bytes());
    message.extend(offset.to_be_bytes());
    message.extend(length.to_be_bytes());
    message
}

fn lost_error((kind, why): &(io::ErrorKind, String)) -> io::Error {
    io::Error::new(*kind, why.clone())
}
