use super::*;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

/// A host with these features; the vendor's string begins so.
fn host(vendor: [u8; 4], features: FeatureSet) -> CpuModel {
    let mut entries = vec![CpuidEntry {
        leaf: 0,
        subleaf: None,
        result: [0x20, u32::from_le_bytes(vendor), 2, 3],
    }];
    for word in Word::ALL {
        let mut result = [0; 4];
        result[word.register as usize] = features.bits(*word);
        match entries.iter_mut().find(|e| (e.leaf, e.subleaf) == (word.leaf, Some(word.subleaf))) {
            Some(entry) => entry.result[word.register as usize] = features.bits(*word),
            None => {
                entries.push(CpuidEntry { leaf: word.leaf, subleaf: Some(word.subleaf), result })
            }
        }
    }
    let component =
        |n, size, offset| CpuidEntry { leaf: 0xd, subleaf: Some(n), result: [size, offset, 0, 0] };
    entries.extend(
        [(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408)]
            .map(|(n, size, offset)| component(n, size, offset)),
    );
    CpuModel::new(entries)
}

const AMD: [u8; 4] = *b"Auth";
const INTEL: [u8; 4] = *b"Genu";

fn sorted(names: &str) -> Vec<String> {
    let mut names: Vec<_> = names.split([' ', ',']).filter(|n| !n.is_empty()).collect();
    names.sort_unstable();
    names.into_iter().map(ToString::to_string).collect()
}

#[test]
fn the_levels_are_those_of_the_psabi() {
    let v2 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";
    let v3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";
    let v4 = "avx512f avx512bw avx512cd avx512dq avx512vl";
    let names = |level: Baseline| sorted(&level.level().to_string());
    assert_eq!(names(Baseline::V2), sorted(v2));
    assert_eq!(names(Baseline::V3), sorted(&[v2, v3].join(" ")));
    assert_eq!(names(Baseline::V4), sorted(&[v2, v3, v4].join(" ")));
}

#[test]
fn every_level_is_consistent_and_contains_the_psabis_x86_64() {
    for level in Baseline::ALL {
        let features = level.features(false);
        assert_eq!(features.consistent(), features, "{level}");
        for name in sorted("cmov cx8 fpu fxsr mmx syscall sse sse2") {
            assert!(features.iter().any(|f| f.name() == name), "{level} {name}");
        }
    }
}

#[test]
fn a_model_announces_exactly_its_features_whatever_the_host_has_more() {
    for vendor in [AMD, INTEL] {
        for level in Baseline::ALL {
            let model = level.on(&host(vendor, FeatureSet::ALL)).unwrap();
            assert_eq!(model.features(), level.features(vendor == AMD), "{level}");
        }
    }
}

#[test]
fn a_model_is_the_same_on_every_host_of_a_vendor() {
    for vendor in [AMD, INTEL] {
        for level in Baseline::ALL {
            let least = level.on(&host(vendor, level.features(vendor == AMD)));
            assert_eq!(least, level.on(&host(vendor, FeatureSet::ALL)), "{level}");
        }
    }
}

#[test]
fn models_of_the_vendors_differ_in_few_leaves() {
    let leaves = |vendor| {
        let model = Baseline::V3.on(&host(vendor, FeatureSet::ALL)).unwrap();
        model.entries().iter().map(|e| (e.leaf, e.subleaf.unwrap_or(0), e.result)).collect()
    };
    let (amd, intel): (Vec<_>, Vec<_>) = (leaves(AMD), leaves(INTEL));
    let mut differ: Vec<_> = amd
        .iter()
        .filter(|entry| !intel.contains(entry))
        .chain(intel.iter().filter(|entry| !amd.contains(entry)))
        .map(|(leaf, ..)| *leaf)
        .collect();
    differ.sort_unstable();
    differ.dedup();
    let expected = [0, 1, 2, 4, 0x8000_0000, 0x8000_0001, 0x8000_0005, 0x8000_0006, 0x8000_001d];
    assert_eq!(differ, expected);
}

#[test]
fn what_the_host_lacks_is_told_by_name() {
    let without = FeatureSet::ALL.minus(FeatureSet::of(&[Feature::Avx512bw, Feature::Avx512cd]));
    let host = host(AMD, without);
    assert_eq!(Baseline::V4.on(&host).unwrap_err().to_string(), "avx512cd, avx512bw");
    assert!(Baseline::V3.on(&host).is_ok());
}

#[test]
fn without_xsave_there_are_no_components_and_with_it_those_of_the_level() {
    let components = |level: Baseline| {
        let model = level.on(&host(AMD, FeatureSet::ALL)).unwrap();
        (model.query(0xd, 0), model.query(0xd, 7))
    };
    assert_eq!(components(Baseline::V2), ([0; 4], [0; 4]));
    assert_eq!(components(Baseline::V3), ([7, 832, 832, 0], [0; 4]));
    assert_eq!(components(Baseline::V4), ([0xe7, 2432, 2432, 0], [1024, 1408, 0, 0]));
}

#[test]
fn the_brand_is_the_name() {
    let model = Baseline::V3.on(&host(INTEL, FeatureSet::ALL)).unwrap();
    let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .flat_map(|leaf| model.query(leaf, 0))
        .flat_map(u32::to_le_bytes)
        .take_while(|byte| *byte != 0)
        .collect();
    assert_eq!(bytes, b"Bivisor x86-64-v3");
}
