//! The local APIC, interrupt shadows, HLT, NMI and start-up of vCPUs (Intel SDM 3A 6.8, 10).
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::registers::rflags;
use arch::{VcpuState, msr};
use cputest::machine::Access;
use cputest::micro::{Guest, Mode, at, done, say};
use cputest::on_each_engine;
use cputest::under_test::EngineUnderTest;
use engine::Msi;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Registers of the local APIC: byte offsets in its page.
mod apic {
    pub const ID: u64 = 0x20;
    pub const TPR: u64 = 0x80;
    pub const PPR: u64 = 0xa0;
    pub const EOI: u64 = 0xb0;
    pub const SPURIOUS: u64 = 0xf0;
    pub const ISR: u64 = 0x100;
    pub const IRR: u64 = 0x200;
    pub const ICR: u64 = 0x300;
    pub const ICR_HIGH: u64 = 0x310;
    pub const TIMER: u64 = 0x320;
    pub const INITIAL: u64 = 0x380;
    pub const CURRENT: u64 = 0x390;
    pub const DIVIDE: u64 = 0x3e0;
}

fn set(a: &mut CodeAssembler, register: u64, value: u32) -> Result<(), IcedError> {
    a.mov(r15, at::LAPIC)?;
    a.mov(dword_ptr(r15 + register as i32), value as i32)
}
fn get(a: &mut CodeAssembler, register: u64) -> Result<(), IcedError> {
    a.mov(r15, at::LAPIC)?;
    a.mov(eax, dword_ptr(r15 + register as i32))
}
fn say_number(a: &mut CodeAssembler, n: u32) -> Result<(), IcedError> {
    a.mov(eax, n)?;
    say(a)
}
/// Gives a pending interrupt the time that the architecture lets it take.
fn spin(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(r14d, 10_000)?;
    a.set_label(&mut again)?;
    a.dec(r14d)?;
    a.jne(again)
}
/// A handler that says its vector and ends the interrupt.
fn handler(guest: &Guest, vector: u8) {
    let address = 0x9000 + 0x100 * u64::from(vector >> 4) + 0x10 * u64::from(vector & 15) * 4;
    guest.handler(vector, address, 0);
    guest.code(address, |a| {
        a.push(rax)?;
        say_number(a, vector.into())?;
        set(a, apic::EOI, 0)?;
        a.pop(rax)?;
        a.iretq()
    });
}
fn new(engine: EngineUnderTest, vectors: &[u8]) -> Guest {
    let guest = Guest::new(engine, Mode::LONG);
    vectors.iter().for_each(|v| handler(&guest, *v));
    guest
}

on_each_engine!(a_self_ipi_arrives_when_interrupts_are_enabled, |engine| {
    let mut guest = new(engine, &[0x40]);
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        set(a, apic::ICR, 0x4_4040)?;
        say_number(a, 1)?;
        a.sti()?;
        spin(a)?;
        say_number(a, 2)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 0x40, 2]);
});

on_each_engine!(higher_priorities_come_first_and_interrupt_lower_ones, |engine| {
    let mut guest = new(engine, &[0x30, 0x50]);
    // The handler of 0x40 lets others in.
    guest.handler(0x40, 0xf000, 0);
    guest.code(0xf000, |a| {
        say_number(a, 0x40)?;
        set(a, apic::ICR, 0x4_4050)?;
        set(a, apic::ICR, 0x4_4030)?;
        a.push(r14)?;
        a.sti()?;
        spin(a)?;
        a.cli()?;
        a.pop(r14)?;
        say_number(a, 0x41)?;
        get(a, apic::PPR)?;
        say(a)?;
        get(a, apic::ISR + 0x20)?;
        say(a)?;
        get(a, apic::IRR + 0x10)?;
        say(a)?;
        set(a, apic::EOI, 0)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        set(a, apic::ICR, 0x4_4040)?;
        a.sti()?;
        spin(a)?;
        say_number(a, 2)?;
        done(a)
    });
    let said = [0x40, 0x50, 0x41, 0x40, 1, 1 << 16, 0x30, 2];
    assert_eq!(guest.run().done(), said);
});

