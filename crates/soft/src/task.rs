//! Task-state segments: stacks for inner privilege levels, the I/O permission bitmap, and
//! hardware task switches (Intel SDM 3A chapter 7).
use crate::cpu::Cpu;
use crate::exception::Exception;
use crate::segment::{Descriptor, code_of, is_null, kind};
use arch::registers::{cr0, cr4, rflags};
use arch::{Segment, SegmentName};

/// How a task switch came about: what happens to busy bits, NT and the back link.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// JMP.
    Jump,
    /// CALL, exception or interrupt: nested, with a back link.
    Call,
    /// IRET with NT set.
    Return,
}

/// Reads a stack pointer (RSPn or ISTn) at `at` in the 64-bit TSS.
pub(crate) fn stack_pointer_64(cpu: &mut Cpu, at: u64, ext: u32) -> Result<u64, Exception> {
    let tr = cpu.sys.tr;
    if at + 7 > u64::from(tr.limit) {
        return Err(Exception::ts(code_of(tr.selector) | ext));
    }
    let sp = cpu.system_load(tr.base.wrapping_add(at), 8)?;
    if cpu.canonical(sp) { Ok(sp) } else { Err(Exception::ss(ext)) }
}

/// SS and (E)SP for privilege level `cpl` from a 16- or 32-bit TSS, checked and ready to load.
pub(crate) fn inner_stack(cpu: &mut Cpu, cpl: u8, ext: u32) -> Result<(Segment, u64), Exception> {
    let tr = cpu.sys.tr;
    let wide = tr.kind() >= 8;
    let (at, size) = if wide { (4 + 8 * u64::from(cpl), 4) } else { (2 + 4 * u64::from(cpl), 2) };
    if at + size as u64 + 1 > u64::from(tr.limit) {
        return Err(Exception::ts(code_of(tr.selector) | ext));
    }
    let sp = cpu.system_load(tr.base.wrapping_add(at), size)?;
    let selector = cpu.system_load(tr.base.wrapping_add(at + size as u64), 2)? as u16;
    let ss = cpu.fetch_stack_segment(selector, cpl, Exception::ts, ext)?;
    Ok((ss, sp))
}

/// Whether the I/O permission bitmap allows `size` ports from `port` (Intel SDM 1 19.5.2).
pub(crate) fn ports_allowed(cpu: &mut Cpu, port: u16, size: usize) -> Result<bool, Exception> {
    let tr = cpu.sys.tr;
    if !tr.present() || tr.kind() < 8 || tr.limit < 0x67 {
        return Ok(false);
    }
    let map = cpu.system_load(tr.base.wrapping_add(0x66), 2)?;
    let at = map + u64::from(port >> 3);
    // The CPU always reads two bytes, so both must lie within the limit.
    if at + 1 > u64::from(tr.limit) {
        return Ok(false);
    }
    let bits = cpu.system_load(tr.base.wrapping_add(at), 2)? >> (port & 7);
    Ok(bits & ((1 << size) - 1) == 0)
}

/// An interrupt through a task gate; the error code goes onto the new task's stack.
pub(crate) fn interrupt(
    cpu: &mut Cpu,
    selector: u16,
    return_rip: u64,
    error: Option<u32>,
    ext: u32,
) -> Result<(), Exception> {
    switch(cpu, selector, Cause::Call, return_rip, ext)?;
    if let Some(error) = error {
        let size = if cpu.sys.tr.kind() >= 8 { 4 } else { 2 };
        let mut stack = crate::stack::Stack::current(cpu);
        stack.push(cpu, u64::from(error), size)?;
        stack.commit(cpu);
    }
    Ok(())
}

/// IRET with NT set: back to the task in the back link.
pub(crate) fn return_from(cpu: &mut Cpu) -> Result<(), Exception> {
    let link = cpu.system_load(cpu.sys.tr.base, 2)? as u16;
    switch(cpu, link, Cause::Return, cpu.next_rip, 0)
}

