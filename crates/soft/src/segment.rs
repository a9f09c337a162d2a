//! Segment descriptors and loads of segment registers (Intel SDM 3A 3.4, 5.5 to 5.7).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::operand::segment_name;
use crate::stack::Stack;
use arch::registers::gpr::RSP;
use arch::{Segment, SegmentName};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// A descriptor of GDT or LDT, with where it came from.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    /// The selector that named it.
    pub selector: u16,
    /// The first eight bytes.
    pub raw: u64,
    /// Linear address of the descriptor.
    pub address: u64,
}

/// System descriptor types (Intel SDM 3A table 3-2).
pub(crate) mod kind {
    pub const TSS16: u16 = 1;
    pub const LDT: u16 = 2;
    pub const TSS16_BUSY: u16 = 3;
    pub const CALL16: u16 = 4;
    pub const TASK_GATE: u16 = 5;
    pub const TSS32: u16 = 9;
    pub const TSS32_BUSY: u16 = 11;
    pub const CALL32: u16 = 12;
}

impl Descriptor {
    /// The segment that the descriptor describes (without the upper half of a 64-bit base).
    pub fn segment(&self) -> Segment {
        let raw = self.raw;
        let base = (raw >> 16 & 0xff_ffff) | (raw >> 56 & 0xff) << 24;
        let limit = ((raw & 0xffff) | (raw >> 32 & 0xf_0000)) as u32;
        let attributes = (raw >> 40 & 0xf0ff) as u16;
        let limit = if attributes & Segment::G != 0 { limit << 12 | 0xfff } else { limit };
        Segment { selector: self.selector, base, limit, attributes }
    }
    /// Type field with the S bit above it: below 16 is a system descriptor.
    pub fn kind(&self) -> u16 {
        (self.raw >> 40 & 0x1f) as u16
    }
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }
    pub fn present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }
    pub fn is_code(&self) -> bool {
        self.raw >> 43 & 3 == 3
    }
    pub fn conforming(&self) -> bool {
        self.is_code() && self.raw >> 42 & 1 != 0
    }
    pub fn long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }
    pub fn db(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }
    /// Selector of a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// Offset of a gate, its lower 32 bits.
    pub fn gate_offset(&self) -> u64 {
        (self.raw & 0xffff) | (self.raw >> 32 & 0xffff_0000)
    }
}

