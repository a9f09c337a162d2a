//! Exceptions: vector, error code and saved state in each mode (Intel SDM 3A 6.15).
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::registers::{cr0, cr4, rflags};
use arch::{Segment, SegmentName};
use cputest::layout::{descriptor, gate32, gate64, page, read_u64, write, write_u64};
use cputest::micro::{Exception, Guest, Mode, Stop, at, done, say, sel};
use cputest::on_each_engine;
use cputest::under_test::EngineUnderTest;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn nothing(_: &mut CodeAssembler) -> Result<(), IcedError> {
    Ok(())
}

/// Runs `prelude`, then expects `instruction` to raise the exception, pointing at itself.
fn faults(
    engine: EngineUnderTest,
    mode: Mode,
    prelude: Code,
    instruction: Code,
    vector: u8,
    error: Option<u32>,
) -> Guest {
    let mut guest = Guest::new(engine, mode);
    faults_in(&mut guest, prelude, instruction, vector, error);
    guest
}

fn faults_in(
    guest: &mut Guest,
    prelude: Code,
    instruction: Code,
    vector: u8,
    error: Option<u32>,
) -> Exception {
    let first = guest.code(at::CODE, prelude).len() as u64;
    let bytes = guest.code(at::CODE + first, instruction);
    guest.code(at::CODE + first + bytes.len() as u64, done);
    let exception = guest.run().exception();
    assert_eq!((exception.vector, exception.error), (vector, error), "{exception:x?}");
    assert_eq!(exception.rip, at::CODE + first, "the saved pointer names the instruction");
    exception
}

const ALL: [Mode; 3] = [Mode::LONG, Mode::Protected32, Mode::Real];
const PROTECTED: [Mode; 2] = [Mode::LONG, Mode::Protected32];

on_each_engine!(division_by_zero_raises_de, |engine| {
    for mode in ALL {
        faults(engine, mode, |a| a.xor(ecx, ecx), |a| a.div(ecx), 0, None);
    }
});

on_each_engine!(a_quotient_that_does_not_fit_raises_de, |engine| {
    let prelude: Code = |a| {
        a.mov(edx, -0x8000_0000i32)?;
        a.xor(eax, eax)?;
        a.mov(ecx, -1i32)
    };
    for mode in ALL {
        faults(engine, mode, prelude, |a| a.idiv(ecx), 0, None);
    }
});

on_each_engine!(int3_raises_bp_pointing_behind_itself, |engine| {
    for mode in ALL {
        let mut guest = Guest::new(engine, mode);
        guest.code(at::CODE, |a| {
            a.nop()?;
            a.int3()
        });
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.error), (3, None));
        assert_eq!(exception.rip, at::CODE + 2);
        assert_eq!(exception.rflags & rflags::RF, 0);
    }
});

on_each_engine!(int1_raises_db_pointing_behind_itself_without_a_reason_in_dr6, |engine| {
    for mode in ALL {
        let mut guest = Guest::new(engine, mode);
        write(&guest.memory, at::CODE, &[0x90, 0xf1]);
        let end = guest.run();
        let exception = end.exception();
        assert_eq!((exception.vector, exception.rip), (1, at::CODE + 2));
        assert_eq!(end.state.debug[4] & 0xe00f, 0);
    }
});

on_each_engine!(into_raises_of_only_with_the_overflow_flag, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.code(at::CODE, |a| {
        a.xor(eax, eax)?;
        a.into()?;
        a.mov(al, 0x7f)?;
        a.add(al, 1)?;
        a.into()
    });
    let exception = guest.run().exception();
    assert_eq!((exception.vector, exception.rip), (4, at::CODE + 2 + 1 + 2 + 2 + 1));
});

on_each_engine!(bound_outside_its_limits_raises_br, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    write_u64(&guest.memory, at::DATA, 0x20_0000_0010);
    let prelude: Code = |a| {
        a.mov(eax, 0x10)?;
        a.bound(eax, qword_ptr(at::DATA))?;
        a.mov(eax, 0x21)
    };
    faults_in(&mut guest, prelude, |a| a.bound(eax, qword_ptr(at::DATA)), 5, None);
});

on_each_engine!(undefined_opcodes_raise_ud, |engine| {
    for mode in ALL {
        faults(engine, mode, nothing, |a| a.ud2(), 6, None);
        // LOCK on a register, LOCK on an instruction that cannot have it.
        faults(engine, mode, nothing, |a| a.db(&[0xf0, 0x01, 0xc8]), 6, None);
        faults(engine, mode, nothing, |a| a.db(&[0xf0, 0x89, 0x07]), 6, None);
    }
    for byte in [0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61, 0xce] {
        let mut guest = Guest::new(engine, Mode::LONG);
        write(&guest.memory, at::CODE, &[byte, 0x90, 0x90]);
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.rip), (6, at::CODE), "byte {byte:#x}");
    }
});

