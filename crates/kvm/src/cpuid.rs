//! The CPU that guests see: what the VM's model asks for and KVM can give (Intel SDM 2A CPUID,
//! AMD APM 3 appendix E; api.rst §4.20 and §4.46).
use crate::error::refused;
use crate::state::Layout;
use arch::cpuid::AMD_MIRRORED;
use arch::{CpuModel, CpuidEntry, Feature, FeatureSet, Register, VcpuState, Word};
use engine::EngineError;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

const LEAF_TIMING: u32 = 0x4000_0010;

/// Features that the engine does not carry, though KVM may.
const WITHHELD: FeatureSet = FeatureSet::of(&[
    // Waiting for memory to change, performance units, profiling.
    Feature::Monitor,
    Feature::Pdcm,
    Feature::Waitpkg,
    Feature::IntelPt,
    Feature::Ibs,
    Feature::Lwp,
    Feature::PerfctrCore,
    Feature::PerfctrNb,
    // Guests of guests, enclaves, system management.
    Feature::Vmx,
    Feature::Smx,
    Feature::Svm,
    Feature::Skinit,
    Feature::Sgx,
    Feature::SgxLaunchControl,
    // Registers that the neutral state has no place for.
    Feature::Mpx,
    Feature::Pks,
    Feature::ShadowStack,
    Feature::BranchTracking,
    Feature::Uintr,
    Feature::KeyLocker,
    Feature::AmxTile,
    Feature::AmxBf16,
    Feature::AmxInt8,
    Feature::AmxFp16,
    Feature::AmxComplex,
    Feature::Avx10,
    Feature::Apx,
    Feature::Xsaves,
    Feature::Xfd,
    Feature::Fred,
    Feature::Lkgs,
    // KVM's notices of host page faults, which need interrupts of their own.
    Feature::KvmAsyncPageFault,
]);

/// Features that guests may have where KVM has them.
const CARRIED: FeatureSet = FeatureSet::ALL.minus(WITHHELD);

/// Leaves that describe what guests do not get: PMU, SGX, PT, AMX, AVX10, SVM, SEV, AMD's PMU.
fn left_out(leaf: u32) -> bool {
    matches!(
        leaf,
        0xa | 0x12 | 0x14 | 0x1d | 0x1e | 0x1f | 0x24 | 0x8000_000a | 0x8000_001f | 0x8000_0022
    )
}

/// Takes what guests may not see out of a leaf's answer. Where bits are features, what has no
/// name is not seen either.
fn restrict(leaf: u32, subleaf: u32, result: &mut [u32; 4]) {
    for word in Word::ALL.iter().filter(|word| (word.leaf, word.subleaf) == (leaf, subleaf)) {
        let mirrored = match (leaf, word.register) {
            (0x8000_0001, Register::Edx) => AMD_MIRRORED,
            _ => 0,
        };
        result[word.register as usize] &= CARRIED.bits(*word) | mirrored;
    }
    let components = CARRIED.xcr0();
    match (leaf, subleaf) {
        // EAX is the last subleaf.
        (7, 0) => result[0] = result[0].min(2),
        (7, 1) => result[1..3].fill(0),
        (7, _) => result[..3].fill(0),
        (0xd, 0) => (result[0], result[3]) = (result[0] & components as u32, 0),
        (0xd, 1) => result[1..].fill(0),
        _ => {}
    }
}

fn key(entry: &kvm_cpuid_entry2) -> Option<u32> {
    (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index)
}

/// What KVM can give on this host.
pub struct Supported {
    model: CpuModel,
    /// Where vector registers lie.
    pub xsave: Layout,
}

impl Supported {
    /// Asks KVM.
    ///
    /// # Errors
    /// KVM does not say.
    pub fn read(kvm: &Kvm) -> Result<Self, EngineError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("KVM does not say which CPU it offers (KVM_GET_SUPPORTED_CPUID)"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let model = CpuModel::new(offered(supported.as_slice(), deadline));
        let xsave = Layout::new(|component| {
            let leaf = |e: &&kvm_cpuid_entry2| e.function == 0xd && e.index == component;
            supported.as_slice().iter().find(leaf).filter(|e| e.eax != 0).map(|e| e.ebx)
        });
        Ok(Self { model, xsave })
    }

