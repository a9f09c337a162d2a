//! Makes instructions of a given form, with operands that point somewhere interesting.
use crate::aim;
use crate::case::{CODE, CODE_SIZE, Case};
use crate::rng::Rng;
use crate::values::random_case;
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, MemorySize, OpCodeInfo,
    OpCodeOperandKind as K, OpKind, Register,
};

/// A case that runs one instruction of form `code`, or `None` where none could be encoded in
/// this mode.
pub fn generate(code: Code, wide: bool, rng: &mut Rng) -> Option<Case> {
    let info = code.op_code();
    if !(if wide { info.mode64() } else { info.mode32() }) {
        return None;
    }
    for _ in 0..24 {
        let mut case = random_case(rng, wide);
        if rng.chance(6) {
            // Straddles the two code pages, or runs into the unmapped page after them.
            let page = if rng.chance(75) { 0x1000 } else { CODE_SIZE as u64 };
            case.rip = CODE + page - 1 - rng.below(6);
        }
        let Some(instruction) = build(info, &case, rng) else { continue };
        let Ok(bytes) = encode(&instruction, &case) else { continue };
        let Some(decoded) = decode(&bytes, &case) else { continue };
        if decoded.code() != code || bytes.len() > 15 {
            continue;
        }
        place(&mut case, &bytes);
        aim::aim(&mut case, &decoded, rng);
        if !runs_forever(&case) {
            decorate(&mut case, &decoded, rng);
            return Some(case);
        }
    }
    None
}

/// The bytes of some instruction of form `code`, at the case's place and in its mode, whatever its
/// operands point at.
pub fn some_bytes(code: Code, case: &Case, rng: &mut Rng) -> Option<Vec<u8>> {
    (0..4).find_map(|_| encode(&build(code.op_code(), case, rng)?, case).ok())
}

fn place(case: &mut Case, bytes: &[u8]) {
    case.length = bytes.len().min(15);
    case.bytes = [0; 16];
    case.bytes[..case.length].copy_from_slice(&bytes[..case.length]);
}

fn bitness(case: &Case) -> u32 {
    if case.wide { 64 } else { 32 }
}

fn encode(instruction: &Instruction, case: &Case) -> Result<Vec<u8>, iced_x86::IcedError> {
    let mut encoder = Encoder::new(bitness(case));
    encoder.encode(instruction, case.rip)?;
    Ok(encoder.take_buffer())
}

/// The instruction in a case, as the decoder sees it.
pub fn decode(bytes: &[u8], case: &Case) -> Option<Instruction> {
    let mut decoder = Decoder::with_ip(bitness(case), bytes, case.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid() && instruction.len() == bytes.len()).then_some(instruction)
}

fn runs_forever(case: &Case) -> bool {
    decode(case.code(), case).is_some_and(|i| {
        let target = i.near_branch_target();
        target >= case.rip && target < case.rip + case.length as u64
    })
}

/// Legal and illegal prefixes: LOCK where it raises #UD, REP on strings, redundant segments.
fn decorate(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    let room = case.length < 15 && case.rip + 16 < CODE + CODE_SIZE as u64;
    // An instruction pointer-relative operand would move with the length.
    if room && rng.chance(3) && !instruction.is_ip_rel_memory_operand() {
        let prefix = rng.pick(&[0xf0, 0xf0, 0x2e, 0x3e, 0x26, 0x36]);
        if prefix != 0xf0 && !decodes_alike(case, instruction, prefix) {
            return;
        }
        case.bytes.copy_within(0..15, 1);
        case.bytes[0] = prefix;
        case.length += 1;
    }
}

fn decodes_alike(case: &Case, instruction: &Instruction, prefix: u8) -> bool {
    let mut bytes = vec![prefix];
    bytes.extend_from_slice(case.code());
    instruction.near_branch_target() == 0
        && instruction.segment_prefix() == Register::None
        && case.wide
        && decode(&bytes, case).is_some_and(|i| i.code() == instruction.code())
}

