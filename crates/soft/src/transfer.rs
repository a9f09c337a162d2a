//! Far transfers of control: JMP, CALL, RET and IRET between segments, privilege levels and
//! modes (Intel SDM 3A 5.8, 2A CALL, JMP and IRET, 2B RET).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::{Done, iopl, writable_flags};
use crate::mmu::As;
use crate::operand::mask;
use crate::segment::{Descriptor, code_of, is_null, kind};
use crate::stack::Stack;
use crate::task::{self, Cause};
use arch::registers::{gpr::RSP, rflags};
use arch::{Segment, SegmentName};
use iced_x86::{Code, Instruction, Mnemonic};

/// Far JMP, CALL and RET.
pub(crate) fn far(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = match insn.code() {
        Code::Call_ptr1616 | Code::Jmp_ptr1616 | Code::Call_m1616 | Code::Jmp_m1616 => 2,
        Code::Call_ptr1632 | Code::Jmp_ptr1632 | Code::Call_m1632 | Code::Jmp_m1632 => 4,
        Code::Call_m1664 | Code::Jmp_m1664 => 8,
        Code::Retfw | Code::Retfw_imm16 => return far_return(cpu, insn, 2),
        Code::Retfd | Code::Retfd_imm16 => return far_return(cpu, insn, 4),
        Code::Retfq | Code::Retfq_imm16 => return far_return(cpu, insn, 8),
        _ => return Err(Exception::INVALID_OPCODE),
    };
    let (selector, offset) = match insn.code() {
        Code::Call_ptr1616 | Code::Jmp_ptr1616 => {
            (insn.far_branch_selector(), u64::from(insn.far_branch16()))
        }
        Code::Call_ptr1632 | Code::Jmp_ptr1632 => {
            (insn.far_branch_selector(), u64::from(insn.far_branch32()))
        }
        _ => {
            let offset = cpu.operand_field(insn, 0, size)?;
            (cpu.operand_field(insn, size as u64, 2)? as u16, offset)
        }
    };
    let call = insn.mnemonic() == Mnemonic::Call;
    if cpu.mode.real_segments() {
        return real_transfer(cpu, selector, offset, size, call);
    }
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let mut d = cpu.descriptor(selector, Exception::gp, 0)?;
    if d.is_code() {
        return to_code(cpu, &mut d, offset, size, call);
    }
    through_gate(cpu, &d, call)
}

/// In real and virtual-8086 mode.
fn real_transfer(cpu: &mut Cpu, selector: u16, offset: u64, size: usize, call: bool) -> Done {
    let cs = *cpu.segment(SegmentName::Cs);
    if offset > u64::from(cs.limit) {
        return Err(Exception::GP0);
    }
    if call {
        let mut stack = Stack::current(cpu);
        stack.push(cpu, u64::from(cs.selector), size)?;
        stack.push(cpu, cpu.next_rip, size)?;
        stack.commit(cpu);
    }
    load_real_cs(cpu, selector);
    Ok(jump(cpu, offset))
}

fn load_real_cs(cpu: &mut Cpu, selector: u16) {
    let cs = &mut cpu.segments[SegmentName::Cs as usize];
    cs.selector = selector;
    cs.base = u64::from(selector) << 4;
}

fn jump(cpu: &mut Cpu, rip: u64) -> Flow {
    cpu.rip = rip;
    cpu.update_mode();
    Flow::Jump
}

/// Whether `rip` can be the instruction pointer in the code segment `d`.
fn check_target(cpu: &Cpu, d: &Descriptor, rip: u64) -> Result<(), Exception> {
    let fits = if cpu.long_mode() && d.long() {
        cpu.canonical(rip)
    } else {
        rip <= u64::from(d.segment().limit)
    };
    if fits { Ok(()) } else { Err(Exception::GP0) }
}

/// #GP for a code segment that is both 64-bit and 32-bit; #NP.
fn check_code(cpu: &Cpu, d: &Descriptor) -> Result<(), Exception> {
    if cpu.long_mode() && d.long() && d.db() {
        return Err(Exception::gp(code_of(d.selector)));
    }
    if !d.present() {
        return Err(Exception::np(code_of(d.selector)));
    }
    Ok(())
}

fn load_cs(cpu: &mut Cpu, d: &Descriptor, cpl: u8) {
    let mut cs = d.segment();
    cs.selector = (d.selector & !3) | u16::from(cpl);
    cpu.segments[SegmentName::Cs as usize] = cs;
    cpu.sys.cpl = cpl;
}

