//! One TCP connection: its state, and how it begins and ends.
use super::pool::{Chunk, Pool};
use super::{Budget, MOST_IN_FLIGHT, WINDOW};
use crate::nat::config::MTU;
use crate::nat::host;
use crate::nat::outbox::{Link, Outbox};
use crate::wire::Mac;
use crate::wire::ip::Pair;
use crate::wire::tcp::{ACK, Fields, HEADER, RST, SYN, Segment, Seq};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// What a connection is found by: as the guest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FlowKey {
    /// From the guest to the remote side.
    pub addresses: Pair,
    pub guest_port: u16,
    pub remote_port: u16,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The guest wants to connect; the host's socket is on its way.
    Connecting,
    /// The host's side is connected, the guest has been told and has not confirmed.
    SynReceived,
    /// A client of a forward waits for the guest to take its connection.
    SynSent,
    /// Both sides are connected.
    Established,
}

/// The direction from the guest to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FromGuest {
    Open,
    /// The guest has sent all; what waits is still to be written.
    Finished,
    /// The host's side knows the end.
    Shut,
}

/// The direction from the host to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToGuest {
    Open,
    /// The host's side has sent all; what was read is still to be sent.
    Finished,
    /// FIN was sent.
    FinSent,
    /// The guest has acknowledged the end.
    FinAcknowledged,
}

/// Why a connection is over, and who is still to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Both directions ended in order.
    Done,
    /// The guest has reset it.
    ResetHost,
    /// The host's side has reset it.
    ResetGuest,
    /// Neither side can go on.
    ResetBoth,
    /// It never came about.
    Unreachable(Errno),
}

/// The first retransmission, and the last interval between two.
const RTO: Duration = Duration::from_secs(1);
const LONGEST_RTO: Duration = Duration::from_secs(60);
/// How long nothing may happen before the guest is asked whether it is still there.
const IDLE: Duration = Duration::from_secs(2 * 60 * 60);
/// Attempts to reach a guest that does not answer at all: about 15 minutes.
const MOST_ATTEMPTS: u32 = 20;
/// Attempts to open a connection to the guest: about two minutes, in which it may boot.
const MOST_SYNS: u32 = 33;
/// The interval between two of those, after the first.
const LONGEST_SYN_RTO: Duration = Duration::from_secs(4);
/// What a segment holds if the other side does not say (RFC 9293 §3.7.1).
pub(crate) const DEFAULT_MSS: u16 = 536;
/// Less is not believed: it would be all headers.
const SMALLEST_MSS: u16 = 216;
/// Our window is in units of 128 bytes.
const OUR_SCALE: u8 = 7;

/// A connection between the guest and a socket of the host.
#[derive(Debug)]
pub(crate) struct Flow {
    pub key: FlowKey,
    pub link: Link,
    pub socket: OwnedFd,
    pub phase: Phase,
    /// Which of the host's resolvers it goes to, if it is one for DNS.
    pub resolver: Option<usize>,

    pub from_guest: FromGuest,
    /// The number of the guest's SYN.
    pub rcv_first: Seq,
    /// What is expected next from the guest.
    pub rcv_next: Seq,
    /// Up to where the guest was told that it may send.
    pub advertised: Seq,
    /// What the host's socket did not take yet; at most [`WINDOW`].
    pub to_host: VecDeque<u8>,
    /// The host's side takes no more: what the guest sends is void, what it had sent is read.
    pub deaf: bool,
    scaled: bool,

    pub to_guest: ToGuest,
    pub snd_una: Seq,
    pub snd_next: Seq,
    /// The end of what was read from the host.
    pub read_end: Seq,
    /// What was read and not acknowledged: from `snd_una` to `read_end`.
    pub chunks: VecDeque<Chunk>,
    /// The guest's window in bytes.
    pub window: usize,
    pub scale: u8,
    pub mss: usize,
    pub duplicates: u32,
    /// What was lost lies before.
    pub recover: Option<Seq>,

    /// The socket has something, its end included.
    pub readable: bool,
    /// The socket's end is in sight, so a short read is not the last.
    pub hung_up: bool,
    pub syn_due: bool,
    pub ack_due: bool,
    pub resend_due: bool,
    pub probe_due: bool,
    /// It stands in the queue of those that have work.
    pub queued: bool,

    pub deadline: Instant,
    pub attempts: u32,
}