on_each_engine!(a_fault_saves_the_resume_flag_and_a_trap_does_not, |engine| {
    let guest_fault = Guest::new(engine, Mode::LONG);
    let mut guest = guest_fault;
    let exception = faults_in(&mut guest, nothing, |a| a.ud2(), 6, None);
    assert_ne!(exception.rflags & rflags::RF, 0);
});

on_each_engine!(x87_mmx_and_sse_raise_nm_while_ts_is_set, |engine| {
    let codes: [Code; 4] = [
        |a| a.fld1(),
        |a| a.paddb(mm0, mm1),
        |a| a.addps(xmm0, xmm1),
        |a| a.vaddps(ymm0, ymm1, ymm2),
    ];
    for code in codes {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.state.cr0 |= cr0::TS;
        faults_in(&mut guest, nothing, code, 7, None);
    }
});

on_each_engine!(clts_ends_nm_and_em_makes_x87_raise_it_again, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr0 |= cr0::TS;
    let prelude: Code = |a| {
        a.clts()?;
        a.fld1()?;
        a.mov(rax, cr0)?;
        a.or(eax, 4)?;
        a.mov(cr0, rax)
    };
    faults_in(&mut guest, prelude, |a| a.fld1(), 7, None);
});

on_each_engine!(wait_raises_nm_only_with_both_mp_and_ts, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr0 |= cr0::TS;
    faults_in(&mut guest, nothing, |a| a.wait(), 7, None);
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr0 = (guest.state.cr0 | cr0::TS) & !cr0::MP;
    guest.code(at::CODE, |a| {
        a.wait()?;
        done(a)
    });
    guest.run().done();
});

on_each_engine!(sse_without_osfxsr_and_avx_without_osxsave_raise_ud, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr4 &= !cr4::OSFXSR;
    faults_in(&mut guest, nothing, |a| a.addps(xmm0, xmm1), 6, None);
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr4 &= !cr4::OSXSAVE;
    faults_in(&mut guest, nothing, |a| a.vaddps(xmm0, xmm1, xmm2), 6, None);
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.xcr0 = 3;
    faults_in(&mut guest, nothing, |a| a.vaddps(xmm0, xmm1, xmm2), 6, None);
});

on_each_engine!(an_exception_whose_handler_is_missing_becomes_a_double_fault, |engine| {
    for mode in PROTECTED {
        let mut guest = Guest::new(engine, mode);
        let size = if mode == Mode::LONG { 16 } else { 8 };
        // #GP has no gate, so its delivery raises #NP, a contributory fault on top of another.
        write_u64(&guest.memory, at::IDT + 13 * size, 0);
        guest.code(at::CODE, |a| {
            a.mov(eax, 0xfff0)?;
            a.mov(ds, ax)
        });
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.error), (8, Some(0)));
    }
});

on_each_engine!(a_fault_in_the_double_fault_handler_shuts_the_cpu_down, |engine| {
    for mode in ALL {
        let mut guest = Guest::new(engine, mode);
        guest.state.idtr.limit = 0;
        guest.code(at::CODE, |a| a.ud2());
        assert_eq!(guest.run().stop, Stop::TripleFault, "{mode:?}");
    }
});

on_each_engine!(a_page_fault_while_delivering_a_page_fault_is_a_double_fault, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    // The stack of the first fault is not mapped; the double fault has one of its own.
    guest.state.gpr[4] = 0x50_0000;
    guest.gate64(8, gate64(sel::CODE64, at::STUBS + 16 * 8, 14, 0, 1));
    guest.tables.map(&memory, 0x60_0000, 0x8_0000, 0);
    guest.code(at::CODE, |a| a.mov(eax, dword_ptr(0x60_0000)));
    let end = guest.run();
    let exception = end.exception();
    assert_eq!((exception.vector, exception.error), (8, Some(0)));
    assert_eq!(exception.stack, Some((sel::DATA, 0x50_0000)));
    assert_eq!(end.state.gpr[4], at::IST_STACK - 48);
});

on_each_engine!(selectors_beyond_the_table_raise_gp_with_the_selector, |engine| {
    for mode in PROTECTED {
        faults(engine, mode, |a| a.mov(eax, 0x1238), |a| a.mov(ds, ax), 13, Some(0x1238));
        // The TI bit stays, RPL does not.
        faults(engine, mode, |a| a.mov(eax, 0x0f), |a| a.mov(es, ax), 13, Some(0x0c));
    }
});

