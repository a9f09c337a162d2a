//! Code that changes itself, accesses across pages, strings, and locked operations.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::VcpuState;
use arch::registers::gpr;
use cputest::layout::{page, read, read_u64, write, write_u64};
use cputest::micro::{Guest, Mode, at, done, say};
use cputest::on_each_engine;
use iced_x86::code_asm::*;

fn map(guest: &mut Guest, linear: u64, physical: u64, bits: u64) {
    let memory = guest.memory.clone();
    guest.tables.map(&memory, linear, physical, bits);
}

on_each_engine!(an_instruction_that_changes_the_next_one_runs_the_new_one, |engine| {
    for mode in [Mode::LONG, Mode::Protected32, Mode::Real] {
        let mut guest = Guest::new(engine, mode);
        guest.code(at::CODE, |a| {
            a.mov(ecx, 3)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            // The store goes to the immediate of `mov al, 0`.
            let first = if a.bitness() == 16 { 6 } else { 5 };
            let store = match a.bitness() {
                16 => 4,
                32 => 6,
                _ => 7,
            };
            let target = at::CODE + first + store + 1;
            match a.bitness() {
                16 => a.db(&[0x88, 0x0e, target as u8, (target >> 8) as u8])?,
                _ => a.mov(byte_ptr(target), cl)?,
            }
            a.mov(al, 0)?;
            a.movzx(eax, al)?;
            say(a)?;
            a.dec(ecx)?;
            a.jne(again)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [3, 2, 1], "{mode:?}");
    }
});

on_each_engine!(code_written_through_another_mapping_is_run_as_written, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    map(&mut guest, 0x70_0000, at::DATA, page::P | page::W);
    map(&mut guest, 0x71_0000, at::DATA, page::P);
    guest.code(at::DATA, |a| {
        a.mov(eax, 1)?;
        a.ret()
    });
    guest.code(at::CODE, |a| {
        a.mov(ebx, 0x71_0000)?;
        for value in 1..5 {
            a.mov(dword_ptr(0x70_0001), value)?;
            a.call(rbx)?;
            say(a)?;
        }
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 2, 3, 4]);
});

on_each_engine!(
    code_on_another_page_written_byte_by_byte_and_by_strings_is_run_as_written,
    |engine| {
        let mut guest = Guest::new(engine, Mode::LONG);
        // mov eax, imm32; ret
        write(&guest.memory, at::DATA, &[0xb8, 7, 0, 0, 0, 0xc3]);
        write(&guest.memory, at::DATA + 0x1000, &[0xb8, 1, 0, 0, 0, 0xc3]);
        guest.code(at::CODE, |a| {
            a.mov(ebx, at::DATA as u32 + 0x1000)?;
            a.call(rbx)?;
            say(a)?;
            a.mov(byte_ptr(rbx + 2), 1)?;
            a.call(rbx)?;
            say(a)?;
            a.mov(esi, at::DATA as u32)?;
            a.mov(edi, ebx)?;
            a.mov(ecx, 6)?;
            a.rep().movsb()?;
            a.call(rbx)?;
            say(a)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [1, 0x101, 7]);
    }
);

on_each_engine!(an_instruction_across_two_pages_follows_changes_of_either, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    map(&mut guest, 0x70_0000, at::DATA, page::P | page::W);
    map(&mut guest, 0x70_1000, at::DATA + 0x5000, page::P | page::W);
    // mov eax, imm32 with two bytes on the first page; ret
    write(&guest.memory, at::DATA + 0xffe, &[0xb8, 1]);
    write(&guest.memory, at::DATA + 0x5000, &[0, 0, 0, 0xc3]);
    guest.code(at::CODE, |a| {
        a.mov(ebx, 0x70_0ffe)?;
        a.call(rbx)?;
        say(a)?;
        a.mov(byte_ptr(rbx + 2), 2)?;
        a.call(rbx)?;
        say(a)?;
        a.mov(byte_ptr(rbx + 1), 3)?;
        a.call(rbx)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 0x201, 0x203]);
});

