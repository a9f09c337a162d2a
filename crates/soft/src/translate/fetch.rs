//! Reading and decoding guest code, and looking ahead for live flags.
#![allow(unsafe_code)]
use super::classify::Operands;
use super::classify::{Class, classify};
use super::facts::{self, Facts};
use super::flags::{self, ALL, Effect, Flags};
use super::{Step, helped, successor};
use crate::cache::{Key, Source};
use crate::cpu::Cpu;
use crate::emit::checked::can_vary;
use crate::emit::control::Successor;
use crate::emit::strings;
use crate::exception::Exception;
use crate::mode::Mode;
use crate::ram::Ram;
use crate::rewritten::Field;
use arch::SegmentName;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, Register};

/// Instructions in a block at most.
const MAX_STEPS: usize = 48;
/// How far beyond a block's end liveness looks: instructions along one path, and branches.
const LOOK_AHEAD: u32 = 8;
const LOOK_BRANCHES: u32 = 2;
/// Longest instruction (Intel SDM 2A 2.3.11).
const MAX_LENGTH: usize = 15;
/// Bytes in a block at most: its instructions are 4 bytes long on average.
const WINDOW: usize = 256;

/// A decoded straight run.
#[derive(Default)]
pub struct Run {
    /// Its instructions.
    pub steps: Vec<Step>,
    /// Bytes, from the block's first.
    pub len: usize,
    /// Guest-physical address of the second page where the only instruction crosses.
    pub second_page: Option<u64>,
    /// The next instruction in sequence.
    pub next: Successor,
    /// Target of the direct jump or call at the end.
    pub target: Option<Successor>,
    /// The guest bytes, and some that follow.
    pub bytes: Vec<u8>,
    /// Constants among them that could be loaded at run time.
    pub fields: Vec<Field>,
    /// Bytes that liveness depends on.
    pub looked_at: Vec<Source>,
    pc: u64,
}

impl Run {
    /// The block's own bytes, by pages.
    pub fn pieces(&self, key: Key) -> impl Iterator<Item = Source> + use<> {
        let own = self.len.min(4096 - (key.physical & 0xfff) as usize);
        let rest = self.len - own;
        let first = Source { start: key.physical, len: own as u16 };
        let second = self.second_page.map(|page| Source { start: page & !0xfff, len: rest as u16 });
        [Some(first), second].into_iter().flatten()
    }

    /// The bytes of one of its instructions.
    pub fn bytes_of(&self, insn: &Instruction) -> &[u8] {
        let start = insn.ip().wrapping_sub(self.pc) as usize;
        self.bytes.get(start..start + insn.len()).unwrap_or(&[])
    }

    /// Whether the end of the run could lead back to itself without passing another poll: direct
    /// jumps backwards, and all indirect ones.
    pub fn may_loop(&self, last: &Step) -> bool {
        match last.class {
            Class::Return | Class::JumpIndirect | Class::CallIndirect => true,
            _ => self.target.is_some_and(|t| t.pc <= last.insn.ip()) || self.next.pc <= self.pc,
        }
    }
}

/// Copies guest-physical bytes that lie within one page of RAM.
pub fn copy(ram: &Ram, start: u64, to: &mut [u8]) -> Option<()> {
    let from = ram.bytes(start, to.len())?;
    // SAFETY: `bytes` vouches for the range; guest memory may change while it is read, and any
    // bytes will do: they are decoded from the copy only.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    Some(())
}

/// What the look-ahead needs of its surroundings.
struct Ahead<'a> {
    ram: &'a Ram,
    mode: Mode,
    /// Pages that may be looked at: guest address and guest-physical address.
    pages: [Option<(u64, u64)>; 3],
    /// Bytes looked at.
    seen: &'a mut Vec<Source>,
    budget: u32,
}

