//! Vector instructions that touch several places of memory: gathers and masked moves
//! (Intel SDM 2B MASKMOVDQU, MASKMOVQ; 2C VGATHER, VMASKMOV, VPGATHER, VPMASKMOV).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::fpu::{XMM, check_pending, fpu_allowed, x87_from_area, x87_to_area};
use crate::mmu::As;
use crate::mode::MmuIndex;
use crate::operand::operand_segment;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

const YMM_HIGH: usize = 576;

/// A vector register's 32 bytes.
fn read_vector(cpu: &Cpu, register: Register) -> [u8; 32] {
    let n = register.number() & 15;
    let area = &cpu.area.0;
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&area[XMM + 16 * n..XMM + 16 * n + 16]);
    bytes[16..].copy_from_slice(&area[YMM_HIGH + 16 * n..YMM_HIGH + 16 * n + 16]);
    bytes
}

fn write_vector(cpu: &mut Cpu, register: Register, bytes: &[u8; 32]) {
    let n = register.number() & 15;
    let area = &mut cpu.area.0;
    area[XMM + 16 * n..XMM + 16 * n + 16].copy_from_slice(&bytes[..16]);
    area[YMM_HIGH + 16 * n..YMM_HIGH + 16 * n + 16].copy_from_slice(&bytes[16..]);
}

fn element(bytes: &[u8; 32], n: usize, size: usize) -> u64 {
    let part = bytes.get(n * size..(n + 1) * size).unwrap_or(&[]);
    part.iter().rev().fold(0, |value, b| value << 8 | u64::from(*b))
}

fn set_element(bytes: &mut [u8; 32], n: usize, size: usize, value: u64) {
    if let Some(part) = bytes.get_mut(n * size..(n + 1) * size) {
        part.copy_from_slice(&value.to_le_bytes()[..size]);
    }
}

/// Whether the mask has element `n`: its highest bit.
fn selected(mask: &[u8; 32], n: usize, size: usize) -> bool {
    mask.get((n + 1) * size - 1).is_some_and(|b| b >> 7 != 0)
}

/// Runs `body` with alignment checks off: these instructions do not make them.
fn unaligned(cpu: &mut Cpu, body: impl FnOnce(&mut Cpu) -> Done) -> Done {
    let mode = cpu.mode;
    if mode.mmu() == MmuIndex::Aligned {
        // The same rights, without the checks: the index is in bits 5 and 6.
        cpu.mode.0 &= !((MmuIndex::Aligned as u32) << 5);
    }
    let flow = body(cpu);
    cpu.mode = mode;
    flow
}

/// All masked moves.
pub(crate) fn masked_move(cpu: &mut Cpu, insn: &Instruction) -> Done {
    fpu_allowed(cpu.mode, insn)?;
    unaligned(cpu, |cpu| any_masked_move(cpu, insn))
}

fn any_masked_move(cpu: &mut Cpu, insn: &Instruction) -> Done {
    match insn.mnemonic() {
        M::Maskmovq => masked_mmx_store(cpu, insn),
        M::Maskmovdqu | M::Vmaskmovdqu => {
            let data = read_vector(cpu, insn.op1_register());
            let mask = read_vector(cpu, insn.op2_register());
            masked_store(cpu, insn, &data, &mask, 16, 1)
        }
        other => {
            let size = if matches!(other, M::Vmaskmovps | M::Vpmaskmovd) { 4 } else { 8 };
            if insn.op_kind(0) == OpKind::Register {
                return masked_load(cpu, insn, size);
            }
            let mask = read_vector(cpu, insn.op1_register());
            let data = read_vector(cpu, insn.op2_register());
            let bytes = insn.op2_register().size();
            masked_store(cpu, insn, &data, &mask, bytes, size)
        }
    }
}

/// Linear address of element `n` of the memory operand.
fn place(
    cpu: &Cpu,
    insn: &Instruction,
    offset: u64,
    n: usize,
    size: usize,
    write: bool,
) -> Result<u64, Exception> {
    let at = offset.wrapping_add((n * size) as u64) & cpu.address_mask();
    cpu.linear(operand_segment(insn, cpu.mode.is_64()), at, size as u64, write)
}

