//! String instructions with all their prefixes (Intel SDM 2A REP, 1 7.3.9). Repeated ones take all
//! elements of a page at once, and stop at an element boundary when somebody wants the vCPU.
//!
//! `bytes` does the work on host memory; here is what guards it: addresses, faults and counts.
#![allow(unsafe_code)]
mod bytes;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::mmu::{As, Want};
use crate::mode::MmuIndex;
use crate::operand::{mask, segment_name, sign_extend};
use crate::ports;
use arch::SegmentName;
use arch::registers::gpr::{RAX, RCX, RDI, RDX, RSI};
use arch::registers::rflags;
use bytes::{Direction, Found, Run};
use iced_x86::{Code, Instruction, OpKind};

/// What one element does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    Input,
    Output,
}

/// Prefix.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Once,
    /// REP and REPE.
    WhileEqual,
    /// REPNE.
    WhileNotEqual,
}

/// A string instruction, decoded.
#[derive(Clone, Copy)]
struct Strings {
    kind: Kind,
    repeat: Repeat,
    /// Bytes of an element.
    size: usize,
    /// Bytes of RSI, RDI and RCX that count.
    pointer: usize,
    source: SegmentName,
    direction: Direction,
}

/// What came of the elements that lie in one page on each side.
enum Part {
    /// They must be taken singly: a device, a page of code, an element across pages or limits.
    None,
    /// Taken; the count, if any, is used up or more pages follow.
    Taken,
    /// A comparison ended the repetition.
    Ended,
}

/// Elements between two looks at the mailbox.
const LOOK_EVERY: u32 = 512;

/// Executes one, or as much of a repeated one as may run without a look at the mailbox.
pub(crate) fn execute(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let s = Strings::decode(cpu, insn);
    if s.uses_ports() {
        ports::check_port(cpu, cpu.gpr[RDX] as u16, s.size)?;
    }
    if s.repeat == Repeat::Once {
        if matches!(s.part(cpu, 1)?, Part::None) {
            s.element(cpu)?;
        }
        return Ok(if s.uses_ports() && cpu.wanted() { Flow::Leave } else { Flow::Next });
    }
    let mut since_look = 0;
    loop {
        let count = s.count(cpu);
        if count == 0 {
            return Ok(Flow::Next);
        }
        match s.part(cpu, count)? {
            Part::Ended => return Ok(Flow::Next),
            Part::Taken => since_look = LOOK_EVERY,
            Part::None => {
                s.element(cpu)?;
                cpu.set_gpr(RCX, s.pointer, count - 1);
                let equal = cpu.rflags & rflags::ZF != 0;
                if s.compares() && equal != (s.repeat == Repeat::WhileEqual) {
                    return Ok(Flow::Next);
                }
                since_look += 1;
            }
        }
        let look = since_look >= LOOK_EVERY || s.uses_ports() || cpu.mode.step();
        if look && s.count(cpu) != 0 {
            since_look = 0;
            if cpu.mode.step() || cpu.wanted() {
                // Registers say how far it came: the same instruction goes on from there.
                return Ok(Flow::Jump);
            }
        }
    }
}

/// The operation and the size of its elements.
fn shape(code: Code) -> (Kind, usize) {
    use Code as C;
    match code {
        C::Movsb_m8_m8 => (Kind::Move, 1),
        C::Movsw_m16_m16 => (Kind::Move, 2),
        C::Movsd_m32_m32 => (Kind::Move, 4),
        C::Movsq_m64_m64 => (Kind::Move, 8),
        C::Cmpsb_m8_m8 => (Kind::Compare, 1),
        C::Cmpsw_m16_m16 => (Kind::Compare, 2),
        C::Cmpsd_m32_m32 => (Kind::Compare, 4),
        C::Cmpsq_m64_m64 => (Kind::Compare, 8),
        C::Stosb_m8_AL => (Kind::Store, 1),
        C::Stosw_m16_AX => (Kind::Store, 2),
        C::Stosd_m32_EAX => (Kind::Store, 4),
        C::Stosq_m64_RAX => (Kind::Store, 8),
        C::Lodsb_AL_m8 => (Kind::Load, 1),
        C::Lodsw_AX_m16 => (Kind::Load, 2),
        C::Lodsd_EAX_m32 => (Kind::Load, 4),
        C::Lodsq_RAX_m64 => (Kind::Load, 8),
        C::Scasb_AL_m8 => (Kind::Scan, 1),
        C::Scasw_AX_m16 => (Kind::Scan, 2),
        C::Scasd_EAX_m32 => (Kind::Scan, 4),
        C::Scasq_RAX_m64 => (Kind::Scan, 8),
        C::Insb_m8_DX => (Kind::Input, 1),
        C::Insw_m16_DX => (Kind::Input, 2),
        C::Insd_m32_DX => (Kind::Input, 4),
        C::Outsb_DX_m8 => (Kind::Output, 1),
        C::Outsw_DX_m16 => (Kind::Output, 2),
        _ => (Kind::Output, 4),
    }
}

