//! UDP, echo requests and DNS queries: each sender of the guest has a socket of the host for as
//! long as it is used.
//!
//! A guest's port keeps its socket whomever it writes to, and gets what anyone writes there
//! (endpoint-independent mapping and filtering, RFC 4787 §4.1 and §5). A DNS query has a socket of
//! its own that only hears the resolver, with a port that nobody can guess.
use super::dns;
pub(crate) use super::dns::Resolvers;
use super::host::{self, Policy, Token};
use super::outbox::{Link, Outbox};
use super::udp_forward::UdpForward;
use crate::poller::Poller;
use crate::table::{Key, Table};
use crate::wire::Mac;
use crate::wire::icmp::{self, Echo, Unreachable};
use crate::wire::ip::{HOPS, Pair};
use crate::wire::udp::Datagram;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long a UDP socket stays without use (RFC 4787 §4.3 asks for two minutes at least).
const UDP_IDLE: Duration = Duration::from_secs(180);
/// How long an echo's socket stays.
const ECHO_IDLE: Duration = Duration::from_secs(30);
/// How long a resolver has to answer before the next one is asked.
const DNS_PATIENCE: Duration = Duration::from_millis(2500);
/// How often a query is sent at all.
const DNS_ATTEMPTS: usize = 4;
/// How often deadlines are looked at.
const SCAN: Duration = Duration::from_millis(500);
/// Datagrams taken from one socket before others have their turn.
const TURN: usize = 64;
/// No UDP datagram is larger.
pub(crate) const LARGEST: usize = 65_535;

/// A query under way.
#[derive(Debug)]
struct Query {
    /// From the guest to the DNS server's address.
    addresses: Pair,
    port: u16,
    message: Vec<u8>,
    attempts: usize,
}

/// What a socket is for.
#[derive(Debug)]
enum Use {
    Udp(SocketAddr),
    Echo(IpAddr, u16),
    Dns(Query),
}

/// By what a socket is found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Sender {
    Udp(SocketAddr),
    Echo(IpAddr, u16),
}

impl Use {
    fn sender(&self) -> Option<Sender> {
        match *self {
            Self::Udp(guest) => Some(Sender::Udp(guest)),
            Self::Echo(guest, identifier) => Some(Sender::Echo(guest, identifier)),
            Self::Dns(_) => None,
        }
    }

    fn patience(&self) -> Duration {
        match self {
            Self::Udp(_) => UDP_IDLE,
            Self::Echo(..) => ECHO_IDLE,
            Self::Dns(_) => DNS_PATIENCE,
        }
    }
}

#[derive(Debug)]
struct Socket {
    socket: OwnedFd,
    link: Link,
    purpose: Use,
    deadline: Instant,
    /// It has something that waits for room on the way to the guest.
    pending: bool,
}

/// What datagrams need beside themselves.
pub(crate) struct Context<'a> {
    pub policy: &'a Policy,
    pub poller: &'a Poller,
    pub outbox: &'a mut Outbox,
    pub resolvers: &'a mut Resolvers,
    pub forwards: &'a mut [UdpForward],
    pub now: Instant,
}

/// All sockets of datagrams.
#[derive(Debug)]
pub(crate) struct Datagrams {
    sockets: Table<Socket>,
    by_sender: HashMap<Sender, Key>,
    pending: VecDeque<Key>,
    next_scan: Instant,
    buffer: Vec<u8>,
}

impl Datagrams {
    /// For at most so many sockets.
    pub fn new(limit: usize, now: Instant) -> Self {
        Self {
            sockets: Table::new(limit),
            by_sender: HashMap::new(),
            pending: VecDeque::new(),
            next_scan: now,
            buffer: vec![0; LARGEST],
        }
    }

    /// Sockets at present.
    pub fn len(&self) -> usize {
        self.sockets.len()
    }

