//! All connections of a guest, and the Unix sockets that they lead to.
use super::VsockError;
use super::connection::{Connection, Greeting, State};
use super::packet::{Credit, HEADER, HOST_CID, Header, Operation, Ports};
use crate::chain::Chain;
use crate::queue::Queue;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Most connections at once. Each may hold [`super::connection::BUFFER`] bytes and 64 KiB more.
const MOST: usize = 512;

/// Most refusals that wait for the guest to take them, until it can send nothing more.
const MOST_REFUSALS: usize = 256;

/// Ports of the host from here on are given to its own programs.
const FIRST_PORT: u32 = 1 << 30;

/// The source of an event.
const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// The host's side.
pub struct Exchange {
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    epoll: OwnedFd,
    /// By the number of their events.
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    /// Those that may have something for the guest, in turn.
    ready: VecDeque<u64>,
    refusals: VecDeque<Ports>,
    next_number: u64,
    next_port: u32,
    acceptable: bool,
}

impl Exchange {
    /// Binds the socket to which the host's programs connect.
    pub fn new(guest_cid: u64, path: &Path) -> Result<Self, VsockError> {
        let bind = |source| VsockError::Bind { path: path.to_owned(), source };
        let listener = listen(path).map_err(bind)?;
        listener.set_nonblocking(true).map_err(bind)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|e| bind(e.into()))?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), flags)
            .map_err(|errno| bind(errno.into()))?;
        Ok(Self {
            guest_cid,
            path: path.to_owned(),
            listener,
            epoll,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            next_number: FIRST_CONNECTION,
            next_port: FIRST_PORT,
            acceptable: true,
        })
    }

    /// Ends all connections without a word.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.refusals.clear();
    }

    /// Has `event` wake [`Self::wait`].
    pub fn watch(&self, event: impl AsFd) -> Result<(), Errno> {
        epoll::add(&self.epoll, event, EventData::new_u64(WAKE), EventFlags::IN)
    }

    /// Ends what [`Self::watch`] began.
    pub fn unwatch(&self, event: impl AsFd) {
        // It was watched.
        let _ = epoll::delete(&self.epoll, event);
    }

    /// Waits for something to happen on the host, and takes note. Answers whether it was the
    /// event that is watched.
    pub fn wait(&mut self) -> bool {
        let mut events = Vec::with_capacity(64);
        // Interrupted by a signal, it looks once too often.
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None);
        let mut woken = false;
        for event in events {
            let Event { flags, data } = event;
            match data.u64() {
                WAKE => woken = true,
                LISTENER => self.acceptable = true,
                number => self.note(number, flags),
            }
        }
        woken
    }

    fn note(&mut self, number: u64, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
        {
            connection.readable = true;
        }
        connection.hung_up |= flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if flags.contains(EventFlags::OUT) {
            connection.flush();
        }
        if matches!(connection.state, State::Greeting(_)) {
            self.greet(number);
        } else {
            self.queue(number);
        }
    }

    /// Takes the host's programs in that have connected.
    pub fn accept(&mut self) {
        while self.acceptable && self.connections.len() < MOST {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if stream.set_nonblocking(true).is_ok() {
                        let connection = Connection::from_host(stream.into());
                        if let Some(number) = self.add(connection) {
                            self.greet(number);
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.acceptable = false,
                // Out of descriptors, or one that has gone: looked at again when next woken.
                Err(_) => return,
            }
        }
    }

    fn add(&mut self, connection: Connection) -> Option<u64> {
        let number = self.next_number;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &connection.socket, EventData::new_u64(number), flags).ok()?;
        self.next_number += 1;
        self.connections.insert(number, connection);
        Some(number)
    }

    fn remove(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number)
            && self.by_ports.get(&connection.ports) == Some(&number)
        {
            self.by_ports.remove(&connection.ports);
        }
    }

    fn queue(&mut self, number: u64) {
        if let Some(connection) = self.connections.get_mut(&number)
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(number);
        }
    }

    fn greet(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        match connection.greet() {
            Greeting::Incomplete => {}
            Greeting::Bad => self.remove(number),
            Greeting::Connect(guest) => {
                let ports = Ports { host: self.free_port(guest), guest };
                if let Some(connection) = self.connections.get_mut(&number) {
                    connection.ask(ports);
                }
                self.by_ports.insert(ports, number);
                self.queue(number);
            }
        }
    }

    fn free_port(&mut self, guest: u32) -> u32 {
        // There are far more ports than connections.
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).filter(|p| *p < u32::MAX).unwrap_or(FIRST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// Whether the guest may send: it may not while it takes no refusals.
    pub fn can_take(&self) -> bool {
        self.refusals.len() < MOST_REFUSALS
    }

    /// Takes a packet of the guest's.
    pub fn take(&mut self, chain: &Chain) {
        let mut reader = chain.reader();
        let Some(bytes) = reader.read_array() else { return };
        let header = Header::from_guest(&bytes);
        if header.source != self.guest_cid {
            return;
        }
        let Some(&number) = self.by_ports.get(&header.ports) else {
            return self.take_unknown(&header);
        };
        let Some(connection) = self.connections.get_mut(&number) else { return };
        connection.set_guest_credit(header.credit);
        match (header.operation, &connection.state) {
            _ if header.destination != HOST_CID || !header.stream => connection.end(),
            (Some(Operation::Reset), _) => {
                connection.flush();
                return self.remove(number);
            }
            (_, State::Ending) => {}
            (Some(Operation::Response), State::Asking) => connection.accepted(),
            (Some(Operation::Data), State::Open)
                if connection.has_room(header.length)
                    && header.length as usize <= reader.remaining() =>
            {
                connection.take(&reader.read_vec(header.length as usize));
            }
            (Some(Operation::Shutdown), State::Open) => connection.shut_by_guest(header.flags),
            (Some(Operation::CreditUpdate), _) => {}
            (Some(Operation::CreditRequest), State::Open) => connection.update_credit(),
            // More data than it was told there is room for, or out of order.
            _ => connection.end(),
        }
        self.queue(number);
    }

    fn take_unknown(&mut self, header: &Header) {
        let asks = header.operation == Some(Operation::Request);
        if asks && header.destination == HOST_CID && header.stream && self.connect(header).is_some()
        {
            return;
        }
        if header.operation != Some(Operation::Reset) {
            self.refusals.push_back(header.ports);
        }
    }

    /// Connects the guest to the program that listens at `PATH_PORT`.
    fn connect(&mut self, header: &Header) -> Option<()> {
        if self.connections.len() >= MOST {
            return None;
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", header.ports.host));
        let socket = reach(path.as_ref()).ok()?;
        let number = self.add(Connection::from_guest(socket, header.ports, header.credit))?;
        self.by_ports.insert(header.ports, number);
        self.queue(number);
        Some(())
    }

    /// Sends to the guest what there is for it, as long as it has buffers. Answers whether there
    /// is more.
    pub fn send(&mut self, queue: &Queue) -> bool {
        while let Some(ready) = self.next_packet() {
            let Some(chain) = queue.pop() else {
                self.put_back(ready);
                return true;
            };
            let written = self.write(&ready, &chain);
            queue.push_silently(chain, written);
            if written == 0 {
                // A buffer without room for a header.
                self.put_back(ready);
            }
        }
        false
    }

    fn next_packet(&mut self) -> Option<Ready> {
        if let Some(ports) = self.refusals.pop_front() {
            return Some(Ready::Refusal(ports));
        }
        while let Some(number) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            connection.queued = false;
            if let Some((operation, flags)) = connection.next() {
                return Some(Ready::Packet(number, operation, flags));
            }
        }
        None
    }

    fn put_back(&mut self, ready: Ready) {
        match ready {
            Ready::Refusal(ports) => self.refusals.push_front(ports),
            Ready::Packet(number, ..) => {
                if let Some(connection) = self.connections.get_mut(&number) {
                    connection.queued = true;
                    self.ready.push_front(number);
                }
            }
        }
    }

    /// Writes a packet into a buffer; answers how many bytes, none where it does not fit.
    fn write(&mut self, ready: &Ready, chain: &Chain) -> u32 {
        let mut writer = chain.writer();
        let Some(room) = writer.remaining().checked_sub(HEADER) else { return 0 };
        let mut header = Header {
            source: HOST_CID,
            destination: self.guest_cid,
            ports: Ports { host: 0, guest: 0 },
            length: 0,
            operation: Some(Operation::Reset),
            stream: true,
            flags: 0,
            credit: Credit::default(),
        };
        match *ready {
            Ready::Refusal(ports) => {
                header.ports = ports;
                writer.write(&header.to_guest());
            }
            Ready::Packet(number, operation, flags) => {
                let Some(connection) = self.connections.get_mut(&number) else { return 0 };
                let is_data = operation == Operation::Data;
                if is_data && room == 0 {
                    return 0;
                }
                let data = if is_data { connection.data(room) } else { &[] };
                header.ports = connection.ports;
                header.operation = Some(operation);
                header.flags = flags;
                header.credit = connection.own_credit();
                // No more than the guest's credit.
                header.length = data.len() as u32;
                writer.write(&header.to_guest());
                writer.write(data);
                let length = data.len();
                connection.note_sent(operation, length, flags);
                if operation == Operation::Reset {
                    self.remove(number);
                } else {
                    self.queue(number);
                }
            }
        }
        writer.written()
    }
}

/// A packet whose turn it is.
enum Ready {
    /// Of a connection that there is not.
    Refusal(Ports),
    /// Of a connection: operation and flags.
    Packet(u64, Operation, u32),
}

impl Drop for Exchange {
    fn drop(&mut self) {
        // What somebody else has removed or put there meanwhile is theirs.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Connects to a program that listens at a path. It does not wait: a program that does not keep
/// up is as good as none.
fn reach(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Listens at a path. A socket that a process left there when it ended is replaced; connecting
/// to it is refused, as it is for files that are no sockets.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
            if !is_socket || reach(path).err() != Some(Errno::CONNREFUSED) {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}