fn build(info: &OpCodeInfo, case: &Case, rng: &mut Rng) -> Option<Instruction> {
    let mut instruction = Instruction::default();
    instruction.set_code(info.code());
    for operand in 0..info.op_count() {
        set_operand(&mut instruction, info, operand, case, rng)?;
    }
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    if info.can_use_lock_prefix() && memory && rng.chance(35) {
        instruction.set_has_lock_prefix(true);
    }
    if info.can_use_rep_prefix() && rng.chance(60) {
        instruction.set_has_rep_prefix(true);
    } else if info.can_use_repne_prefix() && rng.chance(50) {
        instruction.set_has_repne_prefix(true);
    }
    Some(instruction)
}

/// A general register of the given width that this mode can name.
fn general(width: u32, case: &Case, rng: &mut Rng) -> Register {
    let count = if case.wide { 16 } else { 8 };
    let n = rng.below(count) as u32;
    match width {
        8 if case.wide => Register::AL + rng.below(20) as u32,
        8 => Register::AL + n,
        16 => Register::AX + n,
        32 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

fn vector(first: Register, case: &Case, rng: &mut Rng) -> Register {
    first + rng.below(if case.wide { 16 } else { 8 }) as u32
}

fn register_for(kind: K, case: &Case, rng: &mut Rng) -> Option<Register> {
    Some(match kind {
        K::r8_or_mem | K::r8_reg | K::r8_opcode => general(8, case, rng),
        K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => {
            general(16, case, rng)
        }
        K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
            general(32, case, rng)
        }
        K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
            general(64, case, rng)
        }
        K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + rng.below(8) as u32,
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
            vector(Register::XMM0, case, rng)
        }
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
            vector(Register::YMM0, case, rng)
        }
        K::seg_reg => rng.pick(&[
            Register::ES,
            Register::DS,
            Register::FS,
            Register::GS,
            Register::SS,
            Register::CS,
        ]),
        K::cr_reg => {
            rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4, Register::CR8])
        }
        K::dr_reg => Register::DR0 + rng.below(8) as u32,
        K::es => Register::ES,
        K::cs => Register::CS,
        K::ss => Register::SS,
        K::ds => Register::DS,
        K::fs => Register::FS,
        K::gs => Register::GS,
        K::al => Register::AL,
        K::cl => Register::CL,
        K::ax => Register::AX,
        K::dx => Register::DX,
        K::eax => Register::EAX,
        K::rax => Register::RAX,
        K::st0 => Register::ST0,
        K::sti_opcode => Register::ST0 + rng.below(8) as u32,
        _ => return None,
    })
}

fn set_operand(
    instruction: &mut Instruction,
    info: &OpCodeInfo,
    operand: u32,
    case: &Case,
    rng: &mut Rng,
) -> Option<()> {
    let kind = info.op_kind(operand);
    let or_memory = matches!(
        kind,
        K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
    );
    if or_memory && rng.chance(55) {
        return memory(instruction, operand, None, case, rng);
    }
    if let Some(register) = register_for(kind, case, rng) {
        instruction.set_op_kind(operand, OpKind::Register);
        instruction.set_op_register(operand, register);
        return Some(());
    }
    match kind {
        K::mem | K::mem_mib => return memory(instruction, operand, None, case, rng),
        K::mem_vsib32x | K::mem_vsib64x => {
            return memory(instruction, operand, Some(Register::XMM0), case, rng);
        }
        K::mem_vsib32y | K::mem_vsib64y => {
            return memory(instruction, operand, Some(Register::YMM0), case, rng);
        }
        K::mem_offs => {
            instruction.set_op_kind(operand, OpKind::Memory);
            instruction.set_memory_displ_size(if case.wide && rng.chance(80) { 8 } else { 4 });
            instruction.set_memory_displacement64(aim::somewhere(rng));
        }
        _ => return immediate_or_implied(instruction, info, operand, case, rng),
    }
    Some(())
}

