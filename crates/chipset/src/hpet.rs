//! The high precision event timer: three comparators of 64 bits on a 100 MHz counter.
//!
//! Source: IA-PC HPET specification 1.0a, §2.3. The counter is computed from the clock; an alarm
//! is set only for the next interrupt that the guest has enabled.
use crate::layout;
use crate::legacy_route::LegacyOutput;
use device::state::SaveFields;
use device::{
    Alarm, AlarmDevice, Clock, Device, Gsi, GuestPhysical, IrqLine, MachineBuilder, MapError,
    MmioDevice, MsiSink, RestoreError, SavedState, Shared, SharedDevice, Width, Wire, saved_fields,
    share,
};
use std::sync::Arc;
use std::time::Duration;

/// Length of a tick: 10 ns, in nanoseconds and in femtoseconds (§2.3.4, COUNTER_CLK_PERIOD).
const PERIOD_NS: u32 = 10;
/// The counter's period in femtoseconds.
pub const PERIOD_FS: u32 = PERIOD_NS * 1_000_000;
const TICKS_PER_SECOND: u64 = 1_000_000_000 / PERIOD_NS as u64;
/// Number of comparators.
pub const TIMERS: usize = 3;

/// Registers by offset (§2.3.3).
const CAPABILITIES: u64 = 0x000;
const CONFIGURATION: u64 = 0x010;
const STATUS: u64 = 0x020;
const COUNTER: u64 = 0x0f0;
const TIMER_FIRST: u64 = 0x100;
const TIMER_STRIDE: u64 = 0x20;
const TIMER_CONFIGURATION: u64 = 0x00;
const TIMER_COMPARATOR: u64 = 0x08;
const TIMER_FSB: u64 = 0x10;

/// General capabilities (§2.3.4): revision 1, 64-bit counter, legacy route, vendor Intel.
const CAPABILITY_BITS: u64 =
    (PERIOD_FS as u64) << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;
/// General configuration (§2.3.5).
const ENABLE: u64 = 1 << 0;
const LEGACY_ROUTE: u64 = 1 << 1;
/// Timer configuration (§2.3.8).
const TIMER_LEVEL: u64 = 1 << 1;
const TIMER_ENABLE: u64 = 1 << 2;
const TIMER_PERIODIC: u64 = 1 << 3;
const TIMER_SET_VALUE: u64 = 1 << 6;
const TIMER_32_BITS: u64 = 1 << 8;
const TIMER_ROUTE_SHIFT: u64 = 9;
const TIMER_FSB_ENABLE: u64 = 1 << 14;
const TIMER_WRITABLE: u64 = 0x7f4e;
/// Periodic, 64-bit and FSB capable, routes to I/O APIC inputs 16 to 23.
const TIMER_CAPABILITIES: u64 = 1 << 4 | 1 << 5 | 1 << 15 | 0xff << (32 + FIRST_ROUTE);
const FIRST_ROUTE: u32 = 16;
const ROUTES: u32 = 8;

/// A periodic timer wakes the machine at most this often: ticks of a shorter period come
/// together, so that a guest cannot keep the I/O thread from everything else.
const SHORTEST_WAKE: u64 = TICKS_PER_SECOND / 20_000;

/// Whole ticks in `time`.
fn ticks(time: Duration) -> u64 {
    time.as_secs() * TICKS_PER_SECOND + u64::from(time.subsec_nanos() / PERIOD_NS)
}

fn time_of(ticks: u64) -> Duration {
    let nanos = (ticks % TICKS_PER_SECOND) as u32 * PERIOD_NS;
    Duration::new(ticks / TICKS_PER_SECOND, nanos)
}

/// One comparator.
#[derive(Clone, Debug, PartialEq)]
struct Timer {
    /// The writable bits of the configuration.
    config: u64,
    comparator: u64,
    period: u64,
    fsb: u64,
    /// When the comparator matches next, in ticks of the machine's clock.
    due: Option<u64>,
}
saved_fields!(Timer: config, comparator, period, fsb, due);

