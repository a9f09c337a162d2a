//! Modes, gates, privilege changes and system calls (Intel SDM 3A 5.8, 6.12, 9.8).
use arch::registers::{cr0, cr4, efer, gpr, rflags};
use arch::{SegmentName, VcpuState, msr};
use cputest::layout::{
    PageTables, Paging, descriptor, gate32, gate64, page, read_u32, write, write_u64,
};
use cputest::micro::{Guest, Mode, at, done, say, sel};
use cputest::on_each_engine;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// The operand of a direct far jump or call: offset and selector.
fn far32(opcode: u8, offset: u64, selector: u16) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend_from_slice(&(offset as u32).to_le_bytes());
    bytes.extend_from_slice(&selector.to_le_bytes());
    bytes
}
/// The same in 16-bit code, with a 32-bit offset.
fn far32_from16(opcode: u8, offset: u64, selector: u16) -> Vec<u8> {
    let mut bytes = vec![0x66];
    bytes.extend(far32(opcode, offset, selector));
    bytes
}
fn say_number(a: &mut CodeAssembler, n: u32) -> Result<(), IcedError> {
    a.mov(eax, n)?;
    say(a)
}

on_each_engine!(a_cpu_goes_from_real_mode_through_all_modes_and_back, |engine| {
    let mut guest = Guest::new(engine, Mode::Real);
    let memory = guest.memory.clone();
    let mut pae = PageTables::new(Paging::Pae, 0x20_0000);
    let mut long = PageTables::new(Paging::Four, 0x28_0000);
    for tables in [&mut pae, &mut long] {
        tables.map_large(&memory, 0, 0, page::P | page::W);
        tables.map_large(&memory, 0x20_0000, 0x20_0000, page::P | page::W);
    }
    let to_cr0 = |a: &mut CodeAssembler, set: u64, clear: u64| {
        a.mov(eax, cr0)?;
        a.or(eax, set as u32 as i32)?;
        a.and(eax, !(clear as u32) as i32)?;
        a.mov(cr0, eax)
    };
    // Real mode to 16-bit protected mode.
    guest.code_of(16, at::CODE, |a| {
        say_number(a, 1)?;
        to_cr0(a, cr0::PE, 0)?;
        a.db(&far32_from16(0xea, 0x8100, sel::CODE16))
    });
    // 16-bit to 32-bit protected mode.
    guest.code_of(16, 0x8100, |a| {
        a.mov(ax, u32::from(sel::DATA))?;
        a.mov(ds, ax)?;
        a.mov(es, ax)?;
        a.mov(ss, ax)?;
        say_number(a, 2)?;
        a.db(&far32_from16(0xea, 0x8200, sel::CODE32))
    });
    // 32-bit mode: PAE paging on, then off, then long mode on.
    guest.code_of(32, 0x8200, |a| {
        say_number(a, 3)?;
        a.mov(eax, cr4)?;
        a.or(eax, cr4::PAE as i32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, pae.root() as u32)?;
        a.mov(cr3, eax)?;
        to_cr0(a, cr0::PG, 0)?;
        say_number(a, 4)?;
        to_cr0(a, 0, cr0::PG)?;
        a.mov(eax, long.root() as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, msr::EFER)?;
        a.rdmsr()?;
        a.or(eax, (efer::LME | efer::NXE) as i32)?;
        a.wrmsr()?;
        to_cr0(a, cr0::PG, 0)?;
        // Compatibility mode: LMA is set, the code still 32-bit.
        a.mov(ecx, msr::EFER)?;
        a.rdmsr()?;
        a.and(eax, efer::LMA as i32)?;
        say(a)?;
        a.db(&far32(0xea, 0x8400, sel::CODE64))
    });
    guest.code_of(64, 0x8400, |a| {
        a.mov(rax, 0x1_2345_6789i64)?;
        a.shr(rax, 32)?;
        a.add(eax, 4)?;
        say(a)?;
        // To compatibility mode and back.
        a.push(i32::from(sel::CODE32))?;
        a.push(0x8500)?;
        a.db(&[0x48, 0xcb])
    });
    guest.code_of(32, 0x8500, |a| {
        say_number(a, 6)?;
        // `dec eax` here would be a REX prefix in 64-bit mode.
        a.db(&[0x48])?;
        say(a)?;
        a.db(&far32(0xea, 0x8600, sel::CODE64))
    });
    guest.code_of(64, 0x8600, |a| {
        say_number(a, 7)?;
        a.push(i32::from(sel::CODE32))?;
        a.push(0x8700)?;
        a.db(&[0x48, 0xcb])
    });
    // Long mode off, paging off, then 16-bit and real mode.
    guest.code_of(32, 0x8700, |a| {
        to_cr0(a, 0, cr0::PG)?;
        a.mov(ecx, msr::EFER)?;
        a.rdmsr()?;
        a.and(eax, efer::LMA as i32)?;
        say(a)?;
        a.db(&far32(0xea, 0x8800, sel::CODE16))
    });
    guest.code_of(16, 0x8800, |a| {
        a.mov(ax, u32::from(sel::DATA16))?;
        a.mov(ds, ax)?;
        a.mov(es, ax)?;
        a.mov(ss, ax)?;
        to_cr0(a, 0, cr0::PE)?;
        a.db(&[0xea, 0x00, 0x89, 0, 0])
    });
    guest.code_of(16, 0x8900, |a| {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        say_number(a, 9)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 2, 3, 4, efer::LMA as u32, 5, 6, 5, 7, 0, 9]);
});

