//! Blocks that compare their code on entry, and immediate operands that are loaded from the
//! guest's code at run time: see `rewritten`.
use super::asm::{Fixup, Mem, Reg, Width, cc, op};
use super::control::Successor;
use super::layout::{self, ADDRESS, SCRATCH};
use super::native::NotEncodable;
use super::{Cold, EdgeKind, Emitter, FlagsIn};
use crate::mode::Mode;
use crate::rewritten::Check;
use crate::translate::classify::Class;
use crate::translate::flags::{ALL, Effect};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// An operand in the guest's code.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Host address.
    pub host: u64,
    /// 1, 4 or 8 bytes.
    pub len: u8,
}

/// Whether the constant of an instruction can be loaded at run time.
pub fn can_vary(insn: &Instruction, class: Class, mode: Mode) -> bool {
    match class {
        Class::Jump | Class::Call => mode.is_64() && insn.op0_kind() == OpKind::NearBranch64,
        Class::Native => opcode(insn).is_some(),
        _ => false,
    }
}

/// The opcode with a register in place of the immediate, for operands of 32 and 64 bits.
fn opcode(insn: &Instruction) -> Option<u8> {
    use OpKind as K;
    let size = match insn.op0_kind() {
        K::Register => {
            let register = insn.op0_register();
            let home = register.is_gpr().then(|| register.full_register().number())?;
            layout::host(home)?;
            register.size()
        }
        K::Memory => insn.memory_size().size(),
        _ => return None,
    };
    let immediate = matches!(
        insn.op1_kind(),
        K::Immediate32
            | K::Immediate32to64
            | K::Immediate64
            | K::Immediate8to32
            | K::Immediate8to64
    );
    if insn.op_count() != 2 || !immediate || !matches!(size, 4 | 8) {
        return None;
    }
    Some(match insn.mnemonic() {
        Mnemonic::Add => 0x01,
        Mnemonic::Or => 0x09,
        Mnemonic::Adc => 0x11,
        Mnemonic::Sbb => 0x19,
        Mnemonic::And => 0x21,
        Mnemonic::Sub => 0x29,
        Mnemonic::Xor => 0x31,
        Mnemonic::Cmp => 0x39,
        Mnemonic::Test => 0x85,
        Mnemonic::Mov => 0x89,
        _ => return None,
    })
}

impl Emitter<'_> {
    /// The entry of a checked block: saves the flags, and goes elsewhere unless the code is what
    /// it was. `poll` as for other blocks.
    pub(super) fn check(&mut self, checks: &[Check]) {
        let mut stale = Vec::new();
        for check in checks {
            self.asm.mov_imm(ADDRESS, check.host);
            let mut at = 0;
            while at < check.bytes.len() {
                at += self.compare(check, at, &mut stale);
            }
        }
        let position = self.positions.len() - 1;
        self.cold.push(Cold::Stale { stale, position });
    }

    /// Compares the widest piece at `at` that counts; returns how far to go on.
    fn compare(&mut self, check: &Check, at: usize, stale: &mut Vec<Fixup>) -> usize {
        let fixed = (at..check.bytes.len()).take_while(|&n| check.fixed(n)).count();
        let len = match fixed {
            0 => return 1,
            1 => 1,
            2 | 3 => 2,
            4..=7 => 4,
            _ => 8,
        };
        let mut value = [0; 8];
        if let Some(bytes) = check.bytes.get(at..at + len) {
            value[..len].copy_from_slice(bytes);
        }
        let value = u64::from_le_bytes(value);
        let place = Mem::at(ADDRESS, at as i32);
        match len {
            8 => {
                self.asm.mov_imm(SCRATCH, value);
                self.asm.rm(Width::W64, &[0x39], SCRATCH, place);
            }
            4 => {
                self.asm.rm(Width::W32, &[0x81], Reg(7), place);
                self.asm.raw(&(value as u32).to_le_bytes());
            }
            2 => {
                self.asm.rm(Width::W16, &[0x81], Reg(7), place);
                self.asm.raw(&(value as u16).to_le_bytes());
            }
            _ => {
                self.asm.rm(Width::W32, &[0x80], Reg(7), place);
                self.asm.raw(&[value as u8]);
            }
        }
        stale.push(self.asm.jcc(cc::NE));
        len
    }

    /// The code has changed: on to the next version, or to the run loop.
    pub(super) fn place_stale(&mut self, stale: Vec<Fixup>, position: usize) {
        self.resume_position(position);
        stale.into_iter().for_each(|fixup| self.asm.bind(fixup));
        self.need_flags();
        let here = Successor { pc: self.context.pc, live: ALL, near: true };
        let edge = self.new_edge(here);
        let fixup = self.asm.jmp();
        if self.context.linkable
            && let Some(spec) = self.edges.get_mut(edge)
        {
            spec.kind = EdgeKind::Stale(fixup.0 as u32);
        }
        self.place_edge(Some(fixup), edge, FlagsIn::Host);
    }

    /// Loads the operand, sign-extended to `width`, to RSI.
    fn load_variable(&mut self, variable: Variable, width: Width) {
        self.asm.mov_imm(SCRATCH, variable.host);
        let place = Mem::at(SCRATCH, 0);
        match (variable.len, width) {
            (1, _) => self.asm.rm(width, op::MOVSX8, SCRATCH, place),
            (4, Width::W64) => self.asm.rm(width, op::MOVSXD, SCRATCH, place),
            _ => self.asm.load(width, SCRATCH, place),
        }
    }

    /// An instruction that runs as it is but for its immediate operand.
    pub fn native_variable(
        &mut self,
        insn: &Instruction,
        effect: Effect,
        variable: Variable,
    ) -> Result<(), NotEncodable> {
        let opcode = [opcode(insn).ok_or(NotEncodable)?];
        if insn.op0_kind() == OpKind::Memory {
            let operand = self.operands.memory(insn).ok_or(NotEncodable)?;
            let width = if operand.size == 8 { Width::W64 } else { Width::W32 };
            let place = self.open(insn, operand);
            self.flags_for(effect);
            self.load_variable(variable, width);
            if insn.has_lock_prefix() {
                self.asm.raw(&[0xf0]);
            }
            self.asm.rm(width, &opcode, SCRATCH, place.mem());
            self.flags_after(effect);
            self.mark();
            self.close(place);
            return Ok(());
        }
        let target = insn.op0_register();
        let width = if target.size() == 8 { Width::W64 } else { Width::W32 };
        let home = layout::host(target.full_register().number()).ok_or(NotEncodable)?;
        self.flags_for(effect);
        self.load_variable(variable, width);
        self.asm.rr(width, &opcode, SCRATCH, home);
        self.flags_after(effect);
        Ok(())
    }

    /// A direct near CALL or JMP whose displacement is loaded.
    pub fn transfer_variable(&mut self, insn: &Instruction, variable: Variable) {
        self.free_flags(ALL);
        self.holds = None;
        self.load_variable(variable, Width::W64);
        self.asm.mov_imm(ADDRESS, insn.next_ip());
        self.asm.lea(Width::W64, ADDRESS, Mem::indexed(ADDRESS, SCRATCH, 0, 0));
        if insn.code() == Code::Call_rel32_64 {
            self.push_return_address(insn);
        }
        self.go_indirect();
    }
}