on_each_engine!(an_instruction_whose_second_page_is_missing_faults_with_that_address, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    map(&mut guest, 0x70_0000, at::DATA, page::P);
    write(&guest.memory, at::DATA + 0xffe, &[0xb8, 1]);
    guest.code(at::CODE, |a| {
        a.mov(ebx, 0x70_0ffe)?;
        a.jmp(rbx)
    });
    let end = guest.run();
    let exception = end.exception();
    assert_eq!((exception.vector, exception.rip), (14, 0x70_0ffe));
    assert_eq!(end.state.cr2, 0x70_1000);
});

on_each_engine!(the_page_is_run_as_the_page_fault_handler_filled_it, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    map(&mut guest, 0x70_0000, at::DATA, 0);
    let entry = guest.tables.entry(&memory, 0x70_0000, 1);
    map(&mut guest, 0x71_0000, entry & !0xfff, page::P | page::W);
    guest.handler(14, 0x9000, 0);
    guest.code(0x9000, |a| {
        // mov eax, 5; ret
        a.mov(dword_ptr(at::DATA), 0x5b8)?;
        a.mov(dword_ptr(at::DATA + 4), 0xc300)?;
        a.mov(dword_ptr(0x71_0000 + (entry & 0xfff)), at::DATA as i32 | 1)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        a.mov(ebx, 0x70_0000)?;
        a.call(rbx)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [5]);
});

on_each_engine!(strings_stop_exactly_where_a_page_is_missing_in_both_directions, |engine| {
    // (direction flag, start, elements until the fault, element size)
    for (down, start, done) in [(false, 0x70_0fe1u64, 7u64), (true, 0x70_0020, 9)] {
        let mut guest = Guest::new(engine, Mode::LONG);
        map(&mut guest, 0x70_0000, at::DATA, page::P | page::W);
        guest.code(at::CODE, |a| {
            a.mov(rdi, start)?;
            a.mov(ecx, 1000)?;
            a.mov(eax, 0x5a5a_5a5a)?;
            if down {
                a.std()?
            } else {
                a.cld()?
            }
            a.rep().stosd()
        });
        let end = guest.run();
        let exception = end.exception();
        assert_eq!((exception.vector, exception.error), (14, Some(2)));
        let step = if down { -4i64 } else { 4 };
        let stopped = start.wrapping_add_signed(step * done as i64);
        assert_eq!(end.state.gpr[gpr::RDI], stopped);
        assert_eq!(end.state.gpr[gpr::RCX], 1000 - done);
        assert_eq!(end.state.cr2, if down { stopped } else { 0x70_1000 });
    }
});

on_each_engine!(a_string_copy_goes_on_after_its_fault_was_mended, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    map(&mut guest, 0x70_0000, at::DATA, page::P | page::W);
    map(&mut guest, 0x70_1000, at::DATA + 0x5000, 0);
    let entry = guest.tables.entry(&memory, 0x70_1000, 1);
    map(&mut guest, 0x71_0000, entry & !0xfff, page::P | page::W);
    let text: Vec<u8> = (0..200u8).collect();
    write(&memory, 0x9_0000, &text);
    guest.handler(14, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.or(dword_ptr(0x71_0000 + (entry & 0xfff)), 3)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        a.mov(esi, 0x9_0000)?;
        a.mov(edi, 0x70_0fa0)?;
        a.mov(ecx, 200)?;
        a.rep().movsb()?;
        a.mov(eax, ecx)?;
        say(a)?;
        done(a)
    });
    guest.run().done();
    let mut copy = [0; 200];
    read(&memory, at::DATA + 0xfa0, &mut copy[..0x60]);
    read(&memory, at::DATA + 0x5000, &mut copy[0x60..]);
    assert_eq!(copy.as_slice(), text);
});