on_each_engine!(
    real_mode_code_reaches_high_memory_with_segments_loaded_in_protected_mode,
    |engine| {
        let mut guest = Guest::new(engine, Mode::Real);
        write(&guest.memory, 0x30_0000, &77u32.to_le_bytes());
        guest.code(at::CODE, |a| {
            a.mov(eax, cr0)?;
            a.or(al, 1)?;
            a.mov(cr0, eax)?;
            a.mov(bx, u32::from(sel::DATA))?;
            a.mov(ds, bx)?;
            a.and(al, 0xfeu32)?;
            a.mov(cr0, eax)?;
            a.mov(ebx, 0x30_0000)?;
            a.mov(eax, dword_ptr(ebx))?;
            say(a)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [77]);
    }
);

on_each_engine!(interrupt_gates_clear_if_and_trap_gates_keep_it, |engine| {
    for (kind, expected) in [(14, 0), (15, rflags::IF)] {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.state.rflags |= rflags::IF;
        guest.gate64(0x50, gate64(sel::CODE64, 0x9000, kind, 0, 0));
        guest.code(0x9000, |a| {
            a.pushfq()?;
            a.pop(rax)?;
            a.and(eax, rflags::IF as i32)?;
            say(a)?;
            done(a)
        });
        guest.code(at::CODE, |a| a.int(0x50));
        assert_eq!(guest.run().done(), [expected as u32]);
    }
});

on_each_engine!(
    an_interrupt_from_user_mode_switches_to_the_stack_of_the_tss_and_iret_goes_back,
    |engine| {
        for mode in [Mode::LONG, Mode::Protected32, Mode::Paged(Paging::Pae)] {
            let mut guest = Guest::new(engine, mode);
            guest.start_in_user_mode();
            guest.handler(0x50, 0x9000, 3);
            guest.code(0x9000, |a| {
                a.mov(eax, esp)?;
                say(a)?;
                a.mov(eax, cs)?;
                say(a)?;
                a.mov(eax, ss)?;
                say(a)?;
                if a.bitness() == 64 { a.iretq() } else { a.iretd() }
            });
            guest.code(at::USER, |a| {
                a.int(0x50)?;
                a.mov(ebx, esp)?;
                a.ud2()
            });
            let end = guest.run();
            let (frame, code, stack) = match mode {
                Mode::LONG => (40, sel::CODE64, 0),
                _ => (20, sel::CODE32, sel::DATA),
            };
            let exception = end.exception();
            assert_eq!(end.said, [at::RING0_STACK as u32 - frame, code.into(), stack.into()]);
            assert_eq!(end.state.gpr[gpr::RBX], at::USER_STACK, "{mode:?}");
            assert_eq!(exception.cs & 3, 3);
            assert_eq!(exception.stack, Some((sel::USER_DATA, at::USER_STACK)));
        }
    }
);

on_each_engine!(a_gate_with_an_ist_uses_that_stack_and_aligns_it, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    write_u64(&guest.memory, at::TSS + 0x24, at::IST_STACK - 3);
    guest.gate64(0x50, gate64(sel::CODE64, 0x9000, 14, 0, 1));
    guest.state.gpr[gpr::RSP] = at::STACK - 8;
    guest.code(0x9000, |a| {
        a.mov(rax, rsp)?;
        say(a)?;
        a.mov(rax, qword_ptr(rsp + 24))?;
        say(a)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        a.int(0x50)?;
        a.mov(rax, rsp)?;
        say(a)?;
        done(a)
    });
    let stack = at::STACK as u32 - 8;
    assert_eq!(guest.run().done(), [at::IST_STACK as u32 - 16 - 40, stack, stack]);
});

