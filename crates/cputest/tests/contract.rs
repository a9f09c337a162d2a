//! What the engine contract promises around the guest: kicks, and state that moves.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::registers::gpr;
use cputest::layout::{read, read_u32, write};
use cputest::machine::Recorder;
use cputest::micro::{Guest, Mode, Stop, at, done, say};
use cputest::on_each_engine;
use engine::Halt;
use iced_x86::code_asm::*;
use std::thread;

on_each_engine!(a_kick_before_a_run_ends_that_run_and_only_that_one, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.mov(eax, 1)?;
        say(a)?;
        a.set_label(&mut again)?;
        a.jmp(again)
    });
    let io = guest.io.clone();
    let (state, vcpu) = (guest.state.clone(), &mut guest.vcpus[0]);
    vcpu.set_state(&state).unwrap();
    let kicker = vcpu.kicker();
    kicker.kick();
    kicker.kick();
    assert_eq!(vcpu.run(io.as_ref()).unwrap(), Halt::Kicked);
    // The second run goes on until the kick that follows what it says.
    thread::scope(|scope| {
        scope.spawn(|| {
            while io.out(cputest::micro::SAY.into()).is_empty() {
                thread::yield_now();
            }
            kicker.kick();
        });
        assert_eq!(vcpu.run(io.as_ref()).unwrap(), Halt::Kicked);
    });
});

on_each_engine!(a_kick_ends_a_guest_that_halted_for_ever, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        say(a)?;
        a.cli()?;
        a.hlt()?;
        a.ud2()
    });
    let io = guest.io.clone();
    let (state, vcpu) = (guest.state.clone(), &mut guest.vcpus[0]);
    vcpu.set_state(&state).unwrap();
    let kicker = vcpu.kicker();
    thread::scope(|scope| {
        scope.spawn(|| {
            while io.out(cputest::micro::SAY.into()).is_empty() {
                thread::yield_now();
            }
            kicker.kick();
        });
        assert_eq!(vcpu.run(io.as_ref()).unwrap(), Halt::Kicked);
    });
});

on_each_engine!(
    a_guest_kicked_anywhere_goes_on_in_another_vm_as_if_nothing_had_happened,
    |engine| {
        let rounds = engine.rounds(300_000);
        let make = || {
            let guest = Guest::new(engine, Mode::LONG);
            guest.code(at::CODE, |a| {
                let mut again = a.create_label();
                a.mov(ecx, rounds)?;
                a.mov(ebx, 1)?;
                a.set_label(&mut again)?;
                a.imul_3(ebx, ebx, 0x0101_0101)?;
                a.add(ebx, ecx)?;
                a.rol(ebx, 5)?;
                a.adc(dword_ptr(at::DATA), ebx)?;
                a.movd(xmm3, ebx)?;
                a.paddd(xmm2, xmm3)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.mov(eax, dword_ptr(at::DATA))?;
                say(a)?;
                a.movd(eax, xmm2)?;
                say(a)?;
                done(a)
            });
            guest
        };
        let expected = make().run().done().to_vec();
        let mut guest = make();
        let mut moves = 0;
        loop {
            let (state, io) = (guest.state.clone(), guest.io.clone());
            let vcpu = &mut guest.vcpus[0];
            vcpu.set_state(&state).unwrap();
            let kicker = vcpu.kicker();
            let running = thread::scope(|scope| {
                scope.spawn(|| {
                    thread::yield_now();
                    kicker.kick();
                });
                vcpu.run(io.as_ref()).unwrap();
                io.out(cputest::micro::SAY.into())
            });
            let state = guest.vcpus[0].state().unwrap();
            if moves == 20 || !running.is_empty() || state.gpr[gpr::RCX] < 10 {
                guest.state = state;
                break;
            }
            // A new VM takes over memory and state.
            let next = make();
            let mut memory = vec![0; at::RAM as usize];
            read(&guest.memory, 0, &mut memory);
            write(&next.memory, 0, &memory);
            guest = next;
            guest.state = state;
            moves += 1;
        }
        let said = guest.io.out(cputest::micro::SAY.into());
        let result = if said.len() == expected.len() { said } else { finish(&mut guest, said) };
        assert_eq!(result, expected, "after {moves} moves");
    }
);

