//! Flags, control registers, MSRs, ports and extended state that belong to the system (Intel SDM 3A
//! 2.5, 5.9, 13).
use arch::registers::{gpr, rflags};
use cputest::layout::{read_u64, write, write_u64};
use cputest::micro::{Guest, Mode, at, done, say};
use cputest::on_each_engine;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

on_each_engine!(ports_the_tss_allows_are_open_to_user_code_and_others_are_not, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.start_in_user_mode();
    guest.state.segments.tr.limit = 0x68 + 0x100;
    write(&guest.memory, at::TSS + 0x68, &[0xff; 0x100]);
    // Port 0xe0 to 0xe3 for the reports.
    write(&guest.memory, at::TSS + 0x68 + 0xe0 / 8, &[0xf0]);
    guest.code(at::USER, |a| {
        a.mov(eax, 5)?;
        say(a)?;
        a.in_(al, 0xe4)
    });
    let end = guest.run();
    let exception = end.exception();
    assert_eq!(end.said, [5]);
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
});

on_each_engine!(popf_changes_if_and_iopl_only_with_the_privilege, |engine| {
    // (IOPL, user, flags that an attempt to set IF and IOPL leaves)
    for (iopl, user, expected) in [
        (0u64, false, rflags::IF | rflags::IOPL),
        (0, true, 0),
        (3, true, rflags::IF | rflags::IOPL),
    ] {
        let mut guest = Guest::new(engine, Mode::LONG);
        let start = if user { at::USER } else { at::CODE };
        if user {
            guest.start_in_user_mode();
        }
        guest.state.rflags |= iopl << 12;
        guest.code(start, |a| {
            a.push((rflags::IF | rflags::IOPL | 2) as i32)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.ud2()
        });
        let end = guest.run();
        assert_eq!(end.state.gpr[gpr::RBX] & (rflags::IF | rflags::IOPL), expected);
    }
});

on_each_engine!(fxsave_and_xsave_keep_all_vector_state_over_a_round_trip, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let mut pattern = [0u8; 256];
    for (n, byte) in pattern.iter_mut().enumerate() {
        *byte = (n as u8).wrapping_mul(7);
    }
    guest.state.fpu.0[160..416].copy_from_slice(&pattern);
    guest.state.fpu.0[576..832].copy_from_slice(&pattern);
    let before = guest.state.fpu.clone();
    guest.code(at::CODE, |a| {
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.mov(ebx, at::DATA as u32)?;
        a.xsave(ptr(rbx))?;
        a.vzeroall()?;
        a.fld1()?;
        a.xrstor(ptr(rbx))?;
        a.mov(ebx, at::DATA as u32 + 0x1000)?;
        a.fxsave(ptr(rbx))?;
        a.xorps(xmm0, xmm0)?;
        a.xorps(xmm15, xmm15)?;
        a.fxrstor(ptr(rbx))?;
        a.mov(ecx, 0)?;
        a.xgetbv()?;
        say(a)?;
        done(a)
    });
    let end = guest.run();
    assert_eq!(end.done(), [7]);
    assert_eq!(end.state.fpu.0[160..416], before.0[160..416]);
    assert_eq!(end.state.fpu.0[576..832], before.0[576..832]);
    assert_eq!(end.state.fpu.0[0..6], before.0[0..6]);
    assert_eq!(read_u64(&guest.memory, at::DATA + 512) & 6, 6, "SSE and AVX were in use");
});

on_each_engine!(xrstor_of_a_bad_header_raises_gp, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    write_u64(&guest.memory, at::DATA + 512, 1 << 9);
    guest.code(at::CODE, |a| {
        a.mov(eax, -1i32)?;
        a.mov(edx, -1i32)?;
        a.mov(ebx, at::DATA as u32)?;
        a.xrstor(ptr(rbx))
    });
    let exception = guest.run().exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
});

on_each_engine!(control_registers_refuse_combinations_that_do_not_exist, |engine| {
    type Code = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let codes: [Code; 5] = [
        // PG without PE, NW without CD, PAE off in long mode, a reserved CR4 bit, XCR0 without x87.
        |a| {
            a.mov(rax, cr0)?;
            a.and(eax, !1)?;
            a.mov(cr0, rax)
        },
        |a| {
            a.mov(rax, cr0)?;
            a.or(eax, 1 << 29)?;
            a.mov(cr0, rax)
        },
        |a| {
            a.mov(rax, cr4)?;
            a.and(eax, !0x20)?;
            a.mov(cr4, rax)
        },
        |a| {
            a.mov(rax, cr4)?;
            a.bts(rax, 40)?;
            a.mov(cr4, rax)
        },
        |a| {
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.mov(eax, 6)?;
            a.xsetbv()
        },
    ];
    for (n, code) in codes.into_iter().enumerate() {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.code(at::CODE, |a| {
            code(a)?;
            done(a)
        });
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.error), (13, Some(0)), "case {n}");
    }
});

on_each_engine!(unknown_msrs_raise_gp, |engine| {
    for write in [false, true] {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.code(at::CODE, |a| {
            a.mov(ecx, 0x1234_5678)?;
            if write { a.wrmsr() } else { a.rdmsr() }
        });
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.error), (13, Some(0)));
    }
});

on_each_engine!(cpuid_reports_a_64_bit_processor_with_its_own_apic_id, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(eax, ebx)?;
        a.shr(eax, 24)?;
        say(a)?;
        // OSXSAVE follows CR4.
        a.mov(eax, ecx)?;
        a.shr(eax, 27)?;
        a.and(eax, 1)?;
        say(a)?;
        a.mov(eax, 0x8000_0001u32)?;
        a.cpuid()?;
        a.mov(eax, edx)?;
        a.shr(eax, 29)?;
        a.and(eax, 1)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [0, 1, 1]);
});
