//! From guest bytes to a translated block.
//!
//! [`Cpu::block_at`] finds or makes the block at the present `rip`. Translation has three steps:
//! [`fetch`] decodes a straight run of instructions within one page, `flags` finds out which
//! arithmetic flags are live where, and `emit` writes host code.
pub mod classify;
pub mod facts;
pub mod fetch;
pub mod flags;
pub mod groups;
mod undefined;

use crate::cache::{Block, BlockId, Key, NewBlock, Rare, Source};
use crate::cpu::Cpu;
use crate::emit::checked::Variable;
use crate::emit::control::Successor;
use crate::emit::recent::Recent;
use crate::emit::{Buffers, Context, Emitted, Emitter, stack};
use crate::exception::Exception;
use crate::helpers::Helped;
use crate::mode::Mode;
use crate::ram::Ram;
use crate::rewritten::Check;
use crate::vm::pending;
use arch::SegmentName;
use classify::{Class, Operands};
use fetch::Run;
use flags::{ALL, Effect, Flags};
use groups::{Group, Member};
use iced_x86::{Instruction, Mnemonic};
use std::sync::atomic::Ordering;

/// A decoded guest instruction and what is to be done with it.
#[derive(Clone, Copy)]
pub struct Step {
    insn: Instruction,
    class: Class,
    effect: Effect,
    /// Whether a helper executes it.
    helped: bool,
    /// Whether it is a string instruction that translated code does itself as a rule.
    string: bool,
    live_before: Flags,
    live_after: Flags,
    /// Membership of the memory operand in a group.
    operand: Option<Member>,
    /// Membership of the implicit stack access.
    stack: Option<Member>,
}

impl Step {
    /// Whether this is the system instruction `mnemonic`, handled by translated code itself.
    fn is_inline(&self, mnemonic: Mnemonic) -> bool {
        matches!(self.class, Class::System | Class::SystemEnd) && self.insn.mnemonic() == mnemonic
    }

    /// Whether translated code handles it itself but for rare cases, which a helper does.
    fn may_need_help(&self) -> bool {
        const SOME: [Mnemonic; 4] =
            [Mnemonic::Sti, Mnemonic::Stac, Mnemonic::Clac, Mnemonic::Pause];
        SOME.iter().any(|&m| self.is_inline(m))
    }
}

/// What is needed while a block is translated, kept for the next one.
#[derive(Default)]
pub struct Desk {
    run: Run,
    sources: Vec<Source>,
    groups: Vec<Group>,
    operands: Operands,
    buffers: Option<Buffers>,
}

/// Digest of the bytes that a block was made from.
pub fn digest(ram: &Ram, sources: &mut dyn Iterator<Item = Source>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for source in sources {
        let end = source.start + u64::from(source.len);
        for start in (source.start..end).step_by(8) {
            let mut word = [0; 8];
            let len = (end - start).min(8) as usize;
            if fetch::copy(ram, start, &mut word[..len]).is_none() {
                break;
            }
            hash = (hash.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x100_0000_01b3);
        }
    }
    hash
}

impl Cpu {
    /// Mask of the instruction pointer in the present mode.
    pub fn ip_mask(&self) -> u64 {
        self.address_mask()
    }

    /// Linear address of an instruction pointer, or the fault that fetching there raises.
    ///
    /// # Errors
    /// #GP(0) beyond the code segment's limit or at a non-canonical address.
    pub fn code_address(&self, rip: u64) -> Result<u64, Exception> {
        if self.mode.is_64() {
            return if self.canonical(rip) { Ok(rip) } else { Err(Exception::GP0) };
        }
        let cs = self.segment(SegmentName::Cs);
        if rip > u64::from(cs.limit) {
            return Err(Exception::GP0);
        }
        Ok(cs.base.wrapping_add(rip) & 0xffff_ffff)
    }

