//! The state of a vCPU: an engine holds every element of it, or says which one it cannot.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use arch::registers::{rflags, vector, xcr0};
use arch::{InDelivery, MpState, VcpuState, msr};
use cputest::machine::make_vm;
use cputest::micro::{Guest, Mode, at, done, say};
use cputest::on_each_engine;
use cputest::under_test::EngineUnderTest;
use cputest::whole_state::{differences, whole_state};
use engine::{Msi, Vcpu, Vm};
use iced_x86::code_asm::*;
use std::sync::Arc;

fn vcpu(engine: EngineUnderTest) -> (Box<dyn Vcpu>, Arc<dyn Vm>) {
    let (vm, _memory) = make_vm(engine.make().unwrap().as_ref(), 1 << 20, 1).unwrap();
    (vm.create_vcpu(0).unwrap(), vm)
}

/// A state with something in every leaf that an engine can hold.
fn holdable(vcpu: &mut dyn Vcpu) -> VcpuState {
    let mut state = whole_state(false);
    if let Err(error) = vcpu.set_state(&state) {
        // The software engine's guests have it on Intel hosts only, and KVM on PVM drops it, and
        // is found out.
        let error = error.to_string();
        assert!(error.contains("spec_ctrl"), "{error}");
        assert!(state.msrs.set(msr::SPEC_CTRL, 0));
    }
    state
}

on_each_engine!(a_state_with_something_in_every_leaf_is_read_back_whole, |engine| {
    let (mut vcpu, _vm) = vcpu(engine);
    let fresh = vcpu.state().unwrap();
    let state = holdable(vcpu.as_mut());
    vcpu.set_state(&state).unwrap();
    assert_eq!(differences(&state, &vcpu.state().unwrap()), [""; 0]);
    // And nothing of it is left behind.
    vcpu.set_state(&fresh).unwrap();
    assert_eq!(differences(&fresh, &vcpu.state().unwrap()), [""; 0]);
});

on_each_engine!(avx512_and_protection_keys_are_read_back_or_refused_by_name, |engine| {
    let (mut vcpu, _vm) = vcpu(engine);
    let held = holdable(vcpu.as_mut());
    for pkru in [true, false] {
        let mut state = VcpuState { msrs: held.msrs.clone(), ..whole_state(true) };
        if !pkru {
            state.pkru = 0;
            state.xcr0 &= !xcr0::PKRU;
        }
        match vcpu.set_state(&state) {
            Ok(()) => assert_eq!(differences(&state, &vcpu.state().unwrap()), [""; 0]),
            Err(error) => {
                let error = error.to_string();
                let named = ["avx512f", "pku", "XCR0"].iter().any(|name| error.contains(name));
                assert!(named, "{error}");
            }
        }
    }
});

on_each_engine!(the_clock_goes_on_from_where_it_was_saved, |engine| {
    let (mut vcpu, _vm) = vcpu(engine);
    let before = vcpu.state().unwrap();
    vcpu.set_state(&VcpuState { tsc: 1 << 60, ..before.clone() }).unwrap();
    let later = vcpu.state().unwrap().tsc;
    // KVM on PVM shows guests the host's counter, whatever is set.
    let hosts = engine == EngineUnderTest::Kvm && !kvm::HostKvm::probe().is_hardware_backed();
    assert!((1 << 60..1 << 61).contains(&later) || hosts && later > before.tsc, "{later:#x}");
});

on_each_engine!(an_armed_deadline_is_part_of_the_state, |engine| {
    let (mut vcpu, _vm) = vcpu(engine);
    // The clock goes on from where it is: KVM on PVM does not let it be set, and moves a deadline
    // with it.
    let mut state = vcpu.state().unwrap();
    const LVT_TIMER: usize = 0x32;
    state.lapic.registers[LVT_TIMER] = 2 << 17 | 0xf2;
    state.lapic.tsc_deadline = state.tsc + (1 << 50);
    vcpu.set_state(&state).unwrap();
    let later = vcpu.state().unwrap();
    // As far away as it was, but for the time that has passed.
    let ahead = later.lapic.tsc_deadline - later.tsc;
    assert!((1 << 49..=1 << 50).contains(&ahead), "{ahead:#x}");
});

on_each_engine!(an_interrupt_that_was_sent_and_not_yet_taken_is_part_of_the_state, |engine| {
    let (mut vcpu, vm) = vcpu(engine);
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
    assert_eq!(vcpu.state().unwrap().lapic.registers, state.lapic.registers);
});

on_each_engine!(a_debug_trap_on_its_way_is_delivered_before_the_next_instruction, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(vector::DB, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.mov(rax, dr6)?;
        say(a)?;
        done(a)
    });
    guest.code(at::CODE, |a| a.ud2());
    guest.state.events.in_delivery = Some(InDelivery::DebugTrap);
    guest.state.debug[4] |= 1 << 14;
    let end = guest.run();
    assert_eq!(end.done(), [0xffff_4ff0]);
});

on_each_engine!(an_interrupt_of_the_pic_that_was_acknowledged_is_delivered, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(0x30, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.mov(eax, 0x30)?;
        say(a)?;
        done(a)
    });
    guest.code(at::CODE, |a| a.ud2());
    guest.state.events.in_delivery = Some(InDelivery::Interrupt(0x30));
    guest.state.rflags |= rflags::IF;
    assert_eq!(guest.run().done(), [0x30]);
});

/// Tries a state that cannot be held; nothing may be changed by it.
fn refused(change: impl FnOnce(&mut VcpuState)) -> String {
    let (mut vcpu, _vm) = vcpu(EngineUnderTest::Soft);
    let mut state = holdable(vcpu.as_mut());
    change(&mut state);
    let before = vcpu.state().unwrap();
    let error = vcpu.set_state(&state).unwrap_err().to_string();
    assert_eq!(differences(&before, &vcpu.state().unwrap()), [""; 0]);
    error
}

#[test]
fn what_the_software_engine_cannot_hold_is_refused_by_name_before_anything_is_loaded() {
    let error = refused(|state| state.avx512.opmask[3] = 1);
    assert!(error.contains("avx512f"), "{error}");
    let error = refused(|state| state.pkru = 4);
    assert!(error.contains("pku (PKRU)"), "{error}");
    let error = refused(|state| assert!(state.msrs.set(msr::KVM_SYSTEM_TIME, 0x5001)));
    assert!(error.contains("kvmclock2"), "{error}");
}