impl Strings {
    fn decode(cpu: &Cpu, insn: &Instruction) -> Self {
        let (kind, size) = shape(insn.code());
        let repeat = if insn.has_repne_prefix() {
            Repeat::WhileNotEqual
        } else if insn.has_rep_prefix() {
            Repeat::WhileEqual
        } else {
            Repeat::Once
        };
        // The memory operand, or the first of two, is operand 0 or 1.
        let pointer = match (insn.op0_kind(), insn.op1_kind()) {
            (OpKind::MemorySegSI | OpKind::MemoryESDI, _)
            | (OpKind::Register, OpKind::MemorySegSI | OpKind::MemoryESDI) => 2,
            (OpKind::MemorySegESI | OpKind::MemoryESEDI, _)
            | (OpKind::Register, OpKind::MemorySegESI | OpKind::MemoryESEDI) => 4,
            _ => 8,
        };
        let source = match segment_name(insn.segment_prefix()) {
            name @ (SegmentName::Fs | SegmentName::Gs) => name,
            // The other prefixes do nothing in 64-bit mode (Intel SDM 1 3.3.7.1).
            _ if cpu.mode.is_64() => SegmentName::Ds,
            name => name,
        };
        let down = cpu.rflags & rflags::DF != 0;
        let direction = if down { Direction::Down } else { Direction::Up };
        Self { kind, repeat, size, pointer, source, direction }
    }

    fn uses_ports(&self) -> bool {
        matches!(self.kind, Kind::Input | Kind::Output)
    }

    fn compares(&self) -> bool {
        matches!(self.kind, Kind::Compare | Kind::Scan)
    }

    fn count(&self, cpu: &Cpu) -> u64 {
        cpu.gpr[RCX] & mask(self.pointer)
    }

    fn pointer(&self, cpu: &Cpu, register: usize) -> u64 {
        cpu.gpr[register] & mask(self.pointer)
    }

    /// Moves RSI or RDI past `elements`.
    fn advance(&self, cpu: &mut Cpu, register: usize, elements: u64) {
        let at = self.pointer(cpu, register);
        let bytes = elements * self.size as u64;
        let next = match self.direction {
            Direction::Up => at.wrapping_add(bytes),
            Direction::Down => at.wrapping_sub(bytes),
        };
        cpu.set_gpr(register, self.pointer, next);
    }

    /// One element, without the count.
    fn element(&self, cpu: &mut Cpu) -> Result<(), Exception> {
        let (size, step) = (self.size, self.size as u64);
        let (si, di) = (self.pointer(cpu, RSI), self.pointer(cpu, RDI));
        match self.kind {
            Kind::Move => {
                let value = cpu.load_operand(self.source, si, size)?;
                cpu.store_operand(SegmentName::Es, di, value, size)?;
            }
            Kind::Store => {
                let value = cpu.gpr[RAX] & mask(size);
                cpu.store_operand(SegmentName::Es, di, value, size)?;
            }
            Kind::Load => {
                let value = cpu.load_operand(self.source, si, size)?;
                cpu.set_gpr(RAX, size, value);
            }
            Kind::Compare => {
                let left = cpu.load_operand(self.source, si, size)?;
                let right = cpu.load_operand(SegmentName::Es, di, size)?;
                compare(cpu, left, right, size);
            }
            Kind::Scan => {
                let right = cpu.load_operand(SegmentName::Es, di, size)?;
                compare(cpu, cpu.gpr[RAX] & mask(size), right, size);
            }
            Kind::Input => {
                // The destination must be known good before the device is read.
                let address = cpu.linear(SegmentName::Es, di, step, true)?;
                cpu.probe_store(address, size, As::Current)?;
                let value = ports::read(cpu, cpu.gpr[RDX] as u16, size);
                cpu.store_value(address, value, size, As::Current)?;
            }
            Kind::Output => {
                let value = cpu.load_operand(self.source, si, size)?;
                ports::write(cpu, cpu.gpr[RDX] as u16, value, size);
            }
        }
        if matches!(self.kind, Kind::Move | Kind::Load | Kind::Compare | Kind::Output) {
            self.advance(cpu, RSI, 1);
        }
        if !matches!(self.kind, Kind::Load | Kind::Output) {
            self.advance(cpu, RDI, 1);
        }
        Ok(())
    }