/// Directly to a code segment at the same privilege.
fn to_code(cpu: &mut Cpu, d: &mut Descriptor, offset: u64, size: usize, call: bool) -> Done {
    let cpl = cpu.sys.cpl;
    let rpl = (d.selector & 3) as u8;
    let allowed = if d.conforming() { d.dpl() <= cpl } else { rpl <= cpl && d.dpl() == cpl };
    if !allowed {
        return Err(Exception::gp(code_of(d.selector)));
    }
    check_code(cpu, d)?;
    check_target(cpu, d, offset)?;
    cpu.mark_accessed(d)?;
    if call {
        let mut stack = Stack::current(cpu);
        let cs = cpu.segment(SegmentName::Cs).selector;
        stack.push(cpu, u64::from(cs), size)?;
        stack.push(cpu, cpu.next_rip, size)?;
        stack.commit(cpu);
    }
    load_cs(cpu, d, cpl);
    Ok(jump(cpu, offset))
}

/// Through a call gate, a task gate, or to a TSS.
fn through_gate(cpu: &mut Cpu, gate: &Descriptor, call: bool) -> Done {
    let code = code_of(gate.selector);
    let long = cpu.long_mode();
    let rpl = (gate.selector & 3) as u8;
    let known = match gate.kind() {
        kind::CALL32 => true,
        kind::CALL16 | kind::TASK_GATE | kind::TSS16 | kind::TSS32 => !long,
        _ => false,
    };
    if !known || gate.dpl() < cpu.sys.cpl.max(rpl) {
        return Err(Exception::gp(code));
    }
    if !gate.present() {
        return Err(Exception::np(code));
    }
    let cause = if call { Cause::Call } else { Cause::Jump };
    match gate.kind() {
        kind::CALL16 | kind::CALL32 => call_gate(cpu, gate, call),
        kind::TASK_GATE => {
            task::switch(cpu, gate.gate_selector(), cause, cpu.next_rip, 0)?;
            Ok(Flow::Jump)
        }
        _ => {
            task::switch(cpu, gate.selector, cause, cpu.next_rip, 0)?;
            Ok(Flow::Jump)
        }
    }
}

fn call_gate(cpu: &mut Cpu, gate: &Descriptor, call: bool) -> Done {
    let long = cpu.long_mode();
    let mut offset = gate.gate_offset();
    if long {
        let code = code_of(gate.selector);
        cpu.descriptor_address(gate.selector, 16).ok_or(Exception::gp(code))?;
        let upper = cpu.system_load(gate.address.wrapping_add(8), 8)?;
        if upper >> 40 & 0x1f != 0 {
            return Err(Exception::gp(code));
        }
        offset |= upper << 32;
    } else if gate.kind() == kind::CALL16 {
        offset &= 0xffff;
    }
    let selector = gate.gate_selector();
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let mut d = cpu.descriptor(selector, Exception::gp, 0)?;
    let cpl = cpu.sys.cpl;
    let inner = call && !d.conforming() && d.dpl() < cpl;
    let reachable = inner || if d.conforming() { d.dpl() <= cpl } else { d.dpl() == cpl };
    if !d.is_code() || !reachable || (long && (!d.long() || d.db())) {
        return Err(Exception::gp(code_of(selector)));
    }
    check_code(cpu, &d)?;
    check_target(cpu, &d, offset)?;
    cpu.mark_accessed(&mut d)?;
    if inner {
        push_inner(cpu, gate, d.dpl())?;
    } else if call {
        let size = gate_bytes(cpu, gate);
        let mut stack = Stack::current(cpu);
        let cs = cpu.segment(SegmentName::Cs).selector;
        stack.push(cpu, u64::from(cs), size)?;
        stack.push(cpu, cpu.next_rip, size)?;
        stack.commit(cpu);
    }
    let cpl = if inner { d.dpl() } else { cpl };
    load_cs(cpu, &d, cpl);
    Ok(jump(cpu, offset))
}

fn gate_bytes(cpu: &Cpu, gate: &Descriptor) -> usize {
    match (cpu.long_mode(), gate.kind()) {
        (true, _) => 8,
        (_, kind::CALL32) => 4,
        _ => 2,
    }
}

