//! From guest bytes to a translated block.
//!
//! [`Cpu::block_at`] finds or makes the block at the present `rip`. Translation has three steps:
//! [`fetch`] decodes a straight run of instructions within one page, `flags` finds out which
//! arithmetic flags are live where, and `emit` writes host code.
pub mod classify;
pub mod fetch;
pub mod flags;
pub mod groups;

use crate::cache::{BlockId, Key, NewBlock, Source};
use crate::cpu::Cpu;
use crate::emit::control::Successor;
use crate::emit::{Context, Emitter, stack};
use crate::exception::Exception;
use crate::helpers::Helped;
use crate::mode::Mode;
use crate::ram::Ram;
use crate::vm::pending;
use arch::SegmentName;
use classify::{Class, Operands};
use fetch::Run;
use flags::{ALL, Effect, Flags};
use groups::Member;
use iced_x86::{Instruction, Mnemonic};
use std::sync::atomic::Ordering;

/// A decoded guest instruction and what is to be done with it.
#[derive(Clone, Copy)]
pub struct Step {
    insn: Instruction,
    class: Class,
    effect: Effect,
    live_before: Flags,
    live_after: Flags,
    /// Membership of the memory operand in a group.
    operand: Option<Member>,
    /// Membership of the implicit stack access.
    stack: Option<Member>,
}

/// Digest of the bytes that a block was made from.
pub fn digest(ram: &Ram, sources: &[Source]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut buffer = [0u8; 4096];
    for source in sources {
        let Some(bytes) = buffer.get_mut(..usize::from(source.len)) else { continue };
        if fetch::copy(ram, source.start, bytes).is_none() {
            continue;
        }
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
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
        if let Some(id) = self.cache.find(&key) {
            match self.cache.block(id).and_then(|b| b.second_page) {
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

    fn translate_block(&mut self, key: Key, linear: u64) -> Result<BlockId, Exception> {
        self.claim_page(key.physical);
        let mut run = self.fetch_run(key, linear)?;
        if let Some(second) = run.second_page {
            self.claim_page(second);
            // Read again: the first reading may have missed a write that nobody told us of.
            run = self.fetch_run(key, linear)?;
        }
        let sources = self.sources(key, &run);
        let digest = digest(&self.vm.ram, &sources);
        loop {
            let (emitted, instructions) = self.emit(key, &run);
            let new = NewBlock {
                key,
                second_page: run.second_page.map(|p| p & !0xfff),
                emitted,
                instructions,
                sources: sources.clone(),
                digest,
            };
            if let Some(id) = self.cache.add(new, &mut self.cells) {
                return Ok(id);
            }
            self.flush_code();
            self.claim_page(key.physical);
            if let Some(second) = run.second_page {
                self.claim_page(second);
            }
        }
    }

    /// Tells everybody that this vCPU translates code on the page, so that writes to it are
    /// noticed: our own TLB forgets write access now, other vCPUs are asked to, and until they
    /// answer the page is `unsure`.
    fn claim_page(&mut self, physical: u64) {
        let vm = self.vm.clone();
        let Some(page) = vm.ram.page(physical) else { return };
        let before = page.code.fetch_or(1 << self.index, Ordering::SeqCst);
        if before >> self.index & 1 != 0 {
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

    /// Bytes on which the block depends: its own, and those that flag liveness looked at.
    fn sources(&self, key: Key, run: &Run) -> Vec<Source> {
        let own = run.len.min(4096 - (key.physical & 0xfff) as usize);
        let mut sources = vec![Source { start: key.physical, len: own as u16 }];
        if let Some(second) = run.second_page {
            sources.push(Source { start: second & !0xfff, len: (run.len - own) as u16 });
        }
        sources.extend_from_slice(&run.looked_at);
        sources
    }

    fn emit(&mut self, key: Key, run: &Run) -> (crate::emit::Emitted, Box<[Helped]>) {
        let steps = &run.steps;
        let mode = key.mode;
        let helped: Box<[Helped]> = steps
            .iter()
            .filter(|s| may_need_help(s) || self.is_helped(s, mode))
            .map(|s| Helped::new(s.insn))
            .collect();
        let (first_edge, first_cell) = self.cache.next_numbers();
        let context = Context {
            mode,
            pc: key.pc,
            first_edge,
            first_cell,
            precise: self.vm.options.precise_flags,
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            vectors: steps.iter().any(|s| s.class == Class::NativeVector),
            linkable: !mode.step() && !mode.shadow(),
        };
        let live_in = steps.first().map_or(ALL, |s| s.live_before);
        let poll = steps.last().is_some_and(|s| run.may_loop(s));
        let mut operands = Operands::default();
        let mut steps = steps.clone();
        let groups = match self.cache.is_ungrouped(&key) {
            true => Vec::new(),
            false => groups::plan(&mut steps, mode, &mut operands),
        };
        let mut emitter = Emitter::new(context, &mut operands, groups, live_in, poll);
        let mut next_helped = helped.iter();
        for step in &steps {
            emitter.begin(&step.insn, step.live_before, step.live_after);
            emitter.set_members(step.operand, step.stack);
            if self.is_helped(step, mode) {
                if let Some(insn) = next_helped.next() {
                    emitter.helper(insn);
                }
                continue;
            }
            if may_need_help(step) {
                if let Some(help) = next_helped.next() {
                    emitter.system_with_help(&step.insn, help);
                }
                continue;
            }
            emit_step(&mut emitter, step, run);
        }
        if !steps.last().is_some_and(|s| is_transfer(s.class) && !self.is_helped(s, mode)) {
            emitter.go(run.next);
        }
        (emitter.finish(live_in), helped)
    }

    /// Whether a helper executes the instruction in this mode.
    fn is_helped(&self, step: &Step, mode: Mode) -> bool {
        helped(step.class, &step.insn, mode)
    }
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
        Class::Native | Class::NativeVector => crate::fpu::fpu_allowed(mode, insn).is_err(),
        _ => false,
    }
}

/// Whether translated code handles this instruction itself, being that of a system.
fn is_inline(step: &Step, mnemonic: Mnemonic) -> bool {
    matches!(step.class, Class::System | Class::SystemEnd) && step.insn.mnemonic() == mnemonic
}

/// Whether translated code handles the instruction itself but for rare cases, which a helper does.
fn may_need_help(step: &Step) -> bool {
    [Mnemonic::Sti, Mnemonic::Stac, Mnemonic::Clac].iter().any(|&m| is_inline(step, m))
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

fn emit_step(emitter: &mut Emitter<'_>, step: &Step, run: &Run) {
    let insn = &step.insn;
    let encoded = match step.class {
        Class::Native | Class::NativeVector => emitter.native(insn, step.effect),
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