on_each_engine!(a_call_gate_copies_parameters_and_retf_drops_them, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.start_in_user_mode();
    guest.descriptor(sel::FREE, gate32(sel::CODE32, 0x9000, 12, 3, 2));
    guest.code(0x9000, |a| {
        for offset in [8, 12] {
            a.mov(eax, dword_ptr(esp + offset))?;
            say(a)?;
        }
        a.mov(eax, esp)?;
        say(a)?;
        a.retf_1(8)
    });
    guest.code(at::USER, |a| {
        a.push(0x11)?;
        a.push(0x22)?;
        a.db(&far32(0x9a, 0, sel::FREE | 3))?;
        a.mov(ebx, esp)?;
        a.ud2()
    });
    let end = guest.run();
    assert_eq!(end.exception().cs, sel::USER_CODE32);
    assert_eq!(end.said, [0x22, 0x11, at::RING0_STACK as u32 - 24]);
    assert_eq!(end.state.gpr[gpr::RBX], at::USER_STACK);
});

on_each_engine!(a_64_bit_call_gate_enters_the_kernel_and_retfq_leaves_it, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.start_in_user_mode();
    let [low, high] = gate64(sel::CODE64, 0x9000, 12, 3, 0);
    guest.descriptor(sel::FREE, low);
    guest.descriptor(sel::FREE + 8, high);
    write_u64(&guest.memory, at::USER + 0x1000, u64::from(sel::FREE | 3) << 32);
    guest.code(0x9000, |a| {
        a.mov(rax, rsp)?;
        say(a)?;
        a.db(&[0x48, 0xcb])
    });
    guest.code(at::USER, |a| {
        a.db(&[0xff, 0x1c, 0x25])?;
        a.dd(&[at::USER as u32 + 0x1000])?;
        a.mov(rbx, rsp)?;
        a.ud2()
    });
    let end = guest.run();
    assert_eq!(end.exception().cs, sel::USER_CODE64);
    assert_eq!(end.said, [at::RING0_STACK as u32 - 32]);
    assert_eq!(end.state.gpr[gpr::RBX], at::USER_STACK);
});

fn set_msr(state: &mut VcpuState, index: u32, value: u64) {
    assert!(state.msrs.set(index, value), "{index:#x} is not of the state table");
}

