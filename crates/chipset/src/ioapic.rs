//! The I/O APIC: 24 inputs, each turned into a message-signalled interrupt.
//!
//! Source: Intel 82093AA datasheet (290566-001), section 3; ICH10 §13.5 for the EOI register of
//! version 20H; Intel SDM 3A 10.11 for the messages.
use crate::layout;
use device::{
    Device, GuestPhysical, MachineBuilder, MapError, MmioDevice, MsiSink, RestoreError, SavedState,
    Shared, SharedDevice, Width,
};
use std::sync::Arc;

/// Register windows, by offset (82093AA §3.1).
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;
/// Indirect registers (82093AA §3.2).
const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_REDIRECTION: u8 = 0x10;
/// Version with an EOI register.
const VERSION: u32 = 0x20;

/// Fields of a redirection entry (82093AA §3.2.4).
const ENTRY_VECTOR: u64 = 0xff;
const ENTRY_DELIVERY: u64 = 7 << 8;
const ENTRY_LOGICAL: u64 = 1 << 11;
const ENTRY_STATUS: u64 = 1 << 12;
const ENTRY_REMOTE_IRR: u64 = 1 << 14;
const ENTRY_LEVEL: u64 = 1 << 15;
const ENTRY_MASKED: u64 = 1 << 16;
const ENTRY_READ_ONLY: u64 = ENTRY_STATUS | ENTRY_REMOTE_IRR;
const ENTRY_WRITABLE: u64 = 0xff00_0000_0001_ffff & !ENTRY_READ_ONLY;

/// Fields of a message (Intel SDM 3A 10.11).
const MSI_ADDRESS: u64 = 0xfee0_0000;
const MSI_LOGICAL: u64 = 1 << 2;
const MSI_ASSERT: u32 = 1 << 14;
const MSI_LEVEL: u32 = 1 << 15;

const PINS: usize = layout::IOAPIC_PINS;

/// The I/O APIC. Lines are asserted or not: the polarity bit of an entry is kept, but the line's
/// electrical level is not modelled.
pub struct IoApic {
    msi: Arc<dyn MsiSink>,
    id: u8,
    select: u8,
    /// Levels of the inputs, a bit each.
    levels: u32,
    entries: [u64; PINS],
}

impl IoApic {
    /// The I/O APIC after power-up: all inputs masked.
    pub fn new(msi: Arc<dyn MsiSink>) -> Self {
        let id = layout::IOAPIC_ID;
        Self { msi, id, select: 0, levels: 0, entries: [ENTRY_MASKED; PINS] }
    }

    /// Sets the level of an input. Inputs that do not exist are ignored.
    pub fn set_pin(&mut self, pin: usize, high: bool) {
        let Some(&entry) = self.entries.get(pin) else { return };
        let bit = 1 << pin;
        let rising = high && self.levels & bit == 0;
        self.levels = if high { self.levels | bit } else { self.levels & !bit };
        // An edge at a masked input is lost (82093AA §3.2.4, bit 16); a level waits.
        if rising && entry & ENTRY_MASKED == 0 {
            self.deliver(pin);
        }
    }

