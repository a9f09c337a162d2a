//! The state of a vCPU: an engine holds every element of it, or says which one it cannot.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use arch::{MpState, VcpuState, msr};
use cputest::machine::make_vm;
use cputest::whole_state::{differences, whole_state};
use engine::{Msi, Vcpu, Vm};
use soft::SoftEngine;
use std::sync::Arc;

fn vcpu() -> (Box<dyn Vcpu>, Arc<dyn Vm>) {
    let engine = SoftEngine::new().unwrap();
    let (vm, _memory) = make_vm(&engine, 1 << 20, 1).unwrap();
    (vm.create_vcpu(0).unwrap(), vm)
}

#[test]
fn a_state_with_something_in_every_leaf_is_read_back_whole() {
    let (mut vcpu, _vm) = vcpu();
    let state = whole_state(false);
    vcpu.set_state(&state).unwrap();
    assert_eq!(differences(&state, &vcpu.state().unwrap()), [""; 0]);
    // And nothing of it is left behind.
    vcpu.set_state(&VcpuState::reset()).unwrap();
    assert_eq!(differences(&VcpuState::reset(), &vcpu.state().unwrap()), [""; 0]);
}

#[test]
fn the_clock_goes_on_from_where_it_was_saved() {
    let (mut vcpu, _vm) = vcpu();
    vcpu.set_state(&whole_state(false)).unwrap();
    assert!((1 << 60..1 << 61).contains(&vcpu.state().unwrap().tsc));
}

#[test]
fn an_armed_deadline_is_part_of_the_state() {
    let (mut vcpu, _vm) = vcpu();
    let mut state = whole_state(false);
    const LVT_TIMER: usize = 0x32;
    state.lapic.registers[LVT_TIMER] = 2 << 17 | 0xf2;
    state.lapic.tsc_deadline = 1 << 61;
    vcpu.set_state(&state).unwrap();
    assert_eq!(vcpu.state().unwrap().lapic.tsc_deadline, 1 << 61);
}

/// Tries a state that cannot be held; nothing may be changed by it.
fn refused(change: impl FnOnce(&mut VcpuState)) -> String {
    let (mut vcpu, _vm) = vcpu();
    let mut state = whole_state(false);
    change(&mut state);
    let before = vcpu.state().unwrap();
    let error = vcpu.set_state(&state).unwrap_err().to_string();
    assert_eq!(differences(&before, &vcpu.state().unwrap()), [""; 0]);
    error
}

#[test]
fn what_the_software_engine_cannot_hold_is_refused_by_name_before_anything_is_loaded() {
    let error = refused(|state| state.avx512.opmask[3] = 1);
    assert!(error.contains("AVX-512"), "{error}");
    let error = refused(|state| state.pkru = 4);
    assert!(error.contains("PKRU"), "{error}");
    let error = refused(|state| assert!(state.msrs.set(msr::KVM_SYSTEM_TIME, 0x5001)));
    assert!(error.contains("kvm_system_time"), "{error}");
}

#[test]
fn an_interrupt_that_was_sent_and_not_yet_taken_is_part_of_the_state() {
    let (mut vcpu, vm) = vcpu();
    const SPURIOUS: usize = 0x0f;
    const REQUESTED: usize = 0x20;
    let mut enabled = vcpu.state().unwrap();
    enabled.lapic.registers[SPURIOUS] = 0x1ff;
    vcpu.set_state(&enabled).unwrap();
    vm.signal_msi(Msi { address: 0xfee0_0000, data: 0x41 });
    vm.signal_nmi(0);
    let state = vcpu.state().unwrap();
    assert_eq!(state.lapic.registers[REQUESTED + 2], 1 << 1);
    assert!(state.events.nmi_pending);
    // What was sent to the state that goes does not reach the one that comes.
    vm.signal_msi(Msi { address: 0xfee0_0000, data: 0x51 });
    vcpu.set_state(&VcpuState { mp: MpState::Halted, ..state.clone() }).unwrap();
    assert_eq!(vcpu.state().unwrap().lapic, state.lapic);
}
