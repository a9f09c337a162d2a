//! A small NBD server in the test's own process: a correct one that can be made to lack things, to
//! answer out of order, or to garble what it sends.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use crate::support::Random;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What a server does and does not.
#[derive(Clone)]
pub struct Behaviour {
    pub structured: bool,
    /// Knows `NBD_OPT_GO`.
    pub go: bool,
    pub flags: u16,
    pub minimum: u32,
    pub size: u64,
    /// Garbles about one byte of so many.
    pub garble: Option<(u64, u64)>,
    /// Sends this instead of its first reply to a request, and closes.
    pub instead: Option<Vec<u8>>,
    /// Answers this many requests together, the last one first.
    pub batch: usize,
}

impl Default for Behaviour {
    fn default() -> Self {
        // Flush, trim and write zeroes.
        let flags = 1 | 1 << 2 | 1 << 5 | 1 << 6;
        Self {
            structured: true,
            go: true,
            flags,
            minimum: 1,
            size: 1 << 20,
            garble: None,
            instead: None,
            batch: 1,
        }
    }
}

/// A server for one connection after another.
pub struct Server {
    pub content: Arc<Mutex<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `connections`, one after the other.
    pub fn start(socket: &Path, connections: usize, behaviour: Behaviour) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let content = Arc::new(Mutex::new(vec![0; behaviour.size.min(1 << 24) as usize]));
        let own = Arc::clone(&content);
        let thread = std::thread::spawn(move || {
            for index in 0..connections {
                let (stream, _) = listener.accept().unwrap();
                let garble = behaviour.garble.map(|(seed, one_of)| (seed + index as u64, one_of));
                let behaviour = Behaviour { garble, ..behaviour.clone() };
                let random = Random(garble.map_or(0, |(seed, _)| seed));
                // The client may go away at any time.
                let _ = Session { stream, behaviour, content: &own, random }.run();
            }
        });
        Self { content, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.thread.take().unwrap().join().unwrap();
        }
    }
}

struct Session<'a> {
    stream: UnixStream,
    behaviour: Behaviour,
    content: &'a Mutex<Vec<u8>>,
    random: Random,
}

struct Request {
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl Session<'_> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut bytes = bytes.to_vec();
        if let Some((_, one_of)) = self.behaviour.garble {
            for byte in &mut bytes {
                if self.random.below(one_of) == 0 {
                    *byte = self.random.next() as u8;
                }
            }
        }
        self.stream.write_all(&bytes)
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn run(&mut self) -> io::Result<()> {
        self.send(&[b"NBDMAGIC".as_slice(), b"IHAVEOPT", &[0, 3]].concat())?;
        let _flags: [u8; 4] = self.read()?;
        let mut structured = false;
        loop {
            let head: [u8; 16] = self.read()?;
            let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
            let length = u32::from_be_bytes(head[12..].try_into().unwrap()) as usize;
            let mut data = vec![0; length.min(1 << 16)];
            self.stream.read_exact(&mut data)?;
            match option {
                1 => {
                    let mut export = self.behaviour.size.to_be_bytes().to_vec();
                    export.extend(self.behaviour.flags.to_be_bytes());
                    self.send(&export)?;
                    break;
                }
                7 if self.behaviour.go => {
                    let mut export = vec![0, 0];
                    export.extend(self.behaviour.size.to_be_bytes());
                    export.extend(self.behaviour.flags.to_be_bytes());
                    self.reply(option, 3, &export)?;
                    let mut sizes = vec![0, 3];
                    sizes.extend(self.behaviour.minimum.to_be_bytes());
                    sizes.extend(4096_u32.to_be_bytes());
                    sizes.extend((64_u32 << 10).to_be_bytes());
                    self.reply(option, 3, &sizes)?;
                    self.reply(option, 1, &[])?;
                    break;
                }
                8 if self.behaviour.structured => {
                    structured = true;
                    self.reply(option, 1, &[])?;
                }
                10 if structured => {
                    self.reply(
                        option,
                        4,
                        &[&[0, 0, 0, 9], b"base:allocation".as_slice()].concat(),
                    )?;
                    self.reply(option, 1, &[])?;
                }
                _ => self.reply(option, 1 << 31 | 1, b"what is that")?,
            }
        }
        self.serve(structured)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut message = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.send(&message)
    }

