//! The local APIC: registers, priorities, timer (Intel SDM 3A chapter 11).
use crate::cpu::Cpu;
use crate::routing::{Message, Shorthand, route};
use crate::vm::pending;
use arch::{LapicState, MpState};
use std::sync::atomic::Ordering;
use std::time::Instant;

mod timer;

pub use crate::routing::route_msi;
use timer::TimerMode;
pub use timer::timer_expired;

/// Numbers of the registers: offset in the xAPIC page divided by 16.
mod reg {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const PPR: usize = 0x0a;
    pub const EOI: usize = 0x0b;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const ESR: usize = 0x28;
    pub const ICR: usize = 0x30;
    pub const ICR_HIGH: usize = 0x31;
    pub const LVT_TIMER: usize = 0x32;
    pub const LINT0: usize = 0x35;
    pub const LVT_ERROR: usize = 0x37;
    pub const INITIAL: usize = 0x38;
    pub const CURRENT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
    pub const SELF_IPI: usize = 0x3f;
}

const MASKED: u32 = LapicState::MASKED;
const ENABLED: u64 = LapicState::ENABLED;
const X2APIC: u64 = LapicState::X2APIC;
const BOOTSTRAP: u64 = LapicState::BOOTSTRAP;
const NO_PAGE: u64 = u64::MAX;

/// One local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    /// Whether the vCPU runs, sleeps in HLT or waits for a start-up IPI.
    pub mp: MpState,
    /// An NMI waits to be delivered.
    pub nmi_pending: bool,
    index: u32,
    base: u64,
    /// Physical address of the register page in xAPIC mode, or one that nothing matches.
    page: u64,
    registers: [u32; 64],
    errors: u32,
    tsc_deadline: u64,
    deadline: Option<Instant>,
}

impl Lapic {
    /// The LAPIC of vCPU `index` after reset.
    pub fn new(index: u32, _vcpus: u32) -> Self {
        let mut lapic = Self {
            mp: if index == 0 { MpState::Running } else { MpState::WaitForSipi },
            nmi_pending: false,
            index,
            base: 0,
            page: NO_PAGE,
            registers: [0; 64],
            errors: 0,
            tsc_deadline: 0,
            deadline: None,
        };
        lapic.set_base(LapicState::reset(index).base);
        lapic.reset_registers();
        lapic
    }

    /// Registers as after RESET or INIT; the base stays (Intel SDM 3A 11.4.7).
    pub(crate) fn reset_registers(&mut self) {
        self.registers = LapicState::reset(self.index).registers;
        if self.index == 0 {
            // Virtual wire mode, as firmware leaves it: the PIC reaches the bootstrap processor.
            self.registers[reg::LINT0] = 7 << 8;
        }
        if self.x2apic() {
            self.registers[reg::ID] = self.index;
            self.registers[reg::LDR] = self.x2apic_ldr();
        }
        self.errors = 0;
        self.tsc_deadline = 0;
        self.deadline = None;
    }

    /// Whether a guest-physical address belongs to the register page.
    #[inline]
    pub fn claims(&self, physical: u64) -> bool {
        physical & !0xfff == self.page
    }

    /// The IA32_APIC_BASE MSR.
    pub fn base(&self) -> u64 {
        self.base
    }

    fn set_base(&mut self, value: u64) {
        self.base = value;
        let xapic = value & (ENABLED | X2APIC) == ENABLED;
        self.page = if xapic { value & 0x000f_ffff_ffff_f000 } else { NO_PAGE };
    }

    pub(crate) fn x2apic(&self) -> bool {
        self.base & X2APIC != 0
    }

    pub(crate) fn hardware_enabled(&self) -> bool {
        self.base & ENABLED != 0
    }

    fn software_enabled(&self) -> bool {
        self.registers[reg::SVR] & 0x100 != 0
    }

    fn x2apic_ldr(&self) -> u32 {
        (self.index >> 4) << 16 | 1 << (self.index & 15)
    }

    /// Whether the PIC's output reaches the CPU as ExtINT through LINT0.
    pub(crate) fn accepts_pic(&self) -> bool {
        let lint0 = self.registers[reg::LINT0];
        !self.hardware_enabled() || (lint0 & MASKED == 0 && lint0 >> 8 & 7 == 7)
    }

    /// CR8: the upper half of the task priority.
    pub fn cr8(&self) -> u64 {
        u64::from(self.registers[reg::TPR] >> 4 & 0xf)
    }

    /// Writes CR8.
    pub fn set_cr8(&mut self, value: u64) {
        self.registers[reg::TPR] = ((value & 0xf) << 4) as u32;
    }

    /// Highest vector set in one of the 256-bit registers.
    fn highest(&self, first: usize) -> Option<u8> {
        (0..8).rev().find_map(|n| {
            let word = self.registers[first + n];
            (word != 0).then(|| (n as u32 * 32 + 31 - word.leading_zeros()) as u8)
        })
    }

