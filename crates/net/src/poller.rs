//! Watching sockets.
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Watches sockets, edge-triggered: each change is reported once. A socket that is closed is no
/// longer watched.
#[derive(Debug)]
pub(crate) struct Poller(OwnedFd);

impl Poller {
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Watches a socket; `token` comes back with its events.
    pub fn watch(&self, socket: &impl AsFd, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.0, socket, EventData::new_u64(token), flags | EventFlags::ET)?)
    }

    /// Waits for events, as many as `events` has capacity for.
    pub fn wait(&self, events: &mut Vec<epoll::Event>, most: Option<Duration>) {
        let timeout = most.and_then(|most| Timespec::try_from(most).ok());
        events.clear();
        // An interrupted wait has no events and is as good as one that ended.
        let _ = epoll::wait(&self.0, spare_capacity(events), timeout.as_ref());
    }
}