/// Runs to the end and adds what the guest says to what it said before.
fn finish(guest: &mut Guest, mut said: Vec<u32>) -> Vec<u32> {
    let end = guest.run();
    assert_eq!(end.stop, Stop::Done);
    said.extend(&end.said);
    said
}

on_each_engine!(a_step_runs_one_instruction_or_up_to_the_handler_of_its_exception, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(0, 0x9000, 0);
    guest.code(at::CODE, |a| {
        a.mov(ecx, 2)?; // 5 bytes
        a.mov(edi, at::DATA as u32)?; // 5 bytes
        a.rep().stosb()?; // 2 bytes, a step for each round and one that ends it at the latest
        a.div(ecx) // by zero
    });
    let (state, io) = (guest.state.clone(), guest.io.clone());
    let vcpu = &mut guest.vcpus[0];
    vcpu.set_state(&state).unwrap();
    let mut places = Vec::new();
    for _ in 0..4 {
        // An optional power.
        let Some(stepper) = vcpu.stepper() else { return };
        assert_eq!(stepper.step(io.as_ref()).unwrap(), None);
        let state = vcpu.state().unwrap();
        places.push((state.rip - at::CODE, state.gpr[gpr::RCX]));
    }
    assert_eq!(places, [(5, 2), (10, 2), (10, 1), (12, 0)]);
    vcpu.stepper().unwrap().step(io.as_ref()).unwrap();
    assert_eq!(vcpu.state().unwrap().rip, 0x9000);
    // A kick is for the next step too, and does not let it happen.
    vcpu.kicker().kick();
    assert_eq!(vcpu.stepper().unwrap().step(io.as_ref()).unwrap(), Some(Halt::Kicked));
    assert_eq!(vcpu.state().unwrap().rip, 0x9000);
});

on_each_engine!(a_step_that_faults_saves_flags_that_the_instruction_would_overwrite, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    // Invalid operations are not masked, and XMM0 holds a signalling NaN.
    guest.state.fpu.0[24..28].copy_from_slice(&0x1f00u32.to_le_bytes());
    guest.state.fpu.0[160..168].copy_from_slice(&0x7ff0_0000_0000_0001u64.to_le_bytes());
    guest.code(at::CODE, |a| {
        a.mov(eax, -1)?;
        a.add(eax, 1)?; // CF, PF, AF and ZF
        a.ucomisd(xmm0, xmm0)
    });
    let (state, io) = (guest.state.clone(), guest.io.clone());
    let vcpu = &mut guest.vcpus[0];
    vcpu.set_state(&state).unwrap();
    for _ in 0..3 {
        // An optional power.
        let Some(stepper) = vcpu.stepper() else { return };
        assert_eq!(stepper.step(io.as_ref()).unwrap(), None);
    }
    let state = vcpu.state().unwrap();
    assert_eq!(state.rip, at::STUBS + 16 * 19);
    assert_eq!(read_u32(&guest.memory, state.gpr[gpr::RSP] + 16) & 0x8d5, 0x55);
});

on_each_engine!(a_vcpu_waiting_for_its_start_up_ipi_runs_nothing, |engine| {
    let mut guest = Guest::with_vcpus(engine, Mode::LONG, 2).unwrap();
    guest.code_of(16, 0, |a| a.ud2());
    let kicker = guest.vcpus[1].kicker();
    kicker.kick();
    let io = Recorder::default();
    assert_eq!(guest.vcpus[1].run(&io).unwrap(), Halt::Kicked);
    assert!(io.log().is_empty());
    assert_eq!(guest.vcpus[1].state().unwrap().mp, arch::MpState::WaitForSipi);
    assert_eq!(read_u32(&guest.memory, 0) & 0xffff, 0x0b0f);
});
