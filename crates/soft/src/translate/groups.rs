//! Coalescing: accesses of a block that are known to lie close together share one TLB probe.
//!
//! Addresses are compared by value numbering: each general register holds *value* `epoch` plus a
//! constant, and constant additions, moves and the stack pointer's steps keep the value. Accesses
//! at constant distances from one value form a [`Group`], and so do those at constant addresses in
//! one page. Its first member probes the TLB for the
//! whole span, which must lie in one page; the others use the host address that it found. Where
//! that fails, the block is left at the first member, nothing having happened, and a translation
//! without groups goes on from there (`Mode::PLAIN`).
use super::Step;
use super::classify::{Class, Operands, has_memory};
use crate::emit::address;
use crate::mode::{Mode, SegmentClass};
use crate::operand::operand_segment;
use arch::SegmentName;
use arch::registers::gpr::{RBP, RSP};
use iced_x86::{Instruction, Mnemonic, OpAccess, OpKind, Register};

/// Groups in a block at most: each has a slot in the CPU structure.
pub const MAX_GROUPS: usize = 8;
/// Longest span, in bytes: longer ones cross pages too often.
const MAX_SPAN: i64 = 256;

/// Accesses that share a probe.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    epoch: u32,
    segment: SegmentName,
    /// The page, where the translator knows it: then that is what the offsets count from.
    pub page: Option<u64>,
    /// Lowest offset from the value, and the end of the highest access.
    low: i64,
    high: i64,
    /// Whether any member writes.
    pub write: bool,
    members: u32,
}

impl Group {
    /// Bytes from the lowest address to the end of the highest access.
    pub fn span(&self) -> u32 {
        (self.high - self.low) as u32
    }
}

/// An access in a group.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Index of the group, below [`MAX_GROUPS`].
    pub group: usize,
    /// Distance from the group's lowest address, in bytes.
    pub distance: i32,
    /// Whether it is the one that probes.
    pub first: bool,
}

/// A register's value: `value number epoch` + `delta`.
#[derive(Clone, Copy)]
struct Value {
    epoch: u32,
    delta: i64,
}

struct Planner<'a> {
    mode: Mode,
    operands: &'a mut Operands,
    registers: [Value; 16],
    next_epoch: u32,
    groups: &'a mut Vec<Group>,
    /// The present instruction is in the shadow of STI: it must not leave the block before it is
    /// through, so it cannot probe for a group.
    shadow: bool,
}

/// Puts the accesses of a block into `groups`, and marks them in `steps`.
pub fn plan(steps: &mut [Step], mode: Mode, operands: &mut Operands, groups: &mut Vec<Group>) {
    let bits32 = mode.code() == crate::mode::CodeSize::Bits32;
    if mode.plain() || steps.len() < 2 || !(mode.is_64() || (bits32 && mode.stack32())) {
        return;
    }
    if steps.iter().filter(|s| may_access(s)).nth(1).is_none() {
        return;
    }
    let registers = std::array::from_fn(|n| Value { epoch: n as u32, delta: 0 });
    let mut planner = Planner { mode, operands, registers, next_epoch: 16, groups, shadow: false };
    for step in steps.iter_mut() {
        planner.step(step);
    }
    settle(steps, groups);
}

/// Whether the access of a step could be in a group.
fn may_access(step: &Step) -> bool {
    match step.class {
        Class::Native | Class::NativeVector => has_memory(&step.insn),
        Class::Push | Class::PushMemory | Class::Pop => true,
        Class::Call | Class::CallIndirect | Class::Return => true,
        Class::System => step.is_inline(Mnemonic::Pushfq),
        _ => false,
    }
}

/// Dissolves groups of one, and turns offsets into distances from the lowest address.
fn settle(steps: &mut [Step], groups: &[Group]) {
    let mut seen = [false; MAX_GROUPS];
    for step in steps {
        // A PUSH of memory reads its operand before it writes the stack.
        for member in [&mut step.operand, &mut step.stack] {
            let Some(m) = member else { continue };
            let Some(group) = groups.get(m.group) else { continue };
            if group.members < 2 {
                *member = None;
                continue;
            }
            m.distance = (i64::from(m.distance) - group.low) as i32;
            m.first = !std::mem::replace(&mut seen[m.group], true);
        }
    }
}