impl Cpu {
    /// Decodes the run at `key`, whose linear address is `linear`.
    ///
    /// # Errors
    /// #PF of the second page of a crossing instruction, #GP(0) past the limit of the segment.
    pub(super) fn fetch_run(
        &mut self,
        key: Key,
        linear: u64,
        run: &mut Run,
    ) -> Result<(), Exception> {
        let left = 4096 - (key.physical & 0xfff) as usize;
        let window = left.min(WINDOW);
        let mut bytes = std::mem::take(&mut run.bytes);
        bytes.resize(WINDOW + MAX_LENGTH, 0);
        self.read_code(key.physical, &mut bytes[..window]);
        let one = key.mode.step() || key.mode.shadow();
        let limit = if one { 1 } else { MAX_STEPS };
        run.second_page = None;
        run.pc = key.pc;
        if self.decode(key, &bytes[..window], limit, run).is_err() {
            // The first instruction goes on in the next page.
            let next = (linear | 0xfff).wrapping_add(1) & self.address_mask();
            let physical = self.translate_fetch(next)?;
            self.read_code(physical & !0xfff, &mut bytes[left..left + MAX_LENGTH]);
            run.second_page = Some(physical & !0xfff);
            self.decode(key, &bytes[..left + MAX_LENGTH], 1, run).map_err(|()| Exception::GP0)?;
        }
        self.check_limit(&run.steps)?;
        run.fields.clear();
        let pages = [Some(key.physical), run.second_page];
        let checked = pages.iter().flatten().any(|&p| self.cache.rewritten.checks(p));
        if checked {
            stop_after_write(run);
            run.fields = find_fields(&run.steps, key, &bytes[..run.len]);
        }
        run.bytes = bytes;
        self.finish_run(key, run, checked);
        Ok(())
    }

    /// Reads code within a page. Where there is no RAM, fetches read as ones: an invalid opcode.
    fn read_code(&self, physical: u64, to: &mut [u8]) {
        if copy(&self.vm.ram, physical, to).is_none() {
            to.fill(0xff);
        }
    }

    /// An instruction that reaches past the code segment's limit faults (Intel SDM 3A 5.3).
    fn check_limit(&self, steps: &[Step]) -> Result<(), Exception> {
        let limit = u64::from(self.segment(SegmentName::Cs).limit);
        let Some(first) = steps.first() else { return Err(Exception::GP0) };
        let last = first.insn.ip() + first.insn.len() as u64 - 1;
        if !self.mode.is_64() && last > limit { Err(Exception::GP0) } else { Ok(()) }
    }

    /// Decodes up to `limit` instructions; an error means that the first one is cut off.
    fn decode(&self, key: Key, bytes: &[u8], limit: usize, run: &mut Run) -> Result<(), ()> {
        let mode = key.mode;
        let mut decoder = Decoder::with_ip(mode.code().bits(), bytes, key.pc, DecoderOptions::NONE);
        let steps = &mut run.steps;
        steps.clear();
        run.len = 0;
        let cs_limit = u64::from(self.segment(SegmentName::Cs).limit);
        while steps.len() < limit && decoder.can_decode() {
            let insn = decoder.decode();
            if decoder.last_error() == DecoderError::NoMoreBytes {
                if steps.is_empty() && bytes.len() < MAX_LENGTH {
                    return Err(());
                }
                if steps.is_empty() {
                    // 15 bytes and still not whole: too long.
                    let mut invalid = Instruction::default();
                    invalid.set_len(1);
                    invalid.set_next_ip(key.pc + 1);
                    steps.push(step(invalid, Class::Invalid, mode));
                    run.len = MAX_LENGTH.min(bytes.len());
                }
                break;
            }
            let end = insn.ip() + insn.len() as u64 - 1;
            if !mode.is_64() && !steps.is_empty() && end > cs_limit {
                break;
            }
            let class = refine(&insn, mode);
            run.len = insn.next_ip().wrapping_sub(key.pc) as usize & 0xffff;
            let step = step(insn, class, mode);
            steps.push(step);
            if ends(class) || step.helped && super::is_transfer(class) {
                break;
            }
        }
        settle_shadow(steps, mode);
        Ok(())
    }

