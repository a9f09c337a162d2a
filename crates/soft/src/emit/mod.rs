//! From decoded guest instructions to host code.
//!
//! [`Emitter`] holds the block under construction. `address` makes addresses, `memory` probes, `native`
//! re-encodes instructions, `stack` and `control` do PUSH to RET and everything that ends a block,
//! `checked` does what blocks of rewritten code need, `strings` string instructions.
//! Slow paths are collected as [`Cold`] stubs and placed after the block's straight code.
pub mod address;
pub mod asm;
pub mod checked;
pub mod control;
pub mod layout;
pub mod memory;
pub mod native;
pub mod recent;
pub mod stack;
pub mod strings;
pub mod system;

use crate::helpers::Helped;
use crate::mode::Mode;
use crate::rewritten::Check;
use crate::thunks::index;
use crate::translate::classify::Operands;
use crate::translate::flags::{self, Effect, Flags};
use crate::translate::groups::{Group, MAX_GROUPS, Member};
use asm::{Asm, Fixup, Mem, Reg, Width, cc};
use iced_x86::{Encoder, FlowControl, Instruction, Mnemonic};
use layout::{ADDRESS, RAW_FLAGS, SCRATCH};
use memory::Site;
use recent::Recent;
use std::ops::Range;

/// Where the guest's arithmetic flags are at a point of the host code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagsIn {
    /// In the host's flags register.
    Host,
    /// In `Cpu::raw_flags`; the host's flags are garbage.
    Saved,
}

/// From a host code offset on, which guest instruction it belongs to and where its flags are.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    /// First host byte, from the start of the block.
    pub host: u32,
    /// Guest offset of the instruction from the start of the block.
    pub guest: u16,
    /// Length of the guest instruction.
    pub length: u8,
    /// Where the flags are.
    pub flags: FlagsIn,
    /// Whether the instruction goes elsewhere than to the next one.
    pub transfer: bool,
}

/// How an edge reaches its target once linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EdgeKind {
    /// A jump whose displacement, at this offset, is patched.
    Near(u32),
    /// The same, taken when the block's code has changed: leads to later versions only.
    Stale(u32),
    /// A jump through this link cell, which is emptied when translations of addresses change.
    Far(u32),
    /// Never linked.
    Always,
}

/// A direct exit of a block.
#[derive(Clone, Copy, Debug)]
pub struct EdgeSpec {
    /// Guest address to go to.
    pub target: u64,
    /// How.
    pub kind: EdgeKind,
    /// Offset of the stub that leaves to the run loop.
    pub stub: u32,
    /// Flags that are in their place when the edge is taken; the others may be garbage.
    pub live: Flags,
}

/// Code that runs rarely.
enum Cold {
    /// The access ends at this host offset.
    Access(Site, usize),
    Group(Site),
    Edge {
        fixup: Option<Fixup>,
        edge: usize,
        flags: FlagsIn,
        position: usize,
    },
    Indirect {
        miss: Fixup,
        position: usize,
    },
    Stale {
        stale: Vec<Fixup>,
        position: usize,
    },
    String {
        slow: Vec<Fixup>,
        helped: *const Helped,
        back: usize,
        position: usize,
    },
    Helper {
        fixups: [Option<Fixup>; 2],
        helped: *const Helped,
        back: usize,
        position: usize,
    },
}

/// What the emitter needs to know of its surroundings.
#[derive(Clone, Copy)]
pub struct Context {
    /// The mode the code is for.
    pub mode: Mode,
    /// Guest address of the block.
    pub pc: u64,
    /// Number of the block's first edge.
    pub first_edge: u32,
    /// Number of the first free link cell.
    pub first_cell: u32,
    /// Whether all flags count as live everywhere.
    pub precise: bool,
    /// Whether the host has BMI2.
    pub bmi2: bool,
    /// Whether the block uses vector registers.
    pub vectors: bool,
    /// Which operands try recent pages.
    pub recent: Recent,
    /// Whether edges may be linked (not while stepping).
    pub linkable: bool,
}

