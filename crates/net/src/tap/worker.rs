//! The thread of a tap device: hands its frames to the card.
use super::{header, ioctl};
use crate::delivery::Delivery;
use crate::offload::{LARGEST_FRAME, is_sound};
use crate::poller::Poller;
use crate::waker::Waker;
use crate::{Accepts, Nic, Packet};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const WAKE: u64 = 0;
const TAP: u64 = 1;
/// Frames between two looks at what else there is to do.
const TURN: usize = 64;
const TUN_F_CSUM: usize = 1;
const TUN_F_TSO4: usize = 2;
const TUN_F_TSO6: usize = 4;

/// What the thread and the callers share.
pub(super) struct Shared {
    file: OwnedFd,
    nic: Mutex<Option<Arc<dyn Nic>>>,
    poller: Poller,
    waker: Waker,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        let shared = Self {
            file,
            nic: Mutex::new(None),
            poller: Poller::new()?,
            waker: Waker::new()?,
            stop: AtomicBool::new(false),
        };
        shared.poller.watch(&shared.waker, WAKE, EventFlags::IN)?;
        shared.poller.watch(&shared.file, TAP, EventFlags::IN)?;
        Ok(shared)
    }

    pub fn plug(&self, nic: Option<Arc<dyn Nic>>) {
        let before = std::mem::replace(&mut *lock(&self.nic), nic);
        // Dropped without a lock, as that may lead back here.
        drop(before);
        self.waker.wake();
    }

    pub fn transmit(&self, packet: &Packet<'_>) {
        if !is_sound(packet) {
            return;
        }
        let header = header::write(&packet.offload);
        let parts = [IoSlice::new(&header), IoSlice::new(packet.frame)];
        // What the device does not take, being down or full, is lost as on any wire.
        while let Err(Errno::INTR) = rustix::io::writev(&self.file, &parts) {}
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
        let mut events = Vec::with_capacity(2);
        let mut buffer = vec![0; header::SIZE + LARGEST_FRAME];
        let mut delivery = Delivery::default();
        let mut told = None;
        let mut readable = false;
        while !self.stop.load(Ordering::SeqCst) {
            let at_once = self.waker.lie_down() || (readable && delivery.is_free());
            self.poller.wait(&mut events, at_once.then_some(std::time::Duration::ZERO));
            self.waker.get_up();
            for event in &events {
                match event.data.u64() {
                    WAKE => self.waker.drain(),
                    _ => readable = true,
                }
            }
            let nic = lock(&self.nic);
            match nic.as_deref() {
                None => delivery.clear(),
                Some(nic) => {
                    let accepts = nic.accepts();
                    if told != Some(accepts) {
                        self.tell(accepts);
                        told = Some(accepts);
                    }
                    if !delivery.resume(nic) {
                        continue;
                    }
                }
            }
            if readable {
                readable = self.take(nic.as_deref(), &mut delivery, &mut buffer);
            }
        }
    }

    /// Tells the device what the card takes.
    fn tell(&self, accepts: Accepts) {
        let mut flags = 0;
        if accepts.checksum {
            flags |= TUN_F_CSUM;
            flags |= if accepts.tcp4 { TUN_F_TSO4 } else { 0 };
            flags |= if accepts.tcp6 { TUN_F_TSO6 } else { 0 };
        }
        // A device that knows less sends less; what it sends too much is done here.
        let _ = ioctl::set_offload(&self.file, flags);
    }

    /// Takes frames as long as the card does; answers whether there may be more.
    fn take(&self, nic: Option<&dyn Nic>, delivery: &mut Delivery, buffer: &mut [u8]) -> bool {
        for _ in 0..TURN {
            let length = match rustix::io::read(&self.file, &mut *buffer) {
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                // Nothing, or the device is down or gone; a change is reported.
                Err(_) => return false,
            };
            let message = buffer.get(..length).unwrap_or_default();
            let Some((header, frame)) = message.split_first_chunk() else { continue };
            let Some(offload) = header::read(header) else { continue };
            if let Some(nic) = nic {
                delivery.deliver(Packet { frame, offload }, nic);
                if !delivery.is_free() {
                    return true;
                }
            }
        }
        true
    }
}