/// Stores the selected elements; all places are checked before the first is written.
fn masked_store(
    cpu: &mut Cpu,
    insn: &Instruction,
    data: &[u8; 32],
    mask: &[u8; 32],
    bytes: usize,
    size: usize,
) -> Done {
    let offset = cpu.offset_of(insn);
    let elements = || (0..bytes / size).filter(|&n| selected(mask, n, size));
    for n in elements() {
        let address = place(cpu, insn, offset, n, size, true)?;
        cpu.probe_store(address, size, As::Current)?;
    }
    for n in elements() {
        let address = place(cpu, insn, offset, n, size, true)?;
        cpu.store_value(address, element(data, n, size), size, As::Current)?;
    }
    Ok(Flow::Next)
}

/// MASKMOVQ: its registers are the host's MMX registers, and using them sets the x87 tags.
fn masked_mmx_store(cpu: &mut Cpu, insn: &Instruction) -> Done {
    check_pending()?;
    x87_to_area(cpu);
    // Images hold the stack's order: register n is the one `TOP` places before.
    let top = usize::from(cpu.area.0[3] >> 3 & 7);
    let mmx = |register: Register| {
        let at = 32 + 16 * ((register.number() + 8 - top) & 7);
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&cpu.area.0[at..at + 8]);
        bytes
    };
    let (data, mask) = (mmx(insn.op1_register()), mmx(insn.op2_register()));
    // TOP becomes 0; stack positions turn with it, so that MM0 stays physical register 0. This
    // happens even if the store faults, as on CPUs.
    let area = &mut cpu.area.0;
    area[32..160].rotate_right(16 * top);
    area[3] &= !0x38;
    area[4] = 0xff;
    x87_from_area(cpu);
    masked_store(cpu, insn, &data, &mask, 8, 1)
}

fn masked_load(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Done {
    let offset = cpu.offset_of(insn);
    let mask = read_vector(cpu, insn.op1_register());
    let mut result = [0; 32];
    for n in (0..insn.op0_register().size() / size).filter(|&n| selected(&mask, n, size)) {
        let address = place(cpu, insn, offset, n, size, false)?;
        let value = cpu.load_value(address, size, As::Current)?;
        set_element(&mut result, n, size, value);
    }
    write_vector(cpu, insn.op0_register(), &result);
    Ok(Flow::Next)
}

/// VGATHER and VPGATHER: a fault leaves the elements gathered so far, with their mask bits clear.
pub(crate) fn gather(cpu: &mut Cpu, insn: &Instruction) -> Done {
    fpu_allowed(cpu.mode, insn)?;
    unaligned(cpu, |cpu| gather_elements(cpu, insn))
}

fn gather_elements(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let (target, mask_register) = (insn.op0_register(), insn.op2_register());
    let index = insn.memory_index();
    let numbers = [target.number(), mask_register.number(), index.number()];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(Exception::INVALID_OPCODE);
    }
    let size = match insn.mnemonic() {
        M::Vgatherdps | M::Vgatherqps | M::Vpgatherdd | M::Vpgatherqd => 4,
        _ => 8,
    };
    let index_size = match insn.mnemonic() {
        M::Vgatherdps | M::Vgatherdpd | M::Vpgatherdd | M::Vpgatherdq => 4,
        _ => 8,
    };
    let count = (target.size() / size).min(index.size() / index_size);
    let indexes = read_vector(cpu, index);
    let mut result = read_vector(cpu, target);
    let mut mask = read_vector(cpu, mask_register);
    for n in 0..count {
        if !selected(&mask, n, size) {
            set_element(&mut mask, n, size, 0);
            continue;
        }
        let offset = cpu.element_offset(insn, 1, n, |_, i, _| element(&indexes, i, index_size));
        match cpu.load_operand(operand_segment(insn, cpu.mode.is_64()), offset, size) {
            Ok(value) => {
                set_element(&mut result, n, size, value);
                set_element(&mut mask, n, size, 0);
            }
            Err(fault) => {
                write_vector(cpu, target, &result);
                write_vector(cpu, mask_register, &mask);
                return Err(fault);
            }
        }
    }
    result[count * size..].fill(0);
    write_vector(cpu, target, &result);
    write_vector(cpu, mask_register, &[0; 32]);
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_selected_by_the_highest_bit_of_its_mask() {
        let mut mask = [0x7f; 32];
        mask[7] = 0x80;
        assert!(selected(&mask, 1, 4));
        assert!(!selected(&mask, 0, 4));
        assert!(selected(&mask, 0, 8));
    }

    #[test]
    fn elements_keep_their_byte_order() {
        let mut bytes = [0; 32];
        set_element(&mut bytes, 2, 4, 0x1122_3344);
        assert_eq!(bytes[8..12], [0x44, 0x33, 0x22, 0x11]);
        assert_eq!(element(&bytes, 2, 4), 0x1122_3344);
    }
}