/// Switches to the stack of privilege `cpl`, copying parameters (Intel SDM 3A 5.8.5).
fn push_inner(cpu: &mut Cpu, gate: &Descriptor, cpl: u8) -> Result<(), Exception> {
    let size = gate_bytes(cpu, gate);
    let old = Stack::current(cpu);
    let old_ss = cpu.segment(SegmentName::Ss).selector;
    let old_cs = cpu.segment(SegmentName::Cs).selector;
    let (mut stack, ss) = if size == 8 {
        let sp = task::stack_pointer_64(cpu, 4 + 8 * u64::from(cpl), 0)?;
        let ss = Segment { selector: u16::from(cpl), ..Segment::default() };
        (Stack::flat(sp, As::System, 0), ss)
    } else {
        let (ss, sp) = task::inner_stack(cpu, cpl, 0)?;
        (Stack::other(ss, sp, As::System, code_of(ss.selector)), ss)
    };
    stack.push(cpu, u64::from(old_ss), size)?;
    stack.push(cpu, cpu.gpr[RSP], size)?;
    let parameters = if size == 8 { 0 } else { gate.raw >> 32 & 0x1f };
    for n in (0..parameters).rev() {
        let value = old.peek(cpu, n * size as u64, size)?;
        stack.push(cpu, value, size)?;
    }
    stack.push(cpu, u64::from(old_cs), size)?;
    stack.push(cpu, cpu.next_rip, size)?;
    stack.commit(cpu);
    cpu.segments[SegmentName::Ss as usize] = ss;
    Ok(())
}

/// RETF, with or without bytes to release.
fn far_return(cpu: &mut Cpu, insn: &Instruction, size: usize) -> Done {
    let release = if insn.op_count() > 0 { u64::from(insn.immediate16()) } else { 0 };
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    if cpu.mode.real_segments() {
        if rip > u64::from(cpu.segment(SegmentName::Cs).limit) {
            return Err(Exception::GP0);
        }
        stack.skip(release);
        stack.commit(cpu);
        load_real_cs(cpu, selector);
        return Ok(jump(cpu, rip));
    }
    stack.skip(release);
    let rpl = (selector & 3) as u8;
    if rpl != cpu.sys.cpl {
        // The outer stack pointer is read before the segment is looked at, as AMD's CPUs do.
        stack.peek(cpu, 0, size)?;
        stack.peek(cpu, size as u64, size)?;
    }
    let mut d = return_segment(cpu, selector)?;
    check_target(cpu, &d, rip)?;
    if rpl == cpu.sys.cpl {
        cpu.mark_accessed(&mut d)?;
        stack.commit(cpu);
        load_cs(cpu, &d, rpl);
        return Ok(jump(cpu, rip));
    }
    let sp = stack.pop(cpu, size)?;
    let ss = stack.pop(cpu, size)? as u16;
    let ss = outer_stack(cpu, ss, rpl, &d)?;
    cpu.mark_accessed(&mut d)?;
    load_outer_stack(cpu, ss, sp, release, &d);
    load_cs(cpu, &d, rpl);
    drop_inner_segments(cpu);
    Ok(jump(cpu, rip))
}

/// The code segment that a RET or IRET goes back to.
fn return_segment(cpu: &mut Cpu, selector: u16) -> Result<Descriptor, Exception> {
    if is_null(selector) {
        return Err(Exception::GP0);
    }
    let d = cpu.descriptor(selector, Exception::gp, 0)?;
    let rpl = (selector & 3) as u8;
    let rights = if d.conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if !d.is_code() || rpl < cpu.sys.cpl || !rights {
        return Err(Exception::gp(code_of(selector)));
    }
    check_code(cpu, &d)?;
    Ok(d)
}

/// SS for the privilege level that a return goes to.
fn outer_stack(
    cpu: &mut Cpu,
    selector: u16,
    rpl: u8,
    target: &Descriptor,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        if cpu.long_mode() && target.long() && rpl != 3 && (selector & 3) as u8 == rpl {
            return Ok(Segment { selector, ..Segment::default() });
        }
        return Err(Exception::GP0);
    }
    cpu.fetch_stack_segment(selector, rpl, Exception::gp, 0)
}