    /// The translated block at `rip` in the present mode.
    ///
    /// # Errors
    /// Faults of the instruction fetch.
    pub fn block_at(&mut self, rip: u64) -> Result<BlockId, Exception> {
        let linear = self.code_address(rip)?;
        let physical = self.translate_fetch(linear)?;
        let key = Key { pc: rip, physical, mode: self.mode };
        if let Some(id) = self.current(&key) {
            match self.cache.block(id).and_then(Block::second_page) {
                None => return Ok(id),
                Some(page) => {
                    let next = (linear | 0xfff).wrapping_add(1) & self.address_mask();
                    if self.translate_fetch(next)? & !0xfff == page {
                        return Ok(id);
                    }
                }
            }
        }
        self.translate_block(key, linear)
    }

    /// The block under `key`, in the version for the code as it is now.
    fn current(&self, key: &Key) -> Option<BlockId> {
        let id = self.cache.find(key)?;
        match self.cache.block(id)?.checks() {
            None => Some(id),
            Some(_) => self.fitting_version(key),
        }
    }

    fn translate_block(&mut self, key: Key, linear: u64) -> Result<BlockId, Exception> {
        let mut desk = self.cache.desk.take().unwrap_or_default();
        let result = loop {
            match self.translate_on(&mut desk, key, linear) {
                Ok(None) => self.flush_code(),
                Ok(Some(id)) => break Ok(id),
                Err(exception) => break Err(exception),
            }
        };
        self.cache.desk = Some(desk);
        result
    }

    /// Translates a block; `None` where the code cache is full.
    fn translate_on(
        &mut self,
        desk: &mut Desk,
        key: Key,
        linear: u64,
    ) -> Result<Option<BlockId>, Exception> {
        self.prepare_checked(&key);
        self.claim_page(key.physical);
        self.fetch_run(key, linear, &mut desk.run)?;
        if let Some(second) = desk.run.second_page {
            self.claim_page(second);
            // Read again: the first reading may have missed a write that nobody told us of.
            self.fetch_run(key, linear, &mut desk.run)?;
        }
        self.find_sources(key, desk);
        let mut checks = self.checks(key, &desk.run);
        if !checks.is_empty() {
            self.generalise(&key, &mut checks, &desk.run.fields);
        }
        // Only another vCPU can write without our notice.
        let digest = match self.vm.mailboxes.len() {
            1 => 0,
            _ => digest(&self.vm.ram, &mut desk.sources.iter().copied()),
        };
        let (emitted, instructions) = self.emit(key, desk, &checks);
        let rare = Rare {
            second_page: desk.run.second_page.map(|p| p & !0xfff),
            instructions,
            checks: checks.into_boxed_slice(),
        };
        let new = NewBlock { key, emitted: &emitted, sources: &desk.sources, digest, rare };
        let id = self.cache.add(new, &mut self.cells);
        desk.buffers = Some(emitted.into_buffers());
        Ok(id)
    }

    /// Tells everybody that this vCPU translates code on the page, so that writes to it are
    /// noticed: our own TLB forgets write access now, other vCPUs are asked to, and until they
    /// answer the page is `unsure`. Pages whose blocks check their code need none of that.
    fn claim_page(&mut self, physical: u64) {
        if self.cache.rewritten.checks(physical) {
            return;
        }
        let mine = 1 << self.index;
        match self.vm.ram.page(physical) {
            Some(page) if page.code.load(Ordering::Relaxed) & mine == 0 => {}
            _ => return,
        }
        let vm = self.vm.clone();
        let Some(page) = vm.ram.page(physical) else { return };
        let before = page.code.fetch_or(mine, Ordering::SeqCst);
        if before & mine != 0 {
            return;
        }
        self.tlb.forbid_writes(page.host as u64);
        let mut asked = 0;
        for (n, mailbox) in vm.mailboxes.iter().enumerate() {
            if n as u32 != self.index && mailbox.poll.load(Ordering::SeqCst) != 0 {
                mailbox.lock_guarded().push((physical & !0xfff, self.index));
                mailbox.post(pending::GUARD);
                asked += 1;
            }
        }
        if asked > 0 {
            self.cache.unsure.push((physical & !0xfff, asked));
        }
    }

