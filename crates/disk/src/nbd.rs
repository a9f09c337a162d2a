//! A disk on an NBD server.
//!
//! "The NBD protocol" (the NBD project's `doc/proto.md`): fixed newstyle negotiation
//! (`handshake`), structured replies where the server has them, block status for holes, any number
//! of requests under way at once (`requests`), over TCP or a Unix socket (`url`). No TLS.
//!
//! A connection that is lost stays lost: what the server has made durable of the writes before is
//! not known, so it would not be right to go on as if nothing had been. All requests then fail with
//! the reason, and the disk has to be opened again.
mod handshake;
mod requests;
mod url;

use crate::{Access, Disk, DiskError, Extent, ExtentKind, check_range};
use handshake::Offer;
use requests::{Command, Connection, Failure};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

pub use url::{Server, Url};

/// Transmission flags.
const READ_ONLY: u16 = 1 << 1;
const HAS_FLUSH: u16 = 1 << 2;
const HAS_TRIM: u16 = 1 << 5;
const HAS_WRITE_ZEROES: u16 = 1 << 6;
/// States of a part of an export.
const IS_ZERO: u32 = 1 << 1;
/// Bytes that one request carries at most, whatever the server takes.
const MAX_DATA: u64 = 8 << 20;
/// Bytes that one request without data is about at most.
const MAX_RANGE: u64 = 1 << 30;

/// How to use a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether to write.
    pub access: Access,
    /// How long to wait for a connection to be ready, and for a sign of life while a request is
    /// under way.
    pub patience: Duration,
}

impl Options {
    /// With a minute's patience.
    #[must_use]
    pub fn new(access: Access) -> Self {
        Self { access, patience: Duration::from_secs(60) }
    }
}

