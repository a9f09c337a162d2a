//! The thread of a port: takes what the other machines send, and new ones in.
use super::folder::MOST_PORTS;
use super::mesh::Mesh;
use super::message::{self, HEADER};
use crate::delivery::Delivery;
use crate::offload::{LARGEST_FRAME, is_sound};
use crate::poller::Poller;
use crate::table::Key;
use crate::waker::Waker;
use crate::wire::Ethernet;
use crate::{Nic, Packet};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags, accept_with, recv, sockopt};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Messages taken from one machine before others have their turn.
const TURN: usize = 32;
const EVENTS: usize = 64;
/// Tokens beside those of machines, whose keys have no more than 56 bits.
const WAKE: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;
/// What happens to a connection.
const CONNECTION: EventFlags = EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP);

/// What the thread and the callers share. The lock of the card is never taken while that of the
/// mesh is held, and no card is called under the latter.
pub(super) struct Shared {
    mesh: Mutex<Mesh>,
    nic: Mutex<Option<Arc<dyn Nic>>>,
    listener: OwnedFd,
    poller: Poller,
    waker: Waker,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new(listener: OwnedFd, others: Vec<OwnedFd>) -> io::Result<Self> {
        let shared = Self {
            mesh: Mutex::new(Mesh::new()),
            nic: Mutex::new(None),
            poller: Poller::new()?,
            waker: Waker::new()?,
            listener,
            stop: AtomicBool::new(false),
        };
        shared.poller.watch(&shared.waker, WAKE, EventFlags::IN)?;
        shared.poller.watch(&shared.listener, LISTENER, EventFlags::IN)?;
        for socket in others {
            shared.add(socket)?;
        }
        Ok(shared)
    }

    fn add(&self, socket: OwnedFd) -> io::Result<()> {
        let mut mesh = lock(&self.mesh);
        if let Some((key, socket)) = mesh.add(socket)
            && let Err(error) = self.poller.watch(&*socket, key.to_bits(), CONNECTION)
        {
            mesh.remove(key);
            return Err(error);
        }
        Ok(())
    }

    pub fn others(&self) -> usize {
        lock(&self.mesh).len()
    }

    pub fn plug(&self, nic: Option<Arc<dyn Nic>>) {
        let before = std::mem::replace(&mut *lock(&self.nic), nic);
        // Dropped without a lock, as that may lead back here.
        drop(before);
        self.waker.wake();
    }

    pub fn transmit(&self, packet: &Packet<'_>) {
        if is_sound(packet) {
            lock(&self.mesh).send(packet, Instant::now());
        }
    }

    pub fn room(&self) {
        self.waker.wake();
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// The thread.
    pub fn run(&self) {
        let mut events = Vec::with_capacity(EVENTS);
        let mut buffer = vec![0; HEADER + LARGEST_FRAME];
        let mut delivery = Delivery::default();
        // Machines that have sent something.
        let mut ready = VecDeque::new();
        while !self.stop.load(Ordering::SeqCst) {
            let at_once = self.waker.lie_down() || (!ready.is_empty() && delivery.is_free());
            self.poller.wait(&mut events, at_once.then_some(std::time::Duration::ZERO));
            self.waker.get_up();
            for event in &events {
                match event.data.u64() {
                    WAKE => self.waker.drain(),
                    LISTENER => self.accept(),
                    bits => {
                        let key = Key::from_bits(bits);
                        lock(&self.mesh).flush(key);
                        if !ready.contains(&key) {
                            ready.push_back(key);
                        }
                    }
                }
            }
            self.take(&mut ready, &mut delivery, &mut buffer);
        }
    }

    /// Takes in machines that have joined.
    fn accept(&self) {
        // No more than can be: the rest waits for another event.
        for _ in 0..=MOST_PORTS {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            match accept_with(&self.listener, flags) {
                Ok(socket) => {
                    let own = rustix::process::geteuid();
                    if sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid == own) {
                        // Where it cannot be watched, the connection closes, and the other knows.
                        let _ = self.add(socket);
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(_) => return,
            }
        }
    }

    /// Takes messages and hands them to the card, as long as it takes them.
    fn take(&self, ready: &mut VecDeque<Key>, delivery: &mut Delivery, buffer: &mut [u8]) {
        let nic = lock(&self.nic);
        match nic.as_deref() {
            None => delivery.clear(),
            Some(nic) if !delivery.resume(nic) => return,
            Some(_) => {}
        }
        for _ in 0..ready.len() {
            let Some(key) = ready.pop_front() else { return };
            if self.take_from(key, nic.as_deref(), delivery, buffer) {
                ready.push_back(key);
            }
            if !delivery.is_free() {
                return;
            }
        }
    }

    /// Takes a machine's messages; answers whether there may be more.
    fn take_from(
        &self,
        key: Key,
        nic: Option<&dyn Nic>,
        delivery: &mut Delivery,
        buffer: &mut [u8],
    ) -> bool {
        let Some(socket) = lock(&self.mesh).socket(key) else { return false };
        for _ in 0..TURN {
            let length = match recv(&*socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((length @ 1.., _)) => length,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return false,
                // It has left, or its process has ended.
                Ok(_) | Err(_) => {
                    lock(&self.mesh).remove(key);
                    return false;
                }
            };
            let Some(packet) = message::parse(buffer.get(..length).unwrap_or_default()) else {
                continue;
            };
            let Some(ethernet) = Ethernet::parse(packet.frame) else { continue };
            lock(&self.mesh).learn(ethernet.source, key, Instant::now());
            if let Some(nic) = nic {
                delivery.deliver(packet, nic);
                if !delivery.is_free() {
                    return true;
                }
            }
        }
        true
    }
}
