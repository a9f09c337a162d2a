//! Code that is rewritten again and again, long enough for the engine to stop translating it anew
//! each time: it must still run as written.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::registers::gpr;
use cputest::layout::write;
use cputest::micro::{Guest, Mode, at, done, say};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Far beyond what makes a page one of rewritten code.
const ROUNDS: u32 = 300;
/// Where the patched function is.
const PATCHED: u64 = at::DATA + 0x1000;

/// A guest that patches and calls the function at [`PATCHED`], R8, in each round EBP, and adds up
/// 31 × sum + EAX, which it reports. `patch` may use RAX, RCX and RDX.
fn patching(mode: Mode, patch: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
    let guest = Guest::new(mode);
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.mov(ebx, PATCHED as u32)?;
        a.xor(ebp, ebp)?;
        a.xor(esi, esi)?;
        a.set_label(&mut again)?;
        patch(a)?;
        // Leaves the flags as `patch` left them.
        a.mov(eax, 0)?;
        match a.bitness() {
            64 => a.call(rbx)?,
            _ => a.call(ebx)?,
        }
        a.imul_3(esi, esi, 31)?;
        a.add(esi, eax)?;
        a.inc(ebp)?;
        a.cmp(ebp, ROUNDS)?;
        a.jne(again)?;
        a.mov(eax, esi)?;
        say(a)?;
        done(a)
    });
    guest
}

/// The sum that [`patching`] reports if the function returns `value` of the round.
fn sum(value: impl Fn(u32) -> u32) -> Vec<u32> {
    vec![(0..ROUNDS).fold(0u32, |s, n| s.wrapping_mul(31).wrapping_add(value(n)))]
}

#[test]
fn constants_patched_in_each_round_have_their_new_values() {
    for mode in [Mode::LONG, Mode::Protected32] {
        let mut guest = patching(mode, |a| {
            a.imul_3(eax, ebp, 0x10001)?;
            a.mov(dword_ptr(PATCHED + 1), eax)?;
            a.mov(dword_ptr(PATCHED + 6), ebp)?;
            a.mov(eax, ebp)?;
            a.not(eax)?;
            a.mov(byte_ptr(PATCHED + 12), al)
        });
        // mov eax, imm32; add eax, imm32; sub eax, imm8; ret
        let code = [0xb8, 0, 0, 0, 0, 0x05, 0, 0, 0, 0, 0x83, 0xe8, 0, 0xc3];
        write(&guest.memory, PATCHED, &code);
        let expected = sum(|n| {
            let byte = !n as u8 as i8 as i32 as u32;
            n.wrapping_mul(0x10001).wrapping_add(n).wrapping_sub(byte)
        });
        assert_eq!(guest.run().done(), expected, "{mode:?}");
    }
}

#[test]
fn constants_of_64_bits_and_beside_memory_operands_follow_patches() {
    const WIDE: u64 = 0x0123_4567_89ab_cdef;
    let mut guest = patching(Mode::LONG, |a| {
        a.mov(rax, WIDE)?;
        a.mov(ecx, ebp)?;
        a.rol(rax, cl)?;
        a.mov(qword_ptr(rbx + 2), rax)?;
        a.mov(dword_ptr(rbx + 20), ebp)?;
        a.neg(ecx)?;
        a.mov(dword_ptr(rbx + 25), ecx)?;
        a.mov(dword_ptr(rbx + 32), ecx)
    });
    let code = [
        &[0x48, 0xb9, 0, 0, 0, 0, 0, 0, 0, 0][..], // mov rcx, imm64
        &[0x48, 0x89, 0xc8, 0x48, 0xc1, 0xe8, 0x11], // mov rax, rcx; shr rax, 17
        &[0xc7, 0x43, 0x40, 0, 0, 0, 0],           // mov dword [rbx+0x40], imm32
        &[0x3d, 0, 0, 0, 0],                       // cmp eax, imm32
        &[0x81, 0x53, 0x44, 0, 0, 0, 0],           // adc dword [rbx+0x44], imm32
        &[0x03, 0x43, 0x44, 0x2b, 0x43, 0x40, 0xc3], // add eax, [rbx+0x44]; sub eax, [rbx+0x40]; ret
    ];
    write(&guest.memory, PATCHED, &code.concat());
    let total = std::cell::Cell::new(0u32);
    let expected = sum(|n| {
        let shifted = (WIDE.rotate_left(n & 63) >> 17) as u32;
        let carry = u32::from(shifted < n.wrapping_neg());
        total.set(total.get().wrapping_add(n.wrapping_neg()).wrapping_add(carry));
        shifted.wrapping_add(total.get()).wrapping_sub(n)
    });
    assert_eq!(guest.run().done(), expected);
}

