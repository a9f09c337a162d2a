//! Delivery of exceptions and interrupts through IVT and IDT (Intel SDM 3A chapter 6).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::{Done, iopl};
use crate::mmu::As;
use crate::segment::{Descriptor, code_of, is_null, kind};
use crate::stack::Stack;
use crate::task;
use arch::registers::{gpr::RSP, rflags, vector};
use arch::{Segment, SegmentName};
use iced_x86::{Instruction, Mnemonic};

/// One event on its way to the guest.
#[derive(Clone, Copy)]
struct Event {
    vector: u8,
    error: Option<u32>,
    /// INT n, INT3, INTO: the gate's DPL counts and EXT stays clear.
    software: bool,
    /// Where the handler returns to.
    return_rip: u64,
    /// RFLAGS to push.
    flags: u64,
}

impl Event {
    fn ext(&self) -> u32 {
        u32::from(!self.software)
    }
}

/// Severity of an exception for the double-fault rules (Intel SDM 3A table 6-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(v: u8) -> Class {
    match v {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What follows when `second` is raised while `first` is delivered; `None` is a triple fault.
fn combine(first: u8, second: Exception) -> Option<Exception> {
    let double = Exception { vector: vector::DF, error: Some(0), cr2: None, dr6: 0 };
    match (class(first), class(second.vector)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => None,
        (Class::Contributory, Class::Contributory) => Some(double),
        (Class::PageFault, Class::Contributory | Class::PageFault) => Some(double),
        _ => Some(second),
    }
}

/// Delivers an exception at `Cpu::rip`; sets `Cpu::triple_fault` where even #DF cannot be.
pub fn deliver_exception(cpu: &mut Cpu, exception: Exception) {
    let mut present = exception;
    // Each round either delivers or climbs towards the triple fault; benign ones are few.
    for _ in 0..8 {
        match raise(cpu, present) {
            Ok(()) => return,
            Err(next) => match combine(present.vector, next) {
                Some(e) => present = e,
                None => break,
            },
        }
    }
    cpu.triple_fault = true;
}

fn raise(cpu: &mut Cpu, e: Exception) -> Result<(), Exception> {
    if let Some(address) = e.cr2 {
        cpu.sys.cr2 = address;
    }
    let mut flags = cpu.rflags;
    if e.vector == vector::DB {
        cpu.sys.debug[4] = (cpu.sys.debug[4] & !0xf) | e.dr6;
        cpu.sys.debug[5] &= !(1 << 13);
    } else if !matches!(e.vector, vector::BP | vector::OF | vector::DF | vector::MC) {
        // A fault's handler returns to the same instruction: its breakpoint must not hit again.
        flags |= rflags::RF;
    }
    let event =
        Event { vector: e.vector, error: e.error, software: false, return_rip: cpu.rip, flags };
    deliver(cpu, event)
}

/// Delivers an external interrupt between instructions.
pub fn deliver_interrupt(cpu: &mut Cpu, vector: u8) {
    let event =
        Event { vector, error: None, software: false, return_rip: cpu.rip, flags: cpu.rflags };
    if let Err(e) = deliver(cpu, event) {
        deliver_exception(cpu, e);
    }
}

/// Delivers an NMI; further ones are blocked until IRET.
pub fn deliver_nmi(cpu: &mut Cpu) {
    cpu.sys.nmi_blocked = true;
    deliver_interrupt(cpu, vector::NMI);
}

/// INT n, INT3, INT1, INTO.
pub(crate) fn int(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let number = match insn.mnemonic() {
        Mnemonic::Int1 => vector::DB,
        Mnemonic::Int3 => vector::BP,
        Mnemonic::Into if cpu.rflags & rflags::OF == 0 => return Ok(Flow::Next),
        Mnemonic::Into => vector::OF,
        _ => insn.immediate8(),
    };
    let vm86 = cpu.rflags & rflags::VM != 0;
    if insn.mnemonic() == Mnemonic::Int && vm86 && iopl(cpu) < 3 {
        return Err(Exception::GP0);
    }
    software_interrupt(cpu, number, insn.mnemonic() != Mnemonic::Int1)?;
    Ok(Flow::Jump)
}

/// Delivers an interrupt that an instruction asked for; `checked` unless it is INT1.
///
/// # Errors
/// The fault of the gate or the stack, to be raised at the instruction itself.
pub fn software_interrupt(cpu: &mut Cpu, vector: u8, checked: bool) -> Result<(), Exception> {
    let return_rip = cpu.next_rip;
    let flags = cpu.rflags & !rflags::RF;
    deliver(cpu, Event { vector, error: None, software: checked, return_rip, flags })
}

fn deliver(cpu: &mut Cpu, event: Event) -> Result<(), Exception> {
    // The handler starts without a single-step trap for what led to it.
    cpu.faulted = true;
    if cpu.sys.cr0 & arch::registers::cr0::PE == 0 {
        return real_mode(cpu, event);
    }
    let gate = read_gate(cpu, event)?;
    if gate.kind() == kind::TASK_GATE {
        return task::interrupt(
            cpu,
            gate.gate_selector(),
            event.return_rip,
            event.error,
            event.ext(),
        );
    }
    let target = Target::find(cpu, &gate, event)?;
    if cpu.long_mode() { target.long(cpu, &gate, event) } else { target.legacy(cpu, &gate, event) }
}

/// Real mode: the table of far pointers (Intel SDM 3A 20.1.4).
fn real_mode(cpu: &mut Cpu, event: Event) -> Result<(), Exception> {
    let at = u64::from(event.vector) * 4;
    if at + 3 > u64::from(cpu.sys.idtr.limit) {
        return Err(Exception::gp(u32::from(event.vector) * 8 + 2 + event.ext()));
    }
    let pointer = cpu.system_load(cpu.sys.idtr.base.wrapping_add(at), 4)?;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, event.flags & !rflags::RF, 2)?;
    stack.push(cpu, u64::from(cpu.segment(SegmentName::Cs).selector), 2)?;
    stack.push(cpu, event.return_rip, 2)?;
    stack.commit(cpu);
    let cs = &mut cpu.segments[SegmentName::Cs as usize];
    cs.selector = (pointer >> 16) as u16;
    cs.base = (pointer >> 16) << 4;
    cpu.rip = pointer & 0xffff;
    cpu.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
    finish(cpu);
    Ok(())
}