    /// The CPU that guests of this engine see by default on this host.
    pub fn host_model(&self) -> CpuModel {
        self.model.clone()
    }

    /// Whether KVM can give all that a model announces.
    ///
    /// # Errors
    /// Names the features that it cannot give.
    pub fn check(&self, model: &CpuModel) -> Result<(), EngineError> {
        let missing = model.missing_on(&self.model);
        if missing.is_empty() {
            return Ok(());
        }
        Err(EngineError::Unsupported(format!(
            "KVM on this host lacks {missing}, which the VM's CPU model has; give the VM another \
             model"
        )))
    }

    /// The CPUID of one vCPU of `count`: the VM's model with what depends on the vCPU.
    ///
    /// # Errors
    /// The model has more leaves than KVM takes.
    pub fn of_vcpu(model: &CpuModel, index: u32, count: u32) -> Result<CpuId, EngineError> {
        let place = Place::new(model, index, count);
        let mut entries: Vec<_> = model
            .entries()
            .iter()
            .filter(|e| !matches!(e.leaf, 0xb | 0x8000_001e))
            .map(|e| {
                let mut result = e.result;
                place.adapt(e.leaf, &mut result);
                entry(e.leaf, e.subleaf, result)
            })
            .collect();
        entries.extend(place.topology());
        CpuId::from_entries(&entries).map_err(|_| {
            EngineError::Unsupported(format!(
                "the CPU model has {} leaves, more than the {KVM_MAX_CPUID_ENTRIES} that KVM takes",
                entries.len()
            ))
        })
    }
}

/// The leaves that guests may see, of those that KVM supports.
fn offered(supported: &[kvm_cpuid_entry2], deadline: bool) -> Vec<CpuidEntry> {
    // What KVM provides itself, whether it says so or not.
    let own = FeatureSet::of(&[Feature::X2apic, Feature::Hypervisor]);
    let own = if deadline { own.with(Feature::TscDeadline) } else { own };
    let own = own.bits(Word { leaf: 1, subleaf: 0, register: Register::Ecx });
    let components = CARRIED.xcr0();
    // A leaf that is not there reads as zero.
    let empty = |e: &kvm_cpuid_entry2| e.eax | e.ebx | e.ecx | e.edx == 0;
    let component = |n: u32| n < 2 || components.checked_shr(n).is_some_and(|bits| bits & 1 != 0);
    let seen: Vec<_> = supported
        .iter()
        .filter(|e| !left_out(e.function) && !empty(e) && (e.function != 0xd || component(e.index)))
        .collect();
    // An XSAVE area: the legacy region and the header, then components (size EAX, offset EBX).
    let parts = seen.iter().filter(|e| e.function == 0xd && e.index >= 2);
    let size = parts.map(|e| e.eax.saturating_add(e.ebx)).max().unwrap_or(576);
    seen.iter()
        .map(|e| {
            let mut result = [e.eax, e.ebx, e.ecx, e.edx];
            restrict(e.function, e.index, &mut result);
            match (e.function, e.index) {
                (1, _) => result[2] |= own,
                (0xd, 0) => (result[1], result[2]) = (result[1].min(size), size),
                _ => {}
            }
            CpuidEntry { leaf: e.function, subleaf: key(e), result }
        })
        .collect()
}

/// What guests have whatever their model says: on a KVM without hardware (KVM on PVM) they see the
/// host's CPUID, of which KVM supports but a part.
fn unhidden() -> FeatureSet {
    static FEATURES: OnceLock<FeatureSet> = OnceLock::new();
    *FEATURES.get_or_init(|| {
        let entry = |(leaf, subleaf)| {
            let r = __cpuid_count(leaf, subleaf);
            CpuidEntry { leaf, subleaf: Some(subleaf), result: [r.eax, r.ebx, r.ecx, r.edx] }
        };
        let host = CpuModel::new([(1, 0), (7, 0), (0xd, 1), (0x8000_0001, 0)].map(entry).to_vec());
        let features = host.features();
        let backed = features.has(Feature::Vmx) || features.has(Feature::Svm);
        if backed { FeatureSet::EMPTY } else { features.and(CARRIED) }
    })
}

/// Whether a vCPU with the model of these features can hold a state.
///
/// # Errors
/// Names the features that it lacks.
pub fn check_state(state: &VcpuState, features: FeatureSet) -> Result<(), EngineError> {
    engine::check_state(state, features)
        .or_else(|_| engine::check_state(state, features.or(unhidden())))
}

