//! A range of guest-physical addresses within which devices come and go while the machine runs.
use crate::{Device, SharedDevice, lock};
use arch::GuestPhysical;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

/// What a [`Window`] holds of a device: not the device itself, which may hold the window.
pub type WeakDevice = Weak<Mutex<dyn Device>>;

/// Devices by address, where a guest can move them: the window in which PCI devices decode.
/// [`crate::MachineBuilder::map_window`] says where it is.
///
/// Its lock is held only while the map is searched or changed, and no other lock is taken then.
#[derive(Default)]
pub struct Window(RwLock<Vec<Mapping>>);

struct Mapping {
    start: u64,
    /// Inclusive.
    end: u64,
    device: WeakDevice,
}

impl Window {
    /// Gives addresses to a device. Where ranges overlap, which no guest should do, the one that
    /// was there first has the address.
    pub fn map(&self, start: GuestPhysical, length: u64, device: &WeakDevice) {
        let end = start.0.saturating_add(length.saturating_sub(1));
        let mut mappings = self.0.write().unwrap_or_else(PoisonError::into_inner);
        mappings.push(Mapping { start: start.0, end, device: device.clone() });
    }

    /// Takes back what a device was given from `start` on.
    pub fn unmap(&self, start: GuestPhysical, device: &WeakDevice) {
        let mut mappings = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let mine = |m: &Mapping| m.start == start.0 && Weak::ptr_eq(&m.device, device);
        mappings.retain(|mapping| !mine(mapping));
    }

    /// The device at `address`, and how many of the `length` bytes from there on are its own, or
    /// nobody's.
    pub(crate) fn find(&self, address: u64, length: usize) -> (Option<SharedDevice>, usize) {
        let mappings = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let fit = |bytes: u64| usize::try_from(bytes).map_or(length, |bytes| bytes.min(length));
        if let Some(found) = mappings.iter().find(|m| (m.start..=m.end).contains(&address)) {
            return (found.device.upgrade(), fit((found.end - address).saturating_add(1)));
        }
        let next = mappings.iter().map(|m| m.start).filter(|start| *start > address).min();
        (None, next.map_or(length, |next| fit(next - address)))
    }
}

/// The addresses that a device has in a window at present: gives them back when it is dropped.
pub struct WindowMapping {
    window: Arc<Window>,
    device: WeakDevice,
    length: u64,
    at: Option<GuestPhysical>,
}

impl WindowMapping {
    /// No addresses yet, of `length` bytes, for a device.
    pub fn new(window: Arc<Window>, device: WeakDevice, length: u64) -> Self {
        Self { window, device, length, at: None }
    }

    /// Where it is.
    pub fn at(&self) -> Option<GuestPhysical> {
        self.at
    }

    /// Moves it; answers whether that was a change.
    pub fn set(&mut self, at: Option<GuestPhysical>) -> bool {
        if self.at == at {
            return false;
        }
        if let Some(old) = self.at {
            self.window.unmap(old, &self.device);
        }
        if let Some(new) = at {
            self.window.map(new, self.length, &self.device);
        }
        self.at = at;
        true
    }

    /// The offset of an address in it.
    pub fn offset(&self, address: GuestPhysical) -> Option<u64> {
        let offset = address.0.checked_sub(self.at?.0)?;
        (offset < self.length).then_some(offset)
    }
}

impl Drop for WindowMapping {
    fn drop(&mut self) {
        self.set(None);
    }
}

/// What a bus finds at an address.
pub(crate) enum Target {
    Device(SharedDevice),
    Window(Arc<Window>),
}

impl Target {
    /// The name for messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Device(device) => lock(device).name().to_owned(),
            Self::Window(_) => "a window for devices".to_owned(),
        }
    }
}
