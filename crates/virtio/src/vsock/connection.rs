//! One stream between a program in the guest and one on the host.
use super::packet::{Credit, Operation, Ports, shutdown};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown as shut_down};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// Bytes that the guest may send before the host's program takes any.
pub const BUFFER: u32 = 128 << 10;

/// Bytes that are read from the host's program at once.
const STAGE: usize = 64 << 10;

/// Longest first line of a program on the host: `CONNECT 4294967295`.
const LINE: usize = 32;

/// How far a connection is.
#[derive(Debug, PartialEq, Eq)]
pub enum State {
    /// A program on the host has connected and has not said yet with whom it wants to speak.
    Greeting(Vec<u8>),
    /// The guest was asked, or will be, and has not answered.
    Asking,
    /// Data flows.
    Open,
    /// It ends as soon as the guest is told.
    Ending,
}

/// What the first line of a program on the host says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Not all of it is there.
    Incomplete,
    /// It wants this port of the guest.
    Connect(u32),
    /// It says something else, or has gone.
    Bad,
}

/// A connection.
pub struct Connection {
    /// To the program on the host; it never blocks.
    pub socket: OwnedFd,
    /// Not known while the state is `Greeting`.
    pub ports: Ports,
    /// How far it is.
    pub state: State,
    /// It waits for its turn to send to the guest.
    pub queued: bool,
    // From the host to the guest.
    /// The socket may have something to read.
    pub readable: bool,
    /// Both ways of the socket are closed on the other side.
    pub hung_up: bool,
    /// There is nothing more to read.
    ended: bool,
    staged: Vec<u8>,
    staged_from: usize,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    guest_credit: Credit,
    asked_for_credit: bool,
    // From the guest to the host.
    to_host: VecDeque<u8>,
    forwarded: u32,
    /// What the guest knows of `forwarded`.
    forwarded_told: u32,
    /// What the guest shut down.
    guest_shut: u32,
    /// What the guest was told that the host shut down.
    host_shut: u32,
    // Packets to be sent.
    request: bool,
    response: bool,
    credit_update: bool,
}

impl Connection {
    fn new(socket: OwnedFd, ports: Ports, state: State) -> Self {
        Self {
            socket,
            ports,
            state,
            queued: false,
            readable: true,
            hung_up: false,
            ended: false,
            staged: Vec::new(),
            staged_from: 0,
            sent: 0,
            guest_credit: Credit::default(),
            asked_for_credit: false,
            to_host: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            guest_shut: 0,
            host_shut: 0,
            request: false,
            response: false,
            credit_update: false,
        }
    }

    /// A program on the host has connected.
    pub fn from_host(socket: OwnedFd) -> Self {
        Self::new(socket, Ports { host: 0, guest: 0 }, State::Greeting(Vec::new()))
    }

    /// The guest has asked for a program on the host, and `socket` leads to it.
    pub fn from_guest(socket: OwnedFd, ports: Ports, credit: Credit) -> Self {
        let mut connection = Self::new(socket, ports, State::Open);
        connection.guest_credit = credit;
        connection.response = true;
        connection
    }

    /// Reads the first line, and not a byte more: what follows is for the guest.
    pub fn greet(&mut self) -> Greeting {
        let State::Greeting(line) = &mut self.state else { return Greeting::Bad };
        loop {
            let mut byte = [0];
            match rustix::io::read(&self.socket, &mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if line.len() < LINE => line.extend(byte),
                Err(Errno::AGAIN) => return Greeting::Incomplete,
                Err(Errno::INTR) => {}
                _ => return Greeting::Bad,
            }
        }
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let port = line.strip_prefix(b"CONNECT ").and_then(|port| str::from_utf8(port).ok());
        port.and_then(|port| port.parse().ok()).map_or(Greeting::Bad, Greeting::Connect)
    }

    /// Asks the guest for a connection.
    pub fn ask(&mut self, ports: Ports) {
        (self.ports, self.state, self.request) = (ports, State::Asking, true);
    }

    /// The guest has accepted: tells the program on the host so.
    pub fn accepted(&mut self) {
        self.state = State::Open;
        let line = format!("OK {}\n", self.ports.host);
        // The first that is written to this socket: there is room.
        if rustix::io::write(&self.socket, line.as_bytes()) != Ok(line.len()) {
            self.end();
        }
    }

    /// Tells the guest that it is over, and forgets what was under way.
    pub fn end(&mut self) {
        self.state = State::Ending;
        (self.staged, self.to_host) = (Vec::new(), VecDeque::new());
    }

    /// What the guest can take and has taken, as each of its packets says.
    pub fn set_guest_credit(&mut self, credit: Credit) {
        self.guest_credit = credit;
        self.asked_for_credit = false;
    }

    /// Whether the guest may send so many bytes.
    pub fn has_room(&self, length: u32) -> bool {
        length as usize + self.to_host.len() <= BUFFER as usize
    }

