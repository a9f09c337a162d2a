//! The PCI root: host bridge, configuration mechanism 1, ECAM, and the bus that devices plug
//! into.
//!
//! Source: PCI Local Bus specification 3.0 §3.2.2.3.2 (mechanism 1) and §6.1 (configuration
//! space); PCI Express 5.0 §7.2.2 (ECAM).
use crate::layout::{self, ports};
use crate::reset_control::ResetControl;
use device::pci::{ConfigSpace, PciBus, PciDevice, PciSlot, header};
use device::{
    Device, GuestPhysical, MachineBuilder, MapError, MmioDevice, PioDevice, PowerSink,
    RestoreError, SavedState, Shared, SharedDevice, Width, Wire, lock, share,
};
use std::sync::Arc;

/// The configuration address register (§3.2.2.3.2).
const ADDRESS_ENABLE: u32 = 1 << 31;
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

/// Header type: the device has further functions (§6.2.1).
const MULTI_FUNCTION: u32 = 1 << 23;

/// The host bridge: Intel's vendor id, an id without quirks in guest systems, class 06 00 00.
const HOST_BRIDGE_IDS: (u16, u16) = (0x8086, 0x0d57);
const HOST_BRIDGE_CLASS: u32 = 0x06_0000;

/// The host bridge's own function.
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        let (vendor, device) = HOST_BRIDGE_IDS;
        Self(ConfigSpace::new(vendor, device, HOST_BRIDGE_CLASS, 0))
    }
}

impl PciDevice for HostBridge {
    fn read_config(&mut self, offset: u16) -> u32 {
        self.0.read(offset)
    }
    fn write_config(&mut self, offset: u16, value: u32, mask: u32) {
        self.0.write(offset, value, mask);
    }
}

/// The root of the PCI bus.
pub struct PciHost {
    power: Arc<dyn PowerSink>,
    address: u32,
    reset: ResetControl,
    bus: Arc<PciBus>,
}

impl PciHost {
    /// The function in a slot of bus 0, the only one.
    fn function(&self, bus: u8, function: u8) -> Option<Shared<dyn PciDevice>> {
        (bus == 0).then(|| self.bus.function(PciSlot::from_address(function)))?
    }

    fn read_config(&self, bus: u8, function: u8, offset: u16) -> u32 {
        let Some(device) = self.function(bus, function) else { return u32::MAX };
        let value = lock(&device).read_config(offset);
        // A device with more functions says so in the header of its first.
        let slot = PciSlot::from_address(function);
        let first = offset == header::TYPE && slot.function() == 0;
        if first && self.bus.has_more_functions(slot) { value | MULTI_FUNCTION } else { value }
    }

    fn write_config(&self, bus: u8, function: u8, offset: u16, value: u32, mask: u32) {
        if let Some(device) = self.function(bus, function) {
            lock(&device).write_config(offset, value, mask);
        }
    }

    /// Bus, function and offset that the address register selects.
    const fn selected(&self) -> (u8, u8, u16) {
        let [offset, function, bus, _] = self.address.to_le_bytes();
        (bus, function, offset as u16)
    }
}

/// Cuts an access into the parts of the dwords that it touches: for each the dword's address,
/// the shift of the part in the dword (in bits), its shift in the value, and its mask there.
fn dwords(address: u64, width: Width, mut part: impl FnMut(u64, u32, u32, u64)) {
    let mut done = 0;
    while done < width.bytes() as u64 {
        let at = address + done;
        let bytes = (4 - at % 4).min(width.bytes() as u64 - done);
        part(at & !3, 8 * (at % 4) as u32, 8 * done as u32, u64::MAX >> (64 - 8 * bytes));
        done += bytes;
    }
}

impl PioDevice for PciHost {
    fn read_byte(&mut self, port: u16) -> u8 {
        PioDevice::read(self, port, Width::Byte) as u8
    }
    fn write_byte(&mut self, port: u16, value: u8) {
        PioDevice::write(self, port, Width::Byte, value.into());
    }

    fn read(&mut self, port: u16, width: Width) -> u32 {
        match (port, width) {
            (ports::PCI_CONFIG_ADDRESS, Width::Dword) => self.address,
            (ports::RESET_CONTROL, Width::Byte) => self.reset.value.into(),
            (ports::PCI_CONFIG_DATA.., _) if self.address & ADDRESS_ENABLE != 0 => {
                let (bus, function, offset) = self.selected();
                let mut value = 0;
                // The bus never gives more ports than are mapped, so one dword is touched.
                dwords(port.into(), width, |_, shift, to, mask| {
                    let dword = u64::from(self.read_config(bus, function, offset));
                    value |= (dword >> shift & mask) << to;
                });
                value as u32
            }
            _ => u32::MAX,
        }
    }

