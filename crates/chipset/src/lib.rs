//! The PC: interrupt controllers, timers, serial ports, power and the PCI root.
//!
//! One file a device, each in the order registers, configuration and state, behaviour, saved
//! state, tests. [`layout`] holds all fixed ports, addresses and interrupt lines.
#![forbid(unsafe_code)]

pub mod ioapic;
pub mod layout;
pub mod pic;
pub mod router;

pub use router::InterruptRouter;
pub mod acpi_pm;
mod calendar;
pub mod debug_exit;
pub mod hpet;
pub mod i8042;
pub mod legacy_route;
pub mod pci;
pub mod pit;
mod reset_control;
pub mod rtc;
pub mod uart;
