//! virtio over PCI (§4.1): the function of any virtio device, without the legacy interface.
//!
//! All registers are in BAR 0. There is no interrupt pin: interrupts need MSI-X, as drivers of
//! the modern interface use where there is any; without it a driver has to poll.
//!
//! A queue's notification address is a doorbell once its driver is ready, so that most
//! notifications go past the registers here and their lock.
mod link;
mod registers;

use crate::{Activation, DeviceKind, Queue, Transport, VirtioDevice, feature};
use device::pci::{ConfigSpace, PciDevice, PciSlot, capability, command, header};
use device::{
    Device, DoorbellGuard, Doorbells, GuestPhysical, GuestRam, MachineBuilder, MapError,
    MmioDevice, Notify, RestoreError, SavedState, SharedDevice, Width, WindowMapping, lock,
};
use link::Link;
use registers::{Effect, Registers};
use std::sync::{Arc, Mutex, Weak};

/// Vendor and device ids (§4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// A device with the modern interface only (§4.1.2.1).
const REVISION: u8 = 1;

/// Layout of BAR 0: each part has a page of its own.
mod bar {
    pub const COMMON: u64 = 0;
    pub const ISR: u64 = 0x1000;
    pub const DEVICE: u64 = 0x2000;
    pub const NOTIFY: u64 = 0x3000;
    pub const MSIX_TABLE: u64 = 0x4000;
    pub const MSIX_PENDING: u64 = 0x5000;
    pub const PART: u64 = 0x1000;
    pub const LENGTH: u64 = 0x8000;
}
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u64 = 4;
/// The most vectors; queues beyond share them.
const MAX_VECTORS: u16 = 256;

/// Types of virtio's capabilities (§4.1.4).
mod kind {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI: u8 = 5;
}

/// A virtio device in a slot of the PCI bus.
pub struct VirtioPci {
    name: String,
    device: Box<dyn VirtioDevice>,
    space: ConfigSpace,
    /// Offset of the MSI-X capability.
    msix_at: u16,
    /// Offset of the capability through which configuration space reaches BAR 0.
    access_at: u16,
    mapping: WindowMapping,
    registers: Registers,
    link: Arc<Link>,
    ram: GuestRam,
    doorbells: Arc<dyn Doorbells>,
    active: Option<Active>,
}

/// What there is while the device works.
struct Active {
    queues: Vec<Option<Queue>>,
    notifiers: Vec<Option<Arc<dyn Notify>>>,
    bells: Vec<DoorbellGuard>,
}

/// Plugs a device into the first free slot of a machine's PCI bus.
///
/// # Errors
/// The bus is full, or the name is taken.
pub fn plug(
    machine: &mut dyn MachineBuilder,
    name: String,
    device: Box<dyn VirtioDevice>,
) -> Result<PciSlot, MapError> {
    let (bus, label) = (machine.pci(), name.clone());
    let function = Arc::new_cyclic(|itself: &Weak<Mutex<VirtioPci>>| {
        let mapping = WindowMapping::new(bus.window().clone(), itself.clone(), bar::LENGTH);
        Mutex::new(VirtioPci::new(machine, mapping, name, device))
    });
    let shared: SharedDevice = function.clone();
    let slot =
        bus.plug_anywhere(function).map_err(|source| MapError::Slot { device: label, source })?;
    machine.add_device(shared)?;
    Ok(slot)
}

impl VirtioPci {
    fn new(
        machine: &dyn MachineBuilder,
        mapping: WindowMapping,
        name: String,
        device: Box<dyn VirtioDevice>,
    ) -> Self {
        let sizes = device.queue_sizes();
        let queues = sizes.len() as u16;
        let vectors = queues.saturating_add(1).min(MAX_VECTORS);
        let link = Arc::new(Link::new(queues, vectors, machine.msi()));
        let (space, msix_at, access_at) = config_space(device.kind(), &link);
        let offered = device.features() | feature::TRANSPORT;
        Self {
            name,
            space,
            msix_at,
            access_at,
            mapping,
            registers: Registers::new(offered, &sizes),
            link,
            ram: machine.ram(),
            doorbells: machine.doorbells(),
            active: None,
            device,
        }
    }