#[test]
fn opcodes_patched_to_and_fro_run_as_written_however_many_there_are() {
    for versions in [2, 7, 60] {
        let mut guest = patching(Mode::LONG, |a| {
            a.xor(edx, edx)?;
            a.mov(eax, ebp)?;
            a.mov(ecx, versions)?;
            a.div(ecx)?;
            // rol eax, n: a count that is part of what the instruction means
            a.mov(byte_ptr(rbx + 7), dl)
        });
        let code = [0xb8, 0x01, 0x23, 0x45, 0x67, 0xc1, 0xc0, 0, 0xc3];
        write(&guest.memory, PATCHED, &code);
        let expected = sum(|n| 0x6745_2301u32.rotate_left((n % versions) & 31));
        assert_eq!(guest.run().done(), expected, "{versions} versions");
    }
}

#[test]
fn flags_flow_into_code_that_has_changed() {
    let mut guest = patching(Mode::LONG, |a| {
        // In turn: adc eax, 7; sbb eax, 7; setb al and a NOP; three NOPs.
        for (turn, code) in
            [0x9007_d083u32, 0x9007_d883, 0x90c0_920f, 0x9090_9090].iter().enumerate()
        {
            let mut other = a.create_label();
            a.mov(eax, ebp)?;
            a.and(eax, 3)?;
            a.cmp(eax, turn as u32)?;
            a.jne(other)?;
            a.mov(dword_ptr(rbx), *code)?;
            a.set_label(&mut other)?;
            a.nop()?;
        }
        // The call comes with bit 2 of the round as CF.
        a.bt(ebp, 2)
    });
    write(&guest.memory, PATCHED, &[0x90, 0x90, 0x90, 0x90, 0xc3]);
    let expected = sum(|n| {
        let carry = n >> 2 & 1;
        match n & 3 {
            0 => 7 + carry,
            1 => (7 + carry).wrapping_neg(),
            2 => carry,
            _ => 0,
        }
    });
    assert_eq!(guest.run().done(), expected);
}

#[test]
fn a_rewritten_block_that_changes_its_own_next_instruction_runs_the_new_one() {
    for mode in [Mode::LONG, Mode::Protected32] {
        let mut guest = patching(mode, |a| {
            a.mov(dword_ptr(PATCHED + 0x40), ebp)?;
            // Any change, so that the page counts as rewritten.
            a.mov(eax, ebp)?;
            a.mov(byte_ptr(PATCHED + 0x20), al)
        });
        guest.code(PATCHED, |a| {
            // The immediate of the MOV after next.
            a.mov(ecx, ebp)?;
            let at_immediate = match a.bitness() {
                64 => PATCHED + 2 + 7 + 1,
                _ => PATCHED + 2 + 6 + 1,
            };
            a.mov(dword_ptr(at_immediate), ecx)?;
            a.mov(eax, 0x1234_5678)?;
            a.ret()
        });
        assert_eq!(guest.run().done(), sum(|n| n), "{mode:?}");
    }
}

#[test]
fn calls_whose_displacement_is_patched_go_where_it_says() {
    let mut guest = patching(Mode::LONG, |a| {
        // Functions at PATCHED + 0x40 and + 0x50; the CALL ends at + 5.
        a.mov(eax, ebp)?;
        a.and(eax, 1)?;
        a.shl(eax, 4)?;
        a.add(eax, 0x40 - 5)?;
        a.mov(dword_ptr(rbx + 1), eax)
    });
    write(&guest.memory, PATCHED, &[0xe8, 0, 0, 0, 0, 0x40, 0x80, 0xf0, 0x55, 0xc3]);
    write(&guest.memory, PATCHED + 0x40, &[0xb8, 3, 0, 0, 0, 0xc3]);
    write(&guest.memory, PATCHED + 0x50, &[0xb8, 9, 0, 0, 0, 0xc3]);
    assert_eq!(guest.run().done(), sum(|n| if n & 1 == 0 { 3 ^ 0x55 } else { 9 ^ 0x55 }));
}

#[test]
fn a_jump_patched_by_another_vcpu_leaves_its_loop() {
    let mut guest = Guest::with_vcpus(Mode::LONG, 2).unwrap();
    guest.code(at::CODE, |a| {
        let (mut other, mut again, mut wait) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(ebx, PATCHED as u32)?;
        a.test(esi, esi)?;
        a.jne(other)?;
        a.mov(ebp, ROUNDS)?;
        // vCPU 0 patches the jump: to itself, and to the INC behind it.
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rbx + 1), -5)?;
        a.mov(eax, dword_ptr(rbx + 0x1000))?;
        a.mov(dword_ptr(rbx + 1), 3)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rbx + 0x1000), eax)?;
        a.je(wait)?;
        a.dec(ebp)?;
        a.jne(again)?;
        a.mov(eax, 1)?;
        say(a)?;
        done(a)?;
        // vCPU 1 goes round: the jump, the INC, a serialising instruction, and back.
        a.set_label(&mut other)?;
        a.jmp(rbx)
    });
    write(&guest.memory, PATCHED, &[0xe9, 3, 0, 0, 0, 0x90, 0x90, 0x90]);
    guest.code(PATCHED + 8, |a| {
        a.inc(dword_ptr(rbx + 0x1000))?;
        a.jmp(rbx)
    });
    start(&mut guest, 1);
    assert_eq!(guest.run().done(), [1]);
}

