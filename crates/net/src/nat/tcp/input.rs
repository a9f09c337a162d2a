//! From the guest to the host: segments that arrive (RFC 9293 §3.10.7), and the writing of what
//! the host's socket did not take at once.
use super::flow::{End, Flow, FromGuest, Phase, ToGuest, refuse};
use super::pool::Pool;
use super::{Budget, WINDOW};
use crate::nat::outbox::Outbox;
use crate::wire::tcp::{ACK, FIN, RST, SYN, Segment, Seq};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};
use std::time::Instant;

/// Acknowledgements of the same byte that say that the next one is lost (RFC 5681 §3.2).
const DUPLICATES: u32 = 3;

/// What a connection needs of the others' common goods.
pub(crate) struct Shared<'a> {
    pub pool: &'a mut Pool,
    pub budget: &'a mut Budget,
    pub outbox: &'a mut Outbox,
    pub now: Instant,
}

impl Flow {
    /// A segment from the guest.
    pub fn input(&mut self, segment: &Segment<'_>, shared: &mut Shared<'_>) -> Result<(), End> {
        match self.phase {
            Phase::Connecting => {
                let reset = segment.has(RST) && segment.seq == self.rcv_next;
                if reset { Err(End::ResetHost) } else { Ok(()) }
            }
            Phase::SynSent => self.input_syn_sent(segment, shared),
            Phase::SynReceived | Phase::Established => self.input_open(segment, shared),
        }
    }

    fn input_syn_sent(
        &mut self,
        segment: &Segment<'_>,
        shared: &mut Shared<'_>,
    ) -> Result<(), End> {
        if !segment.has(ACK) {
            return Ok(());
        }
        if segment.ack != self.snd_una + 1 || self.in_flight() == 0 {
            // An old connection of the guest's: it is told so, and asked again.
            refuse(self.link, self.key.addresses, segment, shared.outbox);
            self.syn_due = true;
            return Ok(());
        }
        if segment.has(RST) {
            return Err(End::ResetHost);
        }
        if segment.has(SYN) {
            self.take_syn(segment);
            self.snd_una = segment.ack;
            self.phase = Phase::Established;
            self.ack_due = true;
            self.restart_timer(shared.now);
        }
        Ok(())
    }

    fn input_open(&mut self, segment: &Segment<'_>, shared: &mut Shared<'_>) -> Result<(), End> {
        self.heard(shared.now);
        if segment.has(RST) {
            if segment.seq == self.rcv_next {
                return Err(End::ResetHost);
            }
            // Elsewhere in the window it may be a forgery or late (RFC 5961 §3.2).
            self.ack_due |= in_window(self, segment.seq);
            return Ok(());
        }
        if segment.has(SYN) {
            // The same again, as any other was taken for a new connection.
            self.syn_due |= self.phase == Phase::SynReceived;
            self.ack_due |= self.phase == Phase::Established;
            return Ok(());
        }
        if !segment.has(ACK) {
            return Ok(());
        }
        if self.phase == Phase::SynReceived {
            if segment.ack != self.snd_next || self.in_flight() == 0 {
                return Ok(());
            }
            self.phase = Phase::Established;
            self.snd_una = segment.ack;
            self.window = usize::from(segment.window) << self.scale;
            self.restart_timer(shared.now);
        } else {
            self.acknowledge(segment, shared);
        }
        self.accept(segment, shared)?;
        self.check_end()
    }

    /// Handles what a segment acknowledges, and its window.
    fn acknowledge(&mut self, segment: &Segment<'_>, shared: &mut Shared<'_>) {
        let ack = segment.ack;
        if ack.is_after(self.snd_next) {
            self.ack_due = true;
            return;
        }
        if self.snd_una.is_after(ack) {
            return;
        }
        let window = usize::from(segment.window) << self.scale;
        let progress = ack.span(self.snd_una);
        if progress > 0 {
            self.release(progress, shared);
            self.snd_una = ack;
            self.duplicates = 0;
            if self.to_guest == ToGuest::FinSent && ack == self.snd_next {
                self.to_guest = ToGuest::FinAcknowledged;
            }
            match self.recover {
                // More is missing before the end of what was under way (RFC 6582 §3.2).
                Some(recover) if recover.is_after(ack) => self.resend_due = true,
                _ => self.recover = None,
            }
        } else if segment.length() == 0 && window == self.window && self.in_flight() > 0 {
            self.duplicates += 1;
            if self.duplicates == DUPLICATES && self.recover.is_none() {
                self.recover = Some(self.snd_next);
                self.resend_due = true;
            }
        }
        self.window = window;
        if progress > 0 {
            self.restart_timer(shared.now);
        }
    }