fn finish(cpu: &mut Cpu) {
    cpu.sys.shadow = false;
    cpu.sys.shadow_debug = false;
    cpu.update_mode();
}

/// Reads and checks the gate; in long mode only interrupt and trap gates pass.
fn read_gate(cpu: &mut Cpu, event: Event) -> Result<Descriptor, Exception> {
    let code = u32::from(event.vector) * 8 + 2 + event.ext();
    let size: u64 = if cpu.long_mode() { 16 } else { 8 };
    let at = u64::from(event.vector) * size;
    if at + size - 1 > u64::from(cpu.sys.idtr.limit) {
        return Err(Exception::gp(code));
    }
    let address = cpu.sys.idtr.base.wrapping_add(at);
    let raw = cpu.system_load(address, 8)?;
    let gate = Descriptor { selector: 0, raw, address };
    let fits = match gate.kind() {
        0xe | 0xf => true,
        kind::TASK_GATE | 6 | 7 => size == 8,
        _ => false,
    };
    if !fits || (event.software && gate.dpl() < cpu.sys.cpl) {
        return Err(Exception::gp(code));
    }
    if !gate.present() {
        return Err(Exception::np(code));
    }
    Ok(gate)
}

/// Where a gate leads.
struct Target {
    cs: Segment,
    offset: u64,
    cpl: u8,
}

