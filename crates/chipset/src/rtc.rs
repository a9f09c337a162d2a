//! The MC146818 real-time clock with CMOS memory.
//!
//! Source: Motorola MC146818A datasheet (ADI1026R1); section names are its own. The CMOS bytes
//! about memory sizes: Ralf Brown's CMOS list, as SeaBIOS and coreboot use them. The time is
//! computed from the wall clock when it is read; alarms are set only for interrupts that the
//! guest has enabled.
use crate::calendar::{DateTime, SECONDS_PER_DAY, next_match};
use crate::layout::{self, ports};
use crate::legacy_route::LegacyOutput;
use device::{
    Alarm, AlarmDevice, Clock, Device, MachineBuilder, MapError, PioDevice, RestoreError,
    SavedState, Shared, SharedDevice, Wire, share,
};
use std::sync::Arc;
use std::time::Duration;

/// Registers ("Address Map").
const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = layout::RTC_CENTURY_INDEX;

/// Register A: update in progress, divider, rate.
const A_UIP: u8 = 1 << 7;
const A_DIVIDER: u8 = 7 << 4;
const A_DIVIDER_32KHZ: u8 = 2 << 4;
const A_RATE: u8 = 0x0f;
/// Register B.
const B_SET: u8 = 1 << 7;
const B_PERIODIC: u8 = 1 << 6;
const B_ALARM: u8 = 1 << 5;
const B_UPDATE: u8 = 1 << 4;
const B_SQUARE_WAVE: u8 = 1 << 3;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const B_INTERRUPTS: u8 = B_PERIODIC | B_ALARM | B_UPDATE;
/// Register C: the flags are at the places of their enable bits.
const C_REQUEST: u8 = 1 << 7;
/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;
/// Hours in 12-hour format: afternoon.
const PM: u8 = 1 << 7;
/// Alarm registers from this value on match any time ("Alarm Bytes").
const DONT_CARE: u8 = 0xc0;

const SECOND: u64 = 1_000_000_000;
/// UIP precedes the update by this long ("Update Cycle").
const UPDATE_NOTICE: u64 = 244_000;
/// After the divider is released the first update comes half a second later ("Divider Control").
const AFTER_DIVIDER_RESET: u64 = SECOND / 2;

/// The RTC.
pub struct Rtc {
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    output: LegacyOutput,
    /// Port 0x70: the register that port 0x71 accesses.
    index: u8,
    /// Registers and memory. Those of time and date count only while the clock stands still.
    memory: [u8; 128],
    /// What the guest's clock is ahead of the wall clock, in nanoseconds.
    offset: i64,
    /// Interrupt flags up to this guest time, in nanoseconds since 1970, are in register C.
    seen: u64,
}