    fn write(&mut self, port: u16, width: Width, value: u32) {
        match (port, width) {
            // Narrower writes to the address register go to what lies there instead (§3.2.2.3.2).
            (ports::PCI_CONFIG_ADDRESS, Width::Dword) => self.address = value & ADDRESS_WRITABLE,
            (ports::RESET_CONTROL, Width::Byte) => {
                self.reset.write(value as u8, self.power.as_ref());
            }
            (ports::PCI_CONFIG_DATA.., _) if self.address & ADDRESS_ENABLE != 0 => {
                let (bus, function, offset) = self.selected();
                dwords(port.into(), width, |_, shift, from, mask| {
                    let part = (u64::from(value) >> from & mask) << shift;
                    let mask = (mask << shift) as u32;
                    self.write_config(bus, function, offset, part as u32, mask);
                });
            }
            _ => {}
        }
    }
}

/// Bus, function and offset of an ECAM address.
fn ecam(address: u64) -> (u8, u8, u16) {
    let offset = address - layout::PCI_ECAM.0;
    ((offset >> 20) as u8, (offset >> 12) as u8, (offset & 0xffc) as u16)
}

impl MmioDevice for PciHost {
    fn read(&mut self, address: GuestPhysical, width: Width) -> u64 {
        let mut value = 0;
        dwords(address.0, width, |at, shift, to, mask| {
            let (bus, function, offset) = ecam(at);
            let dword = u64::from(self.read_config(bus, function, offset));
            value |= (dword >> shift & mask) << to;
        });
        value
    }
    fn write(&mut self, address: GuestPhysical, width: Width, value: u64) {
        dwords(address.0, width, |at, shift, from, mask| {
            let (bus, function, offset) = ecam(at);
            let part = ((value >> from & mask) << shift) as u32;
            self.write_config(bus, function, offset, part, (mask << shift) as u32);
        });
    }
}

impl Device for PciHost {
    fn name(&self) -> &str {
        "pci-host"
    }
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
    fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        self.address = 0;
        self.reset = ResetControl::default();
    }
    fn save(&self) -> SavedState {
        // The host bridge's function has no writable bits; other functions save themselves.
        let mut state = SavedState::new("pci-host", 1);
        state.put("address", &self.address);
        state.put("reset_control", &self.reset.value);
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("pci-host", 1)?;
        self.address = reader.get_if("address", |address| address & !ADDRESS_WRITABLE == 0)?;
        self.reset.value = reader.get("reset_control")?;
        reader.finish()
    }
}

/// A PCI root with its host bridge at 00:00.0. Other functions are plugged into the machine's
/// [`PciBus`], and decode addresses between [`layout::PCI_MMIO_START`] and its end.
#[derive(Debug)]
pub struct PciHostConfig;

