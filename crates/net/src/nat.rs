//! User-mode NAT: a guest's network in the machine's own process, without root.
//!
//! The guest sees a link with a gateway on it, which is its router, DHCP and DNS server. Whatever
//! it sends beyond goes on through ordinary sockets of the host, as from any program of the same
//! user. The addresses are those of QEMU's user networking: gateway 10.0.2.2, DNS 10.0.2.3, the
//! guest 10.0.2.15; and an IPv6 prefix by router advertisements ([`NatConfig`]).
//!
//! **What the guest reaches.** Everything that the host reaches, and by default the host itself: a
//! service that listens only on the host's loopback is reached at the gateway's address, as QEMU's
//! users expect. [`HostAccess::Denied`] closes that and every other address of the host. Link-local
//! addresses are never reached, among them the metadata services of clouds.
//!
//! **Who reaches the guest.** Who is answered by it, and who comes through a port forward
//! ([`HostForward`]). A forward leads to the guest's IPv4 address; the guest sees the client's
//! address, or the gateway's where the client is the host itself or uses IPv6.
//!
//! **Limits.** 4096 TCP connections and 1024 sockets of datagrams, or six and two tenths of the
//! files that the process may open where that is less; 64 MiB of data in each direction that one
//! side has sent and the other has not taken. Beyond that the guest is refused or has to send
//! again. Guests and peers are hostile: what is not understood is dropped.
//!
//! `core` is the way of a frame, `worker` who runs when; `tcp` is the largest room.

mod config;
mod core;
mod datagrams;
mod dhcp;
mod dns;
mod host;
mod neighbors;
mod outbox;
mod reassembly;
mod tcp;
#[cfg(test)]
mod tests;
mod udp_forward;
mod worker;

pub use config::{HostAccess, NatConfig};

use crate::forward::{HostForward, Protocol};
use crate::poller::Poller;
use crate::waker::Waker;
use crate::{Network, Nic, Packet};
use config::Layout;
use core::{Core, Listener};
use host::Token;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use udp_forward::UdpForward;
use worker::Shared;

