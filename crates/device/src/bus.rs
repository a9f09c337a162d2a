//! The map from ports and guest-physical addresses to devices.
use crate::pci::PlugError;
use crate::window::Target;
use crate::{Device, SharedDevice, Window, lock};
use arch::GuestPhysical;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// The size of one access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Width {
    /// 1 byte.
    Byte = 1,
    /// 2 bytes.
    Word = 2,
    /// 4 bytes.
    Dword = 4,
    /// 8 bytes.
    Qword = 8,
}

impl Width {
    /// The number of bytes.
    pub const fn bytes(self) -> usize {
        self as usize
    }
    /// The bits of a value of this width.
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }
    /// The widest access that is not longer than `length` bytes (at least 1).
    const fn within(length: usize) -> Self {
        match length {
            8.. => Self::Qword,
            4.. => Self::Dword,
            2.. => Self::Word,
            _ => Self::Byte,
        }
    }
}

/// Why a device cannot join the machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The range overlaps one that is mapped.
    #[error("{device}: {start:#x}–{end:#x} overlaps a range of {other}; move one of them")]
    Overlap {
        /// The device that asked.
        device: String,
        /// First address or port.
        start: u64,
        /// Last address or port.
        end: u64,
        /// The device that has the range.
        other: String,
    },
    /// The range is empty or wraps around.
    #[error("{device}: {start:#x}–{end:#x} is not a range; give a length of at least one byte")]
    Range {
        /// The device that asked.
        device: String,
        /// First address or port.
        start: u64,
        /// Last address or port.
        end: u64,
    },
    /// The device does not have the capability.
    #[error("{0}: the device takes no such accesses; map only what it implements")]
    Capability(String),
    /// The name is taken.
    #[error("{0}: a device of this name is there already; name each device once")]
    Name(String),
    /// The PCI bus has no place for the device.
    #[error("{device} cannot be plugged in")]
    Slot {
        /// The device that asked.
        device: String,
        /// Why not.
        #[source]
        source: PlugError,
    },
}

struct Range {
    start: u64,
    /// Inclusive, so that the last byte of the address space can be mapped.
    end: u64,
    target: Target,
}

/// Ranges in ascending order, without overlap.
#[derive(Default)]
struct Map(Vec<Range>);

impl Map {
    fn insert(&mut self, start: u64, end: u64, target: Target) -> Result<(), MapError> {
        if start > end {
            return Err(MapError::Range { device: target.name(), start, end });
        }
        let at = self.0.partition_point(|range| range.end < start);
        if let Some(there) = self.0.get(at).filter(|range| range.start <= end) {
            let (device, other) = (target.name(), there.target.name());
            return Err(MapError::Overlap { device, start, end, other });
        }
        self.0.insert(at, Range { start, end, target });
        Ok(())
    }

    /// What is at `address`, and how many bytes from there on are its own: of `length`, which
    /// is at least 1. Where nothing is, the number of bytes before the next range.
    fn find(&self, address: u64, length: usize) -> (Option<&Target>, usize) {
        let at = self.0.partition_point(|range| range.end < address);
        let Some(range) = self.0.get(at) else { return (None, length) };
        let fit = |bytes: u64| usize::try_from(bytes).map_or(length, |bytes| bytes.min(length));
        if address < range.start {
            (None, fit(range.start - address))
        } else {
            (Some(&range.target), fit((range.end - address).saturating_add(1)))
        }
    }

    /// Cuts an access of any length into parts that lie within one device and have a width, and
    /// gives each to `part` with its offset.
    fn split(
        &self,
        address: u64,
        length: usize,
        widest: Width,
        mut part: impl FnMut(Option<&mut dyn Device>, u64, Width, usize),
    ) {
        let mut offset = 0;
        while offset < length {
            let here = address.wrapping_add(offset as u64);
            let (target, bytes) = self.find(here, length - offset);
            let (moving, bytes) = match target {
                Some(Target::Window(window)) => window.find(here, bytes),
                _ => (None, bytes),
            };
            let width = Width::within(bytes).min(widest);
            match (target, &moving) {
                (Some(Target::Device(device)), _) | (_, Some(device)) => {
                    part(Some(&mut *lock(device)), here, width, offset);
                }
                _ => part(None, here, width, offset),
            }
            offset += width.bytes();
        }
    }
}