/// The error code that names a selector.
pub(crate) fn code_of(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// Whether a selector is null.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

impl Cpu {
    /// Linear address of the descriptor, or `None` past the table's limit. `size` is 8 or 16.
    pub(crate) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 != 0 {
            let ldt = &self.sys.ldtr;
            if !ldt.present() || is_null(ldt.selector) {
                return None;
            }
            (ldt.base, u64::from(ldt.limit))
        } else {
            (self.sys.gdtr.base, u64::from(self.sys.gdtr.limit))
        };
        (offset + size - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// Reads a descriptor; `fault` makes the exception for a selector outside its table.
    pub(crate) fn descriptor(
        &mut self,
        selector: u16,
        fault: fn(u32) -> Exception,
        ext: u32,
    ) -> Result<Descriptor, Exception> {
        let address = self.descriptor_address(selector, 8).ok_or(fault(code_of(selector) | ext))?;
        let raw = self.system_load(address, 8)?;
        Ok(Descriptor { selector, raw, address })
    }

    /// Sets the accessed bit of a code or data descriptor in memory.
    pub(crate) fn mark_accessed(&mut self, d: &mut Descriptor) -> Result<(), Exception> {
        if d.raw >> 40 & 1 == 0 {
            d.raw |= 1 << 40;
            self.system_store(d.address.wrapping_add(5), d.raw >> 40 & 0xff, 1)?;
        }
        Ok(())
    }

    /// Loads a data segment register, as MOV and POP do.
    pub(crate) fn load_segment(
        &mut self,
        name: SegmentName,
        selector: u16,
    ) -> Result<(), Exception> {
        let fresh = self.fetch_segment(name, selector, self.sys.cpl)?;
        self.segments[name as usize] = fresh;
        Ok(())
    }

    /// What loading `selector` into `name` at privilege `cpl` gives, without loading it.
    pub(crate) fn fetch_segment(
        &mut self,
        name: SegmentName,
        selector: u16,
        cpl: u8,
    ) -> Result<Segment, Exception> {
        if self.mode.real_segments() {
            let base = u64::from(selector) << 4;
            if self.mode.virtual_8086() {
                return Ok(Segment { selector, base, limit: 0xffff, attributes: 0xf3 });
            }
            // Real mode keeps limit and rights ("unreal mode" lives on it).
            return Ok(Segment { selector, base, ..*self.segment(name) });
        }
        let rpl = (selector & 3) as u8;
        if name == SegmentName::Ss {
            return self.fetch_stack_segment(selector, cpl, Exception::gp, 0);
        }
        if is_null(selector) {
            return Ok(Segment { selector, base: 0, limit: 0, attributes: 0 });
        }
        let mut d = self.descriptor(selector, Exception::gp, 0)?;
        let s = d.segment();
        let data_rights = !d.conforming() && (rpl.max(cpl) > d.dpl());
        if d.kind() < 16 || (d.is_code() && s.attributes & 2 == 0) || data_rights {
            return Err(Exception::gp(code_of(selector)));
        }
        if !d.present() {
            return Err(Exception::np(code_of(selector)));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment())
    }

    /// A stack segment for privilege `cpl`; `fault` is #GP for loads, #TS for stack switches.
    pub(crate) fn fetch_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: fn(u32) -> Exception,
        ext: u32,
    ) -> Result<Segment, Exception> {
        let rpl = (selector & 3) as u8;
        if is_null(selector) {
            if self.mode.is_64() && cpl != 3 && rpl == cpl {
                return Ok(Segment { selector, base: 0, limit: 0, attributes: 0 });
            }
            return Err(fault(ext));
        }
        let code = code_of(selector) | ext;
        let mut d = self.descriptor(selector, fault, ext)?;
        if rpl != cpl || d.dpl() != cpl || d.kind() < 16 || d.is_code() || d.kind() & 2 == 0 {
            return Err(fault(code));
        }
        if !d.present() {
            return Err(Exception::ss(code));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment())
    }

    /// Loads one of ES, SS, DS, FS, GS and ends the instruction.
    fn finish_load(&mut self, name: SegmentName, selector: u16) -> Done {
        self.load_segment(name, selector)?;
        if name == SegmentName::Ss {
            self.sys.shadow = true;
            self.sys.shadow_debug = true;
        }
        self.update_mode();
        Ok(Flow::Leave)
    }
}

/// MOV to and from a segment register.
pub(crate) fn mov(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let target = insn.op0_register();
    if insn.op_kind(0) == OpKind::Register && target.is_segment_register() {
        if target == Register::CS {
            return Err(Exception::INVALID_OPCODE);
        }
        let selector = cpu.operand(insn, 1, 2)? as u16;
        return cpu.finish_load(segment_name(target), selector);
    }
    // To a register: zero-extended to its width; to memory: 16 bits.
    let selector = cpu.segment(segment_name(insn.op1_register())).selector;
    cpu.set_operand(insn, 0, u64::from(selector), 2)?;
    Ok(Flow::Next)
}

/// POP to memory: an address with RSP in it counts from after the pop (Intel SDM 2B POP).
fn pop_memory(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = insn.stack_pointer_increment().unsigned_abs() as usize;
    let mut stack = Stack::current(cpu);
    let value = stack.pop(cpu, size)?;
    let before = cpu.gpr[RSP];
    stack.commit(cpu);
    let stored = cpu.set_operand(insn, 0, value, size);
    if stored.is_err() {
        cpu.gpr[RSP] = before;
    }
    stored.map(|()| Flow::Next)
}

/// PUSH and POP of a segment register, POP to memory.
pub(crate) fn push_pop(cpu: &mut Cpu, insn: &Instruction) -> Done {
    if insn.op_kind(0) == OpKind::Memory && insn.mnemonic() == Mnemonic::Pop {
        return pop_memory(cpu, insn);
    }
    let register = insn.op0_register();
    if !register.is_segment_register() {
        return Err(Exception::INVALID_OPCODE);
    }
    let name = segment_name(register);
    let size = insn.stack_pointer_increment().unsigned_abs() as usize;
    let mut stack = Stack::current(cpu);
    if insn.mnemonic() == Mnemonic::Push {
        let selector = u64::from(cpu.segment(name).selector);
        stack.push(cpu, selector, size)?;
        stack.commit(cpu);
        return Ok(Flow::Next);
    }
    let selector = stack.peek(cpu, 0, size)? as u16;
    stack.skip(size as u64);
    // POP SS counts the old stack's width, so the pointer moves before the load is visible.
    let fresh = cpu.fetch_segment(name, selector, cpu.sys.cpl)?;
    stack.commit(cpu);
    cpu.segments[name as usize] = fresh;
    if name == SegmentName::Ss {
        cpu.sys.shadow = true;
        cpu.sys.shadow_debug = true;
    }
    cpu.update_mode();
    Ok(Flow::Leave)
}

/// LDS, LES, LFS, LGS, LSS.
pub(crate) fn load_far_pointer(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let name = match insn.mnemonic() {
        Mnemonic::Lds => SegmentName::Ds,
        Mnemonic::Les => SegmentName::Es,
        Mnemonic::Lfs => SegmentName::Fs,
        Mnemonic::Lgs => SegmentName::Gs,
        _ => SegmentName::Ss,
    };
    if insn.op_kind(1) == OpKind::Register {
        return Err(Exception::INVALID_OPCODE);
    }
    let target = insn.op0_register();
    let size = target.size();
    let offset = cpu.operand_field(insn, 0, size)?;
    let selector = cpu.operand_field(insn, size as u64, 2)? as u16;
    let flow = cpu.finish_load(name, selector)?;
    cpu.set_register(target, offset);
    Ok(flow)
}
