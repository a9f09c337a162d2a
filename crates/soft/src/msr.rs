//! Model-specific registers (Intel SDM 4, AMD APM 2 appendix A).
use crate::clock::host_tsc;
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use arch::msr as number;
use arch::registers::gpr::{RAX, RCX, RDX};
use arch::registers::{cr0, efer};
use arch::{Feature, Msrs, SegmentName};

/// LAPIC registers as MSRs.
const X2APIC_END: u32 = number::X2APIC + 0x3f;
const FLUSH_COMMAND: u32 = 0x10b;
const MICROCODE_UPDATE: u32 = 0x79;
const AMD_DECODE_CONFIG: u32 = 0xc001_1029;
/// EFER bit 21 (AMD): automatic IBRS, which guests turn on instead of using retpolines.
const AUTOMATIC_IBRS: u64 = 1 << 21;

/// RDMSR.
pub(crate) fn rdmsr(cpu: &mut Cpu) -> Done {
    cpu.need_cpl0()?;
    let index = cpu.gpr[RCX] as u32;
    let value = read(cpu, index).ok_or(Exception::GP0)?;
    cpu.gpr[RAX] = value & 0xffff_ffff;
    cpu.gpr[RDX] = value >> 32;
    Ok(Flow::Next)
}

/// WRMSR.
pub(crate) fn wrmsr(cpu: &mut Cpu) -> Done {
    cpu.need_cpl0()?;
    let index = cpu.gpr[RCX] as u32;
    let value = (cpu.gpr[RDX] << 32) | (cpu.gpr[RAX] & 0xffff_ffff);
    write(cpu, index, value).ok_or(Exception::GP0)?;
    // Only these change what translated code may assume, or open an interrupt window.
    let quiet = matches!(
        index,
        number::FS_BASE | number::GS_BASE | number::KERNEL_GS_BASE | number::TSC_DEADLINE
    );
    if quiet {
        return Ok(Flow::Next);
    }
    cpu.outstanding = true;
    cpu.serialize();
    cpu.update_mode();
    Ok(Flow::Leave)
}

/// The registers that are plain storage, by number.
fn storage(cpu: &mut Cpu, index: u32) -> Option<&mut u64> {
    let sys = &mut cpu.sys;
    Some(match index {
        number::STAR => &mut sys.star,
        number::LSTAR => &mut sys.lstar,
        number::CSTAR => &mut sys.cstar,
        number::SFMASK => &mut sys.sfmask,
        number::KERNEL_GS_BASE => &mut sys.kernel_gs_base,
        number::SYSENTER_CS => &mut sys.sysenter_cs,
        number::SYSENTER_ESP => &mut sys.sysenter_esp,
        number::SYSENTER_EIP => &mut sys.sysenter_eip,
        number::TSC_AUX => &mut sys.tsc_aux,
        number::PAT => &mut sys.pat,
        number::MISC_ENABLE => &mut sys.misc_enable,
        number::SPEC_CTRL => &mut sys.spec_ctrl,
        number::MTRR_DEF_TYPE => &mut sys.mtrr_def_type,
        number::MTRR_PHYS_BASE0..=0x20f => {
            sys.mtrr_variable.get_mut((index - number::MTRR_PHYS_BASE0) as usize)?
        }
        number::MTRR_FIX64K_00000 => &mut sys.mtrr_fixed[0],
        number::MTRR_FIX16K_80000 => &mut sys.mtrr_fixed[1],
        number::MTRR_FIX16K_A0000 => &mut sys.mtrr_fixed[2],
        number::MTRR_FIX4K_C0000..=0x26f => {
            sys.mtrr_fixed.get_mut(3 + (index - number::MTRR_FIX4K_C0000) as usize)?
        }
        _ => return None,
    })
}

/// Whether the CPU model has a register.
fn exists(cpu: &Cpu, index: u32) -> bool {
    let has = |list: &[Feature]| list.iter().any(|feature| cpu.vm.features.has(*feature));
    match index {
        number::TSC_AUX => has(&[Feature::Rdtscp, Feature::Rdpid]),
        number::ARCH_CAPABILITIES => has(&[Feature::ArchCapabilities]),
        number::SPEC_CTRL => has(&[Feature::SpecCtrl]),
        _ => true,
    }
}

/// The value of a register, or `None` for one that this CPU does not have.
pub(crate) fn read(cpu: &mut Cpu, index: u32) -> Option<u64> {
    if !exists(cpu, index) {
        return None;
    }
    if let Some(slot) = storage(cpu, index) {
        return Some(*slot);
    }
    let intel = !crate::cpuid::amd(cpu);
    Some(match index {
        number::TSC => cpu.guest_tsc(),
        number::TSC_ADJUST => cpu.sys.tsc_adjust,
        number::APIC_BASE => cpu.lapic.base(),
        number::EFER => cpu.sys.efer,
        number::FS_BASE => cpu.segment(SegmentName::Fs).base,
        number::GS_BASE => cpu.segment(SegmentName::Gs).base,
        number::TSC_DEADLINE => cpu.lapic.tsc_deadline(),
        number::X2APIC..=X2APIC_END => return cpu.lapic_read_msr(index),
        // Eight variable ranges, fixed ranges, write combining.
        number::MTRR_CAP => 0x508,
        // No machine-check banks; the registers of banks read as zero all the same.
        number::MCG_CAP | number::MCG_STATUS | 0..=1 | 0x400..=0x47f | number::DEBUG_CONTROL => 0,
        number::PLATFORM_ID | MICROCODE_UPDATE if intel => 0,
        // A revision high enough that no guest refuses or works around old microcode.
        number::BIOS_SIGN_ID => {
            if intel {
                0xffff_fffe << 32
            } else {
                0x0fff_ffff
            }
        }
        number::FEATURE_CONTROL if intel => 1,
        number::ARCH_CAPABILITIES => crate::cpuid::ARCH_CAPABILITIES,
        // Bit 24: the time-stamp counter does not follow the core's frequency.
        number::HWCR if !intel => 1 << 24,
        number::SYSCFG if !intel => 0,
        // Bit 1: LFENCE serialises.
        AMD_DECODE_CONFIG if !intel => 2,
        // Northbridge and pending-message configuration, read by drivers of old machines.
        0xc001_001f | 0xc001_0055 | 0xc001_1020..=0xc001_1023 | 0xc001_102a if !intel => 0,
        _ => return None,
    })
}

