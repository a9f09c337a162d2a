//! The local APIC, and what happens between instructions.
use super::inspect::{Inspect, Value, fields};

/// The local APIC (Intel SDM 3A chapter 11).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LapicState {
    /// IA32_APIC_BASE: the page's address, whether the LAPIC is on, and in x2APIC mode.
    pub base: u64,
    /// The registers page as xAPIC lays it out (Intel SDM 3A table 11-1): the register at offset
    /// `16 * n`.
    pub registers: [u32; 64],
    /// TSC value at which the deadline timer fires, 0 when it is not armed.
    pub tsc_deadline: u64,
}
fields!(LapicState { base, registers, tsc_deadline });

impl LapicState {
    /// Where the page is after reset.
    pub const DEFAULT_BASE: u64 = 0xfee0_0000;
    /// Bit of `base`: the LAPIC is on.
    pub const ENABLED: u64 = 1 << 11;
    /// Bit of `base`: x2APIC mode.
    pub const X2APIC: u64 = 1 << 10;
    /// Bit of `base`: this is the bootstrap processor.
    pub const BOOTSTRAP: u64 = 1 << 8;
    /// Bit of a local vector: masked.
    pub const MASKED: u32 = 1 << 16;
    /// Version 14H with six local vectors.
    pub const VERSION: u32 = 0x0005_0014;

    /// The LAPIC with this id after RESET (Intel SDM 3A 11.4.7.1), in xAPIC mode; the one with id
    /// 0 is the bootstrap processor's.
    pub const fn reset(id: u32) -> Self {
        const ID: usize = 0x02;
        const VERSION: usize = 0x03;
        const DFR: usize = 0x0e;
        const SVR: usize = 0x0f;
        const LVT_TIMER: usize = 0x32;
        const LVT_ERROR: usize = 0x37;
        let mut registers = [0; 64];
        registers[ID] = id << 24;
        registers[VERSION] = Self::VERSION;
        registers[DFR] = u32::MAX;
        registers[SVR] = 0xff;
        let mut lvt = LVT_TIMER;
        while lvt <= LVT_ERROR {
            registers[lvt] = Self::MASKED;
            lvt += 1;
        }
        let bootstrap = if id == 0 { Self::BOOTSTRAP } else { 0 };
        Self { base: Self::DEFAULT_BASE | Self::ENABLED | bootstrap, registers, tsc_deadline: 0 }
    }
}

/// What keeps interrupts off until after the next instruction (Intel SDM 3A 6.8.1 and 6.8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum InterruptShadow {
    /// Nothing.
    #[default]
    None,
    /// STI: interrupts.
    Sti,
    /// MOV SS or POP SS: interrupts and debug exceptions.
    MovSs,
}

impl Inspect for InterruptShadow {
    fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
        visit(
            path,
            Value::Word(match self {
                Self::None => "none",
                Self::Sti => "sti",
                Self::MovSs => "mov ss",
            }),
        );
    }
}

/// What the CPU has taken and not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InDelivery {
    /// A debug trap after the last instruction (Intel SDM 3A 18.3.1); DR6 says why.
    DebugTrap,
    /// An interrupt of the PIC's, which has been acknowledged, with this vector.
    Interrupt(u8),
}

impl Inspect for Option<InDelivery> {
    fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
        visit(
            path,
            match self {
                None => Value::Word("nothing"),
                Some(InDelivery::DebugTrap) => Value::Word("debug trap"),
                Some(InDelivery::Interrupt(vector)) => Value::Number((*vector).into()),
            },
        );
    }
}

/// Events between instructions that a snapshot must carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Event {
    /// What keeps interrupts off for one instruction.
    pub interrupt_shadow: InterruptShadow,
    /// An NMI waits to be delivered.
    pub nmi_pending: bool,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
    /// What is delivered before the next instruction, whatever else waits.
    pub in_delivery: Option<InDelivery>,
}
fields!(Event { interrupt_shadow, nmi_pending, nmi_blocked, in_delivery });

/// Whether the vCPU takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Running,
    /// Waits in HLT for an interrupt.
    Halted,
    /// Waits for INIT and start-up IPI (application processors after reset).
    WaitForSipi,
}

impl Inspect for MpState {
    fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
        visit(
            path,
            Value::Word(match self {
                Self::Running => "running",
                Self::Halted => "halted",
                Self::WaitForSipi => "wait for sipi",
            }),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_lapic_is_the_bootstrap_processors() {
        assert_eq!(LapicState::reset(0).base, 0xfee0_0900);
        let third = LapicState::reset(3);
        assert_eq!((third.base, third.registers[2]), (0xfee0_0800, 3 << 24));
        assert!(third.registers[0x32..0x38].iter().all(|lvt| *lvt == LapicState::MASKED));
    }
}
