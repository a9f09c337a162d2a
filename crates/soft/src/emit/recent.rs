//! Probes of the page that was used last: for operands that mostly stay in one page.
//!
//! A slot of `Tlb::recent` belongs to the stack, or to a few places of translated code. To compare
//! with it takes less than to look in the TLB, since its place does not depend on the address. It
//! is filled from the TLB where that comparison fails.
use super::Emitter;
use super::asm::{Mem, Reg, Width, cc, op};
use super::layout::{self, ADDRESS, SCRATCH};
use super::memory::{Linear, Site};
use crate::helpers::AccessInfo;
use crate::thunks::index;
use crate::tlb::RECENT;
use crate::translate::classify::Operand;
use arch::SegmentName;
use iced_x86::{Instruction, Register};

/// Which operands of a block try a recent page before the TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recent {
    /// None.
    Nothing,
    /// Those on the stack.
    Stack,
    /// Also those with an index register, which are mostly of arrays: for loops.
    Arrays,
    /// All: for blocks that branch to themselves.
    All,
}

/// A slot of the recent pages.
#[derive(Clone, Copy)]
pub struct Slot {
    entry: Mem,
    /// How often it may be filled; the stack's may be at any time.
    patience: Option<Mem>,
}

/// The other half of an entry.
fn host(entry: Mem) -> Mem {
    Mem { disp: entry.disp + 8, ..entry }
}

impl Emitter<'_> {
    fn slot(&self, write: bool, n: usize) -> (Mem, Mem) {
        layout::recent(self.context.mode.mmu() as usize, write, n)
    }

    /// The slot of the stack.
    pub(super) fn stack_slot(&self, write: bool) -> Option<Slot> {
        let (entry, _) = self.slot(write, 0);
        (self.context.recent >= Recent::Stack).then_some(Slot { entry, patience: None })
    }

    /// The slot for a memory operand, if it is one that probably stays in its page.
    pub(super) fn recent_slot(&mut self, insn: &Instruction, write: bool) -> Option<Slot> {
        let indexed = insn.memory_index() != Register::None;
        if insn.memory_base() == Register::RSP && !indexed {
            return self.stack_slot(write);
        }
        let tried = if indexed { Recent::Arrays } else { Recent::All };
        if self.context.recent < tried {
            return None;
        }
        let n = (self.context.pc >> 2) as usize + self.recent;
        self.recent += 1;
        let (entry, patience) = self.slot(write, 1 + n % (RECENT - 1));
        Some(Slot { entry, patience: Some(patience) })
    }

    /// Probes `slot` for the linear address in RDI, which becomes a host address. Clobbers flags.
    pub(super) fn probe_recent(
        &mut self,
        slot: Slot,
        operand: Operand,
        segment: SegmentName,
    ) -> Site {
        self.holds = None;
        let info = AccessInfo::new(operand.size, operand.reads, operand.writes, segment);
        let table = layout::tlb_table(self.context.mode.mmu() as usize, operand.writes);
        self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, slot.entry);
        self.asm.alu_imm(Width::W64, 7, ADDRESS, 4096 - operand.size as i32);
        let miss = self.asm.jcc(cc::A);
        self.asm.rm(Width::W64, op::ADD_LOAD, ADDRESS, host(slot.entry));
        let (linear, back) = (Linear::Recent(slot), self.asm.here());
        Site { miss, table, linear, info, back, position: self.positions.len() - 1 }
    }

    /// The slot holds another page: looks in the TLB, and goes back to the access with what is
    /// there. Falls through, with the linear address in RDI, where nothing is.
    pub(super) fn refill_recent(&mut self, slot: Slot, site: Site) {
        let Slot { entry, patience } = slot;
        self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, entry);
        let worn = patience.map(|patience| {
            self.asm.rm(Width::W32, &[0xff], Reg(1), patience); // dec
            self.asm.jcc(cc::S)
        });
        let miss = self.look_up(site.table, site.info.size() as u32);
        let tag = Mem::indexed(Reg::RSP, SCRATCH, 0, site.table);
        self.asm.store(Width::W64, layout::spill(4), Reg::RAX);
        self.asm.load(Width::W64, Reg::RAX, tag);
        self.asm.store(Width::W64, entry, Reg::RAX);
        self.asm.load(Width::W64, Reg::RAX, host(tag));
        self.asm.store(Width::W64, host(entry), Reg::RAX);
        self.asm.lea(Width::W64, ADDRESS, Mem::indexed(ADDRESS, Reg::RAX, 0, 0));
        self.asm.load(Width::W64, Reg::RAX, layout::spill(4));
        self.asm.store_imm(Width::W32, layout::RECENT_FILLED, 1);
        self.asm.jmp_to(site.back);
        if let Some(worn) = worn {
            self.asm.bind(worn);
            self.asm.mov_imm(SCRATCH, u64::from(site.info.worn().0));
            let thunk = self.thunk(index::READ);
            self.asm.call_mem(thunk);
        }
        self.asm.bind(miss);
        self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, tag);
    }
}