    /// Takes data from the guest, for which there is room.
    pub fn take(&mut self, data: &[u8]) {
        self.to_host.extend(data);
        self.flush();
    }

    /// The guest wants to know what it may send.
    pub fn update_credit(&mut self) {
        self.credit_update = true;
    }

    /// The guest shuts something down.
    pub fn shut_by_guest(&mut self, flags: u32) {
        self.guest_shut |= flags & shutdown::BOTH;
        if self.guest_shut & shutdown::RECEIVE != 0 {
            (self.staged, self.staged_from) = (Vec::new(), 0);
            // Fails where the other side has gone, which is as good.
            let _ = shut_down(&self.socket, Shutdown::Read);
        }
        self.flush();
    }

    /// Gives the program on the host what there is for it.
    pub fn flush(&mut self) {
        while !self.to_host.is_empty() {
            match rustix::io::write(&self.socket, self.to_host.as_slices().0) {
                Ok(count) => {
                    self.to_host.drain(..count);
                    // No more than the buffer.
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return self.end(),
            }
        }
        if self.forwarded.wrapping_sub(self.forwarded_told) >= BUFFER / 4 {
            self.credit_update = true;
        }
        if self.to_host.is_empty() {
            match self.guest_shut {
                shutdown::BOTH => self.end(),
                shutdown::SEND => {
                    let _ = shut_down(&self.socket, Shutdown::Write);
                }
                _ => {}
            }
        }
    }

    /// The next packet that it has for the guest, with how much data at most and with the flags
    /// of a shutdown.
    pub fn next(&mut self) -> Option<(Operation, u32)> {
        match self.state {
            State::Greeting(_) => return None,
            State::Ending => return Some((Operation::Reset, 0)),
            State::Asking if self.hung_up => {
                self.end();
                return Some((Operation::Reset, 0));
            }
            State::Asking => return self.request.then_some((Operation::Request, 0)),
            State::Open => {}
        }
        if self.response {
            return Some((Operation::Response, 0));
        }
        if let Some(operation) = self.next_data() {
            return Some((operation, 0));
        }
        let closed = if self.hung_up { shutdown::BOTH } else { shutdown::SEND };
        if self.state == State::Ending {
            Some((Operation::Reset, 0))
        } else if self.is_over() && self.host_shut & closed != closed {
            Some((Operation::Shutdown, closed))
        } else {
            self.credit_update.then_some((Operation::CreditUpdate, 0))
        }
    }

    /// Whether nothing more comes from the host that the guest would take.
    fn is_over(&self) -> bool {
        self.ended || (self.hung_up && self.guest_shut & shutdown::RECEIVE != 0)
    }

    fn next_data(&mut self) -> Option<Operation> {
        if self.guest_shut & shutdown::RECEIVE != 0 {
            return None;
        }
        if self.credit() > 0 {
            self.stage();
            return (!self.staged.is_empty()).then_some(Operation::Data);
        }
        let waits = !self.staged.is_empty() || (self.readable && !self.ended);
        (waits && !self.asked_for_credit).then_some(Operation::CreditRequest)
    }

    /// Bytes that the guest has room for (§5.10.6.3).
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_credit.forwarded);
        self.guest_credit.buffer.saturating_sub(under_way)
    }

    fn stage(&mut self) {
        while self.staged.is_empty() && self.readable && !self.ended {
            let mut data = vec![0; STAGE];
            match rustix::io::read(&self.socket, &mut data[..]) {
                Ok(0) => self.ended = true,
                Ok(count) => {
                    data.truncate(count);
                    (self.staged, self.staged_from) = (data, 0);
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => self.end(),
            }
            if self.state == State::Ending {
                return;
            }
        }
    }

    /// The data of a packet with room for `room` bytes.
    pub fn data(&self, room: usize) -> &[u8] {
        let left = self.staged.get(self.staged_from..).unwrap_or_default();
        let most = left.len().min(room).min(self.credit() as usize);
        left.get(..most).unwrap_or_default()
    }

    /// What the guest is told with each packet.
    pub fn own_credit(&self) -> Credit {
        Credit { buffer: BUFFER, forwarded: self.forwarded }
    }

    /// A packet was sent.
    pub fn note_sent(&mut self, operation: Operation, length: usize, flags: u32) {
        self.forwarded_told = self.forwarded;
        self.credit_update = false;
        match operation {
            Operation::Request => self.request = false,
            Operation::Response => self.response = false,
            Operation::Shutdown => self.host_shut |= flags,
            Operation::CreditRequest => self.asked_for_credit = true,
            Operation::Data => {
                // No more than the stage.
                self.sent = self.sent.wrapping_add(length as u32);
                self.staged_from += length;
                if self.staged_from >= self.staged.len() {
                    (self.staged, self.staged_from) = (Vec::new(), 0);
                }
            }
            Operation::Reset | Operation::CreditUpdate => {}
        }
    }
}
