//! Guest memory operands: the inline TLB probe, and what happens where it misses.
use super::asm::{Fixup, Mem, Reg, Width, cc, op};
use super::layout::{self, ADDRESS, SCRATCH};
use super::recent::Slot;
use super::{Cold, Emitter, address};
use crate::helpers::AccessInfo;
use crate::mode::SegmentClass;
use crate::operand::operand_segment;
use crate::thunks::index;
use crate::tlb::{TLB_ENTRIES, TlbEntry};
use crate::translate::classify::{Operand, needs_alignment};
use crate::translate::groups::Member;
use arch::SegmentName;
use iced_x86::Instruction;

/// An access between its probe and its end.
#[must_use]
pub enum Place {
    /// Of its own.
    Single(Site),
    /// In a group: at this distance from the address in RDI.
    Grouped(i32),
}

impl Place {
    /// Where the operand is: its distance from the address in RDI.
    pub fn distance(&self) -> i32 {
        match self {
            Self::Single(site) => site.linear.distance(),
            Self::Grouped(distance) => *distance,
        }
    }

    /// The operand of the access.
    pub fn mem(&self) -> Mem {
        Mem::at(ADDRESS, self.distance())
    }
}

/// The linear address that a probe is for.
#[derive(Clone, Copy)]
pub enum Linear {
    /// Known when the code runs. After the probe RDI is the host address.
    Computed,
    /// Known when the code is translated, and with it the slot of the TLB. After the probe RDI is
    /// the host address of its page.
    Constant(u64),
    /// Known when the code runs, and looked for in this slot of the recent pages first.
    Recent(Slot),
}

impl Linear {
    /// From the address in RDI after the probe to the operand.
    fn distance(self) -> i32 {
        match self {
            Self::Computed | Self::Recent(_) => 0,
            Self::Constant(address) => (address & 0xfff) as i32,
        }
    }
}

/// The probe of an access of its own.
#[must_use]
#[derive(Clone, Copy)]
pub struct Site {
    pub(super) miss: Fixup,
    pub(super) table: i32,
    pub(super) linear: Linear,
    pub(super) info: AccessInfo,
    pub(super) back: usize,
    pub(super) position: usize,
}

