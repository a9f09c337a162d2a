//! The 8254 programmable interval timer, with system control port B (0x61).
//!
//! Source: Intel 8254 datasheet (231164-005); section names are its own. Port 0x61: ICH10
//! §13.7.1. Nothing ticks: counts and outputs are computed from the clock when they are read,
//! and an alarm is set only for the next edge of channel 0.
use crate::layout::{self, ports};
use crate::legacy_route::LegacyOutput;
use device::state::SaveFields;
use device::{
    Alarm, AlarmDevice, Clock, Device, MachineBuilder, MapError, PioDevice, RestoreError,
    SavedState, Shared, SharedDevice, Wire, saved_fields, share,
};
use std::sync::Arc;
use std::time::Duration;

/// Input clock in Hz.
pub const FREQUENCY: u64 = 1_193_182;
const NANOSECONDS: u64 = 1_000_000_000;

/// The control register's port.
const CONTROL: u16 = ports::PIT + 3;
/// Control word: read-back command ("Read-Back Command").
const READ_BACK: u8 = 3;
const READ_BACK_NO_COUNT: u8 = 1 << 5;
const READ_BACK_NO_STATUS: u8 = 1 << 4;
/// Status byte.
const STATUS_OUTPUT: u8 = 1 << 7;
const STATUS_NULL_COUNT: u8 = 1 << 6;
/// Access modes: low byte, high byte, low then high.
const ACCESS_LOW: u8 = 1;
const ACCESS_HIGH: u8 = 2;
const ACCESS_BOTH: u8 = 3;

/// Port 0x61: gate of channel 2, speaker data, refresh toggle, output of channel 2.
const B_GATE: u8 = 1 << 0;
const B_WRITABLE: u8 = 0x0f;
const B_REFRESH: u8 = 1 << 4;
const B_OUTPUT: u8 = 1 << 5;
/// A periodic counter wakes the machine at most this often, in ticks (about 50 µs): edges of a
/// shorter period come together, so that a guest cannot keep the I/O thread from everything else.
const SHORTEST_WAKE: u64 = 60;
/// DRAM refresh period of a PC: the toggle changes this often.
const REFRESH_NS: u64 = 15_085;

/// Whole ticks of the input clock in `time`.
fn ticks(time: Duration) -> u64 {
    // Fits: 2^30 ns × 2^21 Hz < 2^64.
    time.as_secs() * FREQUENCY + u64::from(time.subsec_nanos()) * FREQUENCY / NANOSECONDS
}

/// The first moment at which [`ticks`] has reached `ticks`.
fn time_of(ticks: u64) -> Duration {
    let nanos = (ticks % FREQUENCY * NANOSECONDS).div_ceil(FREQUENCY);
    Duration::from_secs(ticks / FREQUENCY) + Duration::from_nanos(nanos)
}

/// One counter.
#[derive(Clone, Debug, PartialEq)]
struct Channel {
    /// Mode 0 to 5.
    mode: u8,
    access: u8,
    bcd: bool,
    gate: bool,
    /// The initial count, 1 to 65536 (10000 in BCD).
    count: u32,
    /// A count has been written since the control word.
    loaded: bool,
    /// Tick at which counting began; `None` where it waits for a count, a trigger or its gate.
    since: Option<u64>,
    /// Ticks that had passed when the gate stopped the counter (modes 0 and 4).
    held: u64,
    /// The low byte that waits for its high byte.
    low_byte: Option<u8>,
    /// The next read gives the high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}
saved_fields!(Channel: mode, access, bcd, gate, count, loaded, since, held, low_byte, read_high,
    latched_count, latched_status);

impl Channel {
    const fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            access: ACCESS_BOTH,
            bcd: false,
            gate,
            count: 0x1_0000,
            loaded: false,
            since: None,
            held: 0,
            low_byte: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    const fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// Ticks counted so far; `None` where counting has not begun.
    fn elapsed(&self, now: u64) -> Option<u64> {
        match self.since {
            Some(since) => Some(now.saturating_sub(since)),
            None if self.held != 0 => Some(self.held),
            None => None,
        }
    }

