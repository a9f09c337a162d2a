//! Named CPU models that are the same everywhere: the microarchitecture levels of the x86-64
//! psABI (version 1.0, §3.1.1, table 3.1).
//!
//! A baseline shows a guest the features of its level and those that any 64-bit kernel in a VM
//! needs, and nothing else, so that the guest can go on wherever the level is offered, on either
//! engine. What it cannot make the same, because it is the host's:
//!
//! - **The vendor.** Kernels choose mitigations by it: a guest on Intel's hardware that believes
//!   itself on AMD's leaves Meltdown open. Vendors also differ in what compatibility mode knows
//!   (SYSCALL or SYSENTER) and in the leaves that tell caches and topology. Family, model and
//!   stepping are fixed for each vendor, to old ones that kernels know to need most mitigations.
//! - **The frequency of the time-stamp counter**, and of the LAPIC's timer, where the engine tells.
//! - **The layout of XSAVE beyond AVX**, which differs between vendors' CPUs.
//!
//! No baseline says anything about speculation (IBRS, MD_CLEAR, "not affected" bits): that is the
//! host's too, and a guest that runs programs it does not trust is better off with the host's
//! model.
use crate::cpuid::{AMD_MIRRORED, CpuModel, CpuidEntry};
use crate::feature::{Feature, Register, Word};
use crate::feature_set::FeatureSet;
use alloc::vec::Vec;
use core::fmt;

/// A microarchitecture level of x86-64 as a CPU model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// x86-64-v2: SSE4.2 and CMPXCHG16B.
    V2,
    /// x86-64-v3: AVX2, FMA and BMI.
    V3,
    /// x86-64-v4: the main parts of AVX-512.
    V4,
}

/// What each level adds to the one before.
const V2: &[Feature] = &[
    Feature::Cx16,
    Feature::LahfLm,
    Feature::Popcnt,
    Feature::Sse3,
    Feature::Sse41,
    Feature::Sse42,
    Feature::Ssse3,
];
const V3: &[Feature] = &[
    Feature::Avx,
    Feature::Avx2,
    Feature::Bmi1,
    Feature::Bmi2,
    Feature::F16c,
    Feature::Fma,
    Feature::Lzcnt,
    Feature::Movbe,
    // The table says OSXSAVE, which the kernel switches on where there is XSAVE.
    Feature::Xsave,
];
const V4: &[Feature] =
    &[Feature::Avx512f, Feature::Avx512bw, Feature::Avx512cd, Feature::Avx512dq, Feature::Avx512vl];

/// What every level has: the psABI's x86-64 itself, the system features of any 64-bit CPU, and
/// what kernels rely on in a VM: a LAPIC whose timer never stops, and a clock that does not
/// change its rate.
const COMMON: FeatureSet = FeatureSet::of(&[
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
    Feature::X2apic,
    Feature::TscDeadline,
    Feature::Hypervisor,
    Feature::Arat,
    Feature::Syscall,
    Feature::Nx,
    Feature::Lm,
    Feature::InvariantTsc,
]);

/// What AMD's leaves of caches and topology go by.
const AMD_COMMON: FeatureSet = FeatureSet::of(&[Feature::TopologyExtensions]);

/// Bits of physical addresses: the fewest of 64-bit CPUs of the levels.
pub const PHYSICAL_BITS: u32 = 39;
const LINEAR_BITS: u32 = 48;

/// Family 17H, model 1, stepping 2: AMD's first that had level 3 and is still in use.
const AMD_SIGNATURE: u32 = 0x0080_0f12;
/// Family 6, model 55H, stepping 4: Intel's first that had level 4.
const INTEL_SIGNATURE: u32 = 0x0005_0654;

const HYPERVISOR: u32 = 0x4000_0000;
const TIMING: u32 = 0x4000_0010;

impl Baseline {
    /// All of them, smallest first.
    pub const ALL: [Self; 3] = [Self::V2, Self::V3, Self::V4];