impl Timer {
    /// After reset the comparator is all ones (§2.3.9).
    const RESET: Self = Self { config: 0, comparator: u64::MAX, period: 0, fsb: 0, due: None };

    const fn is(&self, bit: u64) -> bool {
        self.config & bit != 0
    }

    const fn mask(&self) -> u64 {
        if self.is(TIMER_32_BITS) { 0xffff_ffff } else { u64::MAX }
    }

    /// Computes when the comparator matches.
    fn arm(&mut self, counter: u64, now: u64) {
        let wait = self.comparator.wrapping_sub(counter) & self.mask();
        self.due = now.checked_add(wait);
    }

    /// Moves a timer that is due on to its next match.
    fn advance(&mut self, due: u64, now: u64) {
        let step = match (self.is(TIMER_PERIODIC), self.is(TIMER_32_BITS)) {
            (true, _) => self.period & self.mask(),
            // Matches again when the low half of the counter has come round.
            (false, true) => 1 << 32,
            (false, false) => 0,
        };
        if step == 0 {
            self.due = None;
            return;
        }
        let passed = ((now - due) / step + 1).saturating_mul(step);
        self.due = due.checked_add(passed);
        if self.is(TIMER_PERIODIC) {
            self.comparator = self.comparator.wrapping_add(passed) & self.mask();
        }
    }

    fn write_comparator(&mut self, value: u64, mask: u64) {
        let mask = mask & self.mask();
        let periodic = self.is(TIMER_PERIODIC);
        if !periodic || self.is(TIMER_SET_VALUE) {
            self.comparator = self.comparator & !mask | value & mask;
        }
        if periodic {
            self.period = self.period & !mask | value & mask;
        }
        self.config &= !TIMER_SET_VALUE;
    }
}

/// The lines that one timer can drive.
struct TimerLines {
    legacy: Option<IrqLine>,
    routes: Vec<IrqLine>,
    /// The line that the timer holds high.
    held: Option<IrqLine>,
}

/// The HPET.
pub struct Hpet {
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    msi: Arc<dyn MsiSink>,
    /// The PIT's and the RTC's, which the legacy route cuts off.
    replaced: [LegacyOutput; 2],
    lines: [TimerLines; TIMERS],
    config: u64,
    status: u64,
    /// The counter's value while it stands still; while it runs, what it is ahead of the clock.
    counter: u64,
    timers: [Timer; TIMERS],
}

impl Hpet {
    const fn enabled(&self) -> bool {
        self.config & ENABLE != 0
    }

    fn counter_at(&self, now: u64) -> u64 {
        if self.enabled() { self.counter.wrapping_add(now) } else { self.counter }
    }

    /// The line of a timer: legacy, or the route in its configuration.
    fn line(&self, index: usize) -> Option<&IrqLine> {
        let (timer, lines) = (self.timers.get(index)?, self.lines.get(index)?);
        if let Some(legacy) = lines.legacy.as_ref().filter(|_| self.config & LEGACY_ROUTE != 0) {
            return Some(legacy);
        }
        let route = (timer.config >> TIMER_ROUTE_SHIFT & 0x1f) as u32;
        lines.routes.get(route.checked_sub(FIRST_ROUTE)? as usize)
    }

    /// Delivers what is due and looks ahead.
    fn update(&mut self) {
        let now = ticks(self.clock.now());
        for index in 0..TIMERS {
            let Some(timer) = self.timers.get_mut(index) else { continue };
            if let Some(due) = timer.due.filter(|due| *due <= now) {
                timer.advance(due, now);
                self.fire(index);
            }
        }
        self.update_levels();
        self.set_alarm(now);
    }

    fn fire(&mut self, index: usize) {
        let Some(timer) = self.timers.get(index) else { return };
        if timer.is(TIMER_LEVEL) {
            self.status |= 1 << index;
        } else if timer.is(TIMER_ENABLE) {
            if timer.is(TIMER_FSB_ENABLE) {
                self.msi.signal(timer.fsb >> 32, timer.fsb as u32);
            } else if let Some(line) = self.line(index) {
                line.pulse();
            }
        }
    }

