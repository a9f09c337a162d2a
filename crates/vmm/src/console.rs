//! The host's end of the serial console.
//!
//! Output: vCPU threads append to a buffer, the I/O thread writes it out when the host's end can
//! take it, so that neither a slow reader nor a stopped terminal stalls the machine's timers.
//! Back-pressure: a vCPU that has produced more than [`HIGH_WATER`] waits in
//! [`Output::throttle`], which its caller calls with no lock held.
//!
//! Input: the I/O thread reads, looks for the escape key, and hands on as much as the guest's
//! UART takes; it stops reading at [`INPUT_LIMIT`] until the guest catches up.
use crate::config::Serial;
use crate::events::Wake;
use device::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Bytes of output that wait before a vCPU waits for them.
const HIGH_WATER: usize = 64 << 10;
/// Bytes of input that wait for the guest before the host's end waits.
const INPUT_LIMIT: usize = 64 << 10;
/// Bytes a write: what a pipe that polls writable takes without blocking (POSIX `PIPE_BUF`).
const WRITE_CHUNK: usize = 4096;

/// The guest's output on its way to the host.
pub struct Output {
    state: Mutex<OutputState>,
    room: Condvar,
    /// A hint that spares the lock: the buffer is over [`HIGH_WATER`].
    full: AtomicBool,
    wake: Arc<Wake>,
}

#[derive(Default)]
struct OutputState {
    buffer: VecDeque<u8>,
    /// Nobody reads: bytes are dropped.
    closed: bool,
    /// vCPUs do not wait: the I/O thread waits for them.
    released: bool,
}

impl Output {
    fn new(wake: Arc<Wake>, closed: bool) -> Self {
        let state = OutputState { closed, ..OutputState::default() };
        Self { state: Mutex::new(state), room: Condvar::new(), full: AtomicBool::new(false), wake }
    }

    /// Appends what the guest sent. Never waits.
    pub fn send(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        if state.closed {
            return;
        }
        let was_empty = state.buffer.is_empty();
        state.buffer.extend(bytes);
        if state.buffer.len() > HIGH_WATER {
            self.full.store(true, Ordering::Relaxed);
        }
        drop(state);
        if was_empty {
            self.wake.wake();
        }
    }

    /// Waits, on a vCPU thread with no device locked, while too much output waits.
    pub fn throttle(&self) {
        if !self.full.load(Ordering::Relaxed) {
            return;
        }
        let mut state = lock(&self.state);
        while self.full.load(Ordering::Relaxed) && !state.released && !state.closed {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says whether vCPUs pass [`Self::throttle`] without waiting, which they must while the I/O
    /// thread waits for them.
    pub fn release(&self, released: bool) {
        lock(&self.state).released = released;
        self.room.notify_all();
    }

    fn is_empty(&self) -> bool {
        lock(&self.state).buffer.is_empty()
    }

    /// Copies the next bytes out, without taking them.
    fn peek(&self, chunk: &mut [u8; WRITE_CHUNK]) -> usize {
        let state = lock(&self.state);
        let bytes = state.buffer.iter().zip(chunk.iter_mut());
        bytes.map(|(from, to)| *to = *from).count()
    }

    fn consume(&self, count: usize) {
        let mut state = lock(&self.state);
        let count = count.min(state.buffer.len());
        state.buffer.drain(..count);
        if state.buffer.len() <= HIGH_WATER / 2 && self.full.swap(false, Ordering::Relaxed) {
            self.room.notify_all();
        }
    }

    fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.buffer = VecDeque::new();
        self.room.notify_all();
    }
}

/// What came of reading input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Perhaps new bytes for the guest.
    Bytes,
    /// The escape key: the user wants to leave.
    Escape,
}

/// What came of writing output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// All is well.
    Open,
    /// The reader is gone.
    ReaderGone,
}

/// Both directions. The I/O thread owns it; it outlives resets of the machine.
pub struct Console {
    output: Arc<Output>,
    output_fd: Option<OwnedFd>,
    input: VecDeque<u8>,
    input_fd: Option<OwnedFd>,
    escape: Option<u8>,
}

