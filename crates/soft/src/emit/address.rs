//! Addresses of guest memory operands: offsets in segments, and linear addresses.
use super::Emitter;
use super::asm::{Mem, Reg, Width, op};
use super::layout::{self, ADDRESS, SCRATCH};
use crate::helpers::AccessInfo;
use crate::mode::{CodeSize, Mode, SegmentClass};
use crate::thunks::index;
use crate::translate::classify::Operand;
use arch::SegmentName;
use iced_x86::{Instruction, Register};

/// Width of the address computation, and whether only 16 bits of it count.
pub fn width(insn: &Instruction, mode: Mode) -> (Width, bool) {
    let register = match insn.memory_base() {
        Register::None => insn.memory_index(),
        base => base,
    };
    let size = match register {
        Register::RIP => 8,
        Register::EIP => 4,
        Register::None => insn.memory_displ_size() as usize,
        r => r.size(),
    };
    match (mode.code(), size) {
        (_, 2) => (Width::W32, true),
        (CodeSize::Bits64, 4) if register != Register::None => (Width::W32, false),
        (CodeSize::Bits64, _) => (Width::W64, false),
        _ => (Width::W32, false),
    }
}

/// The offset of the memory operand, if no general register takes part in it.
pub fn constant(insn: &Instruction, mode: Mode) -> Option<u64> {
    let offset = match (insn.memory_base(), insn.memory_index()) {
        (Register::RIP | Register::EIP, _) => insn.ip_rel_memory_address(),
        (Register::None, Register::None) => insn.memory_displacement64(),
        _ => return None,
    };
    Some(match width(insn, mode) {
        (_, true) => offset & 0xffff,
        (Width::W64, _) => offset,
        _ => offset & 0xffff_ffff,
    })
}

fn scale(insn: &Instruction) -> u8 {
    insn.memory_index_scale().trailing_zeros() as u8
}

impl Emitter<'_> {
    /// Puts the offset (effective address) of the memory operand into RDI; clobbers RSI, but no
    /// flags.
    pub fn effective_address(&mut self, insn: &Instruction) {
        self.address_before(insn, 0);
    }

    /// The address `distance` bytes before the memory operand, for operands relative to a base
    /// register if that is not 0.
    pub(super) fn address_before(&mut self, insn: &Instruction, distance: i32) {
        self.holds = None;
        if let Some(offset) = constant(insn, self.context.mode) {
            return self.asm.mov_imm(ADDRESS, offset);
        }
        let (width, mask16) = width(insn, self.context.mode);
        let mem = self.address_parts(insn, distance);
        match mem {
            Mem { base: Some(base), index: None, disp: 0 } if base == ADDRESS && !mask16 => {
                if width == Width::W32 {
                    self.asm.mov(width, ADDRESS, base);
                }
            }
            Mem { base: Some(base), index: None, disp: 0 } => self.asm.mov(width, ADDRESS, base),
            _ => self.asm.lea(width, ADDRESS, mem),
        }
        if mask16 {
            self.asm.rr(Width::W32, op::MOVZX16, ADDRESS, ADDRESS);
        }
    }

    /// The guest's address registers and displacement as a host operand; spilled ones are loaded
    /// to RDI and RSI.
    fn address_parts(&mut self, insn: &Instruction, distance: i32) -> Mem {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let index =
            (index != Register::None).then(|| (self.address_register(index, SCRATCH), scale(insn)));
        let base = (base != Register::None).then(|| self.address_register(base, ADDRESS));
        let disp = (insn.memory_displacement64() as i32).wrapping_sub(distance);
        Mem { base, index, disp }
    }

    /// The host register that holds an address register, loading it to `scratch` if it is spilled.
    fn address_register(&mut self, register: Register, scratch: Reg) -> Reg {
        let n = register.full_register().number();
        layout::host(n).unwrap_or_else(|| {
            self.asm.load(Width::W64, scratch, layout::gpr(n));
            scratch
        })
    }

    /// LEA: an address computation that goes nowhere. Leaves flags alone.
    pub fn lea(&mut self, insn: &Instruction) {
        let target = insn.op0_register();
        let (width, mask16) = width(insn, self.context.mode);
        let home = layout::host(target.full_register().number());
        match home.filter(|_| target.size() >= 4 && !mask16) {
            Some(home) => {
                let width = if target.size() == 4 { Width::W32 } else { width };
                if let Some(offset) = constant(insn, self.context.mode) {
                    let mask = if width == Width::W32 { 0xffff_ffff } else { u64::MAX };
                    return self.asm.mov_imm(home, offset & mask);
                }
                self.holds = None;
                let mem = self.address_parts(insn, 0);
                self.asm.lea(width, home, mem);
            }
            None => {
                self.effective_address(insn);
                self.write_gpr(target, ADDRESS);
            }
        }
    }

    /// Turns the offset in RDI into a linear address. Clobbers flags.
    pub fn apply_segment(&mut self, name: SegmentName, operand: Operand) {
        match self.context.mode.access(name, operand.writes) {
            SegmentClass::Flat => {}
            SegmentClass::Based => {
                let width = if self.context.mode.is_64() { Width::W64 } else { Width::W32 };
                self.asm.rm(width, op::ADD_LOAD, ADDRESS, layout::segment_base(name as usize));
            }
            SegmentClass::Checked => {
                let info = AccessInfo::new(operand.size, operand.reads, operand.writes, name);
                self.asm.mov_imm(SCRATCH, u64::from(info.0));
                let thunk = self.thunk(index::SEGMENT);
                self.asm.call_mem(thunk);
            }
        }
    }
}
