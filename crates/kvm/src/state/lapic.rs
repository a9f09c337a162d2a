//! The LAPIC's registers (Intel SDM 3A table 10-1; api.rst §4.57).
use crate::error::element;
use arch::LapicState;
use engine::EngineError;
use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

/// Reads the registers; the deadline of the timer is an MSR.
///
/// # Errors
/// KVM does not let them be read.
pub fn get(vcpu: &VcpuFd) -> Result<LapicState, EngineError> {
    let page = vcpu.get_lapic().map_err(element("read", "the LAPIC's registers"))?;
    let mut state = LapicState::default();
    for (register, bytes) in state.registers.iter_mut().zip(page.regs.chunks_exact(16)) {
        *register = bytes.iter().take(4).rev().fold(0, |word, b| word << 8 | u32::from(*b as u8));
    }
    Ok(state)
}

/// Sets the registers.
///
/// # Errors
/// KVM does not take them.
pub fn set(vcpu: &VcpuFd, state: &LapicState) -> Result<(), EngineError> {
    let mut page = kvm_lapic_state::default();
    for (bytes, register) in page.regs.chunks_exact_mut(16).zip(&state.registers) {
        for (to, from) in bytes.iter_mut().zip(register.to_le_bytes()) {
            *to = from as _;
        }
    }
    vcpu.set_lapic(&page).map_err(element("set", "the LAPIC's registers"))
}
