//! The LAPIC (Intel SDM 3A chapter 11; api.rst §4.57).
use super::msrs;
use crate::error::element;
use arch::{LapicState, msr};
use engine::EngineError;
use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

/// Reads it.
///
/// # Errors
/// KVM does not let it be read.
pub fn get(vcpu: &VcpuFd) -> Result<LapicState, EngineError> {
    let page = vcpu.get_lapic().map_err(element("read", "the LAPIC's registers"))?;
    let mut state = LapicState { registers: [0; 64], ..LapicState::reset(0) };
    for (register, bytes) in state.registers.iter_mut().zip(page.regs.chunks_exact(16)) {
        *register = bytes.iter().take(4).rev().fold(0, |word, b| word << 8 | u32::from(*b as u8));
    }
    // KVM has the id in the upper byte in x2APIC mode too, unless asked (api.rst §7.7).
    const ID: usize = 2;
    state.base = msrs::read(vcpu, msr::APIC_BASE)?.unwrap_or(state.base);
    if state.base & LapicState::X2APIC != 0 {
        state.registers[ID] >>= 24;
    }
    state.tsc_deadline = msrs::read(vcpu, msr::TSC_DEADLINE)?.unwrap_or(0);
    Ok(state)
}

/// Sets it: the base first, which says what the registers mean, the deadline last, which counts
/// only in the timer's mode for it.
///
/// # Errors
/// KVM does not take it.
pub fn set(vcpu: &VcpuFd, state: &LapicState) -> Result<(), EngineError> {
    msrs::write(vcpu, msr::APIC_BASE, state.base)?;
    let mut page = kvm_lapic_state::default();
    for (bytes, register) in page.regs.chunks_exact_mut(16).zip(&state.registers) {
        for (to, from) in bytes.iter_mut().zip(register.to_le_bytes()) {
            *to = from as _;
        }
    }
    vcpu.set_lapic(&page).map_err(element("set", "the LAPIC's registers"))?;
    if msrs::read(vcpu, msr::TSC_DEADLINE)?.is_some_and(|now| now != state.tsc_deadline) {
        msrs::write(vcpu, msr::TSC_DEADLINE, state.tsc_deadline)?;
    }
    Ok(())
}