    fn serve(&mut self, structured: bool) -> io::Result<()> {
        let mut waiting = Vec::new();
        loop {
            let head: [u8; 28] = self.read()?;
            let request = Request {
                command: u16::from_be_bytes(head[6..8].try_into().unwrap()),
                cookie: u64::from_be_bytes(head[8..16].try_into().unwrap()),
                offset: u64::from_be_bytes(head[16..24].try_into().unwrap()),
                length: u32::from_be_bytes(head[24..].try_into().unwrap()),
            };
            if request.command == 2 {
                return Ok(());
            }
            if let Some(instead) = self.behaviour.instead.take() {
                let mut instead = instead;
                for place in 0..instead.len().saturating_sub(7) {
                    if instead[place..place + 8] == *b"COOKIE__" {
                        instead[place..place + 8].copy_from_slice(&request.cookie.to_be_bytes());
                    }
                }
                return self.stream.write_all(&instead);
            }
            let minimum = u64::from(self.behaviour.minimum);
            let length = u64::from(request.length);
            assert!(
                request.offset.is_multiple_of(minimum) && length.is_multiple_of(minimum),
                "a request for {length} bytes at {} is not aligned",
                request.offset
            );
            let error = self.change(&request)?;
            waiting.push((request, error));
            if waiting.len() >= self.behaviour.batch {
                for (request, error) in waiting.drain(..).rev() {
                    self.answer(&request, error, structured)?;
                }
            }
        }
    }

    /// Does what a request wants changed; the error.
    fn change(&mut self, request: &Request) -> io::Result<u32> {
        let start = request.offset as usize;
        let range = start..start + request.length as usize;
        let mut data = Vec::new();
        if request.command == 1 {
            data.resize(range.len(), 0);
            self.stream.read_exact(&mut data)?;
        }
        let mut content = self.content.lock().unwrap();
        let Some(target) = content.get_mut(range) else { return Ok(22) };
        match request.command {
            1 => target.copy_from_slice(&data),
            4 | 6 => target.fill(0),
            _ => {}
        }
        Ok(0)
    }

    fn answer(&mut self, request: &Request, error: u32, structured: bool) -> io::Result<()> {
        let read = request.command == 0 && error == 0;
        let data = if read {
            let start = request.offset as usize;
            self.content.lock().unwrap()[start..start + request.length as usize].to_vec()
        } else {
            Vec::new()
        };
        if !structured || (error == 0 && request.command != 0 && request.command != 7) {
            let mut message = 0x6744_6698_u32.to_be_bytes().to_vec();
            message.extend(error.to_be_bytes());
            message.extend(request.cookie.to_be_bytes());
            message.extend(data);
            return self.send(&message);
        }
        let cookie = request.cookie;
        if error != 0 {
            let chunk = [&error.to_be_bytes()[..], &[0, 4], b"nope"].concat();
            return self.chunk(cookie, 1, 1 << 15 | 1, &chunk);
        }
        if request.command == 7 {
            // What is zero up to the next byte that is not, or the other way round.
            let content = self.content.lock().unwrap();
            let part = &content[request.offset as usize..];
            let zero = part.first() == Some(&0);
            let found = part.iter().take_while(|byte| (**byte == 0) == zero).count();
            drop(content);
            let minimum = self.behaviour.minimum as usize;
            let found = found.min(request.length as usize) / minimum * minimum;
            let zero = zero && found > 0;
            let found = found.max(minimum);
            let state = if zero { 3_u32 } else { 0 };
            let chunk = [9_u32, found as u32, state].map(u32::to_be_bytes).concat();
            return self.chunk(cookie, 1, 5, &chunk);
        }
        // In three pieces, the last one first; zeroes as holes.
        let third = (data.len() / 3).max(1);
        let mut pieces: Vec<(u64, &[u8])> = Vec::new();
        for (index, piece) in data.chunks(third).enumerate() {
            pieces.push((request.offset + (index * third) as u64, piece));
        }
        for (offset, piece) in pieces.into_iter().rev() {
            if piece.iter().all(|byte| *byte == 0) {
                let hole = [&offset.to_be_bytes()[..], &(piece.len() as u32).to_be_bytes()];
                self.chunk(cookie, 0, 2, &hole.concat())?;
            } else {
                self.chunk(cookie, 0, 1, &[&offset.to_be_bytes()[..], piece].concat())?;
            }
        }
        self.chunk(cookie, 1, 0, &[])
    }

    fn chunk(&mut self, cookie: u64, flags: u16, kind: u16, data: &[u8]) -> io::Result<()> {
        let mut message = 0x668e_33ef_u32.to_be_bytes().to_vec();
        message.extend(flags.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.send(&message)
    }
}
