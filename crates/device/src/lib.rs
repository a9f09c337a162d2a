//! The device contract.
//!
//! A [`Device`] says what it can do by optional capabilities ([`PioDevice`], [`MmioDevice`],
//! [`AlarmDevice`]) and always knows how to reset, save and restore itself. It reaches the rest
//! of the machine only through what it is given while it is wired: [`IrqLine`], [`MsiSink`],
//! [`Clock`], [`Alarm`], [`PowerSink`], [`GuestRam`], [`Doorbells`]. Each device wires itself
//! ([`Wire`]) with a [`MachineBuilder`]; [`Wiring`] is the builder that a real machine uses.
//! [`pci`] has what PCI functions have in common.
//!
//! # Locks
//! Each device has one lock, taken by the [`Bus`] or the alarm queue around each call. A device
//! calls its sinks with that lock held, so the order is: device, then interrupt line, then
//! interrupt controller, then engine; and device, then alarm queue. A sink never calls back into
//! a bus, and a device never takes the lock of another device except of one later in this order.
#![forbid(unsafe_code)]

pub mod bus;
mod doorbell;
pub mod interrupt;
mod memory;
pub mod pci;
pub mod power;
pub mod state;
pub mod testing;
pub mod time;
mod window;
pub mod wiring;

pub use bus::{Bus, MapError, Width};
pub use doorbell::{DoorbellGuard, Doorbells, NoDoorbells, Notify};
pub use interrupt::{Gsi, InterruptSink, IrqLine, Lines, MsiSink};
pub use memory::{GuestMemory, GuestRam, NotMemory, WriteObserver};
pub use power::{PowerEvent, PowerSink};
pub use state::{RestoreError, SavedState};
pub use time::{Alarm, AlarmQueue, Clock};
pub use window::{WeakDevice, Window, WindowMapping};
pub use wiring::{Connections, MachineBuilder, Wire, Wiring};

pub use arch::GuestPhysical;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device that vCPU threads and the I/O thread share, with its lock.
pub type Shared<D> = Arc<Mutex<D>>;
/// A shared device of any kind.
pub type SharedDevice = Shared<dyn Device>;

/// Puts a device behind its lock.
pub fn share<D>(device: D) -> Shared<D> {
    Arc::new(Mutex::new(device))
}

/// Takes a lock, also after a thread panicked while it held it: the guest-visible state of a
/// device is plain data, so the worst is a device in a state that the guest can reset.
pub fn lock<D: ?Sized>(mutex: &Mutex<D>) -> MutexGuard<'_, D> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device of the machine.
pub trait Device: Send {
    /// The name of this instance, unique in its machine: `pit`, `com1`.
    fn name(&self) -> &str;
    /// Access by ports, where the device has any.
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        None
    }
    /// Access by memory-mapped registers, where the device has any.
    fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        None
    }
    /// The receiver of alarms, where the device sets any.
    fn alarms(&mut self) -> Option<&mut dyn AlarmDevice> {
        None
    }
    /// The machine stands still from now on: vCPUs and clock do already. A device with threads or
    /// back ends of its own finishes what is under way; after this returns it touches neither
    /// guest memory nor interrupts. [`Device::save`] comes only then.
    fn pause(&mut self) {}
    /// The machine goes on, or begins to run: called before its vCPUs do.
    fn resume(&mut self) {}
    /// Brings the device to its state after power-up: outputs low, alarms cleared.
    fn reset(&mut self);
    /// The guest-visible state. A device without any returns [`SavedState::stateless`].
    fn save(&self) -> SavedState;
    /// Takes over a saved state, drives outputs and sets alarms accordingly.
    ///
    /// # Errors
    /// Names the field that is missing, unknown or out of range. The device must then be reset
    /// or dropped.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError>;
}

/// A device with ports.
pub trait PioDevice {
    /// IN of one byte.
    fn read_byte(&mut self, port: u16) -> u8;
    /// OUT of one byte.
    fn write_byte(&mut self, port: u16, value: u8);
    /// IN of 1, 2 or 4 bytes. An ISA device sees one byte at a time, lowest port first
    /// (as the ISA bus splits them); devices with wide registers replace this.
    fn read(&mut self, port: u16, width: Width) -> u32 {
        (0..width.bytes().min(4)).fold(0, |value, i| {
            value | u32::from(self.read_byte(port.wrapping_add(i as u16))) << (8 * i)
        })
    }
    /// OUT of 1, 2 or 4 bytes, as [`PioDevice::read`].
    fn write(&mut self, port: u16, width: Width, value: u32) {
        for i in 0..width.bytes().min(4) {
            self.write_byte(port.wrapping_add(i as u16), (value >> (8 * i)) as u8);
        }
    }
}

/// A device with memory-mapped registers. Accesses are naturally sized (1, 2, 4 or 8 bytes) and
/// lie within one mapped range; they need not be aligned.
pub trait MmioDevice {
    /// Reads registers; bits above `width` are ignored.
    fn read(&mut self, address: GuestPhysical, width: Width) -> u64;
    /// Writes registers; bits of `value` above `width` are zero.
    fn write(&mut self, address: GuestPhysical, width: Width, value: u64);
}

/// A device that asks for wake-ups.
pub trait AlarmDevice {
    /// An alarm of this device may be due. `now` is the clock's time. The deadline is cleared
    /// before this call; a call may come although the deadline has just been moved, so the
    /// device compares `now` with its own state and sets the alarm again if it needs more.
    fn on_alarm(&mut self, now: std::time::Duration);
}