    fn finish_run(&mut self, key: Key, run: &mut Run, checked: bool) {
        let mask = self.ip_mask();
        let page = (key.pc & !0xfff, key.physical & !0xfff);
        // In segments whose base is not page-aligned, guest addresses and pages do not go together.
        let aligned = (key.pc ^ key.physical) & 0xfff == 0;
        let crossing = run.second_page.is_some();
        let near = |pc: u64| aligned && !crossing && pc & !0xfff == page.0;
        let last = run.steps.last().copied();
        let next_pc = last.map_or(key.pc, |s| s.insn.next_ip() & mask);
        let direct = last.filter(|s| {
            matches!(s.class, Class::Jump | Class::Branch | Class::LoopBranch | Class::Call)
                && !s.helped
        });
        let target_pc = direct.map(|s| s.insn.near_branch_target() & mask);
        // Nobody watches what a checked block would look at.
        let mut pages = [(!checked && aligned).then_some(page), None, None];
        if !checked {
            let far = |pc: &u64| !near(*pc);
            pages[1] = target_pc.filter(far).and_then(|pc| self.visible_page(pc));
            pages[2] = Some(next_pc).filter(far).and_then(|pc| self.visible_page(pc));
        }
        run.looked_at.clear();
        let seen = &mut run.looked_at;
        let mut ahead = Ahead { ram: &self.vm.ram, mode: key.mode, pages, seen, budget: 24 };
        // A block that is there already says what it wants, which may be more than is seen here.
        let wanted = |pc: u64| {
            let page = pages.iter().flatten().find(|p| p.0 == pc & !0xfff);
            page.map_or(0, |p| {
                self.cache.live_in(&Key { pc, physical: p.1 | pc & 0xfff, mode: key.mode })
            })
        };
        let mut live = |pc: u64| ahead.live(pc, LOOK_AHEAD, LOOK_BRANCHES) | wanted(pc);
        let target = target_pc.map(|pc| successor(pc, live(pc), near(pc)));
        let falls =
            last.is_none_or(|s| !matches!(s.class, Class::Jump | Class::Call)) || direct.is_none();
        let next_live = if falls { live(next_pc) } else { 0 };
        // Where the page ends within the next instruction, what follows depends on two pages.
        let cut = run.steps.len() < MAX_STEPS && last.is_some_and(|s| !ends(s.class));
        let next = successor(next_pc, next_live, near(next_pc) && !cut);
        let mut flow = live_out(last.as_ref(), &next, target.as_ref());
        for step in run.steps.iter_mut().rev() {
            step.live_after = flow;
            flow = flags::live_before(step.effect, flow);
            step.live_before = flow;
        }
        run.next = next;
        run.target = target;
    }
}

impl Cpu {
    /// The page of a guest address outside the block's own, if the look-ahead may read it: it is
    /// mapped, and writes to it will be noticed from now on.
    fn visible_page(&mut self, pc: u64) -> Option<(u64, u64)> {
        let linear = self.code_address(pc).ok()?;
        let physical = self.translate_fetch(linear).ok()?;
        if (pc ^ physical) & 0xfff != 0 || self.cache.rewritten.checks(physical) {
            return None;
        }
        self.claim_page(physical);
        Some((pc & !0xfff, physical & !0xfff))
    }
}

impl Cpu {
    /// Decodes the one instruction at `rip`, which was executed a moment ago.
    pub fn transfer_at(&mut self, rip: u64) -> Option<Instruction> {
        let linear = self.code_address(rip).ok()?;
        let physical = self.translate_fetch(linear).ok()?;
        let mode = Mode(self.mode.0 | Mode::STEP);
        let mut run = Run::default();
        self.fetch_run(Key { pc: rip, physical, mode }, linear, &mut run).ok()?;
        run.steps.first().map(|step| step.insn)
    }
}

/// Ends a checked block after the first instruction that may write memory.
fn stop_after_write(run: &mut Run) {
    let mut operands = Operands::default();
    let writes = |step: &Step| match step.class {
        Class::Native | Class::NativeVector | Class::BitString => {
            operands.memory(&step.insn).is_some_and(|o| o.writes)
        }
        Class::Push | Class::PushMemory | Class::MovOffset | Class::Helper => true,
        Class::System => step.is_inline(Mnemonic::Pushfq),
        _ => false,
    };
    let Some(last) = run.steps.iter().position(writes) else { return };
    run.steps.truncate(last + 1);
    if let Some(step) = run.steps.last() {
        run.len = step.insn.next_ip().wrapping_sub(run.pc) as usize & 0xffff;
    }
}

/// The constants of a block that could be loaded at run time.
fn find_fields(steps: &[Step], key: Key, bytes: &[u8]) -> Vec<Field> {
    let bits = key.mode.code().bits();
    let mut decoder = Decoder::with_ip(bits, bytes, key.pc, DecoderOptions::NONE);
    let mut fields = Vec::new();
    for (n, step) in steps.iter().enumerate() {
        let insn = decoder.decode();
        let constants = decoder.get_constant_offsets(&insn);
        if !step.helped && constants.has_immediate() && can_vary(&insn, step.class, key.mode) {
            let start = insn.ip().wrapping_sub(key.pc) as usize + constants.immediate_offset();
            let len = constants.immediate_size() as u8;
            fields.push(Field { step: n as u16, offset: start as u16, len });
        }
    }
    fields
}

fn step(insn: Instruction, class: Class, mode: Mode) -> Step {
    let string = class == Class::Helper && strings::is_inline(&insn, mode);
    let facts = facts::of(&insn);
    let effect = if string { flags::of_string(&insn) } else { effect(facts, &insn, class) };
    let native = facts.general && matches!(class, Class::Native | Class::NativeVector);
    let helped = !native && helped(class, &insn, mode);
    let (live_before, live_after, operand, stack) = (ALL, ALL, None, None);
    Step { insn, class, effect, helped, string, live_before, live_after, operand, stack }
}