fn immediate_or_implied(
    instruction: &mut Instruction,
    info: &OpCodeInfo,
    operand: u32,
    case: &Case,
    rng: &mut Rng,
) -> Option<()> {
    let word = rng.word();
    let immediate = |instruction: &mut Instruction, kind: OpKind, value: u64| {
        instruction.set_op_kind(operand, kind);
        instruction.set_immediate_u64(operand, value);
    };
    // The address size of string instructions: usually the mode's own.
    let narrow = rng.chance(15);
    let address = |kinds: [OpKind; 2]| kinds[usize::from(case.wide && !narrow)];
    match info.op_kind(operand) {
        K::imm8 => {
            // INT n would enter the host's kernel, or end the run like a breakpoint.
            let value = if matches!(info.code(), Code::Int_imm8 | Code::Int3)
                && matches!(word as u8, 0x80 | 3 | 4)
            {
                0x21
            } else {
                word & 0xff
            };
            // The second immediate of ENTER, EXTRQ and INSERTQ has a kind of its own.
            let second = operand > 0 && matches!(info.op_kind(operand - 1), K::imm8 | K::imm16);
            if second {
                instruction.set_op_kind(operand, OpKind::Immediate8_2nd);
                instruction.set_immediate8_2nd(value as u8);
            } else {
                immediate(instruction, OpKind::Immediate8, value);
            }
        }
        K::imm4_m2z => immediate(instruction, OpKind::Immediate8, word & 3),
        K::imm8_const_1 => immediate(instruction, OpKind::Immediate8, 1),
        K::imm8sex16 => {
            immediate(instruction, OpKind::Immediate8to16, word as i8 as i16 as u16 as u64);
        }
        K::imm8sex32 => {
            immediate(instruction, OpKind::Immediate8to32, word as i8 as i32 as u32 as u64);
        }
        K::imm8sex64 => immediate(instruction, OpKind::Immediate8to64, word as i8 as i64 as u64),
        K::imm16 => {
            // Far returns look at the stack beyond what they drop; keep that within the pages.
            let far =
                matches!(info.code(), Code::Retfw_imm16 | Code::Retfd_imm16 | Code::Retfq_imm16);
            let mask = if far { 0xff } else { 0xffff };
            immediate(instruction, OpKind::Immediate16, word & mask);
        }
        K::imm32 => immediate(instruction, OpKind::Immediate32, word & 0xffff_ffff),
        K::imm32sex64 => {
            immediate(instruction, OpKind::Immediate32to64, word as i32 as i64 as u64);
        }
        K::imm64 => immediate(instruction, OpKind::Immediate64, word),
        K::seg_rSI => {
            instruction.set_op_kind(operand, address([OpKind::MemorySegESI, OpKind::MemorySegRSI]))
        }
        K::es_rDI => {
            instruction.set_op_kind(operand, address([OpKind::MemoryESEDI, OpKind::MemoryESRDI]))
        }
        K::seg_rDI => {
            instruction.set_op_kind(operand, address([OpKind::MemorySegEDI, OpKind::MemorySegRDI]))
        }
        K::seg_rBX_al => {
            instruction.set_op_kind(operand, OpKind::Memory);
            instruction.set_memory_base(if case.wide && !narrow {
                Register::RBX
            } else {
                Register::EBX
            });
            instruction.set_memory_index(Register::AL);
        }
        K::br16_1 | K::br32_1 | K::br64_1 | K::br16_2 | K::br32_4 | K::br64_4 => {
            branch(instruction, info, operand, case, rng);
        }
        K::farbr4_2 | K::farbr2_2 => {
            let near = info.op_kind(operand) == K::farbr4_2;
            instruction
                .set_op_kind(operand, if near { OpKind::FarBranch32 } else { OpKind::FarBranch16 });
            instruction.set_far_branch_selector(aim::code_selector(case, rng));
            if near {
                instruction.set_far_branch32(aim::code_target(rng) as u32);
            } else {
                instruction.set_far_branch16(rng.bits() as u16);
            }
        }
        _ => return None,
    }
    Some(())
}