impl Console {
    /// Opens what the configuration names; creates the file of `file:PATH`.
    ///
    /// # Errors
    /// The file cannot be created, or the host gives no further file descriptor.
    pub fn open(serial: &Serial, wake: Arc<Wake>) -> io::Result<Self> {
        let mut escape = None;
        let (input_fd, output_fd) = match serial {
            Serial::None => (None, None),
            Serial::File(path) => (None, Some(create(path)?.into())),
            Serial::Stdio(stdio) => {
                escape = stdio.escape;
                let stdin = if stdio.input {
                    Some(rustix::stdio::stdin().try_clone_to_owned()?)
                } else {
                    None
                };
                (stdin, Some(own_output(rustix::stdio::stdout())?))
            }
        };
        Ok(Self::new(input_fd, output_fd, escape, wake))
    }

    /// From open descriptors; `None` reads as end of file and drops output.
    pub fn new(
        input_fd: Option<OwnedFd>,
        output_fd: Option<OwnedFd>,
        escape: Option<u8>,
        wake: Arc<Wake>,
    ) -> Self {
        let output = Arc::new(Output::new(wake, output_fd.is_none()));
        Self { output, output_fd, input: VecDeque::new(), input_fd, escape }
    }

    /// The end that the UART writes to.
    pub fn output(&self) -> &Arc<Output> {
        &self.output
    }

    /// The descriptor to wait on for input, while there is room for some.
    pub fn wants_input(&self) -> Option<BorrowedFd<'_>> {
        self.input_fd.as_ref().filter(|_| self.input.len() < INPUT_LIMIT).map(AsFd::as_fd)
    }

    /// The descriptor to wait on for output, while there is some.
    pub fn wants_output(&self) -> Option<BorrowedFd<'_>> {
        self.output_fd.as_ref().filter(|_| !self.output.is_empty()).map(AsFd::as_fd)
    }

    /// Reads once, after the descriptor of [`Self::wants_input`] became ready. At the end of the
    /// input the guest just gets no more.
    pub fn read_input(&mut self) -> Typed {
        let Some(fd) = &self.input_fd else { return Typed::Bytes };
        let mut bytes = [0; 4096];
        match rustix::io::read(fd, &mut bytes) {
            Ok(0) => self.input_fd = None,
            Ok(count) => {
                let typed = bytes.get(..count).unwrap_or_default();
                if self.escape.is_some_and(|escape| typed.contains(&escape)) {
                    return Typed::Escape;
                }
                self.input.extend(typed);
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            // A terminal that hung up, or that belongs to another job: no more input.
            Err(_) => self.input_fd = None,
        }
        Typed::Bytes
    }

    /// Offers waiting input to `accept`, which answers how many of the bytes it took.
    pub fn feed(&mut self, mut accept: impl FnMut(&[u8]) -> usize) {
        while !self.input.is_empty() {
            let bytes = self.input.as_slices().0;
            let count = accept(bytes).min(bytes.len());
            if count == 0 {
                return;
            }
            self.input.drain(..count);
        }
    }

    /// Writes once, after the descriptor of [`Self::wants_output`] became ready.
    ///
    /// # Errors
    /// The host's error, such as a full disk.
    pub fn write_output(&mut self) -> io::Result<Written> {
        let Some(fd) = &self.output_fd else { return Ok(Written::Open) };
        let mut chunk = [0; WRITE_CHUNK];
        let count = self.output.peek(&mut chunk);
        let bytes = chunk.get(..count).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(Written::Open);
        }
        match rustix::io::write(fd, bytes) {
            Ok(count) => self.output.consume(count),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => {
                self.output_fd = None;
                self.output.close();
                // EIO: the terminal hung up.
                if matches!(error, Errno::PIPE | Errno::CONNRESET | Errno::IO) {
                    return Ok(Written::ReaderGone);
                }
                return Err(error.into());
            }
        }
        Ok(Written::Open)
    }

    /// Writes out all that is left, as long as `give_up` does not become readable.
    ///
    /// # Errors
    /// As [`Self::write_output`].
    pub fn drain(&mut self, give_up: Option<BorrowedFd<'_>>) -> io::Result<Written> {
        loop {
            let Some(fd) = self.wants_output() else { return Ok(Written::Open) };
            let mut fds = vec![PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
            fds.extend(give_up.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            match poll(&mut fds, None::<&Timespec>) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let given_up = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            let writable = fds.first().is_some_and(|fd| !fd.revents().is_empty());
            if writable && self.write_output()? == Written::ReaderGone {
                return Ok(Written::ReaderGone);
            }
            if given_up && !writable {
                return Ok(Written::Open);
            }
        }
    }
}

fn create(path: &std::path::Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).open(path)
}

