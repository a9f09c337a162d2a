//! The dual 8259A programmable interrupt controller.
//!
//! Source: Intel 8259A datasheet (231468-003), and PIIX §3.4 for the edge/level control
//! registers. Section names below are those of the 8259A datasheet.
use crate::layout::ports;
use device::state::SaveFields;
use device::{Device, MachineBuilder, MapError, PioDevice, RestoreError, SavedState, Shared};
use device::{SharedDevice, saved_fields};
use std::sync::Arc;

/// ICW1: marks an initialisation command word ("Initialization Command Words").
const ICW1: u8 = 1 << 4;
/// ICW1: no cascade, so no ICW3.
const ICW1_SINGLE: u8 = 1 << 1;
/// ICW1: an ICW4 follows.
const ICW1_ICW4: u8 = 1 << 0;
/// ICW4: automatic end of interrupt.
const ICW4_AUTO_EOI: u8 = 1 << 1;
/// ICW4: special fully nested mode.
const ICW4_FULLY_NESTED: u8 = 1 << 4;
/// Marks OCW3 ("Operation Command Words").
const OCW3: u8 = 1 << 3;
/// OCW3: poll command.
const OCW3_POLL: u8 = 1 << 2;
/// OCW3: bit 0 says which register the next reads give.
const OCW3_READ: u8 = 1 << 1;
/// OCW3: bit 5 sets the special mask mode.
const OCW3_SET_MASK_MODE: u8 = 1 << 6;
/// Poll read: an interrupt was pending.
const POLL_PENDING: u8 = 0x80;
/// The master's input that the slave drives.
const CASCADE: u8 = 2;
/// Inputs whose ELCR bit can be set; IRQ 0, 1, 2, 8 and 13 are always edge-triggered.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// Which word a chip expects at its data port.
const READY: u8 = 0;
const WANTS_ICW2: u8 = 2;
const WANTS_ICW3: u8 = 3;
const WANTS_ICW4: u8 = 4;

/// One 8259A.
#[derive(Clone, Debug, PartialEq)]
struct Chip {
    /// Requests, in service, masked.
    irr: u8,
    isr: u8,
    imr: u8,
    /// Levels of the inputs.
    levels: u8,
    /// Which inputs are level-triggered.
    elcr: u8,
    /// ICW2: the vector of input 0.
    vector: u8,
    /// The ICW that is expected next, or [`READY`].
    stage: u8,
    single: bool,
    wants_icw4: bool,
    auto_eoi: bool,
    fully_nested: bool,
    special_mask: bool,
    rotate_on_auto_eoi: bool,
    read_isr: bool,
    poll: bool,
    /// The input with the highest priority.
    first: u8,
}
saved_fields!(Chip: irr, isr, imr, levels, elcr, vector, stage, single, wants_icw4, auto_eoi,
    fully_nested, special_mask, rotate_on_auto_eoi, read_isr, poll, first);

impl Chip {
    /// Not initialised: everything masked, so that nothing is delivered at a vector that nobody
    /// has chosen.
    const RESET: Self = Self {
        irr: 0,
        isr: 0,
        imr: 0xff,
        levels: 0,
        elcr: 0,
        vector: 0,
        stage: READY,
        single: false,
        wants_icw4: false,
        auto_eoi: false,
        fully_nested: false,
        special_mask: false,
        rotate_on_auto_eoi: false,
        read_isr: false,
        poll: false,
        first: 0,
    };

    /// Distance of the most urgent set bit from the highest priority, 8 where none is set.
    fn urgency(&self, bits: u8) -> u32 {
        bits.rotate_right(u32::from(self.first)).trailing_zeros()
    }

    fn input_at(&self, urgency: u32) -> u8 {
        (self.first + urgency as u8) & 7
    }

    /// The input that asks for service, if one is more urgent than what is in service.
    fn pending(&self) -> Option<u8> {
        let urgency = self.urgency(self.irr & !self.imr);
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if self.fully_nested {
            serving &= !(1 << CASCADE);
        }
        (urgency < self.urgency(serving)).then(|| self.input_at(urgency))
    }

    fn set_input(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        let rising = high && self.levels & bit == 0;
        self.levels = if high { self.levels | bit } else { self.levels & !bit };
        if self.elcr & bit != 0 {
            self.irr = (self.irr & !bit) | (self.levels & bit);
        } else if rising {
            self.irr |= bit;
        }
    }