/// Switches to the task whose TSS `selector` names. `rip` is what the old task resumes at.
pub(crate) fn switch(
    cpu: &mut Cpu,
    selector: u16,
    cause: Cause,
    rip: u64,
    ext: u32,
) -> Result<(), Exception> {
    let bad: fn(u32) -> Exception =
        if cause == Cause::Return { Exception::ts } else { Exception::gp };
    let code = code_of(selector) | ext;
    if is_null(selector) || selector & 4 != 0 {
        return Err(bad(code));
    }
    let d = cpu.descriptor(selector, bad, ext)?;
    let wanted = match cause {
        Cause::Return => [kind::TSS16_BUSY, kind::TSS32_BUSY],
        _ => [kind::TSS16, kind::TSS32],
    };
    if !wanted.contains(&d.kind()) {
        return Err(bad(code));
    }
    if !d.present() {
        return Err(Exception::np(code));
    }
    let wide = d.kind() >= 8;
    let length = if wide { 0x67 } else { 0x2b };
    let tss = d.segment();
    if tss.limit < length {
        return Err(Exception::ts(code));
    }
    let new = Image::read(cpu, tss.base, wide)?;
    save_old(cpu, cause, rip)?;
    link_new(cpu, &d, cause)?;
    let saved = (cpu.gpr, cpu.rip, cpu.rflags, cpu.segments, cpu.sys.clone());
    let nested = cause == Cause::Call;
    cpu.sys.tr = tss;
    cpu.sys.tr.attributes |= 2;
    cpu.sys.cr0 |= cr0::TS;
    cpu.sys.debug[5] &= !0x155;
    let result = new.load(cpu, nested, ext);
    if result.is_err() && saved.4.cpl == cpu.sys.cpl && cpu.rip == saved.1 {
        // Nothing of the new task took effect beyond TR.
        (cpu.gpr, cpu.rip, cpu.rflags, cpu.segments, cpu.sys) = saved;
    }
    cpu.update_mode();
    result?;
    if new.trap {
        return Err(Exception::debug(1 << 15));
    }
    Ok(())
}

/// Writes the outgoing task's registers into its TSS, clearing its busy bit as the cause demands.
fn save_old(cpu: &mut Cpu, cause: Cause, rip: u64) -> Result<(), Exception> {
    let tr = cpu.sys.tr;
    let wide = tr.kind() >= 8;
    let mut flags = cpu.rflags;
    if cause == Cause::Return {
        flags &= !rflags::NT;
    }
    let size: u64 = if wide { 4 } else { 2 };
    let start = if wide { 0x20 } else { 0xe };
    let segments = start + 10 * size;
    cpu.system_probe(tr.base.wrapping_add(start), (segments + 4 * size - start) as usize)?;
    let mut fields = vec![rip, flags];
    fields.extend_from_slice(&cpu.gpr[..8]);
    for (i, value) in fields.iter().enumerate() {
        cpu.system_store(tr.base.wrapping_add(start + size * i as u64), *value, size as usize)?;
    }
    let names = if wide { 6 } else { 4 };
    for i in 0..names {
        let value = u64::from(cpu.segments[i].selector);
        cpu.system_store(tr.base.wrapping_add(segments + size * i as u64), value, 2)?;
    }
    if cause != Cause::Call
        && let Some(address) = cpu.descriptor_address(tr.selector, 8)
    {
        let byte = cpu.system_load(address.wrapping_add(5), 1)?;
        cpu.system_store(address.wrapping_add(5), byte & !2, 1)?;
    }
    Ok(())
}

/// Marks the incoming task busy and, for a nested one, leaves the back link.
fn link_new(cpu: &mut Cpu, d: &Descriptor, cause: Cause) -> Result<(), Exception> {
    if cause != Cause::Return {
        cpu.system_store(d.address.wrapping_add(5), (d.raw >> 40 & 0xff) | 2, 1)?;
    }
    if cause == Cause::Call {
        let link = u64::from(cpu.sys.tr.selector);
        cpu.system_store(d.segment().base, link, 2)?;
    }
    Ok(())
}

