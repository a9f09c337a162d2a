//! Events between instructions (api.rst §4.31).
//!
//! KVM may hold an event that it began to deliver and could not finish. The neutral state is one
//! at an instruction boundary, so such an event is undone where it can be: an interrupt goes back to
//! the LAPIC, an NMI waits again, and a fault or a software interrupt happens again when its
//! instruction does. Debug traps and interrupts of the PIC's are part of the state.
use crate::error::element;
use arch::registers::vector;
use arch::{Element, InDelivery, InterruptShadow, LapicState, VcpuState};
use engine::EngineError;
use kvm_bindings::{KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_vcpu_events};
use kvm_ioctls::VcpuFd;

/// KVM_X86_SHADOW_INT_MOV_SS and KVM_X86_SHADOW_INT_STI.
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;
/// Registers of the LAPIC, by number.
const IN_SERVICE: usize = 0x10;
const REQUESTED: usize = 0x20;

fn read(vcpu: &VcpuFd) -> Result<kvm_vcpu_events, EngineError> {
    vcpu.get_vcpu_events().map_err(element("read", Element::Interrupts.name()))
}

fn shadow_of(events: &kvm_vcpu_events) -> InterruptShadow {
    match events.interrupt.shadow {
        0 => InterruptShadow::None,
        shadow if shadow & SHADOW_MOV_SS != 0 => InterruptShadow::MovSs,
        _ => InterruptShadow::Sti,
    }
}

/// Reads the events into a state whose LAPIC has been read before.
///
/// # Errors
/// KVM does not let them be read, or one cannot be undone.
pub fn get(vcpu: &VcpuFd, state: &mut VcpuState) -> Result<(), EngineError> {
    let events = read(vcpu)?;
    state.events.interrupt_shadow = shadow_of(&events);
    state.events.nmi_pending = events.nmi.pending != 0 || events.nmi.injected != 0;
    // Delivery of an NMI begins with blocking others.
    state.events.nmi_blocked = events.nmi.masked != 0 && events.nmi.injected == 0;
    if events.smi.smm != 0 || events.smi.pending != 0 {
        return Err(EngineError::Unsupported(
            "the vCPU is in system management mode, which a saved state has no place for".into(),
        ));
    }
    state.events.in_delivery = None;
    if events.exception.injected != 0 || events.exception.pending != 0 {
        match events.exception.nr {
            vector::DB => state.events.in_delivery = Some(InDelivery::DebugTrap),
            number @ (vector::BP | vector::OF) => {
                return Err(EngineError::Unsupported(format!(
                    "a trap (vector {number}) is being delivered, which a saved state has no \
                     place for"
                )));
            }
            // A fault happens again with its instruction.
            _ => {}
        }
    }
    if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
        let number = events.interrupt.nr;
        if !withdraw(&mut state.lapic, number) {
            // Of the PIC, which has forgotten it.
            state.events.in_delivery = Some(InDelivery::Interrupt(number));
        }
    }
    Ok(())
}

fn shadow(state: &VcpuState) -> u8 {
    match state.events.interrupt_shadow {
        InterruptShadow::None => 0,
        InterruptShadow::Sti => SHADOW_STI,
        InterruptShadow::MovSs => SHADOW_MOV_SS,
    }
}

/// Reads what the next instruction ends: the interrupt shadow, and that NMIs are blocked.
///
/// # Errors
/// KVM does not let them be read.
pub fn get_blocked(vcpu: &VcpuFd, state: &mut VcpuState) -> Result<(), EngineError> {
    let events = read(vcpu)?;
    state.events.interrupt_shadow = shadow_of(&events);
    state.events.nmi_blocked = events.nmi.masked != 0;
    Ok(())
}

/// Moves a vector from in service back to requested; answers whether it was in service.
fn withdraw(lapic: &mut LapicState, number: u8) -> bool {
    let (word, bit) = (usize::from(number / 32), 1 << (number % 32));
    match lapic.registers.get_mut(IN_SERVICE + word) {
        Some(register) if *register & bit != 0 => *register &= !bit,
        _ => return false,
    }
    if let Some(register) = lapic.registers.get_mut(REQUESTED + word) {
        *register |= bit;
    }
    true
}

/// Replaces all events.
///
/// # Errors
/// KVM does not take them.
pub fn set(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    events.interrupt.shadow = shadow(state);
    events.nmi.pending = u8::from(state.events.nmi_pending);
    events.nmi.masked = u8::from(state.events.nmi_blocked);
    match state.events.in_delivery {
        None => {}
        Some(InDelivery::DebugTrap) => {
            (events.exception.injected, events.exception.nr) = (1, vector::DB);
        }
        Some(InDelivery::Interrupt(number)) => {
            (events.interrupt.injected, events.interrupt.nr) = (1, number);
        }
    }
    vcpu.set_vcpu_events(&events).map_err(element("set", Element::Interrupts.name()))
}

/// After an instruction that KVM did not know: its exception (#UD, which KVM queues for what it
/// does not know) is taken back, the interrupt shadow is that of the next one.
///
/// # Errors
/// KVM does not take them.
pub fn set_executed(vcpu: &VcpuFd, after: &VcpuState) -> Result<(), EngineError> {
    let mut events = read(vcpu)?;
    events.exception = Default::default();
    events.flags = KVM_VCPUEVENT_VALID_SHADOW;
    events.interrupt.shadow = shadow(after);
    events.nmi.masked = u8::from(after.events.nmi_blocked);
    vcpu.set_vcpu_events(&events).map_err(element("set", Element::Interrupts.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_on_its_way_goes_back_to_the_lapic() {
        let mut lapic = LapicState::reset(0);
        lapic.registers[IN_SERVICE + 1] = 1 << 5;
        assert!(withdraw(&mut lapic, 37));
        assert_eq!((lapic.registers[IN_SERVICE + 1], lapic.registers[REQUESTED + 1]), (0, 1 << 5));
        assert!(!withdraw(&mut lapic, 38));
    }
}