    /// Drops acknowledged data.
    fn release(&mut self, mut count: usize, shared: &mut Shared<'_>) {
        while let Some(first) = self.chunks.front_mut() {
            if first.len() > count {
                first.consume(count);
                return;
            }
            count -= first.len();
            if let Some(chunk) = self.chunks.pop_front() {
                shared.pool.release(chunk);
            }
        }
    }

    /// Takes a segment's data, as far as it is what comes next and there is room.
    fn accept(&mut self, segment: &Segment<'_>, shared: &mut Shared<'_>) -> Result<(), End> {
        let ahead = segment.seq.since(self.rcv_next);
        if segment.length() == 0 {
            // A probe of a guest that wants to know whether we are there has an old number.
            self.ack_due |= ahead != 0;
            return Ok(());
        }
        self.ack_due = true;
        let known = usize::try_from(-ahead).unwrap_or(usize::MAX);
        if known >= segment.length() || self.from_guest != FromGuest::Open {
            return Ok(());
        }
        let data = segment.payload.get(known..).unwrap_or_default();
        let taken = self.write(data, shared);
        self.rcv_next = self.rcv_next + taken;
        if segment.has(FIN) && taken == data.len() {
            self.rcv_next = self.rcv_next + 1;
            self.from_guest = FromGuest::Finished;
            self.flush(shared.budget);
        }
        Ok(())
    }

    /// Writes data to the host's socket, or keeps it; answers how much.
    fn write(&mut self, data: &[u8], shared: &mut Shared<'_>) -> usize {
        if self.deaf {
            return data.len();
        }
        let written = if self.to_host.is_empty() { self.send(data) } else { 0 };
        if self.deaf {
            return data.len();
        }
        let rest = data.get(written..).unwrap_or_default();
        let room = WINDOW.saturating_sub(self.to_host.len()).min(rest.len());
        let kept = shared.budget.take(room);
        self.to_host.extend(rest.get(..kept).unwrap_or_default());
        written + kept
    }

    /// Writes to the host's socket what it takes now.
    fn send(&mut self, data: &[u8]) -> usize {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut written = 0;
        while let Some(rest) = data.get(written..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.socket, rest, flags) {
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => break,
                Err(_) => {
                    // The other side has gone. What it had sent before is read still, and then
                    // the guest is told.
                    self.deaf = true;
                    self.readable = true;
                    break;
                }
            }
        }
        written
    }

    /// Writes what waits; once all is written, also the end.
    pub fn flush(&mut self, budget: &mut Budget) {
        while !self.to_host.is_empty() && !self.deaf {
            // Out of the queue while it is written, so that both can be borrowed.
            let queue = std::mem::take(&mut self.to_host);
            let written = self.send(queue.as_slices().0);
            self.to_host = queue;
            if written == 0 {
                break;
            }
            self.to_host.drain(..written);
            budget.give_back(written);
        }
        if self.deaf {
            budget.give_back(self.to_host.len());
            self.to_host.clear();
        }
        if self.to_host.is_empty() {
            // Memory of a burst is not held by an idle connection.
            self.to_host.shrink_to(0);
            if self.from_guest == FromGuest::Finished {
                self.from_guest = FromGuest::Shut;
                // It fails where the connection is gone, which reading will tell.
                let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
            }
        }
        let edge = self.rcv_next + self.our_window();
        let gain = edge.since(self.advertised);
        let told = self.advertised.since(self.rcv_next);
        // Silly small openings are not worth a segment (RFC 9293 §3.8.6.2.2).
        self.ack_due |= gain >= (WINDOW / 4) as i64 || (told < 1460 && gain >= 1460);
    }
}

fn in_window(flow: &Flow, seq: Seq) -> bool {
    let ahead = seq.since(flow.rcv_next);
    ahead >= 0 && flow.advertised.since(seq) >= 0
}
