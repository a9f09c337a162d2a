//! Guest memory operands: linear addresses and the inline TLB probe.
use super::asm::{Mem, Reg, Width, cc, op};
use super::layout::{self, ADDRESS, SCRATCH};
use super::{Cold, Emitter};
use crate::helpers::AccessInfo;
use crate::mode::{CodeSize, SegmentClass};
use crate::operand::operand_segment;
use crate::thunks::index;
use crate::tlb::TLB_ENTRIES;
use crate::translate::classify::{Operand, needs_alignment};
use crate::translate::groups::Member;
use arch::SegmentName;
use iced_x86::{Instruction, Register};

/// An access between its probe and its end.
#[must_use]
pub enum Place {
    /// Of its own.
    Single(Site),
    /// In a group: at this distance from the address in RDI.
    Grouped(i32),
}

impl Place {
    /// The operand of the access, RDI being its base.
    pub fn mem(&self) -> Mem {
        match self {
            Self::Single(_) => Mem::at(ADDRESS, 0),
            Self::Grouped(distance) => Mem::at(ADDRESS, *distance),
        }
    }
}

/// The probe of an access of its own.
#[must_use]
pub struct Site {
    miss: super::asm::Fixup,
    table: i32,
    info: AccessInfo,
    back: usize,
    position: usize,
}