/// How long a count of the model's LAPIC timer takes, where the model says so.
pub fn apic_nanoseconds(model: &CpuModel) -> Option<u64> {
    let khz = model.query(LEAF_TIMING, 0)[1];
    (khz != 0 && model.query(0x4000_0000, 0)[0] >= LEAF_TIMING).then(|| 1_000_000 / u64::from(khz))
}

fn entry(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf,
        index: subleaf.unwrap_or(0),
        flags: if subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// Where a vCPU is: all are cores of one package, with one thread each.
struct Place {
    index: u32,
    count: u32,
    /// Bits of an APIC id that tell the cores apart.
    bits: u32,
    amd: bool,
}

impl Place {
    fn new(model: &CpuModel, index: u32, count: u32) -> Self {
        let bits = 32 - count.saturating_sub(1).leading_zeros();
        Self { index, count, bits, amd: model.is_amd() }
    }

    /// Fills in what depends on the vCPU.
    fn adapt(&self, leaf: u32, result: &mut [u32; 4]) {
        let [eax, ebx, ecx, edx] = result;
        match leaf {
            1 => {
                *ebx = *ebx & 0xffff | self.count.min(255) << 16 | self.index << 24;
                // HTT: the count of logical processors is valid.
                *edx = *edx & !(1 << 28) | u32::from(self.count > 1) << 28;
            }
            // Bits 14 to 25: how many threads share the cache; the third level is the package's.
            4 | 0x8000_001d if *eax & 0x1f != 0 => {
                let sharing = if *eax >> 5 & 7 >= 3 { self.count - 1 } else { 0 };
                *eax = *eax & 0x3fff | sharing << 14;
                if leaf == 4 {
                    *eax |= ((1u32 << self.bits) - 1).min(63) << 26;
                }
            }
            0x8000_0001 if self.amd => {
                // CmpLegacy: the threads of leaf 1 are cores.
                *ecx = *ecx & !2 | u32::from(self.count > 1) << 1;
            }
            0x8000_0008 if self.amd => *ecx = self.bits << 12 | (self.count - 1).min(255),
            _ => {}
        }
    }

    /// The leaves that are about topology only.
    fn topology(&self) -> Vec<kvm_cpuid_entry2> {
        const THREADS: u32 = 1 << 8;
        const CORES: u32 = 2 << 8;
        let mut leaves = vec![
            entry(0xb, Some(0), [0, 1, THREADS, self.index]),
            entry(0xb, Some(1), [self.bits, self.count, CORES | 1, self.index]),
        ];
        if self.amd {
            leaves.push(entry(0x8000_001e, None, [self.index, self.index, 0, 0]));
        }
        leaves
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arch::Baseline;

    fn find(cpuid: &CpuId, leaf: u32, subleaf: u32) -> kvm_cpuid_entry2 {
        let all = cpuid.as_slice();
        *all.iter().find(|e| e.function == leaf && e.index == subleaf).expect("the leaf is there")
    }

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        let flags = if matches!(function, 7 | 0xd) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// What is offered of a KVM that supports everything, on a CPU of the first AVX-512 kind.
    fn everything() -> CpuModel {
        let all = u32::MAX;
        let amd = u32::from_le_bytes(*b"Auth");
        CpuModel::new(offered(
            &[
                leaf(0, 0, [0xd, amd, 0, 0]),
                leaf(1, 0, [0, 0, all, all]),
                leaf(6, 0, [4, 0, 0, 0]),
                leaf(7, 0, [2, all, all, all]),
                leaf(7, 1, [all; 4]),
                leaf(0xd, 0, [0x602e7, 2696, 2696, 0]),
                leaf(0xd, 1, [0x1f, 2696, 0x1800, 0]),
                leaf(0xd, 2, [256, 576, 0, 0]),
                leaf(0xd, 5, [64, 832, 0, 0]),
                leaf(0xd, 6, [512, 896, 0, 0]),
                leaf(0xd, 7, [1024, 1408, 0, 0]),
                leaf(0xd, 9, [8, 2432, 0, 0]),
                leaf(0x4000_0001, 0, [all, 0, 0, 0]),
                leaf(0x8000_0001, 0, [0, 0, all, all]),
                leaf(0x8000_0007, 0, [0, 0, 0, 0x100]),
                leaf(0x8000_0008, 0, [0x3030, all, 0, 0]),
            ],
            true,
        ))
    }

    #[test]
    fn what_the_neutral_state_has_no_place_for_is_not_offered() {
        let features = everything().features();
        for feature in [Feature::AmxTile, Feature::ShadowStack, Feature::Mpx] {
            assert!(!features.has(feature), "{feature}");
        }
        assert_eq!(features.consistent(), features);
        let model = everything();
        assert_eq!(model.query(0xd, 0), [0x2e7, 2440, 2440, 0]);
        assert_eq!(model.query(0xd, 5), [64, 832, 0, 0]);
        assert_eq!(model.query(0xd, 17), [0; 4]);
        assert_eq!(model.query(0xd, 1), [7, 0, 0, 0]);
    }

    #[test]
    fn bits_without_a_name_are_not_offered_but_amds_repeated_ones_are() {
        let model = everything();
        // TM2 and OSXSAVE of leaf 1; bits 0 to 4 of leaf 8000_0001H.
        assert_eq!(model.query(1, 0)[2] & (1 << 8 | 1 << 27), 0);
        assert_eq!(model.query(0x8000_0001, 0)[3] & 0x1f, 0x1f);
    }

    #[test]
    fn all_baselines_are_offered_where_kvm_has_their_features() {
        let host = everything();
        for baseline in [Baseline::V2, Baseline::V3, Baseline::V4] {
            let model = baseline.on(&host).expect("it has all");
            let kvm = Supported { model: host.clone(), xsave: Layout::default() };
            kvm.check(&model).expect("it has all");
        }
    }

    #[test]
    fn what_kvm_is_handed_is_exactly_the_baseline() {
        let model = Baseline::V3.on(&everything()).expect("it has all");
        let cpuid = Supported::of_vcpu(&model, 0, 1).expect("few leaves");
        let entries = cpuid.as_slice().iter().map(|e| CpuidEntry {
            leaf: e.function,
            subleaf: key(e),
            result: [e.eax, e.ebx, e.ecx, e.edx],
        });
        let handed = CpuModel::new(entries.collect());
        assert_eq!(handed.features(), Baseline::V3.features(true));
        let brand = (0x8000_0002..0x8000_0005).map(|leaf| handed.query(leaf, 0));
        assert!(brand.eq((0x8000_0002..0x8000_0005).map(|leaf| model.query(leaf, 0))));
    }

    #[test]
    fn a_model_with_features_that_kvm_lacks_is_refused_by_their_names() {
        let one = |ecx| {
            let result = [0, 0, ecx, 0];
            CpuModel::new(vec![CpuidEntry { leaf: 0x8000_0001, subleaf: None, result }])
        };
        let kvm = Supported { model: one(1), xsave: Layout::default() };
        let error = kvm.check(&one(0b110_0001)).expect_err("it lacks two").to_string();
        assert!(error.contains("lacks abm, sse4a,"), "{error}");
        assert!(kvm.check(&one(1)).is_ok());
    }

    #[test]
    fn each_vcpu_knows_its_number_and_how_many_there_are() {
        let one = CpuidEntry { leaf: 1, subleaf: None, result: [0, 0x0800, 0, 0] };
        let model = CpuModel::new(vec![one]);
        let cpuid = Supported::of_vcpu(&model, 2, 3).expect("few leaves");
        assert_eq!(find(&cpuid, 1, 0).ebx, 0x0203_0800);
        assert_eq!(find(&cpuid, 0xb, 1).eax, 2);
        assert_eq!(find(&cpuid, 0xb, 1).edx, 2);
    }

    #[test]
    fn a_models_lapic_frequency_is_found_in_its_timing_leaf() {
        let leaf = |leaf, result| CpuidEntry { leaf, subleaf: None, result };
        let model = CpuModel::new(vec![
            leaf(0x4000_0000, [LEAF_TIMING, 0, 0, 0]),
            leaf(LEAF_TIMING, [2_000_000, 25_000, 0, 0]),
        ]);
        assert_eq!(apic_nanoseconds(&model), Some(40));
        assert_eq!(apic_nanoseconds(&CpuModel::default()), None);
    }
}
