//! The 16550A serial port.
//!
//! Source: National Semiconductor PC16550D datasheet (RRD-B30M75), section 8. The line is
//! infinitely fast: a written byte has left at once, so the transmitter is always empty, and the
//! character timeout comes as soon as fewer bytes wait than the trigger level.
use crate::layout::{self, ports};
use device::state::SaveFields;
use device::{
    Alarm, AlarmDevice, Clock, Device, IrqLine, MachineBuilder, MapError, PioDevice, RestoreError,
    SavedState, Shared, SharedDevice, Wire, saved_fields, share,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Registers by offset (8.0, table II).
const DATA: u16 = 0;
const IER: u16 = 1;
const IIR_FCR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCR: u16 = 7;

/// Interrupt enable register (8.7).
const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;
/// Interrupt identification register (8.6).
const IIR_NONE: u8 = 0x01;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_TRANSMIT_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;
/// FIFO control register (8.5).
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;
/// Line control register (8.1): divisor latch access.
const LCR_DLAB: u8 = 1 << 7;
/// Modem control register (8.8).
const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_WRITABLE: u8 = 0x1f;
/// Line status register (8.4).
const LSR_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_EMPTY: u8 = 3 << 5;
/// Modem status register (8.9).
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// What a connected peer shows.
const MSR_CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_DCD;
/// The delta bit of RI marks its trailing edge only.
const MSR_DELTA_RI: u8 = 1 << 2;

const FIFO_SIZE: usize = 16;
/// Bytes of input that wait for room in the FIFO at most.
const INPUT_LIMIT: usize = 4096;
/// Output is handed over at the latest when so many bytes are there, ...
const OUTPUT_BATCH: usize = 512;
/// ... or after this time, ...
/// How long after clearing the FIFO a driver that does not enable the receive interrupt is taken
/// to be starting up.
const START_UP: Duration = Duration::from_millis(20);
const OUTPUT_DELAY: Duration = Duration::from_millis(2);
/// ... or at the end of a line.
const NEWLINE: u8 = b'\n';

/// What a serial port is connected to. Called with the port's lock held.
pub trait SerialOutput: Send {
    /// The guest sent these bytes. They come in batches: a line, or what was sent within two
    /// milliseconds.
    fn write(&mut self, bytes: &[u8]);
    /// The input queue was full ([`Uart::push_input`] took less than it was given) and has room
    /// again.
    fn input_room(&mut self) {}
}

/// The registers.
#[derive(Clone, Debug, PartialEq)]
struct Registers {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: u16,
    fifo: bool,
    /// Received bytes that raise the interrupt: 1, 4, 8 or 14.
    trigger: usize,
    /// LSR's overrun error.
    overrun: bool,
    /// MSR's delta bits.
    deltas: u8,
    /// The transmitter-empty interrupt has not been acknowledged.
    transmit_empty: bool,
}
saved_fields!(Registers: ier, lcr, mcr, scr, divisor, fifo, trigger, overrun, deltas,
    transmit_empty);

impl Registers {
    /// After master reset (table III), at 9600 baud.
    const RESET: Self = Self {
        ier: 0,
        lcr: 0,
        mcr: 0,
        scr: 0,
        divisor: 12,
        fifo: false,
        trigger: 1,
        overrun: false,
        deltas: 0,
        transmit_empty: false,
    };
}

/// A serial port.
pub struct Uart {
    name: String,
    base: u16,
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    irq: IrqLine,
    peer: Box<dyn SerialOutput>,
    registers: Registers,
    /// The receive FIFO: 1 byte with FIFOs disabled, else 16.
    received: VecDeque<u8>,
    /// Input that has no room there yet.
    input: VecDeque<u8>,
    input_refused: bool,
    /// Input waits until then, or until the guest enables the receive interrupt: see
    /// [`Uart::hold_input`].
    held_until: Option<Duration>,
    output: Vec<u8>,
    alarm_set: bool,
}

impl Uart {
    /// Takes input for the guest: as much as there is room for. Returns how many bytes were
    /// taken; [`SerialOutput::input_room`] says when there is room for more.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_LIMIT.saturating_sub(self.input.len()));
        self.input.extend(bytes.iter().take(taken));
        self.input_refused = taken < bytes.len();
        self.receive_input();
        taken
    }

    /// Hands buffered output over now, as before the machine stops.
    pub fn flush(&mut self) {
        if !self.output.is_empty() {
            self.peer.write(&self.output);
            self.output.clear();
        }
    }

    /// Takes what the guest is about to clear out of the FIFO back into the queue, and keeps it
    /// there for a moment. A driver that starts up clears the FIFO and reads the data register to
    /// drop what a modem left there; what a user typed or piped in meanwhile is not that.
    fn hold_input(&mut self) {
        if !self.looped() {
            for byte in self.received.drain(..).rev() {
                self.input.push_front(byte);
            }
            self.held_until = Some(self.clock.now() + START_UP);
        }
    }

    /// Whether input must still wait.
    fn holds_input(&mut self) -> bool {
        let listening = self.registers.ier & IER_RECEIVED != 0;
        if listening || self.held_until.is_some_and(|until| self.clock.now() >= until) {
            self.held_until = None;
        }
        self.held_until.is_some()
    }

    const fn looped(&self) -> bool {
        self.registers.mcr & MCR_LOOP != 0
    }

    const fn capacity(&self) -> usize {
        if self.registers.fifo { FIFO_SIZE } else { 1 }
    }

    /// Moves waiting input into the FIFO. In loopback the line is disconnected.
    fn receive_input(&mut self) {
        if !self.looped() && !self.holds_input() {
            let room = self.capacity().saturating_sub(self.received.len()).min(self.input.len());
            self.received.extend(self.input.drain(..room));
        }
        if self.input_refused && self.input.len() <= INPUT_LIMIT / 2 {
            self.input_refused = false;
            self.peer.input_room();
        }
        self.update_irq();
    }

    fn transmit(&mut self, byte: u8) {
        self.registers.transmit_empty = true;
        if self.looped() {
            if self.received.len() < self.capacity() {
                self.received.push_back(byte);
            } else {
                self.registers.overrun = true;
            }
        } else {
            self.output.push(byte);
            if byte == NEWLINE || self.output.len() >= OUTPUT_BATCH {
                self.flush();
            } else if !self.alarm_set {
                self.alarm_set = true;
                self.alarm.set(Some(self.clock.now() + OUTPUT_DELAY));
            }
        }
        self.update_irq();
    }

    /// The upper half of MSR: the peer's lines, or in loopback the modem control bits.
    fn modem_lines(&self) -> u8 {
        if !self.looped() {
            return MSR_CONNECTED;
        }
        let wires =
            [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)];
        wires.iter().filter(|(out, _)| self.registers.mcr & out != 0).fold(0, |l, (_, i)| l | i)
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_lines();
        self.registers.mcr = value & MCR_WRITABLE;
        let after = self.modem_lines();
        let ri_ended = if before & !after & MSR_RI != 0 { MSR_DELTA_RI } else { 0 };
        self.registers.deltas |= ((before ^ after) >> 4) & !MSR_DELTA_RI | ri_ended;
        self.receive_input();
    }

    fn write_fcr(&mut self, value: u8) {
        let enable = value & FCR_ENABLE != 0;
        if enable != self.registers.fifo || value & FCR_CLEAR_RECEIVE != 0 {
            self.hold_input();
            self.received.clear();
        }
        self.registers.fifo = enable;
        self.registers.trigger = match (enable, value >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        };
        self.receive_input();
    }

    fn write_ier(&mut self, value: u8) {
        let enabled = value & !self.registers.ier;
        self.registers.ier = value & 0x0f;
        // Enabling the interrupt while the transmitter is empty, which it always is, raises it:
        // Linux tests for that and falls back to polling where it does not happen.
        if enabled & IER_TRANSMIT_EMPTY != 0 {
            self.registers.transmit_empty = true;
        }
        self.receive_input();
    }

    /// The pending interrupt of the highest priority (8.6, table V).
    fn interrupt(&self) -> u8 {
        let Registers { ier, overrun, trigger, transmit_empty, deltas, .. } = self.registers;
        if ier & IER_LINE_STATUS != 0 && overrun {
            IIR_LINE_STATUS
        } else if ier & IER_RECEIVED != 0 && self.received.len() >= trigger {
            IIR_RECEIVED
        } else if ier & IER_RECEIVED != 0 && !self.received.is_empty() {
            IIR_TIMEOUT
        } else if ier & IER_TRANSMIT_EMPTY != 0 && transmit_empty {
            IIR_TRANSMIT_EMPTY
        } else if ier & IER_MODEM_STATUS != 0 && deltas != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    /// A PC gates the line with OUT2. Virtual machines commonly do not, and small systems rely
    /// on it, so this one does not either.
    fn update_irq(&mut self) {
        self.irq.set(self.interrupt() != IIR_NONE);
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.received.pop_front().unwrap_or(0);
        self.receive_input();
        byte
    }

    fn read_iir(&mut self) -> u8 {
        let interrupt = self.interrupt();
        if interrupt == IIR_TRANSMIT_EMPTY {
            self.registers.transmit_empty = false;
            self.update_irq();
        }
        interrupt | if self.registers.fifo { IIR_FIFO } else { 0 }
    }

    fn read_lsr(&mut self) -> u8 {
        if self.held_until.is_some() {
            // A driver that polls: it has started up once the moment is over.
            self.receive_input();
        }
        let ready = if self.received.is_empty() { 0 } else { LSR_READY };
        if !std::mem::take(&mut self.registers.overrun) {
            return LSR_EMPTY | ready;
        }
        self.update_irq();
        LSR_EMPTY | LSR_OVERRUN | ready
    }

    fn read_msr(&mut self) -> u8 {
        let deltas = std::mem::take(&mut self.registers.deltas);
        self.update_irq();
        self.modem_lines() | deltas
    }
}