    /// Begins to work, with the queues as the driver, or a saved state, has them.
    fn activate(&mut self) {
        let (ram, transport) = (&self.ram, self.link.clone() as Arc<dyn Transport>);
        let features = self.registers.driver_features;
        let make = |(index, queue): (u16, &registers::QueueRegisters)| {
            let at = (queue.addresses(), queue.position());
            let make = || {
                let (ram, transport) = (ram.clone(), transport.clone());
                Queue::new(index, queue.size, at.0, at.1, features, ram, transport)
            };
            queue.enabled.then(make).transpose()
        };
        let queues = (0..).zip(&self.registers.queues).map(make);
        let Ok(queues) = queues.collect::<Result<Vec<_>, _>>() else {
            self.link.fail();
            return;
        };
        let (ram, queues_of_device) = (ram.clone(), queues.clone());
        let activation = Activation { ram, features, queues: queues_of_device, transport };
        match self.device.activate(activation) {
            Ok(notifiers) => {
                self.active = Some(Active { queues, notifiers, bells: Vec::new() });
                self.hang_bells();
            }
            Err(_) => self.link.fail(),
        }
    }

    /// Ends all work, and notes how far it came.
    fn deactivate(&mut self) {
        let Some(active) = self.active.take() else { return };
        active.queues.iter().flatten().for_each(Queue::close);
        self.device.deactivate();
        for (registers, queue) in self.registers.queues.iter_mut().zip(&active.queues) {
            if let Some(queue) = queue {
                registers.set_position(queue.position());
            }
        }
    }

    /// Registers the doorbells where BAR 0 is now.
    fn hang_bells(&mut self) {
        let Some(active) = &mut self.active else { return };
        active.bells.clear();
        let Some(base) = self.mapping.at() else { return };
        let notifiers = (0..).zip(&active.notifiers);
        active.bells = notifiers
            .filter_map(|(n, notifier): (u64, _)| {
                let at = base.0 + bar::NOTIFY + NOTIFY_MULTIPLIER * n;
                self.doorbells.register(GuestPhysical(at), notifier.clone()?)
            })
            .collect();
    }

    fn reset_device(&mut self) {
        self.deactivate();
        self.device.reset();
        self.registers.reset();
        self.link.reset();
    }

    /// Answers to memory where the base address register says, if the command register allows.
    fn remap(&mut self) {
        let base = self.space.read(header::BAR0) & !(bar::LENGTH as u32 - 1);
        let on = self.space.read(header::COMMAND) & command::MEMORY != 0 && base != 0;
        if self.mapping.set(on.then_some(GuestPhysical(base.into()))) {
            self.hang_bells();
        }
    }

    fn read_bar(&mut self, offset: u64, width: Width) -> u64 {
        let (part, at) = (offset & !(bar::PART - 1), offset % bar::PART);
        let mut bytes = [0; 8];
        let data = bytes.get_mut(..width.bytes()).unwrap_or_default();
        match part {
            bar::COMMON => self.registers.read(at as usize, data, &self.link),
            bar::ISR if at == 0 => return self.link.take_isr().into(),
            bar::DEVICE => self.device.read_config(at as usize, data),
            bar::MSIX_TABLE => return lock(&self.link.interrupts).msix.read_table(at, width),
            bar::MSIX_PENDING => return lock(&self.link.interrupts).msix.read_pending(at, width),
            _ => {}
        }
        u64::from_le_bytes(bytes)
    }

    fn write_bar(&mut self, offset: u64, width: Width, value: u64) {
        let (part, at) = (offset & !(bar::PART - 1), offset % bar::PART);
        match part {
            bar::COMMON => match self.registers.write(at as usize, width, value, &self.link) {
                Effect::None => {}
                Effect::DriverOk => self.activate(),
                Effect::Reset => self.reset_device(),
            },
            bar::DEVICE => {
                let bytes = value.to_le_bytes();
                let data = bytes.get(..width.bytes()).unwrap_or_default();
                self.device.write_config(at as usize, data);
            }
            bar::NOTIFY => {
                let queue = (at / NOTIFY_MULTIPLIER) as usize;
                let notifiers = self.active.iter().flat_map(|active| active.notifiers.get(queue));
                notifiers.flatten().for_each(|notifier| notifier.notify());
            }
            bar::MSIX_TABLE => {
                lock(&self.link.interrupts).msix.write_table(at, width, value);
            }
            _ => {}
        }
    }

    /// The access that the PCI configuration access capability describes (§4.1.4.9).
    fn described_access(&self) -> Option<(u64, Width)> {
        let bar = self.space.read(self.access_at + 4) & 0xff;
        let offset = u64::from(self.space.read(self.access_at + 8));
        let width = match self.space.read(self.access_at + 12) {
            1 => Width::Byte,
            2 => Width::Word,
            4 => Width::Dword,
            _ => return None,
        };
        let fits = offset.is_multiple_of(width.bytes() as u64) && offset < bar::LENGTH;
        (bar == 0 && fits).then_some((offset, width))
    }
}

