//! Descriptor-table registers and the instructions that inspect descriptors (Intel SDM 2A, 2B:
//! LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR, SMSW, LAR, LSL, VERR, VERW, ARPL).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::operand::{mask, operand_segment};
use crate::segment::{Descriptor, code_of, is_null, kind};
use arch::registers::{cr4, rflags};
use arch::{DescriptorTable, Segment};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// #GP(0) where UMIP bars an instruction that reveals system addresses.
fn check_umip(cpu: &Cpu) -> Result<(), Exception> {
    let barred = cpu.sys.cr4 & cr4::UMIP != 0 && cpu.sys.cpl != 0;
    if barred { Err(Exception::GP0) } else { Ok(()) }
}

/// LGDT, LIDT, SGDT, SIDT.
pub(crate) fn table_register(cpu: &mut Cpu, insn: &Instruction) -> Done {
    if insn.op_kind(0) == OpKind::Register {
        return Err(Exception::INVALID_OPCODE);
    }
    let base_size = if cpu.mode.is_64() { 8 } else { 4 };
    let narrow = matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
    match insn.mnemonic() {
        Mnemonic::Sgdt | Mnemonic::Sidt => {
            check_umip(cpu)?;
            let table = if insn.mnemonic() == Mnemonic::Sgdt { cpu.sys.gdtr } else { cpu.sys.idtr };
            let mut image = [0; 10];
            image[..2].copy_from_slice(&table.limit.to_le_bytes());
            image[2..].copy_from_slice(&table.base.to_le_bytes());
            cpu.store_block(insn, &image[..2 + base_size])?;
            Ok(Flow::Next)
        }
        _ => {
            cpu.need_cpl0()?;
            let limit = cpu.operand_field(insn, 0, 2)? as u16;
            let base = cpu.operand_field(insn, 2, base_size)?;
            let base = if narrow { base & 0xff_ffff } else { base };
            if base_size == 8 && !cpu.canonical(base) {
                return Err(Exception::GP0);
            }
            let table = DescriptorTable { base, limit };
            if insn.mnemonic() == Mnemonic::Lgdt {
                cpu.sys.gdtr = table;
            } else {
                cpu.sys.idtr = table;
            }
            Ok(Flow::Next)
        }
    }
}

/// LLDT and LTR.
pub(crate) fn load_system_segment(cpu: &mut Cpu, insn: &Instruction) -> Done {
    cpu.need_protected()?;
    cpu.need_cpl0()?;
    let selector = cpu.operand(insn, 0, 2)? as u16;
    let task = insn.mnemonic() == Mnemonic::Ltr;
    if is_null(selector) {
        if task {
            return Err(Exception::GP0);
        }
        cpu.sys.ldtr = Segment { selector, base: 0, limit: 0, attributes: 0 };
        return Ok(Flow::Next);
    }
    let fault = Exception::gp(code_of(selector));
    if selector & 4 != 0 {
        return Err(fault);
    }
    let size = if cpu.long_mode() { 16 } else { 8 };
    cpu.descriptor_address(selector, size).ok_or(fault)?;
    let mut d = cpu.descriptor(selector, Exception::gp, 0)?;
    let fits = match (task, d.kind()) {
        (false, kind::LDT) | (true, kind::TSS32) => true,
        (true, kind::TSS16) => !cpu.long_mode(),
        _ => false,
    };
    if !fits {
        return Err(fault);
    }
    if !d.present() {
        return Err(Exception::np(code_of(selector)));
    }
    let mut upper = 0;
    if size == 16 {
        let high = cpu.system_load(d.address.wrapping_add(8), 8)?;
        // The type field of the upper half must be zero.
        if high >> 40 & 0x1f != 0 {
            return Err(fault);
        }
        upper = high << 32;
    }
    let mut segment = d.segment();
    segment.base |= upper;
    if size == 16 && !cpu.canonical(segment.base) {
        return Err(fault);
    }
    if task {
        d.raw |= 2 << 40;
        cpu.system_store(d.address.wrapping_add(5), d.raw >> 40 & 0xff, 1)?;
        segment.attributes |= 2;
        cpu.sys.tr = segment;
    } else {
        cpu.sys.ldtr = segment;
    }
    Ok(Flow::Next)
}

