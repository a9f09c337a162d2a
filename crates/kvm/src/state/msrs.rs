//! Model-specific registers (api.rst §4.18 and §4.19).
use crate::error::element;
use arch::{Element, Msrs, VcpuState};
use engine::EngineError;
use kvm_bindings::{Msrs as KvmMsrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// The registers of the state table that this host's KVM has.
#[derive(Clone, Debug, Default)]
pub struct Available(Vec<kvm_msr_entry>);

impl Available {
    /// Asks KVM.
    ///
    /// # Errors
    /// KVM does not let them be read.
    pub fn of(vcpu: &VcpuFd) -> Result<Self, EngineError> {
        let mut available: Vec<_> =
            Msrs::numbers().map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
        loop {
            let read = read_list(vcpu, &mut available)?;
            if read >= available.len() {
                return Ok(Self(available));
            }
            // KVM stops at the first that it lacks.
            available.remove(read);
        }
    }

    /// Reads the registers; one that KVM lacks has its value after reset.
    ///
    /// # Errors
    /// KVM does not let them be read.
    pub fn get(&self, vcpu: &VcpuFd) -> Result<Msrs, EngineError> {
        let mut msrs = Msrs::reset();
        for entry in self.now(vcpu)? {
            let known = msrs.set(entry.index, entry.data);
            debug_assert!(known, "{:#x} is not of the table", entry.index);
        }
        Ok(msrs)
    }

    /// Sets the registers.
    ///
    /// # Errors
    /// Names the register whose value KVM does not take, or does not keep: KVM without hardware
    /// behind it says that it took some that it drops.
    pub fn set(&self, vcpu: &VcpuFd, msrs: &Msrs) -> Result<(), EngineError> {
        let changes = self.changes(vcpu, msrs)?;
        if changes.is_empty() {
            return Ok(());
        }
        write_list(vcpu, &changes)?;
        match self.changes(vcpu, msrs)?.first() {
            None => Ok(()),
            Some(entry) => Err(EngineError::Unsupported(format!(
                "this host's KVM does not keep the value {:#x} of {}",
                entry.data,
                name(entry.index)
            ))),
        }
    }

    /// The registers that do not have their values in `msrs`, with these.
    fn changes(&self, vcpu: &VcpuFd, msrs: &Msrs) -> Result<Vec<kvm_msr_entry>, EngineError> {
        let mut list = self.now(vcpu)?;
        list.retain_mut(|entry| {
            let now = entry.data;
            entry.data = msrs.get(entry.index).unwrap_or(now);
            entry.data != now
        });
        Ok(list)
    }

    /// Whether KVM has all registers that a state uses.
    ///
    /// # Errors
    /// Names the one that it lacks.
    pub fn check(&self, state: &VcpuState) -> Result<(), EngineError> {
        let has = |number| self.0.iter().any(|entry| entry.index == number);
        let used = |(number, value)| Msrs::reset_value(number) != Some(value);
        match state.msrs.iter().find(|&(number, value)| used((number, value)) && !has(number)) {
            None => Ok(()),
            Some((number, value)) => Err(EngineError::Unsupported(format!(
                "the state uses {} (value {value:#x}), which this host's KVM lacks",
                name(number)
            ))),
        }
    }

    fn now(&self, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, EngineError> {
        let mut list = self.0.clone();
        let read = read_list(vcpu, &mut list)?;
        match list.get(read) {
            None => Ok(list),
            Some(entry) => Err(EngineError::Unsupported(format!(
                "KVM does not let {} be read any more",
                name(entry.index)
            ))),
        }
    }
}

/// A register in messages.
fn name(number: u32) -> String {
    format!("MSR {number:#x} ({})", Msrs::name(number).unwrap_or("no name"))
}

/// Reads one register; `None` where KVM lacks it.
///
/// # Errors
/// KVM does not let MSRs be read.
pub fn read(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, EngineError> {
    let mut list = [kvm_msr_entry { index, ..Default::default() }];
    let read = read_list(vcpu, &mut list)?;
    Ok((read == 1).then_some(list[0].data))
}

/// Sets one register.
///
/// # Errors
/// KVM does not take it.
pub fn write(vcpu: &VcpuFd, index: u32, data: u64) -> Result<(), EngineError> {
    write_list(vcpu, &[kvm_msr_entry { index, data, ..Default::default() }])
}

/// Fills in the values; answers how many registers KVM has, up to the first that it lacks.
fn read_list(vcpu: &VcpuFd, entries: &mut [kvm_msr_entry]) -> Result<usize, EngineError> {
    let mut list = kvm_list(entries)?;
    let read = vcpu.get_msrs(&mut list).map_err(element("read", Element::Msr.name()))?;
    entries.copy_from_slice(list.as_slice());
    Ok(read)
}

fn write_list(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), EngineError> {
    let list = kvm_list(entries)?;
    let done = vcpu.set_msrs(&list).map_err(element("set", Element::Msr.name()))?;
    match entries.get(done) {
        None => Ok(()),
        Some(entry) => Err(EngineError::Unsupported(format!(
            "KVM does not take the value {:#x} of {}",
            entry.data,
            name(entry.index)
        ))),
    }
}

fn kvm_list(entries: &[kvm_msr_entry]) -> Result<KvmMsrs, EngineError> {
    KvmMsrs::from_entries(entries)
        .map_err(|e| EngineError::Defect(format!("a list of {} MSRs: {e:?}", entries.len())))
}
