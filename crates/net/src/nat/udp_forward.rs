//! UDP forwards: who writes to the host's port is a sender that the guest can answer.
use super::datagrams::{LARGEST, send_to};
use super::host::{self, Policy};
use super::neighbors::Neighbors;
use super::outbox::{Link, Outbox};
use crate::wire::ip::Pair;
use rustix::io::Errno;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Senders remembered; one more takes the place of that which was silent for longest.
const MOST_PEERS: usize = 256;
/// After so long the guest can no longer answer a sender.
const IDLE: Duration = Duration::from_secs(180);
/// Datagrams taken before others have their turn.
const TURN: usize = 64;

/// A port of the host that leads to one of the guest's.
#[derive(Debug)]
pub(crate) struct UdpForward {
    pub socket: OwnedFd,
    pub guest_port: u16,
    /// It has something that waits for room on the way to the guest.
    pub pending: bool,
    /// By how the guest sees them.
    peers: HashMap<SocketAddr, (SocketAddr, Instant)>,
}

impl UdpForward {
    pub fn new(socket: OwnedFd, guest_port: u16) -> Self {
        Self { socket, guest_port, pending: false, peers: HashMap::new() }
    }

    /// Passes on a datagram of the guest's, if it answers a sender of this forward.
    pub fn reply(
        &mut self,
        guest: SocketAddr,
        to: SocketAddr,
        message: &[u8],
        now: Instant,
    ) -> bool {
        if guest.port() != self.guest_port {
            return false;
        }
        match self.peers.get_mut(&to) {
            Some((peer, used)) if now.saturating_duration_since(*used) < IDLE => {
                *used = now;
                // The sender may have gone; there is nobody to tell.
                let _ = send_to(&self.socket, message, *peer);
                true
            }
            _ => false,
        }
    }

    /// Takes what came from the host's side to the guest.
    pub fn receive(
        &mut self,
        policy: &Policy,
        neighbors: &Neighbors,
        outbox: &mut Outbox,
        now: Instant,
    ) {
        let mut buffer = vec![0; LARGEST];
        self.pending = false;
        for _ in 0..TURN {
            if !outbox.has_room() {
                break;
            }
            match host::receive(&self.socket, &mut buffer) {
                Ok((length, from)) => {
                    let message = buffer.get(..length).unwrap_or_default();
                    self.pass_on(message, from, policy, neighbors, outbox, now);
                }
                Err(Errno::AGAIN) => return,
                // An answer of the guest's was refused by its receiver.
                Err(_) => {}
            }
        }
        self.pending = true;
    }

    fn pass_on(
        &mut self,
        message: &[u8],
        from: SocketAddr,
        policy: &Policy,
        neighbors: &Neighbors,
        outbox: &mut Outbox,
        now: Instant,
    ) {
        let guest = policy.layout.guest4(0);
        let seen = self.remember(from, policy, now);
        let Some(addresses) = Pair::of(seen.ip(), guest.into()) else { return };
        match neighbors.find(guest.into()) {
            Some(mac) => {
                let link = Link::between(policy.layout.mac, mac);
                outbox.udp(link, addresses, seen.port(), self.guest_port, message);
            }
            // The guest is not up; this datagram is lost, the next may not be.
            None => super::neighbors::ask(&policy.layout, guest, outbox),
        }
    }

    /// How the guest sees a sender: two senders never look alike.
    fn remember(&mut self, from: SocketAddr, policy: &Policy, now: Instant) -> SocketAddr {
        let mut seen = policy.client(from);
        while self.peers.get(&seen).is_some_and(|(peer, _)| *peer != from) {
            seen.set_port(seen.port().wrapping_add(1).max(1024));
        }
        if self.peers.len() >= MOST_PEERS && !self.peers.contains_key(&seen) {
            let oldest = self.peers.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(seen, _)| *seen) {
                self.peers.remove(&oldest);
            }
        }
        self.peers.insert(seen, (from, now));
        seen
    }
}
