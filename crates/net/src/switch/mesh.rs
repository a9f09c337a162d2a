//! The other machines on a switch, and where addresses were seen.
use super::folder::{MOST_PORTS, prepare};
use super::message;
use crate::Packet;
use crate::table::{Key, Table};
use crate::wire::{Ethernet, Mac};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Addresses remembered; a guest that makes up more of them only has its frames sent to all.
const MOST_ADDRESSES: usize = 4096;
/// For how long an address is believed to be where it was seen (IEEE 802.1Q §8.8.3).
const AGE: Duration = Duration::from_secs(300);
/// Bytes that wait for a machine that is slow; beyond it frames are lost, as in any switch.
const QUEUE: usize = 4 << 20;

/// Another machine.
#[derive(Debug)]
struct Peer {
    socket: Arc<OwnedFd>,
    queue: VecDeque<Vec<u8>>,
    bytes: usize,
}

/// What became of sending to a machine.
enum Sent {
    Yes,
    Gone,
}

/// All other machines.
#[derive(Debug)]
pub(super) struct Mesh {
    peers: Table<Peer>,
    addresses: HashMap<Mac, (Key, Instant)>,
}

impl Mesh {
    pub fn new() -> Self {
        Self { peers: Table::new(MOST_PORTS), addresses: HashMap::new() }
    }

    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Adds a machine; `None` if there are as many as can be.
    pub fn add(&mut self, socket: OwnedFd) -> Option<(Key, Arc<OwnedFd>)> {
        prepare(&socket);
        let socket = Arc::new(socket);
        let peer = Peer { socket: Arc::clone(&socket), queue: VecDeque::new(), bytes: 0 };
        Some((self.peers.insert(peer)?, socket))
    }

    pub fn remove(&mut self, key: Key) {
        self.peers.remove(key);
        self.addresses.retain(|_, (place, _)| *place != key);
    }

    pub fn socket(&mut self, key: Key) -> Option<Arc<OwnedFd>> {
        self.peers.get_mut(key).map(|peer| Arc::clone(&peer.socket))
    }

    /// Notes where an address was seen.
    pub fn learn(&mut self, source: Mac, place: Key, now: Instant) {
        if source.is_group() {
            return;
        }
        if self.addresses.len() >= MOST_ADDRESSES && !self.addresses.contains_key(&source) {
            self.addresses.retain(|_, (_, seen)| now.saturating_duration_since(*seen) < AGE);
            if self.addresses.len() >= MOST_ADDRESSES {
                return;
            }
        }
        self.addresses.insert(source, (place, now));
    }

    /// Sends a packet to where its destination is, or to all.
    pub fn send(&mut self, packet: &Packet<'_>, now: Instant) {
        let Some(ethernet) = Ethernet::parse(packet.frame) else { return };
        let header = message::header(&packet.offload);
        let place = self.addresses.get(&ethernet.destination);
        let known = place.filter(|(_, seen)| now.saturating_duration_since(*seen) < AGE);
        let targets = match known {
            Some((key, _)) if !ethernet.destination.is_group() => vec![*key],
            _ => self.peers.iter().map(|(key, _)| key).collect(),
        };
        for key in targets {
            let Some(peer) = self.peers.get_mut(key) else { continue };
            if matches!(peer.send(&header, packet.frame), Sent::Gone) {
                self.remove(key);
            }
        }
    }

    /// A machine takes messages again.
    pub fn flush(&mut self, key: Key) {
        let Some(peer) = self.peers.get_mut(key) else { return };
        while let Some(message) = peer.queue.front() {
            match send(&peer.socket, &[], message) {
                Ok(()) => {
                    peer.bytes -= message.len();
                    peer.queue.pop_front();
                }
                Err(Errno::AGAIN | Errno::NOBUFS) => return,
                Err(_) => return self.remove(key),
            }
        }
    }
}

impl Peer {
    fn send(&mut self, header: &[u8], frame: &[u8]) -> Sent {
        if self.queue.is_empty() {
            match send(&self.socket, header, frame) {
                Ok(()) => return Sent::Yes,
                Err(Errno::AGAIN | Errno::NOBUFS) => {}
                Err(Errno::MSGSIZE) => return Sent::Yes,
                Err(_) => return Sent::Gone,
            }
        }
        if self.bytes + header.len() + frame.len() <= QUEUE {
            self.bytes += header.len() + frame.len();
            self.queue.push_back([header, frame].concat());
        }
        Sent::Yes
    }
}

/// Sends one message of two parts.
fn send(socket: &OwnedFd, header: &[u8], frame: &[u8]) -> Result<(), Errno> {
    let parts = [IoSlice::new(header), IoSlice::new(frame)];
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match sendmsg(socket, &parts, &mut SendAncillaryBuffer::default(), flags) {
            Err(Errno::INTR) => {}
            result => return result.map(|_| ()),
        }
    }
}
