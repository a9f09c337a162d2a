//! Fast system calls and the bases of FS and GS (Intel SDM 2B; AMD APM 3).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::operand::mask;
use arch::registers::gpr::{RCX, RDX, RSP};
use arch::registers::{cr4, efer, rflags};
use arch::{Segment, SegmentName};
use iced_x86::{Instruction, Mnemonic};

/// Attributes of the flat segments that these instructions load, without DPL.
const CODE32: u16 = 0x9b | Segment::S | Segment::DB | Segment::G;
const CODE64: u16 = 0x9b | Segment::S | Segment::L | Segment::G;
const DATA: u16 = 0x93 | Segment::S | Segment::DB | Segment::G;

fn load_flat(cpu: &mut Cpu, cs: u16, code: u16, ss: u16, cpl: u8) {
    let dpl = u16::from(cpl) << 5;
    cpu.segments[SegmentName::Cs as usize] = Segment::flat(cs, code | dpl);
    cpu.segments[SegmentName::Ss as usize] = Segment::flat(ss, DATA | dpl);
    cpu.sys.cpl = cpl;
}

fn jump(cpu: &mut Cpu, rip: u64) -> Done {
    cpu.rip = rip;
    cpu.update_mode();
    Ok(Flow::Jump)
}

/// SYSCALL. Outside 64-bit mode only AMD CPUs have it.
pub(crate) fn syscall(cpu: &mut Cpu) -> Done {
    if cpu.sys.efer & efer::SCE == 0 || !cpu.protected() {
        return Err(Exception::INVALID_OPCODE);
    }
    if !cpu.mode.is_64() && !crate::cpuid::amd(cpu) {
        return Err(Exception::INVALID_OPCODE);
    }
    let selector = (cpu.sys.star >> 32) as u16 & 0xfffc;
    let ss = selector.wrapping_add(8);
    if !cpu.long_mode() {
        cpu.gpr[RCX] = cpu.next_rip & 0xffff_ffff;
        cpu.rflags &= !(rflags::IF | rflags::VM | rflags::RF);
        load_flat(cpu, selector, CODE32, ss, 0);
        let target = cpu.sys.star & 0xffff_ffff;
        return jump(cpu, target);
    }
    let target = if cpu.mode.is_64() { cpu.sys.lstar } else { cpu.sys.cstar };
    cpu.gpr[RCX] = cpu.next_rip;
    cpu.gpr[11] = cpu.rflags & !rflags::RF;
    cpu.rflags = (cpu.rflags & !(cpu.sys.sfmask | rflags::RF)) | rflags::FIXED;
    load_flat(cpu, selector, CODE64, ss, 0);
    cpu.rip = target;
    cpu.update_mode_64();
    Ok(Flow::Jump)
}

/// SYSRET: to 32-bit code, or with REX.W to 64-bit code.
pub(crate) fn sysret(cpu: &mut Cpu, insn: &Instruction) -> Done {
    if cpu.sys.efer & efer::SCE == 0 || !cpu.protected() {
        return Err(Exception::INVALID_OPCODE);
    }
    if !cpu.mode.is_64() && !crate::cpuid::amd(cpu) {
        return Err(Exception::INVALID_OPCODE);
    }
    cpu.need_cpl0()?;
    let wide = insn.mnemonic() == Mnemonic::Sysretq;
    let base = (cpu.sys.star >> 48) as u16;
    let target = if wide { cpu.gpr[RCX] } else { cpu.gpr[RCX] & 0xffff_ffff };
    // Intel checks at privilege level 0; AMD's #GP arrives at the target, at level 3.
    if wide && !cpu.canonical(target) && !crate::cpuid::amd(cpu) {
        return Err(Exception::GP0);
    }
    if cpu.long_mode() {
        let restored = cpu.gpr[11] & 0x3c_7fd7;
        cpu.rflags = (restored & !(rflags::RF | rflags::VM)) | rflags::FIXED;
    } else {
        cpu.rflags |= rflags::IF;
    }
    let (cs, code) = if wide { (base.wrapping_add(16), CODE64) } else { (base, CODE32) };
    load_flat(cpu, cs | 3, code, base.wrapping_add(8) | 3, 3);
    if !wide {
        return jump(cpu, target);
    }
    cpu.rip = target;
    cpu.update_mode_64();
    Ok(Flow::Jump)
}

/// SYSENTER.
pub(crate) fn sysenter(cpu: &mut Cpu) -> Done {
    if !cpu.mode.real_segments() || cpu.mode.virtual_8086() {
        // Protected or virtual-8086 mode; AMD has no SYSENTER in long mode.
        if cpu.long_mode() && crate::cpuid::amd(cpu) {
            return Err(Exception::INVALID_OPCODE);
        }
    } else {
        return Err(Exception::GP0);
    }
    let selector = cpu.sys.sysenter_cs as u16 & 0xfffc;
    if selector == 0 {
        return Err(Exception::GP0);
    }
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    let long = cpu.long_mode();
    let code = if long { CODE64 } else { CODE32 };
    load_flat(cpu, selector, code, selector.wrapping_add(8), 0);
    let m = mask(if long { 8 } else { 4 });
    cpu.gpr[RSP] = cpu.sys.sysenter_esp & m;
    let target = cpu.sys.sysenter_eip & m;
    jump(cpu, target)
}

/// SYSEXIT.
pub(crate) fn sysexit(cpu: &mut Cpu, insn: &Instruction) -> Done {
    if cpu.long_mode() && crate::cpuid::amd(cpu) {
        cpu.need_cpl0()?;
        return Err(Exception::INVALID_OPCODE);
    }
    let selector = cpu.sys.sysenter_cs as u16 & 0xfffc;
    if selector == 0 || !cpu.protected() || cpu.sys.cpl != 0 {
        return Err(Exception::GP0);
    }
    let wide = insn.mnemonic() == Mnemonic::Sysexitq;
    let m = mask(if wide { 8 } else { 4 });
    let (rip, rsp) = (cpu.gpr[RDX] & m, cpu.gpr[RCX] & m);
    if wide && !(cpu.canonical(rip) && cpu.canonical(rsp)) {
        return Err(Exception::GP0);
    }
    let (cs, code) = if wide { (32, CODE64) } else { (16, CODE32) };
    let cs = selector.wrapping_add(cs) | 3;
    load_flat(cpu, cs, code, cs.wrapping_add(8), 3);
    cpu.gpr[RSP] = rsp;
    jump(cpu, rip)
}

/// SWAPGS.
pub(crate) fn swapgs(cpu: &mut Cpu) -> Done {
    if !cpu.mode.is_64() {
        return Err(Exception::INVALID_OPCODE);
    }
    cpu.need_cpl0()?;
    let gs = &mut cpu.segments[SegmentName::Gs as usize].base;
    std::mem::swap(gs, &mut cpu.sys.kernel_gs_base);
    Ok(Flow::Next)
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
pub(crate) fn segment_base(cpu: &mut Cpu, insn: &Instruction) -> Done {
    if !cpu.mode.is_64() || cpu.sys.cr4 & cr4::FSGSBASE == 0 {
        return Err(Exception::INVALID_OPCODE);
    }
    let name = match insn.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => SegmentName::Fs,
        _ => SegmentName::Gs,
    };
    let register = insn.op0_register();
    if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let base = cpu.segment(name).base;
        cpu.set_register(register, base);
    } else {
        let base = cpu.register(register);
        if !cpu.canonical(base) {
            return Err(Exception::GP0);
        }
        cpu.segments[name as usize].base = base;
    }
    Ok(Flow::Next)
}