    /// Takes as many of `count` elements as lie within one page on each side.
    #[inline]
    fn part(&self, cpu: &mut Cpu, count: u64) -> Result<Part, Exception> {
        if cpu.mode.step() {
            return Ok(Part::None);
        }
        match self.kind {
            Kind::Move => self.part_move(cpu, count),
            Kind::Store => self.part_store(cpu, count),
            Kind::Load => self.part_load(cpu, count),
            Kind::Compare => self.part_compare(cpu, count),
            Kind::Scan => self.part_scan(cpu, count),
            Kind::Input | Kind::Output => Ok(Part::None),
        }
    }

    fn part_move(&self, cpu: &mut Cpu, count: u64) -> Result<Part, Exception> {
        let si = self.pointer(cpu, RSI);
        let Some(source) = self.reach(cpu, self.source, si, count, Want::Read)? else {
            return Ok(Part::None);
        };
        let di = self.pointer(cpu, RDI);
        let Some(target) = self.reach(cpu, SegmentName::Es, di, source.elements, Want::Write)?
        else {
            return Ok(Part::None);
        };
        let run = self.run(target.elements);
        // Filling the TLB for the target cannot move RAM: `source` is still valid.
        // SAFETY: `reach` vouches for the elements on either side.
        unsafe { bytes::copy(source.host, target.host, run) };
        self.advance(cpu, RSI, target.elements);
        self.advance(cpu, RDI, target.elements);
        self.counted(cpu, count, target.elements);
        Ok(Part::Taken)
    }

    fn part_store(&self, cpu: &mut Cpu, count: u64) -> Result<Part, Exception> {
        let di = self.pointer(cpu, RDI);
        let Some(target) = self.reach(cpu, SegmentName::Es, di, count, Want::Write)? else {
            return Ok(Part::None);
        };
        // SAFETY: `reach` vouches for the elements.
        unsafe { bytes::fill(target.host, cpu.gpr[RAX], self.run(target.elements)) };
        self.advance(cpu, RDI, target.elements);
        self.counted(cpu, count, target.elements);
        Ok(Part::Taken)
    }

    /// RAM has no side effects: only the last element counts.
    fn part_load(&self, cpu: &mut Cpu, count: u64) -> Result<Part, Exception> {
        let si = self.pointer(cpu, RSI);
        let Some(source) = self.reach(cpu, self.source, si, count, Want::Read)? else {
            return Ok(Part::None);
        };
        // SAFETY: `reach` vouches for the elements.
        let value = unsafe { bytes::last(source.host, self.run(source.elements)) };
        cpu.set_gpr(RAX, self.size, value);
        self.advance(cpu, RSI, source.elements);
        self.counted(cpu, count, source.elements);
        Ok(Part::Taken)
    }

    fn part_compare(&self, cpu: &mut Cpu, count: u64) -> Result<Part, Exception> {
        let si = self.pointer(cpu, RSI);
        let Some(left) = self.reach(cpu, self.source, si, count, Want::Read)? else {
            return Ok(Part::None);
        };
        let di = self.pointer(cpu, RDI);
        let Some(right) = self.reach(cpu, SegmentName::Es, di, left.elements, Want::Read)? else {
            return Ok(Part::None);
        };
        let run = self.run(right.elements);
        let readable = left.page_left.min(right.page_left);
        let until_equal = self.repeat == Repeat::WhileNotEqual;
        // SAFETY: `reach` vouches for the elements, and for all that follows in the pages.
        let found = unsafe { bytes::compare(left.host, right.host, run, readable, until_equal) };
        self.advance(cpu, RSI, found.elements);
        Ok(self.compared(cpu, count, found))
    }

    fn part_scan(&self, cpu: &mut Cpu, count: u64) -> Result<Part, Exception> {
        let di = self.pointer(cpu, RDI);
        let Some(right) = self.reach(cpu, SegmentName::Es, di, count, Want::Read)? else {
            return Ok(Part::None);
        };
        let (run, value) = (self.run(right.elements), cpu.gpr[RAX]);
        let until_equal = self.repeat == Repeat::WhileNotEqual;
        // SAFETY: `reach` vouches for the elements, and for all that follows in the page.
        let found = unsafe { bytes::scan(right.host, value, run, right.page_left, until_equal) };
        Ok(self.compared(cpu, count, found))
    }