/// Why a NAT cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum NatError {
    /// The guest's IPv4 network is none.
    #[error("{0} is no network for a guest; use the first address of a /24, such as 10.0.2.0")]
    Ipv4Network(Ipv4Addr),
    /// The guest's IPv6 prefix is none.
    #[error("{0} is no prefix for a guest; use one of 64 bits, such as fd00:1:2:3::")]
    Ipv6Prefix(Ipv6Addr),
    /// DHCP cannot tell such a name.
    #[error("{0:?} is no host name; use 1 to 63 letters, digits and hyphens, no hyphen at an end")]
    Hostname(String),
    /// The host's port is taken.
    #[error(
        "port {} of {} is in use, so {forward} cannot be forwarded; choose another port, or end \
         what listens there (`ss -lnp` shows it)",
        forward.bind.port(), forward.bind.ip()
    )]
    PortInUse {
        /// The forward.
        forward: HostForward,
    },
    /// The host's port is for root.
    #[error(
        "port {} is for root only, so {forward} cannot be forwarded; choose one from 1024 on, or \
         have root allow it: sysctl net.ipv4.ip_unprivileged_port_start={}",
        forward.bind.port(), forward.bind.port()
    )]
    PortForRoot {
        /// The forward.
        forward: HostForward,
    },
    /// The address is not one of the host's.
    #[error(
        "{} is no address of this host, so {forward} cannot be forwarded; use one that `ip addr` \
         lists, or 0.0.0.0 for all",
        forward.bind.ip()
    )]
    NoSuchAddress {
        /// The forward.
        forward: HostForward,
    },
    /// The host cannot listen there for another reason.
    #[error("cannot listen for {forward}")]
    Listen {
        /// The forward.
        forward: HostForward,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The host gives no further thread or file descriptor.
    #[error("cannot {action}")]
    Host {
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A NAT, with a thread of its own until it is dropped.
///
/// A card that is plugged in is held; it is to be pulled out ([`Network::plug`]) before a NAT that
/// it holds in turn can be dropped.
pub struct Nat {
    shared: Arc<Shared>,
    forwards: Vec<HostForward>,
    thread: Option<JoinHandle<()>>,
}

impl Nat {
    /// Sets up a NAT, listens at the forwarded ports and starts the thread.
    ///
    /// # Errors
    /// The configuration is not possible, a port cannot be had, or the host gives no further
    /// thread or file descriptor.
    pub fn new(config: &NatConfig) -> Result<Self, NatError> {
        let layout = Layout::new(config)?;
        if let Some(name) = config.hostname.as_ref().filter(|name| !config::is_hostname(name)) {
            return Err(NatError::Hostname(name.clone()));
        }
        let poller =
            Poller::new().map_err(|source| NatError::Host { action: "watch sockets", source })?;
        let poller = Arc::new(poller);
        let (mut forwards, mut listeners, mut udp_forwards) = (vec![], vec![], vec![]);
        for forward in &config.forwards {
            let (socket, forward) = listen(forward)?;
            let guest_port = forward.guest_port.get();
            let token = match forward.protocol {
                Protocol::Tcp => Token::Listener(listeners.len() as u32),
                Protocol::Udp => Token::UdpForward(udp_forwards.len() as u32),
            };
            poller
                .watch(&socket, token.to_bits(), EventFlags::IN)
                .map_err(|source| NatError::Listen { forward, source })?;
            match forward.protocol {
                Protocol::Tcp => listeners.push(Listener { socket, guest_port, waiting: false }),
                Protocol::Udp => udp_forwards.push(UdpForward::new(socket, guest_port)),
            }
            forwards.push(forward);
        }
        let now = Instant::now();
        let core = Core::new(layout, config, Arc::clone(&poller), listeners, udp_forwards, now);
        Self::start(core, poller, forwards)
    }

    fn start(
        core: Core,
        poller: Arc<Poller>,
        forwards: Vec<HostForward>,
    ) -> Result<Self, NatError> {
        let host = |action| move |source| NatError::Host { action, source };
        let waker = Waker::new().map_err(host("make an event"))?;
        poller
            .watch(&waker, Token::Wake.to_bits(), EventFlags::IN)
            .map_err(host("watch an event"))?;
        let shared = Arc::new(Shared::new(core, poller, waker));
        let run = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("nat".to_owned())
            .spawn(move || run.run())
            .map_err(host("start a thread"))?;
        Ok(Self { shared, forwards, thread: Some(thread) })
    }

    /// The forwards in the configuration's order, with the ports that the host chose for 0.
    #[must_use]
    pub fn forwards(&self) -> &[HostForward] {
        &self.forwards
    }

    /// How many TCP connections there are, and how many sockets of datagrams.
    #[must_use]
    pub fn census(&self) -> (usize, usize) {
        self.shared.census()
    }
}

/// Binds a forward's port; answers with the port that it came to be.
fn listen(forward: &HostForward) -> Result<(OwnedFd, HostForward), NatError> {
    let forward = *forward;
    let socket = match forward.protocol {
        Protocol::Tcp => host::listen(forward.bind),
        Protocol::Udp => host::bind_datagrams(forward.bind),
    };
    let bound = socket.and_then(|socket| Ok((host::local_address(&socket)?, socket)));
    match bound {
        Ok((bind, socket)) => Ok((socket, HostForward { bind, ..forward })),
        Err(Errno::ADDRINUSE) => Err(NatError::PortInUse { forward }),
        Err(Errno::ACCESS | Errno::PERM) => Err(NatError::PortForRoot { forward }),
        Err(Errno::ADDRNOTAVAIL) => Err(NatError::NoSuchAddress { forward }),
        Err(error) => Err(NatError::Listen { forward, source: error.into() }),
    }
}

impl Network for Nat {
    fn plug(&self, nic: Option<Arc<dyn Nic>>) {
        self.shared.plug(nic);
    }

    fn transmit(&self, packet: Packet<'_>) {
        self.shared.transmit(packet);
    }

    fn room(&self) {
        self.shared.room();
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}