    /// When [`Datagrams::tick`] is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        (self.sockets.len() > 0).then_some(self.next_scan)
    }

    /// A datagram from the guest. `packet` is the IP packet it came in.
    pub fn udp(
        &mut self,
        addresses: Pair,
        datagram: &Datagram<'_>,
        mac: Mac,
        packet: &[u8],
        context: &mut Context<'_>,
    ) {
        let link = Link::between(context.policy.layout.mac, mac);
        let remote = SocketAddr::new(addresses.destination(), datagram.destination);
        if context.policy.layout.is_dns(remote.ip()) {
            if remote.port() == dns::PORT {
                self.query(addresses, datagram, link, context);
            } else {
                context.outbox.unreachable(link, addresses, packet, Unreachable::Port);
            }
            return;
        }
        let guest = SocketAddr::new(addresses.source(), datagram.source);
        let now = context.now;
        if context.forwards.iter_mut().any(|f| f.reply(guest, remote, datagram.payload, now)) {
            return;
        }
        let result = context.policy.outside(remote.ip()).and_then(|address| {
            let purpose = Use::Udp(guest);
            let socket = self.socket(purpose, link, || host::datagrams(address), context);
            let to = SocketAddr::new(address, remote.port());
            socket.and_then(|socket| send_to(socket, datagram.payload, to)).map_err(host::reason)
        });
        if let Err(why) = result {
            context.outbox.unreachable(link, addresses, packet, why);
        }
    }

    /// An echo request from the guest to the outside.
    pub fn echo(
        &mut self,
        addresses: Pair,
        echo: &Echo<'_>,
        mac: Mac,
        packet: &[u8],
        context: &mut Context<'_>,
    ) {
        let link = Link::between(context.policy.layout.mac, mac);
        let result = context.policy.outside(addresses.destination()).and_then(|address| {
            let purpose = Use::Echo(addresses.source(), echo.identifier);
            let socket = self.socket(purpose, link, || host::ping(address), context);
            let to = SocketAddr::new(address, 0);
            socket.and_then(|socket| send_to(socket, echo.message, to)).map_err(host::reason)
        });
        if let Err(why) = result {
            context.outbox.unreachable(link, addresses, packet, why);
        }
    }

    /// The socket of a sender, made if there is none.
    fn socket(
        &mut self,
        purpose: Use,
        link: Link,
        make: impl Fn() -> Result<OwnedFd, Errno>,
        context: &Context<'_>,
    ) -> Result<&OwnedFd, Errno> {
        let known = purpose.sender().and_then(|sender| self.by_sender.get(&sender).copied());
        let key = match known {
            Some(key) => key,
            None => self.add(purpose, link, make, context)?,
        };
        let socket = self.sockets.get_mut(key).ok_or(Errno::BADF)?;
        socket.link = link;
        socket.deadline = context.now + socket.purpose.patience();
        Ok(&socket.socket)
    }

    fn add(
        &mut self,
        purpose: Use,
        link: Link,
        make: impl Fn() -> Result<OwnedFd, Errno>,
        context: &Context<'_>,
    ) -> Result<Key, Errno> {
        if self.sockets.is_full() {
            self.remove_oldest();
        }
        let socket = match make() {
            // The process has no more; one that is not used for long may have served its time.
            Err(Errno::MFILE | Errno::NFILE) => {
                self.remove_oldest();
                make()?
            }
            result => result?,
        };
        let deadline = context.now + purpose.patience();
        if self.sockets.len() == 0 {
            self.next_scan = context.now + SCAN;
        }
        let sender = purpose.sender();
        let entry = Socket { socket, link, purpose, deadline, pending: false };
        let key = self.sockets.insert(entry).ok_or(Errno::MFILE)?;
        let entry = self.sockets.get_mut(key).ok_or(Errno::BADF)?;
        if let Err(error) =
            context.poller.watch(&entry.socket, Token::Datagram(key).to_bits(), EventFlags::IN)
        {
            self.sockets.remove(key);
            return Err(Errno::from_io_error(&error).unwrap_or(Errno::NOMEM));
        }
        if let Some(sender) = sender {
            self.by_sender.insert(sender, key);
        }
        Ok(key)
    }

    fn remove(&mut self, key: Key) -> Option<Socket> {
        let entry = self.sockets.remove(key)?;
        if let Some(sender) = entry.purpose.sender() {
            self.by_sender.remove(&sender);
        }
        Some(entry)
    }

    fn remove_oldest(&mut self) {
        let oldest = self.sockets.iter().min_by_key(|(_, entry)| entry.deadline);
        if let Some(key) = oldest.map(|(key, _)| key) {
            self.remove(key);
        }
    }

    /// A DNS query from the guest.
    fn query(
        &mut self,
        addresses: Pair,
        datagram: &Datagram<'_>,
        link: Link,
        context: &mut Context<'_>,
    ) {
        if dns::is_query(datagram.payload) {
            let message = datagram.payload.to_vec();
            let query = Query { addresses, port: datagram.source, message, attempts: 0 };
            self.ask(query, link, context);
        }
    }

    /// Sends a query to the next resolver; says that it failed when all were asked.
    fn ask(&mut self, mut query: Query, link: Link, context: &mut Context<'_>) {
        let servers = context.resolvers.count();
        while query.attempts < DNS_ATTEMPTS && servers > 0 {
            let server = context.resolvers.get(query.attempts % servers);
            query.attempts += 1;
            let Some(server) = server else { break };
            let Ok(socket) = host::connect_datagrams(server) else { continue };
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            if rustix::net::send(&socket, &query.message, flags).is_err() {
                continue;
            }
            // The socket is made already, and given out once.
            let socket = std::cell::Cell::new(Some(socket));
            let make = || socket.take().ok_or(Errno::MFILE);
            // Where it cannot be kept, the guest asks again.
            let _ = self.add(Use::Dns(query), link, make, context);
            return;
        }
        answer(&query, link, &dns::failure(&query.message), context.outbox);
    }

    /// A socket has something.
    pub fn host_event(&mut self, key: Key, context: &mut Context<'_>) {
        let Some(entry) = self.sockets.get_mut(key) else { return };
        for _ in 0..TURN {
            if !context.outbox.has_room() {
                break;
            }
            match host::receive(&entry.socket, &mut self.buffer) {
                Ok((length, from)) => {
                    let message = self.buffer.get_mut(..length).unwrap_or_default();
                    if entry.deliver(message, from, context) {
                        self.remove(key);
                        return;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // What was sent before was refused. For a query that is an answer.
                Err(_) if matches!(entry.purpose, Use::Dns(_)) => {
                    if let Some(Socket { purpose: Use::Dns(query), link, .. }) = self.remove(key) {
                        self.ask(query, link, context);
                    }
                    return;
                }
                Err(_) => {}
            }
        }
        if !entry.pending {
            entry.pending = true;
            self.pending.push_back(key);
        }
    }

    /// Whether sockets wait for room on the way to the guest.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// There is room again on the way to the guest.
    pub fn resume(&mut self, context: &mut Context<'_>) {
        for _ in 0..self.pending.len() {
            if !context.outbox.has_room() {
                return;
            }
            let Some(key) = self.pending.pop_front() else { return };
            if let Some(entry) = self.sockets.get_mut(key) {
                entry.pending = false;
                self.host_event(key, context);
            }
        }
    }

    /// Handles deadlines that have passed.
    pub fn tick(&mut self, context: &mut Context<'_>) {
        if context.now < self.next_scan || self.sockets.len() == 0 {
            return;
        }
        self.next_scan = context.now + SCAN;
        let now = context.now;
        let due = self.sockets.iter().filter(|(_, entry)| entry.deadline <= now);
        for key in due.map(|(key, _)| key).collect::<Vec<_>>() {
            if let Some(Socket { purpose: Use::Dns(query), link, .. }) = self.remove(key) {
                self.ask(query, link, context);
            }
        }
    }
}

impl Socket {
    /// Passes a datagram on to the guest; answers whether the socket has served its purpose.
    fn deliver(&mut self, message: &mut [u8], from: SocketAddr, context: &mut Context<'_>) -> bool {
        let outbox = &mut *context.outbox;
        match &self.purpose {
            Use::Udp(guest) => {
                self.deadline = context.now + UDP_IDLE;
                let remote = context.policy.inside(from.ip());
                if let Some(addresses) = Pair::of(remote, guest.ip()) {
                    outbox.udp(self.link, addresses, from.port(), guest.port(), message);
                }
                false
            }
            Use::Echo(guest, identifier) => {
                let remote = context.policy.inside(from.ip());
                if let Some(addresses) = Pair::of(remote, *guest)
                    && icmp::translate_reply(addresses, message, *identifier)
                {
                    outbox.ip(self.link, addresses, icmp::protocol(addresses), HOPS, message);
                }
                false
            }
            Use::Dns(query) => {
                let answers = dns::is_answer(message, &query.message);
                if answers {
                    answer(query, self.link, message, outbox);
                }
                answers
            }
        }
    }
}

fn answer(query: &Query, link: Link, message: &[u8], outbox: &mut Outbox) {
    outbox.udp(link, query.addresses.reversed(), dns::PORT, query.port, message);
}

/// Sends a datagram. What does not fit the socket's buffer at the moment is lost, as on a wire.
pub(crate) fn send_to(socket: &OwnedFd, message: &[u8], to: SocketAddr) -> Result<(), Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    for _ in 0..2 {
        return match rustix::net::sendto(socket, message, flags, &to) {
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::MSGSIZE) => Ok(()),
            // Tells of an earlier datagram; this one was not sent.
            Err(Errno::CONNREFUSED | Errno::INTR) => continue,
            Err(error) => Err(error),
        };
    }
    Ok(())
}
