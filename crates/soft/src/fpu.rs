//! x87, MMX and SSE as state: which instructions are enabled, and the environment images of
//! FSTENV, FSAVE and FXSAVE (Intel SDM 1 8.1.10, 10.5.1; 3A 13.1).
//!
//! The x87 registers live in the host's FPU while the vCPU runs. Images that leave it never carry
//! the host's addresses: instruction and data pointers and the last opcode read as zero.
#![allow(unsafe_code)]
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::mmu::{As, Want};
use crate::mode::{MmuIndex, Mode};
use crate::operand::operand_segment;
use iced_x86::{CpuidFeature as F, EncodingKind, Instruction, Mnemonic as M, OpKind};
use std::arch::asm;
use std::sync::OnceLock;

/// Offsets in the XSAVE area (Intel SDM 1 13.4.1).
pub(crate) const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const ST: usize = 32;
pub(crate) const XMM: usize = 160;

/// Bits of MXCSR that the host has: LDMXCSR runs natively and allows just these
/// (Intel SDM 1 11.6.6).
pub(crate) fn mxcsr_bits() -> u32 {
    static BITS: OnceLock<u32> = OnceLock::new();
    *BITS.get_or_init(|| {
        let mut image = Image([0; 1024]);
        // SAFETY: the image is aligned and large enough; FXSAVE changes no register.
        unsafe { asm!("fxsave64 [{}]", in(reg) image.0.as_mut_ptr(), options(nostack)) };
        let b = &image.0;
        let bits = [b[MXCSR_MASK], b[MXCSR_MASK + 1], b[MXCSR_MASK + 2], b[MXCSR_MASK + 3]];
        match u32::from_le_bytes(bits) {
            0 => 0xffbf,
            bits => bits,
        }
    })
}

/// What an instruction needs of the control registers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    General,
    X87,
    Wait,
    Mmx,
    Sse,
    Avx,
    /// FXSAVE and FXRSTOR.
    Fx,
}

fn unit(insn: &Instruction) -> Unit {
    let features = insn.cpuid_features();
    let has = |list: &[F]| features.iter().any(|f| list.contains(f));
    let vex = insn.encoding() == EncodingKind::VEX;
    match insn.mnemonic() {
        M::Wait => return Unit::Wait,
        M::Ldmxcsr | M::Stmxcsr => return Unit::Sse,
        _ => {}
    }
    if vex {
        return if has(&[F::BMI1, F::BMI2]) { Unit::General } else { Unit::Avx };
    }
    if has(&[F::FXSR]) {
        return Unit::Fx;
    }
    if has(&[F::FPU, F::FPU287, F::FPU387]) {
        return Unit::X87;
    }
    let any = |test: fn(iced_x86::Register) -> bool| {
        (0..insn.op_count())
            .any(|n| insn.op_kind(n) == OpKind::Register && test(insn.op_register(n)))
    };
    if any(|r| r.is_xmm()) {
        Unit::Sse
    } else if any(|r| r.is_mm()) || insn.mnemonic() == M::Emms {
        Unit::Mmx
    } else {
        Unit::General
    }
}

/// Whether an instruction of x87, MMX, SSE or AVX may run in this mode; all others may.
///
/// # Errors
/// #UD where it is not enabled, #NM where the task was switched.
pub fn fpu_allowed(mode: Mode, insn: &Instruction) -> Result<(), Exception> {
    if insn.encoding() == EncodingKind::VEX && mode.real_segments() {
        return Err(Exception::INVALID_OPCODE);
    }
    let (switched, emulated) = (mode.task_switched(), mode.emulate_fpu());
    let (undefined, missing) = match unit(insn) {
        Unit::General => (false, false),
        Unit::Wait => (false, switched && mode.monitor_fpu()),
        Unit::X87 | Unit::Fx => (false, switched || emulated),
        Unit::Mmx => (emulated, switched),
        Unit::Sse => (emulated || !mode.sse(), switched),
        Unit::Avx => (!mode.avx(), switched),
    };
    match (undefined, missing) {
        (true, _) => Err(Exception::INVALID_OPCODE),
        (_, true) => Err(Exception::NO_FPU),
        _ => Ok(()),
    }
}

/// Whether no mode bars the instruction: it uses no unit but the general one.
pub fn is_general(insn: &Instruction) -> bool {
    unit(insn) == Unit::General && insn.encoding() != EncodingKind::VEX
}

/// A 512-byte or larger image, aligned for XSAVE.
#[repr(C, align(64))]
struct Image([u8; 1024]);

/// Whether the host has XSAVE, which touches the x87 component alone.
fn host_xsave() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| std::arch::is_x86_feature_detected!("xsave"))
}