impl PioDevice for Uart {
    fn read_byte(&mut self, port: u16) -> u8 {
        let latch = self.registers.lcr & LCR_DLAB != 0;
        match port.wrapping_sub(self.base) {
            DATA if latch => self.registers.divisor.to_le_bytes()[0],
            IER if latch => self.registers.divisor.to_le_bytes()[1],
            DATA => self.read_data(),
            IER => self.registers.ier,
            IIR_FCR => self.read_iir(),
            LCR => self.registers.lcr,
            MCR => self.registers.mcr,
            LSR => self.read_lsr(),
            MSR => self.read_msr(),
            SCR => self.registers.scr,
            _ => 0xff,
        }
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        let latch = self.registers.lcr & LCR_DLAB != 0;
        let [low, high] = self.registers.divisor.to_le_bytes();
        match port.wrapping_sub(self.base) {
            DATA if latch => self.registers.divisor = u16::from_le_bytes([value, high]),
            IER if latch => self.registers.divisor = u16::from_le_bytes([low, value]),
            DATA => self.transmit(value),
            IER => self.write_ier(value),
            IIR_FCR => self.write_fcr(value),
            LCR => self.registers.lcr = value,
            MCR => self.write_mcr(value),
            SCR => self.registers.scr = value,
            // LSR and MSR are read-only outside factory tests.
            _ => {}
        }
    }
}