/// Writes a register; `None` is #GP.
pub(crate) fn write(cpu: &mut Cpu, index: u32, value: u64) -> Option<()> {
    let address = matches!(
        index,
        number::LSTAR
            | number::CSTAR
            | number::SYSENTER_ESP
            | number::SYSENTER_EIP
            | number::KERNEL_GS_BASE
            | number::FS_BASE
            | number::GS_BASE
    );
    if address && !cpu.canonical(value) {
        return None;
    }
    match index {
        number::PAT if !valid_pat(value) => return None,
        number::TSC_AUX if value >> 32 != 0 => return None,
        _ if !exists(cpu, index) => return None,
        number::MTRR_DEF_TYPE if value & !0xcff != 0 => return None,
        _ => {}
    }
    if let Some(slot) = storage(cpu, index) {
        *slot = value;
        return Some(());
    }
    let intel = !crate::cpuid::amd(cpu);
    match index {
        number::EFER => return write_efer(cpu, value),
        number::FS_BASE => cpu.segments[SegmentName::Fs as usize].base = value,
        number::GS_BASE => cpu.segments[SegmentName::Gs as usize].base = value,
        number::TSC => {
            let offset = value.wrapping_sub(host_tsc());
            let moved = offset.wrapping_sub(cpu.tsc_offset);
            cpu.tsc_offset = offset;
            cpu.sys.tsc_adjust = cpu.sys.tsc_adjust.wrapping_add(moved);
            cpu.timer_changed();
        }
        number::TSC_ADJUST => {
            let moved = value.wrapping_sub(cpu.sys.tsc_adjust);
            cpu.tsc_offset = cpu.tsc_offset.wrapping_add(moved);
            cpu.sys.tsc_adjust = value;
            cpu.timer_changed();
        }
        number::APIC_BASE => return cpu.lapic_write_base(value),
        number::TSC_DEADLINE => cpu.set_tsc_deadline(value),
        number::X2APIC..=X2APIC_END => return cpu.lapic_write_msr(index, value),
        number::PRED_CMD | FLUSH_COMMAND | MICROCODE_UPDATE | number::BIOS_SIGN_ID => {}
        number::MCG_STATUS | 0..=1 | 0x400..=0x47f | number::DEBUG_CONTROL => {}
        number::HWCR | number::SYSCFG | AMD_DECODE_CONFIG if !intel => {}
        0xc001_001f | 0xc001_0055 | 0xc001_1020..=0xc001_1023 | 0xc001_102a if !intel => {}
        _ => return None,
    }
    Some(())
}

/// Each of the eight fields of PAT must name a memory type (Intel SDM 3A 12.12.2).
fn valid_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7))
}

fn write_efer(cpu: &mut Cpu, value: u64) -> Option<()> {
    let allowed = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    let allowed = if crate::cpuid::amd(cpu) { allowed | AUTOMATIC_IBRS } else { allowed };
    let changed = value ^ cpu.sys.efer;
    let relabelled = changed & efer::LME != 0 && cpu.sys.cr0 & cr0::PG != 0;
    if value & !allowed != 0 || relabelled {
        return None;
    }
    cpu.sys.efer = (value & !efer::LMA) | (cpu.sys.efer & efer::LMA);
    if changed & efer::NXE != 0 {
        cpu.flush_tlb();
    }
    Some(())
}

/// The registers of the state table; those that this CPU does not have, or does not keep, have
/// their values after reset.
pub fn save(cpu: &mut Cpu) -> Msrs {
    let mut msrs = Msrs::reset();
    for number in Msrs::numbers() {
        if let Some(slot) = kept(cpu, number) {
            // The number is the table's own.
            let _ = msrs.set(number, *slot);
        }
    }
    msrs
}

/// Takes over what [`save`] gave.
pub fn restore(cpu: &mut Cpu, msrs: &Msrs) {
    for (number, value) in msrs.iter() {
        if let Some(slot) = kept(cpu, number) {
            *slot = value;
        }
    }
}

/// The first register of a state, and its value, that this CPU cannot hold.
pub fn unheld(cpu: &mut Cpu, msrs: &Msrs) -> Option<(u32, u64)> {
    let used = |(number, value)| Msrs::reset_value(number) != Some(value);
    msrs.iter().find(|&(number, value)| used((number, value)) && kept(cpu, number).is_none())
}

/// Where a register of the state table is kept. The counter's offset, to which TSC_ADJUST belongs,
/// moves with the counter itself.
fn kept(cpu: &mut Cpu, number: u32) -> Option<&mut u64> {
    if number == number::TSC_ADJUST {
        return Some(&mut cpu.sys.tsc_adjust);
    }
    storage(cpu, number)
}