impl Flow {
    /// A connection that begins in `phase`, with the first sequence number that we use.
    pub fn new(
        key: FlowKey,
        link: Link,
        socket: OwnedFd,
        phase: Phase,
        first: Seq,
        now: Instant,
    ) -> Self {
        Self {
            key,
            link,
            socket,
            phase,
            resolver: None,
            from_guest: FromGuest::Open,
            rcv_first: Seq(0),
            rcv_next: Seq(0),
            advertised: Seq(0),
            to_host: VecDeque::new(),
            deaf: false,
            scaled: false,
            to_guest: ToGuest::Open,
            snd_una: first,
            snd_next: first,
            read_end: first,
            chunks: VecDeque::new(),
            window: 0,
            scale: 0,
            mss: usize::from(DEFAULT_MSS),
            duplicates: 0,
            recover: None,
            readable: false,
            hung_up: false,
            syn_due: phase == Phase::SynSent,
            ack_due: false,
            resend_due: false,
            probe_due: false,
            queued: false,
            deadline: now + if phase == Phase::Connecting { IDLE } else { RTO },
            attempts: 0,
        }
    }

    /// Takes from the guest's SYN what it says about itself.
    pub fn take_syn(&mut self, segment: &Segment<'_>) {
        self.rcv_first = segment.seq;
        self.rcv_next = segment.seq + 1;
        self.advertised = self.rcv_next;
        // Never more than the link takes: the guest may say anything.
        let link = MTU - self.key.addresses.header() - HEADER;
        let mss = usize::from(segment.mss.unwrap_or(DEFAULT_MSS).max(SMALLEST_MSS));
        self.mss = mss.min(link);
        self.scaled = segment.scale.is_some();
        self.scale = segment.scale.unwrap_or(0);
        self.window = usize::from(segment.window);
    }

    /// Bytes that the guest has not acknowledged, SYN and FIN included.
    pub fn in_flight(&self) -> usize {
        self.snd_next.span(self.snd_una)
    }

    /// Bytes that may be sent now.
    pub fn usable(&self) -> usize {
        self.window.min(MOST_IN_FLIGHT).saturating_sub(self.in_flight())
    }

    /// Our window, in bytes.
    pub fn our_window(&self) -> usize {
        let window = WINDOW.saturating_sub(self.to_host.len());
        if self.scaled { window } else { window.min(0xffff) }
    }

    /// A segment's header; what it says of our window is remembered.
    pub fn fields(&mut self, seq: Seq, flags: u8) -> Fields {
        let syn = flags & SYN != 0;
        let shift = if self.scaled && !syn { OUR_SCALE } else { 0 };
        let window = (self.our_window() >> shift).min(0xffff);
        self.advertised = self.rcv_next + (window << shift);
        self.ack_due = false;
        let offer_scale = syn && (self.scaled || self.phase == Phase::SynSent);
        Fields {
            source: self.key.remote_port,
            destination: self.key.guest_port,
            seq,
            ack: if flags & ACK != 0 { self.rcv_next } else { Seq(0) },
            flags,
            window: window as u16,
            mss: syn.then(|| largest_mss(self.key.addresses)),
            scale: offer_scale.then_some(OUR_SCALE),
        }
    }

    /// Sends the SYN or SYN-ACK.
    pub fn send_syn(&mut self, outbox: &mut Outbox) {
        let flags = if self.phase == Phase::SynSent { SYN } else { SYN | ACK };
        let fields = self.fields(self.snd_una, flags);
        self.snd_next = self.snd_una + 1;
        self.read_end = self.snd_next;
        self.syn_due = false;
        outbox.tcp(self.link, self.key.addresses.reversed(), &fields);
    }

    /// Sends a segment without data.
    pub fn send_empty(&mut self, seq: Seq, outbox: &mut Outbox) {
        let fields = self.fields(seq, ACK);
        outbox.tcp(self.link, self.key.addresses.reversed(), &fields);
    }

    /// Sends a reset to the guest.
    pub fn send_reset(&mut self, outbox: &mut Outbox) {
        // Before the first SYN-ACK there is nothing but the guest's number to refer to.
        let seq = if self.phase == Phase::Connecting { Seq(0) } else { self.snd_next };
        let fields = Fields { window: 0, ..self.fields(seq, RST | ACK) };
        outbox.tcp(self.link, self.key.addresses.reversed(), &fields);
    }

    /// The host's socket is connected.
    pub fn connected(&mut self, now: Instant) {
        self.phase = Phase::SynReceived;
        self.syn_due = true;
        self.attempts = 0;
        self.deadline = now + RTO;
    }