#[test]
fn a_loop_of_one_block_sees_that_another_vcpu_opens_it() {
    let mut guest = Guest::with_vcpus(Mode::LONG, 2).unwrap();
    guest.code(at::CODE, |a| {
        let (mut other, mut again, mut wait) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(ebx, PATCHED as u32)?;
        a.xor(ecx, ecx)?;
        a.test(esi, esi)?;
        a.jne(other)?;
        a.mov(ebp, ROUNDS)?;
        // vCPU 0 makes the branch back one that is not taken, and back again.
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(rbx + 0x1000))?;
        a.mov(byte_ptr(rbx + 2), 0x75)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rbx + 0x1000), eax)?;
        a.je(wait)?;
        a.mov(byte_ptr(rbx + 2), 0x74)?;
        a.dec(ebp)?;
        a.jne(again)?;
        a.mov(eax, 1)?;
        say(a)?;
        done(a)?;
        a.set_label(&mut other)?;
        a.jmp(rbx)
    });
    // test ecx, ecx; je to the TEST
    write(&guest.memory, PATCHED, &[0x85, 0xc9, 0x74, 0xfc]);
    guest.code(PATCHED + 4, |a| {
        a.inc(dword_ptr(rbx + 0x1000))?;
        a.jmp(rbx)
    });
    start(&mut guest, 1);
    assert_eq!(guest.run().done(), [1]);
}

#[test]
fn a_rewritten_instruction_across_two_pages_follows_both() {
    let mut guest = patching(Mode::LONG, |a| {
        a.add(rbx, 0xffe)?;
        a.mov(dword_ptr(rbx + 1), ebp)?;
        a.mov(eax, ebp)?;
        a.and(eax, 1)?;
        // mov eax, imm32 or mov ecx, imm32
        a.add(eax, 0xb8)?;
        a.mov(byte_ptr(rbx), al)?;
        a.xor(ecx, ecx)?;
        a.xor(eax, eax)?;
        a.call(rbx)?;
        a.sub(rbx, 0xffe)?;
        a.mov(dword_ptr(rbx + 1), eax)
    });
    write(&guest.memory, PATCHED, &[0xb8, 0, 0, 0, 0, 0xc3]);
    write(&guest.memory, PATCHED + 0xffe, &[0xb8, 0, 0, 0, 0, 0xc3]);
    assert_eq!(guest.run().done(), sum(|n| if n & 1 == 0 { n } else { 0 }));
}

#[test]
fn a_rewritten_page_that_settles_goes_on_as_before() {
    // Beside the patched function, 256 others are written and called one after the other: so many
    // new blocks that the page counts as an ordinary one again.
    let mut guest = patching(Mode::LONG, |a| {
        a.mov(dword_ptr(rbx + 1), ebp)?;
        a.mov(eax, ebp)?;
        a.and(eax, 255)?;
        a.lea(rdx, qword_ptr(rbx + rax * 8 + 0x100))?;
        a.mov(eax, 0xb8)?;
        a.mov(byte_ptr(rdx), al)?;
        a.mov(dword_ptr(rdx + 1), ebp)?;
        a.mov(byte_ptr(rdx + 5), 0xc3)?;
        a.call(rdx)?;
        a.mov(dword_ptr(rbx + 0x80), eax)?;
        a.cmp(ebp, eax)?;
        let mut same = a.create_label();
        a.je(same)?;
        a.ud2()?;
        a.set_label(&mut same)?;
        a.nop()
    });
    write(&guest.memory, PATCHED, &[0xb8, 0, 0, 0, 0, 0xc3]);
    assert_eq!(guest.run().done(), sum(|n| n));
}

/// Lets vCPU `n` start where vCPU 0 does, with ESI = n.
fn start(guest: &mut Guest, n: usize) {
    let mut state = guest.state.clone();
    let own = guest.vcpus[n].state().unwrap();
    (state.lapic, state.msrs) = (own.lapic, own.msrs);
    state.gpr[gpr::RSI] = n as u64;
    state.gpr[gpr::RSP] = at::STACK - 0x200 * n as u64;
    guest.vcpus[n].set_state(&state).unwrap();
}