/// The configuration space of a device with offsets of its MSI-X and PCI access capabilities.
fn config_space(device: DeviceKind, link: &Link) -> (ConfigSpace, u16, u16) {
    let id = DEVICE_BASE + device.id();
    let mut space = ConfigSpace::new(VENDOR, id, device.class(), REVISION);
    space.set(header::COMMAND, 0, command::MEMORY | command::BUS_MASTER);
    space.set(header::BAR0, 0, !(bar::LENGTH as u32 - 1));
    space.set(header::SUBSYSTEM, u32::from(id) << 16 | u32::from(VENDOR), 0);
    space.set(header::INTERRUPT, 0, 0xff);
    let (table, pending) = (bar::MSIX_TABLE as u32, bar::MSIX_PENDING as u32);
    let body = lock(&link.interrupts).msix.capability(table, pending);
    let msix = space.add_capability(capability::MSIX, &body);
    let control = device::pci::msix_control::WRITABLE;
    space.set(msix, space.read(msix), u32::from(control) << 16);
    let part = bar::PART as u32;
    let notify = NOTIFY_MULTIPLIER as u32;
    add(&mut space, kind::COMMON, bar::COMMON, registers::LENGTH, &[]);
    add(&mut space, kind::NOTIFY, bar::NOTIFY, part, &notify.to_le_bytes());
    add(&mut space, kind::ISR, bar::ISR, 1, &[]);
    add(&mut space, kind::DEVICE, bar::DEVICE, part, &[]);
    let access = add(&mut space, kind::PCI, 0, 0, &[0; 4]);
    for (offset, writable) in [(4, 0xff), (8, u32::MAX), (12, u32::MAX)] {
        space.set(access + offset, 0, writable);
    }
    (space, msix, access)
}

/// Adds a capability of virtio's (§4.1.4): where a structure is in BAR 0.
fn add(space: &mut ConfigSpace, kind: u8, at: u64, length: u32, more: &[u8]) -> u16 {
    let size = 16 + more.len() as u8;
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend_from_slice(&(at as u32).to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    body.extend_from_slice(more);
    space.add_capability(capability::VENDOR, &body)
}

impl PciDevice for VirtioPci {
    fn read_config(&mut self, offset: u16) -> u32 {
        if offset == self.access_at + 16 {
            let access = self.described_access();
            return access.map_or(0, |(offset, width)| self.read_bar(offset, width) as u32);
        }
        self.space.read(offset)
    }

    fn write_config(&mut self, offset: u16, value: u32, mask: u32) {
        if offset == self.access_at + 16 {
            if let Some((offset, width)) = self.described_access() {
                self.write_bar(offset, width, u64::from(value & mask) & width.mask());
            }
            return;
        }
        self.space.write(offset, value, mask);
        if offset == header::COMMAND || offset == header::BAR0 {
            self.remap();
        } else if offset == self.msix_at {
            let control = (self.space.read(offset) >> 16) as u16;
            lock(&self.link.interrupts).msix.set_control(control);
        }
    }
}

impl MmioDevice for VirtioPci {
    fn read(&mut self, address: GuestPhysical, width: Width) -> u64 {
        // The guest may have moved the function since the bus looked.
        let offset = self.mapping.offset(address);
        offset.map_or(width.mask(), |offset| self.read_bar(offset, width))
    }
    fn write(&mut self, address: GuestPhysical, width: Width, value: u64) {
        if let Some(offset) = self.mapping.offset(address) {
            self.write_bar(offset, width, value);
        }
    }
}

impl Device for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }
    fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        Some(self)
    }
    fn pause(&mut self) {
        self.deactivate();
    }
    fn resume(&mut self) {
        if self.active.is_none() && self.registers.is_driver_ok() && !self.link.has_failed() {
            self.activate();
        }
    }
    fn reset(&mut self) {
        self.reset_device();
        lock(&self.link.interrupts).msix.reset();
        (self.space, _, _) = config_space(self.device.kind(), &self.link);
        self.remap();
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new(self.device.kind().name(), 1);
        state.put("config_space", &self.space.to_bytes());
        self.registers.save(&mut state, &self.link);
        self.device.save(&mut state);
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.reset();
        let mut reader = state.reader(self.device.kind().name(), 1)?;
        let space: Vec<u8> = reader.get("config_space")?;
        if !self.space.restore(&space) {
            return Err(reader.out_of_range("config_space"));
        }
        self.registers.restore(&mut reader, &self.link)?;
        self.device.restore(&mut reader)?;
        reader.finish()?;
        self.remap();
        Ok(())
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.deactivate();
    }
}

#[cfg(test)]
mod tests;