    /// Something came from the guest: it is there. What waits for an acknowledgement goes on to.
    pub fn heard(&mut self, now: Instant) {
        if self.in_flight() == 0 {
            self.attempts = 0;
            self.deadline = now + self.patience();
        }
    }

    /// The guest acknowledged something new, or something was sent while nothing was under way.
    pub fn restart_timer(&mut self, now: Instant) {
        self.attempts = 0;
        self.deadline = now + self.patience();
    }

    /// How long to wait for the guest.
    fn patience(&self) -> Duration {
        if self.in_flight() > 0 || self.waits_for_window() { RTO } else { IDLE }
    }

    /// Whether there is something to send that the guest's window does not admit.
    pub fn waits_for_window(&self) -> bool {
        let more = self.readable && self.to_guest == ToGuest::Open;
        self.phase == Phase::Established
            && self.in_flight() == 0
            && (more || self.read_end.is_after(self.snd_next))
            && self.usable() == 0
    }

    /// Whether a turn would do something.
    pub fn has_work(&self) -> bool {
        let sends = match self.phase {
            Phase::Established => {
                let usable = self.usable();
                let enough = usable >= self.mss || (usable > 0 && self.in_flight() == 0);
                let unsent = self.read_end.is_after(self.snd_next);
                let more = unsent || (self.readable && self.to_guest == ToGuest::Open);
                let fin = self.to_guest == ToGuest::Finished && !unsent;
                self.resend_due || self.probe_due || fin || (more && enough)
            }
            _ => false,
        };
        let acks = self.ack_due && !matches!(self.phase, Phase::Connecting | Phase::SynSent);
        sends || acks || self.syn_due
    }

    /// The deadline has passed.
    pub fn timed_out(&mut self, now: Instant) -> Result<(), End> {
        // What the card had refused was not sent: no attempt was made.
        let refused = self.syn_due || self.resend_due || self.probe_due;
        self.attempts += u32::from(!refused);
        let (most, longest) = match self.phase {
            Phase::Connecting => (u32::MAX, IDLE),
            Phase::SynSent | Phase::SynReceived => (MOST_SYNS, LONGEST_SYN_RTO),
            Phase::Established => (MOST_ATTEMPTS, LONGEST_RTO),
        };
        if self.attempts > most {
            return Err(End::ResetBoth);
        }
        let backoff = RTO.saturating_mul(1 << self.attempts.min(10)).min(longest);
        self.deadline = now + backoff;
        match self.phase {
            Phase::Connecting => self.deadline = now + IDLE,
            Phase::SynSent | Phase::SynReceived => self.syn_due = true,
            Phase::Established if self.in_flight() > 0 => {
                self.resend_due = true;
                self.duplicates = 0;
                self.recover = Some(self.snd_next);
            }
            Phase::Established => self.probe_due = true,
        }
        Ok(())
    }

    /// Whether both directions have ended.
    pub fn check_end(&self) -> Result<(), End> {
        let ended = self.from_guest == FromGuest::Shut && self.to_guest == ToGuest::FinAcknowledged;
        if ended { Err(End::Done) } else { Ok(()) }
    }

    /// Frees what it holds; `end` says what is done to the host's socket.
    pub fn dispose(mut self, end: End, pool: &mut Pool, budget: &mut Budget) {
        for chunk in self.chunks.drain(..) {
            pool.release(chunk);
        }
        budget.give_back(self.to_host.len());
        if matches!(end, End::ResetHost | End::ResetBoth) {
            host::reset(self.socket);
        }
    }
}

/// The largest segment that fits an IP packet. The guest takes the smaller of this and what its
/// own link takes.
fn largest_mss(addresses: Pair) -> u16 {
    (65_535 - addresses.header() - HEADER) as u16
}

/// The gateway answers a segment of no connection (RFC 9293 §3.10.7.1).
pub(crate) fn refuse(link: Link, addresses: Pair, segment: &Segment<'_>, outbox: &mut Outbox) {
    if segment.has(RST) {
        return;
    }
    let (seq, ack, flags) = if segment.has(ACK) {
        (segment.ack, Seq(0), RST)
    } else {
        (Seq(0), segment.seq + segment.length(), RST | ACK)
    };
    let fields = Fields {
        source: segment.destination,
        destination: segment.source,
        seq,
        ack,
        flags,
        window: 0,
        mss: None,
        scale: None,
    };
    outbox.tcp(link, addresses.reversed(), &fields);
}

impl Link {
    /// Between the gateway and a station of the guest.
    pub fn between(gateway: Mac, guest: Mac) -> Self {
        Self { to: guest, from: gateway }
    }
}
