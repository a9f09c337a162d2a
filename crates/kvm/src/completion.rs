//! Instructions that KVM's emulator does not know are executed by a companion engine: same memory,
//! state moved over, one instruction, state moved back.
//!
//! The companion runs the instruction with all that belongs to it: its exception, if it raises
//! one, is delivered through the guest's own tables, and KVM goes on with the handler. The LAPIC
//! stays KVM's all the while; the companion's is off, so that no interrupt is taken there.
use crate::Companion;
use crate::state::Holder;
use arch::{LapicState, Msrs, VcpuState, msr};
use engine::{EngineError, Halt, Vcpu, VcpuIo, Vm, VmConfig};
use std::sync::Arc;

/// A vCPU of the companion engine, to execute single instructions.
pub struct Completer {
    vcpu: Box<dyn Vcpu>,
    vm: Arc<dyn Vm>,
}

impl Completer {
    /// Makes one over the memory of a VM.
    ///
    /// # Errors
    /// There is no companion engine, or it has no resources.
    pub fn new(companion: Option<Companion>, config: &VmConfig) -> Result<Self, EngineError> {
        let Some(companion) = companion else {
            return Err(EngineError::Unsupported(
                "KVM on this host cannot execute an instruction of the guest (emulation failure); \
                 use --engine soft"
                    .into(),
            ));
        };
        let vm = companion()?.create_vm(VmConfig { vcpus: 1, ..config.clone() })?;
        Ok(Self { vcpu: vm.create_vcpu(0)?, vm })
    }

    /// The companion's VM.
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// Executes the instruction at which a vCPU stands, or raises its exception. `Some` says that
    /// the vCPU shut down; its state is then that of the moment before.
    ///
    /// # Errors
    /// The state cannot be moved, or the companion cannot go on.
    pub fn complete(
        &mut self,
        mut kvm: Holder<'_>,
        io: &dyn VcpuIo,
    ) -> Result<Option<Halt>, EngineError> {
        let before = kvm.lend()?;
        self.vcpu.set_state(&lent(&before))?;
        let Some(stepper) = self.vcpu.stepper() else {
            return Err(EngineError::Defect("the companion engine runs no single steps".into()));
        };
        let halt = stepper.step(io)?;
        if halt.is_none() {
            let after = returned(&before, self.vcpu.state()?);
            kvm.take_executed(&before, &after)?;
        }
        Ok(halt)
    }
}

/// Registers that the companion is given; others are not touched by instructions that end here.
fn is_needed(number: u32) -> bool {
    let common = [msr::KERNEL_GS_BASE, msr::TSC_AUX, msr::PAT];
    (msr::STAR..=msr::SFMASK).contains(&number)
        || (msr::SYSENTER_CS..=msr::SYSENTER_EIP).contains(&number)
        || common.contains(&number)
}

/// `base` with the needed registers of `other`.
fn with_needed(mut base: Msrs, other: &Msrs) -> Msrs {
    for (number, value) in other.iter().filter(|(number, _)| is_needed(*number)) {
        // Every register of one table is in the other.
        let _ = base.set(number, value);
    }
    base
}

/// What of a vCPU's state the companion gets.
fn lent(before: &VcpuState) -> VcpuState {
    let fresh = VcpuState::reset();
    let mut state = before.clone();
    // Registers that the companion may lack, and that it does not touch.
    (state.avx512, state.pkru) = (fresh.avx512, fresh.pkru);
    state.msrs = with_needed(fresh.msrs, &before.msrs);
    // The bootstrap processor's LAPIC, switched off.
    state.lapic =
        LapicState { base: LapicState::DEFAULT_BASE | LapicState::BOOTSTRAP, ..fresh.lapic };
    // KVM keeps the NMI that waits.
    state.events.nmi_pending = false;
    state
}

/// What the vCPU's state is after the instruction.
fn returned(before: &VcpuState, ran: VcpuState) -> VcpuState {
    let mut after = ran;
    (after.avx512, after.pkru) = (before.avx512.clone(), before.pkru);
    after.msrs = with_needed(before.msrs.clone(), &after.msrs);
    after.lapic = before.lapic.clone();
    after.events.nmi_pending = before.events.nmi_pending;
    after
}
