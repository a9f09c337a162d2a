//! Pushes and pops that take effect together: the stack pointer changes only on `commit`, so that
//! a fault half-way leaves the instruction as it was.
use crate::cpu::Cpu;
use crate::exception::Exception;
use crate::mmu::As;
use crate::operand::mask;
use arch::registers::gpr::RSP;
use arch::{Segment, SegmentName};

/// A stack, the present one or one to be switched to.
#[derive(Clone, Copy)]
pub(crate) struct Stack {
    segment: Segment,
    /// 64-bit mode: no segmentation.
    flat: bool,
    real: bool,
    pointer_mask: u64,
    /// The stack pointer; bits outside the mask are kept.
    pub sp: u64,
    who: As,
    error: u32,
}

impl Stack {
    /// The present stack.
    pub fn current(cpu: &Cpu) -> Self {
        let flat = cpu.mode.is_64();
        let segment = *cpu.segment(SegmentName::Ss);
        let size = match (flat, segment.db()) {
            (true, _) => 8,
            (_, true) => 4,
            _ => 2,
        };
        Self {
            segment,
            flat,
            real: cpu.mode.real_segments(),
            pointer_mask: mask(size),
            sp: cpu.gpr[RSP],
            who: As::Current,
            error: 0,
        }
    }

    /// The same with another error code for #SS.
    pub fn with_error(self, error: u32) -> Self {
        Self { error, ..self }
    }

    /// A stack of 16- or 32-bit code in another segment; `error` is what #SS carries.
    pub fn other(segment: Segment, sp: u64, who: As, error: u32) -> Self {
        let pointer_mask = if segment.db() { 0xffff_ffff } else { 0xffff };
        Self { segment, flat: false, real: false, pointer_mask, sp, who, error }
    }

    /// A 64-bit stack.
    pub fn flat(sp: u64, who: As, error: u32) -> Self {
        let segment = Segment::default();
        Self { segment, flat: true, real: false, pointer_mask: u64::MAX, sp, who, error }
    }

    fn address(&self, cpu: &Cpu, sp: u64, size: usize, write: bool) -> Result<u64, Exception> {
        let fault = Exception::ss(self.error);
        if self.flat {
            let last = sp.wrapping_add(size as u64 - 1);
            return if cpu.canonical(sp) && cpu.canonical(last) { Ok(sp) } else { Err(fault) };
        }
        let s = &self.segment;
        let offset = sp & self.pointer_mask;
        let last = offset + size as u64 - 1;
        let limit = u64::from(s.limit);
        let inside = if !self.real && s.expand_down() {
            offset > limit && last <= (if s.db() { 0xffff_ffff } else { 0xffff })
        } else {
            last <= limit
        };
        let allowed = self.real || if write { s.writable() } else { s.readable() };
        if inside && allowed { Ok(s.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(fault) }
    }

    fn moved(&self, by: u64) -> u64 {
        (self.sp & !self.pointer_mask) | (self.sp.wrapping_add(by) & self.pointer_mask)
    }

    /// Pushes the low `size` bytes of `value`.
    pub fn push(&mut self, cpu: &mut Cpu, value: u64, size: usize) -> Result<(), Exception> {
        let sp = self.moved((size as u64).wrapping_neg());
        let address = self.address(cpu, sp, size, true)?;
        if self.who == As::System {
            cpu.system_store(address, value, size)?;
        } else {
            cpu.store_value(address, value, size, As::Current)?;
        }
        self.sp = sp;
        Ok(())
    }

    /// Checks that a push would succeed.
    pub fn check_push(&self, cpu: &mut Cpu, size: usize) -> Result<(), Exception> {
        let sp = self.moved((size as u64).wrapping_neg());
        let address = self.address(cpu, sp, size, true)?;
        cpu.probe_store(address, size, self.who)
    }

    /// Pops `size` bytes.
    pub fn pop(&mut self, cpu: &mut Cpu, size: usize) -> Result<u64, Exception> {
        let address = self.address(cpu, self.sp, size, false)?;
        let value = cpu.load_value(address, size, self.who)?;
        self.sp = self.moved(size as u64);
        Ok(value)
    }

    /// Reads `size` bytes at `at` bytes above the stack pointer.
    pub fn peek(&self, cpu: &mut Cpu, at: u64, size: usize) -> Result<u64, Exception> {
        let address = self.address(cpu, self.moved(at), size, false)?;
        cpu.load_value(address, size, self.who)
    }

    /// The bits of RSP that are the stack pointer.
    pub fn mask(&self) -> u64 {
        self.pointer_mask
    }

    /// Drops `bytes` without reading them.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.moved(bytes);
    }

    /// Makes the stack pointer the CPU's.
    pub fn commit(&self, cpu: &mut Cpu) {
        // A 32-bit stack pointer outside 64-bit mode has no upper half to keep.
        cpu.gpr[RSP] =
            if self.pointer_mask == 0xffff_ffff { self.sp & 0xffff_ffff } else { self.sp };
    }
}

impl Cpu {
    /// Reads a value of a system structure; linear addresses are 64 bits wide in long mode,
    /// whatever the width of the code.
    pub(crate) fn system_load(&mut self, address: u64, size: usize) -> Result<u64, Exception> {
        if (address & 0xfff) as usize + size <= 4096 {
            return self.load_value(address & self.system_mask(), size, As::System);
        }
        let mut value = 0;
        for (at, part, len) in self.system_parts(address, size) {
            if len > 0 {
                let mut bytes = [0; 8];
                self.load(part, bytes.get_mut(..len).unwrap_or(&mut []), As::System)?;
                value |= u64::from_le_bytes(bytes) << (8 * at as u32);
            }
        }
        Ok(value)
    }

    /// Writes a value of a system structure; nothing if a part cannot be written.
    pub(crate) fn system_store(
        &mut self,
        address: u64,
        value: u64,
        size: usize,
    ) -> Result<(), Exception> {
        if (address & 0xfff) as usize + size <= 4096 {
            return self.store_value(address & self.system_mask(), value, size, As::System);
        }
        let parts = self.system_parts(address, size);
        for (_, part, len) in parts {
            if len > 0 {
                self.probe_store(part, len, As::System)?;
            }
        }
        for (at, part, len) in parts {
            if len > 0 {
                let bytes = (value >> (8 * at as u32)).to_le_bytes();
                self.store(part, bytes.get(..len).unwrap_or(&[]), As::System)?;
            }
        }
        Ok(())
    }

    /// Checks that a system structure can be written.
    pub(crate) fn system_probe(&mut self, address: u64, size: usize) -> Result<(), Exception> {
        for (_, part, len) in self.system_parts(address, size) {
            if len > 0 {
                self.probe_store(part, len, As::System)?;
            }
        }
        Ok(())
    }

    fn system_mask(&self) -> u64 {
        if self.long_mode() { u64::MAX } else { 0xffff_ffff }
    }

    /// The pieces (offset, address, length) of an access, one a page.
    fn system_parts(&self, address: u64, size: usize) -> [(usize, u64, usize); 2] {
        let m = self.system_mask();
        let address = address & m;
        let first = size.min(4096 - (address & 0xfff) as usize);
        let next = (address | 0xfff).wrapping_add(1) & m;
        [(0, address, first), (first, next, size - first)]
    }
}
