//! The CPU that a guest sees: a table of CPUID leaves, engine-neutral.
use alloc::vec::Vec;

/// One leaf (and subleaf) of CPUID and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, or `None` where the answer does not depend on it.
    pub subleaf: Option<u32>,
    /// The answer in EAX, EBX, ECX and EDX.
    pub result: [u32; 4],
}

/// The CPUID answers of one virtual CPU model. Fields that depend on the vCPU (APIC id, topology)
/// or on its mode (OSXSAVE, XSAVE size) are filled in by the engine when the guest asks.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CpuModel {
    entries: Vec<CpuidEntry>,
}

impl CpuModel {
    /// A model from its leaves; the first entry that matches a query answers it.
    pub fn new(entries: Vec<CpuidEntry>) -> Self {
        Self { entries }
    }

    /// The leaves.
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// The answer for a leaf and subleaf; all zero for one that is not in the table
    /// (Intel SDM 2A, CPUID: reserved leaves within the range read as zero).
    pub fn query(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
            .map_or([0; 4], |e| e.result)
    }
}
