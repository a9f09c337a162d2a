//! PUSH, POP, LEAVE and the stack side of CALL and RET, where the stack is flat: 64-bit mode, or
//! a 32-bit stack segment without limit checks. Elsewhere `near` does them.
use super::Emitter;
use super::asm::{Mem, Reg, Width};
use super::layout::{self, ADDRESS, GUEST_RSP, SCRATCH};
use crate::mode::{Mode, SegmentClass};
use crate::translate::classify::Operand;
use crate::translate::groups::Member;
use arch::SegmentName;
use iced_x86::{Instruction, OpKind, Register};

/// Whether translated code can handle the stack itself.
pub fn is_flat(mode: Mode) -> bool {
    mode.is_64()
        || (mode.stack32() && mode.segment(SegmentName::Ss as usize) != SegmentClass::Checked)
}

/// What to push.
#[derive(Clone, Copy)]
pub enum Source {
    /// A guest register.
    Register(Register),
    /// A constant, sign-extended from the operand size.
    Constant(u64),
    /// Spill slot 0.
    Spill,
}

impl Emitter<'_> {
    fn stack_width(&self) -> Width {
        if self.context.mode.is_64() { Width::W64 } else { Width::W32 }
    }

    /// Pushes `size` bytes (2, 4 or 8).
    pub fn push_value(&mut self, source: Source, size: u32) {
        let operand = Operand { size, reads: false, writes: true };
        let access = self.open_stack(GUEST_RSP, -(size as i32), operand);
        let place = access.mem();
        let store_width = operand_width(size);
        match source {
            Source::Register(r) => {
                let n = r.full_register().number();
                let from = layout::host(n).unwrap_or_else(|| {
                    self.asm.load(Width::W64, SCRATCH, layout::gpr(n));
                    SCRATCH
                });
                self.asm.store(store_width, place, from);
            }
            Source::Constant(value) => match i32::try_from(value as i64) {
                Ok(v) => self.asm.store_imm(store_width, place, v),
                Err(_) if size < 8 => self.asm.store_imm(store_width, place, value as i32),
                Err(_) => {
                    self.asm.mov_imm(SCRATCH, value);
                    self.asm.store(store_width, place, SCRATCH);
                }
            },
            Source::Spill => {
                self.asm.load(Width::W64, SCRATCH, layout::spill(0));
                self.asm.store(store_width, place, SCRATCH);
            }
        }
        self.move_stack(-(size as i32));
        self.close(access);
    }

    /// Moves RSP by `by`. In a run of pushes or pops of one group, none of which can fault, one
    /// addition for all of them follows the last.
    fn move_stack(&mut self, by: i32) {
        self.stack_moved += by;
        if self.stack_member.is_none() {
            self.settle_stack();
        }
    }

    /// Brings RSP up to date.
    pub fn settle_stack(&mut self) {
        let by = std::mem::take(&mut self.stack_moved);
        if by != 0 {
            let width = self.stack_width();
            self.asm.lea(width, GUEST_RSP, Mem::at(GUEST_RSP, by));
        }
    }

    /// PUSH of a register or an immediate.
    pub fn push(&mut self, insn: &Instruction) {
        let size = insn.stack_pointer_increment().unsigned_abs();
        let source = match insn.op_kind(0) {
            OpKind::Register => Source::Register(insn.op0_register()),
            kind => Source::Constant(immediate(insn, kind)),
        };
        self.push_value(source, size);
    }

    /// PUSH of memory.
    pub fn push_memory(&mut self, insn: &Instruction) {
        let size = insn.memory_size().size() as u32;
        self.load_operand(insn, size);
        self.asm.store(Width::W64, layout::spill(0), ADDRESS);
        self.push_value(Source::Spill, size);
    }

    /// Loads the memory operand, zero-extended, to RDI.
    pub fn load_operand(&mut self, insn: &Instruction, size: u32) {
        let operand = Operand { size, reads: true, writes: false };
        let place = self.open(insn, operand);
        self.load_zero_extended(ADDRESS, place.mem(), size);
        self.close(place);
    }

    /// Loads a value; RDI as the target no longer holds an address.
    fn load_zero_extended(&mut self, to: Reg, place: Mem, size: u32) {
        if to == ADDRESS {
            self.holds = None;
        }
        match size {
            2 => self.asm.rm(Width::W32, super::asm::op::MOVZX16, to, place),
            4 => self.asm.load(Width::W32, to, place),
            _ => self.asm.load(Width::W64, to, place),
        }
    }

    /// Loads the top of the stack, zero-extended, to a scratch register, and then moves RSP up by
    /// `size + extra`.
    pub fn pop_to(&mut self, to: Reg, size: u32, extra: u32) {
        let operand = Operand { size, reads: true, writes: false };
        let place = self.open_stack(GUEST_RSP, 0, operand);
        self.load_zero_extended(to, place.mem(), size);
        self.close(place);
        self.move_stack((size + extra) as i32);
    }

    /// POP of a register.
    pub fn pop(&mut self, insn: &Instruction) {
        let size = insn.stack_pointer_increment().unsigned_abs();
        let target = insn.op0_register();
        match layout::host(target.full_register().number()) {
            Some(home) if size >= 4 && home != GUEST_RSP => self.pop_to(home, size, 0),
            _ => {
                self.pop_to(SCRATCH, size, 0);
                self.settle_stack();
                self.write_gpr(target, SCRATCH);
            }
        }
    }

    /// Whether a PUSH or POP can do with an RSP that is out of date: it is not the first of its
    /// group, and RSP is not its operand.
    pub fn continues_group(insn: &Instruction, member: Option<Member>) -> bool {
        let names_rsp = insn.op_kind(0) == OpKind::Register
            && insn.op0_register().full_register() == Register::RSP;
        member.is_some_and(|m| !m.first) && !names_rsp
    }

    /// LEAVE: RSP from RBP, then POP RBP.
    pub fn leave(&mut self, insn: &Instruction) {
        // The increment of LEAVE is not a constant for iced; the operand size is that of its code.
        let size = match insn.code() {
            iced_x86::Code::Leavew => 2,
            iced_x86::Code::Leaved => 4,
            _ => 8,
        };
        let operand = Operand { size, reads: true, writes: false };
        let width = self.stack_width();
        let place = self.open_stack(Reg::RBP, 0, operand);
        self.load_zero_extended(ADDRESS, place.mem(), size);
        self.close(place);
        self.asm.lea(width, GUEST_RSP, Mem::at(Reg::RBP, size as i32));
        let target = super::native::sized(5, size as usize);
        self.write_gpr(target, ADDRESS);
    }
}

fn operand_width(size: u32) -> Width {
    match size {
        2 => Width::W16,
        4 => Width::W32,
        _ => Width::W64,
    }
}

fn immediate(insn: &Instruction, kind: OpKind) -> u64 {
    match kind {
        OpKind::Immediate8to16 => insn.immediate8to16() as u64,
        OpKind::Immediate8to32 => insn.immediate8to32() as u64,
        OpKind::Immediate8to64 => insn.immediate8to64() as u64,
        OpKind::Immediate32to64 => insn.immediate32to64() as u64,
        OpKind::Immediate16 => u64::from(insn.immediate16()),
        OpKind::Immediate32 => u64::from(insn.immediate32()),
        _ => u64::from(insn.immediate8()),
    }
}
