//! Accesses that the engine makes with one look at the TLB: the guest must see each of them.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::registers::{gpr, rflags};
use cputest::layout::{gate64, page, read_u64, write_u64};
use cputest::micro::{Exception, Guest, Mode, at, done, say, sel};
use cputest::on_each_engine;
use cputest::under_test::EngineUnderTest;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// A page whose neighbours are not mapped.
const PAGE: u64 = 0x70_0000;
const VECTOR_PF: u8 = 14;

/// A guest that runs `code` twice, with RSP and RBX first in the middle of [`PAGE`] and then at
/// `second`, and RBP at the second round's number; `code` ends where it falls through.
fn twice(
    engine: EngineUnderTest,
    second: u64,
    code: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Guest {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    guest.tables.map(&memory, PAGE, at::DATA, page::P | page::W);
    for n in 0..512 {
        write_u64(&guest.memory, at::DATA + 8 * n, 0x1000 + n);
    }
    // The handler of page faults has a stack of its own.
    let stub = at::STUBS + 16 * u64::from(VECTOR_PF);
    guest.gate64(VECTOR_PF, gate64(sel::CODE64, stub, 14, 0, 1));
    guest.code(at::CODE, |a| {
        let (mut again, mut end) = (a.create_label(), a.create_label());
        a.xor(ebp, ebp)?;
        a.mov(esp, (PAGE + 0x800) as u32)?;
        a.set_label(&mut again)?;
        a.mov(ebx, esp)?;
        // CF = 1, which `code` may keep.
        a.cmp(ebp, -1)?;
        code(a)?;
        a.test(ebp, ebp)?;
        a.jne(end)?;
        a.inc(ebp)?;
        a.mov(esp, second as u32)?;
        a.jmp(again)?;
        a.set_label(&mut end)?;
        done(a)
    });
    guest
}

/// The page fault that ended a run, with RSP as it was.
fn fault(guest: &mut Guest) -> (Exception, u64, [u64; 16]) {
    let end = guest.run();
    let exception = end.exception();
    assert_eq!(exception.vector, VECTOR_PF, "{exception:x?}");
    (exception, exception.stack.unwrap().1, end.state.gpr)
}

on_each_engine!(pushes_that_reach_the_end_of_the_stack_fault_one_by_one, |engine| {
    let mut guest = twice(engine, PAGE + 16, |a| {
        a.push(rbx)?;
        a.push(0x1234)?;
        a.push(r13)?;
        a.push(rax)
    });
    let (exception, stack, registers) = fault(&mut guest);
    assert_eq!((exception.error, stack), (Some(2), PAGE), "the third PUSH");
    assert_eq!(registers[gpr::RBP], 1);
    assert_eq!(read_u64(&guest.memory, at::DATA + 8), PAGE + 16, "RBX");
    assert_eq!(read_u64(&guest.memory, at::DATA), 0x1234);
});

on_each_engine!(pops_that_reach_the_end_of_the_stack_fault_one_by_one, |engine| {
    let mut guest = twice(engine, PAGE + 0xff0, |a| {
        a.pop(rcx)?;
        a.pop(r15)?;
        a.pop(rdx)?;
        a.pop(rsi)
    });
    let (exception, stack, registers) = fault(&mut guest);
    assert_eq!((exception.error, stack), (Some(0), PAGE + 0x1000), "the third POP");
    assert_eq!(registers[gpr::RCX], 0x1000 + 510);
    assert_eq!(registers[15], 0x1000 + 511);
    // The first round's values.
    assert_eq!(registers[gpr::RDX], 0x1000 + 256 + 2);
    assert_eq!(registers[gpr::RSI], 0x1000 + 256 + 3);
});

on_each_engine!(flags_that_are_needed_later_are_exact_at_a_fault_between, |engine| {
    let mut guest = twice(engine, PAGE + 0xff0, |a| {
        let mut carry = a.create_label();
        a.mov(rcx, qword_ptr(rbx + 8))?;
        a.mov(rdx, qword_ptr(rbx + 16))?;
        a.jb(carry)?;
        a.ud2()?;
        a.set_label(&mut carry)?;
        a.nop()
    });
    let (exception, _, registers) = fault(&mut guest);
    assert_eq!(registers[gpr::RCX], 0x1000 + 511);
    assert_ne!(exception.rflags & rflags::CF, 0, "CF, which JB reads");
});

on_each_engine!(pushes_and_pops_around_rsp_itself_see_it_as_it_is, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        a.mov(rbx, rsp)?;
        a.push(rax)?;
        a.push(rsp)?;
        a.push(rcx)?;
        a.mov(rdx, rsp)?;
        a.pop(rcx)?;
        a.pop(rsi)?;
        a.mov(eax, ebx)?;
        a.sub(eax, esi)?;
        say(a)?;
        a.mov(eax, ebx)?;
        a.sub(eax, edx)?;
        say(a)?;
        // POP RSP takes what it loads, and the next POP goes on from there.
        a.lea(rsi, qword_ptr(rbx - 64))?;
        a.mov(qword_ptr(rsi), 77)?;
        a.push(rsi)?;
        a.pop(rsp)?;
        a.pop(rax)?;
        say(a)?;
        a.mov(rax, rsp)?;
        a.sub(rax, rsi)?;
        say(a)?;
        a.mov(rsp, rbx)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [8, 24, 77, 8]);
});