/// A connection's socket.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(server: &Server, patience: Duration) -> io::Result<Self> {
        let stream = match server {
            Server::Unix { socket } => Self::Unix(UnixStream::connect(socket)?),
            Server::Tcp { host, port } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
                let addresses = (host.as_str(), *port).to_socket_addrs()?;
                let connected = addresses.into_iter().find_map(|address| {
                    match TcpStream::connect_timeout(&address, patience) {
                        Ok(stream) => Some(stream),
                        Err(error) => {
                            last = error;
                            None
                        }
                    }
                });
                let stream = connected.ok_or(last)?;
                stream.set_nodelay(true)?;
                Self::Tcp(stream)
            }
        };
        stream.set_timeout(patience)?;
        Ok(stream)
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))
            }
        }
    }

    /// Reads at least a byte.
    fn read_some(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Tcp(stream) => (&mut &*stream).read(buffer),
                Self::Unix(stream) => (&mut &*stream).read(buffer),
            };
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn fill(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            done += self.read_some(rest)?;
        }
        Ok(())
    }

    fn shut_down(&self) {
        // It may be shut down already.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Write for &Stream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write(data),
            Stream::Unix(stream) => (&mut &*stream).write(data),
        }
    }

    fn write_vectored(&mut self, data: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write_vectored(data),
            Stream::Unix(stream) => (&mut &*stream).write_vectored(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk on an NBD server.
pub struct Nbd {
    url: Url,
    connection: Connection,
    offer: Offer,
    read_only: bool,
    /// Held to write by a request that is not aligned to the server's blocks while it reads and
    /// writes whole ones; by all other changes to read.
    whole_blocks: RwLock<()>,
    /// Whether anything was written.
    written: AtomicBool,
}

impl Nbd {
    /// Connects to a server. An export that the server has as read-only is that here, too.
    ///
    /// # Errors
    /// [`DiskError::Host`] with the reason: the server cannot be reached, refuses, has no such
    /// export, or does not keep to the protocol.
    pub fn open(url: &Url, options: Options) -> Result<Self, DiskError> {
        let host = |action| move |source| DiskError::Host { file: url.to_string(), action, source };
        let stream = Stream::connect(&url.server, options.patience)
            .map_err(host("connect to its NBD server"))?;
        let offer = handshake::negotiate(&stream, url, options.patience)
            .map_err(host("agree with its NBD server"))?;
        stream.set_timeout(options.patience).map_err(host("use its socket"))?;
        Ok(Self {
            url: url.clone(),
            connection: Connection::new(stream, &offer),
            read_only: options.access == Access::Read || offer.flags & READ_ONLY != 0,
            offer,
            whole_blocks: RwLock::default(),
            written: AtomicBool::new(false),
        })
    }

    fn error(&self, failure: Failure) -> DiskError {
        let file = self.url.to_string();
        match failure {
            // The protocol's numbers are Linux's.
            Failure::Server(28) => DiskError::Full { file },
            Failure::Server(1) => DiskError::ReadOnly,
            Failure::Server(number) => {
                let source = match i32::try_from(number).ok().filter(|number| *number < 134) {
                    Some(number) => io::Error::from_raw_os_error(number),
                    None => io::Error::other(format!("error {number}")),
                };
                DiskError::Host { file, action: "have its NBD server do that", source }
            }
            Failure::Lost(source) => {
                let action = "go on without its NBD server; open the disk again";
                DiskError::Host { file, action, source }
            }
        }
    }

    /// What requests have to be aligned to.
    fn block(&self) -> u64 {
        self.offer.minimum.into()
    }

    /// Bytes that one request may carry.
    fn most(&self) -> u64 {
        let most = MAX_DATA.min(self.offer.maximum.into());
        most - most % self.block()
    }

    fn is_aligned(&self, offset: u64, length: u64) -> bool {
        offset.is_multiple_of(self.block()) && length.is_multiple_of(self.block())
    }

    fn check_change(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        check_range(offset, length, self.offer.size)
    }

    /// Reads what is aligned.
    fn read_blocks(&self, mut offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let most = usize::try_from(self.most()).unwrap_or(usize::MAX);
        for part in buffer.chunks_mut(most) {
            self.connection.read(offset, part).map_err(|failure| self.error(failure))?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Writes what is aligned.
    fn write_blocks(&self, mut offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.written.store(true, Ordering::Release);
        let most = usize::try_from(self.most()).unwrap_or(usize::MAX);
        for part in data.chunks(most) {
            let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
            let done = self.connection.ask(Command::Write, offset, length, part);
            done.map_err(|failure| self.error(failure))?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// The whole blocks around a range, and where it begins in them.
    fn around(&self, offset: u64, length: u64) -> (u64, Vec<u8>, usize) {
        let start = offset - offset % self.block();
        let end = (offset + length).next_multiple_of(self.block());
        let whole = vec![0; usize::try_from(end - start).unwrap_or_default()];
        (start, whole, usize::try_from(offset - start).unwrap_or_default())
    }

    /// Has the server do something to a range that is aligned, in pieces that it takes.
    fn ask_about(&self, command: Command, offset: u64, length: u64) -> Result<(), DiskError> {
        let _shared = self.whole_blocks.read().unwrap_or_else(PoisonError::into_inner);
        self.written.store(true, Ordering::Release);
        let mut done = 0;
        while done < length {
            let now = (length - done).min(MAX_RANGE);
            let short = u32::try_from(now).unwrap_or(u32::MAX);
            let asked = self.connection.ask(command, offset + done, short, &[]);
            asked.map_err(|failure| self.error(failure))?;
            done += now;
        }
        Ok(())
    }

    /// The whole blocks within a range: where they begin and how long they are.
    fn within(&self, offset: u64, length: u64) -> Option<(u64, u64)> {
        let start = offset.next_multiple_of(self.block());
        let end = (offset + length) - (offset + length) % self.block();
        end.checked_sub(start).filter(|length| *length > 0).map(|length| (start, length))
    }

    /// Writes zeroes as data.
    fn write_zero_data(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let zeroes = vec![0; usize::try_from(length.min(self.most())).unwrap_or_default()];
        let mut done = 0;
        while done < length {
            let now = (length - done).min(zeroes.len() as u64);
            let part = zeroes.get(..usize::try_from(now).unwrap_or_default());
            self.write_at(offset + done, part.unwrap_or_default())?;
            done += now;
        }
        Ok(())
    }
}

impl Disk for Nbd {
    fn size(&self) -> u64 {
        self.offer.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let length = buffer.len() as u64;
        check_range(offset, length, self.offer.size)?;
        if self.is_aligned(offset, length) {
            return self.read_blocks(offset, buffer);
        }
        let (start, mut whole, at) = self.around(offset, length);
        self.read_blocks(start, &mut whole)?;
        if let Some(part) = whole.get(at..at + buffer.len()) {
            buffer.copy_from_slice(part);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let length = data.len() as u64;
        self.check_change(offset, length)?;
        if self.is_aligned(offset, length) {
            let _shared = self.whole_blocks.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_blocks(offset, data);
        }
        let _alone = self.whole_blocks.write().unwrap_or_else(PoisonError::into_inner);
        let (start, mut whole, at) = self.around(offset, length);
        self.read_blocks(start, &mut whole)?;
        if let Some(part) = whole.get_mut(at..at + data.len()) {
            part.copy_from_slice(data);
        }
        self.write_blocks(start, &whole)
    }

    fn flush(&self) -> Result<(), DiskError> {
        // A server without it makes each write durable itself, as far as it does at all.
        if self.read_only || self.offer.flags & HAS_FLUSH == 0 {
            return Ok(());
        }
        if !self.written.load(Ordering::Acquire) {
            return Ok(());
        }
        self.connection.ask(Command::Flush, 0, 0, &[]).map_err(|failure| self.error(failure))
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_change(offset, length)?;
        match self.within(offset, length) {
            Some((start, length)) if self.offer.flags & HAS_TRIM != 0 => {
                self.ask_about(Command::Trim, start, length)
            }
            _ => Ok(()),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_change(offset, length)?;
        let has = self.offer.flags & HAS_WRITE_ZEROES != 0;
        let Some((start, middle)) = self.within(offset, length).filter(|_| has) else {
            return self.write_zero_data(offset, length);
        };
        self.write_zero_data(offset, start - offset)?;
        self.ask_about(Command::WriteZeroes, start, middle)?;
        let end = start + middle;
        self.write_zero_data(end, offset + length - end)
    }

    fn unit(&self) -> u64 {
        let preferred = u64::from(self.offer.preferred).clamp(4096, MAX_DATA);
        if preferred.is_power_of_two() { preferred } else { 4096 }
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        check_range(offset, length, self.offer.size)?;
        if self.offer.allocation.is_none() || length == 0 {
            return Ok(Extent { kind: ExtentKind::Data, length });
        }
        let start = offset - offset % self.block();
        let end = (offset + length).next_multiple_of(self.block()).min(start + MAX_RANGE);
        let asked = u32::try_from(end - start).unwrap_or(u32::MAX);
        let status = self.connection.block_status(start, asked);
        let (found, flags) = status.map_err(|failure| self.error(failure))?;
        let kind = if flags & IS_ZERO != 0 { ExtentKind::Zero } else { ExtentKind::Data };
        let found = (start + u64::from(found)).saturating_sub(offset);
        // A server that answers with less than a block says nothing about what was asked.
        if found == 0 {
            return Ok(Extent { kind: ExtentKind::Data, length: length.min(self.block()) });
        }
        Ok(Extent { kind, length: found.min(length) })
    }
}

/// Closing flushes. Who wants to know whether that works calls `flush` first.
impl Drop for Nbd {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = self.flush();
        self.connection.disconnect();
    }
}
