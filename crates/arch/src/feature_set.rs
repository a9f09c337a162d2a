//! Sets of CPU features.
use crate::feature::{Feature, Word};
use core::fmt;

const WORDS: usize = Feature::ALL.len().div_ceil(64);

/// A set of features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FeatureSet([u64; WORDS]);

impl FeatureSet {
    /// No feature.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// All features that have a name.
    pub const ALL: Self = Self::of(Feature::ALL);

    /// These features.
    pub const fn of(list: &[Feature]) -> Self {
        let mut set = Self::EMPTY;
        let mut i = 0;
        while i < list.len() {
            set = set.with(list[i]);
            i += 1;
        }
        set
    }

    /// The set with a feature more.
    #[must_use]
    pub const fn with(mut self, feature: Feature) -> Self {
        self.0[feature as usize / 64] |= 1 << (feature as usize % 64);
        self
    }

    /// Whether a feature is in the set.
    pub const fn has(&self, feature: Feature) -> bool {
        self.0[feature as usize / 64] >> (feature as usize % 64) & 1 != 0
    }

    /// What is in one of two sets.
    #[must_use]
    pub const fn or(mut self, other: Self) -> Self {
        let mut i = 0;
        while i < WORDS {
            self.0[i] |= other.0[i];
            i += 1;
        }
        self
    }

    /// What is in both sets.
    #[must_use]
    pub const fn and(mut self, other: Self) -> Self {
        let mut i = 0;
        while i < WORDS {
            self.0[i] &= other.0[i];
            i += 1;
        }
        self
    }

    /// What is in this set and not in the other.
    #[must_use]
    pub const fn minus(mut self, other: Self) -> Self {
        let mut i = 0;
        while i < WORDS {
            self.0[i] &= !other.0[i];
            i += 1;
        }
        self
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// The features, by leaf and bit.
    pub fn iter(self) -> impl Iterator<Item = Feature> {
        Feature::ALL.iter().copied().filter(move |feature| self.has(*feature))
    }

    /// The features as bits of a word of CPUID.
    pub fn bits(self, word: Word) -> u32 {
        self.iter().filter(|f| f.word() == word).fold(0, |bits, f| bits | f.mask())
    }

    /// The set without features that need one which is not there.
    #[must_use]
    pub fn consistent(self) -> Self {
        let mut set = self;
        loop {
            let sound = |f: &Feature| f.needs().iter().all(|need| set.has(*need));
            let smaller = set.iter().filter(sound).fold(Self::EMPTY, Self::with);
            if smaller == set {
                return set;
            }
            set = smaller;
        }
    }

    /// The bits of XCR0 that these features bring (Intel SDM 1 13.3).
    pub fn xcr0(&self) -> u64 {
        let brought = |list: &[Feature]| list.iter().any(|feature| self.has(*feature));
        XCR0.iter().filter(|(_, list)| brought(list)).fold(0, |bits, (bit, _)| bits | bit)
    }
}

/// The components of XCR0 and what brings them.
pub(crate) const XCR0: &[(u64, &[Feature])] = &[
    (3, &[Feature::Xsave]),
    (4, &[Feature::Avx]),
    (0x18, &[Feature::Mpx]),
    (0xe0, &[Feature::Avx512f]),
    (1 << 9, &[Feature::Pku]),
    (3 << 17, &[Feature::AmxTile]),
];

impl fmt::Display for FeatureSet {
    /// The names, separated by commas.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, feature) in self.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{feature}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn a_set_lists_its_features_by_name() {
        let set = FeatureSet::of(&[Feature::Avx512bw, Feature::Cx16]);
        assert_eq!(set.to_string(), "cx16, avx512bw");
        assert_eq!(set.minus(FeatureSet::of(&[Feature::Cx16])).to_string(), "avx512bw");
        assert_eq!(FeatureSet::EMPTY.to_string(), "");
    }

    #[test]
    fn without_xsave_there_is_no_avx_nor_anything_above_it() {
        let all = FeatureSet::ALL;
        assert_eq!(all.consistent(), all);
        let none = all.minus(FeatureSet::of(&[Feature::Xsave])).consistent();
        for feature in [Feature::Avx, Feature::Avx2, Feature::Vaes, Feature::Avx512vl] {
            assert!(!none.has(feature), "{feature}");
        }
        assert!(none.has(Feature::Aes) && none.has(Feature::Bmi2));
    }

    #[test]
    fn the_components_of_xcr0_follow_from_the_features() {
        assert_eq!(FeatureSet::of(&[Feature::Xsave]).xcr0(), 3);
        assert_eq!(FeatureSet::of(&[Feature::Xsave, Feature::Avx]).xcr0(), 7);
        assert_eq!(FeatureSet::EMPTY.xcr0(), 0);
    }
}