impl Rtc {
    /// The RTC with UTC and the sizes of RAM, in bytes, below and from 4 GiB on.
    pub fn new(
        clock: Arc<dyn Clock>,
        alarm: Alarm,
        output: LegacyOutput,
        low_ram: u64,
        high_ram: u64,
    ) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(REG_A)] = A_DIVIDER_32KHZ | 6;
        memory[usize::from(REG_B)] = B_24_HOURS;
        memory[usize::from(REG_D)] = D_VALID;
        let kib_above_1m = (low_ram.saturating_sub(1 << 20) >> 10).min(0xffff);
        let blocks_above_16m = (low_ram.saturating_sub(16 << 20) >> 16).min(0xffff);
        let blocks_above_4g = (high_ram >> 16).min(0xff_ffff);
        // Base memory in KiB, extended memory twice, then in blocks of 64 KiB.
        for (index, value, bytes) in [
            (0x15, (low_ram >> 10).min(640), 2),
            (0x17, kib_above_1m, 2),
            (0x30, kib_above_1m, 2),
            (0x34, blocks_above_16m, 2),
            (0x5b, blocks_above_4g, 3),
        ] {
            for (to, from) in memory.iter_mut().skip(index).zip(value.to_le_bytes()).take(bytes) {
                *to = from;
            }
        }
        let mut rtc = Self { clock, alarm, output, index: 0, memory, offset: 0, seen: 0 };
        rtc.seen = rtc.now();
        rtc
    }

    fn register(&self, index: u8) -> u8 {
        self.memory.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn set_register(&mut self, index: u8, value: u8) {
        if let Some(register) = self.memory.get_mut(usize::from(index)) {
            *register = value;
        }
    }

    fn running(&self) -> bool {
        self.register(REG_B) & B_SET == 0 && self.register(REG_A) & A_DIVIDER == A_DIVIDER_32KHZ
    }

    /// The guest's time in nanoseconds since 1970.
    fn now(&self) -> u64 {
        let wall = u64::try_from(self.clock.wall().as_nanos()).unwrap_or(u64::MAX);
        wall.saturating_add_signed(self.offset)
    }

    /// A number in the format that register B selects.
    fn encode(&self, value: u8) -> u8 {
        if self.register(REG_B) & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.register(REG_B) & B_BINARY != 0 {
            value
        } else {
            (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.register(REG_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.register(REG_B) & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let afternoon = if value & PM != 0 { 12 } else { 0 };
        self.decode(value & !PM) % 12 + afternoon
    }

    /// Writes the time into its registers.
    fn store_time(&mut self, seconds: u64) {
        let t = DateTime::from_unix(seconds);
        let (century, year) = ((t.year / 100) as u8, (t.year % 100) as u8);
        for (index, value) in [
            (SECONDS, self.encode(t.second)),
            (MINUTES, self.encode(t.minute)),
            (HOURS, self.encode_hour(t.hour)),
            (WEEKDAY, self.encode(t.weekday)),
            (DAY, self.encode(t.day)),
            (MONTH, self.encode(t.month)),
            (YEAR, self.encode(year)),
            (CENTURY, self.encode(century)),
        ] {
            self.set_register(index, value);
        }
    }

    /// The time in the registers, in seconds since 1970. Values that no date has are brought
    /// into range.
    fn load_time(&self) -> u64 {
        let read = |index| self.decode(self.register(index));
        DateTime {
            second: read(SECONDS),
            minute: read(MINUTES),
            hour: self.decode_hour(self.register(HOURS)),
            weekday: 0,
            day: read(DAY),
            month: read(MONTH),
            year: u16::from(read(CENTURY)) * 100 + u16::from(read(YEAR)),
        }
        .to_unix()
    }

    /// Makes the guest's time what the registers say, with a fraction in nanoseconds.
    fn start_at(&mut self, fraction: u64) {
        let time = self.load_time().saturating_mul(SECOND).saturating_add(fraction);
        let wall = u64::try_from(self.clock.wall().as_nanos()).unwrap_or(u64::MAX);
        self.offset = time.wrapping_sub(wall).cast_signed();
        self.seen = self.now();
    }

    /// Nanoseconds between periodic interrupts ("Rate Selection"), `None` where they are off.
    fn period(&self) -> Option<u64> {
        let rate = match self.register(REG_A) & A_RATE {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some((1 << (rate - 1)) * SECOND / 32_768)
    }

    /// The alarm's next second after the one that holds `time`.
    fn next_alarm(&self, time: u64) -> u64 {
        let field = |index: u8, hour: bool| {
            let value = self.register(index);
            let decoded = if hour { self.decode_hour(value) } else { self.decode(value) };
            (value < DONT_CARE).then_some(decoded)
        };
        let wanted =
            [field(HOURS_ALARM, true), field(MINUTES_ALARM, false), field(SECONDS_ALARM, false)];
        let second = time / SECOND + 1;
        next_match((second % SECONDS_PER_DAY) as u32, wanted)
            .map_or(u64::MAX, |wait| second.saturating_add(wait.into()).saturating_mul(SECOND))
    }

    /// Sets the flags in register C for what has happened since the last call.
    fn update_flags(&mut self) {
        let (now, seen) = (self.now(), self.seen);
        // The wall clock may have been set back.
        self.seen = now;
        if !self.running() || now <= seen {
            return;
        }
        let mut flags = 0;
        if self.period().is_some_and(|period| now / period != seen / period) {
            flags |= B_PERIODIC;
        }
        if now / SECOND != seen / SECOND {
            flags |= B_UPDATE;
            if self.next_alarm(seen) <= now {
                flags |= B_ALARM;
            }
        }
        self.set_register(REG_C, self.register(REG_C) | flags);
    }

    /// Drives IRQ 8 from the flags and sets the alarm for the next flag that would raise it.
    fn update_irq(&mut self) {
        let enabled = self.register(REG_B) & B_INTERRUPTS;
        let flags = self.register(REG_C) & B_INTERRUPTS;
        let request = enabled & flags != 0;
        self.set_register(REG_C, flags | if request { C_REQUEST } else { 0 });
        self.output.set(request);
        if request || !self.running() {
            // Nothing can change the line before the guest reads register C.
            return self.alarm.set(None);
        }
        let seen = self.seen;
        let next = [
            (enabled & B_PERIODIC != 0)
                .then(|| self.period().map(|period| (seen / period + 1).saturating_mul(period)))
                .flatten(),
            (enabled & B_UPDATE != 0).then(|| (seen / SECOND + 1).saturating_mul(SECOND)),
            (enabled & B_ALARM != 0).then(|| self.next_alarm(seen)),
        ];
        let wait = next.into_iter().flatten().min().map(|time| time.saturating_sub(self.now()));
        self.alarm.set(wait.map(|wait| self.clock.now() + Duration::from_nanos(wait)));
    }

    fn read_data(&mut self) -> u8 {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                if self.running() {
                    self.store_time(self.now() / SECOND);
                }
                self.register(self.index)
            }
            REG_A => {
                let near = self.running() && self.now() % SECOND >= SECOND - UPDATE_NOTICE;
                self.register(REG_A) | if near { A_UIP } else { 0 }
            }
            REG_C => {
                self.update_flags();
                self.update_irq();
                let flags = self.register(REG_C);
                self.set_register(REG_C, 0);
                self.update_irq();
                flags
            }
            index => self.register(index),
        }
    }

    fn write_data(&mut self, value: u8) {
        self.update_flags();
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                let running = self.running();
                let now = self.now();
                if running {
                    self.store_time(now / SECOND);
                }
                self.set_register(self.index, value);
                if running {
                    self.start_at(now % SECOND);
                }
            }
            REG_A | REG_B => self.write_control(value),
            REG_C | REG_D => {}
            index => self.set_register(index, value),
        }
        self.update_irq();
    }

    /// Registers A and B can stop the clock, start it, and change its format.
    fn write_control(&mut self, value: u8) {
        let (was_running, now) = (self.running(), self.now());
        let divider_was_reset = self.register(REG_A) & A_DIVIDER != A_DIVIDER_32KHZ;
        if was_running {
            self.store_time(now / SECOND);
        }
        if self.index == REG_A {
            self.set_register(REG_A, value & !A_UIP);
        } else {
            // SET clears UIE ("Register B").
            let clear = if value & B_SET != 0 { B_UPDATE } else { 0 };
            self.set_register(REG_B, value & !clear);
        }
        if !was_running && self.running() {
            let fraction = if divider_was_reset { AFTER_DIVIDER_RESET } else { now % SECOND };
            self.start_at(fraction);
        }
    }
}

