//! Instructions of old: decimal arithmetic, PUSHA, BOUND, ENTER, XLAT (Intel SDM 2A, 2B).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::operand::{mask, operand_segment, sign_extend};
use crate::stack::Stack;
use arch::registers::gpr::{RAX, RBP, RBX, RSP};
use arch::registers::rflags;
use iced_x86::{Code, Instruction, Mnemonic, Register};

/// Replaces flags: those in `affected` become what `value` says.
fn flags(cpu: &mut Cpu, affected: u64, value: u64) {
    cpu.rflags = (cpu.rflags & !affected) | (value & affected);
}

/// SF, ZF and PF of a byte.
fn byte_flags(value: u8) -> u64 {
    let mut bits = 0;
    if value >> 7 != 0 {
        bits |= rflags::SF;
    }
    if value == 0 {
        bits |= rflags::ZF;
    }
    if value.count_ones().is_multiple_of(2) {
        bits |= rflags::PF;
    }
    bits
}

/// The result of an adjustment: AX and the six arithmetic flags. Flags that the manual leaves
/// undefined come out as those of the addition or subtraction that adjusts AL, as on AMD's CPUs.
type Adjusted = (u16, u64);

/// OF of `al` plus or minus `by`, giving `result`.
fn overflow(al: u8, by: u8, result: u8, subtract: bool) -> u64 {
    let same = if subtract { al ^ by } else { !(al ^ by) };
    if same & (al ^ result) & 0x80 != 0 { rflags::OF } else { 0 }
}

/// AAA (`subtract` clear) and AAS (set): their flags are those of 16 bits.
fn ascii_adjust(ax: u16, before: u64, subtract: bool) -> Adjusted {
    let carry = ax & 0xf > 9 || before & rflags::AF != 0;
    let by = if carry { 0x106 } else { 0 };
    let full = if subtract { ax.wrapping_sub(by) } else { ax.wrapping_add(by) };
    let [low, high] = full.to_le_bytes();
    let mut result = byte_flags(low) & rflags::PF;
    if full == 0 {
        result |= rflags::ZF;
    }
    result |= byte_flags(high) & rflags::SF;
    // 0106H is positive, so only the sign of AX can overflow.
    let from = if subtract { ax & !full } else { !ax & full };
    if from >> 15 != 0 {
        result |= rflags::OF;
    }
    if carry {
        result |= rflags::AF | rflags::CF;
    }
    (full & 0xff0f, result)
}

/// DAA and DAS.
fn decimal_adjust(ax: u16, before: u64, subtract: bool) -> Adjusted {
    let old = ax as u8;
    let mut by = 0u8;
    let mut result = 0;
    let old_carry = before & rflags::CF != 0;
    if old & 0xf > 9 || before & rflags::AF != 0 {
        let borrow = if subtract { old < 6 } else { old > 0xf9 };
        by = 6;
        result |= rflags::AF;
        if old_carry || borrow {
            result |= rflags::CF;
        }
    }
    if old > 0x99 || old_carry {
        by += 0x60;
        result |= rflags::CF;
    } else if !subtract {
        result &= !rflags::CF;
    }
    let al = if subtract { old.wrapping_sub(by) } else { old.wrapping_add(by) };
    result |= byte_flags(al) | overflow(old, by, al, subtract);
    ((ax & 0xff00) | u16::from(al), result)
}

/// AAD: AL plus AH times the base, with the flags of that addition.
fn ascii_to_binary(ax: u16, base: u8) -> Adjusted {
    let old = ax as u8;
    let by = ((ax >> 8) as u8).wrapping_mul(base);
    let (al, carry) = old.overflowing_add(by);
    let mut result = byte_flags(al) | overflow(old, by, al, false);
    if carry {
        result |= rflags::CF;
    }
    if (old ^ by ^ al) & 0x10 != 0 {
        result |= rflags::AF;
    }
    (u16::from(al), result)
}

/// AAA, AAS, DAA, DAS, AAM, AAD.
pub(crate) fn bcd(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let ax = cpu.gpr[RAX] as u16;
    let before = cpu.rflags;
    let (ax, result) = match insn.mnemonic() {
        Mnemonic::Aaa => ascii_adjust(ax, before, false),
        Mnemonic::Aas => ascii_adjust(ax, before, true),
        Mnemonic::Daa => decimal_adjust(ax, before, false),
        Mnemonic::Das => decimal_adjust(ax, before, true),
        Mnemonic::Aam => {
            let base = u16::from(insn.immediate8());
            if base == 0 {
                return Err(Exception::DIVIDE);
            }
            let al = ax & 0xff;
            let ax = ((al / base) << 8) | (al % base);
            (ax, byte_flags(ax as u8))
        }
        _ => ascii_to_binary(ax, insn.immediate8()),
    };
    cpu.set_gpr(RAX, 2, u64::from(ax));
    flags(cpu, rflags::ARITHMETIC, result);
    Ok(Flow::Next)
}

/// SALC: AL becomes all copies of the carry flag.
pub(crate) fn salc(cpu: &mut Cpu) -> Done {
    let value = if cpu.rflags & rflags::CF != 0 { 0xff } else { 0 };
    cpu.set_gpr(RAX, 1, value);
    Ok(Flow::Next)
}

