//! Requests of devices about the power of the whole machine.

/// What a device asks the machine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Switch off (ACPI S5).
    PowerOff,
    /// Reset all vCPUs and devices.
    Reset,
    /// End the machine with a status: the byte that the guest wrote to the debug-exit port.
    DebugExit(u8),
}

/// The receiver of [`PowerEvent`]s. Called on a vCPU thread with the device's lock held: it
/// notes the request and returns.
pub trait PowerSink: Send + Sync {
    /// Notes the request.
    fn request(&self, event: PowerEvent);
}
