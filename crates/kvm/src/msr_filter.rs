//! Which MSRs a guest can reach (api.rst §4.97, KVM_X86_SET_MSR_FILTER): those that the saved
//! state holds, those without state that the software engine has too, and KVM's own where the
//! CPU model shows KVM. Any other gives #GP, as on the software engine, whatever else this host's
//! KVM happens to have. KVM does not filter the LAPIC's registers (x2APIC).
use crate::error::refused;
use arch::{CpuModel, msr};
use engine::EngineError;
use kvm_bindings::KVM_CAP_X86_MSR_FILTER;
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use std::ops::RangeInclusive;

const MICROCODE_UPDATE: u32 = 0x79;
const FLUSH_COMMAND: u32 = 0x10b;

/// What is not in the state table: registers with an element of their own in the state, and those
/// without state. Intel's numbers, which AMD has taken over for many, then AMD's.
const BESIDE: [RangeInclusive<u32>; 17] = [
    // Machine-check address and type of the Pentium.
    0..=1,
    msr::TSC..=msr::TSC,
    msr::PLATFORM_ID..=msr::PLATFORM_ID,
    msr::APIC_BASE..=msr::APIC_BASE,
    msr::PRED_CMD..=msr::PRED_CMD,
    MICROCODE_UPDATE..=MICROCODE_UPDATE,
    msr::BIOS_SIGN_ID..=msr::BIOS_SIGN_ID,
    msr::MTRR_CAP..=msr::MTRR_CAP,
    msr::ARCH_CAPABILITIES..=FLUSH_COMMAND,
    msr::MCG_CAP..=msr::MCG_STATUS,
    // Machine-check banks.
    0x400..=0x47f,
    msr::TSC_DEADLINE..=msr::TSC_DEADLINE,
    msr::EFER..=msr::EFER,
    msr::FS_BASE..=msr::GS_BASE,
    // The configuration of AMD's chips, read by kernels.
    msr::SYSCFG..=0xc001_001f,
    0xc001_0055..=0xc001_0055,
    0xc001_1020..=0xc001_102a,
];
/// KVM's own registers, old and new numbers (Linux, Documentation/virt/kvm/x86/msr.rst).
const OWN: [RangeInclusive<u32>; 2] = [0x11..=0x12, 0x4b56_4d00..=0x4b56_4d07];
/// First register and number of each stretch of the filter.
const STRETCHES: [(u32, u32); 4] =
    [(0, 0x800), (0x4b56_4d00, 8), (0xc000_0000, 0x200), (0xc001_0000, 0x1100)];
/// "KVMKVMKVM" in EBX and ECX of leaf 4000_0000H.
const SIGNATURE: [u32; 2] = [0x4b4d_564b, 0x564b_4d56];

/// Sets the filter of a VM; where KVM has none (before Linux 5.10), its own rules stay.
///
/// # Errors
/// KVM does not take it.
pub fn set(fd: &VmFd, model: &CpuModel) -> Result<(), EngineError> {
    if fd.check_extension_raw(KVM_CAP_X86_MSR_FILTER.into()) <= 0 {
        return Ok(());
    }
    let bitmaps = STRETCHES.map(|stretch| bitmap(stretch, shows_kvm(model)));
    let ranges: Vec<_> = STRETCHES
        .iter()
        .zip(&bitmaps)
        .map(|(&(base, msr_count), bitmap)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap,
        })
        .collect();
    fd.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(refused("KVM does not take the MSR filter (KVM_CAP_X86_MSR_FILTER)"))
}

fn shows_kvm(model: &CpuModel) -> bool {
    let [_, ebx, ecx, _] = model.query(0x4000_0000, 0);
    [ebx, ecx] == SIGNATURE
}

/// A bit for each register of a stretch: whether it may be reached.
fn bitmap((base, count): (u32, u32), own: bool) -> Vec<u8> {
    let mut bits = vec![0u8; count.div_ceil(8) as usize];
    let is_own = |index: &u32| OWN.iter().any(|range| range.contains(index));
    let state = arch::Msrs::numbers().filter(|index| own || !is_own(index));
    let more = OWN.into_iter().filter(|_| own);
    for index in BESIDE.into_iter().chain(more).flatten().chain(state) {
        let Some(bit) = index.checked_sub(base) else { continue };
        if let Some(byte) = bits.get_mut((bit / 8) as usize) {
            *byte |= 1 << (bit % 8);
        }
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(index: u32, own: bool) -> bool {
        STRETCHES.into_iter().any(|(base, count)| {
            let bits = bitmap((base, count), own);
            let bit = index.wrapping_sub(base);
            bits.get((bit / 8) as usize).is_some_and(|byte| byte >> (bit % 8) & 1 != 0)
        })
    }

    #[test]
    fn registers_of_the_state_pass_and_unknown_ones_do_not() {
        for index in [msr::TSC, msr::EFER, msr::GS_BASE, msr::HWCR, 0xc001_1029] {
            assert!(allows(index, false), "{index:#x}");
        }
        for index in arch::Msrs::numbers() {
            assert!(allows(index, true), "{index:#x}");
        }
        // Performance counters, VMX capabilities, IA32_XSS, VM_CR.
        for index in [0xc1, 0x186, 0x480, 0xda0, 0x4b56_4d08, 0xc000_0104, 0xc001_0114] {
            assert!(!allows(index, true), "{index:#x}");
        }
    }

    #[test]
    fn kvms_own_registers_pass_where_the_model_shows_kvm() {
        for index in [0x11, 0x12, 0x4b56_4d01] {
            assert!(allows(index, true) && !allows(index, false), "{index:#x}");
        }
    }
}