    /// Holds the lines of level-triggered timers high while their status says so.
    fn update_levels(&mut self) {
        for index in 0..TIMERS {
            let asserted = self.timers.get(index).is_some_and(|timer| {
                timer.is(TIMER_ENABLE) && timer.is(TIMER_LEVEL) && self.status & 1 << index != 0
            });
            let wanted = if asserted { self.line(index).cloned() } else { None };
            let Some(lines) = self.lines.get_mut(index) else { continue };
            let held = lines.held.as_ref().map(IrqLine::gsi);
            if held == wanted.as_ref().map(IrqLine::gsi) {
                continue;
            }
            if let Some(line) = lines.held.take() {
                line.set(false);
            }
            if let Some(line) = wanted {
                line.set(true);
                lines.held = Some(line);
            }
        }
    }

    fn set_alarm(&self, now: u64) {
        let deadline = |(index, timer): (usize, &Timer)| {
            let waits =
                timer.is(TIMER_ENABLE) && !(timer.is(TIMER_LEVEL) && self.status & 1 << index != 0);
            let due = timer.due.filter(|_| waits)?;
            let earliest = if timer.is(TIMER_PERIODIC) { now + SHORTEST_WAKE } else { now };
            Some(due.max(earliest))
        };
        let next = self.timers.iter().enumerate().filter_map(deadline).min();
        self.alarm.set(next.map(time_of));
    }

    /// Recomputes the matches of all timers, after the counter has changed.
    fn arm_all(&mut self) {
        let now = ticks(self.clock.now());
        let (enabled, counter) = (self.enabled(), self.counter_at(now));
        for timer in &mut self.timers {
            if enabled {
                timer.arm(counter, now);
            } else {
                timer.due = None;
            }
        }
    }

    fn write_configuration(&mut self, value: u64) {
        let now = ticks(self.clock.now());
        let counter = self.counter_at(now);
        let changed = self.config ^ value;
        self.config = value & (ENABLE | LEGACY_ROUTE);
        if changed & ENABLE != 0 {
            self.counter = if self.enabled() { counter.wrapping_sub(now) } else { counter };
            self.arm_all();
        }
        for output in &self.replaced {
            output.cut(self.config & LEGACY_ROUTE != 0);
        }
    }

    fn write_timer(&mut self, index: usize, register: u64, value: u64, mask: u64) {
        let now = ticks(self.clock.now());
        let (enabled, counter) = (self.enabled(), self.counter_at(now));
        let Some(timer) = self.timers.get_mut(index) else { return };
        match register {
            TIMER_CONFIGURATION => {
                timer.config = (timer.config & !mask | value & mask) & TIMER_WRITABLE;
                if timer.is(TIMER_32_BITS) {
                    timer.comparator &= timer.mask();
                    timer.period &= timer.mask();
                }
            }
            TIMER_COMPARATOR => timer.write_comparator(value, mask),
            TIMER_FSB => timer.fsb = timer.fsb & !mask | value & mask,
            _ => {}
        }
        if register != TIMER_FSB && enabled {
            timer.arm(counter, now);
        }
    }

