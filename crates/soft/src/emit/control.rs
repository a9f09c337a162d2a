//! Ends of blocks: branches, calls, returns, and the edges between blocks.
use super::asm::{Fixup, Mem, Reg, Width, cc};
use super::layout::{self, ADDRESS, SCRATCH};
use super::stack::Source;
use super::{Cold, EdgeKind, EdgeSpec, Emitter, FlagsIn};
use crate::cpu::JUMP_CACHE_ENTRIES;
use crate::thunks::index;
use crate::translate::flags::{ALL, Flags};
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};

/// Where a block goes on, and which flags live there.
#[derive(Clone, Copy, Debug, Default)]
pub struct Successor {
    /// Guest address.
    pub pc: u64,
    /// Flags that code there reads before it writes them.
    pub live: Flags,
    /// Whether it is on the same page as the block, so that its translation cannot change.
    pub near: bool,
}

impl Emitter<'_> {
    /// Makes the flags right for an edge into code in which `live` ones are live.
    fn flags_for_edge(&mut self, live: Flags) {
        if live != 0 || self.context.precise {
            self.need_flags();
        }
    }

    pub(super) fn new_edge(&mut self, successor: Successor) -> usize {
        let kind = if !self.context.linkable {
            EdgeKind::Always
        } else if successor.near {
            EdgeKind::Near(0)
        } else {
            let cell = self.context.first_cell + self.cells;
            self.cells += 1;
            EdgeKind::Far(cell)
        };
        self.edges.push(EdgeSpec { target: successor.pc, kind, stub: 0, live: successor.live });
        self.edges.len() - 1
    }

    /// The jump of an edge, unconditional.
    fn jump_edge(&mut self, edge: usize) {
        let flags = self.flags;
        match self.edges[edge].kind {
            EdgeKind::Far(cell) => {
                self.asm.jmp_mem(layout::cell(cell));
                let position = self.positions.len() - 1;
                self.cold.push(Cold::Edge { fixup: None, edge, flags, position });
            }
            _ => {
                let fixup = self.asm.jmp();
                self.near_edge(fixup, edge, flags);
            }
        }
    }

    fn near_edge(&mut self, fixup: Fixup, edge: usize, flags: FlagsIn) {
        if let EdgeKind::Near(at) = &mut self.edges[edge].kind {
            *at = fixup.0 as u32;
        }
        let position = self.positions.len() - 1;
        self.cold.push(Cold::Edge { fixup: Some(fixup), edge, flags, position });
    }

    /// Goes on at `successor`.
    pub fn go(&mut self, successor: Successor) {
        self.settle_stack();
        self.flags_for_edge(successor.live);
        let edge = self.new_edge(successor);
        self.jump_edge(edge);
    }

    pub(super) fn place_edge(&mut self, fixup: Option<Fixup>, edge: usize, flags: FlagsIn) {
        if let Some(fixup) = fixup {
            self.asm.bind(fixup);
        }
        self.edges[edge].stub = self.asm.here() as u32;
        self.asm.mov_imm(ADDRESS, u64::from(self.context.first_edge) + edge as u64);
        let thunk = match flags {
            FlagsIn::Host => index::LEAVE_EDGE,
            FlagsIn::Saved => index::LEAVE_EDGE_SAVED,
        };
        self.asm.jmp_mem(layout::thunk(thunk));
    }

    /// Jcc.
    pub fn branch(&mut self, insn: &Instruction, taken: Successor, other: Successor) {
        self.need_flags();
        let condition = condition(insn.condition_code());
        match self.around.filter(|_| taken.near && taken.pc == self.context.pc) {
            Some(start) => {
                let fixup = self.asm.jcc(condition);
                self.asm.bind_to(fixup, start);
            }
            None => self.conditional(condition, taken),
        }
        self.go(other);
    }

    /// A conditional jump along an edge.
    fn conditional(&mut self, condition: u8, successor: Successor) {
        let edge = self.new_edge(successor);
        let flags = self.flags;
        match self.edges[edge].kind {
            EdgeKind::Far(_) => {
                let skip = self.asm.jcc(condition ^ 1);
                self.jump_edge(edge);
                self.asm.bind(skip);
            }
            _ => {
                let fixup = self.asm.jcc(condition);
                self.near_edge(fixup, edge, flags);
            }
        }
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ, JECXZ, JRCXZ (Intel SDM 2A, LOOP): no flags change.
    pub fn loop_branch(&mut self, insn: &Instruction, taken: Successor, other: Successor) {
        self.need_flags();
        let counter = counter_size(insn.code());
        let counts = insn.is_loop() || insn.is_loopcc();
        if counts {
            let width = match counter {
                2 => Width::W16,
                4 => Width::W32,
                _ => Width::W64,
            };
            self.asm.lea(width, Reg::RCX, Mem::at(Reg::RCX, -1));
        }
        // The test is JRCXZ on a copy of the counter, with RCX kept in RSI meanwhile.
        self.asm.mov(Width::W64, SCRATCH, Reg::RCX);
        match counter {
            2 => self.asm.rr(Width::W32, super::asm::op::MOVZX16, Reg::RCX, Reg::RCX),
            4 => self.asm.mov(Width::W32, Reg::RCX, Reg::RCX),
            _ => {}
        }
        // jrcxz over the next jump (5 bytes).
        self.asm.raw(&[0xe3, 5]);
        let nonzero = self.asm.jmp();
        self.asm.mov(Width::W64, Reg::RCX, SCRATCH);
        let (if_zero, if_not) = if counts { (other, taken) } else { (taken, other) };
        self.go_keeping_flags(if_zero);
        self.asm.bind(nonzero);
        self.asm.mov(Width::W64, Reg::RCX, SCRATCH);
        match insn.mnemonic() {
            Mnemonic::Loope => self.conditional(cc::E, taken),
            Mnemonic::Loopne => self.conditional(cc::NE, taken),
            _ => return self.go(if_not),
        }
        self.go(other);
    }

    fn go_keeping_flags(&mut self, successor: Successor) {
        let flags = self.flags;
        self.go(successor);
        self.flags = flags;
    }

    /// Near direct CALL: `target`'s live flags flow through the push.
    pub fn call(&mut self, insn: &Instruction, target: Successor) {
        let size = insn.stack_pointer_increment().unsigned_abs();
        self.live_before |= target.live;
        self.push_value(Source::Constant(insn.next_ip()), size);
        self.go(target);
    }

    /// Near RET.
    pub fn ret(&mut self, insn: &Instruction) {
        let extra = if insn.op_count() > 0 { u32::from(insn.immediate16()) } else { 0 };
        let total = insn.stack_pointer_increment().unsigned_abs();
        self.free_flags(ALL);
        self.pop_to(ADDRESS, total.saturating_sub(extra), extra);
        self.go_indirect();
    }

    /// Near indirect JMP.
    pub fn jump_indirect(&mut self, insn: &Instruction) {
        self.free_flags(ALL);
        self.indirect_target(insn);
        self.go_indirect();
    }

    /// Near indirect CALL.
    pub fn call_indirect(&mut self, insn: &Instruction) {
        self.free_flags(ALL);
        self.indirect_target(insn);
        self.push_return_address(insn);
        self.go_indirect();
    }

    /// The push of a CALL to the address in RDI.
    pub(super) fn push_return_address(&mut self, insn: &Instruction) {
        let size = insn.stack_pointer_increment().unsigned_abs();
        self.asm.store(Width::W64, layout::spill(1), ADDRESS);
        self.push_value(Source::Constant(insn.next_ip()), size);
        self.holds = None;
        self.asm.load(Width::W64, ADDRESS, layout::spill(1));
    }

    /// The operand of an indirect transfer to RDI, zero-extended.
    fn indirect_target(&mut self, insn: &Instruction) {
        if insn.op_kind(0) == OpKind::Memory {
            let size = insn.memory_size().size() as u32;
            self.load_operand(insn, size);
            return;
        }
        let register: Register = insn.op0_register();
        self.holds = None;
        self.read_gpr(ADDRESS, register);
        match register.size() {
            2 => self.asm.rr(Width::W32, super::asm::op::MOVZX16, ADDRESS, ADDRESS),
            4 => self.asm.mov(Width::W32, ADDRESS, ADDRESS),
            _ => {}
        }
    }

    /// Jumps to the guest address in RDI through the jump cache (`cpu::jump_slot`).
    pub(super) fn go_indirect(&mut self) {
        self.settle_stack();
        if !self.context.linkable {
            self.asm.call_mem(layout::thunk(index::LEAVE_TRANSFER));
            return;
        }
        let mmu = self.context.mode.mmu() as usize;
        self.asm.mov(Width::W32, SCRATCH, ADDRESS);
        self.asm.shift_imm(Width::W32, 5, SCRATCH, 5);
        self.asm.rr(Width::W32, &[0x33], SCRATCH, ADDRESS);
        self.asm.alu_imm(Width::W32, 4, SCRATCH, JUMP_CACHE_ENTRIES as i32 - 1);
        let pc = Mem::indexed(Reg::RSP, SCRATCH, 3, layout::jump_pcs(mmu));
        self.asm.rm(Width::W64, &[0x3b], ADDRESS, pc);
        let miss = self.asm.jcc(cc::NE);
        self.asm.jmp_mem(Mem::indexed(Reg::RSP, SCRATCH, 3, layout::jump_hosts(mmu)));
        let position = self.positions.len() - 1;
        self.cold.push(Cold::Indirect { miss, position });
    }
}

/// The counter's size in bytes.
fn counter_size(code: Code) -> u32 {
    use Code as C;
    match code {
        C::Jcxz_rel8_16
        | C::Jcxz_rel8_32
        | C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX => 2,
        C::Jecxz_rel8_16
        | C::Jecxz_rel8_32
        | C::Jecxz_rel8_64
        | C::Loop_rel8_16_ECX
        | C::Loop_rel8_32_ECX
        | C::Loop_rel8_64_ECX
        | C::Loope_rel8_16_ECX
        | C::Loope_rel8_32_ECX
        | C::Loope_rel8_64_ECX
        | C::Loopne_rel8_16_ECX
        | C::Loopne_rel8_32_ECX
        | C::Loopne_rel8_64_ECX => 4,
        _ => 8,
    }
}

/// The hardware number of a condition.
fn condition(code: ConditionCode) -> u8 {
    use ConditionCode as C;
    match code {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e | C::None => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    }
}