/// The bus of a machine. It does not change after assembly, so vCPU threads use it without a
/// lock, but for its windows; each device has its own.
#[derive(Default)]
pub struct Bus {
    ports: Map,
    mmio: Map,
}

impl Bus {
    /// Gives ports to a device.
    ///
    /// # Errors
    /// A port is taken, or the device has no [`crate::PioDevice`].
    pub fn map_ports(
        &mut self,
        ports: RangeInclusive<u16>,
        device: &SharedDevice,
    ) -> Result<(), MapError> {
        let mut guard = lock(device);
        if guard.pio().is_none() {
            return Err(MapError::Capability(guard.name().to_owned()));
        }
        drop(guard);
        let (start, end) = (u64::from(*ports.start()), u64::from(*ports.end()));
        self.ports.insert(start, end, Target::Device(Arc::clone(device)))
    }

    /// Gives guest-physical addresses to a device.
    ///
    /// # Errors
    /// An address is taken, the range is empty or wraps, or the device has no
    /// [`crate::MmioDevice`].
    pub fn map_mmio(
        &mut self,
        start: GuestPhysical,
        length: u64,
        device: &SharedDevice,
    ) -> Result<(), MapError> {
        let mut guard = lock(device);
        if guard.mmio().is_none() {
            return Err(MapError::Capability(guard.name().to_owned()));
        }
        let name = guard.name().to_owned();
        drop(guard);
        let Some(end) = last(start, length) else {
            return Err(empty_or_wrapping(name, start, length));
        };
        self.mmio.insert(start.0, end, Target::Device(Arc::clone(device)))
    }

    /// Has devices come and go within a range of guest-physical addresses.
    ///
    /// # Errors
    /// An address is taken, or the range is empty or wraps.
    pub fn map_window(
        &mut self,
        start: GuestPhysical,
        length: u64,
        window: &Arc<Window>,
    ) -> Result<(), MapError> {
        let target = Target::Window(Arc::clone(window));
        let Some(end) = last(start, length) else {
            return Err(empty_or_wrapping(target.name(), start, length));
        };
        self.mmio.insert(start.0, end, target)
    }

    /// IN of 1, 2 or 4 bytes. Ports that belong to no device read as all ones.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.ports.split(u64::from(port), data.len(), Width::Dword, |device, at, width, offset| {
            let value = device
                .and_then(Device::pio)
                .map_or(u32::MAX, |device| device.read(at as u16, width));
            store(data, offset, width, u64::from(value));
        });
    }

    /// OUT of 1, 2 or 4 bytes. Writes to ports that belong to no device are dropped.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        self.ports.split(u64::from(port), data.len(), Width::Dword, |device, at, width, offset| {
            if let Some(device) = device.and_then(Device::pio) {
                device.write(at as u16, width, load(data, offset, width) as u32);
            }
        });
    }

    /// Reads device registers into `data` (1 to 64 bytes; longer ones are cut into parts of up
    /// to 8). Addresses that belong to no device read as all ones.
    pub fn mmio_read(&self, address: GuestPhysical, data: &mut [u8]) {
        self.mmio.split(address.0, data.len(), Width::Qword, |device, at, width, offset| {
            let value = device
                .and_then(Device::mmio)
                .map_or(u64::MAX, |device| device.read(GuestPhysical(at), width));
            store(data, offset, width, value);
        });
    }

    /// Writes `data` (1 to 64 bytes) to device registers. Writes to addresses that belong to no
    /// device are dropped.
    pub fn mmio_write(&self, address: GuestPhysical, data: &[u8]) {
        self.mmio.split(address.0, data.len(), Width::Qword, |device, at, width, offset| {
            if let Some(device) = device.and_then(Device::mmio) {
                device.write(GuestPhysical(at), width, load(data, offset, width));
            }
        });
    }
}