on_each_engine!(the_task_priority_holds_back_lower_vectors_also_through_cr8, |engine| {
    let mut guest = new(engine, &[0x40, 0x60]);
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        a.sti()?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        get(a, apic::TPR)?;
        say(a)?;
        set(a, apic::ICR, 0x4_4040)?;
        set(a, apic::ICR, 0x4_4060)?;
        spin(a)?;
        say_number(a, 1)?;
        set(a, apic::TPR, 0x30)?;
        spin(a)?;
        a.mov(rax, cr8)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [0x50, 0x60, 1, 0x40, 3]);
});

on_each_engine!(sti_holds_a_pending_interrupt_back_for_exactly_one_instruction, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(0x40, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.mov(eax, ebx)?;
        say(a)?;
        done(a)
    });
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        a.xor(ebx, ebx)?;
        set(a, apic::ICR, 0x4_4040)?;
        spin(a)?;
        a.sti()?;
        a.inc(ebx)?;
        a.inc(ebx)?;
        a.inc(ebx)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1]);
});

on_each_engine!(sti_followed_by_cli_lets_no_interrupt_in, |engine| {
    let mut guest = new(engine, &[0x40]);
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        set(a, apic::ICR, 0x4_4040)?;
        spin(a)?;
        a.sti()?;
        a.cli()?;
        spin(a)?;
        say_number(a, 1)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1]);
});

on_each_engine!(
    popf_that_sets_if_lets_a_pending_interrupt_in_before_the_next_instruction,
    |engine| {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.handler(0x40, 0x9000, 0);
        guest.code(0x9000, |a| {
            a.mov(eax, ebx)?;
            say(a)?;
            done(a)
        });
        guest.code(at::CODE, |a| {
            set(a, apic::SPURIOUS, 0x1ff)?;
            a.xor(ebx, ebx)?;
            set(a, apic::ICR, 0x4_4040)?;
            spin(a)?;
            a.push((rflags::IF | rflags::FIXED) as i32)?;
            a.popfq()?;
            a.inc(ebx)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [0]);
    }
);

on_each_engine!(hlt_wakes_at_once_when_an_interrupt_is_pending, |engine| {
    let mut guest = new(engine, &[0x40]);
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        set(a, apic::ICR, 0x4_4040)?;
        a.sti()?;
        a.hlt()?;
        say_number(a, 1)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [0x40, 1]);
});

on_each_engine!(the_timer_fires_once_or_again_and_again, |engine| {
    for (mode, expected) in [(0u32, 1), (1 << 17, 3)] {
        let mut guest = Guest::new(engine, Mode::LONG);
        guest.handler(0x40, 0x9000, 0);
        guest.code(0x9000, |a| {
            say_number(a, 0x40)?;
            a.inc(ebx)?;
            set(a, apic::EOI, 0)?;
            a.iretq()
        });
        guest.code(at::CODE, |a| {
            let mut again = a.create_label();
            set(a, apic::SPURIOUS, 0x1ff)?;
            set(a, apic::DIVIDE, 0xb)?;
            set(a, apic::TIMER, 0x40 | mode)?;
            set(a, apic::INITIAL, 20_000)?;
            a.set_label(&mut again)?;
            a.sti()?;
            a.hlt()?;
            a.cli()?;
            a.cmp(ebx, expected)?;
            a.jne(again)?;
            set(a, apic::TIMER, 0x1_0040)?;
            if mode == 0 {
                get(a, apic::CURRENT)?;
                say(a)?;
            }
            done(a)
        });
        let mut wanted = vec![0x40; expected as usize];
        wanted.extend((mode == 0).then_some(0));
        assert_eq!(guest.run().done(), wanted);
    }
});

