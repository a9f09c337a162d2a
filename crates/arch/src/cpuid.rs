//! The CPU that a guest sees: a table of CPUID leaves, engine-neutral.
use crate::{Feature, FeatureSet};
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

/// Leaf 8000_0001H EDX of AMD's CPUs repeats these bits of leaf 1 EDX (AMD APM 3 E.4.2).
pub const AMD_MIRRORED: u32 = 0x0183_f3ff;

const AMD_EBX: u32 = u32::from_le_bytes(*b"Auth");
const HYGON_EBX: u32 = u32::from_le_bytes(*b"Hygo");

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

    /// The features that it announces, of those that have a name.
    pub fn features(&self) -> FeatureSet {
        let (mut set, mut word, mut value) = (FeatureSet::EMPTY, None, 0);
        for feature in Feature::ALL {
            let place = feature.word();
            // The features of a word follow each other.
            if word != Some(place) {
                word = Some(place);
                value = self.query(place.leaf, place.subleaf)[place.register as usize];
            }
            if value & feature.mask() != 0 {
                set = set.with(*feature);
            }
        }
        set
    }

    /// What a guest that has seen this model would miss on another one. A guest may go on only
    /// where this is empty: it may have kept what CPUID told it.
    pub fn missing_on(&self, target: &Self) -> FeatureSet {
        self.features().minus(target.features())
    }

    /// Whether the CPU is AMD's or its licensee's: where the vendors differ, it decides.
    pub fn is_amd(&self) -> bool {
        matches!(self.query(0, 0)[1], AMD_EBX | HYGON_EBX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    fn model(result: [u32; 4]) -> CpuModel {
        CpuModel::new(vec![CpuidEntry { leaf: 7, subleaf: Some(0), result }])
    }

    #[test]
    fn features_are_read_from_their_leaf_subleaf_and_register() {
        let with = model([0, 1 << 5 | 1 << 8, 0, 0]);
        assert_eq!(with.features(), FeatureSet::of(&[Feature::Avx2, Feature::Bmi2]));
        assert!(model([1 << 5, 0, 0, 0]).features().is_empty());
    }

    #[test]
    fn a_guest_misses_what_its_model_has_and_the_target_lacks() {
        let guest = model([0, 1 << 5 | 1 << 8, 0, 0]);
        let target = model([0, 1 << 8 | 1 << 9, 0, 0]);
        assert_eq!(guest.missing_on(&target), FeatureSet::of(&[Feature::Avx2]));
        assert!(guest.missing_on(&guest).is_empty());
    }

    #[test]
    fn the_vendor_is_told_from_its_string() {
        let vendor = |text: [u8; 4]| {
            let result = [0, u32::from_le_bytes(text), 0, 0];
            CpuModel::new(vec![CpuidEntry { leaf: 0, subleaf: None, result }]).is_amd()
        };
        assert!(vendor(*b"Auth") && vendor(*b"Hygo") && !vendor(*b"Genu"));
    }
}
