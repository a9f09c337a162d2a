//! The i8042 keyboard controller without keyboard or mouse, and system control port A (0x92).
//!
//! Source: IBM PS/2 Hardware Technical Reference, keyboard and auxiliary device controller;
//! ICH10 §13.7.2 for port 0x92. Guests use it to reset the machine and to open the A20 gate,
//! and probe it for devices: each probe is answered at once, since silence costs a guest half a
//! second per command. A20 is always open; its bit is only remembered.
use crate::layout::{self, ports};
use device::state::SaveFields;
use device::{
    Device, IrqLine, MachineBuilder, MapError, PioDevice, PowerEvent, PowerSink, RestoreError,
    SavedState, Shared, SharedDevice, Wire, saved_fields, share,
};
use std::sync::Arc;

/// Status register.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX: u8 = 1 << 5;
const STATUS_TIMEOUT: u8 = 1 << 6;
/// Configuration byte.
const CONFIG_KEYBOARD_IRQ: u8 = 1 << 0;
const CONFIG_AUX_IRQ: u8 = 1 << 1;
const CONFIG_SYSTEM: u8 = 1 << 2;
const CONFIG_KEYBOARD_OFF: u8 = 1 << 4;
const CONFIG_AUX_OFF: u8 = 1 << 5;
const CONFIG_TRANSLATE: u8 = 1 << 6;
const CONFIG_WRITABLE: u8 = 0x77;
/// Output port: reset (low resets), A20.
const OUTPUT_NO_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;
/// Commands.
const READ_CONFIG: u8 = 0x20;
const WRITE_CONFIG: u8 = 0x60;
const DISABLE_AUX: u8 = 0xa7;
const ENABLE_AUX: u8 = 0xa8;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_INPUT_PORT: u8 = 0xc0;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const WRITE_KEYBOARD_OUTPUT: u8 = 0xd2;
const WRITE_AUX_OUTPUT: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
/// Pulses the output port's lines whose bits are zero.
const PULSE: u8 = 0xf0;
/// Answers.
const SELF_TEST_PASSED: u8 = 0x55;
const TEST_PASSED: u8 = 0x00;
const CLOCK_STUCK_LOW: u8 = 0x01;
const INPUT_PORT_UNLOCKED: u8 = 0x80;
/// What the controller puts in place of the answer of a device that gives none.
const RESEND: u8 = 0xfe;
/// Port 0x92.
const A_RESET: u8 = 1 << 0;
const A_A20: u8 = 1 << 1;

#[derive(Clone, Debug, PartialEq)]
struct Registers {
    config: u8,
    output_port: u8,
    /// The command that waits for its data byte, or 0.
    command: u8,
    /// The last write was a command.
    command_last: bool,
    /// The output buffer, full where its status bits are not 0.
    output: u8,
    output_status: u8,
}
saved_fields!(Registers: config, output_port, command, command_last, output, output_status);

impl Registers {
    const RESET: Self = Self {
        config: CONFIG_SYSTEM | CONFIG_AUX_OFF | CONFIG_TRANSLATE,
        output_port: OUTPUT_NO_RESET | OUTPUT_A20,
        command: 0,
        command_last: false,
        output: 0,
        output_status: 0,
    };
}

/// The controller.
pub struct I8042 {
    power: Arc<dyn PowerSink>,
    keyboard_irq: IrqLine,
    aux_irq: IrqLine,
    registers: Registers,
}

impl I8042 {
    /// Fills the output buffer. `status` may name the auxiliary device or a timeout.
    fn answer(&mut self, value: u8, status: u8) {
        self.registers.output = value;
        self.registers.output_status = STATUS_OUTPUT_FULL | status;
        self.update_irqs();
    }

    fn update_irqs(&self) {
        let Registers { config, output_status, .. } = self.registers;
        let full = output_status & STATUS_OUTPUT_FULL != 0;
        let aux = output_status & STATUS_AUX != 0;
        self.keyboard_irq.set(full && !aux && config & CONFIG_KEYBOARD_IRQ != 0);
        self.aux_irq.set(full && aux && config & CONFIG_AUX_IRQ != 0);
    }

