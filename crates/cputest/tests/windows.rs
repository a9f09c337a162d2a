//! The ways into and out of privileged code: when a waiting interrupt is taken, and what the
//! instructions around such a window do (Intel SDM 3A 6.8, 2B STI, POPF, IRET, SYSRET, STAC).
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::VcpuState;
use arch::msr;
use arch::registers::{cr4, efer, rflags};
use cputest::layout::{page, write_u64};
use cputest::micro::{Guest, Mode, at, done, say, sel};
use cputest::on_each_engine;
use cputest::under_test::EngineUnderTest;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const VECTOR: u8 = 0x40;
const SPURIOUS: i32 = 0xf0;
const EOI: i32 = 0xb0;
const ICR: i32 = 0x300;

/// A guest whose interrupt handler says R12, which counts instructions after a window.
fn guest(engine: EngineUnderTest) -> Guest {
    let guest = Guest::new(engine, Mode::LONG);
    guest.handler(VECTOR, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.mov(eax, r12d)?;
        say(a)?;
        a.mov(dword_ptr(r15 + EOI), 0)?;
        a.iretq()
    });
    guest
}

/// Asks for the interrupt while interrupts are off.
fn ask(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.cli()?;
    a.xor(r12d, r12d)?;
    a.mov(r15, at::LAPIC)?;
    a.mov(dword_ptr(r15 + SPURIOUS), 0x1ff)?;
    a.mov(dword_ptr(r15 + ICR), 0x4_4000 | i32::from(VECTOR))
}

/// Counts on.
fn more(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for _ in 0..4 {
        a.inc(r12d)?;
    }
    Ok(())
}

/// Runs code twice, so that the second time it is translated, and compares what it says.
fn twice(
    guest: &mut Guest,
    code: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    expected: &[u32],
    what: &str,
) {
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.mov(ebp, 3)?;
        a.set_label(&mut again)?;
        code(a)?;
        a.dec(ebp)?;
        a.jne(again)?;
        done(a)
    });
    let expected: Vec<u32> = expected.iter().copied().cycle().take(3 * expected.len()).collect();
    assert_eq!(guest.run().done(), expected, "{what}");
}

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

on_each_engine!(sti_lets_exactly_one_more_instruction_through, |engine| {
    let followers: [(&str, Emit); 7] = [
        ("a register", |a| a.inc(r12d)),
        ("memory", |a| {
            a.inc(dword_ptr(at::DATA))?;
            a.mov(eax, dword_ptr(at::DATA + 4))?;
            a.mov(dword_ptr(at::DATA + 8), eax)
        }),
        ("a push", |a| {
            a.push(rax)?;
            a.pop(rax)
        }),
        ("a jump", |a| {
            let mut next = a.create_label();
            a.jmp(next)?;
            a.set_label(&mut next)?;
            a.inc(r12d)
        }),
        ("a call", |a| {
            let (mut target, mut over) = (a.create_label(), a.create_label());
            a.call(target)?;
            a.jmp(over)?;
            a.set_label(&mut target)?;
            a.inc(r12d)?;
            a.ret()?;
            a.set_label(&mut over)?;
            a.nop()
        }),
        ("PUSHFQ", |a| {
            a.pushfq()?;
            a.pop(rax)
        }),
        ("a helper", |a| a.mov(rax, cr0)),
    ];
    for (what, follower) in followers {
        let mut guest = guest(engine);
        // The handler says how far from the STI it was entered.
        guest.code(0x9000, |a| {
            a.mov(eax, dword_ptr(rsp))?;
            a.sub(eax, r13d)?;
            say(a)?;
            a.mov(dword_ptr(r15 + EOI), 0)?;
            a.iretq()
        });
        // The length of the first instruction after the STI.
        let bytes = guest.code(0xf000, follower);
        let mut decoder = iced_x86::Decoder::with_ip(64, &bytes, 0xf000, 0);
        let first = decoder.decode();
        let distance = match first.near_branch_target() {
            0 => first.len() as u64,
            target => target - 0xf000,
        };
        let code = |a: &mut CodeAssembler| {
            ask(a)?;
            let mut after = a.create_label();
            a.lea(r13, ptr(after))?;
            a.sti()?;
            a.set_label(&mut after)?;
            follower(a)?;
            more(a)
        };
        twice(&mut guest, code, &[distance as u32], what);
    }
});

on_each_engine!(sti_and_hlt_never_sleep_through_an_interrupt, |engine| {
    let mut guest = guest(engine);
    let code = |a: &mut CodeAssembler| {
        ask(a)?;
        a.sti()?;
        a.hlt()?;
        a.inc(r12d)?;
        a.mov(eax, 0x77)?;
        say(a)
    };
    twice(&mut guest, code, &[0, 0x77], "hlt");
});