on_each_engine!(the_deadline_timer_fires_when_the_clock_reaches_it_and_not_before, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(0x40, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, rbx)?;
        a.setae(al)?;
        a.movzx(eax, al)?;
        say(a)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.rdmsr()?;
        say(a)?;
        done(a)
    });
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        set(a, apic::SPURIOUS, 0x1ff)?;
        set(a, apic::TIMER, 0x40 | 2 << 17)?;
        a.mfence()?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.add(rax, 1_000_000)?;
        a.mov(rbx, rax)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, msr::TSC_DEADLINE)?;
        a.wrmsr()?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(again)
    });
    assert_eq!(guest.run().done(), [1, 0]);
});

on_each_engine!(x2apic_registers_are_msrs_and_self_ipi_works, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(0x40, 0x9000, 0);
    guest.code(0x9000, |a| {
        say_number(a, 0x40)?;
        a.mov(ecx, msr::X2APIC + 0xb)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        a.mov(ecx, msr::APIC_BASE)?;
        a.rdmsr()?;
        a.or(eax, 0xc00)?;
        a.wrmsr()?;
        a.mov(ecx, msr::X2APIC + 0xf)?;
        a.mov(eax, 0x1ff)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.sti()?;
        a.mov(ecx, msr::X2APIC + 0x3f)?;
        a.mov(eax, 0x40)?;
        a.wrmsr()?;
        spin(a)?;
        a.mov(ecx, msr::X2APIC + 2)?;
        a.rdmsr()?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [0x40, 0]);
});

on_each_engine!(a_message_from_a_device_becomes_an_interrupt, |engine| {
    let mut guest = new(engine, &[0x61]);
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        set(a, apic::SPURIOUS, 0x1ff)?;
        a.sti()?;
        a.set_label(&mut again)?;
        a.hlt()?;
        done(a)
    });
    // The LAPIC must be enabled before the message comes: enable it in the starting state.
    guest.state.lapic.registers[0xf] = 0x1ff;
    let state = guest.state.clone();
    guest.vcpus[0].set_state(&state).unwrap();
    guest.vm.signal_msi(Msi { address: 0xfee0_0000, data: 0x61 });
    guest.state = guest.vcpus[0].state().unwrap();
    assert_eq!(guest.run().done(), [0x61]);
});

on_each_engine!(ending_a_level_triggered_interrupt_is_told_to_the_machine, |engine| {
    let mut guest = new(engine, &[0x61]);
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        a.sti()?;
        a.hlt()?;
        done(a)
    });
    guest.state.lapic.registers[0xf] = 0x1ff;
    let state = guest.state.clone();
    guest.vcpus[0].set_state(&state).unwrap();
    guest.vm.signal_msi(Msi { address: 0xfee0_0000, data: 0xc061 });
    guest.state = guest.vcpus[0].state().unwrap();
    guest.run().done();
    assert!(guest.io.log().contains(&Access::Eoi(0x61)));
});

on_each_engine!(the_pic_is_acknowledged_through_lint0_in_extint_mode, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(0x28, 0x9000, 0);
    guest.code(0x9000, |a| {
        say_number(a, 0x28)?;
        done(a)
    });
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        set(a, 0x350, 0x700)?;
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    guest.io.pic_vector.store(0x28, std::sync::atomic::Ordering::SeqCst);
    guest.vm.set_pic_output(true);
    assert_eq!(guest.run().done(), [0x28]);
});

on_each_engine!(an_nmi_waits_until_the_handler_of_the_last_one_returns, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.handler(2, 0x9000, 0);
    guest.code(0x9000, |a| {
        let mut second = a.create_label();
        a.push(r14)?;
        a.inc(ebx)?;
        a.mov(eax, ebx)?;
        say(a)?;
        a.cmp(ebx, 2)?;
        a.je(second)?;
        // An NMI to itself stays pending inside the handler.
        set(a, apic::ICR, 0x4_4400)?;
        spin(a)?;
        say_number(a, 0x10)?;
        a.set_label(&mut second)?;
        a.pop(r14)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        set(a, apic::SPURIOUS, 0x1ff)?;
        a.xor(ebx, ebx)?;
        set(a, apic::ICR, 0x4_4400)?;
        spin(a)?;
        spin(a)?;
        say_number(a, 0x20)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 0x10, 2, 0x20]);
});

