//! From the host to the guest: reading the host's socket and sending segments, as large as the
//! card takes them.
use super::MOST_IN_FLIGHT;
use super::flow::{End, Flow, Phase, ToGuest};
use super::pool::{Filled, LARGE, Pool};
use crate::nat::outbox::Outbox;
use crate::wire::ip::{HOPS, Pair, TCP};
use crate::wire::tcp::{ACK, CHECKSUM, FIN, HEADER, PSH, Seq};
use crate::wire::{ETHERNET, Headers};
use crate::{Accepts, Checksum, Nic, Offload, Packet, SegmentKind, Segmentation};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::time::Instant;

/// Frames that one connection sends before it is another's turn.
const TURN: usize = 4;

/// What a turn came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing more to do until something happens.
    Idle,
    /// There is more to send.
    More,
    /// The card has no room.
    Refused,
}

/// Where segments go.
pub(crate) struct Port<'a> {
    pub nic: &'a dyn Nic,
    pub accepts: Accepts,
    pub outbox: &'a mut Outbox,
    pub pool: &'a mut Pool,
    pub now: Instant,
}

impl Flow {
    /// Sends what there is to send.
    pub fn turn(&mut self, port: &mut Port<'_>) -> Result<Turn, End> {
        let waits = (self.syn_due || self.probe_due || self.ack_due) && !port.outbox.has_room();
        if waits {
            return Ok(Turn::Refused);
        }
        if self.syn_due {
            self.send_syn(port.outbox);
        }
        if self.phase == Phase::Established {
            let turn = self.send_data(port)?;
            if turn != Turn::Idle {
                return Ok(turn);
            }
            if self.probe_due {
                self.probe_due = false;
                // An old number: the guest answers with what it expects and its window.
                let before = Seq(self.snd_una.0.wrapping_sub(1));
                self.send_empty(before, port.outbox);
            }
        }
        if self.ack_due && !matches!(self.phase, Phase::Connecting | Phase::SynSent) {
            self.send_empty(self.snd_next, port.outbox);
        }
        Ok(Turn::Idle)
    }

    fn send_data(&mut self, port: &mut Port<'_>) -> Result<Turn, End> {
        if self.resend_due {
            if self.in_flight() > 0 && !self.resend(port) {
                return Ok(Turn::Refused);
            }
            self.resend_due = false;
        }
        for _ in 0..TURN {
            if self.read_end.is_after(self.snd_next) {
                match self.send_next(port) {
                    Some(true) => {}
                    Some(false) => return Ok(Turn::Refused),
                    None => return Ok(self.wait_for_window(port)),
                }
            } else if self.to_guest == ToGuest::Finished {
                return Ok(if self.send_fin(port) { Turn::Idle } else { Turn::Refused });
            } else if self.to_guest == ToGuest::Open && self.readable {
                if self.usable() == 0 || (self.usable() < self.mss && self.in_flight() > 0) {
                    return Ok(self.wait_for_window(port));
                }
                if !self.read(port)? {
                    return Ok(Turn::Idle);
                }
            } else {
                return Ok(Turn::Idle);
            }
        }
        Ok(Turn::More)
    }

    /// The guest's window is closed: it is asked from time to time whether it still is.
    fn wait_for_window(&mut self, port: &Port<'_>) -> Turn {
        if self.attempts == 0 && self.waits_for_window() {
            self.restart_timer(port.now);
        }
        Turn::Idle
    }

    /// Reads from the host's socket what may be sent; answers whether there was something.
    fn read(&mut self, port: &mut Port<'_>) -> Result<bool, End> {
        // Whole segments, so that no small one stands between large ones.
        let whole = (LARGE / self.mss).max(1) * self.mss;
        let most = self.usable().min(whole).min(MOST_IN_FLIGHT);
        let mut full = false;
        let socket = &self.socket;
        let filled = port.pool.fill(&mut self.chunks, most, |room| {
            loop {
                match rustix::net::recv(socket, &mut *room, RecvFlags::DONTWAIT) {
                    Err(Errno::INTR) => {}
                    result => {
                        full = result.is_ok_and(|(count, _)| count == room.len());
                        return result.map(|(count, _)| count);
                    }
                }
            }
        });
        match filled {
            Filled::Some(count) => {
                self.read_end = self.read_end + count;
                self.readable = full || self.hung_up;
                Ok(true)
            }
            Filled::End if self.deaf => Err(End::ResetGuest),
            Filled::End => {
                self.readable = false;
                self.to_guest = ToGuest::Finished;
                Ok(true)
            }
            Filled::Failed(Errno::AGAIN) if self.deaf => Err(End::ResetBoth),
            Filled::Failed(Errno::AGAIN) => {
                self.readable = false;
                Ok(false)
            }
            Filled::Failed(_) => Err(End::ResetGuest),
            Filled::Starved => Ok(false),
        }
    }

