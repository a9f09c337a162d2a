//! String instructions with all their prefixes (Intel SDM 2A REP, 1 7.3.9). Long ones move whole
//! page parts at the host's speed and stop at an element boundary when somebody wants the vCPU.
#![allow(unsafe_code)]
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::mmu::{As, Want};
use crate::operand::{is_memory, mask, segment_name, sign_extend};
use crate::ports;
use arch::SegmentName;
use arch::registers::gpr::{RAX, RCX, RDI, RDX, RSI};
use arch::registers::rflags;
use iced_x86::{Instruction, Mnemonic as M, OpKind};

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
}

/// Elements between two looks at the mailbox.
const LOOK_EVERY: u32 = 512;

/// Executes one, or as much of a repeated one as may run without a look at the mailbox.
pub(crate) fn execute(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let s = Strings::decode(insn);
    if s.uses_ports() {
        ports::check_port(cpu, cpu.gpr[RDX] as u16, s.size)?;
    }
    if s.repeat == Repeat::Once {
        s.element(cpu)?;
        return Ok(if s.uses_ports() && cpu.wanted() { Flow::Leave } else { Flow::Next });
    }
    let mut since_look = 0;
    while s.count(cpu) != 0 {
        let done = s.bulk(cpu)?;
        if done == 0 {
            s.element(cpu)?;
            cpu.set_gpr(RCX, s.pointer, s.count(cpu).wrapping_sub(1));
            let equal = cpu.rflags & rflags::ZF != 0;
            let compares = matches!(s.kind, Kind::Compare | Kind::Scan);
            if compares && equal != (s.repeat == Repeat::WhileEqual) {
                break;
            }
            since_look += 1;
        }
        let look = done != 0 || since_look >= LOOK_EVERY || s.uses_ports() || cpu.mode.step();
        if look && s.count(cpu) != 0 {
            since_look = 0;
            if cpu.mode.step() || cpu.wanted() {
                // Registers say how far it came: the same instruction goes on from there.
                return Ok(Flow::Jump);
            }
        }
    }
    Ok(Flow::Next)
}

impl Strings {
    fn decode(insn: &Instruction) -> Self {
        let kind = match insn.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => Kind::Move,
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => Kind::Store,
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Kind::Load,
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => Kind::Compare,
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => Kind::Scan,
            M::Insb | M::Insw | M::Insd => Kind::Input,
            _ => Kind::Output,
        };
        let repeat = if insn.has_repne_prefix() {
            Repeat::WhileNotEqual
        } else if insn.has_rep_prefix() {
            Repeat::WhileEqual
        } else {
            Repeat::Once
        };
        let memory = (0..insn.op_count()).map(|n| insn.op_kind(n)).find(|k| is_memory(*k));
        let pointer = match memory {
            Some(OpKind::MemorySegSI | OpKind::MemoryESDI) => 2,
            Some(OpKind::MemorySegESI | OpKind::MemoryESEDI) => 4,
            _ => 8,
        };
        let size = insn.memory_size().size();
        Self { kind, repeat, size, pointer, source: segment_name(insn.memory_segment()) }
    }

    fn uses_ports(&self) -> bool {
        matches!(self.kind, Kind::Input | Kind::Output)
    }

    fn count(&self, cpu: &Cpu) -> u64 {
        cpu.gpr[RCX] & mask(self.pointer)
    }

    fn pointer(&self, cpu: &Cpu, register: usize) -> u64 {
        cpu.gpr[register] & mask(self.pointer)
    }

    fn advance(&self, cpu: &mut Cpu, register: usize, bytes: u64) {
        let at = self.pointer(cpu, register);
        let next = if cpu.rflags & rflags::DF == 0 {
            at.wrapping_add(bytes)
        } else {
            at.wrapping_sub(bytes)
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
            self.advance(cpu, RSI, step);
        }
        if !matches!(self.kind, Kind::Load | Kind::Output) {
            self.advance(cpu, RDI, step);
        }
        Ok(())
    }

    /// Moves or stores as many elements as lie within one page on each side; 0 where elements
    /// must be taken singly.
    fn bulk(&self, cpu: &mut Cpu) -> Result<u64, Exception> {
        let moves = self.kind == Kind::Move;
        if (!moves && self.kind != Kind::Store)
            || cpu.rflags & rflags::DF != 0
            || cpu.mode.step()
            || self.count(cpu) < 2
        {
            return Ok(0);
        }
        let di = self.pointer(cpu, RDI);
        let si = self.pointer(cpu, RSI);
        let Ok(to) = cpu.linear(SegmentName::Es, di, 1, true) else { return Ok(0) };
        let mut bytes = page_left(to).min(offsets_left(di, self.pointer));
        let mut from = 0;
        if moves {
            let Ok(linear) = cpu.linear(self.source, si, 1, false) else { return Ok(0) };
            from = linear;
            bytes = bytes.min(page_left(from)).min(offsets_left(si, self.pointer));
        }
        let elements = (bytes / self.size as u64).min(self.count(cpu));
        let bytes = elements * self.size as u64;
        if elements == 0
            || cpu.linear(SegmentName::Es, di, bytes, true).is_err()
            || (moves && cpu.linear(self.source, si, bytes, false).is_err())
        {
            return Ok(0);
        }
        if moves {
            let Some((source, _)) = cpu.span(from, Want::Read)? else { return Ok(0) };
            let Some((target, _)) = cpu.span(to, Want::Write)? else { return Ok(0) };
            // Filling the TLB for the target cannot move RAM: `source` is still valid.
            // SAFETY: `span` vouches for all bytes up to the end of each page, and `bytes` goes
            // no further on either side; guest memory is only reached through raw pointers.
            unsafe { copy(source, target, bytes as usize, self.size) };
            self.advance(cpu, RSI, bytes);
        } else {
            let Some((target, _)) = cpu.span(to, Want::Write)? else { return Ok(0) };
            // SAFETY: as above.
            unsafe { fill(target, cpu.gpr[RAX], elements as usize, self.size) };
        }
        self.advance(cpu, RDI, bytes);
        cpu.set_gpr(RCX, self.pointer, self.count(cpu) - elements);
        Ok(elements)
    }
}