on_each_engine!(syscall_and_sysret_go_to_the_kernel_and_back_with_the_flags_masked, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.start_in_user_mode();
    let star = u64::from(sel::USER_CODE32) << 48 | u64::from(sel::CODE64) << 32;
    set_msr(&mut guest.state, msr::STAR, star);
    set_msr(&mut guest.state, msr::LSTAR, 0x9000);
    set_msr(&mut guest.state, msr::SFMASK, rflags::DF | rflags::CF);
    guest.code(0x9000, |a| {
        a.pushfq()?;
        a.pop(rax)?;
        a.and(eax, (rflags::DF | rflags::CF | rflags::ZF) as i32)?;
        say(a)?;
        a.mov(eax, ecx)?;
        say(a)?;
        a.mov(eax, cs)?;
        say(a)?;
        a.mov(eax, ss)?;
        say(a)?;
        a.sysretq()
    });
    guest.code(at::USER, |a| {
        a.mov(rsp, at::STACK)?;
        a.xor(eax, eax)?;
        a.std()?;
        a.stc()?;
        a.syscall()?;
        a.mov(ebx, cs)?;
        a.mov(ebp, ss)?;
        a.ud2()
    });
    let end = guest.run();
    let exception = end.exception();
    assert_eq!(exception.cs, sel::USER_CODE64);
    assert_ne!(exception.rflags & rflags::DF, 0, "SYSRET takes the flags from R11");
    assert_eq!(end.said[0], rflags::ZF as u32);
    assert_eq!(end.said[2..], [sel::CODE64.into(), u32::from(sel::DATA)]);
    assert_eq!(end.state.gpr[gpr::RBX], u64::from(sel::USER_CODE64));
    assert_eq!(end.state.gpr[gpr::RBP], u64::from(sel::USER_DATA));
    assert_eq!(u64::from(end.said[1]), end.state.gpr[gpr::RCX]);
});

on_each_engine!(syscall_without_sce_raises_ud, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.efer &= !efer::SCE;
    guest.code(at::CODE, |a| a.syscall());
    assert_eq!(guest.run().exception().vector, 6);
});

on_each_engine!(sysenter_and_sysexit_go_to_the_kernel_and_back_in_32_bit_mode, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.start_in_user_mode();
    let kernel = sel::FREE;
    for (n, attributes) in (0..4).zip([0xc09b, 0xc093, 0xc0fb, 0xc0f3]) {
        guest.descriptor(kernel + 8 * n, descriptor(0, 0xfffff, attributes));
    }
    set_msr(&mut guest.state, msr::SYSENTER_CS, kernel.into());
    set_msr(&mut guest.state, msr::SYSENTER_ESP, at::STACK);
    set_msr(&mut guest.state, msr::SYSENTER_EIP, 0x9000);
    guest.state.rflags |= rflags::IF;
    guest.code(0x9000, |a| {
        a.mov(eax, esp)?;
        say(a)?;
        a.mov(eax, cs)?;
        say(a)?;
        a.pushfd()?;
        a.pop(eax)?;
        a.and(eax, rflags::IF as i32)?;
        say(a)?;
        a.mov(edx, at::USER as u32 + 0x100)?;
        a.mov(ecx, at::USER_STACK as u32 - 64)?;
        a.sysexit()
    });
    guest.code(at::USER, |a| a.sysenter());
    guest.code(at::USER + 0x100, |a| {
        a.mov(ebx, cs)?;
        a.ud2()
    });
    let end = guest.run();
    let exception = end.exception();
    assert_eq!(end.said, [at::STACK as u32, kernel.into(), 0]);
    assert_eq!(end.state.gpr[gpr::RBX], u64::from(kernel + 16) | 3);
    assert_eq!(exception.stack, Some(((kernel + 24) | 3, at::USER_STACK - 64)));
});