    /// Sends what comes next; `None` if the window does not admit it.
    fn send_next(&mut self, port: &mut Port<'_>) -> Option<bool> {
        let nothing_under_way = self.in_flight() == 0;
        let (index, offset) = self.find(self.snd_next)?;
        let rest = self.chunks.get(index)?.len() - offset;
        let length = rest.min(self.usable());
        let length = if length < rest { whole_segments(length, self.mss) } else { length };
        if length == 0 || (length < rest.min(self.mss) && !nothing_under_way) {
            return None;
        }
        let sent = self.emit(index, offset, length, self.snd_next, port);
        let Some(sent) = sent else { return Some(false) };
        self.snd_next = self.snd_next + sent;
        if nothing_under_way {
            self.restart_timer(port.now);
        }
        Some(true)
    }

    /// Sends again what comes first; answers whether the card took it.
    fn resend(&mut self, port: &mut Port<'_>) -> bool {
        let Some((index, offset)) = self.find(self.snd_una) else {
            return self.to_guest != ToGuest::FinSent || self.emit_fin(self.snd_una, port);
        };
        let rest = self.chunks.get(index).map_or(0, |chunk| chunk.len() - offset);
        let length = rest.min(self.in_flight());
        self.emit(index, offset, length, self.snd_una, port).is_some()
    }

    fn send_fin(&mut self, port: &mut Port<'_>) -> bool {
        let nothing_under_way = self.in_flight() == 0;
        if !self.emit_fin(self.snd_next, port) {
            return false;
        }
        self.snd_next = self.snd_next + 1;
        self.to_guest = ToGuest::FinSent;
        if nothing_under_way {
            self.restart_timer(port.now);
        }
        true
    }

    /// The chunk that holds a sequence number, and where in it.
    fn find(&self, seq: Seq) -> Option<(usize, usize)> {
        let mut end = self.read_end.span(self.snd_una);
        let wanted = seq.span(self.snd_una);
        for (index, chunk) in self.chunks.iter().enumerate().rev() {
            let start = end.checked_sub(chunk.len())?;
            if (start..end).contains(&wanted) {
                return Some((index, wanted - start));
            }
            end = start;
        }
        None
    }

    /// Hands data of a chunk to the card; answers how much, `None` if it was refused.
    fn emit(
        &mut self,
        index: usize,
        offset: usize,
        length: usize,
        seq: Seq,
        port: &Port<'_>,
    ) -> Option<usize> {
        let addresses = self.key.addresses.reversed();
        let large = port.accepts.checksum
            && match addresses {
                Pair::V4 { .. } => port.accepts.tcp4,
                Pair::V6 { .. } => port.accepts.tcp6,
            };
        let length = if large { length } else { length.min(self.mss) };
        let last = seq + length == self.read_end;
        let before = (self.ack_due, self.advertised);
        let mut headers = self.headers(addresses, seq, if last { ACK | PSH } else { ACK }, length);
        let transport = ETHERNET + addresses.header();
        let mut offload = Offload::default();
        let chunk = self.chunks.get_mut(index)?;
        let mut sum = addresses.pseudo(TCP, HEADER + length);
        let field = transport + usize::from(CHECKSUM);
        if port.accepts.checksum {
            headers.patch(field, &sum.partial());
            offload.checksum = Some(Checksum { start: transport as u16, offset: CHECKSUM });
        } else {
            sum.add(headers.as_slice().get(transport..).unwrap_or_default());
            sum.add(chunk.data(offset, length));
            headers.patch(field, &sum.finish());
        }
        if length > self.mss {
            let kind = match addresses {
                Pair::V4 { .. } => SegmentKind::Tcp4,
                Pair::V6 { .. } => SegmentKind::Tcp6,
            };
            let (size, header) = (self.mss as u16, headers.len() as u16);
            offload.segmentation = Some(Segmentation { kind, size, header });
        }
        let taken = chunk.with_frame(offset, length, &headers, |frame| {
            port.nic.receive(Packet { frame, offload })
        });
        if taken != Some(true) {
            (self.ack_due, self.advertised) = before;
            return None;
        }
        Some(length)
    }

    /// Hands a FIN to the card; answers whether it was taken.
    fn emit_fin(&mut self, seq: Seq, port: &Port<'_>) -> bool {
        let addresses = self.key.addresses.reversed();
        let before = (self.ack_due, self.advertised);
        let mut headers = self.headers(addresses, seq, ACK | FIN, 0);
        let transport = ETHERNET + addresses.header();
        let mut sum = addresses.pseudo(TCP, HEADER);
        sum.add(headers.as_slice().get(transport..).unwrap_or_default());
        headers.patch(transport + usize::from(CHECKSUM), &sum.finish());
        let packet = Packet { frame: headers.as_slice(), offload: Offload::default() };
        let taken = port.nic.receive(packet);
        if !taken {
            (self.ack_due, self.advertised) = before;
        }
        taken
    }

    fn headers(&mut self, addresses: Pair, seq: Seq, flags: u8, payload: usize) -> Headers {
        let fields = self.fields(seq, flags);
        let mut headers = Headers::new(self.link.to, self.link.from, addresses.ethertype());
        headers.ip(addresses, TCP, HOPS, HEADER + payload);
        headers.tcp(&fields);
        headers
    }
}

/// The part of a length that fills segments, or all of it if it does not fill one.
fn whole_segments(length: usize, mss: usize) -> usize {
    if length < mss { length } else { length - length % mss }
}
