//! How devices join a machine.
use crate::{
    Alarm, AlarmQueue, Bus, Clock, Gsi, InterruptSink, IrqLine, Lines, MapError, MsiSink,
    PowerSink, SharedDevice, lock,
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

/// The [`MachineBuilder`] of a real machine: collects the bus and the list of devices.
pub struct Wiring {
    clock: Arc<dyn Clock>,
    msi: Arc<dyn MsiSink>,
    power: Arc<dyn PowerSink>,
    alarms: Arc<AlarmQueue>,
    lines: Lines,
    bus: Bus,
    devices: Vec<SharedDevice>,
}

impl Wiring {
    /// A machine without devices.
    pub fn new(
        clock: Arc<dyn Clock>,
        interrupts: Arc<dyn InterruptSink>,
        msi: Arc<dyn MsiSink>,
        power: Arc<dyn PowerSink>,
        alarms: Arc<AlarmQueue>,
    ) -> Self {
        let lines = Lines::new(interrupts);
        Self { clock, msi, power, alarms, lines, bus: Bus::default(), devices: Vec::new() }
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
        Arc::clone(&self.clock)
    }
    fn msi(&self) -> Arc<dyn MsiSink> {
        Arc::clone(&self.msi)
    }
    fn power(&self) -> Arc<dyn PowerSink> {
        Arc::clone(&self.power)
    }
    fn irq(&mut self, gsi: Gsi) -> IrqLine {
        self.lines.source(gsi)
    }
    fn alarm(&mut self) -> Alarm {
        self.alarms.register()
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
}
