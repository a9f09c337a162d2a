//! System instructions that need no helper: those that kernels execute at every entry and exit,
//! around every critical section and at every access to user memory, and while they wait.
use super::asm::{Fixup, Mem, Reg, Width, cc, op};
use super::layout::{self, ADDRESS, RAW_FLAGS, SCRATCH};
use super::stack::Source;
use super::{Cold, Emitter, FlagsIn};
use crate::helpers::Helped;
use crate::mode::{MmuIndex, Mode};
use crate::thunks::index;
use crate::translate::flags::ALL;
use arch::SegmentName;
use arch::registers::rflags;
use iced_x86::{Instruction, Mnemonic};

/// /digit of opcode 81H.
mod group1 {
    pub const OR: u8 = 1;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const CMP: u8 = 7;
}

impl Emitter<'_> {
    /// One of the instructions of `Class::System` that need no help.
    pub fn system(&mut self, insn: &Instruction) {
        self.holds = None;
        match insn.mnemonic() {
            Mnemonic::Swapgs => self.swapgs(),
            Mnemonic::Cli => {
                self.free_flags(self.live_before);
                self.flag_off(rflags::IF);
            }
            Mnemonic::Pushfq => self.pushfq(),
            _ => {
                self.asm.load(Width::W64, SCRATCH, layout::CR2);
                self.write_gpr(insn.op0_register(), SCRATCH);
            }
        }
    }

    /// Sets a bit of RFLAGS in memory; clobbers arithmetic flags.
    fn flag_on(&mut self, bit: u64) {
        self.asm.rm(Width::W32, &[0x81], Reg(group1::OR), layout::RFLAGS);
        self.asm.raw(&(bit as u32).to_le_bytes());
    }

    /// Clears a bit.
    fn flag_off(&mut self, bit: u64) {
        self.asm.rm(Width::W32, &[0x81], Reg(group1::AND), layout::RFLAGS);
        self.asm.raw(&(!bit as u32).to_le_bytes());
    }

    fn swapgs(&mut self) {
        let gs = layout::segment_base(SegmentName::Gs as usize);
        self.asm.load(Width::W64, ADDRESS, gs);
        self.asm.load(Width::W64, SCRATCH, layout::KERNEL_GS_BASE);
        self.asm.store(Width::W64, layout::KERNEL_GS_BASE, ADDRESS);
        self.asm.store(Width::W64, gs, SCRATCH);
    }

    /// STI, STAC, CLAC and PAUSE; `helped` does them where that is not so simple.
    pub fn system_with_help(&mut self, insn: &Instruction, helped: *const Helped) {
        self.holds = None;
        self.free_flags(ALL);
        let fixups = match insn.mnemonic() {
            Mnemonic::Stac => [Some(self.switch(true)), None],
            Mnemonic::Clac => [Some(self.switch(false)), None],
            Mnemonic::Pause => [Some(self.pause()), None],
            _ => self.sti().map(Some),
        };
        let position = self.positions.len() - 1;
        let back = self.asm.here();
        self.cold.push(Cold::Helper { fixups, helped, back, position });
    }

    /// STI; help is needed where an interrupt waits, or somebody left word of one.
    fn sti(&mut self) -> [Fixup; 2] {
        // cmp byte [outstanding], 0
        self.asm.rm(Width::W32, &[0x80], Reg(group1::CMP), layout::OUTSTANDING);
        self.asm.raw(&[0]);
        let waits = self.asm.jcc(cc::NE);
        // cmp qword [poll], 0: negative is `signals::POLL_ATTRACT`.
        self.asm.rm(Width::W64, &[0x83], Reg(group1::CMP), layout::POLL);
        self.asm.raw(&[0]);
        let wanted = self.asm.jcc(cc::S);
        self.flag_on(rflags::IF);
        [waits, wanted]
    }

    /// PAUSE; help is needed where the guest has waited for long.
    fn pause(&mut self) -> Fixup {
        self.asm.raw(&[0xf3, 0x90]);
        self.asm.rm(Width::W32, &[0x83], Reg(group1::SUB), layout::PATIENCE);
        self.asm.raw(&[1]);
        self.asm.jcc(cc::S)
    }

    pub(super) fn place_helper(
        &mut self,
        fixups: [Option<Fixup>; 2],
        helped: *const Helped,
        back: usize,
    ) {
        fixups.into_iter().flatten().for_each(|fixup| self.asm.bind(fixup));
        self.asm.mov_imm(ADDRESS, helped as u64);
        let thunk = self.thunk(index::EXECUTE);
        self.asm.call_mem(thunk);
        self.asm.jmp_to(back);
    }

    /// STAC and CLAC: code from here on reaches memory through another TLB, and indirect jumps go
    /// through another jump cache; help is needed where that is not one for the new mode.
    fn switch(&mut self, on: bool) -> Fixup {
        let mmu = if on { MmuIndex::SupervisorAc } else { MmuIndex::Supervisor };
        let mode = Mode(self.context.mode.with_mmu(mmu).0 & !Mode::PLAIN);
        // cmp dword [jump_mode], mode
        self.asm.rm(Width::W32, &[0x81], Reg(group1::CMP), layout::jump_mode(mmu as usize));
        self.asm.raw(&mode.0.to_le_bytes());
        let fixup = self.asm.jcc(cc::NE);
        match on {
            true => self.flag_on(rflags::AC),
            false => self.flag_off(rflags::AC),
        }
        self.asm.store_imm(Width::W32, layout::MODE, mode.0 as i32);
        fixup
    }

    fn pushfq(&mut self) {
        self.free_flags(ALL);
        self.asm.rm(Width::W32, op::MOVZX16, ADDRESS, RAW_FLAGS);
        self.asm.mov(Width::W32, SCRATCH, ADDRESS);
        self.asm.shift_imm(Width::W32, 5, ADDRESS, 8);
        self.asm.alu_imm(Width::W32, group1::AND, ADDRESS, 0xd5);
        self.asm.alu_imm(Width::W32, group1::AND, SCRATCH, 1);
        self.asm.shift_imm(Width::W32, 4, SCRATCH, 11);
        self.asm.lea(Width::W32, ADDRESS, Mem::indexed(ADDRESS, SCRATCH, 0, 0));
        self.asm.load(Width::W32, SCRATCH, layout::RFLAGS);
        let kept = !(rflags::ARITHMETIC | rflags::VM | rflags::RF) as i32;
        self.asm.alu_imm(Width::W32, group1::AND, SCRATCH, kept);
        self.asm.lea(Width::W32, ADDRESS, Mem::indexed(ADDRESS, SCRATCH, 0, 0));
        self.asm.store(Width::W64, layout::spill(0), ADDRESS);
        self.push_value(Source::Spill, 8);
        debug_assert_eq!(self.flags, FlagsIn::Saved);
    }
}