/// What a TSS holds.
struct Image {
    wide: bool,
    cr3: u64,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Image {
    fn read(cpu: &mut Cpu, base: u64, wide: bool) -> Result<Self, Exception> {
        let size: usize = if wide { 4 } else { 2 };
        let start: u64 = if wide { 0x20 } else { 0xe };
        let step = size as u64;
        let mut field = |at: u64, bytes: usize| cpu.system_load(base.wrapping_add(at), bytes);
        let rip = field(start, size)?;
        let flags = field(start + step, size)?;
        let mut gpr = [0; 8];
        for (i, r) in gpr.iter_mut().enumerate() {
            *r = field(start + step * (2 + i as u64), size)?;
        }
        let mut selectors = [0; 6];
        for (i, s) in selectors.iter_mut().enumerate().take(if wide { 6 } else { 4 }) {
            *s = field(start + step * (10 + i as u64), 2)? as u16;
        }
        let ldt = field(if wide { 0x60 } else { 0x2a }, 2)? as u16;
        let cr3 = if wide { field(0x1c, 4)? } else { 0 };
        let trap = wide && field(0x64, 2)? & 1 != 0;
        Ok(Self { wide, cr3, rip, flags, gpr, selectors, ldt, trap })
    }

    /// Loads everything; faults are those of the new task (Intel SDM 3A table 7-1).
    fn load(&self, cpu: &mut Cpu, nested: bool, ext: u32) -> Result<(), Exception> {
        if self.wide && cpu.paging() {
            cpu.sys.cr3 = self.cr3;
            cpu.flush_tlb();
        }
        self.load_ldt(cpu, ext)?;
        let vm86 = self.flags & rflags::VM != 0;
        let new_cpl = if vm86 { 3 } else { (self.selectors[1] & 3) as u8 };
        let mut flags = (self.flags & 0x3f_7fd7) | rflags::FIXED;
        if nested {
            flags |= rflags::NT;
        }
        let mut segments = [Segment::default(); 6];
        for (s, &selector) in segments.iter_mut().zip(&self.selectors) {
            let base = u64::from(selector) << 4;
            *s = if vm86 {
                Segment { selector, base, limit: 0xffff, attributes: 0xf3 }
            } else {
                Segment { selector, ..Segment::default() }
            };
        }
        if !vm86 {
            segments[SegmentName::Cs as usize] = self.code_segment(cpu, new_cpl, ext)?;
            let was_64 = cpu.mode;
            // Selectors of the new task are protected-mode ones even when it comes from V86 mode.
            cpu.rflags &= !rflags::VM;
            cpu.update_mode();
            let rest = self.data_segments(cpu, &mut segments, new_cpl, ext);
            cpu.mode = was_64;
            rest?;
        }
        cpu.segments = segments;
        cpu.rflags = flags;
        cpu.sys.cpl = new_cpl;
        cpu.gpr[..8].copy_from_slice(&self.gpr);
        cpu.rip = self.rip;
        if self.rip > u64::from(segments[SegmentName::Cs as usize].limit) {
            cpu.update_mode();
            return Err(Exception::gp(ext));
        }
        Ok(())
    }

    fn load_ldt(&self, cpu: &mut Cpu, ext: u32) -> Result<(), Exception> {
        cpu.sys.ldtr = Segment { selector: self.ldt, ..Segment::default() };
        if is_null(self.ldt) {
            return Ok(());
        }
        let code = code_of(self.ldt) | ext;
        if self.ldt & 4 != 0 {
            return Err(Exception::ts(code));
        }
        let d = cpu.descriptor(self.ldt, Exception::ts, ext)?;
        if d.kind() != kind::LDT || !d.present() {
            return Err(Exception::ts(code));
        }
        cpu.sys.ldtr = d.segment();
        Ok(())
    }

    fn code_segment(&self, cpu: &mut Cpu, cpl: u8, ext: u32) -> Result<Segment, Exception> {
        let selector = self.selectors[SegmentName::Cs as usize];
        if is_null(selector) {
            return Err(Exception::ts(ext));
        }
        let code = code_of(selector) | ext;
        let mut d = cpu.descriptor(selector, Exception::ts, ext)?;
        let rights = if d.conforming() { d.dpl() <= cpl } else { d.dpl() == cpl };
        if !d.is_code() || !rights {
            return Err(Exception::ts(code));
        }
        if !d.present() {
            return Err(Exception::np(code));
        }
        cpu.mark_accessed(&mut d)?;
        Ok(d.segment())
    }

    fn data_segments(
        &self,
        cpu: &mut Cpu,
        segments: &mut [Segment; 6],
        cpl: u8,
        ext: u32,
    ) -> Result<(), Exception> {
        let to_ts = |e: Exception| match e.vector {
            arch::registers::vector::GP => Exception::ts(e.error.unwrap_or(0) | ext),
            _ => e,
        };
        let ss = self.selectors[SegmentName::Ss as usize];
        segments[SegmentName::Ss as usize] =
            cpu.fetch_stack_segment(ss, cpl, Exception::ts, ext)?;
        let count = if self.wide { 6 } else { 4 };
        for name in [SegmentName::Es, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs] {
            if (name as usize) < count {
                let selector = self.selectors[name as usize];
                segments[name as usize] = cpu.fetch_segment(name, selector, cpl).map_err(to_ts)?;
            }
        }
        Ok(())
    }
}

/// Whether CR4 allows debug I/O breakpoints: reserved kinds of DR7 count as none without DE.
pub(crate) fn debug_extensions(cpu: &Cpu) -> bool {
    cpu.sys.cr4 & cr4::DE != 0
}