/// A block under construction.
pub struct Emitter<'a> {
    asm: Asm,
    context: Context,
    encoder: Box<Encoder>,
    operands: &'a mut Operands,
    flags: FlagsIn,
    positions: Vec<Position>,
    edges: Vec<EdgeSpec>,
    cold: Vec<Cold>,
    cells: u32,
    /// The present instruction.
    guest: u16,
    length: u8,
    transfer: bool,
    /// Flags live before and after the present instruction.
    live_before: Flags,
    live_after: Flags,
    groups: &'a [Group],
    /// Membership of the present instruction's operand and stack access.
    operand_member: Option<Member>,
    stack_member: Option<Member>,
    /// The group whose host address RDI holds.
    holds: Option<usize>,
    /// For each group the store of its address, until something loads that.
    kept: [Range<usize>; MAX_GROUPS],
    /// Slots of recent pages used.
    recent: usize,
    /// By how much the guest's RSP is yet to be moved.
    stack_moved: i32,
    /// Where the block goes on if it branches to itself: what its entry finds out still holds then.
    around: Option<usize>,
    /// Where a block that checks its code is entered with flags in `raw_flags`.
    checked_entry: Option<u32>,
}

/// The memory in which blocks are made, used again for each.
pub struct Buffers {
    code: Vec<u8>,
    positions: Vec<Position>,
    edges: Vec<EdgeSpec>,
    cold: Vec<Cold>,
    encoder: Box<Encoder>,
}

impl Default for Buffers {
    fn default() -> Self {
        let (code, positions, edges, cold) = Default::default();
        Self { code, positions, edges, cold, encoder: Box::new(Encoder::new(64)) }
    }
}

/// Finished code of a block.
pub struct Emitted {
    buffers: Buffers,
    /// Offset of the entry for callers with flags in `raw_flags`.
    pub saved_entry: u32,
    /// Link cells used.
    pub cells: u32,
    /// Flags that the block expects in their place when it is entered.
    pub live_in: Flags,
}

impl Emitted {
    /// Host code, position-independent.
    pub fn code(&self) -> &[u8] {
        &self.buffers.code
    }

    /// Map from host to guest, ascending.
    pub fn positions(&self) -> &[Position] {
        &self.buffers.positions
    }

    /// Direct exits.
    pub fn edges(&self) -> &[EdgeSpec] {
        &self.buffers.edges
    }

    /// The memory, for the next block.
    pub fn into_buffers(self) -> Buffers {
        self.buffers
    }
}

impl<'a> Emitter<'a> {
    /// Starts a block into which `live_in` flags flow, and which polls and makes `checks` first.
    pub fn new(
        context: Context,
        operands: &'a mut Operands,
        groups: &'a [Group],
        buffers: Buffers,
        (live_in, poll): (Flags, bool),
        checks: &[Check],
    ) -> Self {
        let live_in = if context.precise { flags::ALL } else { live_in };
        let Buffers { mut code, mut positions, mut edges, mut cold, encoder } = buffers;
        code.clear();
        positions.clear();
        edges.clear();
        cold.clear();
        let mut emitter = Self {
            asm: Asm { bytes: code },
            context,
            encoder,
            operands,
            flags: FlagsIn::Host,
            positions,
            edges,
            cold,
            cells: 0,
            guest: 0,
            length: 0,
            transfer: false,
            live_before: live_in,
            live_after: live_in,
            groups,
            operand_member: None,
            stack_member: None,
            holds: None,
            kept: [const { 0..0 }; MAX_GROUPS],
            recent: 0,
            stack_moved: 0,
            around: None,
            checked_entry: None,
        };
        emitter.mark();
        if !checks.is_empty() {
            emitter.free_flags(flags::ALL);
            emitter.checked_entry = Some(emitter.asm.here() as u32);
        }
        if context.vectors && checks.is_empty() {
            emitter.require_vectors();
        }
        if context.linkable && checks.is_empty() && emitter.flags == FlagsIn::Host {
            emitter.around = Some(emitter.asm.here());
        }
        if poll {
            emitter.asm.load(Width::W64, ADDRESS, layout::POLL);
            emitter.asm.load(Width::W32, ADDRESS, Mem::at(ADDRESS, 0));
        }
        if !checks.is_empty() {
            emitter.check(checks);
            if context.vectors {
                emitter.require_vectors();
            }
        }
        emitter
    }

