//! The LAPIC's timer: one-shot, periodic, and at a time-stamp (Intel SDM 3A 11.5.4).
use super::{Lapic, MASKED, reg};
use crate::clock::{APIC_HZ, tsc_duration};
use crate::cpu::Cpu;
use std::time::{Duration, Instant};

/// What the timer's LVT entry selects in bits 17 and 18.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    Deadline,
}

impl Lapic {
    pub(super) fn timer_mode(&self) -> TimerMode {
        match self.registers[reg::LVT_TIMER] >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            _ => TimerMode::Deadline,
        }
    }

    pub(super) fn divider(&self) -> u64 {
        let code = self.registers[reg::DIVIDE];
        match (code & 3) | (code >> 1 & 4) {
            7 => 1,
            n => 2 << n,
        }
    }

    pub(super) fn count_duration(&self, count: u32) -> Duration {
        let ns = u128::from(count) * u128::from(self.divider()) * 1_000_000_000;
        Duration::from_nanos((ns / u128::from(APIC_HZ)) as u64)
    }

    pub(super) fn current_count(&self) -> u32 {
        let Some(deadline) = self.deadline else { return 0 };
        if self.timer_mode() == TimerMode::Deadline {
            return 0;
        }
        let left = deadline.saturating_duration_since(Instant::now()).as_nanos();
        let ticks = left * u128::from(APIC_HZ) / 1_000_000_000 / u128::from(self.divider());
        (ticks as u32).min(self.registers[reg::INITIAL])
    }

    /// When the timer will next fire.
    pub fn timer_deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The TSC_DEADLINE MSR.
    pub fn tsc_deadline(&self) -> u64 {
        if self.timer_mode() == TimerMode::Deadline { self.tsc_deadline } else { 0 }
    }
}

impl Cpu {
    pub(super) fn write_timer_lvt(&mut self, value: u32) {
        let lapic = &mut self.lapic;
        let before = lapic.timer_mode() == TimerMode::Deadline;
        let forced = if lapic.software_enabled() { 0 } else { MASKED };
        lapic.registers[reg::LVT_TIMER] = (value & 0x7_00ff) | forced;
        if before != (lapic.timer_mode() == TimerMode::Deadline) {
            // A change between counting and deadline disarms (Intel SDM 3A 11.5.4.1).
            lapic.deadline = None;
            lapic.tsc_deadline = 0;
            lapic.registers[reg::INITIAL] = 0;
            self.timer_changed();
        }
    }

    /// WRMSR of IA32_TSC_DEADLINE (Intel SDM 3A 11.5.4.1).
    pub(crate) fn set_tsc_deadline(&mut self, value: u64) {
        if self.lapic.timer_mode() != TimerMode::Deadline {
            return;
        }
        self.lapic.tsc_deadline = value;
        self.lapic.deadline = None;
        if value != 0 {
            let left = value.saturating_sub(self.guest_tsc());
            if left == 0 {
                self.fire_timer();
            } else {
                self.lapic.deadline = Instant::now().checked_add(tsc_duration(left));
            }
        }
        self.timer_changed();
    }

    /// Raises the timer's interrupt unless masked.
    fn fire_timer(&mut self) {
        let lapic = &mut self.lapic;
        let lvt = lapic.registers[reg::LVT_TIMER];
        lapic.tsc_deadline = 0;
        if lvt & MASKED == 0 && lvt & 0xff >= 16 {
            lapic.accept(lvt as u8, false);
        }
        self.recheck_interrupts();
    }
}

/// Looks whether the timer is due at `now`, and raises its interrupt then.
pub fn timer_expired(cpu: &mut Cpu, now: Instant) {
    let Some(deadline) = cpu.lapic.deadline else { return };
    if now < deadline {
        return;
    }
    cpu.outstanding = true;
    match cpu.lapic.timer_mode() {
        TimerMode::OneShot => cpu.lapic.deadline = None,
        TimerMode::Periodic => {
            let period = cpu.lapic.count_duration(cpu.lapic.registers[reg::INITIAL]);
            // Periods that were missed altogether are lost, as on a CPU that slept.
            let next = deadline + period;
            cpu.lapic.deadline = match period.is_zero() {
                true => None,
                false => Some(next.max(now)),
            };
        }
        TimerMode::Deadline => {
            let left = cpu.lapic.tsc_deadline.saturating_sub(cpu.guest_tsc());
            if left > 0 {
                // The host's two clocks disagree by a few ticks.
                cpu.lapic.deadline = Some(now + tsc_duration(left));
                cpu.timer_changed();
                return;
            }
            cpu.lapic.deadline = None;
        }
    }
    cpu.timer_changed();
    cpu.fire_timer();
}