    /// The name that the psABI gives it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// The features of the level, without those of every 64-bit CPU.
    pub const fn level(self) -> FeatureSet {
        let v2 = FeatureSet::of(V2);
        match self {
            Self::V2 => v2,
            Self::V3 => v2.or(FeatureSet::of(V3)),
            Self::V4 => v2.or(FeatureSet::of(V3)).or(FeatureSet::of(V4)),
        }
    }

    /// All features that guests see, given the vendor.
    pub fn features(self, amd: bool) -> FeatureSet {
        let vendor = if amd { AMD_COMMON } else { FeatureSet::EMPTY };
        self.level().or(COMMON).or(vendor)
    }

    /// The model on a host.
    ///
    /// # Errors
    /// The features that the host's model lacks.
    pub fn on(self, host: &CpuModel) -> Result<CpuModel, FeatureSet> {
        let amd = host.is_amd();
        let features = self.features(amd);
        let missing = features.minus(host.features());
        if !missing.is_empty() {
            return Err(missing);
        }
        let mut table = Table { entries: Vec::new(), features, host, amd };
        table.basic();
        table.hypervisor();
        table.extended(self);
        Ok(CpuModel::new(table.entries))
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A model under construction.
struct Table<'a> {
    entries: Vec<CpuidEntry>,
    features: FeatureSet,
    host: &'a CpuModel,
    amd: bool,
}

/// Cache types of leaf 4 and of its AMD twin.
const DATA: u32 = 1;
const CODE: u32 = 2;
const UNIFIED: u32 = 3;

/// Caches that every CPU of the levels has, or larger ones: type, level, ways and sets. Lines have
/// 64 bytes.
const CACHES: [(u32, u32, u32, u32); 4] = [
    (DATA, 1, 8, 64),         // 32 KiB
    (CODE, 1, 8, 64),         // 32 KiB
    (UNIFIED, 2, 8, 1024),    // 512 KiB
    (UNIFIED, 3, 16, 16_384), // 16 MiB
];

impl Table<'_> {
    fn add(&mut self, leaf: u32, subleaf: Option<u32>, result: [u32; 4]) {
        self.entries.push(CpuidEntry { leaf, subleaf, result });
    }

    fn bits(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.features.bits(Word { leaf, subleaf, register })
    }

    fn signature(&self) -> u32 {
        if self.amd { AMD_SIGNATURE } else { INTEL_SIGNATURE }
    }

    fn basic(&mut self) {
        let [_, ebx, ecx, edx] = self.host.query(0, 0);
        self.add(0, None, [if self.amd { 0xd } else { 0x15 }, ebx, ecx, edx]);
        let features = [self.bits(1, 0, Register::Ecx), self.bits(1, 0, Register::Edx)];
        // CLFLUSH works on 64 bytes.
        self.add(1, None, [self.signature(), 8 << 8, features[0], features[1]]);
        if !self.amd {
            // FFH: caches are in leaf 4.
            self.add(2, None, [0xff01, 0, 0, 0]);
            self.caches(4);
        }
        self.add(6, None, [self.bits(6, 0, Register::Eax), 0, 0, 0]);
        let seven = |register| self.bits(7, 0, register);
        let result = [0, seven(Register::Ebx), seven(Register::Ecx), seven(Register::Edx)];
        self.add(7, Some(0), result);
        self.xsave();
        let crystal = self.host.query(0x15, 0);
        if !self.amd && crystal != [0; 4] {
            self.add(0x15, None, crystal);
        }
    }

    /// Leaf 0DH: the components' places are the hardware's.
    fn xsave(&mut self) {
        let components = self.features.xcr0();
        if components == 0 {
            return;
        }
        let beyond: Vec<_> = (2..32)
            .filter(|n| components >> n & 1 != 0)
            .map(|n| (n, self.host.query(0xd, n)))
            .collect();
        // The legacy region and the header, then each component: size in EAX, offset in EBX.
        let size = beyond.iter().map(|(_, r)| r[0].saturating_add(r[1])).max().unwrap_or(576);
        self.add(0xd, Some(0), [components as u32, size, size, (components >> 32) as u32]);
        self.add(0xd, Some(1), [self.bits(0xd, 1, Register::Eax), 0, 0, 0]);
        for (n, result) in beyond {
            self.add(0xd, Some(n), result);
        }
    }

