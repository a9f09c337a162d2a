//! Instructions that this host's KVM may not know, completed by the soft engine.
mod common;

use arch::GuestPhysical;
use common::{Guest, Mode, at, done, engine, lonely_engine, say};
use cputest::layout::{read_u64, write_u64};
use cputest::machine::Access;
use engine::Halt;
use iced_x86::code_asm::*;

#[test]
fn a_16_byte_compare_and_exchange_works() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.mov(rsi, at::DATA)?;
        a.mov(eax, 1)?;
        a.mov(edx, 2)?;
        a.mov(ebx, 3)?;
        a.mov(ecx, 4)?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        say(a)?;
        done(a)
    });
    write_u64(&guest.memory, at::DATA, 1);
    write_u64(&guest.memory, at::DATA + 8, 2);
    assert_eq!(guest.run(), Halt::Kicked);
    assert_eq!(guest.said(), [1]);
    let words = [0, 8].map(|offset| read_u64(&guest.memory, at::DATA + offset));
    assert_eq!(words, [3, 4]);
}

#[test]
fn registers_come_back_from_an_xsave_area() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.mov(rsi, at::DATA)?;
        a.mov(eax, 0x1234_5678)?;
        a.movd(xmm3, eax)?;
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.xsave(ptr(rsi))?;
        a.pxor(xmm3, xmm3)?;
        a.mov(eax, 7)?;
        a.xrstor(ptr(rsi))?;
        a.movd(eax, xmm3)?;
        say(a)?;
        done(a)
    });
    guest.run();
    assert_eq!(guest.said(), [0x1234_5678]);
}

#[test]
fn a_breakpoint_reaches_its_handler_and_returns() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.int3()?;
        a.mov(eax, 2)?;
        say(a)?;
        done(a)
    });
    guest.handler(3, at::HANDLER);
    guest.put(at::HANDLER, &|a| {
        a.mov(eax, dword_ptr(rsp))?;
        say(a)?;
        a.iretq()
    });
    guest.run();
    assert_eq!(guest.said(), [at::CODE as u32 + 1, 2]);
}

#[test]
fn a_vector_store_reaches_a_device() {
    let Some(engine) = engine() else { return };
    if !std::arch::is_x86_feature_detected!("avx") {
        return;
    }
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.mov(rsi, at::DATA)?;
        a.mov(rdi, at::DEVICE)?;
        a.vmovdqu(ymm1, ymmword_ptr(rsi))?;
        a.vmovdqu(ymmword_ptr(rdi), ymm1)?;
        a.mov(eax, 1)?;
        say(a)?;
        done(a)
    });
    write_u64(&guest.memory, at::DATA, 0x1122_3344_5566_7788);
    guest.run();
    assert_eq!(guest.said(), [1]);
    let log = guest.io.log();
    let first = Access::Write(GuestPhysical(at::DEVICE), 0x1122_3344_5566_7788);
    assert!(log.contains(&first), "{log:x?}");
}

#[test]
fn an_instruction_that_kvm_does_not_know_and_that_faults_reaches_its_handler() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.mov(rsi, at::DATA + 8)?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?; // not aligned
        a.mov(rsi, 0x4000_0000u64)?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?; // not mapped
        done(a)
    });
    for (vector, offset) in [(13, at::HANDLER), (14, at::HANDLER + 0x100)] {
        guest.handler(vector, offset);
        guest.put(offset, &|a| {
            a.mov(eax, u32::from(vector))?;
            say(a)?;
            a.pop(rax)?; // the error code
            say(a)?;
            a.mov(rax, cr2)?;
            say(a)?;
            a.add(qword_ptr(rsp), 5)?; // over the instruction
            a.iretq()
        });
    }
    assert_eq!(guest.run(), Halt::Kicked);
    assert_eq!(guest.said(), [13, 0, 0, 14, 2, 0x4000_0000]);
}

#[test]
fn a_guest_that_needs_all_of_it_finishes() {
    let Some(engine) = engine() else { return };
    if !std::arch::is_x86_feature_detected!("avx") {
        return;
    }
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        let mut again = a.create_label();
        a.mov(rsi, at::DATA)?;
        a.mov(rdi, at::DEVICE)?;
        a.mov(r12d, 3)?;
        a.set_label(&mut again)?;
        // 16 bytes from their old value to ECX:EBX.
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(rdx, qword_ptr(rsi + 8))?;
        a.lea(rbx, qword_ptr(rax + 1))?;
        a.lea(rcx, qword_ptr(rdx + 16))?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        say(a)?;
        // Vector registers go to memory, are lost, and come back.
        a.vmovdqu(ymm1, ymmword_ptr(rsi))?;
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.xsave(ptr(rsi + 0x1000))?;
        a.vzeroall()?;
        a.mov(eax, 7)?;
        a.xrstor(ptr(rsi + 0x1000))?;
        a.int3()?;
        // 32 bytes to a device.
        a.vmovdqu(ymmword_ptr(rdi), ymm1)?;
        a.dec(r12d)?;
        a.jne(again)?;
        done(a)
    });
    guest.handler(3, at::HANDLER);
    guest.put(at::HANDLER, &|a| {
        a.mov(eax, 3)?;
        say(a)?;
        a.iretq()
    });
    assert_eq!(guest.run(), Halt::Kicked);
    assert_eq!(guest.said(), [1, 3].repeat(3));
    let log = guest.io.log();
    for round in 1..=3 {
        assert!(log.contains(&Access::Write(GuestPhysical(at::DEVICE), round)), "{log:x?}");
    }
}

#[test]
fn without_a_companion_the_guest_runs_or_the_error_names_the_other_engine() {
    let Some(engine) = lonely_engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.mov(rsi, at::DATA)?;
        a.lock().cmpxchg16b(xmmword_ptr(rsi))?;
        done(a)
    });
    match guest.vcpus[0].run(guest.io.as_ref()) {
        Ok(halt) => assert_eq!(halt, Halt::Kicked),
        Err(error) => assert!(error.to_string().contains("--engine soft"), "{error}"),
    }
}