fn page_left(address: u64) -> u64 {
    4096 - (address & 0xfff)
}

/// Bytes until the offset wraps.
fn offsets_left(offset: u64, pointer: usize) -> u64 {
    (mask(pointer) - offset).saturating_add(1)
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

/// Copies upwards, element by element where the target overlaps what is still to be read, so that
/// a short distance repeats its pattern as on a CPU.
///
/// # Safety
/// Both pointers must be valid for `bytes` bytes.
unsafe fn copy(source: *const u8, target: *mut u8, bytes: usize, size: usize) {
    let distance = (target as usize).wrapping_sub(source as usize);
    // SAFETY: the caller's promise; every step stays within `bytes`.
    unsafe {
        if distance == 0 || distance >= bytes {
            std::ptr::copy(source, target, bytes);
            return;
        }
        let mut at = 0;
        while at + size <= bytes {
            let (s, t) = (source.add(at), target.add(at));
            match size {
                1 => t.write_volatile(s.read_volatile()),
                2 => t.cast::<u16>().write_unaligned(s.cast::<u16>().read_unaligned()),
                4 => t.cast::<u32>().write_unaligned(s.cast::<u32>().read_unaligned()),
                _ => t.cast::<u64>().write_unaligned(s.cast::<u64>().read_unaligned()),
            }
            at += size;
        }
    }
}

/// Stores the low `size` bytes of `value`, `elements` times.
///
/// # Safety
/// `target` must be valid for `elements * size` bytes.
unsafe fn fill(target: *mut u8, value: u64, elements: usize, size: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if size == 1 || value & mask(size) == 0 {
            std::ptr::write_bytes(target, value as u8, elements * size);
            return;
        }
        for n in 0..elements {
            match size {
                2 => target.cast::<u16>().add(n).write_unaligned(value as u16),
                4 => target.cast::<u32>().add(n).write_unaligned(value as u32),
                _ => target.cast::<u64>().add(n).write_unaligned(value),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_onto_the_bytes_just_ahead_repeats_the_pattern() {
        let mut data = *b"ab......";
        // SAFETY: both ranges lie within `data`.
        unsafe { copy(data.as_ptr(), data.as_mut_ptr().add(2), 6, 1) };
        assert_eq!(&data, b"abababab");
    }

    #[test]
    fn a_copy_of_words_onto_one_byte_ahead_moves_word_by_word() {
        let mut data = [1u8, 2, 3, 4, 5];
        // SAFETY: both ranges lie within `data`.
        unsafe { copy(data.as_ptr(), data.as_mut_ptr().add(1), 4, 2) };
        // First word 1,2 to 1..3; then the word at 2, now 2,4, to 3..5.
        assert_eq!(data, [1, 1, 2, 2, 4]);
    }

    #[test]
    fn filling_words_keeps_their_byte_order() {
        let mut data = [0u8; 8];
        // SAFETY: eight bytes.
        unsafe { fill(data.as_mut_ptr(), 0x1234, 4, 2) };
        assert_eq!(data, [0x34, 0x12, 0x34, 0x12, 0x34, 0x12, 0x34, 0x12]);
    }
}