/// The effect of an instruction of class `class` on the flags.
fn effect(facts: Facts, insn: &Instruction, class: Class) -> Effect {
    match facts {
        Facts { class: same, effect: Some(effect), .. } if same == class => effect,
        _ => flags::effect(insn, class),
    }
}

/// The class of an instruction, given the mode.
fn refine(insn: &Instruction, mode: Mode) -> Class {
    let class = classify(insn);
    // Where each instruction is a block, helpers do.
    let system = mode.is_64() && mode.cpl() == 0 && !mode.step() && !mode.shadow();
    match insn.code() {
        Code::Cld if !mode.down() => Class::Nothing,
        Code::Std if mode.down() => Class::Nothing,
        Code::Swapgs | Code::Cli | Code::Sti | Code::Pushfq if system => Class::System,
        Code::Mov_r64_cr if system && insn.op1_register() == Register::CR2 => Class::System,
        Code::Stac | Code::Clac if system && mode.smap() => Class::SystemEnd,
        Code::Pause if !mode.step() && !mode.shadow() => Class::System,
        _ => class,
    }
}

fn ends(class: Class) -> bool {
    super::is_transfer(class)
        || matches!(class, Class::HelperEnd | Class::SystemEnd | Class::Invalid)
}

/// STI holds interrupts off until after the next instruction. Translated code does that by not
/// looking for them in between, where the next instruction is in the same block; elsewhere the
/// run loop sees to it.
fn settle_shadow(steps: &mut [Step], mode: Mode) {
    if let Some(last) = steps.last_mut()
        && last.is_inline(Mnemonic::Sti)
    {
        *last = step(last.insn, Class::HelperEnd, mode);
    }
}

fn live_out(last: Option<&Step>, next: &Successor, target: Option<&Successor>) -> Flags {
    let Some(last) = last else { return ALL };
    if last.helped {
        return ALL;
    }
    match last.class {
        Class::Return | Class::JumpIndirect | Class::CallIndirect => ALL,
        Class::Jump | Class::Call => target.map_or(ALL, |t| t.live),
        Class::Branch | Class::LoopBranch => next.live | target.map_or(ALL, |t| t.live),
        _ => next.live,
    }
}

impl Ahead<'_> {
    /// Flags that are live at `pc`, found by decoding a few instructions from there on visible
    /// pages; what cannot be seen counts as live.
    fn live(&mut self, pc: u64, steps: u32, branches: u32) -> Flags {
        let mut known_dead: Flags = 0;
        let mut needed: Flags = 0;
        let mut bytes = [0; 64];
        let offset = pc & 0xfff;
        let Some(&(_, page)) = self.pages.iter().flatten().find(|p| p.0 == pc & !0xfff) else {
            return ALL;
        };
        let available = (4096 - offset as usize).min(bytes.len());
        let Some(window) = bytes.get_mut(..available) else { return ALL };
        if copy(self.ram, page + offset, window).is_none() {
            return ALL;
        }
        let mut decoder =
            Decoder::with_ip(self.mode.code().bits(), window, pc, DecoderOptions::NONE);
        for _ in 0..steps {
            if self.budget == 0 || !decoder.can_decode() {
                break;
            }
            self.budget -= 1;
            let insn = decoder.decode();
            if insn.is_invalid() {
                break;
            }
            let class = refine(&insn, self.mode);
            let effect = effect(facts::of(&insn), &insn, class);
            let helper = helped(class, &insn, self.mode);
            needed |= if helper { ALL } else { effect.reads } & !known_dead;
            known_dead |= effect.kills;
            if known_dead | needed == ALL {
                break;
            }
            if ends(class) || helper {
                needed |= self.live_at_end(&insn, class, branches) & !known_dead;
                known_dead = ALL;
                break;
            }
        }
        let len = decoder.position() as u16;
        self.seen.push(Source { start: page + offset, len });
        needed | (ALL & !known_dead & !needed)
    }

    fn live_at_end(&mut self, insn: &Instruction, class: Class, branches: u32) -> Flags {
        if branches == 0 {
            return ALL;
        }
        let target = insn.near_branch_target();
        match class {
            Class::Jump | Class::Call => self.live(target, LOOK_AHEAD, branches - 1),
            Class::Branch => {
                self.live(target, LOOK_AHEAD, branches - 1)
                    | self.live(insn.next_ip(), LOOK_AHEAD, branches - 1)
            }
            _ => ALL,
        }
    }
}