    /// Notes that code from here on belongs to the present instruction.
    fn mark(&mut self) {
        let position = Position {
            host: self.asm.here() as u32,
            guest: self.guest,
            length: self.length,
            flags: self.flags,
            transfer: self.transfer,
        };
        match self.positions.last_mut() {
            Some(last) if last.host == position.host => *last = position,
            _ => self.positions.push(position),
        }
    }

    /// Starts a guest instruction.
    pub fn begin(&mut self, insn: &Instruction, live_before: Flags, live_after: Flags) {
        self.guest = insn.ip().wrapping_sub(self.context.pc) as u16;
        self.length = insn.len() as u8;
        self.transfer = insn.flow_control() != FlowControl::Next;
        self.live_before = if self.context.precise { flags::ALL } else { live_before };
        self.live_after = if self.context.precise { flags::ALL } else { live_after };
        self.mark();
    }

    /// Says which of the next instruction's accesses belong to groups, and whether it goes on
    /// with a run of pushes or pops.
    pub fn set_members(&mut self, operand: Option<Member>, stack: Option<Member>, goes_on: bool) {
        if !goes_on {
            self.settle_stack();
        }
        self.operand_member = operand;
        self.stack_member = stack;
    }

    /// Makes sure that live flags survive code that clobbers the host's.
    fn free_flags(&mut self, live: Flags) {
        if live != 0 && self.flags == FlagsIn::Host {
            self.asm.save_flags(RAW_FLAGS);
            self.flags = FlagsIn::Saved;
            self.mark();
        }
    }

    /// Puts the guest's flags into the host's flags register; clobbers RSI.
    fn need_flags(&mut self) {
        if self.flags == FlagsIn::Saved {
            self.asm.restore_flags(RAW_FLAGS);
            self.flags = FlagsIn::Host;
            self.mark();
        }
    }

    /// Prepares the host's flags for an instruction with this effect; clobbers RSI.
    fn flags_for(&mut self, effect: Effect) {
        let through = self.live_after & !effect.kills;
        if effect.reads != 0 || (effect.touches != 0 && through != 0) {
            self.need_flags();
        }
    }

    /// Notes what an instruction with this effect did.
    fn flags_after(&mut self, effect: Effect) {
        if effect.touches != 0 {
            self.flags = FlagsIn::Host;
        }
    }

    fn require_vectors(&mut self) {
        self.free_flags(self.live_before);
        // cmp qword [vectors_live], 0
        self.asm.rm(Width::W64, &[0x83], Reg(7), layout::VECTORS_LIVE);
        self.asm.raw(&[0]);
        let live = self.asm.jcc(cc::NE);
        self.asm.call_mem(layout::thunk(index::LOAD_VECTORS));
        self.asm.bind(live);
    }

    /// The thunk `which`, in the variant for this block.
    fn thunk(&self, which: usize) -> Mem {
        layout::thunk(if self.context.vectors { which + index::VECTOR } else { which })
    }

    /// An instruction executed by Rust code.
    pub fn helper(&mut self, insn: *const Helped) {
        if self.flags == FlagsIn::Host {
            self.asm.save_flags(RAW_FLAGS);
            self.flags = FlagsIn::Saved;
            self.mark();
        }
        self.holds = None;
        self.asm.mov_imm(ADDRESS, insn as u64);
        let thunk = self.thunk(index::EXECUTE);
        self.asm.call_mem(thunk);
        self.flags = FlagsIn::Host;
        self.mark();
    }

