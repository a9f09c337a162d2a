//! Single step and breakpoints (Intel SDM 3B 17).
use arch::registers::{cr4, rflags};
use cputest::micro::{Guest, Mode, at, done, say};
use cputest::on_each_engine;
use iced_x86::code_asm::*;

on_each_engine!(the_trap_flag_steps_one_instruction_at_a_time, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(1, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.push(rax)?;
        a.mov(eax, dword_ptr(rsp + 8))?;
        say(a)?;
        a.mov(rax, dr6)?;
        a.and(eax, 0x4000)?;
        say(a)?;
        a.pop(rax)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), rflags::TF as i32)?;
        a.popfq()?;
        a.nop()?;
        a.mov(ecx, 2)?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !(rflags::TF as i32))?;
        a.popfq()?;
        done(a)
    });
    let end = guest.run();
    let nop = at::CODE as u32 + 1 + 7 + 1;
    let said = end.done();
    let steps: Vec<u32> = said.chunks(2).map(|s| s[0]).collect();
    // After NOP, MOV, PUSHF, AND; the last POPF ends it but is itself stepped.
    assert_eq!(steps, [nop + 1, nop + 6, nop + 7, nop + 14, nop + 15]);
    assert!(said.chunks(2).all(|s| s[1] == 0x4000), "DR6.BS is set");
});

on_each_engine!(a_load_of_ss_holds_the_single_step_trap_back_for_one_instruction, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let first = guest.code(at::CODE, |a| {
        a.mov(ecx, ss)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), rflags::TF as i32)?;
        a.popfq()
    });
    let load = at::CODE + first.len() as u64;
    guest.code(load, |a| {
        a.mov(ss, ecx)?;
        a.nop()?;
        a.nop()?;
        done(a)
    });
    let exception = guest.run().exception();
    assert_eq!((exception.vector, exception.rip), (1, load + 3));
});

on_each_engine!(a_stepped_repeated_string_traps_after_each_element, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(1, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.mov(eax, ecx)?;
        say(a)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        a.mov(ecx, 3)?;
        a.mov(edi, at::DATA as u32)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), rflags::TF as i32)?;
        a.popfq()?;
        a.rep().stosb()?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !(rflags::TF as i32))?;
        a.popfq()?;
        done(a)
    });
    assert_eq!(guest.run().done()[..3], [2, 1, 0]);
});

on_each_engine!(breakpoints_on_code_are_faults_and_on_data_are_traps, |engine| {
    for (kind, length) in [(0u64, 0u64), (1, 3), (3, 3)] {
        let mut guest = Guest::new(engine, Mode::LONG);
        let first = guest.code(at::CODE, |a| a.mov(ecx, 1)).len() as u64;
        let access = at::CODE + first;
        let second = guest.code(access, |a| a.mov(dword_ptr(at::DATA), ecx)).len() as u64;
        guest.code(access + second, done);
        guest.state.debug[1] = if kind == 0 { access } else { at::DATA };
        // Breakpoint 1, local; type in bits 20–21, length in bits 22–23.
        guest.state.debug[5] = 0x400 | 1 << 2 | kind << 20 | length << 22;
        let end = guest.run();
        let exception = end.exception();
        let expected = if kind == 0 { access } else { access + second };
        assert_eq!((exception.vector, exception.rip), (1, expected), "kind {kind}");
        assert_eq!(end.state.debug[4] & 0xf, 2, "DR6 names breakpoint 1");
        // The one fault that does not save RF (Intel SDM 3B 17.3.1.1).
        assert_eq!(exception.rflags & rflags::RF, 0);
    }
});

on_each_engine!(the_resume_flag_passes_one_code_breakpoint, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let target = at::CODE + 5;
    guest.state.debug[0] = target;
    guest.state.debug[5] = 0x401;
    guest.handler(1, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.inc(ebx)?;
        a.or(dword_ptr(rsp + 16), rflags::RF as i32)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        a.mov(ecx, 3)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(eax, ebx)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [3]);
});

on_each_engine!(breakpoints_on_ports_trap_with_de, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr4 |= cr4::DE;
    guest.state.debug[0] = 0x60;
    guest.state.debug[5] = 0x401 | 2 << 16;
    guest.code(at::CODE, |a| {
        a.in_(al, 0x61)?;
        a.in_(al, 0x60)?;
        done(a)
    });
    let exception = guest.run().exception();
    assert_eq!((exception.vector, exception.rip), (1, at::CODE + 4));
});
