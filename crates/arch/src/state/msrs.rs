//! Model-specific registers that are state and have no other element of their own.
use super::inspect::{Inspect, Value};
use crate::msr;
use alloc::format;

/// Numbers of the registers, in rising order, with names and values after reset (Intel SDM 3A
/// table 10-1, AMD APM 2 14.1.3).
const TABLE: &[(u32, &str, u64)] = &[
    (msr::KVM_WALL_CLOCK_OLD, "kvm_wall_clock_old", 0),
    (msr::KVM_SYSTEM_TIME_OLD, "kvm_system_time_old", 0),
    (msr::FEATURE_CONTROL, "feature_control", 0),
    (msr::TSC_ADJUST, "tsc_adjust", 0),
    (msr::SPEC_CTRL, "spec_ctrl", 0),
    (msr::SYSENTER_CS, "sysenter_cs", 0),
    (msr::SYSENTER_ESP, "sysenter_esp", 0),
    (msr::SYSENTER_EIP, "sysenter_eip", 0),
    // Bit 0: fast string operations.
    (msr::MISC_ENABLE, "misc_enable", 1),
    (msr::DEBUG_CONTROL, "debug_control", 0),
    (msr::MTRR_PHYS_BASE0, "mtrr_phys_base0", 0),
    (0x201, "mtrr_phys_mask0", 0),
    (0x202, "mtrr_phys_base1", 0),
    (0x203, "mtrr_phys_mask1", 0),
    (0x204, "mtrr_phys_base2", 0),
    (0x205, "mtrr_phys_mask2", 0),
    (0x206, "mtrr_phys_base3", 0),
    (0x207, "mtrr_phys_mask3", 0),
    (0x208, "mtrr_phys_base4", 0),
    (0x209, "mtrr_phys_mask4", 0),
    (0x20a, "mtrr_phys_base5", 0),
    (0x20b, "mtrr_phys_mask5", 0),
    (0x20c, "mtrr_phys_base6", 0),
    (0x20d, "mtrr_phys_mask6", 0),
    (0x20e, "mtrr_phys_base7", 0),
    (0x20f, "mtrr_phys_mask7", 0),
    (msr::MTRR_FIX64K_00000, "mtrr_fix64k_00000", 0),
    (msr::MTRR_FIX16K_80000, "mtrr_fix16k_80000", 0),
    (msr::MTRR_FIX16K_A0000, "mtrr_fix16k_a0000", 0),
    (msr::MTRR_FIX4K_C0000, "mtrr_fix4k_c0000", 0),
    (0x269, "mtrr_fix4k_c8000", 0),
    (0x26a, "mtrr_fix4k_d0000", 0),
    (0x26b, "mtrr_fix4k_d8000", 0),
    (0x26c, "mtrr_fix4k_e0000", 0),
    (0x26d, "mtrr_fix4k_e8000", 0),
    (0x26e, "mtrr_fix4k_f0000", 0),
    (0x26f, "mtrr_fix4k_f8000", 0),
    // Write-back, write-through, uncached-, uncached, twice.
    (msr::PAT, "pat", 0x0007_0406_0007_0406),
    (msr::MTRR_DEF_TYPE, "mtrr_def_type", 0),
    (msr::KVM_WALL_CLOCK, "kvm_wall_clock", 0),
    (msr::KVM_SYSTEM_TIME, "kvm_system_time", 0),
    (msr::KVM_STEAL_TIME, "kvm_steal_time", 0),
    (msr::KVM_END_OF_INTERRUPT, "kvm_end_of_interrupt", 0),
    (msr::STAR, "star", 0),
    (msr::LSTAR, "lstar", 0),
    (msr::CSTAR, "cstar", 0),
    (msr::SFMASK, "sfmask", 0),
    (msr::KERNEL_GS_BASE, "kernel_gs_base", 0),
    (msr::TSC_AUX, "tsc_aux", 0),
];

/// The values of the model-specific registers that are state. Those that have an element of their
/// own (EFER, IA32_APIC_BASE, the TSC and its deadline, the bases of FS and GS) are not among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Msrs([u64; TABLE.len()]);

impl Msrs {
    /// The values after RESET.
    pub const fn reset() -> Self {
        let mut values = [0; TABLE.len()];
        let mut n = 0;
        while n < values.len() {
            values[n] = TABLE[n].2;
            n += 1;
        }
        Self(values)
    }

    /// The numbers of all registers, rising.
    pub fn numbers() -> impl Iterator<Item = u32> {
        TABLE.iter().map(|(number, ..)| *number)
    }

    /// The name of a register, in small letters, or `None` for one that is not state.
    pub fn name(number: u32) -> Option<&'static str> {
        position(number).map(|n| TABLE[n].1)
    }

    /// The value of a register after RESET, or `None` for one that is not state.
    pub fn reset_value(number: u32) -> Option<u64> {
        position(number).map(|n| TABLE[n].2)
    }

    /// The value of a register, or `None` for one that is not state.
    pub fn get(&self, number: u32) -> Option<u64> {
        position(number).and_then(|n| self.0.get(n).copied())
    }

    /// Sets a register; answers whether it is state.
    #[must_use]
    pub fn set(&mut self, number: u32, value: u64) -> bool {
        let place = position(number).and_then(|n| self.0.get_mut(n));
        let known = place.is_some();
        place.into_iter().for_each(|place| *place = value);
        known
    }

    /// Numbers and values, by rising number.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        Self::numbers().zip(self.0)
    }
}

fn position(number: u32) -> Option<usize> {
    TABLE.binary_search_by_key(&number, |(number, ..)| *number).ok()
}

impl Default for Msrs {
    fn default() -> Self {
        Self::reset()
    }
}

impl Inspect for Msrs {
    fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
        for ((_, name, _), value) in TABLE.iter().zip(self.0) {
            visit(&format!("{path}.{name}"), Value::Number(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_rises_so_that_numbers_are_found() {
        assert!(TABLE.is_sorted_by(|a, b| a.0 < b.0));
        assert!(Msrs::numbers().all(|number| Msrs::name(number).is_some()));
    }

    #[test]
    fn a_register_keeps_what_it_is_given_and_others_are_not_taken() {
        let mut msrs = Msrs::reset();
        assert_eq!(msrs.get(msr::PAT), Some(0x0007_0406_0007_0406));
        assert!(msrs.set(msr::LSTAR, 7));
        assert_eq!(msrs.get(msr::LSTAR), Some(7));
        assert!(!msrs.set(msr::EFER, 1), "EFER has a field of its own");
        assert_eq!(msrs.get(0x1234_5678), None);
    }
}