/// SLDT, STR, SMSW.
pub(crate) fn store_system(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let value = match insn.mnemonic() {
        Mnemonic::Smsw => cpu.sys.cr0,
        Mnemonic::Sldt => {
            cpu.need_protected()?;
            u64::from(cpu.sys.ldtr.selector)
        }
        _ => {
            cpu.need_protected()?;
            u64::from(cpu.sys.tr.selector)
        }
    };
    check_umip(cpu)?;
    cpu.set_operand(insn, 0, value, 2)?;
    Ok(Flow::Next)
}

/// LAR, LSL, VERR, VERW: ZF says whether the descriptor is visible; they do not fault on it.
pub(crate) fn inspect(cpu: &mut Cpu, insn: &Instruction) -> Done {
    cpu.need_protected()?;
    let double = matches!(insn.mnemonic(), Mnemonic::Lar | Mnemonic::Lsl);
    let selector = cpu.operand(insn, u32::from(double), 2)? as u16;
    let descriptor = visible(cpu, selector, insn.mnemonic())?;
    cpu.set_flag(rflags::ZF, descriptor.is_some());
    if let (Some(d), true) = (descriptor, double) {
        let target = insn.op0_register();
        let value = match insn.mnemonic() {
            Mnemonic::Lar => d.raw >> 32 & 0x00ff_ff00,
            _ => u64::from(d.segment().limit),
        };
        cpu.set_register(target, value & mask(target.size()));
    }
    Ok(Flow::Next)
}

fn visible(cpu: &mut Cpu, selector: u16, which: Mnemonic) -> Result<Option<Descriptor>, Exception> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(address) = cpu.descriptor_address(selector, 8) else { return Ok(None) };
    let raw = cpu.system_load(address, 8)?;
    let d = Descriptor { selector, raw, address };
    let privileged = d.conforming() || d.dpl() >= cpu.sys.cpl.max((selector & 3) as u8);
    let type_fits = match (which, d.kind()) {
        (Mnemonic::Verr, k) => k >= 16 && (!d.is_code() || k & 2 != 0),
        (Mnemonic::Verw, k) => k >= 16 && !d.is_code() && k & 2 != 0,
        (_, k) if k >= 16 => true,
        (_, kind::LDT | kind::TSS32 | kind::TSS32_BUSY) => true,
        (_, kind::TSS16 | kind::TSS16_BUSY) => !cpu.long_mode(),
        (Mnemonic::Lar, kind::CALL32) => true,
        (Mnemonic::Lar, kind::CALL16 | kind::TASK_GATE) => !cpu.long_mode(),
        _ => false,
    };
    Ok((privileged && type_fits).then_some(d))
}

/// ARPL: raises the RPL of the first operand to that of the second.
pub(crate) fn arpl(cpu: &mut Cpu, insn: &Instruction) -> Done {
    cpu.need_protected()?;
    let destination = cpu.operand(insn, 0, 2)?;
    let source = cpu.register(insn.op1_register());
    let raise = destination & 3 < source & 3;
    if raise {
        let value = (destination & !3) | (source & 3);
        match insn.op_kind(0) {
            // The 32-bit form keeps the upper half of the register.
            OpKind::Register => {
                let number = insn.op0_register().full_register().number();
                cpu.set_gpr(number, 2, value);
            }
            _ => {
                let offset = cpu.offset_of(insn);
                cpu.store_operand(operand_segment(insn, cpu.mode.is_64()), offset, value, 2)?;
            }
        }
    }
    cpu.set_flag(rflags::ZF, raise);
    Ok(Flow::Next)
}