impl Emitter<'_> {
    /// Puts the offset (effective address) of the memory operand into RDI; clobbers RSI, but no
    /// flags.
    pub fn effective_address(&mut self, insn: &Instruction) {
        self.address_before(insn, 0);
    }

    /// The address `distance` bytes before the memory operand, for operands relative to a base
    /// register if that is not 0.
    fn address_before(&mut self, insn: &Instruction, distance: i32) {
        self.holds = None;
        let displacement = insn.memory_displacement64();
        let base = insn.memory_base();
        let (width, mask16) = self.address_width(insn);
        if insn.is_ip_rel_memory_operand() {
            let address = insn.ip_rel_memory_address();
            self.asm.mov_imm(
                ADDRESS,
                if width == Width::W32 { address & 0xffff_ffff } else { address },
            );
            return;
        }
        let index = (insn.memory_index() != Register::None)
            .then(|| (self.address_register(insn.memory_index(), SCRATCH), scale(insn)));
        if base == Register::None && index.is_none() {
            let mask = if mask16 {
                0xffff
            } else if width == Width::W32 {
                0xffff_ffff
            } else {
                u64::MAX
            };
            self.asm.mov_imm(ADDRESS, displacement & mask);
            return;
        }
        let base = (base != Register::None).then(|| self.address_register(base, ADDRESS));
        let disp = (displacement as i32).wrapping_sub(distance);
        self.asm.lea(width, ADDRESS, Mem { base, index, disp });
        if mask16 {
            self.asm.rr(Width::W32, op::MOVZX16, ADDRESS, ADDRESS);
        }
    }

    /// Width of the address computation, and whether only 16 bits of it count.
    pub(super) fn address_width(&self, insn: &Instruction) -> (Width, bool) {
        let register = match insn.memory_base() {
            Register::None => insn.memory_index(),
            base => base,
        };
        let size = match register {
            Register::RIP => 8,
            Register::EIP => 4,
            Register::None => insn.memory_displ_size() as usize,
            r => r.size(),
        };
        match (self.context.mode.code(), size) {
            (_, 2) => (Width::W32, true),
            (CodeSize::Bits64, 4) if register != Register::None => (Width::W32, false),
            (CodeSize::Bits64, _) => (Width::W64, false),
            _ => (Width::W32, false),
        }
    }

    /// The host register that holds an address register, loading it to `scratch` if it is spilled.
    fn address_register(&mut self, register: Register, scratch: Reg) -> Reg {
        let n = register.full_register().number();
        layout::host(n).unwrap_or_else(|| {
            self.asm.load(Width::W64, scratch, layout::gpr(n));
            scratch
        })
    }

    /// Turns the offset in RDI into a linear address. Clobbers flags.
    pub fn apply_segment(&mut self, name: SegmentName, operand: Operand) {
        match self.context.mode.access(name, operand.writes) {
            SegmentClass::Flat => {}
            SegmentClass::Based => {
                let width = if self.context.mode.is_64() { Width::W64 } else { Width::W32 };
                self.asm.rm(width, op::ADD_LOAD, ADDRESS, layout::segment_base(name as usize));
            }
            SegmentClass::Checked => {
                let info = AccessInfo::new(operand.size, operand.reads, operand.writes, name);
                self.asm.mov_imm(SCRATCH, u64::from(info.0));
                let thunk = self.thunk(index::SEGMENT);
                self.asm.call_mem(thunk);
            }
        }
    }

    /// Gets at the instruction's memory operand: RDI is then the base of [`Place::mem`]. Clobbers
    /// RSI, and flags that are not live.
    pub fn open(&mut self, insn: &Instruction, operand: Operand) -> Place {
        let segment = operand_segment(insn, self.context.mode.is_64());
        if let Some(member) = self.operand_member {
            if member.first {
                self.free_flags(self.live_before);
                self.address_before(insn, member.distance);
                self.open_group(member, operand);
            }
            return self.join(member);
        }
        self.free_flags(self.live_before);
        self.effective_address(insn);
        self.apply_segment(segment, operand);
        let mut site = self.probe(operand, segment);
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
                self.open_group(member, operand);
            }
            return self.join(member);
        }
        self.free_flags(self.live_before);
        self.holds = None;
        self.asm.lea(width, ADDRESS, Mem::at(base, offset));
        self.apply_segment(SegmentName::Ss, operand);
        Place::Single(self.probe(operand, SegmentName::Ss))
    }

    /// Probes for the whole group whose lowest address is in RDI.
    fn open_group(&mut self, member: Member, operand: Operand) {
        let Some(group) = self.groups.get(member.group).copied() else { return };
        let span = Operand { size: group.span(), reads: operand.reads, writes: group.write };
        let site = self.probe(span, SegmentName::Ds);
        self.cold.push(Cold::Group {
            miss: site.miss,
            table: site.table,
            info: site.info,
            back: site.back,
            position: site.position,
        });
        let start = self.asm.here();
        self.asm.store(Width::W64, layout::group(member.group), ADDRESS);
        if let Some(kept) = self.kept.get_mut(member.group) {
            *kept = start..self.asm.here();
        }
        self.holds = Some(member.group);
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

    pub(super) fn place_group(
        &mut self,
        miss: super::asm::Fixup,
        table: i32,
        info: AccessInfo,
        back: usize,
        position: usize,
    ) {
        self.resume_position(position);
        self.asm.bind(miss);
        let tag = Mem::indexed(Reg::RSP, SCRATCH, 0, table);
        self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, tag);
        self.asm.mov_imm(SCRATCH, u64::from(info.0));
        let thunk = self.thunk(index::GROUP);
        self.asm.call_mem(thunk);
        self.asm.jmp_to(back);
    }

    /// Probes the TLB for the linear address in RDI, which becomes a host address. Clobbers RSI
    /// and flags. The access itself must follow, then [`Emitter::close`].
    pub(super) fn probe(&mut self, operand: Operand, segment: SegmentName) -> Site {
        self.holds = None;
        let info = AccessInfo::new(operand.size, operand.reads, operand.writes, segment);
        let table = layout::tlb_table(self.context.mode.mmu() as usize, operand.writes);
        let tag = Mem::indexed(Reg::RSP, SCRATCH, 0, table);
        let host = Mem::indexed(Reg::RSP, SCRATCH, 0, table + 8);
        if self.context.bmi2 {
            self.asm.rorx(Width::W64, SCRATCH, ADDRESS, 8);
        } else {
            self.asm.mov(Width::W64, SCRATCH, ADDRESS);
            self.asm.shift_imm(Width::W64, 5, SCRATCH, 8);
        }
        self.asm.alu_imm(Width::W32, 4, SCRATCH, ((TLB_ENTRIES - 1) << 4) as i32);
        self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, tag);
        self.asm.alu_imm(Width::W64, 7, ADDRESS, 4096 - operand.size as i32);
        let miss = self.asm.jcc(cc::A);
        self.asm.rm(Width::W64, op::ADD_LOAD, ADDRESS, host);
        let position = self.positions.len() - 1;
        Site { miss, table, info, back: self.asm.here(), position }
    }

    /// Ends the access begun by [`Emitter::open`]. For a write, all code since then must be
    /// position-independent, since the slow path holds a copy of it.
    pub fn close(&mut self, place: Place) {
        let Place::Single(site) = place else { return };
        let after = self.asm.here();
        self.cold.push(Cold::Access {
            miss: site.miss,
            table: site.table,
            info: site.info,
            back: site.back,
            after,
            position: site.position,
        });
    }

    pub(super) fn place_access(
        &mut self,
        miss: super::asm::Fixup,
        table: i32,
        info: AccessInfo,
        (back, after): (usize, usize),
        position: usize,
    ) {
        self.resume_position(position);
        self.asm.bind(miss);
        // The same XOR gives the address back.
        let tag = Mem::indexed(Reg::RSP, SCRATCH, 0, table);
        self.asm.rm(Width::W64, op::XOR_LOAD, ADDRESS, tag);
        self.asm.mov_imm(SCRATCH, u64::from(info.0));
        if !info.writes() {
            let thunk = self.thunk(index::READ);
            self.asm.call_mem(thunk);
            self.asm.jmp_to(back);
            return;
        }
        let thunk = self.thunk(index::WRITE);
        self.asm.call_mem(thunk);
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

fn scale(insn: &Instruction) -> u8 {
    insn.memory_index_scale().trailing_zeros() as u8
}