on_each_engine!(operands_at_known_addresses_follow_the_page_tables, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    guest.tables.map(&memory, PAGE, at::DATA, page::P | page::W);
    let entry = guest.tables.entry(&memory, PAGE, 1);
    write_u64(&guest.memory, at::DATA + 8, 1);
    write_u64(&guest.memory, at::DATA + 0x1008, 10);
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.xor(ecx, ecx)?;
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(PAGE + 8))?;
        a.add(eax, dword_ptr(PAGE + 16))?;
        a.inc(dword_ptr(PAGE + 16))?;
        say(a)?;
        a.mov(rax, qword_ptr(entry))?;
        a.xor(rax, 0x1000)?;
        a.mov(qword_ptr(entry), rax)?;
        a.invlpg(byte_ptr(PAGE + 8))?;
        a.inc(ecx)?;
        a.cmp(ecx, 4)?;
        a.jne(again)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 10, 2, 11]);
});

on_each_engine!(a_fault_at_a_known_address_names_that_address, |engine| {
    let mut guest = twice(engine, PAGE + 0x800, |a| {
        a.mov(rcx, qword_ptr(PAGE + 0xff8))?;
        a.mov(dword_ptr(PAGE + 0xff8), ebp)?;
        // The last one reaches into the next page.
        a.mov(rdx, qword_ptr(PAGE + 0xff0))?;
        a.mov(rsi, qword_ptr(PAGE + 0xffc))
    });
    let (exception, _, registers) = fault(&mut guest);
    assert_eq!(exception.error, Some(0));
    assert_eq!((registers[gpr::RCX], registers[gpr::RDX]), (0x1000 + 511, 0x1000 + 510));
    assert_eq!(read_u64(&guest.memory, at::DATA + 0xff8), (0x1000 + 511) & !0xffff_ffff);
    assert_eq!(guest.vcpus[0].state().unwrap().cr2, PAGE + 0x1000);
});

/// A guest that adds up the first words of many pages, round by round, through two array operands
/// that the engine may expect to stay in their page, and does what `between` says after each round.
fn sums(
    engine: EngineUnderTest,
    pages: u64,
    rounds: u32,
    between: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Guest {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    for n in 0..pages {
        guest.tables.map(&memory, PAGE + 4096 * n, at::DATA + 4096 * (n % 16), page::P | page::W);
        write_u64(&guest.memory, at::DATA + 4096 * (n % 16), n % 16);
    }
    guest.code(at::CODE, |a| {
        let (mut round, mut next) = (a.create_label(), a.create_label());
        a.mov(ebp, rounds)?;
        a.mov(ebx, PAGE as u32)?;
        a.set_label(&mut round)?;
        a.xor(eax, eax)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut next)?;
        a.add(rax, qword_ptr(rbx + rcx))?;
        a.add(qword_ptr(rbx + rcx + 8), 1)?;
        a.add(rcx, 4096)?;
        a.cmp(ecx, (4096 * pages) as i32)?;
        a.jne(next)?;
        say(a)?;
        between(a)?;
        a.dec(ebp)?;
        a.jne(round)?;
        done(a)
    });
    guest
}