    /// Finds the bytes on whose watch the block depends: its own, and those that flag liveness
    /// looked at.
    fn find_sources(&self, key: Key, desk: &mut Desk) {
        let watched = |s: &Source| !self.cache.rewritten.checks(s.start);
        desk.sources.clear();
        desk.sources.extend(desk.run.pieces(key).filter(watched));
        desk.sources.extend_from_slice(&desk.run.looked_at);
    }

    /// What the block must check itself.
    fn checks(&self, key: Key, run: &Run) -> Vec<Check> {
        let mut checks = Vec::new();
        let mut at = 0;
        for Source { start, len } in run.pieces(key) {
            let end = at + usize::from(len);
            if self.cache.rewritten.checks(start)
                && let Some(bytes) = run.bytes.get(at..end)
                && let Some(host) = self.vm.ram.bytes(start, bytes.len())
            {
                let (bytes, variable) = (bytes.into(), Vec::new());
                checks.push(Check { start, host: host as u64, bytes, variable });
            }
            at = end;
        }
        checks
    }

    fn emit(&mut self, key: Key, desk: &mut Desk, checks: &[Check]) -> (Emitted, Box<[Helped]>) {
        let Desk { run, groups, operands, buffers, .. } = desk;
        let helped: Box<[Helped]> = run
            .steps
            .iter()
            .filter(|s| s.helped || s.may_need_help())
            .map(|s| match s.class {
                Class::Invalid => Helped::invalid(s.insn),
                _ => Helped::new(s.insn),
            })
            .collect();
        groups.clear();
        if checks.is_empty() && !self.cache.is_ungrouped(&key) {
            groups::plan(&mut run.steps, key.mode, operands, groups);
        }
        let live_in = run.steps.first().map_or(ALL, |s| s.live_before);
        let last = run.steps.last();
        let last_varies =
            || run.steps.len().checked_sub(1).and_then(|n| variable(n, checks)).is_some();
        let poll = last.is_some_and(|s| run.may_loop(s)) || last_varies();
        let context = Context { recent: self.recent(&key, run, poll), ..self.context(key, run) };
        let buffers = buffers.take().unwrap_or_default();
        let mut emitter = Emitter::new(context, operands, groups, buffers, (live_in, poll), checks);
        let mut next_helped = helped.iter();
        for (n, step) in run.steps.iter().enumerate() {
            emitter.begin(&step.insn, step.live_before, step.live_after);
            emitter.set_members(step.operand, step.stack, continues_group(step));
            if step.helped {
                match next_helped.next() {
                    Some(insn) if step.string => emitter.string(&step.insn, insn),
                    Some(insn) => emitter.helper(insn),
                    None => {}
                }
                continue;
            }
            if step.may_need_help() {
                if let Some(help) = next_helped.next() {
                    emitter.system_with_help(&step.insn, help);
                }
                continue;
            }
            match variable(n, checks) {
                Some(variable) => emit_variable(&mut emitter, step, variable),
                None => emit_step(&mut emitter, step, run),
            }
        }
        if !last.is_some_and(|s| is_transfer(s.class) && !s.helped) {
            emitter.go(run.next);
        }
        (emitter.finish(live_in), helped)
    }

    /// Which operands of a block, which polls if it can be part of a loop, try recent pages.
    fn recent(&self, key: &Key, run: &Run, poll: bool) -> Recent {
        let returns = run.steps.last().is_some_and(|s| s.class == Class::Return);
        if !may_use_recent(key.mode) {
            Recent::Nothing
        } else if !poll || returns || self.cache.is_restless(key) {
            Recent::Stack
        } else if run.target.is_some_and(|t| t.near && t.pc == key.pc) {
            Recent::All
        } else {
            Recent::Arrays
        }
    }

    fn context(&self, key: Key, run: &Run) -> Context {
        let (first_edge, first_cell) = self.cache.next_numbers();
        Context {
            mode: key.mode,
            pc: key.pc,
            first_edge,
            first_cell,
            // Single steps show all flags.
            precise: self.vm.options.precise_flags || key.mode.step(),
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            vectors: run.steps.iter().any(|s| s.class == Class::NativeVector),
            recent: Recent::Nothing,
            linkable: !key.mode.step() && !key.mode.shadow(),
        }
    }
}

