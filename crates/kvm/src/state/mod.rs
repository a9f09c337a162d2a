//! The engine-neutral state of a vCPU, from KVM's structures and to them.
//!
//! The order of setting matters to KVM: control registers decide which other registers are
//! valid, the LAPIC's mode (in its base register) the meaning of its page, the LAPIC's timer mode
//! whether a deadline can be set, and what the vCPU is doing comes last.
mod events;
mod fpu;
mod lapic;
mod msrs;
mod registers;

pub use events::inject;
pub use msrs::Msrs;

use arch::{MpState, VcpuState, msr};
use engine::EngineError;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use crate::error::element;

/// What belongs to a vCPU's state and does not change.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    /// The vCPU's number.
    pub index: u32,
    /// The MSRs as they were after reset.
    pub reset_msrs: &'a Msrs,
}

/// Reads the complete state.
///
/// # Errors
/// Names the element that KVM does not let be read, or that the neutral state has no place for.
pub fn get(vcpu: &VcpuFd, scope: Scope<'_>) -> Result<VcpuState, EngineError> {
    read(vcpu, scope, fpu::Beyond::Refuse)
}

/// As [`get`], for [`set_executed`] to follow: registers that the neutral state lacks are left
/// where they are.
///
/// # Errors
/// As [`get`].
pub fn lend(vcpu: &VcpuFd, scope: Scope<'_>) -> Result<VcpuState, EngineError> {
    read(vcpu, scope, fpu::Beyond::Keep)
}

fn read(vcpu: &VcpuFd, scope: Scope<'_>, beyond: fpu::Beyond) -> Result<VcpuState, EngineError> {
    // First, because KVM takes a pending INIT or start-up IPI into account on the way.
    let mut state = VcpuState { mp: mp_state(vcpu)?, ..VcpuState::default() };
    registers::get(vcpu, &mut state)?;
    let xcrs = vcpu.get_xcrs().map_err(element("read", "XCR0"))?;
    let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0);
    state.xcr0 = xcr0.map_or(1, |xcr| xcr.value);
    state.fpu = fpu::get(vcpu, beyond)?;
    state.lapic = lapic::get(vcpu)?;
    let msrs = scope.reset_msrs.read_again(vcpu)?;
    state.tsc = msrs.value(msr::TSC).unwrap_or(0);
    state.lapic.tsc_deadline = msrs.value(msr::TSC_DEADLINE).unwrap_or(0);
    state.msrs = msrs.neutral();
    let base = vcpu.get_sregs().map_err(element("read", "the LAPIC's base"))?.apic_base;
    state.msrs.push(arch::MsrState { index: msr::APIC_BASE, value: base });
    events::get(vcpu, &mut state)?;
    Ok(state)
}

/// Replaces the complete state.
///
/// # Errors
/// Names the element that KVM does not take.
pub fn set(vcpu: &VcpuFd, state: &VcpuState, scope: Scope<'_>) -> Result<(), EngineError> {
    registers::set_system(vcpu, state, apic_base(state, scope.index))?;
    registers::set_general(vcpu, state)?;
    set_xcr0(vcpu, state.xcr0)?;
    fpu::set(vcpu, &state.fpu)?;
    registers::set_debug(vcpu, state)?;
    lapic::set(vcpu, &state.lapic)?;
    scope.reset_msrs.write(vcpu, state)?;
    events::set(vcpu, state)?;
    set_mp_state(vcpu, state.mp)
}

/// Replaces what an instruction can change: not the LAPIC, the clocks, and what other CPUs and
/// devices do to this one meanwhile.
///
/// # Errors
/// As [`set`].
pub fn set_executed(
    vcpu: &VcpuFd,
    before: &VcpuState,
    after: &VcpuState,
    scope: Scope<'_>,
) -> Result<(), EngineError> {
    let system = |s: &VcpuState| (s.segments, s.gdtr, s.idtr, s.cr0, s.cr2, s.cr3, s.cr4, s.efer);
    if system(before) != system(after) {
        registers::set_system(vcpu, after, apic_base(before, scope.index))?;
    }
    registers::set_general(vcpu, after)?;
    if before.xcr0 != after.xcr0 {
        set_xcr0(vcpu, after.xcr0)?;
    }
    if before.fpu != after.fpu {
        fpu::set_shared(vcpu, &after.fpu)?;
    }
    if before.debug != after.debug {
        registers::set_debug(vcpu, after)?;
    }
    scope.reset_msrs.write_changes(vcpu, before, after)?;
    events::set_executed(vcpu, after)?;
    if before.mp != after.mp {
        set_mp_state(vcpu, after.mp)?;
    }
    Ok(())
}

/// The LAPIC's base register of a state, or its value after reset: enabled, and the first vCPU is
/// the bootstrap processor (Intel SDM 3A 10.4.4).
fn apic_base(state: &VcpuState, index: u32) -> u64 {
    let reset = 0xfee0_0800 | if index == 0 { 1 << 8 } else { 0 };
    let saved = state.msrs.iter().find(|m| m.index == msr::APIC_BASE);
    saved.map_or(reset, |m| m.value)
}

fn set_xcr0(vcpu: &VcpuFd, value: u64) -> Result<(), EngineError> {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = value;
    vcpu.set_xcrs(&xcrs).map_err(element("set", "XCR0"))
}

fn mp_state(vcpu: &VcpuFd) -> Result<MpState, EngineError> {
    let state = vcpu.get_mp_state().map_err(element("read", "what the CPU is doing"))?.mp_state;
    match state {
        KVM_MP_STATE_RUNNABLE => Ok(MpState::Running),
        KVM_MP_STATE_HALTED => Ok(MpState::Halted),
        KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_UNINITIALIZED => Ok(MpState::WaitForSipi),
        other => Err(EngineError::Unsupported(format!(
            "the vCPU is in KVM's MP state {other}, which cannot be saved"
        ))),
    }
}

/// Says what a vCPU is doing.
///
/// # Errors
/// KVM does not take it.
pub fn set_mp_state(vcpu: &VcpuFd, state: MpState) -> Result<(), EngineError> {
    let mp_state = match state {
        MpState::Running => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        // Only in this state does KVM heed a start-up IPI.
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(element("set", "what the CPU is doing"))
}