on_each_engine!(segments_that_are_not_present_raise_np_and_for_the_stack_ss, |engine| {
    for mode in PROTECTED {
        for (to_stack, vector) in [(false, 11), (true, 12)] {
            let mut guest = Guest::new(engine, mode);
            guest.descriptor(sel::FREE, descriptor(0, 0xfffff, 0xc013));
            let load: Code = if to_stack { |a| a.mov(ss, ax) } else { |a| a.mov(ds, ax) };
            let error = Some(u32::from(sel::FREE));
            faults_in(&mut guest, |a| a.mov(eax, u32::from(sel::FREE)), load, vector, error);
        }
    }
});

on_each_engine!(a_stack_in_the_tss_of_the_wrong_privilege_raises_ts, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.start_in_user_mode();
    guest.state.rflags |= rflags::IOPL;
    write(&guest.memory, at::TSS + 8, &sel::USER_DATA.to_le_bytes());
    // The handler's segment is conforming, so that it needs no new stack itself.
    guest.descriptor(sel::FREE, descriptor(0, 0xfffff, 0xc09f));
    write_u64(&guest.memory, at::IDT + 8 * 10, gate32(sel::FREE, 0x40a0, 14, 0, 0));
    guest.handler(0x50, 0x9000, 3);
    guest.code(at::USER, |a| a.int(0x50));
    let exception = guest.run().exception();
    assert_eq!((exception.vector, exception.error), (10, Some(0x38)));
    assert_eq!(exception.rip, at::USER);
});

on_each_engine!(code_in_the_stack_segment_raises_gp, |engine| {
    for mode in PROTECTED {
        let load: Code = |a| a.mov(eax, u32::from(sel::CODE64));
        faults(engine, mode, load, |a| a.mov(ss, ax), 13, Some(sel::CODE64.into()));
    }
});

on_each_engine!(addresses_that_are_not_canonical_raise_gp_or_for_the_stack_ss, |engine| {
    let far: Code = |a| a.mov(rbx, 0x8000_0000_0000u64);
    faults(engine, Mode::LONG, far, |a| a.mov(rax, qword_ptr(rbx)), 13, Some(0));
    let far: Code = |a| a.mov(rbp, 0x8000_0000_0000u64);
    faults(engine, Mode::LONG, far, |a| a.mov(rax, qword_ptr(rbp)), 12, Some(0));
    // The last byte of an operand counts too.
    let far: Code = |a| a.mov(rbx, 0x7fff_ffff_fffdu64);
    faults(engine, Mode::LONG, far, |a| a.mov(eax, dword_ptr(rbx)), 13, Some(0));
});

on_each_engine!(a_jump_to_an_address_that_is_not_canonical_faults_at_the_jump, |engine| {
    let far: Code = |a| a.mov(rbx, 0x8000_0000_0000u64);
    faults(engine, Mode::LONG, far, |a| a.jmp(rbx), 13, Some(0));
});

on_each_engine!(page_faults_give_the_address_and_the_kind_of_access, |engine| {
    let linear = 0x70_0000u64;
    // (bits of the page, code, error code)
    let write: Code = |a| a.mov(dword_ptr(0x70_0ffe), eax);
    let read: Code = |a| a.mov(eax, dword_ptr(0x70_0010));
    let cases: [(u64, Code, u32, u64); 3] =
        [(0, read, 0, 0x70_0010), (0, write, 2, 0x70_0ffe), (page::P, write, 3, 0x70_0ffe)];
    for (bits, code, error, address) in cases {
        let mut guest = Guest::new(engine, Mode::LONG);
        let memory = guest.memory.clone();
        guest.tables.map(&memory, linear, at::DATA, bits);
        guest.tables.map(&memory, linear + 0x1000, at::DATA, page::P | page::W);
        let before = read_u64(&memory, at::DATA + 0xff8);
        faults_in(&mut guest, nothing, code, 14, Some(error));
        assert_eq!(guest.vcpus[0].state().unwrap().cr2, address);
        assert_eq!(read_u64(&memory, at::DATA + 0xff8), before, "nothing was written");
    }
});

on_each_engine!(
    a_store_across_pages_whose_second_is_missing_writes_nothing_and_names_the_second,
    |engine| {
        let mut guest = Guest::new(engine, Mode::LONG);
        let memory = guest.memory.clone();
        guest.tables.map(&memory, 0x70_0000, at::DATA, page::P | page::W);
        faults_in(
            &mut guest,
            |a| a.mov(rax, -1i64),
            |a| a.mov(qword_ptr(0x70_0ffe), rax),
            14,
            Some(2),
        );
        assert_eq!(guest.vcpus[0].state().unwrap().cr2, 0x70_1000);
        assert_eq!(read_u64(&memory, at::DATA + 0xff8), 0);
    }
);