/// The last address of a range; `None` where it is empty or wraps.
fn last(start: GuestPhysical, length: u64) -> Option<u64> {
    start.0.checked_add(length.checked_sub(1)?)
}

fn empty_or_wrapping(device: String, start: GuestPhysical, length: u64) -> MapError {
    let end = start.0.wrapping_add(length).wrapping_sub(1);
    MapError::Range { device, start: start.0, end }
}

fn store(data: &mut [u8], offset: usize, width: Width, value: u64) {
    for (to, from) in data.iter_mut().skip(offset).zip(value.to_le_bytes()).take(width.bytes()) {
        *to = from;
    }
}

fn load(data: &[u8], offset: usize, width: Width) -> u64 {
    let bytes = data.iter().skip(offset).take(width.bytes());
    bytes.enumerate().fold(0, |value, (i, byte)| value | u64::from(*byte) << (8 * i))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MmioDevice, PioDevice, RestoreError, SavedState, Shared, share};

    /// Notes every access; reads give the low byte of the address, repeated.
    struct Probe(&'static str, Vec<(u64, usize, u64)>);
    impl Device for Probe {
        fn name(&self) -> &str {
            self.0
        }
        fn pio(&mut self) -> Option<&mut dyn PioDevice> {
            Some(self)
        }
        fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
            (self.0 != "ports only").then_some(self)
        }
        fn reset(&mut self) {}
        fn save(&self) -> SavedState {
            SavedState::stateless("probe")
        }
        fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
            state.reader("probe", 1)?.finish()
        }
    }
    impl PioDevice for Probe {
        fn read_byte(&mut self, port: u16) -> u8 {
            port as u8
        }
        fn write_byte(&mut self, port: u16, value: u8) {
            self.1.push((port.into(), 1, value.into()));
        }
    }
    impl MmioDevice for Probe {
        fn read(&mut self, address: GuestPhysical, _: Width) -> u64 {
            (address.0 & 0xff) * 0x0101_0101_0101_0101
        }
        fn write(&mut self, address: GuestPhysical, width: Width, value: u64) {
            self.1.push((address.0, width.bytes(), value));
        }
    }

    fn probe(name: &'static str) -> (Shared<Probe>, SharedDevice) {
        let probe = share(Probe(name, Vec::new()));
        (probe.clone(), probe)
    }

    #[test]
    fn unclaimed_reads_give_ones_and_writes_are_dropped() {
        let bus = Bus::default();
        let mut data = [0; 64];
        bus.mmio_read(GuestPhysical(u64::MAX), &mut data);
        assert_eq!(data, [0xff; 64]);
        let mut data = [0; 4];
        bus.pio_read(0xffff, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.pio_write(0x70, &[1, 2]);
        bus.mmio_write(GuestPhysical(0), &[0; 64]);
    }

    #[test]
    fn a_wide_access_to_a_byte_wide_device_becomes_byte_accesses() {
        let (probe, device) = probe("probe");
        let mut bus = Bus::default();
        bus.map_ports(0x70..=0x73, &device).unwrap();
        bus.pio_write(0x72, &[0xa, 0xb]);
        assert_eq!(lock(&probe).1, [(0x72, 1, 0xa), (0x73, 1, 0xb)]);
        let mut data = [0; 4];
        bus.pio_read(0x72, &mut data);
        assert_eq!(data, [0x72, 0x73, 0xff, 0xff], "the last two ports belong to no device");
    }

    #[test]
    fn an_access_across_two_devices_reaches_both() {
        let ((low, low_device), (high, high_device)) = (probe("low"), probe("high"));
        let mut bus = Bus::default();
        bus.map_mmio(GuestPhysical(0x1000), 0x10, &low_device).unwrap();
        bus.map_mmio(GuestPhysical(0x1010), 0x10, &high_device).unwrap();
        bus.mmio_write(GuestPhysical(0x100e), &[1, 2, 3, 4]);
        assert_eq!(lock(&low).1, [(0x100e, 2, 0x0201)]);
        assert_eq!(lock(&high).1, [(0x1010, 2, 0x0403)]);
    }

    #[test]
    fn a_long_access_is_cut_into_parts_of_eight_bytes() {
        let (_, device) = probe("probe");
        let mut bus = Bus::default();
        bus.map_mmio(GuestPhysical(u64::MAX - 0xff), 0x100, &device).unwrap();
        let mut data = [0; 32];
        bus.mmio_read(GuestPhysical(u64::MAX - 0xff), &mut data);
        let expect: Vec<u8> = [[0u8; 8], [8; 8], [16; 8], [24; 8]].concat();
        assert_eq!(data.to_vec(), expect);
    }

    #[test]
    fn a_range_that_is_taken_empty_or_not_implemented_is_refused() {
        let ((_, a), (_, b)) = (probe("a"), probe("ports only"));
        let mut bus = Bus::default();
        bus.map_ports(0x60..=0x64, &a).unwrap();
        assert_eq!(
            bus.map_ports(0x64..=0x64, &b),
            Err(MapError::Overlap {
                device: "ports only".into(),
                start: 0x64,
                end: 0x64,
                other: "a".into()
            })
        );
        assert!(matches!(bus.map_mmio(GuestPhysical(0), 0, &a), Err(MapError::Range { .. })));
        assert!(matches!(
            bus.map_mmio(GuestPhysical(9), u64::MAX, &a),
            Err(MapError::Range { .. })
        ));
        assert!(matches!(bus.map_mmio(GuestPhysical(0), 1, &b), Err(MapError::Capability(_))));
    }

    #[test]
    fn a_device_answers_where_it_is_in_a_window_at_present() {
        let ((a, shared), (_, other)) = (probe("a"), probe("b"));
        let window = Arc::new(Window::default());
        let mut bus = Bus::default();
        bus.map_mmio(GuestPhysical(0x2000), 0x10, &other).unwrap();
        assert!(bus.map_window(GuestPhysical(0x1000), 0x1001, &window).is_err());
        bus.map_window(GuestPhysical(0x1000), 0x1000, &window).unwrap();
        let weak = Arc::downgrade(&shared);
        let mut mapping = crate::WindowMapping::new(window.clone(), weak.clone(), 4);
        let read = |at, length| {
            let mut data = vec![0; length];
            bus.mmio_read(GuestPhysical(at), &mut data);
            data
        };
        assert_eq!(read(0x1010, 2), [0xff, 0xff]);
        assert!(mapping.set(Some(GuestPhysical(0x1010))));
        assert_eq!(read(0x100e, 8), [0xff, 0xff, 0x10, 0x10, 0x10, 0x10, 0xff, 0xff]);
        assert!(mapping.set(Some(GuestPhysical(0x1ffe))) && !mapping.set(mapping.at()));
        assert_eq!(read(0x1010, 2), [0xff, 0xff], "gone from there");
        assert_eq!(read(0x1ffe, 4), [0xfe, 0xfe, 0, 0], "the window ends, the next device begins");
        bus.mmio_write(GuestPhysical(0x1ffe), &[1]);
        assert_eq!(lock(&a).1, [(0x1ffe, 1, 1)]);
        assert_eq!(mapping.offset(GuestPhysical(0x1fff)), Some(1));
        assert_eq!(mapping.offset(GuestPhysical(0x2002)), None);
        drop(mapping);
        assert_eq!(read(0x1ffe, 1), [0xff]);
        window.map(GuestPhysical(0x1000), 4, &weak);
        drop((shared, a));
        assert_eq!(read(0x1000, 1), [0xff], "a window does not keep a device");
    }
}