    /// An instruction that this CPU does not have.
    pub fn invalid(&mut self) {
        self.asm.raw(&[0x0f, 0x0b]);
    }

    /// RDTSC and RDTSCP (Intel SDM 2B), with the guest's offset; leaves flags alone where the host
    /// has BMI2.
    pub fn read_tsc(&mut self, insn: &Instruction) {
        let numbered = insn.mnemonic() == Mnemonic::Rdtscp;
        if numbered {
            // All loads before it are done, as RDTSCP has it.
            self.asm.raw(&[0x0f, 0xae, 0xe8]); // lfence
        }
        if !self.context.bmi2 {
            self.free_flags(self.live_before);
        }
        self.asm.raw(&[0x0f, 0x31]);
        if self.context.bmi2 {
            self.asm.rorx(Width::W64, Reg::RDX, Reg::RDX, 32);
        } else {
            self.asm.shift_imm(Width::W64, 4, Reg::RDX, 32);
        }
        self.asm.lea(Width::W64, Reg::RAX, Mem::indexed(Reg::RAX, Reg::RDX, 0, 0));
        self.asm.load(Width::W64, SCRATCH, layout::TSC_OFFSET);
        self.asm.lea(Width::W64, Reg::RDX, Mem::indexed(Reg::RAX, SCRATCH, 0, 0));
        self.asm.mov(Width::W32, Reg::RAX, Reg::RDX);
        if self.context.bmi2 {
            self.asm.rorx(Width::W64, Reg::RDX, Reg::RDX, 32);
            self.asm.mov(Width::W32, Reg::RDX, Reg::RDX);
        } else {
            self.asm.shift_imm(Width::W64, 5, Reg::RDX, 32);
        }
        if numbered {
            self.asm.load(Width::W32, Reg::RCX, layout::TSC_AUX);
        }
    }

    /// Ends the block: places stubs and the second entry.
    pub fn finish(mut self, live_in: Flags) -> Emitted {
        for unused in std::mem::take(&mut self.kept) {
            self.asm.erase(unused);
        }
        let mut cold = std::mem::take(&mut self.cold);
        cold.drain(..).for_each(|stub| self.place(stub));
        let mut saved_entry = self.checked_entry.unwrap_or(0);
        if self.checked_entry.is_none() && (live_in != 0 || self.context.precise) {
            saved_entry = self.asm.here() as u32;
            self.asm.restore_flags(RAW_FLAGS);
            self.asm.jmp_to(0);
        }
        Emitted {
            buffers: Buffers {
                code: self.asm.bytes,
                positions: self.positions,
                edges: self.edges,
                cold,
                encoder: self.encoder,
            },
            saved_entry,
            cells: self.cells,
            // A block whose code has changed may need any flag.
            live_in: if self.checked_entry.is_some() { flags::ALL } else { live_in },
        }
    }

    fn place(&mut self, cold: Cold) {
        match cold {
            Cold::Access(site, after) => self.place_access(site, after),
            Cold::Group(site) => self.place_group(site),
            Cold::Edge { fixup, edge, flags, position } => {
                self.resume_position(position);
                self.place_edge(fixup, edge, flags);
            }
            Cold::Stale { stale, position } => self.place_stale(stale, position),
            Cold::String { slow, helped, back, position } => {
                self.place_string(slow, helped, back, position);
            }
            Cold::Helper { fixups, helped, back, position } => {
                self.resume_position(position);
                self.place_helper(fixups, helped, back);
            }
            Cold::Indirect { miss, position } => {
                self.resume_position(position);
                self.asm.bind(miss);
                self.asm.call_mem(layout::thunk(index::LEAVE_INDIRECT));
            }
        }
    }

    /// Copies what is known of the present instruction to code placed later.
    fn resume_position(&mut self, position: usize) {
        if let Some(&Position { guest, length, flags, transfer, .. }) = self.positions.get(position)
        {
            self.guest = guest;
            self.length = length;
            self.flags = flags;
            self.transfer = transfer;
            self.mark();
        }
    }
}