    fn read_register(&mut self, register: u64) -> u64 {
        match register {
            COUNTER => self.counter_at(ticks(self.clock.now())),
            CAPABILITIES => CAPABILITY_BITS,
            CONFIGURATION => self.config,
            STATUS => {
                self.update();
                self.status
            }
            TIMER_FIRST.. => {
                self.update();
                let Some(timer) = self.timers.get(timer_index(register)) else { return 0 };
                match register % TIMER_STRIDE {
                    TIMER_CONFIGURATION => timer.config | TIMER_CAPABILITIES,
                    TIMER_COMPARATOR => timer.comparator,
                    TIMER_FSB => timer.fsb,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Writes the bits of `mask`.
    fn write_register(&mut self, register: u64, value: u64, mask: u64) {
        // First what was due before this write.
        self.update();
        match register {
            CONFIGURATION => self.write_configuration(self.config & !mask | value & mask),
            STATUS => self.status &= !(value & mask),
            COUNTER => {
                let now = ticks(self.clock.now());
                let counter = self.counter_at(now) & !mask | value & mask;
                self.counter = if self.enabled() { counter.wrapping_sub(now) } else { counter };
                self.arm_all();
            }
            TIMER_FIRST.. => {
                self.write_timer(timer_index(register), register % TIMER_STRIDE, value, mask);
            }
            _ => {}
        }
        self.update();
    }
}

/// Which timer a register from [`TIMER_FIRST`] on belongs to.
fn timer_index(register: u64) -> usize {
    usize::try_from((register - TIMER_FIRST) / TIMER_STRIDE).unwrap_or(usize::MAX)
}

impl MmioDevice for Hpet {
    fn read(&mut self, address: GuestPhysical, _: Width) -> u64 {
        let offset = address.0 - layout::HPET.0;
        self.read_register(offset & !7) >> (8 * (offset & 7))
    }
    fn write(&mut self, address: GuestPhysical, width: Width, value: u64) {
        let offset = address.0 - layout::HPET.0;
        let shift = 8 * (offset & 7);
        self.write_register(offset & !7, value << shift, width.mask() << shift);
    }
}

impl AlarmDevice for Hpet {
    fn on_alarm(&mut self, _now: Duration) {
        self.update();
    }
}

impl Device for Hpet {
    fn name(&self) -> &str {
        "hpet"
    }
    fn mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        Some(self)
    }
    fn alarms(&mut self) -> Option<&mut dyn AlarmDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        self.timers = [Timer::RESET; TIMERS];
        (self.config, self.status, self.counter) = (0, 0, 0);
        self.write_configuration(0);
        self.update();
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new("hpet", 1);
        state.put("config", &self.config);
        state.put("status", &self.status);
        state.put("counter", &self.counter);
        for (timer, prefix) in self.timers.iter().zip(["0.", "1.", "2."]) {
            timer.save_fields(prefix, &mut state);
        }
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("hpet", 1)?;
        self.config = reader.get_if("config", |value| value & !(ENABLE | LEGACY_ROUTE) == 0)?;
        self.status = reader.get_if("status", |value| value >> TIMERS == 0)?;
        self.counter = reader.get("counter")?;
        for (timer, prefix) in self.timers.iter_mut().zip(["0.", "1.", "2."]) {
            timer.restore_fields(prefix, &mut reader)?;
            if timer.config & !TIMER_WRITABLE != 0 {
                return Err(reader.out_of_range(&format!("{prefix}config")));
            }
        }
        reader.finish()?;
        for output in &self.replaced {
            output.cut(self.config & LEGACY_ROUTE != 0);
        }
        self.update();
        Ok(())
    }
}

/// An HPET at its usual address.
#[derive(Debug)]
pub struct HpetConfig {
    /// The PIT's output, from [`crate::pit::PitConfig`].
    pub pit: LegacyOutput,
    /// The RTC's output, from [`crate::rtc::RtcConfig`].
    pub rtc: LegacyOutput,
}

impl Wire for HpetConfig {
    type Handle = Shared<Hpet>;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError> {
        let alarm = machine.alarm();
        let mut lines = |legacy: Option<u8>| TimerLines {
            legacy: legacy.map(|irq| machine.irq(layout::isa_irq(irq))),
            routes: (FIRST_ROUTE..FIRST_ROUTE + ROUTES).map(|n| machine.irq(Gsi(n))).collect(),
            held: None,
        };
        let lines = [lines(Some(layout::PIT_IRQ)), lines(Some(layout::RTC_IRQ)), lines(None)];
        let hpet = share(Hpet {
            clock: machine.clock(),
            alarm: alarm.clone(),
            msi: machine.msi(),
            replaced: [self.pit, self.rtc],
            lines,
            config: 0,
            status: 0,
            counter: 0,
            timers: [Timer::RESET; TIMERS],
        });
        let device: SharedDevice = hpet.clone();
        alarm.bind(Arc::downgrade(&device));
        machine.map_mmio(layout::HPET, layout::HPET_LENGTH, &device)?;
        machine.add_device(device)?;
        Ok(hpet)
    }
}

#[cfg(test)]
#[path = "hpet_tests.rs"]
mod tests;