on_each_engine!(init_and_start_up_ipis_start_three_vcpus_in_real_mode, |engine| {
    let mut guest = Guest::with_vcpus(engine, Mode::LONG, 4).unwrap();
    // Each counts itself and leaves the vector it started at in its CS.
    guest.code_of(16, 0xc000, |a| {
        let mut stay = a.create_label();
        a.mov(ax, cs)?;
        a.xor(bx, bx)?;
        a.mov(ds, bx)?;
        a.db(&[0x66, 0xf0, 0xff, 0x06, 0x00, 0x70])?; // lock inc dword [0x7000]
        a.mov(bx, 0x7008u32)?;
        a.mov(word_ptr(bx), ax)?;
        a.set_label(&mut stay)?;
        a.hlt()?;
        a.jmp(stay)
    });
    guest.state.gpr[4] = 0x6f00;
    guest.code(at::CODE, |a| {
        let mut wait = a.create_label();
        set(a, apic::SPURIOUS, 0x1ff)?;
        set(a, apic::ICR, 0xc_4500)?;
        set(a, apic::ICR, 0xc_460c)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(0x7000), 3)?;
        a.jne(wait)?;
        a.movzx(eax, word_ptr(0x7008))?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [0xc00]);
});

on_each_engine!(an_ipi_wakes_exactly_the_vcpu_it_names, |engine| {
    let mut guest = Guest::with_vcpus(engine, Mode::LONG, 4).unwrap();
    guest.handler(0x40, 0x9000, 0);
    // Receivers note their APIC id.
    guest.code(0x9000, |a| {
        get(a, apic::ID)?;
        a.shr(eax, 24)?;
        a.lock().inc(dword_ptr(rax * 4 + at::DATA as i32))?;
        set(a, apic::EOI, 0)?;
        a.lock().inc(dword_ptr(at::DATA + 0x100))?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        let (mut other, mut next, mut wait, mut ready) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        set(a, apic::SPURIOUS, 0x1ff)?;
        a.test(esi, esi)?;
        a.jne(other)?;
        a.set_label(&mut ready)?;
        a.pause()?;
        a.cmp(dword_ptr(at::DATA + 0x200), 3)?;
        a.jne(ready)?;
        a.mov(ebp, 1)?;
        a.set_label(&mut next)?;
        a.mov(ecx, ebp)?;
        a.and(ecx, 3)?;
        a.shl(ecx, 24)?;
        a.mov(r15, at::LAPIC)?;
        a.mov(dword_ptr(r15 + apic::ICR_HIGH as i32), ecx)?;
        a.mov(dword_ptr(r15 + apic::ICR as i32), 0x4040)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(at::DATA + 0x100), ebp)?;
        a.jne(wait)?;
        a.inc(ebp)?;
        a.cmp(ebp, 4)?;
        a.jne(next)?;
        for index in 0..4 {
            a.mov(eax, dword_ptr(at::DATA + 4 * index))?;
            say(a)?;
        }
        done(a)?;
        a.set_label(&mut other)?;
        a.lock().inc(dword_ptr(at::DATA + 0x200))?;
        let mut stay = a.create_label();
        a.set_label(&mut stay)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(stay)
    });
    start_all(&mut guest);
    assert_eq!(guest.run().done(), [0, 1, 1, 1]);
});

/// Puts vCPUs 1 to 3 at the same code as vCPU 0, with a stack of their own and their number in
/// ESI.
fn start_all(guest: &mut Guest) {
    for index in 1..guest.vcpus.len() {
        let own: VcpuState = guest.vcpus[index].state().unwrap();
        let mut state = guest.state.clone();
        state.lapic = own.lapic;
        state.msrs = own.msrs;
        state.gpr[6] = index as u64;
        state.gpr[4] = at::STACK - 0x200 * index as u64;
        guest.vcpus[index].set_state(&state).unwrap();
    }
}
