//! String instructions of 64-bit code whose elements lie in one page on each side, and in the TLB:
//! the host's own string instruction does those. A helper does all others.
use super::asm::{Fixup, Mem, Reg, Width, cc, op};
use super::layout::{self, ADDRESS, SCRATCH};
use super::{Cold, Emitter, FlagsIn};
use crate::helpers::Helped;
use crate::mode::Mode;
use crate::thunks::index;
use crate::tlb::TLB_ENTRIES;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// The host registers of the guest's RSI and RDI.
const GUEST_RSI: Reg = Reg::R14;
const GUEST_RDI: Reg = Reg::R15;

/// What an instruction does to one element.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Move,
    Compare,
    Store,
    Load,
    Scan,
}

impl Kind {
    fn of(insn: &Instruction) -> Option<Self> {
        Some(match insn.mnemonic() {
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => Self::Move,
            Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => Self::Compare,
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => Self::Store,
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => Self::Load,
            Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => Self::Scan,
            _ => return None,
        })
    }

    /// The opcode for bytes; one more for others.
    fn opcode(self) -> u8 {
        match self {
            Self::Move => 0xa4,
            Self::Compare => 0xa6,
            Self::Store => 0xaa,
            Self::Load => 0xac,
            Self::Scan => 0xae,
        }
    }

    fn compares(self) -> bool {
        matches!(self, Self::Compare | Self::Scan)
    }

    fn has_source(self) -> bool {
        matches!(self, Self::Move | Self::Compare | Self::Load)
    }

    fn has_target(self) -> bool {
        self != Self::Load
    }
}

/// Whether translated code does the instruction itself as a rule: upwards, with 64-bit addresses
/// and without a segment base. The answer for stepped code is no.
pub fn is_inline(insn: &Instruction, mode: Mode) -> bool {
    let wide = |i: u32| match insn.op_kind(i) {
        OpKind::MemorySegRSI => !matches!(insn.memory_segment(), Register::FS | Register::GS),
        OpKind::MemoryESRDI | OpKind::Register => true,
        _ => false,
    };
    mode.is_64()
        && !mode.down()
        && !mode.step()
        && insn.is_string_instruction()
        && Kind::of(insn).is_some()
        && (0..insn.op_count()).all(wide)
}

/// Whether such an instruction sets the arithmetic flags.
pub fn sets_flags(insn: &Instruction) -> bool {
    Kind::of(insn).is_some_and(Kind::compares)
}