    /// What SCAS and CMPS leave behind.
    fn compared(&self, cpu: &mut Cpu, count: u64, found: Found) -> Part {
        self.advance(cpu, RDI, found.elements);
        self.counted(cpu, count, found.elements);
        compare(cpu, found.left, found.right, self.size);
        if found.ended { Part::Ended } else { Part::Taken }
    }

    fn counted(&self, cpu: &mut Cpu, count: u64, elements: u64) {
        if self.repeat != Repeat::Once {
            cpu.set_gpr(RCX, self.pointer, count - elements);
        }
    }

    fn run(&self, elements: u64) -> Run {
        Run { elements: elements as usize, size: self.size, direction: self.direction }
    }

    /// Finds those of `count` elements from `offset` on that lie in one page of RAM; `None` where
    /// an element must be taken by itself.
    #[inline(always)]
    fn reach(
        &self,
        cpu: &mut Cpu,
        name: SegmentName,
        offset: u64,
        count: u64,
        want: Want,
    ) -> Result<Option<Reach>, Exception> {
        let write = want == Want::Write;
        let long = cpu.mode.is_64();
        let address = if long {
            // Canonical if the TLB knows it; `miss` checks the others.
            match name {
                SegmentName::Fs | SegmentName::Gs => cpu.segment(name).base.wrapping_add(offset),
                _ => offset,
            }
        } else {
            match cpu.linear(name, offset, self.size as u64, write) {
                Ok(address) => address,
                Err(_) => return Ok(None),
            }
        };
        let mut elements = self.elements(address & 0xfff, 0xfff).min(count);
        if self.pointer != 8 {
            elements = elements.min(self.elements(offset, mask(self.pointer)));
        }
        if elements == 0 || (!long && !self.within_segment(cpu, name, offset, elements, write)) {
            return Ok(None);
        }
        let host = match cpu.tlb.probe(cpu.mode.mmu(), write, address) {
            Some(host) => host as *mut u8,
            None => match self.miss(cpu, name, offset, address, want)? {
                Some(host) => host,
                None => return Ok(None),
            },
        };
        Ok(Some(Reach { host, elements, page_left: 4096 - (address & 0xfff) as usize }))
    }

    /// How many whole elements there are from `at` on within 0 to `last`.
    fn elements(&self, at: u64, last: u64) -> u64 {
        let shift = self.size.trailing_zeros();
        let upwards = (last - at).saturating_add(1) >> shift;
        match self.direction {
            Direction::Up => upwards,
            Direction::Down if upwards == 0 => 0,
            Direction::Down => (at >> shift) + 1,
        }
    }

    /// Whether `elements` from `offset` on are within the limit of a segment of 16- or 32-bit code.
    fn within_segment(
        &self,
        cpu: &Cpu,
        name: SegmentName,
        offset: u64,
        elements: u64,
        write: bool,
    ) -> bool {
        let others = (elements - 1) * self.size as u64;
        let lowest = match self.direction {
            Direction::Up => offset,
            Direction::Down => offset - others,
        };
        cpu.linear(name, lowest, others + self.size as u64, write).is_ok()
    }

    #[cold]
    #[inline(never)]
    fn miss(
        &self,
        cpu: &mut Cpu,
        name: SegmentName,
        offset: u64,
        address: u64,
        want: Want,
    ) -> Result<Option<*mut u8>, Exception> {
        let write = want == Want::Write;
        if cpu.mode.mmu() == MmuIndex::Aligned
            || cpu.linear(name, offset, self.size as u64, write).is_err()
        {
            return Ok(None);
        }
        Ok(cpu.span(address, want)?.map(|(host, _)| host))
    }
}

/// Elements that can be reached directly.
struct Reach {
    /// The first one to take.
    host: *mut u8,
    elements: u64,
    /// Bytes from `host` to the end of its page.
    page_left: usize,
}

/// Flags of `left - right`, as CMP sets them.
pub(crate) fn compare(cpu: &mut Cpu, left: u64, right: u64, size: usize) {
    let result = left.wrapping_sub(right) & mask(size);
    let sign = 1 << (8 * size - 1);
    let mut flags = 0;
    let mut set = |on: bool, bit: u64| flags |= if on { bit } else { 0 };
    set(left < right, rflags::CF);
    set((result as u8).count_ones().is_multiple_of(2), rflags::PF);
    set((left ^ right ^ result) & 0x10 != 0, rflags::AF);
    set(result == 0, rflags::ZF);
    set(sign_extend(result, size) >> 63 != 0, rflags::SF);
    set((left ^ right) & (left ^ result) & sign != 0, rflags::OF);
    cpu.rflags = (cpu.rflags & !rflags::ARITHMETIC) | flags;
}
