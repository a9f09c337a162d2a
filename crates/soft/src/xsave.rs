//! The XSAVE family on the guest's memory (Intel SDM 1 chapter 13): XSAVE, XSAVEOPT, XSAVEC,
//! XRSTOR with the x87, SSE and AVX components.
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::fpu::{MXCSR, XMM, mxcsr_bits, x87_from_area, x87_to_area};
use crate::mmu::As;
use crate::operand::operand_segment;
use arch::registers::gpr::{RAX, RDX};
use arch::registers::{cr0, cr4, xcr0};
use iced_x86::{Instruction, Mnemonic as M};

const HEADER: usize = 512;
const AVX: usize = 576;
const COMPACT: u64 = 1 << 63;

/// XINUSE: components that are not in their initial state.
pub(crate) fn in_use(cpu: &Cpu) -> u64 {
    let avx = cpu.area.0[AVX..AVX + 256].iter().any(|b| *b != 0);
    xcr0::X87 | xcr0::SSE | if avx { xcr0::AVX } else { 0 }
}

/// Checks that the family may run, and finds the area: its linear address and the components
/// asked for.
fn begin(cpu: &mut Cpu, insn: &Instruction, write: bool) -> Result<(u64, u64), Exception> {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::INVALID_OPCODE);
    }
    if cpu.sys.cr0 & cr0::TS != 0 {
        return Err(Exception::NO_FPU);
    }
    let asked = (cpu.gpr[RDX] << 32) | (cpu.gpr[RAX] & 0xffff_ffff);
    let components = asked & cpu.sys.xcr0;
    let size = if components & xcr0::AVX != 0 { AVX + 256 } else { AVX };
    let offset = cpu.offset_of(insn);
    let name = operand_segment(insn, cpu.mode.is_64());
    let address = cpu.linear(name, offset, size as u64, write)?;
    if address & 63 != 0 {
        return Err(Exception::GP0);
    }
    Ok((address, components))
}

/// Bytes of the XMM and of the YMM registers that the mode has.
fn vector_bytes(cpu: &Cpu) -> usize {
    if cpu.mode.is_64() { 256 } else { 128 }
}

/// XSAVE, XSAVEOPT, XSAVEC.
pub(crate) fn save(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let (address, components) = begin(cpu, insn, true)?;
    let compact = matches!(insn.mnemonic(), M::Xsavec | M::Xsavec64);
    let used = in_use(cpu);
    let has = |bit: u64| components & bit != 0;
    let size = if has(xcr0::AVX) { AVX + 256 } else { AVX };
    cpu.probe_store(address, size, As::Current)?;
    let mut header = [0; 16];
    let old = cpu.load_value(address + HEADER as u64, 8, As::Current)?;
    let present =
        if compact { components & used } else { (old & !components) | (components & used) };
    header[..8].copy_from_slice(&present.to_le_bytes());
    header[8..].copy_from_slice(&(COMPACT | components).to_le_bytes());
    if has(xcr0::X87) {
        x87_to_area(cpu);
        write_part(cpu, address, 0, MXCSR)?;
        write_part(cpu, address, 32, XMM)?;
    }
    if has(xcr0::SSE) || has(xcr0::AVX) {
        write_part(cpu, address, MXCSR, MXCSR + 4)?;
        let mask = mxcsr_bits().to_le_bytes();
        cpu.store(address + MXCSR as u64 + 4, &mask, As::Current)?;
    }
    let bytes = vector_bytes(cpu);
    if has(xcr0::SSE) {
        write_part(cpu, address, XMM, XMM + bytes)?;
    }
    // A component in its initial state is not written by XSAVEC and XSAVEOPT.
    let always = matches!(insn.mnemonic(), M::Xsave | M::Xsave64);
    if has(xcr0::AVX) && (always || used & xcr0::AVX != 0) {
        write_part(cpu, address, AVX, AVX + bytes)?;
    }
    let length = if compact { 16 } else { 8 };
    cpu.store(address + HEADER as u64, &header[..length], As::Current)?;
    Ok(Flow::Next)
}

/// Copies a part of `cpu.area` to the same place of the guest's.
fn write_part(cpu: &mut Cpu, address: u64, from: usize, to: usize) -> Result<(), Exception> {
    let area = cpu.area.0;
    cpu.store(address + from as u64, &area[from..to], As::Current)
}

/// XRSTOR, standard and compacted form.
pub(crate) fn restore(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let (address, components) = begin(cpu, insn, false)?;
    let mut image = [0u8; AVX + 256];
    cpu.load(address, &mut image[..AVX], As::Current)?;
    let word = |at: usize| image[at..at + 8].iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
    let (present, layout) = (word(HEADER), word(HEADER + 8));
    let compact = layout & COMPACT != 0;
    let reserved = if compact {
        present & !layout | (layout & !COMPACT) & !cpu.sys.xcr0
    } else {
        present & !cpu.sys.xcr0 | layout | word(HEADER + 16)
    };
    let rest = image[HEADER + 16..AVX].iter().any(|b| *b != 0);
    if reserved != 0 || (compact && rest) {
        return Err(Exception::GP0);
    }
    let loads = |bit: u64| components & present & bit != 0;
    let clears = |bit: u64| components & !present & bit != 0;
    let vectors = components & (xcr0::SSE | xcr0::AVX) != 0;
    // The compacted form takes MXCSR with the SSE component only.
    let control = if compact { loads(xcr0::SSE) } else { vectors };
    let mxcsr = word(MXCSR) as u32;
    if control && mxcsr & !mxcsr_bits() != 0 {
        return Err(Exception::GP0);
    }
    if loads(xcr0::AVX) {
        cpu.load(address + AVX as u64, &mut image[AVX..], As::Current)?;
    }
    let bytes = vector_bytes(cpu);
    let area = &mut cpu.area.0;
    if loads(xcr0::X87) {
        area[..6].copy_from_slice(&image[..6]);
        area[6..MXCSR].fill(0);
        area[32..XMM].copy_from_slice(&image[32..XMM]);
    } else if clears(xcr0::X87) {
        area[..MXCSR].fill(0);
        area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        area[32..XMM].fill(0);
    }
    if control {
        area[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
    } else if compact && clears(xcr0::SSE) {
        area[MXCSR..MXCSR + 4].copy_from_slice(&0x1f80u32.to_le_bytes());
    }
    for (bit, at) in [(xcr0::SSE, XMM), (xcr0::AVX, AVX)] {
        if loads(bit) {
            area[at..at + bytes].copy_from_slice(&image[at..at + bytes]);
        } else if clears(bit) {
            area[at..at + bytes].fill(0);
        }
    }
    if components & xcr0::X87 != 0 {
        x87_from_area(cpu);
    }
    Ok(Flow::Next)
}
