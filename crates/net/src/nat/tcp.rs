//! TCP: each connection of the guest ends here, and goes on as a socket of the host.
//!
//! The link to the guest is memory, so there is no congestion to control; what a guest's card
//! refuses was not sent. What a guest drops all the same is sent again. Data that arrives from the
//! guest is written to the host's socket straight from its frame; what the socket does not take
//! waits here, at most as much as the window that the guest was told. Data from the host is read
//! into the memory from which it is sent ([`pool`]), no more at a time than the guest's window
//! takes. So each side is slowed down by the other, and nothing is lost.
//!
//! [`flow`] has a connection's state, [`input`] what the guest sends, [`output`] what it gets.

mod flow;
mod input;
mod output;
mod pool;

use super::datagrams::Resolvers;
use super::host::{self, Policy, Token};
use super::outbox::{Link, Outbox};
use crate::poller::Poller;
use crate::table::{Key, Table};
use crate::wire::icmp::Unreachable;
use crate::wire::ip::{HOPS, Pair, TCP};
use crate::wire::tcp::{ACK, HEADER, RST, SYN, Segment, Seq};
use crate::wire::{ETHERNET, Headers, Mac};
use crate::{Accepts, Nic};
use flow::{End, Flow, FlowKey, Phase};
use input::Shared;
use output::{Port, Turn};
use pool::Pool;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::sockopt;
use std::collections::hash_map::RandomState;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Most bytes of a connection that wait for the host's socket; the largest window.
pub(crate) const WINDOW: usize = 1 << 20;
/// Most bytes of a connection that the guest has not acknowledged.
pub(crate) const MOST_IN_FLIGHT: usize = 1 << 20;
/// Most bytes of all connections that wait for the host's sockets. Beyond it the guest has to send
/// again.
const MOST_WAITING: usize = 64 << 20;
/// Where DNS is served.
const DNS: u16 = 53;

/// What all connections together may still keep.
#[derive(Debug)]
pub(crate) struct Budget(usize);

impl Budget {
    fn take(&mut self, most: usize) -> usize {
        let taken = most.min(self.0);
        self.0 -= taken;
        taken
    }

    fn give_back(&mut self, count: usize) {
        self.0 += count;
    }
}

/// What the connections need beside themselves.
pub(crate) struct Context<'a> {
    pub policy: &'a Policy,
    pub poller: &'a Poller,
    pub outbox: &'a mut Outbox,
    pub resolvers: &'a mut Resolvers,
    pub now: Instant,
}

/// All connections.
#[derive(Debug)]
pub(crate) struct Tcp {
    flows: Table<Flow>,
    by_key: HashMap<FlowKey, Key>,
    pool: Pool,
    budget: Budget,
    /// Connections with work that needs the guest's card.
    queue: VecDeque<Key>,
    /// No deadline is earlier.
    next_scan: Instant,
    /// For first sequence numbers (RFC 6528).
    secret: RandomState,
    born: Instant,
    next_port: u16,
}

impl Tcp {
    /// For at most so many connections.
    pub fn new(limit: usize, now: Instant) -> Self {
        Self {
            flows: Table::new(limit),
            by_key: HashMap::new(),
            pool: Pool::default(),
            budget: Budget(MOST_WAITING),
            queue: VecDeque::new(),
            next_scan: now,
            secret: RandomState::new(),
            born: now,
            next_port: 0,
        }
    }

