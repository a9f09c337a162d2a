//! What a state needs of the CPU that takes it over, in words of features: to be asked before
//! anything of it is loaded.
use crate::feature::Feature;
use crate::feature_set::XCR0;
use crate::registers::{cr4, efer, xcr0};
use crate::{Avx512State, FeatureSet, LapicState, Msrs, VcpuState, msr};
use alloc::vec::Vec;
use core::fmt;

/// Something of the state that the target cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The features of which one would do; none where no feature is known that would.
    pub features: &'static [Feature],
    /// Where in the state it shows.
    pub place: Place,
}

/// A part of the state that depends on features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A bit of CR4.
    Cr4(u32),
    /// A bit of EFER.
    Efer(u32),
    /// A bit of XCR0.
    Xcr0(u32),
    /// An MSR that is not as after reset.
    Msr(u32),
    /// Registers that AVX-512 adds.
    Avx512,
    /// PKRU.
    Pkru,
    /// The LAPIC's mode.
    X2apic,
    /// The deadline of the LAPIC's timer.
    TscDeadline,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cr4(bit) => write!(f, "CR4 bit {bit}"),
            Self::Efer(bit) => write!(f, "EFER bit {bit}"),
            Self::Xcr0(bit) => write!(f, "XCR0 bit {bit}"),
            Self::Msr(index) => write!(f, "MSR {index:#x}"),
            Self::Avx512 => f.write_str("mask and wide vector registers"),
            Self::Pkru => f.write_str("PKRU"),
            Self::X2apic => f.write_str("the LAPIC's mode"),
            Self::TscDeadline => f.write_str("the LAPIC timer's deadline"),
        }
    }
}

impl fmt::Display for Need {
    /// As "smap (CR4 bit 21)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, feature) in self.features.iter().enumerate() {
            write!(f, "{}{feature}", if n == 0 { "" } else { " or " })?;
        }
        if self.features.is_empty() {
            return write!(f, "an unknown feature ({})", self.place);
        }
        write!(f, " ({})", self.place)
    }
}

/// Everything that a target lacks for a state, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lacking(pub Vec<Need>);

