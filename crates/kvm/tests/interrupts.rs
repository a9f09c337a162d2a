//! Interrupts on the KVM engine: messages, the PIC, NMIs, start-up IPIs.
mod common;

use common::{Guest, Mode, at, done, engine, say};
use cputest::machine::Access;
use engine::Msi;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const SVR: u64 = at::LAPIC + 0xf0;
const EOI: u64 = at::LAPIC + 0xb0;
const ICR: u64 = at::LAPIC + 0x300;
const ICR_HIGH: u64 = at::LAPIC + 0x310;

/// Switches the LAPIC on.
fn enable_lapic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ebx, SVR as u32)?;
    a.mov(dword_ptr(rbx), 0x1ffu32 as i32)
}

/// Tells the test that the guest is ready, and sleeps until an interrupt handler ends the run.
fn ready_and_sleep(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, 1)?;
    say(a)?;
    a.sti()?;
    a.db(&[0xf4, 0xeb, 0xfd])
}

/// Runs the guest; calls `then` from another thread when it is ready.
fn run_and(guest: &mut Guest, then: impl FnOnce(&dyn engine::Vm) + Send) {
    let (io, vm) = (guest.io.clone(), guest.vm.clone());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while io.out(common::SAY).is_empty() {
                std::thread::yield_now();
            }
            then(vm.as_ref());
        });
        guest.run();
    });
}

fn message_guest(engine: &kvm::KvmEngine) -> Guest {
    let guest = Guest::new(engine, Mode::Long, &|a| {
        enable_lapic(a)?;
        ready_and_sleep(a)
    });
    guest.handler(0x41, at::HANDLER);
    guest.put(at::HANDLER, &|a| {
        a.mov(eax, 0x41)?;
        say(a)?;
        a.mov(ebx, EOI as u32)?;
        a.mov(dword_ptr(rbx), 0)?;
        done(a)
    });
    guest
}

#[test]
fn a_message_wakes_a_sleeping_guest() {
    let Some(engine) = engine() else { return };
    let mut guest = message_guest(&engine);
    run_and(&mut guest, |vm| vm.signal_msi(Msi { address: 0xfee0_0000, data: 0x41 }));
    assert_eq!(guest.said(), [1, 0x41]);
    assert!(!guest.io.log().contains(&Access::Eoi(0x41)), "an edge has no end for the IOAPIC");
}

#[test]
fn the_end_of_a_level_triggered_interrupt_reaches_the_machine() {
    let Some(engine) = engine() else { return };
    let mut guest = message_guest(&engine);
    run_and(&mut guest, |vm| vm.signal_msi(Msi { address: 0xfee0_0000, data: 0xc041 }));
    assert_eq!(guest.said(), [1, 0x41]);
    assert!(guest.io.log().contains(&Access::Eoi(0x41)), "{:x?}", guest.io.log());
}

#[test]
fn the_pic_is_asked_for_its_vector_when_the_guest_can_take_it() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Real, &ready_and_sleep);
    guest.handler(0x21, at::HANDLER);
    guest.put(at::HANDLER, &|a| {
        a.mov(eax, 0x21)?;
        say(a)?;
        done(a)
    });
    guest.io.pic_vector.store(0x21, Ordering::SeqCst);
    run_and(&mut guest, |vm| vm.set_pic_output(true));
    assert_eq!(guest.said(), [1, 0x21]);
}

#[test]
fn the_pic_waits_while_interrupts_are_disabled() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Real, &|a| {
        a.mov(eax, 7)?;
        say(a)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.db(&[0xeb, 0xfe])
    });
    guest.handler(0x21, at::HANDLER);
    guest.put(at::HANDLER, &|a| {
        a.mov(eax, 0x21)?;
        say(a)?;
        done(a)
    });
    guest.io.pic_vector.store(0x21, Ordering::SeqCst);
    guest.vm.set_pic_output(true);
    guest.run();
    assert_eq!(guest.said(), [7, 0x21]);
}

#[test]
fn an_nmi_arrives_with_interrupts_disabled() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.mov(eax, 1)?;
        say(a)?;
        a.db(&[0xf4, 0xeb, 0xfd])
    });
    guest.handler(2, at::HANDLER);
    guest.put(at::HANDLER, &|a| {
        a.mov(eax, 2)?;
        say(a)?;
        done(a)
    });
    run_and(&mut guest, |vm| vm.signal_nmi(0));
    assert_eq!(guest.said(), [1, 2]);
}

#[test]
fn a_start_up_ipi_starts_the_second_cpu() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::with_vcpus(&engine, Mode::Long, 2, &|a| {
        enable_lapic(a)?;
        a.mov(ebx, ICR_HIGH as u32)?;
        a.mov(dword_ptr(rbx), 1 << 24)?;
        a.mov(ebx, ICR as u32)?;
        a.mov(dword_ptr(rbx), 0x4500)?; // INIT
        a.mov(dword_ptr(rbx), 0x4609)?; // start-up at 9000H
        a.db(&[0xf4, 0xeb, 0xfd])
    });
    // Real mode: mov eax, 99; out E0H, eax; out F4H, al; hlt
    let code = [0x66, 0xb8, 99, 0, 0, 0, 0x66, 0xe7, 0xe0, 0xe6, 0xf4, 0xf4];
    cputest::layout::write(&guest.memory, 0x9000, &code);
    let mut second = guest.vcpus.pop().unwrap();
    let io = Arc::clone(&guest.io);
    std::thread::scope(|scope| {
        scope.spawn(move || second.run(io.as_ref()).unwrap());
        guest.run();
    });
    assert_eq!(guest.said(), [99]);
}
