//! The NAT's thread, and what it shares with those that call the NAT.
//!
//! The core has one lock. The thread holds it while it handles events and reads sockets; who
//! transmits takes it only if it is free, and otherwise leaves the frame in the inbox, so that no
//! caller waits. Frames go to the card from this thread only. The lock of the card is taken before
//! the core's. Where frames were built whole, the core's lock is not held while the card takes them.
use super::core::Core;
use super::host::Token;
use crate::poller::Poller;
use crate::waker::Waker;
use crate::{Nic, Offload, Packet};
use rustix::event::epoll;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Bytes of frames that wait for the core. Beyond it frames are lost, as in any router.
const INBOX: usize = 32 << 20;
/// Events taken from the poller at once.
const EVENTS: usize = 256;
/// Turns of connections between two looks at what else came.
const TURNS: usize = 4;

/// A frame that waits for the core.
type Waiting = (Vec<u8>, Offload);

#[derive(Debug, Default)]
struct Inbox {
    frames: VecDeque<Waiting>,
    bytes: usize,
}

/// What the thread and the callers share.
pub(crate) struct Shared {
    core: Mutex<Core>,
    inbox: Mutex<Inbox>,
    nic: Mutex<Option<Arc<dyn Nic>>>,
    poller: Arc<Poller>,
    waker: Waker,
    room: AtomicBool,
    stop: AtomicBool,
    /// The deadline that the thread sleeps until.
    until: Mutex<Option<Instant>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new(core: Core, poller: Arc<Poller>, waker: Waker) -> Self {
        Self {
            core: Mutex::new(core),
            inbox: Mutex::default(),
            nic: Mutex::new(None),
            poller,
            waker,
            room: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            until: Mutex::new(None),
        }
    }

    pub fn census(&self) -> (usize, usize) {
        lock(&self.core).census()
    }

    /// Replaces the card.
    pub fn plug(&self, nic: Option<Arc<dyn Nic>>) {
        let unplugged = nic.is_none();
        // The old card is dropped without a lock, as that may lead back here.
        let before = std::mem::replace(&mut *lock(&self.nic), nic);
        if unplugged {
            lock(&self.core).unplugged();
        }
        drop(before);
        self.room();
    }

    /// A frame from the guest.
    pub fn transmit(&self, packet: Packet<'_>) {
        let mut core = match self.core.try_lock() {
            Ok(core) => core,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let mut inbox = lock(&self.inbox);
                if inbox.bytes + packet.frame.len() <= INBOX {
                    inbox.bytes += packet.frame.len();
                    inbox.frames.push_back((packet.frame.to_vec(), packet.offload));
                }
                drop(inbox);
                self.waker.wake();
                return;
            }
        };
        let now = Instant::now();
        self.drain_inbox(&mut core, now);
        core.guest_frame(&packet, now);
        let sooner = match (core.deadline(), *lock(&self.until)) {
            (Some(deadline), Some(until)) => deadline < until,
            (deadline, None) => deadline.is_some(),
            (None, _) => false,
        };
        let work = sooner || core.has_work();
        drop(core);
        if work {
            self.waker.wake();
        }
    }

    /// The card takes frames again.
    pub fn room(&self) {
        self.room.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Hands over what callers left. The inbox is not locked meanwhile.
    fn drain_inbox(&self, core: &mut Core, now: Instant) {
        let mut inbox = lock(&self.inbox);
        if inbox.frames.is_empty() {
            return;
        }
        inbox.bytes = 0;
        let frames = std::mem::take(&mut inbox.frames);
        drop(inbox);
        for (frame, offload) in frames {
            core.guest_frame(&Packet { frame: &frame, offload }, now);
        }
    }

    /// The thread.
    pub fn run(&self) {
        let mut events = Vec::with_capacity(EVENTS);
        let mut refused = false;
        while !self.stop.load(Ordering::SeqCst) {
            self.sleep(&mut events);
            if self.room.swap(false, Ordering::SeqCst) {
                refused = false;
            }
            let now = Instant::now();
            let mut core = lock(&self.core);
            self.drain_inbox(&mut core, now);
            for event in &events {
                let (token, flags) = (Token::from_bits(event.data.u64()), event.flags);
                match token {
                    Token::Wake => self.waker.drain(),
                    token => core.host_event(token, flags, now),
                }
            }
            core.tick(now);
            drop(core);
            while !refused && self.deliver(&mut refused) {}
        }
    }

    /// Waits until something happens, a deadline passes or a caller has something.
    fn sleep(&self, events: &mut Vec<epoll::Event>) {
        let deadline = lock(&self.core).deadline();
        *lock(&self.until) = deadline;
        let at_once = self.waker.lie_down();
        let wait = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let wait = if at_once { Some(Duration::ZERO) } else { wait };
        self.poller.wait(events, wait);
        self.waker.get_up();
    }

    /// Hands the card what there is for it; answers whether there is more.
    fn deliver(&self, refused: &mut bool) -> bool {
        let now = Instant::now();
        let nic = lock(&self.nic);
        let mut core = lock(&self.core);
        self.drain_inbox(&mut core, now);
        let Some(nic) = nic.as_deref() else {
            core.unplugged();
            return false;
        };
        *refused = !core.turns(nic, TURNS, now);
        let mut outbox = core.take_outbox();
        drop(core);
        let plain = |frame: &[u8]| nic.receive(Packet { frame, offload: Offload::default() });
        let all = outbox.drain(plain);
        *refused |= !all;
        let mut core = lock(&self.core);
        core.put_back(outbox);
        !*refused && core.has_work()
    }
}
