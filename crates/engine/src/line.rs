//! Interrupt lines of devices.
use crate::{EngineError, Msi};
use std::os::fd::OwnedFd;

/// One message-signalled interrupt of a device, such as an MSI-X vector: a device thread triggers
/// it without knowing the engine, and the guest may reprogram it at any time. Masking and the
/// pending bit belong to the device (PCI 3.0 §6.8.2): it does not trigger while masked.
///
/// All methods are callable from any thread. The line ends when the last reference is dropped.
pub trait MsiLine: Send + Sync {
    /// Sets the message of all later triggers; with `None`, as at first, triggers are lost.
    ///
    /// # Errors
    /// Fails where the host does not take a new route for the line's event.
    fn program(&self, message: Option<Msi>) -> Result<(), EngineError>;

    /// Sends the message. From within the process there is nothing faster, whether or not the
    /// line has an event.
    fn trigger(&self);

    /// An event that triggers the line when it is signalled (on Linux an eventfd to which one is
    /// added): for the kernel and for other processes, which have no other way to trigger it. All
    /// events of a line are the same one. Signals may take effect later than triggers do: with the
    /// message of then, if it changes meanwhile. `None` where the engine has no such thing: the machine
    /// then waits for an event of its own, and triggers.
    ///
    /// # Errors
    /// Fails where the host is out of events or routes.
    fn event(&self) -> Result<Option<OwnedFd>, EngineError>;
}