/// Whether code of this mode may try recent pages before the TLB.
pub fn may_use_recent(mode: Mode) -> bool {
    !mode.plain() && !mode.step() && !mode.shadow()
}

/// Whether a helper executes an instruction of this class in this mode.
pub fn helped(class: Class, insn: &Instruction, mode: Mode) -> bool {
    match class {
        Class::Helper | Class::HelperEnd | Class::Invalid => true,
        Class::ReadTsc => mode.no_tsc(),
        Class::Push | Class::PushMemory | Class::Pop | Class::Leave | Class::Return => {
            !stack::is_flat(mode)
        }
        Class::Call | Class::CallIndirect => {
            // A call pushes a return address of the operand size, which must be the mode's own.
            let natural = if mode.is_64() { 8 } else { 4 };
            !stack::is_flat(mode) || insn.stack_pointer_increment().unsigned_abs() != natural
        }
        Class::Native | Class::NativeVector => {
            !facts::of(insn).general && crate::fpu::fpu_allowed(mode, insn).is_err()
        }
        _ => false,
    }
}

fn is_transfer(class: Class) -> bool {
    matches!(
        class,
        Class::Jump
            | Class::Branch
            | Class::LoopBranch
            | Class::Call
            | Class::JumpIndirect
            | Class::CallIndirect
            | Class::Return
    )
}

/// Whether a step needs no RSP that is up to date.
fn continues_group(step: &Step) -> bool {
    matches!(step.class, Class::Push | Class::Pop | Class::Return)
        && !step.helped
        && Emitter::continues_group(&step.insn, step.stack)
}

/// Where the constant of step `n` is to be loaded from, if it varies.
fn variable(n: usize, checks: &[Check]) -> Option<Variable> {
    let check = checks.first()?;
    let field = check.variable.iter().find(|f| usize::from(f.step) == n)?;
    Some(Variable { host: check.host + u64::from(field.offset), len: field.len })
}

fn emit_variable(emitter: &mut Emitter<'_>, step: &Step, variable: Variable) {
    match step.class {
        Class::Jump | Class::Call => emitter.transfer_variable(&step.insn, variable),
        _ => {
            if emitter.native_variable(&step.insn, step.effect, variable).is_err() {
                emitter.invalid();
            }
        }
    }
}

fn emit_step(emitter: &mut Emitter<'_>, step: &Step, run: &Run) {
    let insn = &step.insn;
    let encoded = match step.class {
        Class::Native | Class::NativeVector => {
            emitter.native(insn, step.effect, run.bytes_of(insn))
        }
        Class::BitString => emitter.bit_string(insn, step.effect),
        Class::MovOffset => emitter.mov_offset(insn),
        _ => {
            emit_simple(emitter, step, run);
            Ok(())
        }
    };
    // The classification admits only what iced can encode in 64-bit mode; `cputest` runs every
    // form. Should one slip through, the guest gets #UD there instead of wrong code.
    if encoded.is_err() {
        emitter.invalid();
    }
}

fn emit_simple(emitter: &mut Emitter<'_>, step: &Step, run: &Run) {
    let insn = &step.insn;
    let taken = run.target.unwrap_or(run.next);
    match step.class {
        Class::Lea => emitter.lea(insn),
        Class::Push => emitter.push(insn),
        Class::PushMemory => emitter.push_memory(insn),
        Class::Pop => emitter.pop(insn),
        Class::Leave => emitter.leave(insn),
        Class::ReadTsc => emitter.read_tsc(insn),
        Class::Jump => emitter.go(taken),
        Class::Branch => emitter.branch(insn, taken, run.next),
        Class::LoopBranch => emitter.loop_branch(insn, taken, run.next),
        Class::Call => emitter.call(insn, taken),
        Class::JumpIndirect => emitter.jump_indirect(insn),
        Class::CallIndirect => emitter.call_indirect(insn),
        Class::Return => emitter.ret(insn),
        Class::System | Class::SystemEnd => emitter.system(insn),
        _ => {}
    }
}

/// Where a run goes on and with which flags: see [`Successor`].
fn successor(pc: u64, live: Flags, near: bool) -> Successor {
    Successor { pc, live, near }
}
