//! The CPU that guests see: the host's, as far as this engine carries it, and CPUID itself
//! (Intel SDM 2A CPUID, AMD APM 3 appendix E).
use crate::clock::{APIC_HZ, tsc_khz};
use crate::cpu::Cpu;
use crate::mmu::PHYSICAL_BITS;
use arch::cpuid::AMD_MIRRORED;
use arch::registers::gpr::{RAX, RBX, RCX, RDX};
use arch::registers::{cr4, xcr0};
use arch::{CpuModel, CpuidEntry, Feature, FeatureSet, Register, Word};
use engine::EngineError;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// IA32_ARCH_CAPABILITIES of Intel models: this CPU executes nothing speculatively that a guest
/// could see, so no mitigation is needed (Intel SDM 4, MSR 10AH): RDCL_NO, IBRS_ALL, SKIP_L1DFL,
/// SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO,
/// GDS_NO, RFDS_NO, ITS_NO.
pub(crate) const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_TIMING: u32 = 0x4000_0010;

/// Offered where the host has them: their instructions run on its CPU.
const NATIVE: FeatureSet = FeatureSet::of(&[
    Feature::Sse3,
    Feature::Pclmulqdq,
    Feature::Ssse3,
    Feature::Fma,
    Feature::Cx16,
    Feature::Pcid,
    Feature::Sse41,
    Feature::Sse42,
    Feature::Movbe,
    Feature::Popcnt,
    Feature::Aes,
    // Its instructions are helpers, but the AVX state comes and goes by the host's.
    Feature::Xsave,
    Feature::Avx,
    Feature::F16c,
    Feature::Rdrand,
    Feature::Fpu,
    Feature::De,
    Feature::Pse,
    Feature::Tsc,
    Feature::Msr,
    Feature::Pae,
    Feature::Mce,
    Feature::Cx8,
    Feature::Apic,
    Feature::Sep,
    Feature::Mtrr,
    Feature::Pge,
    Feature::Mca,
    Feature::Cmov,
    Feature::Pat,
    Feature::Pse36,
    Feature::Clflush,
    Feature::Mmx,
    Feature::Fxsr,
    Feature::Sse,
    Feature::Sse2,
    Feature::Bmi1,
    Feature::Avx2,
    Feature::Bmi2,
    Feature::Erms,
    Feature::Invpcid,
    Feature::Rdseed,
    Feature::Adx,
    Feature::Clflushopt,
    Feature::Clwb,
    Feature::Sha,
    Feature::Gfni,
    Feature::Vaes,
    Feature::Vpclmulqdq,
    Feature::La57,
    Feature::Rdpid,
    Feature::Fsrm,
    Feature::LahfLm,
    Feature::Lzcnt,
    Feature::Sse4a,
    Feature::MisalignSse,
    Feature::Prefetchw,
    Feature::Syscall,
    Feature::Nx,
    Feature::MmxExt,
    Feature::Pdpe1gb,
    Feature::Rdtscp,
    Feature::Lm,
]);

/// Offered on every host: the engine's own doing.
const OWN: FeatureSet = FeatureSet::of(&[
    Feature::X2apic,
    Feature::TscDeadline,
    Feature::Hypervisor,
    // The LAPIC timer never stops.
    Feature::Arat,
    Feature::Fsgsbase,
    Feature::TscAdjust,
    Feature::Smep,
    Feature::Smap,
    Feature::Umip,
    Feature::Xsaveopt,
    Feature::Xsavec,
    Feature::Xgetbv1,
    Feature::InvariantTsc,
]);

/// For Intel's kind: [`ARCH_CAPABILITIES`] says that nothing needs mitigation.
const OWN_INTEL: FeatureSet = FeatureSet::of(&[Feature::SpecCtrl, Feature::ArchCapabilities]);

/// For AMD's kind: topology leaves, and that nothing needs mitigation. Automatic IBRS spares
/// guests their retpolines.
const OWN_AMD: FeatureSet = FeatureSet::of(&[
    Feature::TopologyExtensions,
    Feature::SsbNo,
    Feature::BtcNo,
    Feature::LfenceSerializing,
    Feature::NullSelectorClearsBase,
    Feature::AutoIbrs,
    Feature::SrsoNo,
    Feature::TsaSqNo,
    Feature::TsaL1No,
]);

/// Held in a state though not announced on every host: paging with five levels.
const HELD: FeatureSet = FeatureSet::of(&[Feature::La57]);

/// CPUID of the host. It traps to an outer hypervisor where there is one: not for hot paths.
fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = __cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Whether the guest's CPU is AMD's (or a licensee's): where the vendors differ, it decides.
pub(crate) fn amd(cpu: &Cpu) -> bool {
    cpu.vm.model.is_amd()
}

/// The CPU that guests of this engine see by default on this host.
pub fn host_model() -> &'static CpuModel {
    static MODEL: OnceLock<CpuModel> = OnceLock::new();
    MODEL.get_or_init(build_model)
}