    /// Connections at present.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    pub fn is_full(&self) -> bool {
        self.flows.is_full()
    }

    /// Whether some connection has work for [`Tcp::turns`].
    pub fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// When [`Tcp::tick`] is to be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        (self.flows.len() > 0).then_some(self.next_scan)
    }

    /// A segment from the guest. `packet` is the IP packet it came in.
    pub fn guest_segment(
        &mut self,
        addresses: Pair,
        segment: &Segment<'_>,
        mac: Mac,
        packet: &[u8],
        context: &mut Context<'_>,
    ) {
        let key =
            FlowKey { addresses, guest_port: segment.source, remote_port: segment.destination };
        let opens = segment.flags & (SYN | ACK | RST) == SYN;
        let mut name = self.by_key.get(&key).copied();
        // A guest that was reset does not know of its old connection. Nobody else can send on its
        // link, so that this needs no proof (RFC 5961 §4).
        if let Some(old) = name
            && opens
            && let Some(flow) = self.flows.get_mut(old)
            && flow.phase != Phase::SynSent
            && flow.rcv_first != segment.seq
        {
            self.settle(old, Err(End::ResetHost), context);
            name = None;
        }
        let Some(name) = name else {
            let link = Link::between(context.policy.layout.mac, mac);
            if opens {
                self.open(key, segment, link, packet, context);
            } else {
                flow::refuse(link, addresses, segment, context.outbox);
            }
            return;
        };
        let Some(flow) = self.flows.get_mut(name) else { return };
        flow.link.to = mac;
        let mut shared = Shared {
            pool: &mut self.pool,
            budget: &mut self.budget,
            outbox: context.outbox,
            now: context.now,
        };
        let result = flow.input(segment, &mut shared);
        self.settle(name, result, context);
    }

    /// The guest opens a connection.
    fn open(
        &mut self,
        key: FlowKey,
        segment: &Segment<'_>,
        link: Link,
        packet: &[u8],
        context: &mut Context<'_>,
    ) {
        let destination = key.addresses.destination();
        let is_dns = context.policy.layout.is_dns(destination);
        if (is_dns && key.remote_port != DNS) || self.is_full() {
            flow::refuse(link, key.addresses, segment, context.outbox);
            return;
        }
        let (remote, resolver) = if is_dns {
            let Some(resolver) = context.resolvers.get(0) else {
                flow::refuse(link, key.addresses, segment, context.outbox);
                return;
            };
            (resolver, Some(0))
        } else {
            match context.policy.outside(destination) {
                Ok(address) => (SocketAddr::new(address, key.remote_port), None),
                Err(why) => {
                    context.outbox.unreachable(link, key.addresses, packet, why);
                    return;
                }
            }
        };
        let socket = match host::connect(remote) {
            Ok(socket) => socket,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                flow::refuse(link, key.addresses, segment, context.outbox);
                return;
            }
            Err(error) => {
                let why = host::reason(error);
                context.outbox.unreachable(link, key.addresses, packet, why);
                return;
            }
        };
        let first = self.first_seq(&key, context.now);
        let mut flow = Flow::new(key, link, socket, Phase::Connecting, first, context.now);
        flow.take_syn(segment);
        flow.resolver = resolver;
        self.add(flow, context);
    }

    /// Takes a connection that came to a forward; `None` leaves it out.
    pub fn accepted(
        &mut self,
        socket: OwnedFd,
        client: SocketAddr,
        guest: SocketAddr,
        mac: Option<Mac>,
        context: &mut Context<'_>,
    ) {
        let Some(addresses) = Pair::of(guest.ip(), client.ip()) else { return };
        let is_gateway = context.policy.layout.is_gateway(client.ip());
        let mut key = FlowKey { addresses, guest_port: guest.port(), remote_port: client.port() };
        // Ports of the gateway are used in turn, so that a guest that keeps closed connections in
        // mind for a minute does not meet them again.
        if is_gateway || self.by_key.contains_key(&key) {
            for _ in 0..=self.flows.len() {
                self.next_port = self.next_port.wrapping_add(1).max(1024);
                key.remote_port = self.next_port;
                if !self.by_key.contains_key(&key) {
                    break;
                }
            }
        }
        let link = Link::between(context.policy.layout.mac, mac.unwrap_or(Mac::BROADCAST));
        let first = self.first_seq(&key, context.now);
        let mut flow = Flow::new(key, link, socket, Phase::SynSent, first, context.now);
        flow.syn_due = mac.is_some();
        self.add(flow, context);
    }

    fn add(&mut self, flow: Flow, context: &mut Context<'_>) {
        let (key, deadline) = (flow.key, flow.deadline);
        let Some(name) = self.flows.insert(flow) else { return };
        self.by_key.insert(key, name);
        self.next_scan = self.next_scan.min(deadline);
        let Some(flow) = self.flows.get_mut(name) else { return };
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
        let result = context.poller.watch(&flow.socket, Token::Flow(name).to_bits(), events);
        self.settle(name, result.map_err(|_| End::ResetBoth), context);
    }

    /// Something happened to a connection's socket.
    pub fn host_event(&mut self, name: Key, flags: EventFlags, context: &mut Context<'_>) {
        let Some(flow) = self.flows.get_mut(name) else { return };
        let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        if flags.contains(EventFlags::IN) || broken {
            flow.readable = true;
        }
        if flags.contains(EventFlags::RDHUP) || broken {
            flow.readable = true;
            flow.hung_up = true;
        }
        if flow.phase == Phase::Connecting {
            if !broken && !flags.contains(EventFlags::OUT) {
                return;
            }
            match sockopt::socket_error(&flow.socket) {
                Ok(Ok(())) => flow.connected(context.now),
                Ok(Err(error)) | Err(error) => return self.failed(name, error, context),
            }
        }
        flow.flush(&mut self.budget);
        let result = flow.check_end();
        self.settle(name, result, context);
    }

    /// A connection could not be made.
    fn failed(&mut self, name: Key, error: Errno, context: &mut Context<'_>) {
        let Some(flow) = self.flows.get_mut(name) else { return };
        // The next resolver may be there.
        let next = flow.resolver.and_then(|index| {
            let remote = context.resolvers.get(index + 1)?;
            Some((index + 1, host::connect(remote).ok()?))
        });
        let end = match (next, error) {
            (Some((index, socket)), _) => {
                flow.resolver = Some(index);
                flow.socket = socket;
                (flow.readable, flow.hung_up) = (false, false);
                let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
                match context.poller.watch(&flow.socket, Token::Flow(name).to_bits(), events) {
                    Ok(()) => return,
                    Err(_) => End::ResetGuest,
                }
            }
            (None, Errno::CONNREFUSED | Errno::CONNRESET) => End::ResetGuest,
            (None, error) => End::Unreachable(error),
        };
        self.settle(name, Err(end), context);
    }

    /// Tells connections that wait for the guest's Ethernet address.
    pub fn found(&mut self, mac: Mac) {
        let waiting: Vec<Key> = self
            .flows
            .iter()
            .filter(|(_, flow)| flow.phase == Phase::SynSent && flow.link.to == Mac::BROADCAST)
            .map(|(name, _)| name)
            .collect();
        for name in waiting {
            if let Some(flow) = self.flows.get_mut(name) {
                flow.link.to = mac;
                flow.syn_due = true;
                enqueue(&mut self.queue, name, flow);
            }
        }
    }

    /// Handles deadlines that have passed. Answers whether a connection waits for the guest's
    /// Ethernet address.
    pub fn tick(&mut self, context: &mut Context<'_>) -> bool {
        if context.now < self.next_scan {
            return false;
        }
        let due: Vec<Key> = self
            .flows
            .iter()
            .filter(|(_, flow)| flow.deadline <= context.now)
            .map(|(name, _)| name)
            .collect();
        let mut asks = false;
        for name in due {
            let Some(flow) = self.flows.get_mut(name) else { continue };
            let result = flow.timed_out(context.now);
            if flow.link.to == Mac::BROADCAST {
                // A SYN to nobody is no use.
                flow.syn_due = false;
                asks = true;
            }
            self.settle(name, result, context);
        }
        let later = context.now + Duration::from_secs(60);
        let earliest = self.flows.iter().map(|(_, flow)| flow.deadline).min();
        self.next_scan = earliest.map_or(later, |earliest| earliest.min(later));
        asks
    }

    /// Lets connections send to the guest, each its turn, at most `most` turns; answers `false`
    /// once the card has refused something.
    pub fn turns(&mut self, nic: &dyn Nic, most: usize, context: &mut Context<'_>) -> bool {
        let accepts: Accepts = nic.accepts();
        for _ in 0..most {
            let Some(name) = self.queue.pop_front() else { return true };
            let Some(flow) = self.flows.get_mut(name) else { continue };
            flow.queued = false;
            let mut port = Port {
                nic,
                accepts,
                outbox: context.outbox,
                pool: &mut self.pool,
                now: context.now,
            };
            match flow.turn(&mut port) {
                Ok(Turn::Idle) => {
                    self.next_scan = self.next_scan.min(flow.deadline);
                    let result = flow.check_end();
                    self.settle_quietly(name, result, context);
                }
                Ok(Turn::More) => {
                    self.next_scan = self.next_scan.min(flow.deadline);
                    enqueue(&mut self.queue, name, flow);
                }
                Ok(Turn::Refused) => {
                    self.next_scan = self.next_scan.min(flow.deadline);
                    flow.queued = true;
                    self.queue.push_front(name);
                    return false;
                }
                Err(end) => self.settle(name, Err(end), context),
            }
        }
        true
    }

    /// After a connection was touched: it goes on, with what it has to do, or it ends.
    fn settle(&mut self, name: Key, result: Result<(), End>, context: &mut Context<'_>) {
        if result.is_ok()
            && let Some(flow) = self.flows.get_mut(name)
        {
            self.next_scan = self.next_scan.min(flow.deadline);
            if flow.has_work() {
                enqueue(&mut self.queue, name, flow);
            }
        }
        self.settle_quietly(name, result, context);
    }

    /// Removes a connection that has ended.
    fn settle_quietly(&mut self, name: Key, result: Result<(), End>, context: &mut Context<'_>) {
        let Err(end) = result else { return };
        let Some(mut flow) = self.flows.remove(name) else { return };
        self.by_key.remove(&flow.key);
        match end {
            End::Done if flow.ack_due => flow.send_empty(flow.snd_next, context.outbox),
            End::Done | End::ResetHost => {}
            End::ResetGuest | End::ResetBoth => flow.send_reset(context.outbox),
            End::Unreachable(error) => tell_unreachable(&flow, host::reason(error), context.outbox),
        }
        flow.dispose(end, &mut self.pool, &mut self.budget);
    }

    /// The first sequence number of a connection: no earlier one of the same name is behind it.
    fn first_seq(&self, key: &FlowKey, now: Instant) -> Seq {
        let ticks = now.saturating_duration_since(self.born).as_micros() / 4;
        Seq((self.secret.hash_one(key) as u32).wrapping_add(ticks as u32))
    }
}

fn enqueue(queue: &mut VecDeque<Key>, name: Key, flow: &mut Flow) {
    if !flow.queued {
        flow.queued = true;
        queue.push_back(name);
    }
}

/// Answers the SYN of a connection, which is no longer at hand, with why it failed.
fn tell_unreachable(flow: &Flow, why: Unreachable, outbox: &mut Outbox) {
    let mut headers = Headers::new(flow.link.from, flow.link.to, flow.key.addresses.ethertype());
    headers.ip(flow.key.addresses, TCP, HOPS, HEADER);
    headers.tcp(&crate::wire::tcp::Fields {
        source: flow.key.guest_port,
        destination: flow.key.remote_port,
        seq: Seq(flow.rcv_next.0.wrapping_sub(1)),
        ack: Seq(0),
        flags: SYN,
        window: 0,
        mss: None,
        scale: None,
    });
    let packet = headers.as_slice().get(ETHERNET..).unwrap_or_default();
    outbox.unreachable(flow.link, flow.key.addresses, packet, why);
}