    /// Chooses the level-triggered inputs, which request while they are high.
    fn set_elcr(&mut self, elcr: u8) {
        self.elcr = elcr;
        self.irr = self.irr & !elcr | self.levels & elcr;
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (input + 1) & 7;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            // Level-triggered inputs keep requesting; the edge latches are cleared.
            *self = Self {
                irr: self.levels & self.elcr,
                imr: 0,
                levels: self.levels,
                elcr: self.elcr,
                vector: self.vector,
                stage: WANTS_ICW2,
                single: value & ICW1_SINGLE != 0,
                wants_icw4: value & ICW1_ICW4 != 0,
                ..Self::RESET
            };
        } else if value & OCW3 != 0 {
            self.poll = value & OCW3_POLL != 0;
            if value & OCW3_READ != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & OCW3_SET_MASK_MODE != 0 {
                self.special_mask = value & 1 << 5 != 0;
            }
        } else {
            self.write_ocw2(value >> 5, value & 7);
        }
    }

    fn write_ocw2(&mut self, command: u8, level: u8) {
        match command {
            0b000 | 0b100 => self.rotate_on_auto_eoi = command == 0b100,
            // Non-specific EOI, with or without rotation.
            0b001 | 0b101 => {
                let serving = if self.special_mask { self.isr & !self.imr } else { self.isr };
                let urgency = self.urgency(serving);
                if urgency < 8 {
                    let input = self.input_at(urgency);
                    self.isr &= !(1 << input);
                    if command == 0b101 {
                        self.first = (input + 1) & 7;
                    }
                }
            }
            // Specific EOI, with or without rotation.
            0b011 | 0b111 => {
                self.isr &= !(1 << level);
                if command == 0b111 {
                    self.first = (level + 1) & 7;
                }
            }
            // Set priority.
            0b110 => self.first = (level + 1) & 7,
            // 0b010: no operation.
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.wants_icw4 { WANTS_ICW4 } else { READY };
        match self.stage {
            WANTS_ICW2 => {
                self.vector = value & 0xf8;
                self.stage = if self.single { after_icw3 } else { WANTS_ICW3 };
            }
            // The cascade is wired; ICW3 can only confirm it.
            WANTS_ICW3 => self.stage = after_icw3,
            WANTS_ICW4 => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.fully_nested = value & ICW4_FULLY_NESTED != 0;
                self.stage = READY;
            }
            _ => self.imr = value,
        }
    }
}

/// The callback that carries the level of the master's INTR output. It is called with the PIC's
/// lock held, on each change.
pub type PicOutput = Arc<dyn Fn(bool) + Send + Sync>;

/// Both 8259As, cascaded as in a PC.
pub struct Pic {
    output: PicOutput,
    output_high: bool,
    master: Chip,
    slave: Chip,
}

impl Pic {
    /// Both chips after power-up.
    pub fn new(output: PicOutput) -> Self {
        Self { output, output_high: false, master: Chip::RESET, slave: Chip::RESET }
    }

    /// Sets the level of ISA IRQ 0 to 15. IRQ 2 does not exist: the slave drives it.
    pub fn set_irq(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE | 16.. => return,
            0..=7 => self.master.set_input(irq, high),
            8..=15 => self.slave.set_input(irq - 8, high),
        }
        self.update();
    }

    /// Interrupt acknowledge cycle ("Interrupt Sequence"): the vector, now in service; `None`
    /// where nothing is requested any more, as when the guest masked the input meanwhile. (A CPU
    /// that had committed to the interrupt would get the spurious IRQ 7. Here it commits by this
    /// very call, so IRQ 7 is never spurious. IRQ 15 can be: the master latches the slave's
    /// request.)
    pub fn acknowledge(&mut self) -> Option<u8> {
        let input = self.master.pending()?;
        self.master.acknowledge(input);
        let vector = if input == CASCADE {
            let input = self.slave.pending();
            if let Some(input) = input {
                self.slave.acknowledge(input);
            }
            self.slave.vector | input.unwrap_or(7)
        } else {
            self.master.vector | input
        };
        self.update();
        Some(vector)
    }

    /// Carries the slave's output to the master and the master's to the CPU.
    fn update(&mut self) {
        self.master.set_input(CASCADE, self.slave.pending().is_some());
        let high = self.master.pending().is_some();
        if high != self.output_high {
            self.output_high = high;
            (self.output)(high);
        }
    }

    fn chip(&mut self, port: u16) -> &mut Chip {
        if port & 0x80 == 0 { &mut self.master } else { &mut self.slave }
    }
}