on_each_engine!(overlapping_copies_repeat_the_pattern_as_byte_copies_do, |engine| {
    for (distance, size) in [(1u64, 1u32), (3, 1), (2, 4), (8, 8)] {
        let mut guest = Guest::new(engine, Mode::LONG);
        write(&guest.memory, at::DATA, b"abcdefghijklmnop");
        guest.code(at::CODE, |a| {
            a.mov(esi, at::DATA as u32)?;
            a.mov(edi, (at::DATA + distance) as u32)?;
            a.mov(ecx, 24)?;
            match size {
                1 => a.rep().movsb()?,
                4 => a.rep().movsd()?,
                _ => a.rep().movsq()?,
            }
            done(a)
        });
        guest.run().done();
        let mut model = b"abcdefghijklmnop".to_vec();
        model.resize(300, 0);
        for n in 0..24usize {
            let (from, size) = (n * size as usize, size as usize);
            let piece = model[from..from + size].to_vec();
            let to = from + distance as usize;
            model[to..to + size].copy_from_slice(&piece);
        }
        let mut found = vec![0; 300];
        read(&guest.memory, at::DATA, &mut found);
        assert_eq!(found, model, "distance {distance}, size {size}");
    }
});

on_each_engine!(sixteen_bit_strings_wrap_at_64_kib, |engine| {
    let mut guest = Guest::new(engine, Mode::Real);
    guest.state.segments.regs[0] = arch::Segment::real_mode(0x8000);
    guest.code(at::CODE, |a| {
        a.mov(di, 0xfffeu32)?;
        a.mov(cx, 4u32)?;
        a.mov(al, 0x77)?;
        a.cld()?;
        a.rep().stosb()?;
        a.movzx(eax, di)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [2]);
    assert_eq!(read_u64(&guest.memory, at::DATA) & 0xffff_ffff, 0x7777);
    assert_eq!(read_u64(&guest.memory, at::DATA + 0xfff8) >> 48, 0x7777);
});

on_each_engine!(fs_and_gs_bases_move_operands_and_swapgs_exchanges_them, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    for n in 0..4 {
        write_u64(&guest.memory, at::DATA + 0x100 * n, 10 + n);
    }
    guest.code(at::CODE, |a| {
        for (register, base) in [
            (0xc000_0100u32, at::DATA),
            (0xc000_0101, at::DATA + 0x100),
            (0xc000_0102, at::DATA + 0x200),
        ] {
            a.mov(ecx, register)?;
            a.mov(eax, base as u32)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        a.xor(ebx, ebx)?;
        a.mov(eax, dword_ptr(rbx).fs())?;
        say(a)?;
        a.mov(eax, dword_ptr(rbx).gs())?;
        say(a)?;
        a.swapgs()?;
        a.mov(eax, dword_ptr(rbx + 0x100).gs())?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [10, 11, 13]);
});

/// Puts vCPUs 1 to 3 at the same code as vCPU 0, each with a stack of its own and its number in
/// ESI.
fn start_all(guest: &mut Guest) {
    for index in 1..guest.vcpus.len() {
        let own = guest.vcpus[index].state().unwrap();
        let mut state = VcpuState { lapic: own.lapic, msrs: own.msrs, ..guest.state.clone() };
        state.gpr[gpr::RSI] = index as u64;
        state.gpr[gpr::RSP] = at::STACK - 0x200 * index as u64;
        guest.vcpus[index].set_state(&state).unwrap();
    }
}

on_each_engine!(locked_operations_of_four_vcpus_on_one_line_lose_nothing, |engine| {
    const ROUNDS: u32 = 20_000;
    let mut guest = Guest::with_vcpus(engine, Mode::LONG, 4).unwrap();
    guest.code(at::CODE, |a| {
        let (mut again, mut retry, mut wait) =
            (a.create_label(), a.create_label(), a.create_label());
        let mut stay = a.create_label();
        a.mov(edi, at::DATA as u32)?;
        a.mov(ebp, ROUNDS)?;
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(rdi))?;
        a.mov(eax, 3)?;
        a.lock().xadd(dword_ptr(rdi + 4), eax)?;
        a.set_label(&mut retry)?;
        a.mov(rax, qword_ptr(rdi + 8))?;
        a.lea(rdx, qword_ptr(rax + 5))?;
        a.lock().cmpxchg(qword_ptr(rdi + 8), rdx)?;
        a.jne(retry)?;
        // An operand across two lines.
        a.lock().add(dword_ptr(rdi + 62), 1)?;
        a.dec(ebp)?;
        a.jne(again)?;
        a.lock().inc(dword_ptr(rdi + 0x100))?;
        a.test(esi, esi)?;
        a.jne(stay)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rdi + 0x100), 4)?;
        a.jne(wait)?;
        for offset in [0, 4, 8, 62] {
            a.mov(eax, dword_ptr(rdi + offset))?;
            say(a)?;
        }
        done(a)?;
        a.set_label(&mut stay)?;
        a.pause()?;
        a.jmp(stay)
    });
    start_all(&mut guest);
    let all = 4 * ROUNDS;
    assert_eq!(guest.run().done(), [all, 3 * all, 5 * all, all]);
});