fn load_outer_stack(cpu: &mut Cpu, ss: Segment, sp: u64, release: u64, target: &Descriptor) {
    let size = match (cpu.long_mode() && target.long(), ss.db()) {
        (true, _) => 8,
        (_, true) => 4,
        _ => 2,
    };
    // A 16-bit stack keeps the upper bits of ESP, as on real CPUs.
    let kept = if size == 2 { cpu.gpr[RSP] & 0xffff_0000 } else { 0 };
    cpu.gpr[RSP] = kept | (sp.wrapping_add(release) & mask(size));
    cpu.segments[SegmentName::Ss as usize] = ss;
}

/// Data segments that the outer level may not use become null (Intel SDM 3A 5.8.6).
fn drop_inner_segments(cpu: &mut Cpu) {
    let cpl = cpu.sys.cpl;
    for name in [SegmentName::Es, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs] {
        let s = &mut cpu.segments[name as usize];
        let conforming = s.is_code() && s.attributes & 4 != 0;
        if s.present() && !conforming && s.dpl() < cpl {
            *s = Segment::default();
        }
    }
}

/// IRET, IRETD, IRETQ.
pub(crate) fn iret(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let size = match insn.mnemonic() {
        Mnemonic::Iret => 2,
        Mnemonic::Iretd => 4,
        _ => 8,
    };
    if cpu.rflags & rflags::VM != 0 && iopl(cpu) < 3 {
        return Err(Exception::GP0);
    }
    cpu.serialize();
    if cpu.mode.real_segments() {
        return iret_real(cpu, size);
    }
    if cpu.rflags & rflags::NT != 0 {
        if cpu.long_mode() {
            return Err(Exception::GP0);
        }
        task::return_from(cpu)?;
        cpu.sys.nmi_blocked = false;
        return Ok(Flow::Jump);
    }
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    if size >= 4 && flags & rflags::VM != 0 && cpu.sys.cpl == 0 && !cpu.long_mode() {
        return iret_to_vm86(cpu, stack, rip, selector, flags);
    }
    let mut d = return_segment(cpu, selector)?;
    check_target(cpu, &d, rip)?;
    let rpl = (selector & 3) as u8;
    let outer = rpl > cpu.sys.cpl;
    let writable = writable_flags(cpu, size);
    if outer || cpu.mode.is_64() {
        let sp = stack.pop(cpu, size)?;
        let ss = stack.pop(cpu, size)? as u16;
        let ss = outer_stack(cpu, ss, rpl, &d)?;
        cpu.mark_accessed(&mut d)?;
        load_outer_stack(cpu, ss, sp, 0, &d);
    } else {
        cpu.mark_accessed(&mut d)?;
        stack.commit(cpu);
    }
    cpu.rflags = (cpu.rflags & !writable) | (flags & writable) | rflags::FIXED;
    load_cs(cpu, &d, rpl);
    if outer {
        drop_inner_segments(cpu);
    }
    cpu.sys.nmi_blocked = false;
    Ok(jump(cpu, rip))
}

fn iret_real(cpu: &mut Cpu, size: usize) -> Done {
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    if rip > u64::from(cpu.segment(SegmentName::Cs).limit) {
        return Err(Exception::GP0);
    }
    stack.commit(cpu);
    let writable = writable_flags(cpu, size);
    cpu.rflags = (cpu.rflags & !writable) | (flags & writable) | rflags::FIXED;
    load_real_cs(cpu, selector);
    cpu.sys.nmi_blocked = false;
    Ok(jump(cpu, rip))
}

/// From privilege level 0 to virtual-8086 mode (Intel SDM 3A 20.2.5).
fn iret_to_vm86(cpu: &mut Cpu, mut stack: Stack, rip: u64, cs: u16, flags: u64) -> Done {
    let sp = stack.pop(cpu, 4)?;
    let mut selectors = [0; 5];
    for s in &mut selectors {
        *s = stack.pop(cpu, 4)? as u16;
    }
    let [ss, es, ds, fs, gs] = selectors;
    for (segment, selector) in cpu.segments.iter_mut().zip([es, cs, ss, ds, fs, gs]) {
        let base = u64::from(selector) << 4;
        *segment = Segment { selector, base, limit: 0xffff, attributes: 0xf3 };
    }
    cpu.gpr[RSP] = sp;
    cpu.rflags = (flags & 0x3f_7fd5) | rflags::FIXED;
    cpu.sys.cpl = 3;
    cpu.sys.nmi_blocked = false;
    Ok(jump(cpu, rip & 0xffff))
}