on_each_engine!(
    sti_at_the_end_of_a_page_holds_interrupts_off_until_after_the_next_instruction,
    |engine| {
        let mut guest = guest(engine);
        guest.code(0xafff, |a| {
            a.sti()?;
            a.inc(r12d)?;
            a.inc(r12d)?;
            a.ret()
        });
        let code = |a: &mut CodeAssembler| {
            ask(a)?;
            a.call(0xafff)
        };
        twice(&mut guest, code, &[1], "page end");
    }
);

on_each_engine!(popf_and_iret_take_a_waiting_interrupt_before_the_next_instruction, |engine| {
    let windows: [(&str, Emit); 2] = [
        ("POPF", |a| {
            a.push((rflags::IF | rflags::FIXED) as i32)?;
            a.popfq()
        }),
        ("IRET", |a| {
            let mut next = a.create_label();
            a.mov(rcx, rsp)?;
            a.push(i32::from(sel::DATA))?;
            a.push(rcx)?;
            a.push((rflags::IF | rflags::FIXED) as i32)?;
            a.push(i32::from(sel::CODE64))?;
            a.lea(rax, ptr(next))?;
            a.push(rax)?;
            a.iretq()?;
            a.set_label(&mut next)
        }),
    ];
    for (what, window) in windows {
        let mut guest = guest(engine);
        let code = |a: &mut CodeAssembler| {
            ask(a)?;
            window(a)?;
            more(a)
        };
        twice(&mut guest, code, &[0], what);
    }
});

fn set_msr(state: &mut VcpuState, index: u32, value: u64) {
    assert!(state.msrs.set(index, value), "{index:#x} is not of the state table");
}

on_each_engine!(sysret_takes_a_waiting_interrupt_before_the_first_user_instruction, |engine| {
    let mut guest = guest(engine);
    let star = u64::from(sel::USER_CODE32) << 48 | u64::from(sel::CODE64) << 32;
    set_msr(&mut guest.state, msr::STAR, star);
    set_msr(&mut guest.state, msr::LSTAR, 0xa000);
    set_msr(&mut guest.state, msr::SFMASK, rflags::IF | rflags::TF | rflags::DF | rflags::AC);
    guest.state.efer |= efer::SCE;
    guest.code(0xa000, |a| {
        a.mov(r14, rcx)?;
        a.mov(rsp, at::STACK)?;
        ask(a)?;
        a.mov(rcx, r14)?;
        a.dec(ebp)?;
        let mut end = a.create_label();
        a.je(end)?;
        a.sysretq()?;
        a.set_label(&mut end)?;
        done(a)
    });
    guest.code(at::USER, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        more(a)?;
        a.syscall()?;
        more(a)?;
        a.jmp(again)
    });
    guest.start_in_user_mode();
    guest.state.rflags |= rflags::IF;
    guest.state.gpr[arch::registers::gpr::RBP] = 5;
    assert_eq!(guest.run().done(), [0, 0, 0, 0]);
});

on_each_engine!(pushf_shows_all_flags_as_they_are, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let code = |a: &mut CodeAssembler| {
        // CF, AF, SF, PF of 0 - 1; then OF of the largest number plus one, with IF on.
        a.xor(eax, eax)?;
        a.sub(eax, 1)?;
        a.pushfq()?;
        a.pop(rax)?;
        say(a)?;
        a.sti()?;
        a.nop()?;
        a.mov(eax, 0x7fff_ffff)?;
        a.add(eax, 1)?;
        a.pushfq()?;

        a.pop(rax)?;
        say(a)?;
        a.cli()?;
        a.xor(eax, eax)?;
        a.pushfq()?;
        a.pop(rax)?;
        say(a)
    };
    twice(&mut guest, code, &[0x97, 0xa96, 0x46], "flags");
});

on_each_engine!(a_fault_of_pushf_leaves_flags_and_stack_pointer_alone, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    guest.tables.map(&memory, 0x7f_f000, 0, 0);
    // IST 1 gives the handler a stack.
    guest.gate64(14, cputest::layout::gate64(sel::CODE64, at::STUBS + 16 * 14, 14, 0, 1));
    guest.code(at::CODE, |a| {
        a.mov(rsp, 0x80_0000u64)?;
        a.xor(eax, eax)?;
        a.sub(eax, 1)?;
        a.pushfq()?;
        done(a)
    });
    let exception = guest.run().exception();
    assert_eq!((exception.vector, exception.error), (14, Some(2)));
    assert_eq!(exception.rflags & rflags::ARITHMETIC, 0x95);
    assert_eq!(exception.stack.unwrap().1, 0x80_0000);
});

