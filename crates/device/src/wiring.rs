//! How devices join a machine.
use crate::pci::PciBus;
use crate::{
    Alarm, AlarmQueue, Bus, Clock, Doorbells, Gsi, GuestRam, InterruptSink, IrqLine, Lines,
    MapError, MsiSink, PowerSink, SharedDevice, Window, lock,
};
use arch::GuestPhysical;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// What a device can ask for while it wires itself.
pub trait MachineBuilder {
    /// The machine's time.
    fn clock(&self) -> Arc<dyn Clock>;
    /// The receiver of message-signalled interrupts.
    fn msi(&self) -> Arc<dyn MsiSink>;
    /// The receiver of power requests.
    fn power(&self) -> Arc<dyn PowerSink>;
    /// Guest memory.
    fn ram(&self) -> GuestRam;
    /// Where doorbells are registered.
    fn doorbells(&self) -> Arc<dyn Doorbells>;
    /// The PCI bus.
    fn pci(&self) -> Arc<PciBus>;
    /// A new source on an interrupt line; sources on the same line are ORed.
    fn irq(&mut self, gsi: Gsi) -> IrqLine;
    /// A new alarm. It wakes a device once [`Alarm::bind`] says which.
    fn alarm(&mut self) -> Alarm;
    /// Adds a device to the list of those that are reset, saved and restored.
    ///
    /// # Errors
    /// A device of this name is there already.
    fn add_device(&mut self, device: SharedDevice) -> Result<(), MapError>;
    /// Gives ports to a device.
    ///
    /// # Errors
    /// A port belongs to another device, or the device has none.
    fn map_ports(
        &mut self,
        ports: RangeInclusive<u16>,
        device: &SharedDevice,
    ) -> Result<(), MapError>;
    /// Gives `length` bytes of guest-physical addresses from `start` on to a device.
    ///
    /// # Errors
    /// An address belongs to another device, or the device has no registers in memory.
    fn map_mmio(
        &mut self,
        start: GuestPhysical,
        length: u64,
        device: &SharedDevice,
    ) -> Result<(), MapError>;
    /// Has devices come and go within `length` bytes of guest-physical addresses from `start` on.
    ///
    /// # Errors
    /// An address belongs to another device.
    fn map_window(
        &mut self,
        start: GuestPhysical,
        length: u64,
        window: &Arc<Window>,
    ) -> Result<(), MapError>;
}

/// The description of a device that can put itself into a machine: its configuration with those
/// connections that the machine's builder does not know.
pub trait Wire {
    /// What the caller keeps: usually the [`crate::Shared`] device.
    type Handle;
    /// Makes the device, connects it and adds it.
    ///
    /// # Errors
    /// Ports, addresses or the name are taken.
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError>;
}

/// What the machine gives all devices to reach it.
pub struct Connections {
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Deadlines.
    pub alarms: Arc<AlarmQueue>,
    /// The interrupt controllers.
    pub interrupts: Arc<dyn InterruptSink>,
    /// The receiver of message-signalled interrupts.
    pub msi: Arc<dyn MsiSink>,
    /// The receiver of power requests.
    pub power: Arc<dyn PowerSink>,
    /// Guest memory.
    pub ram: GuestRam,
    /// Where doorbells are registered.
    pub doorbells: Arc<dyn Doorbells>,
}

/// The [`MachineBuilder`] of a real machine: collects the bus and the list of devices.
pub struct Wiring {
    to: Connections,
    lines: Lines,
    bus: Bus,
    pci: Arc<PciBus>,
    devices: Vec<SharedDevice>,
}

impl Wiring {
    /// A machine without devices.
    pub fn new(to: Connections) -> Self {
        let lines = Lines::new(to.interrupts.clone());
        Self { to, lines, bus: Bus::default(), pci: Arc::default(), devices: Vec::new() }
    }
    /// The bus so far.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }
    /// The devices so far, in the order in which they were wired.
    pub fn devices(&self) -> &[SharedDevice] {
        &self.devices
    }
    /// Ends the assembly: the bus and the devices.
    pub fn finish(self) -> (Bus, Vec<SharedDevice>) {
        (self.bus, self.devices)
    }
}

impl MachineBuilder for Wiring {
    fn clock(&self) -> Arc<dyn Clock> {
        self.to.clock.clone()
    }
    fn msi(&self) -> Arc<dyn MsiSink> {
        self.to.msi.clone()
    }
    fn power(&self) -> Arc<dyn PowerSink> {
        self.to.power.clone()
    }
    fn ram(&self) -> GuestRam {
        self.to.ram.clone()
    }
    fn doorbells(&self) -> Arc<dyn Doorbells> {
        self.to.doorbells.clone()
    }
    fn pci(&self) -> Arc<PciBus> {
        self.pci.clone()
    }
    fn irq(&mut self, gsi: Gsi) -> IrqLine {
        self.lines.source(gsi)
    }
    fn alarm(&mut self) -> Alarm {
        self.to.alarms.register()
    }
    fn add_device(&mut self, device: SharedDevice) -> Result<(), MapError> {
        let name = lock(&device).name().to_owned();
        if self.devices.iter().any(|other| lock(other).name() == name) {
            return Err(MapError::Name(name));
        }
        self.devices.push(device);
        Ok(())
    }
    fn map_ports(
        &mut self,
        ports: RangeInclusive<u16>,
        device: &SharedDevice,
    ) -> Result<(), MapError> {
        self.bus.map_ports(ports, device)
    }
    fn map_mmio(
        &mut self,
        start: GuestPhysical,
        length: u64,
        device: &SharedDevice,
    ) -> Result<(), MapError> {
        self.bus.map_mmio(start, length, device)
    }
    fn map_window(
        &mut self,
        start: GuestPhysical,
        length: u64,
        window: &Arc<Window>,
    ) -> Result<(), MapError> {
        self.bus.map_window(start, length, window)
    }
}