/// Copies the x87 registers from the host's FPU to `cpu.area`; XMM and MXCSR there stay.
pub fn x87_to_area(cpu: &mut Cpu) {
    let mut image = Image([0; 1024]);
    let at = image.0.as_mut_ptr();
    // SAFETY: the image is aligned and large enough; with mask 1 XSAVE writes only the x87 part
    // and the header. FXSAVE writes 512 bytes. Neither changes a register.
    unsafe {
        if host_xsave() {
            asm!("xsave64 [{}]", in(reg) at, in("eax") 1, in("edx") 0, options(nostack));
        } else {
            asm!("fxsave64 [{}]", in(reg) at, options(nostack));
        }
    }
    // A component in its initial state may be left out of the image.
    if host_xsave() && image.0[512] & 1 == 0 {
        image.0[0..24].fill(0);
        image.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        image.0[ST..XMM].fill(0);
    }
    let area = &mut cpu.area.0;
    area[0..6].copy_from_slice(&image.0[0..6]);
    area[6..MXCSR].fill(0);
    area[ST..XMM].copy_from_slice(&image.0[ST..XMM]);
    // The ten bytes of each register are followed by six that are reserved.
    for n in 0..8 {
        area[ST + 16 * n + 10..ST + 16 * n + 16].fill(0);
    }
}

/// Copies the x87 registers from `cpu.area` to the host's FPU; the host's XMM registers stay.
pub fn x87_from_area(cpu: &mut Cpu) {
    let mut image = Image([0; 1024]);
    // SAFETY: the image is aligned and large enough. XRSTOR with mask 1 loads the x87 component
    // alone, from a valid header; FXRSTOR loads what FXSAVE stored but for the x87 part. Rust
    // code keeps nothing in x87 registers.
    unsafe {
        if !host_xsave() {
            asm!("fxsave64 [{}]", in(reg) image.0.as_mut_ptr(), options(nostack));
        }
        let area = &cpu.area.0;
        image.0[0..MXCSR].copy_from_slice(&area[0..MXCSR]);
        image.0[ST..XMM].copy_from_slice(&area[ST..XMM]);
        if host_xsave() {
            image.0[MXCSR..MXCSR + 4].copy_from_slice(&0x1f80u32.to_le_bytes());
            image.0[512] = 1;
            let at = image.0.as_ptr();
            asm!("xrstor64 [{}]", in(reg) at, in("eax") 1, in("edx") 0, options(nostack));
        } else {
            asm!("fxrstor64 [{}]", in(reg) image.0.as_ptr(), options(nostack));
        }
    }
}

/// MXCSR of the guest.
pub(crate) fn mxcsr_value(cpu: &Cpu) -> u32 {
    let b = &cpu.area.0;
    u32::from_le_bytes([b[MXCSR], b[MXCSR + 1], b[MXCSR + 2], b[MXCSR + 3]])
}

/// LDMXCSR, STMXCSR and their VEX forms.
pub(crate) fn mxcsr(cpu: &mut Cpu, insn: &Instruction) -> Done {
    fpu_allowed(cpu.mode, insn)?;
    if matches!(insn.mnemonic(), M::Stmxcsr | M::Vstmxcsr) {
        let value = u64::from(mxcsr_value(cpu));
        cpu.set_operand(insn, 0, value, 4)?;
    } else {
        let value = cpu.operand(insn, 0, 4)? as u32;
        if value & !mxcsr_bits() != 0 {
            return Err(Exception::GP0);
        }
        cpu.area.0[MXCSR..MXCSR + 4].copy_from_slice(&value.to_le_bytes());
    }
    Ok(Flow::Next)
}

/// #MF where an unmasked x87 exception waits: loading a new state checks for it first.
pub(crate) fn check_pending() -> Result<(), Exception> {
    let status: u16;
    // SAFETY: FNSTSW only reads the status word.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack)) };
    if status & 0x80 != 0 { Err(Exception::X87) } else { Ok(()) }
}

/// Puts the host's x87 registers into the state that the host's own code expects: the guest's
/// may hold an unmasked exception that the next x87 instruction of anybody would raise.
pub fn reset_host_x87() {
    // SAFETY: FNINIT changes x87 state alone, in which Rust code keeps nothing.
    unsafe { asm!("fninit", options(nomem, nostack)) };
}

/// Linear address of an image in memory, its first and last byte known to be there: CPUs look at
/// those before anything else, and name the last one where only its page is missing.
fn image_address(
    cpu: &mut Cpu,
    insn: &Instruction,
    length: usize,
    write: bool,
) -> Result<u64, Exception> {
    let offset = cpu.offset_of(insn);
    let name = operand_segment(insn, cpu.mode.is_64());
    let address = cpu.linear(name, offset, length as u64, write)?;
    let last = address.wrapping_add(length as u64 - 1) & cpu.address_mask();
    if cpu.quick(address, length, write, As::Current)?.is_some() {
        return Ok(address);
    }
    let want = if write { Want::Write } else { Want::Read };
    cpu.translate(address, want, As::Current)?;
    cpu.translate(last, want, As::Current)?;
    Ok(address)
}

