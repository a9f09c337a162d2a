//! The CPU that guests see: what the VM's model asks for and KVM can give (Intel SDM 2A CPUID,
//! AMD APM 3 appendix E; api.rst §4.20 and §4.46).
use crate::error::refused;
use crate::state::Layout;
use arch::{CpuModel, CpuidEntry};
use engine::EngineError;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

const LEAF_TIMING: u32 = 0x4000_0010;
/// "GenuineIntel" and its like number their topology otherwise than AMD and Hygon.
const AMD_EBX: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

const fn bits(list: &[u32]) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < list.len() {
        word |= 1 << list[i];
        i += 1;
    }
    word
}

/// Leaf 1 ECX without what the engine does not carry: MONITOR, VMX, PDCM (a performance unit).
const ONE_ECX: u32 = !bits(&[3, 5, 15]);
const X2APIC: u32 = bits(&[21]);
const TSC_DEADLINE: u32 = bits(&[24]);
const HYPERVISOR: u32 = bits(&[31]);
/// Leaf 7 without registers that the neutral state has no place for: AVX-512, protection keys,
/// AMX, control-flow enforcement, Intel PT, MPX; and without SGX and WAITPKG.
const SEVEN_EBX: u32 = !bits(&[2, 14, 16, 17, 21, 25, 26, 27, 28, 30, 31]);
const SEVEN_ECX: u32 = !bits(&[1, 3, 4, 5, 6, 7, 11, 12, 14, 30, 31]);
const SEVEN_EDX: u32 = !bits(&[2, 3, 8, 20, 22, 23, 24, 25]);
/// Leaf 7, subleaf 1 EAX without AVX-512 BF16, FRED, AMX FP16; EDX without AVX10 and APX.
const SEVEN_ONE_EAX: u32 = !bits(&[5, 17, 18, 21]);
const SEVEN_ONE_EDX: u32 = !bits(&[8, 18, 19, 21]);
/// Leaf 0DH, subleaf 1: XSAVEOPT, XSAVEC, XGETBV with ECX 1.
const XSAVE_FORMS: u32 = 7;
/// Leaf 8000_0001H ECX without SVM, IBS, SKINIT, LWP and the performance units.
const EXTENDED_ECX: u32 = !bits(&[2, 10, 12, 15, 23, 24, 28]);
/// KVM's own leaf: both clocks, no delay for I/O, steal time, end of interrupt in memory,
/// kicking of halted vCPUs, TLB flushes, IPIs, yielding, stable clock.
const KVM_FEATURES: u32 = bits(&[0, 1, 3, 5, 6, 7, 9, 11, 13, 24]);

/// Leaves that describe what guests do not get: PMU, SGX, PT, AMX, AVX10, SVM, SEV, AMD's PMU.
fn left_out(leaf: u32) -> bool {
    matches!(
        leaf,
        0xa | 0x12 | 0x14 | 0x1d | 0x1e | 0x1f | 0x24 | 0x8000_000a | 0x8000_001f | 0x8000_0022
    )
}

/// What of a leaf's answer guests may see, as masks of EAX, EBX, ECX and EDX.
fn allowed(leaf: u32, subleaf: u32) -> [u32; 4] {
    const ALL: u32 = u32::MAX;
    match (leaf, subleaf) {
        (1, _) => [ALL, ALL, ONE_ECX, ALL],
        (7, 0) => [ALL, SEVEN_EBX, SEVEN_ECX, SEVEN_EDX],
        (7, 1) => [SEVEN_ONE_EAX, ALL, ALL, SEVEN_ONE_EDX],
        (0xd, 0) => [7, ALL, ALL, 0],
        (0xd, 1) => [XSAVE_FORMS, 0, 0, 0],
        (0x8000_0001, _) => [ALL, ALL, EXTENDED_ECX, ALL],
        (0x4000_0001, _) => [KVM_FEATURES, ALL, ALL, ALL],
        _ => [ALL; 4],
    }
}