on_each_engine!(code_changed_by_another_vcpu_is_seen_after_a_serialising_instruction, |engine| {
    const ROUNDS: u32 = 200;
    let mut guest = Guest::with_vcpus(engine, Mode::LONG, 2).unwrap();
    // mov eax, imm32; ret
    write(&guest.memory, at::DATA + 0x1000, &[0xb8, 0, 0, 0, 0, 0xc3]);
    guest.code(at::CODE, |a| {
        let (mut other, mut writer, mut reader) =
            (a.create_label(), a.create_label(), a.create_label());
        let (mut wait, mut seen, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(edi, at::DATA as u32)?;
        a.lea(r8, dword_ptr(rdi + 0x1000))?;
        a.mov(ebp, 1)?;
        a.test(esi, esi)?;
        a.jne(other)?;
        // vCPU 0 writes version n, says so, and waits until it is seen.
        a.set_label(&mut writer)?;
        a.mov(dword_ptr(r8 + 1), ebp)?;
        a.mov(dword_ptr(rdi), ebp)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rdi + 64), ebp)?;
        a.jne(wait)?;
        a.inc(ebp)?;
        a.cmp(ebp, ROUNDS)?;
        a.jne(writer)?;
        a.mov(eax, dword_ptr(rdi + 128))?;
        say(a)?;
        done(a)?;
        // vCPU 1 waits for version n, serialises, runs it and checks.
        a.set_label(&mut other)?;
        a.nop()?;
        a.set_label(&mut reader)?;
        a.pause()?;
        a.cmp(dword_ptr(rdi), ebp)?;
        a.jne(reader)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.call(r8)?;
        a.cmp(eax, ebp)?;
        a.jne(bad)?;
        a.set_label(&mut seen)?;
        a.mov(dword_ptr(rdi + 64), ebp)?;
        a.inc(ebp)?;
        a.jmp(reader)?;
        a.set_label(&mut bad)?;
        a.inc(dword_ptr(rdi + 128))?;
        a.jmp(seen)
    });
    start_all(&mut guest);
    assert_eq!(guest.run().done(), [0], "versions that vCPU 1 missed");
});

on_each_engine!(the_clock_of_four_vcpus_never_goes_back, |engine| {
    let mut guest = Guest::with_vcpus(engine, Mode::LONG, 4).unwrap();
    guest.code(at::CODE, |a| {
        let (mut again, mut fine, mut stay, mut wait) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.mov(edi, at::DATA as u32)?;
        a.mov(ebp, 5000)?;
        a.set_label(&mut again)?;
        a.nop()?;
        // Under a lock: the time must not be before the last that any vCPU saw.
        let mut locked = a.create_label();
        a.set_label(&mut locked)?;
        a.pause()?;
        a.lock().bts(dword_ptr(rdi), 0)?;
        a.jb(locked)?;
        a.lfence()?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, qword_ptr(rdi + 8))?;
        a.jae(fine)?;
        a.inc(dword_ptr(rdi + 16))?;
        a.set_label(&mut fine)?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.mov(dword_ptr(rdi), 0)?;
        a.dec(ebp)?;
        a.jne(again)?;
        a.lock().inc(dword_ptr(rdi + 0x100))?;
        a.test(esi, esi)?;
        a.jne(stay)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rdi + 0x100), 4)?;
        a.jne(wait)?;
        a.mov(eax, dword_ptr(rdi + 16))?;
        say(a)?;
        done(a)?;
        a.set_label(&mut stay)?;
        a.pause()?;
        a.jmp(stay)
    });
    start_all(&mut guest);
    assert_eq!(guest.run().done(), [0], "times before an earlier one");
});
