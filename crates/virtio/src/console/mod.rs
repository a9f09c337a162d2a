//! The console device (§5.3): several ports, each a stream of bytes both ways. Port 0 is a console
//! of the guest's; others have names, by which programs in the guest find them.
//!
//! Ports are served on the thread that notifies and on those that bring input. Neither side waits
//! for the other: what one does not take stays with the other.
mod control;
mod port;

pub use port::{PortPeer, Ports};

use crate::{ActivateError, Activation, DeviceKind, VirtioDevice, pci, read_bytes};
use device::state::Reader;
use device::{MachineBuilder, MapError, Notify, RestoreError, SavedState, Wire};
use std::sync::Arc;

/// Feature: more than one port (§5.3.3).
const MULTIPORT: u64 = 1 << 1;
/// Entries of a queue.
const QUEUE_SIZE: u16 = 128;
/// Offset of `max_nr_ports` in the configuration, and its end.
const MAX_PORTS: usize = 4;
const END: usize = 12;

/// One port.
pub struct PortConfig {
    /// Its name, which Linux shows below /dev/virtio-ports; none for a console.
    pub name: Option<String>,
    /// The host's end.
    pub peer: Box<dyn PortPeer>,
}

/// A console device for a machine.
pub struct ConsoleConfig {
    /// The name of the device, unique in its machine.
    pub name: String,
    /// The ports, 1 to 31.
    pub ports: Vec<PortConfig>,
}

impl Wire for ConsoleConfig {
    /// The host's way to bring input.
    type Handle = Arc<Ports>;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError> {
        let device = Console::new(self.ports);
        let ports = device.ports.clone();
        pci::plug(machine, self.name, Box::new(device))?;
        Ok(ports)
    }
}

/// The device.
pub struct Console {
    ports: Arc<Ports>,
}

impl Console {
    /// A device with these ports.
    pub fn new(ports: Vec<PortConfig>) -> Self {
        Self { ports: Arc::new(Ports::new(ports)) }
    }

    /// The host's way to bring input.
    pub fn ports(&self) -> &Arc<Ports> {
        &self.ports
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        MULTIPORT
    }

    /// Receive and transmit of port 0, both of the control queue, then those of further ports
    /// (§5.3.2).
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 + 2 * self.ports.count()]
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let mut space = [0; END];
        let count = (self.ports.count() as u32).to_le_bytes();
        space.iter_mut().skip(MAX_PORTS).zip(count).for_each(|(to, from)| *to = from);
        read_bytes(&space, offset, data);
    }

    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError> {
        let multiport = activation.has(MULTIPORT);
        let notifiers = |count: usize| {
            (0..count).map(|index| {
                let ports = self.ports.clone();
                Some(Arc::new(move || ports.notified(index)) as Arc<dyn Notify>)
            })
        };
        let count = activation.queues.len();
        self.ports.start(activation.queues, multiport);
        (0..count).for_each(|index| self.ports.notified(index));
        Ok(notifiers(count).collect())
    }

    fn deactivate(&mut self) {
        self.ports.stop();
    }

    fn reset(&mut self) {
        self.ports.reset();
    }

    fn save(&self, state: &mut SavedState) {
        self.ports.save(state);
    }

    fn restore(&mut self, state: &mut Reader<'_>) -> Result<(), RestoreError> {
        self.ports.restore(state)
    }
}

#[cfg(test)]
mod tests;
