//! Model-specific registers (api.rst §4.18 and §4.19).
use crate::error::element;
use arch::{MsrState, VcpuState, msr};
use engine::EngineError;
use kvm_bindings::{Msrs as KvmMsrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use std::ops::RangeInclusive;

/// Registers that every engine has and every saved state shows.
const COMMON: [RangeInclusive<u32>; 13] = [
    msr::TSC_ADJUST..=msr::TSC_ADJUST,
    msr::SPEC_CTRL..=msr::SPEC_CTRL,
    msr::SYSENTER_CS..=msr::SYSENTER_EIP,
    msr::MISC_ENABLE..=msr::MISC_ENABLE,
    // Eight variable ranges, two registers each.
    msr::MTRR_PHYS_BASE0..=0x20f,
    msr::MTRR_FIX64K_00000..=msr::MTRR_FIX64K_00000,
    msr::MTRR_FIX16K_80000..=msr::MTRR_FIX16K_A0000,
    msr::MTRR_FIX4K_C0000..=0x26f,
    msr::PAT..=msr::PAT,
    msr::MTRR_DEF_TYPE..=msr::MTRR_DEF_TYPE,
    msr::STAR..=msr::SFMASK,
    msr::KERNEL_GS_BASE..=msr::KERNEL_GS_BASE,
    msr::TSC_AUX..=msr::TSC_AUX,
];
/// KVM's own registers for guests that know it (Linux, Documentation/virt/kvm/x86/msr.rst): wall
/// clock, system time, steal time, end of interrupt.
const OWN: [RangeInclusive<u32>; 4] = [
    msr::FEATURE_CONTROL..=msr::FEATURE_CONTROL,
    0x11..=0x12,
    0x4b56_4d00..=0x4b56_4d01,
    0x4b56_4d03..=0x4b56_4d04,
];
/// What of a state is not in its list of MSRs.
const FIELDS: [u32; 2] = [msr::TSC, msr::TSC_DEADLINE];

/// Registers and their values, in a fixed order.
#[derive(Clone, Debug, Default)]
pub struct Msrs(Vec<kvm_msr_entry>);

impl Msrs {
    /// All registers that this host's KVM has, and their values.
    ///
    /// # Errors
    /// KVM does not let them be read.
    pub fn read(vcpu: &VcpuFd) -> Result<Self, EngineError> {
        let listed = COMMON.into_iter().chain(OWN).flatten();
        let indexes = listed.chain(FIELDS);
        Self(indexes.map(|index| kvm_msr_entry { index, ..Default::default() }).collect())
            .fill(vcpu)
    }

    /// The same registers as they are now.
    ///
    /// # Errors
    /// KVM does not let them be read.
    pub fn read_again(&self, vcpu: &VcpuFd) -> Result<Self, EngineError> {
        self.clone().fill(vcpu)
    }

    /// Reads the values; registers that this host's KVM lacks are left out.
    fn fill(mut self, vcpu: &VcpuFd) -> Result<Self, EngineError> {
        loop {
            let mut list = kvm_list(&self.0)?;
            let read = vcpu.get_msrs(&mut list).map_err(element("read", "MSRs"))?;
            if read >= self.0.len() {
                return Ok(Self(list.as_slice().to_vec()));
            }
            // KVM stops at the first that it lacks.
            self.0.remove(read);
        }
    }

    /// The value of a register, or `None` where this host's KVM lacks it.
    pub fn value(&self, index: u32) -> Option<u64> {
        self.0.iter().find(|entry| entry.index == index).map(|entry| entry.data)
    }

    /// The registers as a neutral state lists them: those that only KVM has, only where the guest
    /// uses them, so that other engines can take the state of a guest that does not.
    pub fn neutral(&self) -> Vec<MsrState> {
        let own = |index| OWN.iter().any(|range| range.contains(&index));
        self.0
            .iter()
            .filter(|e| !FIELDS.contains(&e.index) && (e.data != 0 || !own(e.index)))
            .map(|e| MsrState { index: e.index, value: e.data })
            .collect()
    }

    /// Sets all registers to the values of `state`, or, where it lacks them, to those that `self`
    /// has from the reset.
    ///
    /// # Errors
    /// Names the register that KVM lacks, or whose value it does not take.
    pub fn write(&self, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
        self.check(state)?;
        let now = self.read_again(vcpu)?;
        let wanted = |entry: &kvm_msr_entry| match entry.index {
            msr::TSC => state.tsc,
            msr::TSC_DEADLINE => state.lapic.tsc_deadline,
            index => saved(state, index).unwrap_or(entry.data),
        };
        let changes = self.0.iter().zip(&now.0).filter_map(|(reset, now)| {
            let data = wanted(reset);
            // The counter never stands still, and TSC_ADJUST follows it when it is set.
            let always = matches!(reset.index, msr::TSC | msr::TSC_ADJUST);
            (always || data != now.data).then_some(kvm_msr_entry { data, ..*reset })
        });
        let mut changes: Vec<_> = changes.collect();
        changes.sort_by_key(|entry| entry.index != msr::TSC);
        write(vcpu, &changes)
    }

    /// Sets the registers that differ between two states.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_changes(
        &self,
        vcpu: &VcpuFd,
        before: &VcpuState,
        after: &VcpuState,
    ) -> Result<(), EngineError> {
        let changes: Vec<_> = after
            .msrs
            .iter()
            .filter(|m| m.index != msr::APIC_BASE)
            .filter(|m| saved(before, m.index).is_some_and(|old| old != m.value))
            .map(|m| kvm_msr_entry { index: m.index, data: m.value, ..Default::default() })
            .collect();
        if changes.is_empty() { Ok(()) } else { write(vcpu, &changes) }
    }

    /// Whether KVM has all registers to which the state gives a value.
    fn check(&self, state: &VcpuState) -> Result<(), EngineError> {
        let missing = state
            .msrs
            .iter()
            .find(|m| m.index != msr::APIC_BASE && m.value != 0 && self.value(m.index).is_none());
        match missing {
            None => Ok(()),
            Some(MsrState { index, value }) => Err(EngineError::Unsupported(format!(
                "the state has MSR {index:#x} (value {value:#x}), which this host's KVM lacks"
            ))),
        }
    }
}

fn saved(state: &VcpuState, index: u32) -> Option<u64> {
    state.msrs.iter().find(|m| m.index == index).map(|m| m.value)
}

fn kvm_list(entries: &[kvm_msr_entry]) -> Result<KvmMsrs, EngineError> {
    KvmMsrs::from_entries(entries)
        .map_err(|e| EngineError::Defect(format!("a list of {} MSRs: {e:?}", entries.len())))
}

fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), EngineError> {
    let done = vcpu.set_msrs(&kvm_list(entries)?).map_err(element("set", "MSRs"))?;
    match entries.get(done) {
        None => Ok(()),
        Some(entry) => Err(EngineError::Unsupported(format!(
            "KVM does not take the value {:#x} of MSR {:#x}",
            entry.data, entry.index
        ))),
    }
}