    fn write_output_port(&mut self, value: u8) {
        self.registers.output_port = value | OUTPUT_NO_RESET;
        if value & OUTPUT_NO_RESET == 0 {
            self.power.request(PowerEvent::Reset);
        }
    }

    fn write_command(&mut self, command: u8) {
        self.registers.command_last = true;
        self.registers.command = 0;
        match command {
            READ_CONFIG => self.answer(self.registers.config, 0),
            WRITE_CONFIG
            | WRITE_OUTPUT_PORT
            | WRITE_KEYBOARD_OUTPUT
            | WRITE_AUX_OUTPUT
            | WRITE_AUX => self.registers.command = command,
            DISABLE_AUX => self.registers.config |= CONFIG_AUX_OFF,
            ENABLE_AUX => self.registers.config &= !CONFIG_AUX_OFF,
            // No auxiliary port: guests take a stuck clock for that.
            TEST_AUX => self.answer(CLOCK_STUCK_LOW, 0),
            SELF_TEST => self.answer(SELF_TEST_PASSED, 0),
            TEST_KEYBOARD => self.answer(TEST_PASSED, 0),
            DISABLE_KEYBOARD => self.registers.config |= CONFIG_KEYBOARD_OFF,
            ENABLE_KEYBOARD => self.registers.config &= !CONFIG_KEYBOARD_OFF,
            READ_INPUT_PORT => self.answer(INPUT_PORT_UNLOCKED, 0),
            READ_OUTPUT_PORT => self.answer(self.registers.output_port, 0),
            PULSE.. if command & OUTPUT_NO_RESET == 0 => self.power.request(PowerEvent::Reset),
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.registers.command_last = false;
        match std::mem::take(&mut self.registers.command) {
            WRITE_CONFIG => {
                self.registers.config = value & CONFIG_WRITABLE;
                self.update_irqs();
            }
            WRITE_OUTPUT_PORT => self.write_output_port(value),
            // Without an auxiliary port its loop gives the byte as the keyboard's.
            WRITE_KEYBOARD_OUTPUT | WRITE_AUX_OUTPUT => self.answer(value, 0),
            WRITE_AUX => self.answer(RESEND, STATUS_AUX | STATUS_TIMEOUT),
            // To the keyboard.
            _ => self.answer(RESEND, STATUS_TIMEOUT),
        }
    }
}

impl PioDevice for I8042 {
    fn read_byte(&mut self, port: u16) -> u8 {
        match port {
            ports::I8042_DATA => {
                self.registers.output_status = 0;
                self.update_irqs();
                self.registers.output
            }
            ports::I8042_COMMAND => {
                let system =
                    if self.registers.config & CONFIG_SYSTEM != 0 { STATUS_SYSTEM } else { 0 };
                let command = if self.registers.command_last { STATUS_COMMAND } else { 0 };
                self.registers.output_status | system | command | STATUS_UNLOCKED
            }
            _ if self.registers.output_port & OUTPUT_A20 != 0 => A_A20,
            _ => 0,
        }
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        match port {
            ports::I8042_DATA => self.write_data(value),
            ports::I8042_COMMAND => self.write_command(value),
            _ => {
                let a20 = if value & A_A20 != 0 { OUTPUT_A20 } else { 0 };
                self.registers.output_port = self.registers.output_port & !OUTPUT_A20 | a20;
                if value & A_RESET != 0 {
                    self.power.request(PowerEvent::Reset);
                }
            }
        }
    }
}

impl Device for I8042 {
    fn name(&self) -> &str {
        "i8042"
    }
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        self.registers = Registers::RESET;
        self.update_irqs();
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new("i8042", 1);
        self.registers.save_fields("", &mut state);
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("i8042", 1)?;
        self.registers.restore_fields("", &mut reader)?;
        reader.finish()?;
        self.update_irqs();
        Ok(())
    }
}

