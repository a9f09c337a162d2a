//! The state of a vCPU: all of it survives saving, and guests move between engines.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod common;

use arch::registers::{gpr, rflags};
use arch::{VcpuState, msr};
use common::{Guest, Mode, at, done, engine, say, starting_state};
use cputest::layout::{read, write};
use engine::Engine;
use iced_x86::code_asm::*;

/// A state in long mode with something of its own in every element that engines share.
fn rich_state(base: VcpuState) -> VcpuState {
    let mut state = starting_state(base, Mode::Long);
    for (n, register) in state.gpr.iter_mut().enumerate() {
        *register = 0x1111_0000_0000_0000 + n as u64;
    }
    state.gpr[gpr::RSP] = at::STACK;
    state.rflags |= rflags::CF | rflags::OF | rflags::IF;
    state.cr2 = 0xdead_b000;
    state.debug = [at::DATA, 0, 0, 0x1000, 0xffff_0ff0, 0x400];
    state.segments.regs[4].base = 0x7fff_1234_5000;
    state.segments.regs[5].base = 0xffff_8000_1234_5000;
    // Two x87 registers, XMM0, the upper half of YMM15.
    state.fpu.0[32..42].fill(0x11);
    state.fpu.0[48..58].fill(0x22);
    state.fpu.0[160..176].fill(0x33);
    state.fpu.0[576 + 240..832].fill(0x44);
    let values = [
        (msr::STAR, 0x23_0010_0000_0000),
        (msr::LSTAR, 0xffff_ffff_8100_0000),
        (msr::SFMASK, 0x4_7700),
        (msr::KERNEL_GS_BASE, 0xffff_8880_0000_1000),
        (msr::SYSENTER_CS, 0x10),
        (msr::SYSENTER_EIP, 0xffff_ffff_8100_1000),
        (msr::PAT, 0x0007_0406_0007_0401),
        (msr::MTRR_DEF_TYPE, 0xc06),
    ];
    for (index, value) in values {
        assert!(state.msrs.set(index, value), "{index:#x} is not of the state table");
    }
    state.lapic.registers[0x0f] = 0x1ff;
    state.lapic.registers[0x08] = 0x20;
    state.lapic.registers[0x21] = 1 << 7;
    state.events.nmi_blocked = true;
    state.events.nmi_pending = true;
    state
}

/// Without what goes on by itself: the clock, and the processor priority that follows from others.
fn still(mut state: VcpuState) -> VcpuState {
    state.tsc = 0;
    state.lapic.registers[0x0a] = 0;
    state.lapic.registers[0x39] = 0;
    assert!(state.msrs.set(msr::TSC_ADJUST, 0));
    state
}

#[test]
fn a_state_that_was_set_is_read_back_whole() {
    let Some(engine) = engine() else { return };
    let (vm, _memory) = cputest::machine::make_vm(&engine, at::RAM, 1).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let state = rich_state(vcpu.state().unwrap());
    vcpu.set_state(&state).unwrap();
    assert_eq!(still(vcpu.state().unwrap()), still(state));
}

#[test]
fn the_clock_goes_on_from_where_it_was_saved_where_hardware_keeps_it() {
    let Some(engine) = engine() else { return };
    let (vm, _memory) = cputest::machine::make_vm(&engine, at::RAM, 1).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut state = vcpu.state().unwrap();
    let before = state.tsc;
    state.tsc = 1 << 60;
    vcpu.set_state(&state).unwrap();
    let later = vcpu.state().unwrap().tsc;
    if kvm::HostKvm::probe().is_hardware_backed() {
        assert!((1 << 60..1 << 61).contains(&later), "{later:#x}");
    } else {
        // KVM on PVM shows guests the host's counter, whatever is set.
        assert!((1 << 60..1 << 61).contains(&later) || later > before, "{later:#x}");
    }
}

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
fn each_engine_takes_the_others_state_and_gives_it_back() {
    let Some(kvm) = engine() else { return };
    let soft = soft::SoftEngine::new().unwrap();
    let cpu = |engine: &dyn Engine| {
        let (vm, _memory) = cputest::machine::make_vm(engine, at::RAM, 1).unwrap();
        vm.create_vcpu(0).unwrap()
    };
    let (mut on_kvm, mut on_soft) = (cpu(&kvm), cpu(&soft));
    let state = rich_state(on_kvm.state().unwrap());
    on_kvm.set_state(&state).unwrap();
    on_soft.set_state(&on_kvm.state().unwrap()).unwrap();
    let from_soft = on_soft.state().unwrap();
    on_kvm.set_state(&from_soft).unwrap();
    assert_eq!(still(on_kvm.state().unwrap()), still(state));
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