on_each_engine!(running_a_page_without_execute_permission_raises_pf, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    guest.tables.map(&memory, 0x70_0000, at::DATA, page::P | page::NX);
    guest.code(at::CODE, |a| {
        a.mov(eax, 0x70_0000)?;
        a.jmp(rax)
    });
    let end = guest.run();
    let exception = end.exception();
    assert_eq!((exception.vector, exception.error, exception.rip), (14, Some(0x11), 0x70_0000));
    assert_eq!(end.state.cr2, 0x70_0000);
});

on_each_engine!(reserved_bits_in_a_page_table_raise_pf_with_rsvd, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    guest.tables.map(&memory, 0x70_0000, at::DATA, page::P | page::W | 1 << 51);
    faults_in(&mut guest, nothing, |a| a.mov(eax, dword_ptr(0x70_0000)), 14, Some(9));
});

on_each_engine!(an_unmasked_x87_exception_raises_mf_at_the_next_x87_instruction, |engine| {
    let prelude: Code = |a| {
        a.mov(dword_ptr(at::DATA), 0x033b)?;
        a.fldcw(word_ptr(at::DATA))?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)?;
        a.nop()
    };
    faults(engine, Mode::LONG, prelude, |a| a.wait(), 16, None);
    faults(engine, Mode::LONG, prelude, |a| a.fld1(), 16, None);
});

on_each_engine!(an_unmasked_sse_exception_raises_xm_and_leaves_the_destination, |engine| {
    let prelude: Code = |a| {
        a.mov(dword_ptr(at::DATA), 0x1d80)?;
        a.ldmxcsr(dword_ptr(at::DATA))?;
        a.mov(eax, 0x3f80_0000)?;
        a.movd(xmm0, eax)?;
        a.xorps(xmm1, xmm1)
    };
    let mut guest = faults(engine, Mode::LONG, prelude, |a| a.divss(xmm0, xmm1), 19, None);
    let fpu = guest.vcpus[0].state().unwrap().fpu.0;
    assert_eq!(&fpu[160..164], &0x3f80_0000u32.to_le_bytes());
    assert_eq!(fpu[24] & 0x3f, 4, "the zero-divide flag is set");
});

on_each_engine!(misaligned_sse_operands_raise_gp, |engine| {
    let code: Code = |a| a.movaps(xmm0, xmmword_ptr(at::DATA + 8));
    faults(engine, Mode::LONG, nothing, code, 13, Some(0));
    let code: Code = |a| a.movaps(xmmword_ptr(at::DATA + 8), xmm0);
    faults(engine, Mode::LONG, nothing, code, 13, Some(0));
    let code: Code = |a| a.vmovntdq(ymmword_ptr(at::DATA + 16), ymm0);
    faults(engine, Mode::LONG, nothing, code, 13, Some(0));
});

on_each_engine!(alignment_checks_apply_in_user_mode_with_am_and_ac_only, |engine| {
    for (am, ac, user, expected) in [
        (true, true, true, true),
        (false, true, true, false),
        (true, false, true, false),
        (true, true, false, false),
    ] {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.state.cr0 |= if am { cr0::AM } else { 0 };
        let start = if user {
            guest.start_in_user_mode();
            at::USER
        } else {
            at::CODE
        };
        guest.state.rflags |= if ac { rflags::AC } else { 0 };
        guest.code(start, |a| {
            a.mov(eax, dword_ptr(at::USER + 0x1001))?;
            a.ud2()
        });
        let exception = guest.run().exception();
        let wanted = if expected { (17, Some(0)) } else { (6, None) };
        assert_eq!((exception.vector, exception.error), wanted, "am {am} ac {ac} user {user}");
    }
});

on_each_engine!(user_code_may_not_run_privileged_instructions, |engine| {
    let codes: [Code; 12] = [
        |a| a.hlt(),
        |a| a.cli(),
        |a| a.sti(),
        |a| a.in_(al, dx),
        |a| a.out(dx, al),
        |a| a.mov(rax, cr0),
        |a| a.mov(dr7, rax),
        |a| a.rdmsr(),
        |a| a.wrmsr(),
        |a| a.invlpg(byte_ptr(rax)),
        |a| a.lidt(ptr(rsp)),
        |a| a.swapgs(),
    ];
    for code in codes {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.start_in_user_mode();
        guest.code(at::USER, code);
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.error), (13, Some(0)), "{exception:x?}");
        assert_eq!((exception.rip, exception.cs), (at::USER, sel::USER_CODE64));
        assert_eq!(exception.stack, Some((sel::USER_DATA, at::USER_STACK)));
    }
});