/// Bytes of the environment in 16- and 32-bit format.
const ENVIRONMENT16: usize = 14;
const ENVIRONMENT32: usize = 28;

/// FNSTENV, FLDENV, FNSAVE, FRSTOR: the host's 32-bit image, and for the guest's 16-bit format
/// its even words.
pub(crate) fn environment(cpu: &mut Cpu, insn: &Instruction) -> Done {
    fpu_allowed(cpu.mode, insn)?;
    let whole = matches!(insn.mnemonic(), M::Fnsave | M::Frstor);
    let length = insn.memory_size().size();
    let narrow = matches!(length, 14 | 94);
    let header = if narrow { ENVIRONMENT16 } else { ENVIRONMENT32 };
    let length = header + if whole { 80 } else { 0 };
    let mut image = [0u8; 108];
    let unit = if narrow { 2 } else { 4 };
    let load = matches!(insn.mnemonic(), M::Fldenv | M::Frstor);
    if load {
        check_pending()?;
    }
    let address = image_address(cpu, insn, length, !load)?;
    if cpu.mode.mmu() == MmuIndex::Aligned && !address.is_multiple_of(unit) {
        return Err(Exception::ALIGNMENT);
    }
    if load {
        let mut data = [0u8; 108];
        cpu.load(address, &mut data[..length], As::Current)?;
        for word in 0..3 {
            let step = header / 7;
            image[4 * word..4 * word + 2].copy_from_slice(&data[step * word..step * word + 2]);
        }
        image[ENVIRONMENT32..].copy_from_slice(&data[header..header + 80]);
        // SAFETY: the image is as large as either instruction reads; Rust code keeps nothing in
        // x87 registers.
        unsafe {
            if whole {
                asm!("frstor [{}]", in(reg) image.as_ptr(), options(nostack));
            } else {
                asm!("fldenv [{}]", in(reg) image.as_ptr(), options(nostack));
            }
        }
        return Ok(Flow::Next);
    }
    // The store must be sure to succeed, because FNSAVE also clears the registers.
    cpu.probe_store(address, length, As::Current)?;
    // SAFETY: as above; both write at most 108 bytes.
    unsafe {
        if whole {
            asm!("fnsave [{}]", in(reg) image.as_mut_ptr(), options(nostack));
        } else {
            asm!("fnstenv [{}]", in(reg) image.as_mut_ptr(), options(nostack));
        }
    }
    let mut data = [0u8; 108];
    for word in 0..7 {
        let step = header / 7;
        // Control, status and tag word; pointers and opcode are the host's and stay zero.
        if word < 3 {
            data[step * word..step * word + 2].copy_from_slice(&image[4 * word..4 * word + 2]);
        }
        if step == 4 && matches!(word, 0..=2 | 6) {
            // The upper halves of the 32-bit format read as ones, as on real CPUs.
            data[4 * word + 2..4 * word + 4].fill(0xff);
        }
    }
    data[header..header + 80].copy_from_slice(&image[ENVIRONMENT32..]);
    cpu.store(address, &data[..length], As::Current)?;
    Ok(Flow::Next)
}

/// FXSAVE and FXRSTOR.
pub(crate) fn fx(cpu: &mut Cpu, insn: &Instruction) -> Done {
    fpu_allowed(cpu.mode, insn)?;
    let save = matches!(insn.mnemonic(), M::Fxsave | M::Fxsave64);
    let offset = cpu.offset_of(insn);
    let name = operand_segment(insn, cpu.mode.is_64());
    let address = cpu.linear(name, offset, 512, save)?;
    if address & 15 != 0 {
        let aligned = cpu.mode.mmu() == MmuIndex::Aligned;
        return Err(if aligned { Exception::ALIGNMENT } else { Exception::GP0 });
    }
    image_address(cpu, insn, 512, save)?;
    // Outside 64-bit mode there are eight XMM registers.
    let end = XMM + if cpu.mode.is_64() { 256 } else { 128 };
    let who = As::Current;
    let mut image = [0u8; 512];
    if save {
        cpu.probe_store(address, 512, who)?;
        x87_to_area(cpu);
        image[..end].copy_from_slice(&cpu.area.0[..end]);
        image[MXCSR_MASK..MXCSR_MASK + 4].copy_from_slice(&mxcsr_bits().to_le_bytes());
        // The last 96 bytes are software's and stay as they are in memory.
        cpu.store(address, &image[..end], who)?;
        return Ok(Flow::Next);
    }
    cpu.load(address, &mut image, who)?;
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    if mxcsr & !mxcsr_bits() != 0 {
        return Err(Exception::GP0);
    }
    let area = &mut cpu.area.0;
    area[..MXCSR + 4].copy_from_slice(&image[..MXCSR + 4]);
    area[6..MXCSR].fill(0);
    area[ST..end].copy_from_slice(&image[ST..end]);
    x87_from_area(cpu);
    Ok(Flow::Next)
}