impl Wire for PciHostConfig {
    type Handle = Shared<PciHost>;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError> {
        let bus = machine.pci();
        bus.plug(PciSlot::from_address(0), share(HostBridge::new()))
            .map_err(|source| MapError::Slot { device: "the host bridge".into(), source })?;
        let (from, to) = (layout::PCI_MMIO_START, layout::PCI_MMIO_END);
        machine.map_window(from, to.0 - from.0, bus.window())?;
        let reset = ResetControl::default();
        let host = share(PciHost { power: machine.power(), address: 0, reset, bus });
        let device: SharedDevice = host.clone();
        machine.map_ports(ports::PCI_CONFIG_ADDRESS..=ports::PCI_CONFIG_DATA + 3, &device)?;
        let length = layout::PCI_ECAM_LENGTH_PER_BUS * u64::from(layout::PCI_BUSES);
        machine.map_mmio(layout::PCI_ECAM, length, &device)?;
        machine.add_device(device)?;
        Ok(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::PowerEvent;
    use device::testing::TestMachine;

    struct Function(ConfigSpace);
    impl PciDevice for Function {
        fn read_config(&mut self, offset: u16) -> u32 {
            self.0.read(offset)
        }
        fn write_config(&mut self, offset: u16, value: u32, mask: u32) {
            self.0.write(offset, value, mask);
        }
    }

    fn machine() -> (TestMachine, Shared<PciHost>) {
        let mut machine = TestMachine::default();
        let host = PciHostConfig.wire(machine.builder()).unwrap();
        (machine, host)
    }
    fn plug(machine: &mut TestMachine, device: u8, function: u8) {
        let mut space = ConfigSpace::new(0x1af4, 0x1042, 0x01_0000, 1);
        space.set(header::INTERRUPT, 0x0100, 0xff);
        space.set(header::SUBSYSTEM, 0xabcd_1234, 0);
        let slot = PciSlot::new(device, function).unwrap();
        machine.builder().pci().plug(slot, share(Function(space))).unwrap();
    }
    fn outl(machine: &TestMachine, port: u16, value: u32) {
        machine.bus().pio_write(port, &value.to_le_bytes());
    }
    fn inl(machine: &TestMachine, port: u16) -> u32 {
        let mut data = [0; 4];
        machine.bus().pio_read(port, &mut data);
        u32::from_le_bytes(data)
    }
    fn config(machine: &TestMachine, device: u32, offset: u32) -> u32 {
        outl(machine, 0xcf8, 1 << 31 | device << 11 | offset);
        inl(machine, 0xcfc)
    }

    #[test]
    fn linux_finds_mechanism_1_and_the_host_bridge() {
        let (machine, _) = machine();
        machine.outb(0xcfb, 1);
        outl(&machine, 0xcf8, 1 << 31);
        assert_eq!(inl(&machine, 0xcf8), 1 << 31);
        assert_eq!(config(&machine, 0, 0), 0x0d57_8086);
        assert_eq!(config(&machine, 0, 8) >> 16, 0x0600);
    }

    #[test]
    fn empty_slots_and_a_disabled_address_read_all_ones() {
        let (machine, _) = machine();
        assert_eq!(config(&machine, 5, 0), u32::MAX);
        outl(&machine, 0xcf8, 0);
        assert_eq!(inl(&machine, 0xcfc), u32::MAX);
        outl(&machine, 0xcf8, 1 << 31 | 1 << 16);
        assert_eq!(inl(&machine, 0xcfc), u32::MAX, "bus 1");
    }

    #[test]
    fn bytes_and_words_reach_their_part_of_a_dword() {
        let (mut machine, _) = machine();
        plug(&mut machine, 3, 0);
        assert_eq!(config(&machine, 3, 0x2c), 0xabcd_1234);
        let mut word = [0; 2];
        machine.bus().pio_read(0xcfe, &mut word);
        assert_eq!((word, machine.inb(0xcfd)), ([0xcd, 0xab], 0x12));
        config(&machine, 3, 0x3c);
        machine.bus().pio_write(0xcfc, &[0x0b, 0xff]);
        assert_eq!(inl(&machine, 0xcfc), 0x010b, "only the writable byte changed");
    }

    #[test]
    fn ecam_shows_the_same_space() {
        let (mut machine, _) = machine();
        plug(&mut machine, 3, 0);
        let at = GuestPhysical(layout::PCI_ECAM.0 + (3 << 15));
        let mut data = [0; 8];
        machine.bus().mmio_read(at, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x1042_1af4);
        machine.bus().mmio_write(GuestPhysical(at.0 + 0x3c), &[7]);
        assert_eq!(config(&machine, 3, 0x3c), 0x0107);
        let mut data = [0; 4];
        machine.bus().mmio_read(GuestPhysical(at.0 + 0x100), &mut data);
        assert_eq!(data, [0; 4], "no extended capabilities");
        machine.bus().mmio_read(GuestPhysical(at.0 + 0x2d), &mut data);
        assert_eq!(data, [0x12, 0xcd, 0xab, 0], "unaligned");
    }

    #[test]
    fn a_second_function_shows_in_the_header_of_the_first() {
        let (mut machine, _) = machine();
        plug(&mut machine, 3, 0);
        assert_eq!(config(&machine, 3, 0x0c) & MULTI_FUNCTION, 0);
        plug(&mut machine, 3, 2);
        assert_eq!(config(&machine, 3, 0x0c) & MULTI_FUNCTION, MULTI_FUNCTION);
    }

    #[test]
    fn the_reset_control_register_resets() {
        let (machine, _) = machine();
        machine.outb(0xcf9, 0x02);
        assert_eq!((machine.inb(0xcf9), machine.power.take()), (0x02, vec![]));
        machine.outb(0xcf9, layout::RESET_VALUE);
        assert_eq!(machine.power.take(), [PowerEvent::Reset]);
        outl(&machine, 0xcf8, 0x8000_0600);
        assert_eq!(machine.power.take(), [], "a dword is an address");
    }

    #[test]
    fn the_address_register_survives_a_restore() {
        let (old, host) = machine();
        outl(&old, 0xcf8, 0x8000_1234);
        let state = lock(&host).save();
        let (new, host) = machine();
        lock(&host).restore(&state).unwrap();
        assert_eq!(inl(&new, 0xcf8), 0x8000_1234);
    }
}
