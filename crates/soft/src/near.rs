//! PUSH, POP, LEAVE, near CALL and near RET for stacks that translated code does not handle
//! itself: 16-bit stacks, and stack segments with limits.
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::operand::mask;
use crate::stack::Stack;
use crate::translate::classify::{Class, classify};
use arch::registers::gpr::RBP;
use iced_x86::{Instruction, OpKind};

/// Executes one of them.
///
/// # Errors
/// Stack and operand faults, with nothing changed.
pub fn execute(cpu: &mut Cpu, insn: &Instruction, class: Class) -> Result<Flow, Exception> {
    let size = operand_size(insn);
    let mut stack = Stack::current(cpu);
    match class {
        Class::Push | Class::PushMemory => {
            let value = cpu.operand(insn, 0, size)?;
            stack.push(cpu, value, size)?;
            stack.commit(cpu);
            Ok(Flow::Next)
        }
        Class::Pop => {
            let value = stack.pop(cpu, size)?;
            stack.commit(cpu);
            cpu.set_register(insn.op0_register(), value);
            Ok(Flow::Next)
        }
        Class::Leave => {
            stack.sp = (stack.sp & !stack.mask()) | (cpu.gpr[RBP] & stack.mask());
            let value = stack.pop(cpu, size)?;
            stack.commit(cpu);
            cpu.set_gpr(RBP, size, value);
            Ok(Flow::Next)
        }
        Class::Call => {
            stack.push(cpu, cpu.next_rip, size)?;
            jump(cpu, stack, insn.near_branch_target() & mask(size))
        }
        Class::CallIndirect => {
            let target = cpu.operand(insn, 0, size)?;
            stack.push(cpu, cpu.next_rip, size)?;
            jump(cpu, stack, target & mask(size))
        }
        Class::Return => {
            let target = stack.pop(cpu, size)?;
            if insn.op_count() > 0 {
                stack.skip(u64::from(insn.immediate16()));
            }
            jump(cpu, stack, target)
        }
        _ => Err(Exception::INVALID_OPCODE),
    }
}

/// Goes to `target` if it may be fetched from, the stack pointer being as `stack` has it.
fn jump(cpu: &mut Cpu, stack: Stack, target: u64) -> Result<Flow, Exception> {
    cpu.code_address(target)?;
    stack.commit(cpu);
    cpu.rip = target;
    Ok(Flow::Jump)
}

fn operand_size(insn: &Instruction) -> usize {
    use iced_x86::Code;
    match insn.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        Code::Leaveq => 8,
        _ => {
            let immediate = insn.op_count() > 0 && insn.op_kind(0) == OpKind::Immediate16;
            let extra = match classify(insn) {
                Class::Return if immediate => usize::from(insn.immediate16()),
                _ => 0,
            };
            insn.stack_pointer_increment().unsigned_abs() as usize - extra
        }
    }
}