    fn set_bit(&mut self, first: usize, vector: u8, on: bool) {
        let word = &mut self.registers[first + usize::from(vector >> 5)];
        let bit = 1 << (vector & 31);
        *word = if on { *word | bit } else { *word & !bit };
    }

    fn bit(&self, first: usize, vector: u8) -> bool {
        self.registers[first + usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
    }

    /// Processor priority (Intel SDM 3A 11.8.3.1).
    fn ppr(&self) -> u32 {
        let tpr = self.registers[reg::TPR] & 0xff;
        let isr = u32::from(self.highest(reg::ISR).unwrap_or(0));
        if tpr >> 4 >= isr >> 4 { tpr } else { isr & 0xf0 }
    }

    /// Accepts an interrupt request.
    pub(crate) fn accept(&mut self, vector: u8, level: bool) {
        self.set_bit(reg::IRR, vector, true);
        self.set_bit(reg::TMR, vector, level);
    }

    /// The vector that the CPU would take now, were interrupts enabled.
    pub(crate) fn deliverable(&self) -> Option<u8> {
        let vector = self.highest(reg::IRR)?;
        let wanted = self.hardware_enabled() && self.software_enabled();
        (wanted && u32::from(vector) >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// Moves a vector from requested to in service.
    pub(crate) fn acknowledge(&mut self, vector: u8) {
        self.set_bit(reg::IRR, vector, false);
        self.set_bit(reg::ISR, vector, true);
    }

    /// Ends the interrupt in service; returns its vector if it was level-triggered.
    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.highest(reg::ISR)?;
        self.set_bit(reg::ISR, vector, false);
        self.bit(reg::TMR, vector).then_some(vector)
    }

    /// The state that any engine can take over.
    pub fn save(&self) -> LapicState {
        let mut registers = self.registers;
        registers[reg::PPR] = self.ppr();
        registers[reg::CURRENT] = self.current_count();
        // Errors that the guest has not yet latched by a write to the register.
        registers[reg::ESR] |= self.errors;
        LapicState { base: self.base, registers, tsc_deadline: self.tsc_deadline }
    }

    fn raise_error(&mut self, bits: u32) -> bool {
        self.errors |= bits;
        let lvt = self.registers[reg::LVT_ERROR];
        if lvt & MASKED == 0 && lvt & 0xff >= 16 {
            self.accept(lvt as u8, false);
            return true;
        }
        false
    }
}

impl Cpu {
    /// Reads the register page in xAPIC mode.
    pub fn lapic_read(&mut self, physical: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = (physical & 0xfff) as usize + i;
            // Each register is the first four bytes of its 16.
            let value = if at & 15 < 4 { self.lapic_register(at >> 4) } else { 0 };
            *byte = value.to_le_bytes()[at & 3];
        }
    }

    fn lapic_register(&mut self, n: usize) -> u32 {
        let lapic = &self.lapic;
        match n {
            reg::PPR => lapic.ppr(),
            reg::CURRENT => lapic.current_count(),
            _ => lapic.registers.get(n).copied().unwrap_or(0),
        }
    }

    /// Writes the register page in xAPIC mode: aligned words only, as the manual demands.
    pub fn lapic_write(&mut self, physical: u64, data: &[u8]) {
        let Some(word) = data.first_chunk::<4>() else { return };
        if physical & 15 == 0 {
            let n = (physical & 0xfff) as usize >> 4;
            self.lapic_write_register(n, u32::from_le_bytes(*word));
        }
    }

    fn lapic_write_register(&mut self, n: usize, value: u32) {
        let lapic = &mut self.lapic;
        match n {
            reg::ID => lapic.registers[n] = value & 0xff00_0000,
            reg::TPR => {
                lapic.registers[n] = value & 0xff;
                self.recheck_interrupts();
            }
            reg::EOI => self.end_of_interrupt(),
            reg::LDR => lapic.registers[n] = value & 0xff00_0000,
            reg::DFR => lapic.registers[n] = value | 0x0fff_ffff,
            reg::SVR => self.write_svr(value),
            reg::ESR => {
                lapic.registers[n] = lapic.errors;
                lapic.errors = 0;
            }
            reg::ICR => {
                lapic.registers[n] = value & !(1 << 12);
                let destination = lapic.registers[reg::ICR_HIGH] >> 24;
                self.send_ipi(value, destination);
            }
            reg::ICR_HIGH => lapic.registers[n] = value & 0xff00_0000,
            reg::LVT_TIMER => self.write_timer_lvt(value),
            0x33..=reg::LVT_ERROR => {
                let forced = if lapic.software_enabled() { 0 } else { MASKED };
                lapic.registers[n] = (value & 0x1_a7ff) | forced;
                self.recheck_interrupts();
            }
            reg::INITIAL => {
                lapic.registers[n] = value;
                if lapic.timer_mode() != TimerMode::Deadline {
                    let after = lapic.count_duration(value);
                    lapic.deadline = (value != 0).then(|| Instant::now() + after);
                    self.timer_changed();
                }
            }
            reg::DIVIDE => {
                let left = lapic.current_count();
                lapic.registers[n] = value & 0xb;
                if left != 0 {
                    lapic.deadline = Some(Instant::now() + lapic.count_duration(left));
                    self.timer_changed();
                }
            }
            _ => {
                if lapic.raise_error(1 << 7) {
                    self.recheck_interrupts();
                }
            }
        }
        if matches!(n, reg::ID | reg::LDR | reg::DFR | reg::SVR) {
            self.publish_lapic();
        }
    }

    fn write_svr(&mut self, value: u32) {
        let lapic = &mut self.lapic;
        lapic.registers[reg::SVR] = value & 0x1ff;
        if value & 0x100 == 0 {
            for lvt in &mut lapic.registers[reg::LVT_TIMER..=reg::LVT_ERROR] {
                *lvt |= MASKED;
            }
        }
        self.recheck_interrupts();
    }

    fn end_of_interrupt(&mut self) {
        if let Some(vector) = self.lapic.end_of_interrupt() {
            self.io().end_of_interrupt(vector);
        }
        self.recheck_interrupts();
    }

    /// Makes the run loop look again where a request may have become deliverable.
    fn recheck_interrupts(&self) {
        let pic = self.index == 0 && self.vm.pic_output.load(Ordering::SeqCst);
        if (pic || self.lapic.deliverable().is_some())
            && let Some(mailbox) = self.vm.mailboxes.get(self.index as usize)
        {
            mailbox.post(pending::INTERRUPT);
        }
    }

    /// Tells senders of interrupts who this LAPIC is. Once when the vCPU is made, then whenever
    /// it changes.
    pub fn publish_lapic(&self) {
        let Some(mailbox) = self.vm.mailboxes.get(self.index as usize) else { return };
        let lapic = &self.lapic;
        let id = lapic.registers[reg::ID];
        let x2apic = lapic.x2apic();
        let ldr = lapic.registers[reg::LDR];
        let apic = &mailbox.apic;
        apic.x2apic.store(x2apic, Ordering::SeqCst);
        apic.id.store(if x2apic { lapic.index } else { id >> 24 }, Ordering::SeqCst);
        apic.ldr.store(if x2apic { ldr } else { ldr >> 24 }, Ordering::SeqCst);
        apic.dfr.store(lapic.registers[reg::DFR], Ordering::SeqCst);
        let enabled = lapic.hardware_enabled() && lapic.software_enabled();
        apic.enabled.store(enabled, Ordering::SeqCst);
    }

    fn send_ipi(&mut self, command: u32, destination: u32) {
        let message = Message {
            destination,
            broadcast: if self.lapic.x2apic() { u32::MAX } else { 0xff },
            logical: command & 1 << 11 != 0,
            mode: (command >> 8 & 7) as u8,
            vector: command as u8,
            level: command & 1 << 15 != 0,
            assert: command & 1 << 14 != 0,
        };
        let shorthand = match command >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::Only(self.index),
            2 => Shorthand::All,
            _ => Shorthand::AllBut(self.index),
        };
        if message.mode == 0 && message.vector < 16 {
            if self.lapic.raise_error(1 << 5) {
                self.recheck_interrupts();
            }
            return;
        }
        route(&self.vm, &message, shorthand);
    }