impl Emitter<'_> {
    /// A string instruction; `helped` is the instruction as a helper needs it.
    pub fn string(&mut self, insn: &Instruction, helped: *const Helped) {
        let Some(kind) = Kind::of(insn) else { return self.helper(helped) };
        let repeats = insn.has_rep_prefix() || insn.has_repne_prefix();
        // Element operands all have the size of the memory operand.
        let size = insn.memory_size().size() as u32;
        self.free_flags(self.live_before);
        self.holds = None;
        let mut slow = Vec::with_capacity(5);
        if repeats {
            // A count of 0 needs no memory, and a longer one than a page a second look.
            self.asm.lea(Width::W64, ADDRESS, Mem::at(Reg::RCX, -1));
            self.asm.alu_imm(Width::W64, 7, ADDRESS, (4096 / size) as i32 - 1);
            slow.push(self.asm.jcc(cc::A));
        }
        let step = if repeats { None } else { Some(size) };
        if kind.has_source() {
            self.span(GUEST_RSI, false, size, repeats, &mut slow);
            match kind.has_target() {
                true => self.asm.store(Width::W64, layout::spill(0), ADDRESS),
                false => self.asm.mov(Width::W64, SCRATCH, ADDRESS),
            }
        }
        if kind.has_target() {
            let writes = matches!(kind, Kind::Move | Kind::Store);
            self.span(GUEST_RDI, writes, size, repeats, &mut slow);
            if kind.has_source() {
                self.asm.load(Width::W64, SCRATCH, layout::spill(0));
            }
        }
        self.run_string(insn, kind, size);
        self.advance(kind, step);
        if kind.compares() {
            self.flags = FlagsIn::Host;
        }
        let position = self.positions.len() - 1;
        let back = self.asm.here();
        self.mark();
        self.cold.push(Cold::String { slow, helped, back, position });
    }

    /// Finds the host address of the elements from guest address `pointer` on, to RDI; jumps that
    /// are added to `slow` are taken where they do not lie in one page that the TLB knows. Clobbers
    /// RSI and flags.
    fn span(
        &mut self,
        pointer: Reg,
        writes: bool,
        size: u32,
        repeats: bool,
        slow: &mut Vec<Fixup>,
    ) {
        let table = layout::tlb_table(self.context.mode.mmu() as usize, writes);
        let tag = Mem::indexed(Reg::RSP, SCRATCH, 0, table);
        let host = Mem::indexed(Reg::RSP, SCRATCH, 0, table + 8);
        self.asm.mov(Width::W64, ADDRESS, pointer);
        self.asm.mov(Width::W64, SCRATCH, pointer);
        self.asm.shift_imm(Width::W64, 5, SCRATCH, 8);
        self.asm.alu_imm(Width::W32, 4, SCRATCH, ((TLB_ENTRIES - 1) << 4) as i32);
        self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, tag);
        // Where the tag fits, RDI is now the offset in the page.
        self.asm.alu_imm(Width::W64, 7, ADDRESS, 4096 - size as i32);
        slow.push(self.asm.jcc(cc::A));
        if !repeats {
            return self.asm.rm(Width::W64, op::ADD_LOAD, ADDRESS, host);
        }
        let scale = size.trailing_zeros() as u8;
        self.asm.lea(Width::W64, ADDRESS, Mem::indexed(ADDRESS, Reg::RCX, scale, 0));
        self.asm.alu_imm(Width::W64, 7, ADDRESS, 4096);
        slow.push(self.asm.jcc(cc::A));
        self.asm.load(Width::W64, SCRATCH, host);
        self.asm.mov(Width::W32, ADDRESS, pointer);
        self.asm.alu_imm(Width::W32, 4, ADDRESS, 0xfff);
        self.asm.lea(Width::W64, ADDRESS, Mem::indexed(ADDRESS, SCRATCH, 0, 0));
    }

    /// The instruction itself, between host addresses in RSI and RDI. If it repeats, its start is
    /// kept for [`Emitter::advance`], in RSI where that is free.
    fn run_string(&mut self, insn: &Instruction, kind: Kind, size: u32) {
        match (kind.has_source(), kind.has_target()) {
            _ if !(insn.has_rep_prefix() || insn.has_repne_prefix()) => {}
            (true, true) => self.asm.store(Width::W64, layout::spill(1), ADDRESS),
            (true, false) => self.asm.store(Width::W64, layout::spill(1), SCRATCH),
            _ => self.asm.mov(Width::W64, SCRATCH, ADDRESS),
        }
        if insn.has_repne_prefix() {
            self.asm.raw(&[0xf2]);
        } else if insn.has_rep_prefix() {
            self.asm.raw(&[0xf3]);
        }
        match size {
            1 => self.asm.raw(&[kind.opcode()]),
            2 => self.asm.raw(&[0x66, kind.opcode() + 1]),
            4 => self.asm.raw(&[kind.opcode() + 1]),
            _ => self.asm.raw(&[0x48, kind.opcode() + 1]),
        }
    }

    /// Moves the guest's pointers on by `step` bytes, or by as many as the instruction has taken.
    /// Leaves flags alone.
    fn advance(&mut self, kind: Kind, step: Option<u32>) {
        if let Some(size) = step {
            let on = |pointer| (pointer, Mem::at(pointer, size as i32));
            return self.move_pointers(kind, on);
        }
        if kind.has_source() {
            if !kind.has_target() {
                self.asm.mov(Width::W64, ADDRESS, SCRATCH);
            }
            self.asm.load(Width::W64, SCRATCH, layout::spill(1));
        }
        // not rsi: RSI = -1 - start, so that RDI becomes the distance.
        self.asm.rr(Width::W64, &[0xf7], Reg(2), SCRATCH);
        self.asm.lea(Width::W64, ADDRESS, Mem::indexed(ADDRESS, SCRATCH, 0, 1));
        self.move_pointers(kind, |pointer| (pointer, Mem::indexed(pointer, ADDRESS, 0, 0)));
    }

    fn move_pointers(&mut self, kind: Kind, on: impl Fn(Reg) -> (Reg, Mem)) {
        let uses = [(GUEST_RSI, kind.has_source()), (GUEST_RDI, kind.has_target())];
        for (pointer, to) in uses.into_iter().filter(|(_, used)| *used).map(|(p, _)| on(p)) {
            self.asm.lea(Width::W64, pointer, to);
        }
    }

    pub(super) fn place_string(
        &mut self,
        slow: Vec<Fixup>,
        helped: *const Helped,
        back: usize,
        position: usize,
    ) {
        self.resume_position(position);
        slow.into_iter().for_each(|fixup| self.asm.bind(fixup));
        self.asm.mov_imm(ADDRESS, helped as u64);
        let thunk = self.thunk(index::EXECUTE);
        self.asm.call_mem(thunk);
        self.asm.jmp_to(back);
    }
}