impl AlarmDevice for Uart {
    fn on_alarm(&mut self, _now: Duration) {
        self.alarm_set = false;
        self.flush();
    }
}

impl Device for Uart {
    fn name(&self) -> &str {
        &self.name
    }
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
    fn alarms(&mut self) -> Option<&mut dyn AlarmDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        // What the guest had sent has left; what the user typed still waits.
        self.flush();
        self.registers = Registers::RESET;
        self.received.clear();
        self.receive_input();
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new("uart", 1);
        self.registers.save_fields("", &mut state);
        for (field, queue) in [("received", &self.received), ("input", &self.input)] {
            state.put(field, &queue.iter().copied().collect::<Vec<u8>>());
        }
        state.put("output", &self.output);
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("uart", 1)?;
        self.registers.restore_fields("", &mut reader)?;
        if !matches!(self.registers.trigger, 1 | 4 | 8 | 14) {
            return Err(reader.out_of_range("trigger"));
        }
        let at_most = |limit| move |bytes: &Vec<u8>| bytes.len() <= limit;
        self.received = reader.get_if("received", at_most(self.capacity()))?.into();
        self.input = reader.get_if("input", at_most(INPUT_LIMIT))?.into();
        self.output = reader.get_if("output", at_most(OUTPUT_BATCH))?;
        reader.finish()?;
        self.flush();
        self.receive_input();
        Ok(())
    }
}

/// One of the PC's four serial ports.
pub struct UartConfig {
    /// 0 to 3: COM1 to COM4.
    pub index: usize,
    /// What it is connected to.
    pub peer: Box<dyn SerialOutput>,
}

impl Wire for UartConfig {
    type Handle = Shared<Uart>;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError> {
        let name = format!("com{}", self.index + 1);
        let place = ports::SERIAL.get(self.index).zip(layout::SERIAL_IRQS.get(self.index));
        let Some((&base, &irq)) = place else { return Err(MapError::Capability(name)) };
        let alarm = machine.alarm();
        let uart = share(Uart {
            name,
            base,
            clock: machine.clock(),
            alarm: alarm.clone(),
            irq: machine.irq(layout::isa_irq(irq)),
            peer: self.peer,
            registers: Registers::RESET,
            received: VecDeque::new(),
            input: VecDeque::new(),
            input_refused: false,
            held_until: None,
            output: Vec::with_capacity(OUTPUT_BATCH),
            alarm_set: false,
        });
        let device: SharedDevice = uart.clone();
        alarm.bind(Arc::downgrade(&device));
        machine.map_ports(base..=base + SCR, &device)?;
        machine.add_device(device)?;
        Ok(uart)
    }
}

#[cfg(test)]
#[path = "uart_tests.rs"]
mod tests;