/// Whether this engine can give all that a model announces.
///
/// # Errors
/// Names the features that it cannot give.
pub fn check(model: &CpuModel) -> Result<(), EngineError> {
    let missing = model.missing_on(host_model()).minus(HELD);
    if missing.is_empty() {
        return Ok(());
    }
    Err(EngineError::Unsupported(format!(
        "the soft engine on this host lacks {missing}, which the VM's CPU model has; give the VM \
         another model"
    )))
}

/// The features that a state may need on a model.
pub fn held(model: &CpuModel) -> FeatureSet {
    model.features().or(HELD)
}

/// What guests get of the host's features, and from the engine itself.
fn features(host: &CpuModel) -> FeatureSet {
    let own = if host.is_amd() { OWN_AMD } else { OWN_INTEL };
    host.features().and(NATIVE).or(OWN).or(own).consistent()
}

fn build_model() -> CpuModel {
    let leaves = [0, 1, 7, 0x8000_0000, 0x8000_0001];
    let entry = |leaf| CpuidEntry { leaf, subleaf: Some(0), result: host(leaf, 0) };
    let host = CpuModel::new(leaves.map(entry).to_vec());
    let mut table = Table { entries: Vec::new(), features: features(&host), host };
    table.basic();
    table.hypervisor();
    table.extended();
    CpuModel::new(table.entries)
}

/// The model under construction.
struct Table {
    entries: Vec<CpuidEntry>,
    features: FeatureSet,
    /// The leaves of the host from which the features come.
    host: CpuModel,
}

impl Table {
    fn add(&mut self, leaf: u32, subleaf: Option<u32>, result: [u32; 4]) {
        self.entries.push(CpuidEntry { leaf, subleaf, result });
    }

    /// The features in a register of an answer.
    fn bits(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.features.bits(Word { leaf, subleaf, register })
    }

    fn basic(&mut self) {
        use Register::{Eax, Ebx, Ecx, Edx};
        let amd = self.host.is_amd();
        let [_, ebx, ecx, edx] = self.host.query(0, 0);
        self.add(0, None, [if amd { 0xd } else { 0x16 }, ebx, ecx, edx]);
        let version = self.host.query(1, 0)[0];
        self.add(1, None, [version, 8 << 8, self.bits(1, 0, Ecx), self.bits(1, 0, Edx)]);
        if !amd {
            self.add(2, None, host(2, 0));
            self.caches(4);
        }
        self.add(6, None, [self.bits(6, 0, Eax), 0, 0, 0]);
        let [ebx, ecx, edx] = [Ebx, Ecx, Edx].map(|register| self.bits(7, 0, register));
        self.add(7, Some(0), [0, ebx, ecx, edx]);
        let components = self.features.xcr0();
        if components != 0 {
            let avx = components & xcr0::AVX != 0;
            let size = if avx { 832 } else { 576 };
            self.add(0xd, Some(0), [components as u32, size, size, 0]);
            self.add(0xd, Some(1), [self.bits(0xd, 1, Eax), 0, 0, 0]);
            if avx {
                self.add(0xd, Some(2), [256, 576, 0, 0]);
            }
        }
        if !amd {
            let khz = tsc_khz();
            let crystal_khz = APIC_HZ / 1000;
            let numerator = (khz * 1000 / crystal_khz) as u32;
            self.add(0x15, None, [1000, numerator, APIC_HZ as u32, 0]);
            let mhz = (khz / 1000) as u32;
            self.add(0x16, None, [mhz, mhz, 100, 0]);
        }
    }

    /// Cache parameters; how many vCPUs share them is filled in when the guest asks.
    fn caches(&mut self, leaf: u32) {
        for subleaf in 0..8 {
            let result = host(leaf, subleaf);
            if result[0] & 0x1f == 0 {
                break;
            }
            self.add(leaf, Some(subleaf), result);
        }
    }

    fn hypervisor(&mut self) {
        let name = |part: &[u8; 4]| u32::from_le_bytes(*part);
        let signature = [LEAF_TIMING, name(b"Bivi"), name(b"sorB"), name(b"ivis")];
        self.add(LEAF_HYPERVISOR, None, signature);
        self.add(LEAF_TIMING, None, [tsc_khz() as u32, (APIC_HZ / 1000) as u32, 0, 0]);
    }