impl Target {
    fn find(cpu: &mut Cpu, gate: &Descriptor, event: Event) -> Result<Self, Exception> {
        let ext = event.ext();
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(Exception::gp(ext));
        }
        let mut d = cpu.descriptor(selector, Exception::gp, ext)?;
        let code = code_of(selector) | ext;
        let long = cpu.long_mode();
        let vm86 = cpu.rflags & rflags::VM != 0;
        if !d.is_code()
            || d.dpl() > cpu.sys.cpl
            || (long && (!d.long() || d.db()))
            || (vm86 && (d.conforming() || d.dpl() != 0))
        {
            return Err(Exception::gp(code));
        }
        if !d.present() {
            return Err(Exception::np(code));
        }
        cpu.mark_accessed(&mut d)?;
        let cpl = if d.conforming() { cpu.sys.cpl } else { d.dpl() };
        let mut cs = d.segment();
        cs.selector = (selector & !3) | u16::from(cpl);
        let mut offset = gate.gate_offset();
        if long {
            offset |= cpu.system_load(gate.address.wrapping_add(8), 4)? << 32;
        } else if gate.kind() < 8 {
            offset &= 0xffff;
        }
        Ok(Self { cs, offset, cpl })
    }

    /// Interrupts and traps in long mode (Intel SDM 3A 6.14).
    fn long(self, cpu: &mut Cpu, gate: &Descriptor, event: Event) -> Result<(), Exception> {
        let ist = (gate.raw >> 32 & 7) as u8;
        let inner = self.cpl < cpu.sys.cpl;
        if !cpu.canonical(self.offset) {
            return Err(Exception::gp(event.ext()));
        }
        let sp = match (ist, inner) {
            (0, false) => cpu.gpr[RSP],
            (0, true) => task::stack_pointer_64(cpu, 4 + 8 * u64::from(self.cpl), event.ext())?,
            _ => task::stack_pointer_64(cpu, 0x1c + 8 * u64::from(ist), event.ext())?,
        };
        let who = if self.cpl == 3 { As::Current } else { As::System };
        let mut stack = Stack::flat(sp & !15, who, event.ext());
        let ss = cpu.segment(SegmentName::Ss).selector;
        let cs = cpu.segment(SegmentName::Cs).selector;
        stack.push(cpu, u64::from(ss), 8)?;
        stack.push(cpu, cpu.gpr[RSP], 8)?;
        stack.push(cpu, event.flags, 8)?;
        stack.push(cpu, u64::from(cs), 8)?;
        stack.push(cpu, event.return_rip, 8)?;
        if let Some(error) = event.error {
            stack.push(cpu, u64::from(error), 8)?;
        }
        stack.commit(cpu);
        if inner {
            let selector = u16::from(self.cpl);
            cpu.segments[SegmentName::Ss as usize] = Segment { selector, ..Segment::default() };
        }
        self.enter(cpu, gate);
        Ok(())
    }

    /// 16- and 32-bit gates (Intel SDM 3A 6.12.1), and those that end virtual-8086 mode
    /// (20.3.1).
    fn legacy(self, cpu: &mut Cpu, gate: &Descriptor, event: Event) -> Result<(), Exception> {
        let size = if gate.kind() >= 8 { 4 } else { 2 };
        let inner = self.cpl < cpu.sys.cpl;
        let vm86 = cpu.rflags & rflags::VM != 0;
        let ext = event.ext();
        let (mut stack, ss) = if inner {
            let (ss, sp) = task::inner_stack(cpu, self.cpl, ext)?;
            let stack = Stack::other(ss, sp, As::System, code_of(ss.selector) | ext);
            (stack, Some(ss))
        } else {
            (Stack::current(cpu).with_error(ext), None)
        };
        if vm86 {
            for name in [SegmentName::Gs, SegmentName::Fs, SegmentName::Ds, SegmentName::Es] {
                stack.push(cpu, u64::from(cpu.segment(name).selector), size)?;
            }
        }
        if inner {
            stack.push(cpu, u64::from(cpu.segment(SegmentName::Ss).selector), size)?;
            stack.push(cpu, cpu.gpr[RSP], size)?;
        }
        stack.push(cpu, event.flags, size)?;
        stack.push(cpu, u64::from(cpu.segment(SegmentName::Cs).selector), size)?;
        stack.push(cpu, event.return_rip, size)?;
        if let Some(error) = event.error {
            stack.push(cpu, u64::from(error), size)?;
        }
        if let Some(ss) = ss {
            cpu.gpr[RSP] = stack.sp & 0xffff_ffff;
            cpu.segments[SegmentName::Ss as usize] = ss;
        } else {
            stack.commit(cpu);
        }
        if vm86 {
            for name in [SegmentName::Gs, SegmentName::Fs, SegmentName::Ds, SegmentName::Es] {
                cpu.segments[name as usize] = Segment::default();
            }
        }
        self.enter(cpu, gate);
        Ok(())
    }

    fn enter(self, cpu: &mut Cpu, gate: &Descriptor) {
        cpu.segments[SegmentName::Cs as usize] = self.cs;
        cpu.sys.cpl = self.cpl;
        cpu.rip = self.offset;
        cpu.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
        // Interrupt gates have an even type.
        if gate.kind() & 1 == 0 {
            cpu.rflags &= !rflags::IF;
        }
        finish(cpu);
    }
}
