//! Gives the registers of a generated instruction values that make it reach its operands.
use crate::case::{
    CODE, Case, DATA, DATA_SIZE, READ_ONLY, READ_ONLY_SIZE, USER_CODE32, USER_CODE64, USER_DATA,
};
use crate::generate::memory_bytes;
use crate::rng::Rng;
use arch::registers::{gpr, rflags};
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// An address for an operand of `size` bytes: mostly inside the data pages, often across them,
/// sometimes where a fault waits.
fn target(size: u64, wide: bool, rng: &mut Rng) -> u64 {
    let size = size.max(1);
    let end = DATA + DATA_SIZE as u64;
    let align = size.next_power_of_two().min(64);
    let across = |edge: u64, rng: &mut Rng| edge.wrapping_sub(rng.below(size + 1));
    match rng.below(100) {
        0..42 => (DATA + rng.below(DATA_SIZE as u64 - size)) & !(align - 1),
        42..58 => DATA + rng.below(DATA_SIZE as u64 - size),
        58..74 => across(DATA + 0x1000, rng),
        74..82 => across(end, rng),
        82..84 => across(DATA, rng),
        84..92 => (READ_ONLY + rng.below(READ_ONLY_SIZE as u64 - size)) & !(align - 1),
        92..94 => across(READ_ONLY, rng),
        94..96 => end + rng.below(0x1000),
        96..98 => CODE + rng.below(0x2000),
        _ if wide => rng.pick(&[
            0x8000_0000_0000,
            0x7fff_ffff_ffff,
            0x7fff_ffff_fff0,
            0xffff_7fff_ffff_ffff,
            0x1234_5678_9abc_def0,
            0x8000_0000_0000_0000,
        ]),
        _ => end + rng.below(0x1000),
    }
}

/// An address for operands that name it themselves.
pub fn somewhere(rng: &mut Rng) -> u64 {
    target(16, false, rng)
}

/// A place in the code pages, full of STOP, that no instruction under test occupies.
pub fn code_target(rng: &mut Rng) -> u64 {
    CODE + 0x200 + rng.below(0xc00) + if rng.chance(20) { 0x1000 } else { 0 }
}

/// A code selector: mostly the running one.
pub fn code_selector(case: &Case, rng: &mut Rng) -> u16 {
    let (own, other) =
        if case.wide { (USER_CODE64, USER_CODE32) } else { (USER_CODE32, USER_CODE64) };
    match rng.below(10) {
        0..6 => own,
        6 => other,
        7 => USER_DATA,
        8 => 0,
        _ => 0x10,
    }
}

fn data_selector(rng: &mut Rng) -> u16 {
    rng.pick(&[USER_DATA, USER_DATA, USER_DATA, 0, USER_CODE32, USER_CODE64, 0x18, 0x28])
}

/// The bytes of writable data from `address` on, as far as they reach.
fn data_at(case: &mut Case, address: u64) -> Option<&mut [u8]> {
    let offset = usize::try_from(address.checked_sub(DATA)?).ok()?;
    case.data.get_mut(offset..)
}

fn poke(case: &mut Case, address: u64, bytes: &[u8]) {
    if let Some(data) = data_at(case, address) {
        let length = data.len().min(bytes.len());
        data[..length].copy_from_slice(&bytes[..length]);
    }
}

/// Sets what a register holds, in full width.
fn set(case: &mut Case, register: Register, value: u64) {
    let value = if case.wide { value } else { value & 0xffff_ffff };
    let full = register.full_register();
    if full.is_gpr64() {
        case.gpr[full.number()] = value;
    }
}
fn get(case: &Case, register: Register) -> u64 {
    let full = register.full_register();
    if full.is_gpr64() { case.gpr[full.number()] } else { 0 }
}

/// Makes the case's registers, stack and memory suit the instruction.
pub fn aim(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    if instruction.is_stack_instruction() {
        stack(case, rng);
    }
    strings(case, instruction, rng);
    registers_by_mnemonic(case, instruction, rng);
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    let at = if memory { aim_memory(case, instruction, rng) } else { None };
    contents(case, instruction, at, rng);
    if matches!(instruction.mnemonic(), M::Mov | M::Pop)
        && instruction.op0_register().is_segment_register()
    {
        let selector = u64::from(data_selector(rng));
        match instruction.op_kind(1) {
            OpKind::Memory => poke(case, at.unwrap_or(0), &selector.to_le_bytes()[..2]),
            OpKind::Register => set(case, instruction.op1_register(), selector),
            _ => {}
        }
        if instruction.mnemonic() == M::Pop {
            let sp = case.gpr[gpr::RSP];
            poke(case, sp, &selector.to_le_bytes());
        }
    }
}

