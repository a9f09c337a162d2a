//! Signals that ask the process to end, as something that the I/O thread can wait on.
use rustix::io::Errno;
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Catches SIGTERM, SIGINT and SIGHUP from its creation until it is dropped.
pub struct StopSignals {
    reader: OwnedFd,
    ids: Vec<SigId>,
}

impl StopSignals {
    /// Starts to catch.
    ///
    /// # Errors
    /// Fails where the host gives no further file descriptor.
    pub fn catch() -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        let mut signals = Self { reader: reader.into(), ids: Vec::new() };
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            let writer = writer.try_clone()?;
            signals.ids.push(signal_hook::low_level::pipe::register(signal, writer)?);
        }
        Ok(signals)
    }

    /// Takes the signals that arrived, and answers whether there were any.
    pub fn take(&self) -> bool {
        let mut any = false;
        loop {
            match rustix::io::read(&self.reader, &mut [0; 16]) {
                Ok(1..) => any = true,
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => return any,
            }
        }
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

impl Drop for StopSignals {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}