/// Whether the words of a leaf's answer are sets of features, which KVM must have each: EAX, EBX,
/// ECX, EDX.
fn are_features(leaf: u32, subleaf: u32) -> [bool; 4] {
    match (leaf, subleaf) {
        (1, _) => [false, false, true, true],
        (7, 0) => [false, true, true, true],
        (7, _) => [true; 4],
        (0xd, 0 | 1) => [true, false, false, false],
        (0x8000_0001, _) => [false, false, true, true],
        (0x8000_0007, _) => [false, false, false, true],
        (0x8000_0008, _) => [false, true, false, false],
        (0x8000_0021, _) => [true, false, true, false],
        (0x4000_0001, _) => [true, false, false, false],
        _ => [false; 4],
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
        let deadline = if kvm.check_extension(Cap::TscDeadlineTimer) { TSC_DEADLINE } else { 0 };
        // A leaf that is not there reads as zero.
        let empty = |e: &kvm_cpuid_entry2| e.eax | e.ebx | e.ecx | e.edx == 0;
        let entries = supported.as_slice().iter().filter(|e| !left_out(e.function) && !empty(e));
        let entries = entries.filter(|e| e.function != 0xd || e.index < 3).map(|e| {
            let mut result = [e.eax, e.ebx, e.ecx, e.edx];
            let masks = allowed(e.function, e.index);
            result.iter_mut().zip(masks).for_each(|(word, mask)| *word &= mask);
            match (e.function, e.index) {
                (1, _) => result[2] |= X2APIC | HYPERVISOR | deadline,
                (0xd, 0) => {
                    let size = arch::FpuState::SIZE as u32;
                    (result[1], result[2]) = (result[1].min(size), result[2].min(size));
                }
                _ => {}
            }
            CpuidEntry { leaf: e.function, subleaf: key(e), result }
        });
        let model = CpuModel::new(entries.collect());
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

    /// The CPUID of one vCPU of `count`: the VM's model without the features that KVM lacks, and
    /// with what depends on the vCPU.
    ///
    /// # Errors
    /// The model has more leaves than KVM takes.
    pub fn of_vcpu(&self, model: &CpuModel, index: u32, count: u32) -> Result<CpuId, EngineError> {
        let place = Place::new(model, index, count);
        let mut entries: Vec<_> = model
            .entries()
            .iter()
            .filter(|e| !matches!(e.leaf, 0xb | 0x8000_001e))
            .map(|e| {
                let subleaf = e.subleaf.unwrap_or(0);
                let offered = self.model.query(e.leaf, subleaf);
                let mut result = e.result;
                let words = result.iter_mut().zip(offered).zip(are_features(e.leaf, subleaf));
                words.filter(|(_, features)| *features).for_each(|((w, o), _)| *w &= o);
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
        Self { index, count, bits, amd: AMD_EBX.contains(&model.query(0, 0)[1]) }
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

    fn supported(leaf: u32, result: [u32; 4]) -> Supported {
        let model = CpuModel::new(vec![CpuidEntry { leaf, subleaf: None, result }]);
        Supported { model, xsave: Layout::default() }
    }

    fn find(cpuid: &CpuId, leaf: u32, subleaf: u32) -> kvm_cpuid_entry2 {
        let all = cpuid.as_slice();
        *all.iter().find(|e| e.function == leaf && e.index == subleaf).expect("the leaf is there")
    }

    #[test]
    fn features_that_kvm_lacks_are_taken_from_the_model() {
        let model = CpuModel::new(vec![CpuidEntry {
            leaf: 0x8000_0001,
            subleaf: None,
            result: [0x1234, 0, 0b111, 0b1100],
        }]);
        let kvm = supported(0x8000_0001, [0, 0, 0b011, 0b0100]);
        let cpuid = kvm.of_vcpu(&model, 0, 1).expect("few leaves");
        let leaf = find(&cpuid, 0x8000_0001, 0);
        assert_eq!((leaf.eax, leaf.ecx, leaf.edx), (0x1234, 0b011, 0b0100));
    }

    #[test]
    fn each_vcpu_knows_its_number_and_how_many_there_are() {
        let one = CpuidEntry { leaf: 1, subleaf: None, result: [0, 0x0800, 0, 0] };
        let model = CpuModel::new(vec![one]);
        let cpuid = supported(1, [0; 4]).of_vcpu(&model, 2, 3).expect("few leaves");
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