    fn caches(&mut self, leaf: u32) {
        for (n, (kind, level, ways, sets)) in (0..).zip(CACHES) {
            let self_initializing = 1 << 8;
            let eax = kind | level << 5 | self_initializing;
            self.add(leaf, Some(n), [eax, (ways - 1) << 22 | 63, sets - 1, 0]);
        }
    }

    /// Bivisor's own leaves, on every engine: what another hypervisor announces is not portable.
    fn hypervisor(&mut self) {
        let name = |part: &[u8; 4]| u32::from_le_bytes(*part);
        let timing = self.host.query(TIMING, 0);
        let told = self.host.query(HYPERVISOR, 0)[0] >= TIMING && timing != [0; 4];
        let top = if told { TIMING } else { HYPERVISOR };
        self.add(HYPERVISOR, None, [top, name(b"Bivi"), name(b"sorB"), name(b"ivis")]);
        if told {
            self.add(TIMING, None, timing);
        }
    }

    fn extended(&mut self, baseline: Baseline) {
        let [_, ebx, ecx, edx] = self.host.query(0, 0);
        let vendor = if self.amd { [ebx, ecx, edx] } else { [0; 3] };
        let top = if self.amd { 0x8000_001e } else { 0x8000_0008 };
        self.add(0x8000_0000, None, [top, vendor[0], vendor[1], vendor[2]]);
        let signature = if self.amd { AMD_SIGNATURE } else { 0 };
        let mirrored = if self.amd { self.bits(1, 0, Register::Edx) & AMD_MIRRORED } else { 0 };
        let ecx = self.bits(0x8000_0001, 0, Register::Ecx);
        let edx = self.bits(0x8000_0001, 0, Register::Edx) | mirrored;
        self.add(0x8000_0001, None, [signature, 0, ecx, edx]);
        self.brand(baseline);
        if self.amd {
            // TLBs of 64 entries; level 1 caches in KiB, ways, lines a tag, bytes a line.
            let level1 = 32 << 24 | 8 << 16 | 1 << 8 | 64;
            self.add(0x8000_0005, None, [0xff40_ff40, 0xff40_ff40, level1, level1]);
        }
        // Level 2 in KiB, 8 ways; AMD's level 3 in units of 512 KiB, 16 ways.
        let level2 = 512 << 16 | 6 << 12 | 1 << 8 | 64;
        let level3 = if self.amd { 32 << 18 | 8 << 12 | 1 << 8 | 64 } else { 0 };
        self.add(0x8000_0006, None, [0, 0, level2, level3]);
        self.add(0x8000_0007, None, [0, 0, 0, self.bits(0x8000_0007, 0, Register::Edx)]);
        let ebx = self.bits(0x8000_0008, 0, Register::Ebx);
        self.add(0x8000_0008, None, [PHYSICAL_BITS | LINEAR_BITS << 8, ebx, 0, 0]);
        if self.amd {
            self.caches(0x8000_001d);
        }
    }

    /// The name of the CPU, in three leaves of 16 bytes.
    fn brand(&mut self, baseline: Baseline) {
        let mut text = [0u8; 48];
        let name = b"Bivisor ".iter().chain(baseline.name().as_bytes());
        text.iter_mut().zip(name).for_each(|(to, from)| *to = *from);
        for (leaf, part) in (0x8000_0002..).zip(text.chunks_exact(16)) {
            let mut result = [0; 4];
            for (word, bytes) in result.iter_mut().zip(part.chunks_exact(4)) {
                *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
            }
            self.add(leaf, None, result);
        }
    }
}

#[cfg(test)]
mod tests;
