//! Configuration space (PCI Local Bus specification 3.0 §6).

/// Offsets in the configuration header of a type 0 function (§6.1).
pub mod header {
    /// Vendor and device id.
    pub const IDS: u16 = 0x00;
    /// Command, and status in bits 16 to 31.
    pub const COMMAND: u16 = 0x04;
    /// Revision, interface, subclass and class.
    pub const CLASS: u16 = 0x08;
    /// Header type in bits 16 to 23.
    pub const TYPE: u16 = 0x0c;
    /// The first base address register.
    pub const BAR0: u16 = 0x10;
    /// Subsystem vendor and subsystem id.
    pub const SUBSYSTEM: u16 = 0x2c;
    /// Offset of the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line and pin.
    pub const INTERRUPT: u16 = 0x3c;
}
/// Bits of the command register (§6.2.2).
pub mod command {
    /// The function answers to its memory addresses.
    pub const MEMORY: u32 = 1 << 1;
    /// The function may access memory.
    pub const BUS_MASTER: u32 = 1 << 2;
}
/// Capability numbers (§H).
pub mod capability {
    /// Vendor-specific.
    pub const VENDOR: u8 = 0x09;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}
/// Status: there is a list of capabilities (§6.2.3), in the dword of the command.
const HAS_CAPABILITIES: u32 = 1 << 20;
/// Dwords of the conventional configuration space.
const DWORDS: usize = 64;
/// Where the device-specific part begins.
const AFTER_HEADER: u16 = 0x40;

/// A plain configuration space: dwords, and which of their bits a guest can write.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigSpace {
    values: [u32; DWORDS],
    writable: [u32; DWORDS],
    /// Where the next capability goes.
    free: u16,
    /// The last capability so far.
    last: Option<u16>,
}

impl ConfigSpace {
    /// A type 0 header with nothing writable. `class` is class, subclass and interface in 24
    /// bits.
    pub fn new(vendor: u16, device: u16, class: u32, revision: u8) -> Self {
        let (values, writable) = ([0; DWORDS], [0; DWORDS]);
        let mut space = Self { values, writable, free: AFTER_HEADER, last: None };
        space.set(header::IDS, u32::from(device) << 16 | u32::from(vendor), 0);
        space.set(header::CLASS, class << 8 | u32::from(revision), 0);
        space
    }

    /// Sets a dword and its writable bits. Offsets beyond the space are ignored.
    pub fn set(&mut self, offset: u16, value: u32, writable: u32) {
        let index = usize::from(offset / 4);
        if let (Some(v), Some(w)) = (self.values.get_mut(index), self.writable.get_mut(index)) {
            (*v, *w) = (value, writable);
        }
    }

    /// Adds a capability with what follows its number and link; answers its offset, where its
    /// writable bits can be [`set`](Self::set). Capabilities of one function must fit 192 bytes.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        let at = self.free;
        let bytes = [id, 0].into_iter().chain(body.iter().copied());
        for (n, byte) in (0u16..).zip(bytes) {
            let dword = (at + n) & !3;
            self.add_bits(dword, u32::from(byte) << (8 * (n % 4)));
        }
        match self.last.replace(at) {
            Some(last) => self.add_bits(last, u32::from(at) << 8),
            None => {
                self.add_bits(header::CAPABILITIES, at.into());
                self.add_bits(header::COMMAND, HAS_CAPABILITIES);
            }
        }
        self.free = (at + 2 + body.len() as u16).next_multiple_of(4);
        at
    }

    /// Sets bits of a dword, without a change to what is writable.
    fn add_bits(&mut self, offset: u16, bits: u32) {
        if let Some(value) = self.values.get_mut(usize::from(offset / 4)) {
            *value |= bits;
        }
    }

    /// Reads a dword; zero beyond the space, where an extended capability list would begin.
    pub fn read(&self, offset: u16) -> u32 {
        self.values.get(usize::from(offset / 4)).copied().unwrap_or(0)
    }

    /// Writes the writable bits of `mask`.
    pub fn write(&mut self, offset: u16, value: u32, mask: u32) {
        let index = usize::from(offset / 4);
        if let (Some(v), Some(w)) = (self.values.get_mut(index), self.writable.get(index)) {
            *v = *v & !(mask & w) | value & mask & w;
        }
    }

    /// All bytes, to save them.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// Takes back what was saved. `false` where that is not the space of the same function.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let values: Vec<_> =
            bytes.chunks(4).map(|chunk| chunk.try_into().map_or(0, u32::from_le_bytes)).collect();
        let Ok(values) = <[u32; DWORDS]>::try_from(values) else { return false };
        let now = self.values.iter().zip(&self.writable);
        if now.zip(&values).any(|((now, writable), then)| (now ^ then) & !writable != 0) {
            return false;
        }
        self.values = values;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_form_a_list_that_a_driver_can_walk() {
        let mut space = ConfigSpace::new(0x1af4, 0x1042, 0x01_8000, 1);
        space.set(header::COMMAND, 0, command::MEMORY);
        assert_eq!(space.add_capability(capability::MSIX, &[1, 2, 3, 4, 5]), 0x40);
        assert_eq!(space.add_capability(capability::VENDOR, &[7]), 0x48);
        assert_eq!(
            (space.read(header::CAPABILITIES), space.read(header::COMMAND)),
            (0x40, 1 << 20)
        );
        assert_eq!((space.read(0x40), space.read(0x44)), (0x0201_4811, 0x0005_0403));
        assert_eq!(space.read(0x48), 0x0007_0009);
        space.write(header::COMMAND, u32::MAX, u32::MAX);
        assert_eq!(space.read(header::COMMAND), 1 << 20 | 2);
    }

    #[test]
    fn a_saved_space_comes_back_and_that_of_another_function_is_refused() {
        let mut space = ConfigSpace::new(1, 2, 3, 4);
        space.set(header::BAR0, 0, 0xffff_8000);
        let mut same = space.clone();
        space.write(header::BAR0, 0xc000_0000, u32::MAX);
        assert!(same.restore(&space.to_bytes()));
        assert_eq!(same, space);
        let mut other = ConfigSpace::new(1, 3, 3, 4);
        assert!(!other.restore(&space.to_bytes()) && !same.restore(&[0; 255]));
    }
}