impl PioDevice for Pic {
    fn read_byte(&mut self, port: u16) -> u8 {
        match port {
            ports::ELCR => return self.master.elcr,
            ELCR_SLAVE => return self.slave.elcr,
            _ => {}
        }
        let chip = self.chip(port);
        if chip.poll {
            // The read is the acknowledge cycle ("Poll Command").
            chip.poll = false;
            let answer = chip.pending().map_or(0, |input| {
                chip.acknowledge(input);
                POLL_PENDING | input
            });
            self.update();
            return answer;
        }
        match port & 1 {
            0 if chip.read_isr => chip.isr,
            0 => chip.irr,
            _ => chip.imr,
        }
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        match port {
            ports::ELCR => self.master.set_elcr(value & ELCR_WRITABLE[0]),
            ELCR_SLAVE => self.slave.set_elcr(value & ELCR_WRITABLE[1]),
            _ if port & 1 == 0 => self.chip(port).write_command(value),
            _ => self.chip(port).write_data(value),
        }
        self.update();
    }
}

const ELCR_SLAVE: u16 = ports::ELCR + 1;

impl Device for Pic {
    fn name(&self) -> &str {
        "pic"
    }
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        for chip in [&mut self.master, &mut self.slave] {
            *chip = Chip { levels: chip.levels, ..Chip::RESET };
        }
        self.update();
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new("pic", 1);
        self.master.save_fields("master.", &mut state);
        self.slave.save_fields("slave.", &mut state);
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("pic", 1)?;
        self.master.restore_fields("master.", &mut reader)?;
        self.slave.restore_fields("slave.", &mut reader)?;
        for (chip, field) in [(&self.master, "master.first"), (&self.slave, "slave.first")] {
            if chip.first > 7 {
                return Err(reader.out_of_range(field));
            }
        }
        reader.finish()?;
        self.update();
        Ok(())
    }
}

