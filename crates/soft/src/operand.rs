//! Operands of the instructions that helpers execute: registers of every width, effective
//! addresses, and values in memory.
use crate::cpu::Cpu;
use crate::exception::Exception;
use arch::SegmentName;
use iced_x86::{Instruction, OpKind, Register};

/// All ones in the low `size` bytes.
pub(crate) const fn mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (8 * size)) - 1 }
}

/// Sign-extends the low `size` bytes.
pub(crate) const fn sign_extend(value: u64, size: usize) -> u64 {
    let shift = 64 - 8 * size as u32;
    ((value << shift) as i64 >> shift) as u64
}

/// The segment register that a name in an instruction stands for; DS where it is none.
pub(crate) fn segment_name(register: Register) -> SegmentName {
    match register {
        Register::ES => SegmentName::Es,
        Register::CS => SegmentName::Cs,
        Register::SS => SegmentName::Ss,
        Register::FS => SegmentName::Fs,
        Register::GS => SegmentName::Gs,
        _ => SegmentName::Ds,
    }
}

/// The segment of the instruction's memory operand. In 64-bit mode the prefixes for ES, CS, SS and
/// DS do nothing (Intel SDM 1 3.3.7.1).
pub(crate) fn operand_segment(insn: &Instruction, long: bool) -> SegmentName {
    let name = segment_name(insn.memory_segment());
    if !long || matches!(name, SegmentName::Fs | SegmentName::Gs) {
        return name;
    }
    match insn.memory_base().full_register() {
        Register::RSP | Register::RBP => SegmentName::Ss,
        _ => SegmentName::Ds,
    }
}

/// Number of a general register and the shift of its part (8 for AH, CH, DH and BH).
fn part(register: Register) -> (usize, u32) {
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    (register.full_register().number() & 15, if high { 8 } else { 0 })
}

impl Cpu {
    /// The value of a general register of any width.
    pub(crate) fn register(&self, register: Register) -> u64 {
        let (number, shift) = part(register);
        (self.gpr[number] >> shift) & mask(register.size())
    }

    /// Writes a general register of any width; 32-bit writes clear the upper half.
    pub(crate) fn set_register(&mut self, register: Register, value: u64) {
        let (number, shift) = part(register);
        self.set_gpr_part(number, shift, register.size(), value);
    }

    /// Writes the low `size` bytes of general register `number`.
    pub(crate) fn set_gpr(&mut self, number: usize, size: usize, value: u64) {
        self.set_gpr_part(number, 0, size, value);
    }

    fn set_gpr_part(&mut self, number: usize, shift: u32, size: usize, value: u64) {
        let slot = &mut self.gpr[number & 15];
        *slot = match size {
            4 => value & 0xffff_ffff,
            8 => value,
            _ => {
                let m = mask(size) << shift;
                (*slot & !m) | ((value << shift) & m)
            }
        };
    }

    /// The offset in its segment of memory operand `n`, for vector element `element` of a VSIB
    /// operand.
    pub(crate) fn element_offset(
        &self,
        insn: &Instruction,
        n: u32,
        element: usize,
        index: impl Fn(Register, usize, usize) -> u64,
    ) -> u64 {
        if matches!(insn.memory_base(), Register::RIP | Register::EIP) {
            // Blocks are shared between addresses: the distance counts, not where it was decoded.
            let distance = insn.memory_displacement64().wrapping_sub(insn.next_ip());
            let m = if insn.memory_base() == Register::EIP { 0xffff_ffff } else { u64::MAX };
            return self.next_rip.wrapping_add(distance) & m;
        }
        insn.virtual_address(n, element, |register, element, size| {
            Some(if register.is_segment_register() {
                0
            } else if register.is_vector_register() {
                index(register, element, size)
            } else {
                self.register(register)
            })
        })
        .unwrap_or(0)
    }

    /// The offset in its segment of the instruction's memory operand.
    pub(crate) fn offset_of(&self, insn: &Instruction) -> u64 {
        let n = (0..insn.op_count()).find(|&n| is_memory(insn.op_kind(n))).unwrap_or(0);
        self.element_offset(insn, n, 0, |_, _, _| 0)
    }

    /// Mask of the offsets that the instruction's memory operand can have.
    pub(crate) fn offset_mask(&self, insn: &Instruction) -> u64 {
        let registers = [insn.memory_base(), insn.memory_index()];
        match registers.iter().find(|r| **r != Register::None && !r.is_vector_register()) {
            Some(r) => mask(r.size()),
            None => match insn.memory_displ_size() {
                2 => 0xffff,
                4 => 0xffff_ffff,
                _ => self.address_mask(),
            },
        }
    }

    /// Reads operand `n`: register, immediate or `size` bytes of memory.
    pub(crate) fn operand(
        &mut self,
        insn: &Instruction,
        n: u32,
        size: usize,
    ) -> Result<u64, Exception> {
        Ok(match insn.op_kind(n) {
            OpKind::Register => self.register(insn.op_register(n)) & mask(size),
            OpKind::Memory => {
                let offset = self.offset_of(insn);
                self.load_operand(operand_segment(insn, self.mode.is_64()), offset, size)?
            }
            _ => insn.try_immediate(n).unwrap_or(0) & mask(size),
        })
    }

    /// Writes operand `n`; a register in its own width, memory `size` bytes.
    pub(crate) fn set_operand(
        &mut self,
        insn: &Instruction,
        n: u32,
        value: u64,
        size: usize,
    ) -> Result<(), Exception> {
        if insn.op_kind(n) == OpKind::Register {
            self.set_register(insn.op_register(n), value);
            return Ok(());
        }
        let offset = self.offset_of(insn);
        self.store_operand(operand_segment(insn, self.mode.is_64()), offset, value, size)
    }

    /// Reads a field at `at` bytes into the instruction's memory operand.
    pub(crate) fn operand_field(
        &mut self,
        insn: &Instruction,
        at: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        let offset = self.offset_of(insn).wrapping_add(at) & self.offset_mask(insn);
        self.load_operand(operand_segment(insn, self.mode.is_64()), offset, size)
    }

    /// Writes a whole memory operand of any length; nothing is written if a byte cannot be.
    pub(crate) fn store_block(&mut self, insn: &Instruction, data: &[u8]) -> Result<(), Exception> {
        let offset = self.offset_of(insn);
        let name = operand_segment(insn, self.mode.is_64());
        let address = self.linear(name, offset, data.len() as u64, true)?;
        self.store(address, data, crate::mmu::As::Current)
    }

    /// Sets or clears bits of RFLAGS.
    pub(crate) fn set_flag(&mut self, bits: u64, on: bool) {
        self.rflags = if on { self.rflags | bits } else { self.rflags & !bits };
    }

    /// #GP(0) unless at privilege level 0.
    pub(crate) fn need_cpl0(&self) -> Result<(), Exception> {
        if self.sys.cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
    }

    /// #UD outside protected mode (real and virtual-8086 mode).
    pub(crate) fn need_protected(&self) -> Result<(), Exception> {
        if self.protected() { Ok(()) } else { Err(Exception::INVALID_OPCODE) }
    }
}

/// Whether an operand is memory with explicit addressing or a string operand.
pub(crate) fn is_memory(kind: OpKind) -> bool {
    use OpKind as K;
    matches!(
        kind,
        K::Memory
            | K::MemorySegSI
            | K::MemorySegESI
            | K::MemorySegRSI
            | K::MemorySegDI
            | K::MemorySegEDI
            | K::MemorySegRDI
            | K::MemoryESDI
            | K::MemoryESEDI
            | K::MemoryESRDI
    )
}