on_each_engine!(swapgs_exchanges_the_bases, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    write_u64(&guest.memory, at::DATA, 1);
    write_u64(&guest.memory, at::DATA + 0x100, 2);
    guest.state.segments[arch::SegmentName::Gs].base = at::DATA;
    set_msr(&mut guest.state, msr::KERNEL_GS_BASE, at::DATA + 0x100);
    let code = |a: &mut CodeAssembler| {
        for _ in 0..2 {
            a.xor(ecx, ecx)?;
            a.mov(eax, dword_ptr(rcx).gs())?;
            say(a)?;
            a.swapgs()?;
        }
        Ok(())
    };
    twice(&mut guest, code, &[1, 2], "swapgs");
});

on_each_engine!(stac_opens_user_pages_to_the_kernel_until_clac, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr4 |= cr4::SMAP;
    write_u64(&guest.memory, at::USER + 0x5000, 7);
    guest.handler(14, 0x9000, 0);
    // The fault says its error code and goes on after the load, which is three bytes long.
    guest.code(0x9000, |a| {
        a.pop(rax)?;
        a.add(eax, 0x100)?;
        say(a)?;
        a.add(qword_ptr(rsp), 3)?;
        a.iretq()
    });
    // Called from both modes: the return must find its way in each.
    guest.code(0xa000, |a| {
        a.mov(ebx, 0x10_5000)?;
        a.db(&[0x8b, 0x53, 0x00])?; // mov edx, [rbx+0]
        a.ret()
    });
    let code = |a: &mut CodeAssembler| {
        for _ in 0..2 {
            a.xor(edx, edx)?;
            a.call(0xa000)?;
            a.mov(eax, edx)?;
            say(a)?;
            a.stac()?;
            a.call(0xa000)?;
            a.mov(eax, edx)?;
            say(a)?;
            a.clac()?;
        }
        Ok(())
    };
    twice(&mut guest, code, &[0x101, 0, 7, 0x101, 0, 7], "stac");
});

on_each_engine!(stac_without_smap_raises_ud_also_after_it_was_there, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr4 |= cr4::SMAP;
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.stac()?;
        a.clac()?;
        a.mov(rax, cr4)?;
        a.btr(rax, 21)?;
        a.mov(cr4, rax)?;
        a.jmp(again)
    });
    assert_eq!(guest.run().exception().vector, 6);
});

on_each_engine!(page_faults_over_and_over_each_tell_their_own_address_and_state, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    let start = 0x70_0000;
    for n in 0..8 {
        guest.tables.map(&memory, start + 0x1000 * n, 0, 0);
    }
    let entry = guest.tables.entry(&memory, start, 1);
    guest.tables.map(&memory, 0x7f_0000, entry & !0xfff, page::P | page::W);
    let visible = 0x7f_0000 + (entry & 0xfff);
    guest.handler(14, 0x9000, 0);
    // Maps the page to frame DATA, and says CR2 and the flags that were saved.
    guest.code(0x9000, |a| {
        a.push(rax)?;
        a.push(rdx)?;
        a.mov(rax, cr2)?;
        say(a)?;
        a.mov(edx, eax)?;
        a.sub(edx, start as i32)?;
        a.shr(edx, 12)?;
        a.mov(qword_ptr(visible as i64 + rdx * 8), (at::DATA | 3) as i32)?;
        a.mov(eax, dword_ptr(rsp + 40))?;
        a.and(eax, rflags::ARITHMETIC as i32)?;
        say(a)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.mov(ebx, start as u32)?;
        a.mov(ecx, 8)?;
        a.set_label(&mut again)?;
        // CF is set at the fault, and must be there after it.
        a.stc()?;
        a.mov(dword_ptr(rbx + 0x10), ecx)?;
        a.adc(rbx, 0xfff)?;
        a.dec(ecx)?;
        a.jne(again)?;
        done(a)
    });
    let end = guest.run();
    let said = end.done();
    assert_eq!(said.len(), 16);
    for (n, pair) in said.chunks(2).enumerate() {
        assert_eq!(pair[0], start as u32 + 0x1000 * n as u32 + 0x10);
        assert_eq!(pair[1] & 1, 1, "CF at fault {n}");
    }
});

on_each_engine!(pause_changes_nothing_however_often_it_comes, |engine| {
    let mut guest = Guest::with_vcpus(engine, Mode::LONG, 2).unwrap();
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx)?;
        a.mov(ecx, 3000)?;
        a.set_label(&mut again)?;
        // CF goes through the PAUSE, and is counted.
        a.bt(ecx, 0)?;
        a.pause()?;
        a.adc(ebx, 0)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(eax, ebx)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1500]);
});