fn stack(case: &mut Case, rng: &mut Rng) {
    let at = match rng.below(10) {
        0..7 => (DATA + 0x400 + rng.below(0x1800)) & !7,
        7 => DATA + 0x1000 + rng.below(16),
        _ => target(8, case.wide, rng),
    };
    case.gpr[gpr::RSP] = at;
    case.gpr[gpr::RBP] = match rng.below(10) {
        0..8 => (DATA + 0x400 + rng.below(0x1800)) & !7,
        _ => target(8, case.wide, rng),
    };
}

fn strings(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    let mut is_string = false;
    for operand in 0..instruction.op_count() {
        let size = memory_bytes(instruction).max(1);
        match instruction.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => {
                case.gpr[gpr::RSI] = target(size, case.wide, rng);
            }
            OpKind::MemorySegDI
            | OpKind::MemorySegEDI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESDI
            | OpKind::MemoryESEDI
            | OpKind::MemoryESRDI => {
                case.gpr[gpr::RDI] = target(size, case.wide, rng);
            }
            _ => continue,
        }
        is_string = true;
    }
    if is_string && (instruction.has_rep_prefix() || instruction.has_repne_prefix()) {
        case.gpr[gpr::RCX] = match rng.below(10) {
            0 => 0,
            1 => 1,
            2 => 1000 + rng.below(2000),
            _ => rng.below(40),
        };
        if rng.chance(15) {
            // Overlapping copies.
            case.gpr[gpr::RSI] = case.gpr[gpr::RDI].wrapping_add(rng.below(33)).wrapping_sub(16);
        }
        if rng.chance(30) {
            // Long equal runs for the comparing ones.
            let value = case.gpr[gpr::RAX] as u8;
            case.data[0xf00..0x1100].fill(value);
        }
    }
}

fn registers_by_mnemonic(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    match instruction.mnemonic() {
        M::Div | M::Idiv if rng.chance(70) => {
            // Small enough dividends for a quotient that fits.
            case.gpr[gpr::RDX] = if rng.chance(50) { 0 } else { rng.below(8) };
            if instruction.mnemonic() == M::Idiv && rng.chance(50) {
                let sign = if case.wide { u64::MAX } else { 0xffff_ffff };
                case.gpr[gpr::RDX] = sign;
            }
        }
        M::Jmp | M::Call | M::Jmpe if instruction.op0_kind() == OpKind::Register => {
            let target = if rng.chance(85) { code_target(rng) } else { target(1, case.wide, rng) };
            set(case, instruction.op0_register(), target);
        }
        M::Bt | M::Bts | M::Btr | M::Btc
            if instruction.op0_kind() == OpKind::Memory
                && instruction.op1_kind() == OpKind::Register =>
        {
            // The bit offset selects bytes far from the operand.
            let offset = (rng.below(0x2000) as i64 - 0x1000) as u64;
            if instruction.op1_register().full_register()
                != instruction.memory_base().full_register()
                && instruction.op1_register().full_register()
                    != instruction.memory_index().full_register()
            {
                set(case, instruction.op1_register(), offset);
            }
        }
        M::Enter => case.gpr[gpr::RSP] = (DATA + 0x1400 + rng.below(0x800)) & !7,
        M::Loop | M::Loope | M::Loopne if rng.chance(60) => case.gpr[gpr::RCX] = rng.below(3),
        M::Jcxz | M::Jecxz | M::Jrcxz if rng.chance(50) => case.gpr[gpr::RCX] = 0,
        _ => {}
    }
}

/// Solves base + index × scale + displacement = target for the operand's registers. Returns the
/// linear address that the operand then has, where it can be told.
fn aim_memory(case: &mut Case, instruction: &Instruction, rng: &mut Rng) -> Option<u64> {
    let size = memory_bytes(instruction);
    let at = target(size, case.wide, rng);
    let segment_base = match instruction.memory_segment() {
        Register::FS => case.fs_gs[0],
        Register::GS => case.fs_gs[1],
        _ => 0,
    };
    let displacement = instruction.memory_displacement64();
    let scale = u64::from(instruction.memory_index_scale());
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    if base == Register::RIP || base == Register::EIP {
        return Some(displacement.wrapping_add(segment_base));
    }
    if index.is_vector_register() {
        gather_indices(case, instruction, rng);
        let start = DATA + 0x400 + rng.below(0x800);
        let value = start.wrapping_sub(displacement).wrapping_sub(segment_base);
        set(case, base, narrow(base, value));
        return None;
    }
    if index == Register::AL {
        let al = case.gpr[gpr::RAX] & 0xff;
        set(case, base, narrow(base, at.wrapping_sub(al).wrapping_sub(segment_base)));
        return Some(at);
    }
    let mut sum = displacement;
    if index != Register::None {
        if base == Register::None {
            set(case, index, rng.below(0x80));
        }
        sum = sum.wrapping_add(get(case, index).wrapping_mul(scale));
    }
    if base == Register::None {
        return Some(sum.wrapping_add(segment_base));
    }
    set(case, base, narrow(base, at.wrapping_sub(sum).wrapping_sub(segment_base)));
    Some(at)
}