    /// A local APIC ended the level-triggered interrupt `vector`: what is still asserted is
    /// delivered again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let Some(entry) = self.entries.get_mut(pin) else { continue };
            if *entry & ENTRY_REMOTE_IRR != 0 && *entry & ENTRY_VECTOR == u64::from(vector) {
                *entry &= !ENTRY_REMOTE_IRR;
                self.deliver_level(pin);
            }
        }
    }

    /// Delivers a level-triggered input that is asserted, not masked and not in service.
    fn deliver_level(&mut self, pin: usize) {
        let Some(&entry) = self.entries.get(pin) else { return };
        let blocked = entry & (ENTRY_MASKED | ENTRY_REMOTE_IRR) != 0;
        if entry & ENTRY_LEVEL != 0 && !blocked && self.levels & (1 << pin) != 0 {
            self.deliver(pin);
        }
    }

    fn deliver(&mut self, pin: usize) {
        let Some(entry) = self.entries.get_mut(pin) else { return };
        let mut data = (*entry & (ENTRY_VECTOR | ENTRY_DELIVERY)) as u32;
        if *entry & ENTRY_LEVEL != 0 {
            if *entry & ENTRY_REMOTE_IRR != 0 {
                return;
            }
            *entry |= ENTRY_REMOTE_IRR;
            data |= MSI_LEVEL | MSI_ASSERT;
        }
        let destination = *entry >> 56;
        let logical = if *entry & ENTRY_LOGICAL != 0 { MSI_LOGICAL } else { 0 };
        self.msi.signal(MSI_ADDRESS | destination << 12 | logical, data);
    }

    fn read_register(&self) -> u32 {
        match self.select {
            REG_ID | REG_ARBITRATION => u32::from(self.id) << 24,
            REG_VERSION => VERSION | (PINS as u32 - 1) << 16,
            REG_REDIRECTION.. => {
                let index = self.select - REG_REDIRECTION;
                let entry = self.entries.get(usize::from(index / 2)).copied().unwrap_or(0);
                (entry >> (32 * (index & 1))) as u32
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, value: u32) {
        if self.select == REG_ID {
            self.id = (value >> 24) as u8 & 0xf;
        }
        let Some(index) = self.select.checked_sub(REG_REDIRECTION) else { return };
        let pin = usize::from(index / 2);
        let Some(entry) = self.entries.get_mut(pin) else { return };
        let shift = 32 * (index & 1);
        let writable = ENTRY_WRITABLE & 0xffff_ffff << shift;
        *entry = *entry & !writable | u64::from(value) << shift & writable;
        if *entry & ENTRY_LEVEL == 0 {
            // Guests end an interrupt by switching its entry to edge and back.
            *entry &= !ENTRY_REMOTE_IRR;
        }
        self.deliver_level(pin);
    }
}

impl MmioDevice for IoApic {
    fn read(&mut self, address: GuestPhysical, _: Width) -> u64 {
        match address.0 - layout::IOAPIC.0 {
            IOREGSEL => self.select.into(),
            IOWIN => self.read_register().into(),
            _ => 0,
        }
    }
    fn write(&mut self, address: GuestPhysical, _: Width, value: u64) {
        match address.0 - layout::IOAPIC.0 {
            IOREGSEL => self.select = value as u8,
            IOWIN => self.write_register(value as u32),
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn name(&self) -> &str {
        "ioapic"
    }
    fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        self.id = layout::IOAPIC_ID;
        self.select = 0;
        self.entries = [ENTRY_MASKED; PINS];
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new("ioapic", 1);
        state.put("id", &self.id);
        state.put("select", &self.select);
        state.put("levels", &self.levels);
        for (pin, entry) in self.entries.iter().enumerate() {
            state.put(&format!("entry{pin}"), entry);
        }
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("ioapic", 1)?;
        self.id = reader.get_if("id", |id| *id <= 0xf)?;
        self.select = reader.get("select")?;
        self.levels = reader.get_if("levels", |levels| levels >> PINS == 0)?;
        for (pin, entry) in self.entries.iter_mut().enumerate() {
            let valid = |entry: &u64| entry & !(ENTRY_WRITABLE | ENTRY_READ_ONLY) == 0;
            *entry = reader.get_if(&format!("entry{pin}"), valid)?;
        }
        // What was delivered is part of the local APICs' state: nothing is delivered again.
        reader.finish()
    }
}

impl IoApic {
    /// Puts the I/O APIC at its address.
    pub(crate) fn wire(
        this: &Shared<Self>,
        machine: &mut dyn MachineBuilder,
    ) -> Result<(), MapError> {
        let device: SharedDevice = this.clone();
        machine.map_mmio(layout::IOAPIC, layout::IOAPIC_LENGTH, &device)?;
        machine.add_device(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::testing::RecordingMsi;

    fn ioapic() -> (IoApic, Arc<RecordingMsi>) {
        let msi = Arc::new(RecordingMsi::default());
        (IoApic::new(msi.clone()), msi)
    }
    fn set(ioapic: &mut IoApic, register: u8, value: u32) {
        ioapic.write(GuestPhysical(layout::IOAPIC.0), Width::Dword, register.into());
        ioapic.write(GuestPhysical(layout::IOAPIC.0 + IOWIN), Width::Dword, value.into());
    }
    fn get(ioapic: &mut IoApic, register: u8) -> u32 {
        ioapic.write(GuestPhysical(layout::IOAPIC.0), Width::Dword, register.into());
        ioapic.read(GuestPhysical(layout::IOAPIC.0 + IOWIN), Width::Dword) as u32
    }

    #[test]
    fn the_version_register_says_24_inputs() {
        assert_eq!(get(&mut ioapic().0, 1), 0x0017_0020);
    }

    #[test]
    fn an_edge_becomes_one_message() {
        let (mut ioapic, msi) = ioapic();
        set(&mut ioapic, 0x10 + 9, 0x0300_0000);
        set(&mut ioapic, 0x10 + 8, 0x0931);
        ioapic.set_pin(4, true);
        ioapic.set_pin(4, true);
        assert_eq!(msi.take(), [(0xfee0_3004, 0x0131)], "logical 3, lowest priority");
        ioapic.set_pin(4, false);
        ioapic.set_pin(4, true);
        assert_eq!(msi.take().len(), 1);
    }

    #[test]
    fn an_edge_at_a_masked_input_is_lost_and_a_level_waits() {
        let (mut ioapic, msi) = ioapic();
        ioapic.set_pin(4, true);
        ioapic.set_pin(9, true);
        set(&mut ioapic, 0x10 + 8, 0x31);
        set(&mut ioapic, 0x10 + 18, 0x8039);
        assert_eq!(msi.take(), [(0xfee0_0000, 0xc039)]);
    }

    #[test]
    fn a_level_is_delivered_again_after_each_eoi_while_it_is_high() {
        let (mut ioapic, msi) = ioapic();
        set(&mut ioapic, 0x10 + 18, 0x8039);
        ioapic.set_pin(9, true);
        assert_eq!(get(&mut ioapic, 0x10 + 18), 0xc039, "remote IRR");
        ioapic.set_pin(9, false);
        ioapic.set_pin(9, true);
        assert_eq!(msi.take().len(), 1, "still in service");
        ioapic.end_of_interrupt(0x38);
        assert_eq!(msi.take().len(), 0, "another vector");
        ioapic.write(GuestPhysical(layout::IOAPIC.0 + EOI), Width::Dword, 0x39);
        assert_eq!(msi.take().len(), 1);
        ioapic.set_pin(9, false);
        ioapic.end_of_interrupt(0x39);
        assert_eq!(msi.take().len(), 0);
        assert_eq!(get(&mut ioapic, 0x10 + 18), 0x8039);
    }

    #[test]
    fn switching_to_edge_and_back_ends_an_interrupt() {
        let (mut ioapic, msi) = ioapic();
        set(&mut ioapic, 0x10 + 18, 0x8039);
        ioapic.set_pin(9, true);
        set(&mut ioapic, 0x10 + 18, 0x1_0039);
        set(&mut ioapic, 0x10 + 18, 0x8039);
        assert_eq!(msi.take().len(), 2);
    }

    #[test]
    fn registers_beyond_the_last_input_read_zero_and_ignore_writes() {
        let (mut ioapic, _) = ioapic();
        set(&mut ioapic, 0x40, 0xffff_ffff);
        set(&mut ioapic, 0xff, 0xffff_ffff);
        assert_eq!((get(&mut ioapic, 0x40), get(&mut ioapic, 0xff)), (0, 0));
    }

    #[test]
    fn a_restored_ioapic_waits_for_the_same_eoi() {
        let (mut old, _) = ioapic();
        set(&mut old, 0x10 + 18, 0x8039);
        old.set_pin(9, true);
        let (mut new, msi) = ioapic();
        new.restore(&old.save()).unwrap();
        assert_eq!(msi.take(), []);
        new.end_of_interrupt(0x39);
        assert_eq!(msi.take(), [(0xfee0_0000, 0xc039)]);
    }
}