/// A controller at its usual ports, on IRQ 1 and 12.
#[derive(Debug)]
pub struct I8042Config;

impl Wire for I8042Config {
    type Handle = Shared<I8042>;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError> {
        let controller = share(I8042 {
            power: machine.power(),
            keyboard_irq: machine.irq(layout::isa_irq(layout::KEYBOARD_IRQ)),
            aux_irq: machine.irq(layout::isa_irq(layout::AUX_IRQ)),
            registers: Registers::RESET,
        });
        let device: SharedDevice = controller.clone();
        for port in [ports::I8042_DATA, ports::I8042_COMMAND, ports::SYSTEM_CONTROL_A] {
            machine.map_ports(port..=port, &device)?;
        }
        machine.add_device(device)?;
        Ok(controller)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::testing::TestMachine;

    fn machine() -> TestMachine {
        let mut machine = TestMachine::default();
        I8042Config.wire(machine.builder()).unwrap();
        machine
    }
    fn command(machine: &TestMachine, bytes: &[u8]) -> u8 {
        machine.outb(0x64, bytes[0]);
        bytes[1..].iter().for_each(|byte| machine.outb(0x60, *byte));
        machine.inb(0x60)
    }

    #[test]
    fn linux_finds_the_controller_and_no_mouse_without_waiting() {
        let machine = machine();
        assert_eq!(machine.inb(0x64) & STATUS_OUTPUT_FULL, 0);
        assert_eq!(command(&machine, &[SELF_TEST]), 0x55);
        machine.outb(0x64, WRITE_AUX_OUTPUT);
        machine.outb(0x60, 0x5a);
        assert_eq!(machine.inb(0x64) & (STATUS_AUX | STATUS_OUTPUT_FULL), STATUS_OUTPUT_FULL);
        machine.inb(0x60);
        assert_eq!(command(&machine, &[TEST_AUX]), CLOCK_STUCK_LOW);
        assert_eq!(command(&machine, &[TEST_KEYBOARD]), 0);
    }

    #[test]
    fn a_byte_to_the_missing_keyboard_times_out_at_once_with_an_interrupt() {
        let machine = machine();
        machine.outb(0x64, WRITE_CONFIG);
        machine.outb(0x60, CONFIG_KEYBOARD_IRQ);
        machine.outb(0x60, 0xf2);
        let status = STATUS_OUTPUT_FULL | STATUS_TIMEOUT;
        assert_eq!(machine.inb(0x64) & status, status);
        assert_eq!(machine.inb(0x60), RESEND);
        assert_eq!(machine.interrupts.take(), [(device::Gsi(1), true), (device::Gsi(1), false)]);
    }

    #[test]
    fn each_way_to_reset_resets() {
        let machine = machine();
        machine.outb(0x64, 0xfe);
        machine.outb(0x92, 0x01);
        machine.outb(0x64, WRITE_OUTPUT_PORT);
        machine.outb(0x60, 0x02);
        assert_eq!(machine.power.take(), [PowerEvent::Reset; 3]);
        machine.outb(0x64, 0xff);
        assert_eq!(machine.power.take(), []);
    }

    #[test]
    fn a20_reads_back_through_both_of_its_ports() {
        let machine = machine();
        assert_eq!(machine.inb(0x92), 2);
        machine.outb(0x92, 0);
        assert_eq!(command(&machine, &[READ_OUTPUT_PORT]) & OUTPUT_A20, 0);
        machine.outb(0x64, WRITE_OUTPUT_PORT);
        machine.outb(0x60, 0xdf);
        assert_eq!(machine.inb(0x92), 2);
    }

    #[test]
    fn an_answer_that_was_not_read_survives_a_restore() {
        let old = machine();
        old.outb(0x64, SELF_TEST);
        let new = machine();
        let state = device::lock(&old.devices()[0]).save();
        device::lock(&new.devices()[0]).restore(&state).unwrap();
        assert_eq!((new.inb(0x64) & 1, new.inb(0x60)), (1, 0x55));
    }
}