impl fmt::Display for Lacking {
    /// The needs, separated by commas.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, need) in self.0.iter().enumerate() {
            write!(f, "{}{need}", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl core::error::Error for Lacking {}

/// Bits of a register and the features of which one brings them.
type Bits = (u64, &'static [Feature]);

/// CR4 (Intel SDM 3A 2.5). PCE is not here: RDPMC faults where there are no counters.
const CR4: &[Bits] = &[
    (cr4::VME | cr4::PVI, &[Feature::Vme]),
    (cr4::TSD, &[Feature::Tsc]),
    (cr4::DE, &[Feature::De]),
    (cr4::PSE, &[Feature::Pse]),
    (cr4::PAE, &[Feature::Pae]),
    (cr4::MCE, &[Feature::Mce]),
    (cr4::PGE, &[Feature::Pge]),
    (cr4::OSFXSR, &[Feature::Fxsr]),
    (cr4::OSXMMEXCPT, &[Feature::Sse]),
    (cr4::UMIP, &[Feature::Umip]),
    (cr4::LA57, &[Feature::La57]),
    (1 << 13, &[Feature::Vmx]),
    (1 << 14, &[Feature::Smx]),
    (cr4::FSGSBASE, &[Feature::Fsgsbase]),
    (cr4::PCIDE, &[Feature::Pcid]),
    (cr4::OSXSAVE, &[Feature::Xsave]),
    (1 << 19, &[Feature::KeyLocker]),
    (cr4::SMEP, &[Feature::Smep]),
    (cr4::SMAP, &[Feature::Smap]),
    (1 << 22, &[Feature::Pku]),
    (1 << 23, &[Feature::ShadowStack, Feature::BranchTracking]),
    (1 << 24, &[Feature::Pks]),
    (1 << 25, &[Feature::Uintr]),
    (1 << 27, &[Feature::Lass]),
    (1 << 28, &[Feature::Lam]),
    (1 << 32, &[Feature::Fred]),
];

/// EFER (Intel SDM 3A 2.2.1, AMD APM 2 3.1.7).
const EFER: &[Bits] = &[
    (efer::SCE, &[Feature::Syscall]),
    (efer::LME | efer::LMA, &[Feature::Lm]),
    (efer::NXE, &[Feature::Nx]),
    (1 << 12, &[Feature::Svm]),
    (efer::FFXSR, &[Feature::FxsrOpt]),
    (1 << 15, &[Feature::Tce]),
    (1 << 21, &[Feature::AutoIbrs]),
];

/// MSRs that hold something only where a feature is, first to last number (Intel SDM 4 table 2-2,
/// AMD APM 2 appendix A; KVM's from the kernel's Documentation/virt/kvm/x86/msr.rst).
const MSRS: &[(u32, u32, &[Feature])] = &[
    (
        msr::SPEC_CTRL,
        msr::SPEC_CTRL,
        &[
            Feature::SpecCtrl,
            Feature::Stibp,
            Feature::Ssbd,
            Feature::AmdIbrs,
            Feature::AmdStibp,
            Feature::AmdSsbd,
            Feature::AmdPsfd,
        ],
    ),
    (msr::SYSENTER_CS, msr::SYSENTER_EIP, &[Feature::Sep]),
    (msr::TSC_AUX, msr::TSC_AUX, &[Feature::Rdtscp, Feature::Rdpid]),
    (msr::KVM_WALL_CLOCK, msr::KVM_SYSTEM_TIME, &[Feature::KvmClock2]),
    (msr::KVM_WALL_CLOCK_OLD, msr::KVM_SYSTEM_TIME_OLD, &[Feature::KvmClock]),
    (msr::KVM_STEAL_TIME, msr::KVM_STEAL_TIME, &[Feature::KvmStealTime]),
    (msr::KVM_END_OF_INTERRUPT, msr::KVM_END_OF_INTERRUPT, &[Feature::KvmPvEoi]),
];

/// Each bit of a register's value, with the features of which one brings it.
fn bits(value: u64, table: &'static [Bits]) -> impl Iterator<Item = (u32, &'static [Feature])> {
    (0..64).filter(move |bit| value >> bit & 1 != 0).map(|bit| {
        let row = table.iter().find(|(mask, _)| mask >> bit & 1 != 0);
        (bit, row.map_or(&[][..], |(_, features)| features))
    })
}

/// Whether a CPU with these features can hold a state.
///
/// # Errors
/// All that it lacks.
pub fn check(state: &VcpuState, offered: FeatureSet) -> Result<(), Lacking> {
    let mut lacking = Vec::new();
    let mut need = |features: &'static [Feature], place| {
        if !features.iter().any(|feature| offered.has(*feature)) {
            lacking.push(Need { features, place });
        }
    };
    bits(state.cr4 & !cr4::PCE, CR4).for_each(|(bit, any)| need(any, Place::Cr4(bit)));
    bits(state.efer, EFER).for_each(|(bit, any)| need(any, Place::Efer(bit)));
    // XCR0 is as after reset where there is no XSAVE.
    if state.xcr0 != xcr0::X87 {
        bits(state.xcr0, XCR0).for_each(|(bit, any)| need(any, Place::Xcr0(bit)));
    }
    let changed = state.msrs.iter().filter(|&(n, value)| Msrs::reset_value(n) != Some(value));
    for (number, _) in changed {
        if let Some((.., any)) = MSRS.iter().find(|(from, to, _)| (*from..=*to).contains(&number)) {
            need(any, Place::Msr(number));
        }
    }
    if state.avx512 != Avx512State::default() {
        need(&[Feature::Avx512f], Place::Avx512);
    }
    if state.pkru != 0 {
        need(&[Feature::Pku], Place::Pkru);
    }
    if state.lapic.base & LapicState::X2APIC != 0 {
        need(&[Feature::X2apic], Place::X2apic);
    }
    if state.lapic.tsc_deadline != 0 {
        need(&[Feature::TscDeadline], Place::TscDeadline);
    }
    if lacking.is_empty() { Ok(()) } else { Err(Lacking(lacking)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Baseline;
    use std::string::{String, ToString};

    /// What a target lacks for the reset state with a change.
    fn lacking(offered: FeatureSet, change: impl FnOnce(&mut VcpuState)) -> String {
        let mut state = VcpuState::reset();
        change(&mut state);
        check(&state, offered).err().map_or_else(String::new, |lacking| lacking.to_string())
    }

    fn v2() -> FeatureSet {
        Baseline::V2.features(false)
    }

    #[test]
    fn the_reset_state_and_that_of_a_running_kernel_fit_the_smallest_baseline() {
        assert_eq!(lacking(v2(), |_| {}), "");
        let kernel = |state: &mut VcpuState| {
            state.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::DE | cr4::MCE;
            state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
            state.lapic.tsc_deadline = 5;
            assert!(state.msrs.set(msr::SYSENTER_CS, 0x10));
        };
        assert_eq!(lacking(v2(), kernel), "");
    }

    #[test]
    fn every_bit_of_cr4_and_efer_is_told_with_its_feature() {
        let bits = cr4::SMEP | cr4::SMAP | cr4::FSGSBASE | cr4::UMIP | cr4::PCIDE | cr4::LA57;
        let expected = "umip (CR4 bit 11), la57 (CR4 bit 12), fsgsbase (CR4 bit 16), \
                        pcid (CR4 bit 17), smep (CR4 bit 20), smap (CR4 bit 21)";
        assert_eq!(lacking(v2(), |state| state.cr4 = bits), expected);
        assert_eq!(lacking(v2(), |state| state.efer = 1 << 12), "svm (EFER bit 12)");
        let none = FeatureSet::EMPTY;
        assert_eq!(lacking(none, |state| state.efer = efer::NXE), "nx (EFER bit 11)");
    }

    #[test]
    fn components_of_xcr0_are_told_with_their_feature() {
        let avx = lacking(v2(), |state| state.xcr0 = 7);
        assert_eq!(avx, "xsave (XCR0 bit 0), xsave (XCR0 bit 1), avx (XCR0 bit 2)");
        let v3 = Baseline::V3.features(true);
        assert_eq!(lacking(v3, |state| state.xcr0 = 7), "");
        let avx512 = lacking(v3, |state| state.xcr0 = 0xe7);
        let expected = "avx512f (XCR0 bit 5), avx512f (XCR0 bit 6), avx512f (XCR0 bit 7)";
        assert_eq!(avx512, expected);
    }

    #[test]
    fn registers_are_told_with_the_features_of_which_one_would_do() {
        let with_aux = |state: &mut VcpuState| assert!(state.msrs.set(msr::TSC_AUX, 3));
        assert_eq!(lacking(v2(), with_aux), "rdtscp or rdpid (MSR 0xc0000103)");
        assert_eq!(lacking(v2().with(Feature::Rdpid), with_aux), "");
        assert_eq!(lacking(v2(), |state| state.pkru = 4), "pku (PKRU)");
    }

    #[test]
    fn a_bit_that_no_known_feature_brings_is_refused_whatever_is_offered() {
        let reserved = lacking(FeatureSet::ALL, |state| state.cr4 = 1 << 63);
        assert_eq!(reserved, "an unknown feature (CR4 bit 63)");
    }

    #[test]
    fn a_clock_of_kvm_stays_with_kvm() {
        let text = lacking(v2(), |state| assert!(state.msrs.set(msr::KVM_SYSTEM_TIME, 0x1001)));
        assert_eq!(text, "kvmclock2 (MSR 0x4b564d01)");
    }
}