/// A descriptor to write a standard stream with. A terminal is opened once more, not to block:
/// the mode of the one that was inherited is shared with other processes.
fn own_output(stream: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    if rustix::termios::isatty(stream)
        && let Ok(name) = rustix::termios::ttyname(stream, Vec::new())
        && let Ok(fd) = rustix::fs::open(
            name,
            OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    {
        return Ok(fd);
    }
    stream.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;
    use std::io::{Read, Write};

    fn wake() -> Arc<Wake> {
        Arc::new(Wake::new().unwrap())
    }

    #[test]
    fn output_arrives_byte_for_byte_and_in_order() {
        let (reader, writer) = pipe().unwrap();
        let mut console = Console::new(None, Some(writer), None, wake());
        let sent: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        for part in sent.chunks(77) {
            console.output().send(part);
        }
        let reading = std::thread::spawn(move || {
            let mut received = Vec::new();
            File::from(reader).read_to_end(&mut received).map(|_| received)
        });
        assert_eq!(console.drain(None).unwrap(), Written::Open);
        drop(console);
        assert_eq!(reading.join().unwrap().unwrap(), sent);
    }

    #[test]
    fn a_reader_that_goes_away_is_told_from_an_error() {
        let (reader, writer) = pipe().unwrap();
        let mut console = Console::new(None, Some(writer), None, wake());
        drop(reader);
        console.output().send(b"hello");
        assert_eq!(console.write_output().unwrap(), Written::ReaderGone);
        console.output().send(b"dropped");
        assert!(console.wants_output().is_none());

        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut console = Console::new(None, Some(full.into()), None, wake());
        console.output().send(b"hello");
        assert!(console.write_output().is_err());
    }

    #[test]
    fn a_vcpu_waits_for_a_slow_reader_until_it_is_released() {
        let (_reader, writer) = pipe().unwrap();
        let console = Console::new(None, Some(writer), None, wake());
        let output = console.output().clone();
        output.send(&vec![b'x'; HIGH_WATER]);
        output.throttle();
        output.send(b"y");
        let (sender, passed) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn(move || {
            output.throttle();
            sender.send(()).unwrap();
        });
        assert!(passed.try_recv().is_err());
        console.output().release(true);
        waiting.join().unwrap();
        passed.recv().unwrap();
    }

    #[test]
    fn input_waits_for_the_guest_and_its_end_is_quiet() {
        let (reader, writer) = pipe().unwrap();
        let mut console = Console::new(Some(reader), None, None, wake());
        File::from(writer).write_all(b"abcdef").unwrap();
        assert!(console.wants_input().is_some());
        assert_eq!(console.read_input(), Typed::Bytes);
        assert_eq!(console.read_input(), Typed::Bytes);
        assert!(console.wants_input().is_none(), "the end of the input is not polled again");
        let mut guest = Vec::new();
        let mut room = 4;
        let mut accept = |bytes: &[u8]| {
            let count = bytes.len().min(room);
            room -= count;
            guest.extend_from_slice(&bytes[..count]);
            count
        };
        console.feed(&mut accept);
        console.feed(|bytes| {
            assert_eq!(bytes, b"ef");
            bytes.len()
        });
        assert_eq!(guest, b"abcd");
    }

    #[test]
    fn the_escape_key_is_seen_among_other_keys() {
        let (reader, writer) = pipe().unwrap();
        let mut console = Console::new(Some(reader), None, Some(0x1d), wake());
        File::from(writer).write_all(b"ab\x1dc").unwrap();
        assert_eq!(console.read_input(), Typed::Escape);
    }
}
