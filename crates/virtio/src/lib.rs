//! virtio devices, as "Virtual I/O Device (VIRTIO) Version 1.2" describes them.
//!
//! A [`VirtioDevice`] is what makes a disk differ from a network card; [`pci`] puts any of them
//! into a slot of the PCI bus, with the registers that all have in common. Start reading with the
//! trait here, then [`queue`] and [`chain`], through which a device meets its guest.
//!
//! # The guest is the adversary
//! A [`Queue`] gives out [`Chain`]s that are checked: each buffer lies in guest memory, and the
//! whole is no longer than it may be. A driver that breaks the rules of the ring fails its device
//! ([`Transport::fail`], DEVICE_NEEDS_RESET, §2.1.2); one that breaks the rules of a request fails
//! that request. What a device reads from a chain it copies once and then looks at its own copy.
//!
//! # Threads and locks
//! A device serves its queues where it likes: on the vCPU's thread that rings a doorbell, where
//! the work is short, on a [`worker::Worker`], or on threads of its back end. The order of locks
//! is: the function's registers, a device's own, a queue's, interrupts. A notifier
//! ([`VirtioDevice::activate`]) may be called with the registers locked, so neither it nor what it
//! waits for calls back into them; [`Transport`]'s methods do not.

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
mod discard;
pub mod fs;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod testing;
pub mod vsock;
pub mod worker;

pub use chain::Chain;
pub use queue::{Queue, QueueError};

use device::state::Reader;
use device::{GuestRam, Notify, RestoreError, SavedState};
use std::io;
use std::sync::Arc;

/// Feature bits of the queues and the transport (§6). A device's own bits are 0 to 23 and 50 to
/// 127, of which none above 63 is in use.
pub mod feature {
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device follows version 1 of the standard.
    pub const VERSION_1: u64 = 1 << 32;
    /// What the transport offers for every device.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// What kind of device it is (§5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceKind {
    /// A network card.
    Net = 1,
    /// A disk.
    Block = 2,
    /// Serial ports.
    Console = 3,
    /// A source of entropy.
    Entropy = 4,
    /// Gives memory back to the host.
    Balloon = 5,
    /// Sockets between host and guest.
    Vsock = 19,
    /// A folder of the host.
    FileSystem = 26,
}

impl DeviceKind {
    /// The device type of §5.
    pub const fn id(self) -> u16 {
        self as u16
    }

    /// The kind's name in saved states and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Net => "virtio-net",
            Self::Block => "virtio-blk",
            Self::Console => "virtio-console",
            Self::Entropy => "virtio-rng",
            Self::Balloon => "virtio-balloon",
            Self::Vsock => "virtio-vsock",
            Self::FileSystem => "virtio-fs",
        }
    }

    /// The PCI class: class, subclass and interface in 24 bits (PCI Code and ID Assignment 1.11).
    pub const fn class(self) -> u32 {
        match self {
            Self::Net => 0x02_0000,
            Self::Block => 0x01_8000,
            Self::Console => 0x07_8000,
            Self::Entropy | Self::Balloon | Self::Vsock => 0xff_0000,
            Self::FileSystem => 0x01_8000,
        }
    }
}

/// What a device is given when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub ram: GuestRam,
    /// The features that device and driver agreed on, those of [`feature`] included.
    pub features: u64,
    /// The queues, by number; `None` where the driver did not enable one.
    pub queues: Vec<Option<Queue>>,
    /// The way back to the driver.
    pub transport: Arc<dyn Transport>,
}

impl Activation {
    /// Whether all of these features were agreed on.
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }
}

/// What a device can tell its driver. All methods are callable from any thread, with the device's
/// own locks held.
pub trait Transport: Send + Sync {
    /// Buffers of a queue were used. Called by [`Queue`], when the driver wants to hear it.
    fn queue_used(&self, queue: u16);

    /// The configuration space changed (§2.5): call it after the change.
    fn config_changed(&self);

    /// The driver broke the rules: the device needs to be reset (§2.1.2).
    fn fail(&self);
}

/// Why a device cannot begin its work; the driver sees that it needs to be reset.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver did not enable what the device cannot do without.
    #[error("the driver enabled no queue {0}")]
    Queue(u16),
    /// The host is out of something.
    #[error("the host does not give {what}")]
    Host {
        /// What.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// A virtio device without its transport.
///
/// Its life, as the transport drives it: made; [`activate`](Self::activate) once the driver is
/// ready; [`deactivate`](Self::deactivate) when the driver resets it, or the machine pauses, which
/// activates it again with the same queues when it goes on. [`reset`](Self::reset),
/// [`save`](Self::save) and [`restore`](Self::restore) come only while it is not active.
/// Reads and writes of the configuration space come at any time.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// The features that it offers beside [`feature::TRANSPORT`]. They do not change.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two up to 32768. They do not change.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads the configuration space (§2.5); bytes past its end read as zero. [`read_bytes`] does
    /// that for a space that is an array.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);

    /// Writes the configuration space. The device takes what it has agreed to let the driver write.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Begins to serve the queues: buffers may be there already, so look. Answers for each queue
    /// what to tell when the driver notifies it; `None` where the device never needs to hear.
    ///
    /// # Errors
    /// The driver's set-up cannot work, or the host is out of something.
    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError>;

    /// Ends all work: after this returns no thread of the device's touches a queue or guest
    /// memory. The queues give out no chains any more when this is called; what was taken from
    /// them is finished, or is part of the state.
    fn deactivate(&mut self);

    /// Brings what the guest can see to the state after power-up.
    fn reset(&mut self);

    /// Adds the device's own guest-visible state, without queues and features, to `state`. Names
    /// of fields begin with the device's.
    fn save(&self, state: &mut SavedState);

    /// Takes it back.
    ///
    /// # Errors
    /// Names the field that is missing or out of range.
    fn restore(&mut self, state: &mut Reader<'_>) -> Result<(), RestoreError>;
}

/// Reads from a configuration space that is an array of bytes.
pub fn read_bytes(space: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    let there = space.get(offset..).unwrap_or_default();
    data.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
}