    /// RDMSR in the x2APIC block; `None` is #GP.
    pub(crate) fn lapic_read_msr(&mut self, index: u32) -> Option<u64> {
        if !self.lapic.x2apic() {
            return None;
        }
        let n = (index - arch::msr::X2APIC) as usize;
        match n {
            reg::ID => Some(u64::from(self.lapic.index)),
            reg::ICR => {
                let high = self.lapic.registers[reg::ICR_HIGH];
                Some(u64::from(high) << 32 | u64::from(self.lapic.registers[n]))
            }
            reg::DFR | reg::EOI | reg::ICR_HIGH | reg::SELF_IPI | 0x09 | 0x0c => None,
            reg::VERSION
            | reg::TPR
            | reg::PPR
            | reg::LDR..=reg::ESR
            | reg::LVT_TIMER..=reg::CURRENT
            | reg::DIVIDE => Some(u64::from(self.lapic_register(n))),
            _ => None,
        }
    }

    /// WRMSR in the x2APIC block; `None` is #GP.
    pub(crate) fn lapic_write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        if !self.lapic.x2apic() {
            return None;
        }
        let n = (index - arch::msr::X2APIC) as usize;
        if n == reg::ICR {
            self.lapic.registers[reg::ICR] = value as u32 & !(1 << 12);
            self.lapic.registers[reg::ICR_HIGH] = (value >> 32) as u32;
            self.send_ipi(value as u32, (value >> 32) as u32);
            return Some(());
        }
        let word = u32::try_from(value).ok()?;
        match n {
            reg::EOI | reg::ESR if word != 0 => return None,
            reg::SELF_IPI => self.send_ipi(1 << 18 | (word & 0xff), 0),
            reg::TPR if word > 0xff => return None,
            reg::TPR
            | reg::EOI
            | reg::SVR
            | reg::ESR
            | reg::LVT_TIMER..=reg::INITIAL
            | reg::DIVIDE => self.lapic_write_register(n, word),
            _ => return None,
        }
        Some(())
    }

    /// WRMSR of IA32_APIC_BASE; `None` is #GP (Intel SDM 3A 11.12.5).
    pub(crate) fn lapic_write_base(&mut self, value: u64) -> Option<()> {
        let old = self.lapic.base;
        let fixed = BOOTSTRAP;
        let reserved = !((1 << crate::mmu::PHYSICAL_BITS) - 1) | 0x2ff;
        let (was, now) = (old & (ENABLED | X2APIC), value & (ENABLED | X2APIC));
        let forbidden = now == X2APIC
            || (was == ENABLED | X2APIC && now == ENABLED)
            || (was == 0 && now == ENABLED | X2APIC);
        if value & reserved != 0 || forbidden {
            return None;
        }
        self.lapic.set_base((value & !fixed) | (old & fixed));
        if was != now {
            if now == 0 || was == 0 {
                self.lapic.reset_registers();
            } else if self.lapic.x2apic() {
                self.lapic.registers[reg::ID] = self.lapic.index;
                self.lapic.registers[reg::LDR] = self.lapic.x2apic_ldr();
            }
            self.timer_changed();
        }
        self.publish_lapic();
        self.flush_tlb();
        Some(())
    }

    /// Takes over a saved state, whose base need not follow the rules for guests; the TSC must have
    /// been restored before.
    pub fn restore_lapic(&mut self, state: &LapicState) {
        let lapic = &mut self.lapic;
        lapic.set_base(state.base);
        lapic.registers = state.registers;
        lapic.errors = state.registers[reg::ESR];
        lapic.tsc_deadline = state.tsc_deadline;
        lapic.deadline = None;
        let left = lapic.registers[reg::CURRENT];
        if lapic.timer_mode() == TimerMode::Deadline {
            self.set_tsc_deadline(state.tsc_deadline);
        } else if left != 0 {
            lapic.deadline = Some(Instant::now() + lapic.count_duration(left));
        }
        self.timer_changed();
        self.publish_lapic();
        self.recheck_interrupts();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled() -> Lapic {
        let mut lapic = Lapic::new(0, 1);
        lapic.registers[reg::SVR] = 0x1ff;
        lapic
    }

    #[test]
    fn the_highest_vector_is_delivered_first_and_holds_back_its_own_class() {
        let mut lapic = enabled();
        lapic.accept(0x41, false);
        lapic.accept(0x52, false);
        assert_eq!(lapic.deliverable(), Some(0x52));
        lapic.acknowledge(0x52);
        assert_eq!(lapic.deliverable(), None);
        lapic.accept(0x5f, false);
        assert_eq!(lapic.deliverable(), None);
        lapic.accept(0x60, false);
        assert_eq!(lapic.deliverable(), Some(0x60));
    }

    #[test]
    fn the_end_of_a_level_triggered_interrupt_names_its_vector() {
        let mut lapic = enabled();
        for (vector, level) in [(0x41, true), (0x61, false)] {
            lapic.accept(vector, level);
            lapic.acknowledge(vector);
        }
        assert_eq!(lapic.end_of_interrupt(), None);
        assert_eq!(lapic.end_of_interrupt(), Some(0x41));
    }

    #[test]
    fn the_task_priority_holds_back_its_class_and_those_below() {
        let mut lapic = enabled();
        lapic.set_cr8(5);
        lapic.accept(0x5f, false);
        assert_eq!(lapic.deliverable(), None);
        lapic.set_cr8(4);
        assert_eq!(lapic.deliverable(), Some(0x5f));
    }

    #[test]
    fn only_the_register_page_of_xapic_mode_is_claimed() {
        let mut lapic = enabled();
        assert!(lapic.claims(0xfee0_0020));
        assert!(!lapic.claims(0xfee0_1000));
        lapic.set_base(LapicState::DEFAULT_BASE | ENABLED | X2APIC);
        assert!(!lapic.claims(0xfee0_0020));
    }
}