on_each_engine!(iretq_from_the_kernel_reaches_user_code_of_64_and_of_32_bits, |engine| {
    for (selector, wide) in [(sel::USER_CODE64, true), (sel::USER_CODE32, false)] {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.code(at::CODE, |a| {
            a.push(i32::from(sel::USER_DATA))?;
            a.push(at::USER_STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(selector))?;
            a.push(at::USER as i32)?;
            a.iretq()
        });
        // INC EAX in 32-bit code, a REX prefix in 64-bit code.
        write(&guest.memory, at::USER, &[0x31, 0xc0, 0x40, 0x90, 0x0f, 0x0b]);
        let end = guest.run();
        let exception = end.exception();
        assert_eq!((exception.vector, exception.cs), (6, selector));
        assert_eq!(end.state.gpr[gpr::RAX], u64::from(!wide));
    }
});

on_each_engine!(entering_user_mode_clears_data_segments_that_belong_to_the_kernel, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.code(at::CODE, |a| {
        a.mov(eax, i32::from(sel::USER_DATA))?;
        a.mov(es, ax)?;
        a.push(i32::from(sel::USER_DATA))?;
        a.push(at::USER_STACK as i32)?;
        a.push(2)?;
        a.push(i32::from(sel::USER_CODE32))?;
        a.push(at::USER as i32)?;
        a.iretd()
    });
    guest.code(at::USER, |a| {
        a.mov(ebx, ds)?;
        a.mov(ecx, es)?;
        a.ud2()
    });
    let state = guest.run().state;
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RCX]), (0, sel::USER_DATA.into()));
});

on_each_engine!(loading_a_segment_sets_the_accessed_bit_of_its_descriptor, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.descriptor(sel::FREE, descriptor(0x1234_5000, 0xfffff, 0xc092));
    guest.code(at::CODE, |a| {
        a.mov(eax, i32::from(sel::FREE))?;
        a.mov(fs, ax)?;
        done(a)
    });
    let end = guest.run();
    end.done();
    let loaded = end.state.segments[SegmentName::Fs];
    assert_eq!((loaded.base, loaded.limit), (0x1234_5000, 0xffff_ffff));
    assert_eq!(read_u32(&guest.memory, at::GDT + u64::from(sel::FREE) + 4) >> 8 & 1, 1);
});

on_each_engine!(ltr_marks_its_tss_busy_and_lldt_gives_a_second_table, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.descriptor(sel::TSS, descriptor(at::TSS as u32, 0x67, 0x0089));
    write_u64(&guest.memory, at::LDT + 8, descriptor(at::DATA as u32, 0xfff, 0x4093));
    write_u64(&guest.memory, at::DATA + 4, 42);
    guest.code(at::CODE, |a| {
        a.mov(eax, i32::from(sel::TSS))?;
        a.ltr(ax)?;
        a.mov(eax, i32::from(sel::LDT))?;
        a.lldt(ax)?;
        a.mov(eax, 0x0c)?;
        a.mov(fs, ax)?;
        a.mov(eax, dword_ptr(4).fs())?;
        say(a)?;
        a.str(eax)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [42, sel::TSS.into()]);
    assert_eq!(read_u32(&guest.memory, at::GDT + u64::from(sel::TSS) + 4) >> 8 & 0xf, 0xb);
});

on_each_engine!(lar_lsl_verr_and_verw_tell_what_a_selector_allows, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.descriptor(sel::FREE, descriptor(0, 0x1234, 0x00f1));
    guest.code(at::CODE, |a| {
        a.mov(ebx, i32::from(sel::FREE))?;
        a.lar(eax, ebx)?;
        say(a)?;
        a.lsl(eax, ebx)?;
        say(a)?;
        for check in [0, 1] {
            a.xor(eax, eax)?;
            if check == 0 {
                a.verr(bx)?
            } else {
                a.verw(bx)?
            }
            a.setz(al)?;
            say(a)?;
        }
        // Beyond the table: ZF clear, register unchanged.
        a.mov(ebx, 0xfff8)?;
        a.mov(eax, 5)?;
        a.lsl(eax, ebx)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [0xf100, 0x1234, 1, 0, 5]);
});