impl PioDevice for Rtc {
    fn read_byte(&mut self, port: u16) -> u8 {
        // The index register is write-only.
        if port == ports::RTC { 0xff } else { self.read_data() }
    }
    fn write_byte(&mut self, port: u16, value: u8) {
        if port == ports::RTC {
            // Bit 7 masks NMIs on a PC; there is no source of them behind it.
            self.index = value & 0x7f;
        } else {
            self.write_data(value);
        }
    }
}

impl AlarmDevice for Rtc {
    fn on_alarm(&mut self, _now: Duration) {
        self.update_flags();
        self.update_irq();
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
    fn alarms(&mut self) -> Option<&mut dyn AlarmDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        // The battery keeps time and memory ("RESET").
        self.update_flags();
        let clear = B_INTERRUPTS | B_SQUARE_WAVE;
        self.set_register(REG_B, self.register(REG_B) & !clear);
        self.set_register(REG_C, 0);
        self.index = 0;
        self.update_irq();
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new("rtc", 1);
        state.put("index", &self.index);
        state.put("memory", &self.memory);
        state.put("offset", &self.offset);
        state.put("seen", &self.seen);
        state.put("output_cut", &self.output.is_cut());
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("rtc", 1)?;
        self.index = reader.get_if("index", |index| *index < 128)?;
        self.memory = reader.get("memory")?;
        self.offset = reader.get("offset")?;
        self.seen = reader.get("seen")?;
        self.output.cut(reader.get("output_cut")?);
        reader.finish()?;
        self.update_flags();
        self.update_irq();
        Ok(())
    }
}

/// An RTC at its usual ports, on IRQ 8.
#[derive(Clone, Copy, Debug)]
pub struct RtcConfig {
    /// Bytes of RAM below 4 GiB.
    pub low_ram: u64,
    /// Bytes of RAM from 4 GiB on.
    pub high_ram: u64,
}

impl Wire for RtcConfig {
    /// The device, and its output for the HPET.
    type Handle = (Shared<Rtc>, LegacyOutput);
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError> {
        let output = LegacyOutput::new(machine.irq(layout::isa_irq(layout::RTC_IRQ)));
        let alarm = machine.alarm();
        let clock = machine.clock();
        let rtc =
            share(Rtc::new(clock, alarm.clone(), output.clone(), self.low_ram, self.high_ram));
        let device: SharedDevice = rtc.clone();
        alarm.bind(Arc::downgrade(&device));
        machine.map_ports(ports::RTC..=ports::RTC + 1, &device)?;
        machine.add_device(device)?;
        Ok((rtc, output))
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
