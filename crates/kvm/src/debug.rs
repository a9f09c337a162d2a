//! Stops that a debugger outside the guest asked for (api.rst §4.87, KVM_SET_GUEST_DEBUG).
//!
//! KVM stops before an instruction with a breakpoint again and again, so the vCPU goes over it by
//! a single step with only data breakpoints left. KVM does not tell the guest's own debug
//! exceptions from the debugger's: what nobody asked for is given to the guest.
//!
//! Where KVM emulates the guest's code (KVM on PVM), data breakpoints never hit, and a HLT that
//! was stepped over halts the vCPU an instruction or more later: KVM forgets both.
use crate::error::{element, refused};
use arch::GuestVirtual;
use arch::registers::vector;
use engine::{DebugPlan, DebugStop, EngineError};
use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_debug_exit_arch, kvm_guest_debug,
};
use kvm_ioctls::{VcpuFd, VmFd};

/// Bit of DR6: a single step (Intel SDM 3B 18.2.3).
const BS: u64 = 1 << 14;
/// Bits of DR6 that say what happened: B0 to B3, BD, BS, BT.
const CAUSES: u64 = 0xe00f;

/// A debugger's part of a vCPU.
#[derive(Default)]
pub struct Outside {
    plan: DebugPlan,
    addresses: [u64; 4],
    dr7: u64,
    /// The linear address at which execution breakpoints have stopped the vCPU.
    passed: Option<u64>,
    /// The vCPU is going over that instruction.
    over: bool,
    /// The linear address of the instruction that is being stepped.
    from: Option<u64>,
}

/// Whose a debug exit is.
pub enum Whose {
    /// The debugger's.
    Debugger(DebugStop),
    /// Nobody's: the vCPU went over a breakpoint.
    Nobody,
    /// The guest's own.
    Guest,
}

impl Outside {
    /// Takes over a plan.
    ///
    /// # Errors
    /// No CPU could follow it, or this host's KVM cannot.
    pub fn set(&mut self, vm: &VmFd, vcpu: &VcpuFd, plan: &DebugPlan) -> Result<(), EngineError> {
        let (addresses, dr7) = plan.registers()?;
        if !plan.is_empty() {
            check(vm)?;
        }
        let passed = self.passed;
        *self = Self { plan: *plan, addresses, dr7, passed, ..Self::default() };
        self.tell(vcpu)
    }

    /// Whether interrupts wait.
    pub fn holds_interrupts(&self) -> bool {
        self.plan.single_step
    }

    /// Before the vCPU runs, where it is: goes over the breakpoint that stopped it here.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn begin(&mut self, vcpu: &VcpuFd) -> Result<(), EngineError> {
        if self.plan.is_empty() {
            self.passed = None;
            return Ok(());
        }
        // Kept until the step is made: a kick may come first.
        let here = linear_rip(vcpu)?;
        self.over = self.passed == Some(here);
        self.from = self.steps().then_some(here);
        // KVM steps from where the vCPU was when it was told.
        self.tell(vcpu)
    }

    /// Whether a single instruction is being executed.
    pub fn steps(&self) -> bool {
        self.plan.single_step || self.over
    }

    /// After what may have been the end of an instruction that KVM did not tell: KVM's emulator
    /// forgets the step over a write to a port or to device registers.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn moved(&mut self, vcpu: &VcpuFd) -> Result<Option<DebugStop>, EngineError> {
        match self.from {
            Some(from) if self.steps() && linear_rip(vcpu)? != from => self.executed(vcpu),
            _ => Ok(None),
        }
    }

    /// After an instruction that another engine executed.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn executed(&mut self, vcpu: &VcpuFd) -> Result<Option<DebugStop>, EngineError> {
        if !self.steps() {
            return Ok(None);
        }
        let stop = match self.judge(linear_rip(vcpu)?, BS) {
            Whose::Debugger(stop) => Some(stop),
            _ => None,
        };
        self.tell(vcpu)?;
        Ok(stop)
    }

    /// Says whose a debug exit is.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn exit(&mut self, vcpu: &VcpuFd, exit: kvm_debug_exit_arch) -> Result<Whose, EngineError> {
        let over = self.over;
        let whose = self.judge(exit.pc, exit.dr6);
        if over {
            self.tell(vcpu)?;
        }
        if let Whose::Guest = whose {
            reflect(vcpu, exit.dr6)?;
        }
        Ok(whose)
    }

    fn judge(&mut self, pc: u64, dr6: u64) -> Whose {
        let enabled = |n: u32| u64::from(self.dr7 >> (2 * n) & 3 != 0) << n;
        let mut hits = dr6 & (0..4).fold(0, |bits, n| bits | enabled(n));
        let over = std::mem::take(&mut self.over);
        self.passed = None;
        if self.plan.single_step {
            hits |= dr6 & BS;
        }
        let stepped = dr6 & BS != 0 && (over || self.plan.single_step);
        // What would stop it before the next instruction is told now, and not once more.
        let next = self.plan.execution_hits(GuestVirtual(pc));
        let stop = DebugStop::from_dr6(if stepped { hits | next } else { hits });
        if stop.is_any() {
            self.passed = (next != 0).then_some(pc);
            return Whose::Debugger(stop);
        }
        if over { Whose::Nobody } else { Whose::Guest }
    }

    fn tell(&self, vcpu: &VcpuFd) -> Result<(), EngineError> {
        let mut debug = kvm_guest_debug::default();
        if !self.plan.is_empty() {
            debug.control |= KVM_GUESTDBG_ENABLE;
        }
        if self.steps() {
            debug.control |= KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        }
        let dr7 = if self.over { without_execution(self.dr7) } else { self.dr7 };
        if dr7 & 0xff != 0 {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[..4].copy_from_slice(&self.addresses);
            debug.arch.debugreg[7] = dr7;
        }
        vcpu.set_guest_debug(&debug)
            .map_err(refused("KVM does not take breakpoints (KVM_SET_GUEST_DEBUG)"))
    }
}