impl Emitter<'_> {
    /// Gets at the instruction's memory operand: RDI is then the base of [`Place::mem`]. Clobbers
    /// RSI, and flags that are not live.
    pub fn open(&mut self, insn: &Instruction, operand: Operand) -> Place {
        let segment = operand_segment(insn, self.context.mode.is_64());
        if let Some(member) = self.operand_member {
            if member.first {
                self.free_flags(self.live_before);
                if self.page_of(member).is_none() {
                    self.address_before(insn, member.distance);
                }
                let slot = self.recent_slot(insn, self.writes(member));
                self.open_group(member, operand, slot);
            }
            return self.join(member);
        }
        self.free_flags(self.live_before);
        let flat = self.context.mode.access(segment, operand.writes) == SegmentClass::Flat;
        let constant = address::constant(insn, self.context.mode).filter(|_| flat);
        let mut site = match constant.filter(|a| (a & 0xfff) as u32 + operand.size <= 4096) {
            Some(linear) => self.probe_constant(linear, operand, segment),
            None => {
                self.effective_address(insn);
                self.apply_segment(segment, operand);
                match self.recent_slot(insn, operand.writes) {
                    Some(slot) => self.probe_recent(slot, operand, segment),
                    None => self.probe(operand, segment),
                }
            }
        };
        if needs_alignment(insn) {
            site.info = site.info.aligned();
        }
        Place::Single(site)
    }

    /// The same for the stack: at `offset` from register `base`.
    pub fn open_stack(&mut self, base: Reg, offset: i32, operand: Operand) -> Place {
        let width = if self.context.mode.is_64() { Width::W64 } else { Width::W32 };
        if let Some(member) = self.stack_member {
            if member.first {
                self.free_flags(self.live_before);
                self.asm.lea(width, ADDRESS, Mem::at(base, offset - member.distance));
                let slot = self.stack_slot(self.writes(member));
                self.open_group(member, operand, slot);
            }
            return self.join(member);
        }
        self.free_flags(self.live_before);
        self.holds = None;
        self.asm.lea(width, ADDRESS, Mem::at(base, offset));
        self.apply_segment(SegmentName::Ss, operand);
        Place::Single(match self.stack_slot(operand.writes) {
            Some(slot) => self.probe_recent(slot, operand, SegmentName::Ss),
            None => self.probe(operand, SegmentName::Ss),
        })
    }

    /// Probes for the whole group whose lowest address is in RDI.
    fn open_group(&mut self, member: Member, operand: Operand, slot: Option<Slot>) {
        let Some(group) = self.groups.get(member.group).copied() else { return };
        let span = Operand { size: group.span(), reads: operand.reads, writes: group.write };
        let site = match (group.page, slot) {
            (Some(page), _) => self.probe_constant(page, span, SegmentName::Ds),
            (None, Some(slot)) => self.probe_recent(slot, span, SegmentName::Ds),
            (None, None) => self.probe(span, SegmentName::Ds),
        };
        self.cold.push(Cold::Group(site));
        let start = self.asm.here();
        self.asm.store(Width::W64, layout::group(member.group), ADDRESS);
        if let Some(kept) = self.kept.get_mut(member.group) {
            *kept = start..self.asm.here();
        }
        self.holds = Some(member.group);
    }

    /// Whether the member's group writes.
    fn writes(&self, member: Member) -> bool {
        self.groups.get(member.group).is_some_and(|g| g.write)
    }

    /// The page of the member's group if that is known.
    fn page_of(&self, member: Member) -> Option<u64> {
        self.groups.get(member.group)?.page
    }

    /// Makes RDI the address of the member's group.
    fn join(&mut self, member: Member) -> Place {
        if self.holds != Some(member.group) {
            if let Some(kept) = self.kept.get_mut(member.group) {
                *kept = 0..0;
            }
            self.asm.load(Width::W64, ADDRESS, layout::group(member.group));
            self.holds = Some(member.group);
        }
        Place::Grouped(member.distance)
    }

    /// Makes RDI the linear address again of which `site` found no translation.
    fn begin_miss(&mut self, site: Site) {
        self.resume_position(site.position);
        self.asm.bind(site.miss);
        match site.linear {
            // The same XOR gives the address back.
            Linear::Computed => {
                let tag = Mem::indexed(Reg::RSP, SCRATCH, 0, site.table);
                self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, tag);
            }
            Linear::Constant(linear) => self.asm.mov_imm(ADDRESS, linear),
            Linear::Recent(slot) => self.refill_recent(slot, site),
        }
        self.asm.mov_imm(SCRATCH, u64::from(site.info.0));
    }

    pub(super) fn place_group(&mut self, site: Site) {
        self.begin_miss(site);
        let thunk = self.thunk(index::GROUP);
        self.asm.call_mem(thunk);
        self.asm.jmp_to(site.back);
    }

    /// Probes the TLB for the linear address in RDI, which becomes a host address. Clobbers RSI
    /// and flags. The access itself must follow, then [`Emitter::close`].
    pub(super) fn probe(&mut self, operand: Operand, segment: SegmentName) -> Site {
        self.holds = None;
        let info = AccessInfo::new(operand.size, operand.reads, operand.writes, segment);
        let table = layout::tlb_table(self.context.mode.mmu() as usize, operand.writes);
        let miss = self.look_up(table, operand.size);
        let host = Mem::indexed(Reg::RSP, SCRATCH, 0, table + 8);
        self.asm.rm(Width::W64, op::ADD_LOAD, ADDRESS, host);
        let position = self.positions.len() - 1;
        Site { miss, table, linear: Linear::Computed, info, back: self.asm.here(), position }
    }

    /// Finds the entry of a table for the address in RDI: RSI is then its offset in the table, and
    /// RDI the offset in the page. What it returns is taken where the entry is another page's, or
    /// the operand crosses the page's end.
    pub(super) fn look_up(&mut self, table: i32, size: u32) -> Fixup {
        if self.context.bmi2 {
            self.asm.rorx(Width::W64, SCRATCH, ADDRESS, 8);
        } else {
            self.asm.mov(Width::W64, SCRATCH, ADDRESS);
            self.asm.shift_imm(Width::W64, 5, SCRATCH, 8);
        }
        self.asm.alu_imm(Width::W32, 4, SCRATCH, ((TLB_ENTRIES - 1) << 4) as i32);
        let tag = Mem::indexed(Reg::RSP, SCRATCH, 0, table);
        self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, tag);
        self.asm.alu_imm(Width::W64, 7, ADDRESS, 4096 - size as i32);
        self.asm.jcc(cc::A)
    }

    /// The same for an address that is known, of an operand within one page; leaves RSI alone.
    fn probe_constant(&mut self, linear: u64, operand: Operand, segment: SegmentName) -> Site {
        self.holds = None;
        let info = AccessInfo::new(operand.size, operand.reads, operand.writes, segment);
        let table = layout::tlb_table(self.context.mode.mmu() as usize, operand.writes);
        let slot = (linear >> 12) as usize & (TLB_ENTRIES - 1);
        let entry = table + (slot * size_of::<TlbEntry>()) as i32;
        let (tag, host) = (Mem::at(Reg::RSP, entry), Mem::at(Reg::RSP, entry + 8));
        let page = linear & !0xfff;
        match i32::try_from(page as i64) {
            Ok(page) => {
                self.asm.rm(Width::W64, &[0x81], Reg(7), tag);
                self.asm.raw(&page.to_le_bytes());
            }
            Err(_) => {
                self.asm.mov_imm(ADDRESS, page);
                self.asm.rm(Width::W64, &[0x3b], ADDRESS, tag);
            }
        }
        let miss = self.asm.jcc(cc::NE);
        self.asm.load(Width::W64, ADDRESS, host);
        let (linear, back) = (Linear::Constant(linear), self.asm.here());
        Site { miss, table, linear, info, back, position: self.positions.len() - 1 }
    }

    /// Ends the access begun by [`Emitter::open`]. For a write, all code since then must be
    /// position-independent, since the slow path holds a copy of it.
    pub fn close(&mut self, place: Place) {
        let Place::Single(site) = place else { return };
        let after = self.asm.here();
        self.cold.push(Cold::Access(site, after));
    }

    /// The slow path of `site`, whose access ends at host offset `after`.
    pub(super) fn place_access(&mut self, site: Site, after: usize) {
        let back = site.back;
        self.begin_miss(site);
        let which = if site.info.writes() { index::WRITE } else { index::READ };
        let thunk = self.thunk(which);
        self.asm.call_mem(thunk);
        let distance = site.linear.distance();
        if distance != 0 {
            self.asm.lea(Width::W64, ADDRESS, Mem::at(ADDRESS, -distance));
        }
        if !site.info.writes() {
            self.asm.jmp_to(back);
            return;
        }
        self.asm.rr(Width::W32, &[0x85], SCRATCH, SCRATCH);
        let plain = self.asm.jcc(cc::E);
        self.asm.bind_to(plain, back);
        self.asm.bytes.extend_from_within(back..after);
        if let Some(end) = self.positions_until(after) {
            self.flags = end;
            self.mark();
        }
        let thunk = self.thunk(index::COMMIT);
        self.asm.call_mem(thunk);
        self.asm.jmp_to(after);
    }

    /// Where the flags are at host offset `at` of the straight code.
    fn positions_until(&self, at: usize) -> Option<super::FlagsIn> {
        let end = self.positions.partition_point(|p| (p.host as usize) <= at);
        self.positions.get(end.checked_sub(1)?).map(|p| p.flags)
    }
}
