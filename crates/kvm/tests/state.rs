//! The state of a vCPU: all of it survives saving, and guests move between engines.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;

use arch::msr;
use common::{Guest, Mode, at, done, engine, say};
use cputest::layout::{read, write};
use cputest::whole_state::{differences, whole_state};
use engine::Engine;
use iced_x86::code_asm::*;

#[test]
fn control_registers_that_cannot_be_are_refused_with_their_values() {
    let Some(engine) = engine() else { return };
    let (vm, _memory) = cputest::machine::make_vm(&engine, at::RAM, 1).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut state = vcpu.state().unwrap();
    state.cr0 = 0x8000_0000; // paging without protection
    let error = vcpu.set_state(&state).unwrap_err().to_string();
    assert!(error.contains("CR0 0x80000000"), "{error}");
}

#[test]
fn code_segments_marked_as_64_bit_are_taken_outside_long_mode_where_the_mark_means_nothing() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Protected, &|a| {
        // `mov ax, 1`, as the segment has 16-bit code; OUT EAX; OUT AL
        a.db(&[0xb8, 1, 0, 0x66, 0xe7, 0xe0, 0xe6, 0xf4, 0xf4])
    });
    let mut state = guest.state();
    state.segments[arch::SegmentName::Cs].attributes = 0xa09b;
    guest.vcpus[0].set_state(&state).unwrap();
    guest.run();
    assert_eq!(guest.said(), [1]);
}

#[test]
fn each_engine_takes_the_others_state_and_gives_it_back() {
    let Some(kvm) = engine() else { return };
    let soft = soft::SoftEngine::new().unwrap();
    let cpu = |engine: &dyn Engine| {
        let (vm, _memory) = cputest::machine::make_vm(engine, at::RAM, 1).unwrap();
        vm.create_vcpu(0).unwrap()
    };
    let (mut on_kvm, mut on_soft) = (cpu(&kvm), cpu(&soft));
    let mut state = whole_state(false);
    if !kvm::HostKvm::probe().is_hardware_backed() {
        // KVM on PVM does not keep it.
        assert!(state.msrs.set(msr::SPEC_CTRL, 0));
    }
    on_kvm.set_state(&state).unwrap();
    on_soft.set_state(&on_kvm.state().unwrap()).unwrap();
    let from_soft = on_soft.state().unwrap();
    on_kvm.set_state(&from_soft).unwrap();
    assert_eq!(differences(&on_kvm.state().unwrap(), &state), [""; 0]);
}

/// A guest that computes, and says so after each of 64 rounds: every one of its OUTs is a place
/// where it can move.
fn computing(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    a.mov(rcx, 64u64)?;
    a.mov(rsi, at::DATA)?;
    a.mov(rax, 0x1234_5678_9abc_def1u64)?;
    a.movq(xmm0, rax)?;
    a.set_label(&mut again)?;
    a.imul_3(rax, rax, 0x1_0003)?;
    a.ror(rax, 7)?;
    a.adc(rax, rcx)?;
    a.movq(xmm1, rax)?;
    a.paddq(xmm0, xmm1)?;
    a.pshufd(xmm0, xmm0, 0x93)?;
    a.movdqu(xmmword_ptr(rsi), xmm0)?;
    a.xor(qword_ptr(rsi + 16), rax)?;
    a.pushfq()?;
    a.pop(rbx)?;
    a.add(qword_ptr(rsi + 24), rbx)?;
    say(a)?;
    a.db(&[0xe6, 0xf4])?; // ends the run, and goes on in the next
    a.dec(rcx)?;
    a.jne(again)?;
    done(a)
}

/// Runs the guest to its end over the engines in turn, moving after each round where `moves` says.
fn result(engines: &[&dyn Engine], moves: impl Fn(usize) -> usize) -> (Vec<u32>, [u8; 32]) {
    let mut guests: Vec<_> =
        engines.iter().map(|engine| Guest::new(*engine, Mode::Long, &computing)).collect();
    let mut said = Vec::new();
    let mut present = 0;
    for round in 0..64 {
        let next = moves(round) % guests.len();
        if next != present {
            let state = guests[present].state();
            let mut ram = vec![0; at::RAM as usize];
            read(&guests[present].memory, 0, &mut ram);
            write(&guests[next].memory, 0, &ram);
            guests[next].vcpus[0].set_state(&state).unwrap();
            present = next;
        }
        let guest = &mut guests[present];
        guest.io.clear();
        guest.run();
        said.extend(guest.said());
    }
    let mut data = [0; 32];
    read(&guests[present].memory, at::DATA, &mut data);
    (said, data)
}

#[test]
fn a_guest_that_moves_between_engines_computes_what_it_does_on_one() {
    let Some(kvm) = engine() else { return };
    let soft = soft::SoftEngine::new().unwrap();
    let alone = result(&[&soft], |_| 0);
    assert_eq!(alone.0.len(), 64);
    assert_eq!(result(&[&kvm], |_| 0), alone, "on KVM alone");
    for pattern in [1usize, 2, 3, 7] {
        let moved = result(&[&soft, &kvm], |round| round / pattern);
        assert_eq!(moved, alone, "moved every {pattern} rounds");
    }
}