on_each_engine!(umip_hides_descriptor_tables_from_user_code, |engine| {
    let codes: [Code; 4] =
        [|a| a.sgdt(ptr(rsp - 16)), |a| a.sidt(ptr(rsp - 16)), |a| a.smsw(eax), |a| a.str(eax)];
    for code in codes {
        for umip in [true, false] {
            let mut guest = Guest::new(engine, Mode::LONG);
            guest.state.cr4 |= if umip { cr4::UMIP } else { 0 };
            guest.start_in_user_mode();
            guest.code(at::USER, |a| {
                code(a)?;
                a.ud2()
            });
            let exception = guest.run().exception();
            assert_eq!(exception.vector, if umip { 13 } else { 6 });
        }
    }
});

on_each_engine!(int_n_needs_a_gate_that_user_code_may_use, |engine| {
    for (dpl, expected) in [(0, (13, Some(0x40 * 8 + 2))), (3, (6, None))] {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.start_in_user_mode();
        guest.handler(0x40, at::CODE, dpl);
        guest.code(at::CODE, |a| a.ud2());
        guest.code(at::USER, |a| a.int(0x40));
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.error), expected);
    }
});

on_each_engine!(iret_returns_from_an_exception_to_the_same_instruction_in_every_mode, |engine| {
    for mode in ALL {
        let mut guest = Guest::new(engine, mode);
        // The handler makes the divisor good and goes back to it.
        guest.handler(0, 0x9000, 0);
        guest.code(0x9000, |a| {
            a.mov(ecx, 5)?;
            match a.bitness() {
                16 => a.iret(),
                32 => a.iretd(),
                _ => a.iretq(),
            }
        });
        guest.code(at::CODE, |a| {
            a.xor(edx, edx)?;
            a.mov(eax, 35)?;
            a.xor(ecx, ecx)?;
            a.stc()?;
            a.div(ecx)?;
            say(a)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [7], "{mode:?}");
    }
});

on_each_engine!(real_mode_offsets_beyond_64_kib_raise_gp_and_on_the_stack_ss, |engine| {
    let prelude: Code = |a| a.mov(bx, 0xffffu32);
    faults(engine, Mode::Real, prelude, |a| a.mov(ax, word_ptr(bx)), 13, None);
    let prelude: Code = |a| a.mov(bp, 0xffffu32);
    faults(engine, Mode::Real, prelude, |a| a.mov(ax, word_ptr(bp)), 12, None);
});

on_each_engine!(segment_limits_hold_in_32_bit_mode, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.state.segments[SegmentName::Ds] =
        Segment { selector: 0x10, base: at::DATA, limit: 0xfff, attributes: 0x4093 };
    let prelude: Code = |a| a.mov(eax, dword_ptr(0xffc));
    faults_in(&mut guest, prelude, |a| a.mov(eax, dword_ptr(0xffd)), 13, Some(0));
});

on_each_engine!(expand_down_segments_hold_the_offsets_above_their_limit, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.state.segments[SegmentName::Ds] =
        Segment { selector: 0x10, base: at::DATA, limit: 0xfff, attributes: 0x4097 };
    let prelude: Code = |a| a.mov(eax, dword_ptr(0x1000));
    faults_in(&mut guest, prelude, |a| a.mov(eax, dword_ptr(0xffe)), 13, Some(0));
    // With D/B clear the segment ends at 64 KiB.
    guest.state.segments[SegmentName::Ds].attributes = 0x0097;
    let prelude: Code = |a| a.mov(eax, dword_ptr(0xfffc));
    faults_in(&mut guest, prelude, |a| a.mov(eax, dword_ptr(0xfffd)), 13, Some(0));
});

on_each_engine!(writes_to_code_and_read_only_segments_and_reads_of_null_ones_raise_gp, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    let code: Code = |a| a.mov(dword_ptr(at::DATA).cs(), eax);
    faults_in(&mut guest, nothing, code, 13, Some(0));
    guest.state.segments[SegmentName::Es].attributes = 0xc091;
    let code: Code = |a| a.mov(dword_ptr(at::DATA).es(), eax);
    faults_in(&mut guest, nothing, code, 13, Some(0));
    let prelude: Code = |a| {
        a.xor(eax, eax)?;
        a.mov(fs, ax)
    };
    let code: Code = |a| a.mov(eax, dword_ptr(at::DATA).fs());
    faults_in(&mut guest, prelude, code, 13, Some(0));
});