    /// The level of OUT ("Mode Definitions").
    fn output(&self, now: u64) -> bool {
        let count = u64::from(self.count);
        let Some(elapsed) = self.elapsed(now) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => self.since.is_none() || elapsed % count != count - 1,
            3 => self.since.is_none() || elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// The counting element's value, as the guest reads it.
    fn current(&self, now: u64) -> u16 {
        let count = u64::from(self.count);
        let elapsed = self.elapsed(now).unwrap_or(0);
        let value = match self.mode {
            2 => count - elapsed % count,
            // Counts by two; half a period is one run of the counter.
            3 => count - 2 * elapsed % count,
            _ => (count + self.modulus() - elapsed % self.modulus()) % self.modulus(),
        } % self.modulus();
        if self.bcd { to_bcd(value) } else { value as u16 }
    }

    fn status(&self, now: u64) -> u8 {
        let output = if self.output(now) { STATUS_OUTPUT } else { 0 };
        let null = if self.loaded { 0 } else { STATUS_NULL_COUNT };
        output | null | self.access << 4 | self.mode << 1 | u8::from(self.bcd)
    }

    fn set_control(&mut self, value: u8) {
        let gate = self.gate;
        *self = Self::new(gate);
        self.access = value >> 4 & 3;
        // Modes 6 and 7 are 2 and 3.
        self.mode = match value >> 1 & 7 {
            mode @ 0..=5 => mode,
            mode => mode - 4,
        };
        self.bcd = value & 1 != 0;
        self.count = self.modulus() as u32;
    }

    fn write(&mut self, value: u8, now: u64) {
        let raw = match (self.access, self.low_byte.take()) {
            (ACCESS_LOW, _) => u16::from(value),
            (ACCESS_HIGH, _) => u16::from(value) << 8,
            (_, Some(low)) => u16::from_le_bytes([low, value]),
            (_, None) => {
                self.low_byte = Some(value);
                if self.mode == 0 {
                    // The first byte stops the counter ("Mode 0").
                    (self.since, self.held) = (None, 0);
                }
                return;
            }
        };
        let count = if self.bcd { from_bcd(raw) } else { u32::from(raw) };
        // With a count of 1, modes 2 and 3 would never change their output; the datasheet
        // forbids it.
        let largest = self.modulus() as u32;
        // Digits above 9 can make a decimal count too large.
        self.count = if count == 0 { largest } else { count.min(largest) };
        self.loaded = true;
        match self.mode {
            1 | 5 => {}
            _ if self.gate => (self.since, self.held) = (Some(now), 0),
            _ => (self.since, self.held) = (None, 0),
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.current(now)).to_le_bytes();
        match self.access {
            ACCESS_LOW | ACCESS_HIGH => {
                self.latched_count = None;
                if self.access == ACCESS_LOW { low } else { high }
            }
            _ => {
                self.read_high = !self.read_high;
                if self.read_high {
                    return low;
                }
                self.latched_count = None;
                high
            }
        }
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.current(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            self.latched_status = Some(self.status(now));
        }
    }

    /// Changes GATE ("Gate").
    fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            (0 | 4, false) => {
                self.held = self.elapsed(now).unwrap_or(0);
                self.since = None;
            }
            (0 | 4, true) if self.loaded => {
                self.since = Some(now.saturating_sub(std::mem::take(&mut self.held)));
            }
            (2 | 3, false) => self.since = None,
            (_, true) if self.loaded => self.since = Some(now),
            _ => {}
        }
    }

    /// The first tick after `now` at which OUT rises by itself.
    fn next_edge(&self, now: u64) -> Option<u64> {
        let (since, count) = (self.since?, u64::from(self.count));
        let edge = match self.mode {
            2 | 3 => {
                let periods = now.saturating_sub(since) / count + 1;
                since.saturating_add(periods.saturating_mul(count))
            }
            0 | 1 => since.saturating_add(count),
            _ => since.saturating_add(count + 1),
        };
        (edge > now).then_some(edge)
    }
}

fn from_bcd(raw: u16) -> u32 {
    (0..4).rev().fold(0, |value, digit| value * 10 + u32::from(raw >> (4 * digit) & 0xf))
}

fn to_bcd(value: u64) -> u16 {
    let digits = [value / 1000, value / 100, value / 10, value];
    digits.iter().fold(0, |raw, digit| raw << 4 | (digit % 10) as u16)
}

/// The PIT.
pub struct Pit {
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    output: LegacyOutput,
    channels: [Channel; 3],
    /// Port 0x61's writable bits.
    control_b: u8,
    /// The tick at which channel 0's output rises next.
    next_edge: Option<u64>,
}

impl Pit {
    /// The PIT after power-up. Channel 0 drives `output`; `alarm` wakes this device.
    pub fn new(clock: Arc<dyn Clock>, alarm: Alarm, output: LegacyOutput) -> Self {
        let channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
        Self { clock, alarm, output, channels, control_b: 0, next_edge: None }
    }

    fn now(&self) -> u64 {
        ticks(self.clock.now())
    }

    fn schedule(&mut self, now: u64) {
        self.next_edge = self.channels[0].next_edge(now);
        let earliest =
            if matches!(self.channels[0].mode, 2 | 3) { now + SHORTEST_WAKE } else { now };
        self.alarm.set(self.next_edge.map(|edge| time_of(edge.max(earliest))));
    }