impl Planner<'_> {
    fn step(&mut self, step: &mut Step) {
        self.classify(step);
        self.shadow = step.is_inline(Mnemonic::Sti);
    }

    fn system(&mut self, step: &mut Step) {
        match step.insn.mnemonic() {
            Mnemonic::Pushfq => {
                self.registers[RSP].delta -= 8;
                step.stack = self.access(RSP, 0, 8, true, SegmentName::Ss);
            }
            Mnemonic::Mov => self.forget(step.insn.op0_register().number()),
            _ => {}
        }
    }

    fn classify(&mut self, step: &mut Step) {
        let insn = &step.insn;
        match step.class {
            Class::Native | Class::NativeVector => {
                step.operand = self.operand(insn);
                self.effects(insn);
            }
            Class::Push | Class::PushMemory | Class::Call | Class::CallIndirect => {
                let size = i64::from(insn.stack_pointer_increment().unsigned_abs());
                self.registers[RSP].delta -= size;
                step.stack = self.access(RSP, 0, size, true, SegmentName::Ss);
            }
            Class::Pop => {
                let size = i64::from(insn.stack_pointer_increment().unsigned_abs());
                step.stack = self.access(RSP, 0, size, false, SegmentName::Ss);
                self.registers[RSP].delta += size;
                self.forget(insn.op0_register().full_register().number());
            }
            Class::Return => {
                let extra = if insn.op_count() > 0 { i64::from(insn.immediate16()) } else { 0 };
                let size = i64::from(insn.stack_pointer_increment().unsigned_abs()) - extra;
                step.stack = self.access(RSP, 0, size, false, SegmentName::Ss);
            }
            Class::Leave => {
                self.forget(RSP);
                self.forget(RBP);
            }
            Class::Lea => self.effects(insn),
            Class::System => self.system(step),
            Class::Nothing | Class::Jump | Class::Branch | Class::JumpIndirect => {}
            Class::MovOffset | Class::BitString | Class::ReadTsc => self.effects(insn),
            _ => (0..16).for_each(|n| self.forget(n)),
        }
    }

    fn forget(&mut self, n: usize) {
        if let Some(value) = self.registers.get_mut(n) {
            *value = Value { epoch: self.next_epoch, delta: 0 };
            self.next_epoch += 1;
        }
    }

    /// The membership of the instruction's memory operand.
    fn operand(&mut self, insn: &Instruction) -> Option<Member> {
        let operand = self.operands.memory(insn)?;
        if let Some(offset) = address::constant(insn, self.mode) {
            let segment = operand_segment(insn, self.mode.is_64());
            return self.constant(offset, i64::from(operand.size), operand.writes, segment);
        }
        let base = insn.memory_base();
        if insn.memory_index() != Register::None || !self.is_natural(base) {
            return None;
        }
        let disp = i64::from(insn.memory_displacement64() as i32);
        let segment = operand_segment(insn, self.mode.is_64());
        self.access(base.number(), disp, i64::from(operand.size), operand.writes, segment)
    }

    /// Whether a register is a general one of the mode's address size.
    fn is_natural(&self, register: Register) -> bool {
        if self.mode.is_64() { register.is_gpr64() } else { register.is_gpr32() }
    }

    fn access(
        &mut self,
        base: usize,
        disp: i64,
        size: i64,
        write: bool,
        segment: SegmentName,
    ) -> Option<Member> {
        if self.shadow || self.mode.access(segment, write) != SegmentClass::Flat {
            return None;
        }
        // Flat segments are all the same.
        let segment = SegmentName::Ds;
        let Value { epoch, delta } = self.registers[base & 15];
        let (low, high) = (delta + disp, delta + disp + size);
        let fits = |g: &Group| {
            g.page.is_none()
                && g.epoch == epoch
                && g.segment == segment
                && g.high.max(high) - g.low.min(low) <= MAX_SPAN
        };
        let new = Group { epoch, segment, page: None, low, high, write, members: 0 };
        self.join(fits, new)
    }

    /// The same at an address that is known.
    fn constant(
        &mut self,
        address: u64,
        size: i64,
        write: bool,
        segment: SegmentName,
    ) -> Option<Member> {
        let (page, low) = (address & !0xfff, (address & 0xfff) as i64);
        let flat = self.mode.access(segment, write) == SegmentClass::Flat;
        if self.shadow || !flat || low + size > 4096 {
            return None;
        }
        // Before its first write a page is not to become dirty.
        let fits = |g: &Group| g.page == Some(page) && (g.write || !write);
        let segment = SegmentName::Ds;
        let group =
            Group { epoch: 0, segment, page: Some(page), low: 0, high: 0, write, members: 0 };
        let mut member = self.join(fits, Group { high: low + size, ..group })?;
        member.distance = low as i32;
        Some(member)
    }

    /// Puts an access into the first group that `fits`, or into a `new` one, which has its bounds.
    fn join(&mut self, fits: impl Fn(&Group) -> bool, new: Group) -> Option<Member> {
        let Group { low, high, write, .. } = new;
        let group = match self.groups.iter().position(fits) {
            Some(n) => n,
            None if self.groups.len() < MAX_GROUPS => {
                self.groups.push(new);
                self.groups.len() - 1
            }
            None => return None,
        };
        let g = &mut self.groups[group];
        g.low = g.low.min(low);
        g.high = g.high.max(high);
        g.write |= write;
        g.members += 1;
        let distance = i32::try_from(low).ok()?;
        Some(Member { group, distance, first: false })
    }

    /// What the instruction does to the registers' values.
    fn effects(&mut self, insn: &Instruction) {
        if let Some((target, value)) = self.constant_step(insn) {
            self.registers[target] = value;
            return;
        }
        if let Some(target) = sole_target(insn) {
            return self.forget(target);
        }
        let written = self
            .operands
            .registers(insn)
            .filter(|(r, access)| r.is_gpr() && *access != OpAccess::Read)
            .fold(0u32, |set, (r, _)| set | 1 << r.full_register().number());
        (0..16).filter(|n| written >> n & 1 != 0).for_each(|n| self.forget(n));
    }

    /// Recognises moves and constant additions of whole registers.
    fn constant_step(&self, insn: &Instruction) -> Option<(usize, Value)> {
        let target = insn.op0_register();
        if insn.op_kind(0) != OpKind::Register || !self.is_natural(target) {
            return None;
        }
        let old = self.registers[target.number() & 15];
        let moved = |by: i64| Value { delta: old.delta.checked_add(by).unwrap_or(0), ..old };
        let immediate = || insn.try_immediate(1).ok().map(|v| v as i32 as i64);
        let value = match insn.mnemonic() {
            Mnemonic::Add => moved(immediate()?),
            Mnemonic::Sub => moved(-immediate()?),
            Mnemonic::Inc => moved(1),
            Mnemonic::Dec => moved(-1),
            Mnemonic::Mov if insn.op_kind(1) == OpKind::Register => {
                let source = insn.op1_register();
                self.is_natural(source).then(|| self.registers[source.number() & 15])?
            }
            Mnemonic::Lea => {
                let base = insn.memory_base();
                if insn.memory_index() != Register::None || !self.is_natural(base) {
                    return None;
                }
                let Value { epoch, delta } = self.registers[base.number() & 15];
                Value { epoch, delta: delta + i64::from(insn.memory_displacement64() as i32) }
            }
            _ => return None,
        };
        // What strays too far is as good as unknown, and cannot overflow.
        (value.delta.abs() < 1 << 24).then_some((target.number(), value))
    }
}

/// The only general register that a common instruction can write, or a number beyond all if it
/// writes none; `None` for instructions of which this does not know.
fn sole_target(insn: &Instruction) -> Option<usize> {
    use Mnemonic as M;
    const NOTHING: usize = usize::MAX;
    match insn.mnemonic() {
        M::Cmp | M::Test => Some(NOTHING),
        M::Mov
        | M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Lea
        | M::Add
        | M::Or
        | M::Adc
        | M::Sbb
        | M::And
        | M::Sub
        | M::Xor
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Shl
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror => match insn.op0_kind() {
            OpKind::Register if insn.op0_register().is_gpr() => {
                Some(insn.op0_register().full_register().number())
            }
            _ => Some(NOTHING),
        },
        _ => None,
    }
}
