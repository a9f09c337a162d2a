//! Guests on the KVM engine: modes, ports, device registers, the reasons to stop.
mod common;

use arch::registers::gpr;
use arch::{GuestPhysical, MpState, VcpuState};
use common::{Guest, Mode, at, done, engine, say};
use cputest::layout::{read_u32, write};
use cputest::machine::Access;
use engine::{Engine, EngineError, GuestMemory, Halt, VmConfig};
use iced_x86::code_asm::*;
use std::sync::Arc;
use vm_memory::GuestAddress;

#[test]
fn guests_run_in_real_protected_and_long_mode() {
    let Some(engine) = engine() else { return };
    for (mode, answer) in [(Mode::Real, 42), (Mode::Protected, 43), (Mode::Long, 44)] {
        let mut guest = Guest::new(&engine, mode, &|a| {
            a.mov(eax, answer)?;
            say(a)?;
            done(a)
        });
        assert_eq!(guest.run(), Halt::Kicked);
        assert_eq!(guest.said(), [answer]);
    }
}

#[test]
fn string_output_arrives_as_one_access_for_each_element() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Real, &|a| {
        a.mov(si, 0x9000)?;
        a.mov(dx, 0x77)?;
        a.mov(cx, 3)?;
        a.db(&[0xf3, 0x6f])?; // rep outsw
        done(a)
    });
    write(&guest.memory, 0x9000, &[1, 0, 2, 0, 3, 0]);
    guest.run();
    assert_eq!(guest.io.out(0x77), [1, 2, 3]);
}

#[test]
fn ports_and_device_registers_answer_reads() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.db(&[0xe5, 0x60])?; // in eax, 60h
        say(a)?;
        a.mov(rbx, at::DEVICE)?;
        a.mov(eax, dword_ptr(rbx + 8))?;
        say(a)?;
        a.mov(dword_ptr(rbx + 12), 0x1234_5678)?;
        done(a)
    });
    guest.io.answer.store(0x4433_2211_4433_2211, std::sync::atomic::Ordering::SeqCst);
    guest.run();
    assert_eq!(guest.said(), [0x4433_2211; 2]);
    let log = guest.io.log();
    assert!(log.contains(&Access::Read(GuestPhysical(at::DEVICE + 8))), "{log:x?}");
    assert!(log.contains(&Access::Write(GuestPhysical(at::DEVICE + 12), 0x1234_5678)), "{log:x?}");
}

#[test]
fn a_fault_without_handlers_is_a_triple_fault() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.lidt(ptr(at::DATA))?; // a table of one byte
        a.ud2()
    });
    assert_eq!(guest.run(), Halt::TripleFault);
}

#[test]
fn a_kick_ends_a_guest_that_loops_and_one_that_sleeps() {
    let Some(engine) = engine() else { return };
    for code in [&[0xeb, 0xfe][..], &[0xf4, 0xeb, 0xfd]] {
        let mut guest = Guest::new(&engine, Mode::Protected, &|a| {
            say(a)?;
            a.db(code)
        });
        let kick = guest.vcpus[0].kicker();
        std::thread::scope(|scope| {
            let io = guest.io.clone();
            scope.spawn(move || {
                while io.out(common::SAY).is_empty() {
                    std::thread::yield_now();
                }
                kick.kick();
            });
            assert_eq!(guest.vcpus[0].run(guest.io.as_ref()).unwrap(), Halt::Kicked);
        });
    }
}

#[test]
fn a_kick_before_the_run_ends_it_before_the_guest_does_anything() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Protected, &|a| {
        say(a)?;
        done(a)
    });
    let kick = guest.vcpus[0].kicker();
    kick.kick();
    kick.kick();
    assert_eq!(guest.run(), Halt::Kicked);
    assert!(guest.said().is_empty());
    assert_eq!(guest.run(), Halt::Kicked);
    assert_eq!(guest.said().len(), 1);
}

#[test]
fn an_access_under_way_is_complete_in_the_state_after_a_kick() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Protected, &|a| {
        a.mov(eax, 5)?;
        a.db(&[0xe6, 0xf4])?; // ends the run
        a.db(&[0x90])?;
        a.mov(eax, 6)?;
        say(a)?;
        done(a)
    });
    guest.run();
    let state = guest.state();
    assert_eq!((state.rip, state.gpr[gpr::RAX]), (at::CODE + 7, 5));
    guest.run();
    assert_eq!(guest.said(), [6]);
}

#[test]
fn writes_to_read_only_memory_are_dropped() {
    let Some(engine) = engine() else { return };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), at::RAM as usize)]).unwrap();
    let memory = Arc::new(memory);
    write(&memory, at::DATA, &7u32.to_le_bytes());
    let config = VmConfig {
        memory: memory.clone(),
        read_only: vec![(GuestPhysical(at::DATA), 0x1000)],
        cpu: engine.host_cpu(),
        vcpus: 1,
    };
    let vm = engine.create_vm(config).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let code = cputest::micro::assemble(32, at::CODE, |a| {
        a.mov(dword_ptr(at::DATA), 9)?;
        a.mov(eax, dword_ptr(at::DATA))?;
        say(a)?;
        done(a)
    });
    write(&memory, at::CODE, &code);
    let state = common::starting_state(vcpu.state().unwrap(), Mode::Protected);
    vcpu.set_state(&state).unwrap();
    let io = cputest::machine::Recorder::default();
    io.kickers.lock().unwrap().push(vcpu.kicker());
    vcpu.run(&io).unwrap();
    assert_eq!(io.out(common::SAY), [7]);
    assert_eq!(read_u32(&memory, at::DATA), 7);
    assert!(!io.log().iter().any(|access| matches!(access, Access::Write(..))));
}

#[test]
fn a_new_vcpu_is_in_the_state_after_reset() {
    let Some(engine) = engine() else { return };
    let (vm, _memory) = cputest::machine::make_vm(&engine, at::RAM, 2).unwrap();
    let first = vm.create_vcpu(0).unwrap().state().unwrap();
    let second = vm.create_vcpu(1).unwrap().state().unwrap();
    let reset = VcpuState::reset();
    assert_eq!(first.segments, reset.segments);
    assert_eq!((first.rip, first.rflags, first.cr0), (reset.rip, reset.rflags, reset.cr0));
    assert_eq!((first.debug, first.efer, first.xcr0), (reset.debug, reset.efer, reset.xcr0));
    assert_eq!(first.fpu.0, reset.fpu.0);
    assert_eq!((first.mp, second.mp), (MpState::Running, MpState::WaitForSipi));
}

#[test]
fn numbers_of_vcpus_that_cannot_be_are_refused() {
    let Some(engine) = engine() else { return };
    let refused = |result: Result<_, EngineError>| match result {
        Ok(_) => panic!("it was accepted"),
        Err(error) => error.to_string(),
    };
    let (vm, memory) = cputest::machine::make_vm(&engine, at::RAM, 1).unwrap();
    let _first = vm.create_vcpu(0).unwrap();
    assert!(refused(vm.create_vcpu(0).map(drop)).contains("exists already"));
    assert!(refused(vm.create_vcpu(1).map(drop)).contains("no vCPU 1"));
    for vcpus in [0, engine.max_vcpus() + 1] {
        let cpu = engine.host_cpu();
        let config = VmConfig { memory: memory.clone(), read_only: Vec::new(), cpu, vcpus };
        assert!(refused(engine.create_vm(config).map(drop)).contains("KVM on this host runs 1 to"));
    }
}
