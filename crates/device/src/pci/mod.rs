//! What devices need to be PCI functions: slots, configuration space, MSI-X.
//!
//! The root of the bus, with the ways to reach configuration space, is a device of the chipset.
mod config;
mod msix;

pub use config::{ConfigSpace, capability, command, header};
pub use msix::{Msix, control as msix_control};

use crate::{Shared, Window};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

/// Devices on a bus.
const DEVICES: u8 = 32;

/// Where a function is on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciSlot(u8);

impl PciSlot {
    /// The slot of a device (0 to 31) and function (0 to 7); `None` out of these ranges.
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < DEVICES && function < 8 { Some(Self(device << 3 | function)) } else { None }
    }
    /// The slot that a configuration address names.
    pub const fn from_address(device_and_function: u8) -> Self {
        Self(device_and_function)
    }
    /// Device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }
    /// Function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

impl fmt::Display for PciSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device(), self.function())
    }
}

/// Why a device cannot be plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlugError {
    /// The slot is not empty.
    #[error("PCI slot {0} is taken; choose another")]
    Taken(PciSlot),
    /// No slot is empty.
    #[error("all {DEVICES} slots of the PCI bus are taken; use fewer disks and network cards")]
    Full,
}

/// A function on the bus. Called with the PCI root's lock held, on a vCPU thread.
pub trait PciDevice: Send {
    /// Reads a dword of configuration space. `offset` is a multiple of 4 below 4096.
    fn read_config(&mut self, offset: u16) -> u32;
    /// Writes the bits of `mask` to a dword of configuration space.
    fn write_config(&mut self, offset: u16, value: u32, mask: u32);
}

/// Bus 0: which function is in which slot, and the window in which functions decode addresses.
/// Functions may come and go while the machine runs.
#[derive(Default)]
pub struct PciBus {
    slots: RwLock<BTreeMap<PciSlot, Shared<dyn PciDevice>>>,
    window: Arc<Window>,
}

impl PciBus {
    /// Where functions decode their base addresses.
    pub fn window(&self) -> &Arc<Window> {
        &self.window
    }

    /// Plugs a function into a slot.
    ///
    /// # Errors
    /// The slot is taken.
    pub fn plug(&self, slot: PciSlot, device: Shared<dyn PciDevice>) -> Result<(), PlugError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if slots.contains_key(&slot) {
            return Err(PlugError::Taken(slot));
        }
        slots.insert(slot, device);
        Ok(())
    }

    /// Plugs a device's only function into the first free slot, and says which that is.
    ///
    /// # Errors
    /// No slot is free.
    pub fn plug_anywhere(&self, device: Shared<dyn PciDevice>) -> Result<PciSlot, PlugError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let free = |number: &u8| !slots.keys().any(|slot| slot.device() == *number);
        let number = (0..DEVICES).find(free).ok_or(PlugError::Full)?;
        let slot = PciSlot(number << 3);
        slots.insert(slot, device);
        Ok(slot)
    }

    /// The function in a slot.
    pub fn function(&self, slot: PciSlot) -> Option<Shared<dyn PciDevice>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(&slot).cloned()
    }

    /// Whether the device in a slot has functions beside its first.
    pub fn has_more_functions(&self, slot: PciSlot) -> bool {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let others = PciSlot(slot.0 & !7 | 1)..=PciSlot(slot.0 | 7);
        slots.range(others).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share;

    struct Nothing;
    impl PciDevice for Nothing {
        fn read_config(&mut self, _: u16) -> u32 {
            0
        }
        fn write_config(&mut self, _: u16, _: u32, _: u32) {}
    }

    #[test]
    fn devices_get_the_first_free_slot_until_there_is_none() {
        let bus = PciBus::default();
        let third = PciSlot::new(2, 1).unwrap();
        bus.plug(third, share(Nothing)).unwrap();
        assert_eq!(bus.plug(third, share(Nothing)), Err(PlugError::Taken(third)));
        let slots: Vec<_> =
            (0..31).map(|_| bus.plug_anywhere(share(Nothing)).unwrap().device()).collect();
        assert_eq!((slots[0], slots[1], slots[2], slots[30]), (0, 1, 3, 31));
        assert_eq!(bus.plug_anywhere(share(Nothing)), Err(PlugError::Full));
        assert!(bus.has_more_functions(PciSlot::new(2, 0).unwrap()));
        assert!(!bus.has_more_functions(PciSlot::new(3, 0).unwrap()));
        assert_eq!(PciSlot::new(32, 0), None);
    }
}