impl Pic {
    /// Puts the PIC at its ports.
    pub(crate) fn wire(
        this: &Shared<Self>,
        machine: &mut dyn MachineBuilder,
    ) -> Result<(), MapError> {
        let device: SharedDevice = this.clone();
        for first in [ports::PIC_MASTER, ports::PIC_SLAVE, ports::ELCR] {
            machine.map_ports(first..=first + 1, &device)?;
        }
        machine.add_device(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::{lock, share};
    use std::sync::atomic::{AtomicBool, Ordering};

    fn pic() -> (Pic, Arc<AtomicBool>) {
        let level = Arc::new(AtomicBool::new(false));
        let copy = level.clone();
        let mut pic = Pic::new(Arc::new(move |high| copy.store(high, Ordering::Relaxed)));
        initialise(&mut pic, 0x01);
        (pic, level)
    }

    /// As Linux does: vectors 0x30 and 0x38.
    fn initialise(pic: &mut Pic, icw4: u8) {
        for (base, vector, icw3) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            pic.write_byte(base, 0x11);
            for word in [vector, icw3, icw4, 0] {
                pic.write_byte(base + 1, word);
            }
        }
    }

    #[test]
    fn an_edge_is_delivered_once_and_ends_with_eoi() {
        let (mut pic, output) = pic();
        pic.set_irq(4, true);
        assert!(output.load(Ordering::Relaxed));
        assert_eq!(pic.acknowledge(), Some(0x34));
        assert!(!output.load(Ordering::Relaxed));
        pic.write_byte(0x20, 0x20);
        assert_eq!(pic.acknowledge(), None, "the level is still high, but no new edge came");
        pic.set_irq(4, false);
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), Some(0x34));
    }

    #[test]
    fn a_slave_interrupt_comes_through_the_cascade() {
        let (mut pic, _) = pic();
        pic.set_irq(8, true);
        assert_eq!(pic.acknowledge(), Some(0x38));
        pic.set_irq(12, true);
        assert_eq!(pic.acknowledge(), None, "IRQ 8 has priority");
        pic.write_byte(0xa0, 0x20);
        pic.write_byte(0x20, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x3c));
    }

    #[test]
    fn a_more_urgent_interrupt_nests() {
        let (mut pic, output) = pic();
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), Some(0x35));
        pic.set_irq(6, true);
        assert!(!output.load(Ordering::Relaxed));
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), Some(0x31));
    }

    #[test]
    fn a_masked_input_waits_for_its_unmasking() {
        let (mut pic, output) = pic();
        pic.write_byte(0x21, 0xff);
        pic.set_irq(3, true);
        assert!(!output.load(Ordering::Relaxed));
        assert_eq!(pic.read_byte(0x20), 0x08, "IRR");
        pic.write_byte(0x21, 0xf7);
        assert_eq!(pic.acknowledge(), Some(0x33));
        pic.write_byte(0x20, 0x0b);
        assert_eq!(pic.read_byte(0x20), 0x08, "ISR");
    }

    #[test]
    fn a_slave_request_masked_too_late_is_a_spurious_irq_15() {
        let (mut pic, _) = pic();
        pic.set_irq(10, true);
        // The master has latched the cascade; the slave's request is gone.
        pic.write_byte(0xa1, 0xff);
        assert_eq!(pic.acknowledge(), Some(0x3f));
        pic.write_byte(0xa0, 0x0b);
        assert_eq!(pic.read_byte(0xa0), 0, "nothing is in service on the slave");
    }

    #[test]
    fn a_level_triggered_input_asks_again_until_it_falls() {
        let (mut pic, output) = pic();
        pic.write_byte(0x4d1, 0xff);
        assert_eq!(pic.read_byte(0x4d1), 0xde);
        pic.set_irq(9, true);
        for _ in 0..2 {
            assert_eq!(pic.acknowledge(), Some(0x39));
            pic.write_byte(0xa0, 0x61);
            pic.write_byte(0x20, 0x62);
        }
        pic.set_irq(9, false);
        pic.acknowledge();
        pic.write_byte(0x20, 0x62);
        assert!(!output.load(Ordering::Relaxed));
    }

    #[test]
    fn an_input_that_is_high_asks_as_soon_as_it_becomes_level_triggered() {
        let (mut pic, output) = pic();
        pic.set_irq(5, true);
        initialise(&mut pic, 0x01);
        assert!(!output.load(Ordering::Relaxed), "initialisation clears the edge");
        pic.write_byte(0x4d0, 0x20);
        assert_eq!(pic.acknowledge(), Some(0x35));
    }

    #[test]
    fn rotation_makes_the_served_input_the_least_urgent() {
        let (mut pic, _) = pic();
        pic.set_irq(3, true);
        assert_eq!(pic.acknowledge(), Some(0x33));
        pic.write_byte(0x20, 0xa0);
        pic.set_irq(3, false);
        pic.set_irq(3, true);
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), Some(0x34));
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let (mut pic, _) = pic();
        initialise(&mut pic, 0x03);
        pic.set_irq(7, true);
        assert_eq!(pic.acknowledge(), Some(0x37));
        pic.write_byte(0x20, 0x0b);
        assert_eq!(pic.read_byte(0x20), 0);
    }

    #[test]
    fn special_mask_mode_lets_less_urgent_interrupts_in() {
        let (mut pic, _) = pic();
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), Some(0x31));
        pic.write_byte(0x21, 0x02);
        pic.write_byte(0x20, 0x68);
        pic.set_irq(6, true);
        assert_eq!(pic.acknowledge(), Some(0x36));
    }

    #[test]
    fn polling_acknowledges() {
        let (mut pic, output) = pic();
        pic.set_irq(6, true);
        pic.write_byte(0x20, 0x0c);
        assert_eq!(pic.read_byte(0x20), 0x86);
        assert!(!output.load(Ordering::Relaxed));
        pic.write_byte(0x20, 0x0c);
        assert_eq!(pic.read_byte(0x20), 0);
    }

    #[test]
    fn a_restored_pic_goes_on_where_it_was() {
        let (mut pic, _) = pic();
        pic.set_irq(14, true);
        let (old, output) = (pic.save(), Arc::new(AtomicBool::new(false)));
        let copy = output.clone();
        let restored = share(Pic::new(Arc::new(move |high| copy.store(high, Ordering::Relaxed))));
        lock(&restored).restore(&old).unwrap();
        assert!(output.load(Ordering::Relaxed));
        assert_eq!(lock(&restored).acknowledge(), Some(0x3e));
    }
}