/// DR7 without the execution breakpoints.
fn without_execution(dr7: u64) -> u64 {
    let keep = |n: u32| dr7 >> (16 + 4 * n) & 3 != 0;
    (0..4).filter(|n| !keep(*n)).fold(dr7, |dr7, n| dr7 & !(3 << (2 * n)))
}

/// Whether this host's KVM can do it all.
fn check(vm: &VmFd) -> Result<(), EngineError> {
    let needed = KVM_GUESTDBG_ENABLE
        | KVM_GUESTDBG_SINGLESTEP
        | KVM_GUESTDBG_USE_HW_BP
        | KVM_GUESTDBG_BLOCKIRQ;
    let offered = vm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into()) as u32;
    if vm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG.into()) <= 0 || offered & needed != needed {
        return Err(EngineError::Unsupported(format!(
            "this host's KVM cannot debug guests (it needs KVM_CAP_SET_GUEST_DEBUG2 with flags \
             {needed:#x}, Linux 5.16, and offers {offered:#x}); use --engine soft"
        )));
    }
    Ok(())
}

fn linear_rip(vcpu: &VcpuFd) -> Result<u64, EngineError> {
    let rip = vcpu.get_regs().map_err(element("read", "the general registers"))?.rip;
    let sregs = vcpu.get_sregs().map_err(element("read", "the segment registers"))?;
    let long = sregs.efer & arch::registers::efer::LMA != 0 && sregs.cs.l != 0;
    Ok(if long { rip } else { sregs.cs.base.wrapping_add(rip) & 0xffff_ffff })
}

/// Gives the guest its own debug exception.
fn reflect(vcpu: &VcpuFd, dr6: u64) -> Result<(), EngineError> {
    let mut registers = vcpu.get_debug_regs().map_err(element("read", "the debug registers"))?;
    registers.dr6 = registers.dr6 & !0xf | dr6 & CAUSES;
    vcpu.set_debug_regs(&registers).map_err(element("set", "the debug registers"))?;
    let mut events = vcpu.get_vcpu_events().map_err(element("read", "pending events"))?;
    events.exception.nr = vector::DB;
    events.exception.injected = 1;
    // What else there is stays as it is.
    events.flags = 0;
    vcpu.set_vcpu_events(&events).map_err(element("set", "pending events"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{Breakpoint, BreakpointKind, Width};

    fn outside(single_step: bool) -> Outside {
        let at = |address, kind| Some(Breakpoint { address: GuestVirtual(address), kind });
        let breakpoints = [
            at(0x1000, BreakpointKind::Execute),
            at(0x2000, BreakpointKind::Write(Width::Byte)),
            None,
            None,
        ];
        let plan = DebugPlan { single_step, breakpoints };
        let registers = plan.registers();
        assert!(registers.is_ok());
        let (addresses, dr7) = registers.unwrap_or_default();
        Outside { plan, addresses, dr7, ..Outside::default() }
    }

    #[test]
    fn what_the_debugger_did_not_ask_for_is_the_guests() {
        assert!(matches!(outside(false).judge(0x500, BS), Whose::Guest));
        assert!(matches!(outside(false).judge(0x500, 0b100), Whose::Guest));
        assert!(matches!(outside(true).judge(0x500, BS), Whose::Debugger(_)));
        assert!(matches!(outside(false).judge(0x500, 0b10), Whose::Debugger(_)));
    }

    #[test]
    fn going_over_a_breakpoint_stops_only_where_another_waits() {
        let mut vcpu = Outside { over: true, ..outside(false) };
        assert!(matches!(vcpu.judge(0x1004, BS), Whose::Nobody));
        let mut vcpu = Outside { over: true, ..outside(false) };
        assert!(matches!(vcpu.judge(0x1000, BS), Whose::Debugger(_)));
        assert_eq!(vcpu.passed, Some(0x1000));
    }

    #[test]
    fn only_data_breakpoints_stay_while_one_on_an_instruction_is_passed() {
        assert_eq!(without_execution(outside(false).dr7) & 0xff, 0b1000);
    }
}