fn branch(
    instruction: &mut Instruction,
    info: &OpCodeInfo,
    operand: u32,
    case: &Case,
    rng: &mut Rng,
) {
    let kind = info.op_kind(operand);
    let short = matches!(kind, K::br16_1 | K::br32_1 | K::br64_1);
    let target = if short {
        case.rip.wrapping_add(2).wrapping_add(rng.bits() as i8 as i64 as u64)
    } else if rng.chance(85) {
        aim::code_target(rng)
    } else {
        case.rip.wrapping_add(rng.word() as i32 as i64 as u64)
    };
    match kind {
        K::br16_1 | K::br16_2 => {
            instruction.set_op_kind(operand, OpKind::NearBranch16);
            instruction.set_near_branch16(target as u16);
        }
        K::br32_1 | K::br32_4 => {
            instruction.set_op_kind(operand, OpKind::NearBranch32);
            instruction.set_near_branch32(target as u32);
        }
        _ => {
            instruction.set_op_kind(operand, OpKind::NearBranch64);
            instruction.set_near_branch64(target);
        }
    }
}

/// A memory operand of any shape; [`aim::aim`] gives its registers values.
fn memory(
    instruction: &mut Instruction,
    operand: u32,
    vsib: Option<Register>,
    case: &Case,
    rng: &mut Rng,
) -> Option<()> {
    instruction.set_op_kind(operand, OpKind::Memory);
    let narrow = !case.wide || rng.chance(12);
    let first = if narrow { Register::EAX } else { Register::RAX };
    let count = if case.wide { 16 } else { 8 };
    let pick = |rng: &mut Rng| first + rng.below(count) as u32;
    let shape = rng.below(100);
    if vsib.is_none() && shape < 10 && case.wide {
        instruction.set_memory_base(if narrow { Register::EIP } else { Register::RIP });
        instruction.set_memory_displ_size(if narrow { 4 } else { 8 });
        instruction.set_memory_displacement64(aim::somewhere(rng));
        return segment(instruction, case, rng);
    }
    let has_index = vsib.is_some() || (30..65).contains(&shape);
    let has_base = vsib.is_some() || shape >= 20;
    if has_base {
        instruction.set_memory_base(pick(rng));
    }
    if has_index {
        let index = match vsib {
            Some(bank) => vector(bank, case, rng),
            None => pick(rng),
        };
        if index == Register::RSP || index == Register::ESP || index == instruction.memory_base() {
            return None;
        }
        instruction.set_memory_index(index);
        instruction.set_memory_index_scale(1 << rng.below(4));
    }
    if !has_base || rng.chance(60) {
        let byte = has_base && rng.chance(60);
        let displacement = if !has_base && !has_index {
            aim::somewhere(rng)
        } else if byte {
            rng.bits() as i8 as i64 as u64
        } else if has_base {
            rng.bits() as i32 as i64 as u64
        } else {
            aim::somewhere(rng)
        };
        instruction.set_memory_displ_size(if byte {
            1
        } else if narrow {
            4
        } else {
            8
        });
        instruction.set_memory_displacement64(if narrow {
            displacement & 0xffff_ffff
        } else {
            displacement
        });
    }
    segment(instruction, case, rng)
}

fn segment(instruction: &mut Instruction, case: &Case, rng: &mut Rng) -> Option<()> {
    if case.wide && rng.chance(10) {
        instruction.set_segment_prefix(rng.pick(&[Register::FS, Register::GS]));
    } else if !case.wide && rng.chance(10) {
        instruction.set_segment_prefix(rng.pick(&[
            Register::ES,
            Register::DS,
            Register::SS,
            Register::CS,
        ]));
    }
    Some(())
}

/// Bytes of the memory operand, 0 where it has none.
pub fn memory_bytes(instruction: &Instruction) -> u64 {
    match instruction.memory_size() {
        MemorySize::Unknown => 0,
        size => size.size() as u64,
    }
}