on_each_engine!(an_array_over_many_pages_is_read_page_by_page, |engine| {
    // So many that the engine gives its expectation up.
    let mut guest = sums(engine, 256, 200, |a| a.nop());
    assert_eq!(guest.run().done(), [16 * 120; 200]);
    assert_eq!(read_u64(&guest.memory, at::DATA + 8), 16 * 200);
});

on_each_engine!(a_page_used_last_follows_the_page_tables, |engine| {
    let mut guest = sums(engine, 1, 2, |a| {
        a.mov(rdx, qword_ptr(at::STACK))?;
        a.mov(qword_ptr(rdx), (at::DATA + 0x1000) as i32 + 3)?;
        a.invlpg(byte_ptr(rbx))
    });
    let memory = guest.memory.clone();
    let entry = guest.tables.entry(&memory, PAGE, 1);
    write_u64(&memory, at::STACK, entry);
    write_u64(&memory, at::DATA + 0x1000, 77);
    assert_eq!(guest.run().done(), [0, 77]);
    assert_eq!(read_u64(&memory, at::DATA + 8), 1);
    assert_eq!(read_u64(&memory, at::DATA + 0x1008), 1);
});

on_each_engine!(a_page_used_last_that_becomes_read_only_faults, |engine| {
    let mut guest = sums(engine, 1, 2, |a| {
        a.mov(rdx, qword_ptr(at::STACK))?;
        a.mov(qword_ptr(rdx), at::DATA as i32 + 1)?;
        a.mov(rsi, cr0)?;
        a.bts(rsi, 16)?;
        a.mov(cr0, rsi)?;
        a.invlpg(byte_ptr(rbx))
    });
    let memory = guest.memory.clone();
    let entry = guest.tables.entry(&memory, PAGE, 1);
    write_u64(&memory, at::STACK, entry);
    let end = guest.run();
    let exception = end.exception();
    assert_eq!((exception.vector, exception.error), (VECTOR_PF, Some(3)));
    assert_eq!((end.said.as_slice(), end.state.cr2), (&[0u32][..], PAGE + 8));
    assert_eq!(end.state.gpr[gpr::RBP], 1);
});

on_each_engine!(a_stack_that_is_not_canonical_is_a_stack_fault, |engine| {
    for bit in [63, 47] {
        let mut guest = Guest::new(engine, Mode::LONG);
        for vector in [12, 13] {
            let stub = at::STUBS + 16 * u64::from(vector);
            guest.gate64(vector, gate64(sel::CODE64, stub, 14, 0, 1));
        }
        guest.code(at::CODE, |a| {
            a.push(rax)?;
            a.pop(rax)?;
            a.mov(rsp, 1i64 << bit)?;
            a.add(rsp, 0x100)?;
            a.cmp(eax, -1)?;
            a.push(rax)?;
            done(a)
        });
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.error), (12, Some(0)), "bit {bit}");
        assert_eq!(exception.stack.unwrap().1, (1 << bit) + 0x100);
    }
});

on_each_engine!(an_array_that_is_not_canonical_is_a_protection_fault, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        let mut next = a.create_label();
        a.mov(rbx, 1i64 << 63)?;
        a.mov(ecx, 3)?;
        a.set_label(&mut next)?;
        a.add(rax, qword_ptr(rbx + rcx * 8))?;
        a.dec(ecx)?;
        a.jne(next)?;
        done(a)
    });
    let exception = guest.run().exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
});