    fn extended(&mut self) {
        use Register::{Eax, Ebx, Ecx, Edx};
        let amd = self.host.is_amd();
        let max = self.host.query(0x8000_0000, 0)[0];
        let [_, ebx, ecx, edx] = self.host.query(0, 0);
        let vendor = if amd { [ebx, ecx, edx] } else { [0; 3] };
        let top = if amd { 0x8000_0021 } else { 0x8000_0008 };
        self.add(0x8000_0000, None, [top, vendor[0], vendor[1], vendor[2]]);
        let [version, brand, ..] = self.host.query(0x8000_0001, 0);
        let mirrored = if amd { self.bits(1, 0, Edx) & AMD_MIRRORED } else { 0 };
        let ecx = self.bits(0x8000_0001, 0, Ecx);
        let edx = self.bits(0x8000_0001, 0, Edx) | mirrored;
        self.add(0x8000_0001, None, [version, brand & 0xf000_0000, ecx, edx]);
        for leaf in 0x8000_0002..=0x8000_0006 {
            if leaf <= max && (amd || leaf != 0x8000_0005) {
                self.add(leaf, None, host(leaf, 0));
            }
        }
        self.add(0x8000_0007, None, [0, 0, 0, self.bits(0x8000_0007, 0, Edx)]);
        let linear = if self.features.has(Feature::La57) { 57 } else { 48 };
        let ebx = self.bits(0x8000_0008, 0, Ebx);
        self.add(0x8000_0008, None, [PHYSICAL_BITS | linear << 8, ebx, 0, 0]);
        if amd {
            self.caches(0x8000_001d);
            let (eax, ecx) = (self.bits(0x8000_0021, 0, Eax), self.bits(0x8000_0021, 0, Ecx));
            self.add(0x8000_0021, None, [eax, 0, ecx, 0]);
        }
    }
}

/// CPUID: the model's answer with what depends on the vCPU and its mode.
pub(crate) fn execute(cpu: &mut Cpu) {
    let (leaf, subleaf) = (cpu.gpr[RAX] as u32, cpu.gpr[RCX] as u32);
    let answer = answer(cpu, leaf, subleaf);
    for (register, value) in [RAX, RBX, RCX, RDX].into_iter().zip(answer) {
        cpu.gpr[register] = u64::from(value);
    }
}

/// One answer.
pub(crate) fn answer(cpu: &Cpu, leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut r = cpu.vm.model.query(leaf, subleaf);
    let vcpus = (cpu.vm.mailboxes.len() as u32).max(1);
    let id = cpu.index;
    match leaf {
        1 => {
            r[1] |= vcpus.min(255) << 16 | id << 24;
            if cpu.sys.cr4 & cr4::OSXSAVE != 0 {
                r[2] |= 1 << 27;
            }
            // A package of several cores.
            r[3] |= u32::from(vcpus > 1) << 28;
            if !cpu.lapic.hardware_enabled() {
                r[3] &= !(1 << 9);
            }
        }
        4 if r[0] != 0 => r[0] = (r[0] & 0x3fff) | sharing(r[0], vcpus) << 14 | cores(vcpus) << 26,
        0xb => r = topology(subleaf, vcpus, id),
        0xd => match subleaf {
            0 if r[0] != 0 => r[1] = xsave_size(cpu),
            1 if r[0] != 0 => r[1] = xsave_size(cpu),
            _ => {}
        },
        0x8000_0001 if amd(cpu) => r[2] |= u32::from(vcpus > 1) << 1,
        0x8000_0008 => r[2] = (vcpus - 1) | id_bits(vcpus) << 12,
        0x8000_001d if r[0] != 0 => r[0] = (r[0] & 0x3fff) | sharing(r[0], vcpus) << 14,
        0x8000_001e if amd(cpu) => r = [id, id & 0xff, 0, 0],
        _ => {}
    }
    r
}

/// Highest number of ids that share a cache of leaf 4, less one: level 3 is everybody's.
fn sharing(eax: u32, vcpus: u32) -> u32 {
    if eax >> 5 & 7 >= 3 { (1 << id_bits(vcpus)) - 1 } else { 0 }
}

fn cores(vcpus: u32) -> u32 {
    ((1 << id_bits(vcpus)) - 1).min(63)
}

/// Bits of the APIC id that number the cores of the package.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// Leaf BH: one thread a core, all cores in one package.
fn topology(level: u32, vcpus: u32, id: u32) -> [u32; 4] {
    match level {
        0 => [0, 1, 1 << 8, id],
        1 => [id_bits(vcpus), vcpus, 2 << 8 | 1, id],
        n => [0, 0, n & 0xff, id],
    }
}

/// Bytes of the XSAVE area for the components now enabled.
fn xsave_size(cpu: &Cpu) -> u32 {
    if cpu.sys.xcr0 & xcr0::AVX != 0 { 832 } else { 576 }
}