/// With 32-bit addressing the upper half of the base does not count, so it holds noise.
fn narrow(base: Register, value: u64) -> u64 {
    if base.is_gpr32() { value & 0xffff_ffff } else { value }
}

fn gather_indices(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    let register = instruction.memory_index().number();
    let wide_elements = instruction.vsib() == Some(true);
    for half in [160 + 16 * register, 576 + 16 * register] {
        for element in case.fpu.0[half..half + 16].chunks_exact_mut(4) {
            let index = rng.below(0x100) as i32 - if rng.chance(20) { 0x40 } else { 0 };
            element.copy_from_slice(&index.to_le_bytes());
        }
        if wide_elements {
            for element in case.fpu.0[half..half + 16].chunks_exact_mut(8) {
                let far = rng.chance(4);
                let index = if far { rng.bits() } else { rng.below(0x100) };
                element.copy_from_slice(&index.to_le_bytes());
            }
        }
    }
}

/// Flags that a popped image may set: not those that trap or that signal frames do not carry.
fn popped_flags(rng: &mut Rng) -> u64 {
    let never = rflags::TF | rflags::NT | rflags::RF | rflags::VM | rflags::ID | rflags::AC;
    rng.bits() & 0xffff_ffff & !never & !(rflags::VIF | rflags::VIP)
}

/// Puts contents that the instruction can use at its operand and on the stack.
fn contents(case: &mut Case, instruction: &Instruction, at: Option<u64>, rng: &mut Rng) {
    let sp = case.gpr[gpr::RSP];
    let at = at.unwrap_or(0);
    match instruction.mnemonic() {
        M::Ret if rng.chance(85) => poke(case, sp, &code_target(rng).to_le_bytes()),
        M::Popf | M::Popfd | M::Popfq => poke(case, sp, &popped_flags(rng).to_le_bytes()),
        M::Retf => {
            let words = [code_target(rng), u64::from(code_selector(case, rng))];
            poke_words(case, sp, instruction, &words);
        }
        M::Iret | M::Iretd | M::Iretq => {
            let words = [
                code_target(rng),
                u64::from(code_selector(case, rng)),
                popped_flags(rng),
                DATA + 0x800,
                u64::from(data_selector(rng)),
            ];
            poke_words(case, sp, instruction, &words);
        }
        M::Jmp | M::Call if instruction.op0_kind() == OpKind::Memory => {
            poke(case, at, &code_target(rng).to_le_bytes());
            if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() {
                let offset = memory_bytes(instruction).saturating_sub(2);
                let selector = code_selector(case, rng);
                poke(case, at.wrapping_add(offset), &selector.to_le_bytes());
            }
        }
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => {
            let offset = memory_bytes(instruction).saturating_sub(2);
            poke(case, at.wrapping_add(offset), &data_selector(rng).to_le_bytes());
        }
        M::Cmpxchg if rng.chance(60) => {
            let value = case.gpr[gpr::RAX].to_le_bytes();
            let size = (memory_bytes(instruction) as usize).min(8);
            poke(case, at, &value[..size]);
        }
        M::Cmpxchg8b | M::Cmpxchg16b if rng.chance(60) => {
            let size = memory_bytes(instruction) as usize / 2;
            let (low, high) = (case.gpr[gpr::RAX], case.gpr[gpr::RDX]);
            poke(case, at, &low.to_le_bytes()[..size.min(8)]);
            poke(case, at + size as u64, &high.to_le_bytes()[..size.min(8)]);
        }
        M::Ldmxcsr | M::Vldmxcsr if rng.chance(70) => {
            poke(case, at, &(rng.bits() as u32 & 0xffff).to_le_bytes());
        }
        M::Fxrstor | M::Fxrstor64 if rng.chance(85) => {
            let image = crate::values::random_case(rng, case.wide).fpu;
            poke(case, at, &image.0[..464]);
        }
        M::Fldcw if rng.chance(70) => poke(case, at, &0x037fu16.to_le_bytes()),
        M::Bound => {
            let index = get(case, instruction.op0_register()) as u32;
            let bounds = [index.wrapping_sub(rng.below(3) as u32), index.wrapping_add(5)];
            for (n, bound) in bounds.into_iter().enumerate() {
                let half = memory_bytes(instruction) / 2;
                poke(case, at + half * n as u64, &bound.to_le_bytes()[..half as usize]);
            }
        }
        _ => {}
    }
}

/// Stack words of the instruction's operand size.
fn poke_words(case: &mut Case, sp: u64, instruction: &Instruction, words: &[u64]) {
    let size = match instruction.code().op_code().operand_size() {
        16 => 2,
        64 => 8,
        _ => 4,
    };
    for (n, word) in words.iter().enumerate() {
        poke(case, sp.wrapping_add(size * n as u64), &word.to_le_bytes()[..size as usize]);
    }
}
