//! Networks of virtual machines, without root.
//!
//! A guest's network card (a [`Nic`]) is plugged into a [`Network`], and both hand each other
//! [`Packet`]s: Ethernet frames that may be larger than the wire would carry, with what remains to
//! be done on them ([`Offload`]). Guests are hostile: whatever a frame says is checked here.
//!
//! [`nat`] is the ordinary network of a machine, [`switch`] one among the machines of a user, and
//! [`tap`] leads to whatever the host has connected a tap device to. [`NetworkChoice`] and
//! [`HostForward`] are what a user writes.

mod choice;
mod delivery;
mod forward;
pub mod nat;
mod offload;
mod poller;
pub mod switch;
mod table;
pub mod tap;
mod waker;
mod wire;

pub use choice::{ChoiceError, NetworkChoice, SwitchName, TapName};
pub use forward::{ForwardError, HostForward, Protocol};

use std::sync::Arc;

/// A frame on its way.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// The Ethernet frame from its destination address on, without FCS.
    pub frame: &'a [u8],
    /// What remains to be done on it.
    pub offload: Offload,
}

/// What the sender left to the receiver, as in the header of virtio-net (virtio 1.2 §5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// A checksum that is not complete: its field holds the sum of the pseudo-header only.
    pub checksum: Option<Checksum>,
    /// The frame holds more than one segment's data.
    pub segmentation: Option<Segmentation>,
}

/// A checksum to be completed: the Internet checksum of everything from `start` on, stored at
/// `start + offset`; both count from the frame's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Where the sum begins.
    pub start: u16,
    /// Where it goes, from `start`.
    pub offset: u16,
}

/// How to cut a large frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// The protocol.
    pub kind: SegmentKind,
    /// Most bytes of payload in a segment, not zero.
    pub size: u16,
    /// Bytes of headers before the payload, a hint.
    pub header: u16,
}

/// Which protocol a large frame is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP, either IP.
    Udp,
}

/// What a card can take beside plain frames of its MTU with complete checksums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepts {
    /// Frames whose checksum is not complete.
    pub checksum: bool,
    /// Large TCP frames over IPv4.
    pub tcp4: bool,
    /// Large TCP frames over IPv6.
    pub tcp6: bool,
}

/// What a card is plugged into.
pub trait Network: Send + Sync {
    /// Plugs a card in, in place of one that was there; packets for it may arrive from now on, from
    /// any thread. `None` pulls it out: after this returns, no packet comes. It waits for packets
    /// on their way to the card, so the caller holds no lock that [`Nic::receive`] takes.
    fn plug(&self, nic: Option<Arc<dyn Nic>>);

    /// A packet from the guest. It may be of any length and content. The call does not wait for
    /// the network and does not call the card; what cannot be sent on is dropped, as a wire would.
    fn transmit(&self, packet: Packet<'_>);

    /// The card has room for packets again, after it had refused one. The call does not call the
    /// card.
    fn room(&self);
}

/// A guest's network card, as its network sees it.
pub trait Nic: Send + Sync {
    /// What it can take at present; asked anew when packets are made.
    fn accepts(&self) -> Accepts;

    /// A packet for the guest, on a thread of the network. `false` says that there is no room now: it was not taken, and
    /// [`Network::room`] will be called when there is.
    fn receive(&self, packet: Packet<'_>) -> bool;
}