    /// Brings channel 0's output up to date. Modes 0 and 1 keep their level; in the others only
    /// the rising edge matters to an edge-triggered input, so it is made a pulse and the falls
    /// need no alarms. Edges that were missed because the machine was slow are given once.
    fn update_output(&mut self, now: u64) {
        if self.channels[0].mode < 2 {
            self.output.set(self.channels[0].loaded && self.channels[0].output(now));
        } else if self.next_edge.is_some_and(|edge| edge <= now) {
            self.output.pulse();
        } else {
            self.output.set(false);
        }
        self.schedule(now);
    }

    fn write_control(&mut self, value: u8, now: u64) {
        let select = value >> 6;
        if select == READ_BACK {
            for (i, channel) in self.channels.iter_mut().enumerate() {
                if value & 2 << i == 0 {
                    continue;
                }
                if value & READ_BACK_NO_COUNT == 0 {
                    channel.latch_count(now);
                }
                if value & READ_BACK_NO_STATUS == 0 {
                    channel.latch_status(now);
                }
            }
            return;
        }
        let Some(channel) = self.channels.get_mut(usize::from(select)) else { return };
        if value & 0x30 == 0 {
            channel.latch_count(now);
        } else {
            channel.set_control(value);
            if select == 0 {
                self.next_edge = None;
                self.update_output(now);
            }
        }
    }
}

impl PioDevice for Pit {
    fn read_byte(&mut self, port: u16) -> u8 {
        let time = self.clock.now();
        let now = ticks(time);
        if port == ports::SYSTEM_CONTROL_B {
            let refresh =
                if (time.as_nanos() as u64 / REFRESH_NS) & 1 != 0 { B_REFRESH } else { 0 };
            let output = if self.channels[2].output(now) { B_OUTPUT } else { 0 };
            return self.control_b | refresh | output;
        }
        // The control register cannot be read.
        let index = usize::from(port.wrapping_sub(ports::PIT));
        self.channels.get_mut(index).map_or(0xff, |channel| channel.read(now))
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        let now = self.now();
        match port {
            CONTROL => self.write_control(value, now),
            ports::SYSTEM_CONTROL_B => {
                self.control_b = value & B_WRITABLE;
                self.channels[2].set_gate(value & B_GATE != 0, now);
            }
            _ => {
                let index = usize::from(port.wrapping_sub(ports::PIT));
                let Some(channel) = self.channels.get_mut(index) else { return };
                channel.write(value, now);
                if index == 0 {
                    self.next_edge = None;
                    self.update_output(now);
                }
            }
        }
    }
}

impl AlarmDevice for Pit {
    fn on_alarm(&mut self, now: Duration) {
        self.update_output(ticks(now));
    }
}

impl Device for Pit {
    fn name(&self) -> &str {
        "pit"
    }
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
    fn alarms(&mut self) -> Option<&mut dyn AlarmDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        *self = Self::new(Arc::clone(&self.clock), self.alarm.clone(), self.output.clone());
        self.alarm.set(None);
        self.output.set(false);
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new("pit", 1);
        for (channel, prefix) in self.channels.iter().zip(["0.", "1.", "2."]) {
            channel.save_fields(prefix, &mut state);
        }
        state.put("control_b", &self.control_b);
        state.put("next_edge", &self.next_edge);
        state.put("output_cut", &self.output.is_cut());
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("pit", 1)?;
        for (channel, prefix) in self.channels.iter_mut().zip(["0.", "1.", "2."]) {
            channel.restore_fields(prefix, &mut reader)?;
            let valid = channel.mode <= 5
                && channel.access <= 3
                && (1..=channel.modulus()).contains(&channel.count.into());
            if !valid {
                return Err(reader.out_of_range(&format!("{prefix}count")));
            }
        }
        self.control_b = reader.get_if("control_b", |value| value & !B_WRITABLE == 0)?;
        self.next_edge = reader.get("next_edge")?;
        self.output.cut(reader.get("output_cut")?);
        reader.finish()?;
        self.update_output(self.now());
        Ok(())
    }
}

/// A PIT at its usual ports, with channel 0 on IRQ 0.
#[derive(Debug)]
pub struct PitConfig;

impl Wire for PitConfig {
    /// The device, and its output for the HPET.
    type Handle = (Shared<Pit>, LegacyOutput);
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError> {
        let output = LegacyOutput::new(machine.irq(layout::isa_irq(layout::PIT_IRQ)));
        let alarm = machine.alarm();
        let pit = share(Pit::new(machine.clock(), alarm.clone(), output.clone()));
        let device: SharedDevice = pit.clone();
        alarm.bind(Arc::downgrade(&device));
        machine.map_ports(ports::PIT..=CONTROL, &device)?;
        machine.map_ports(ports::SYSTEM_CONTROL_B..=ports::SYSTEM_CONTROL_B, &device)?;
        machine.add_device(device)?;
        Ok((pit, output))
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;