/// XLAT: AL becomes the byte at (R/E)BX + AL.
pub(crate) fn xlat(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let m = match insn.memory_base() {
        Register::BX => 0xffff,
        Register::EBX => 0xffff_ffff,
        _ => u64::MAX,
    };
    let offset = cpu.gpr[RBX].wrapping_add(cpu.gpr[RAX] & 0xff) & m;
    let value = cpu.load_operand(operand_segment(insn, cpu.mode.is_64()), offset, 1)?;
    cpu.set_gpr(RAX, 1, value);
    Ok(Flow::Next)
}

/// BOUND: #BR where the index lies outside the pair in memory.
pub(crate) fn bound(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let register = insn.op0_register();
    let size = register.size();
    let signed = |v: u64| sign_extend(v, size) as i64;
    let index = signed(cpu.register(register));
    let lower = signed(cpu.operand_field(insn, 0, size)?);
    let upper = signed(cpu.operand_field(insn, size as u64, size)?);
    if index < lower || index > upper {
        return Err(Exception::BOUND);
    }
    Ok(Flow::Next)
}

/// PUSHA and PUSHAD.
pub(crate) fn pusha(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = if insn.mnemonic() == Mnemonic::Pusha { 2 } else { 4 };
    let mut stack = Stack::current(cpu);
    for n in 0..8 {
        // The SP pushed is the one before; `gpr` holds it until the commit.
        stack.push(cpu, cpu.gpr[n], size)?;
    }
    stack.commit(cpu);
    Ok(Flow::Next)
}

/// POPA and POPAD; the value for SP is dropped.
pub(crate) fn popa(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = if insn.mnemonic() == Mnemonic::Popa { 2 } else { 4 };
    let mut stack = Stack::current(cpu);
    let mut values = [0; 8];
    for value in values.iter_mut().rev() {
        *value = stack.pop(cpu, size)?;
    }
    stack.commit(cpu);
    for (n, value) in values.into_iter().enumerate() {
        if n != RSP {
            cpu.set_gpr(n, size, value);
        }
    }
    Ok(Flow::Next)
}

/// ENTER with all nesting levels.
pub(crate) fn enter(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = match insn.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let bytes = u64::from(insn.immediate16());
    let level = insn.immediate8_2nd() & 31;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, cpu.gpr[RBP], size)?;
    let frame = stack.sp;
    if level > 0 {
        let mut display = stack;
        display.sp = cpu.gpr[RBP];
        for n in 1..level {
            let below = (u64::from(n) * size as u64).wrapping_neg();
            let value = display.peek(cpu, below, size)?;
            stack.push(cpu, value, size)?;
        }
        stack.push(cpu, frame, size)?;
    }
    stack.skip(bytes.wrapping_neg());
    // The new top of stack must be writable, although nothing is written.
    let mut probe = stack;
    probe.skip(size as u64);
    probe.check_push(cpu, size)?;
    stack.commit(cpu);
    cpu.set_gpr(RBP, size, frame & mask(size));
    Ok(Flow::Next)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value 0–99 as packed decimal.
    fn packed(n: u8) -> u8 {
        ((n / 10) << 4) | (n % 10)
    }

    /// AF and CF of an 8-bit addition or subtraction.
    fn carries(a: u8, b: u8, subtract: bool) -> (u8, u64) {
        let (r, carry) = if subtract { a.overflowing_sub(b) } else { a.overflowing_add(b) };
        let mut f = if carry { rflags::CF } else { 0 };
        if (a ^ b ^ r) & 0x10 != 0 {
            f |= rflags::AF;
        }
        (r, f)
    }

    #[test]
    fn daa_after_an_addition_gives_the_decimal_sum() {
        for a in 0..100u8 {
            for b in 0..100u8 {
                let (sum, f) = carries(packed(a), packed(b), false);
                let (ax, out) = decimal_adjust(u16::from(sum), f, false);
                assert_eq!(ax as u8, packed((a + b) % 100), "{a} + {b}");
                assert_eq!(out & rflags::CF != 0, a + b > 99, "{a} + {b}");
            }
        }
    }

    #[test]
    fn das_after_a_subtraction_gives_the_decimal_difference() {
        for a in 0..100u8 {
            for b in 0..100u8 {
                let (difference, f) = carries(packed(a), packed(b), true);
                let (ax, out) = decimal_adjust(u16::from(difference), f, true);
                assert_eq!(ax as u8, packed((100 + a - b) % 100), "{a} - {b}");
                assert_eq!(out & rflags::CF != 0, b > a, "{a} - {b}");
            }
        }
    }

    #[test]
    fn aaa_and_aas_carry_into_ah() {
        assert_eq!(ascii_adjust(0x000b, 0, false).0, 0x0101);
        assert_eq!(ascii_adjust(0x0305, 0, false).0, 0x0305);
        assert_eq!(ascii_adjust(0x02ff, rflags::AF, true).0, 0x0109);
        assert_ne!(ascii_adjust(0x000b, 0, false).1 & rflags::CF, 0);
    }
}
