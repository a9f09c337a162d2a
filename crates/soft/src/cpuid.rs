//! The CPU that guests see: the host's, as far as this engine carries it, and CPUID itself
//! (Intel SDM 2A CPUID, AMD APM 3 appendix E).
use crate::clock::{APIC_HZ, tsc_khz};
use crate::cpu::Cpu;
use crate::mmu::PHYSICAL_BITS;
use arch::registers::gpr::{RAX, RBX, RCX, RDX};
use arch::registers::{cr4, xcr0};
use arch::{CpuModel, CpuidEntry};
use iced_x86::{CpuidFeature as F, Instruction, Mnemonic};
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

const AMD_EBX: u32 = u32::from_le_bytes(*b"Auth");
const HYGON_EBX: u32 = u32::from_le_bytes(*b"Hygo");
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_TIMING: u32 = 0x4000_0010;

const fn bits(list: &[u32]) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < list.len() {
        word |= 1 << list[i];
        i += 1;
    }
    word
}

/// Leaf 1 ECX where the host has it: SSE3, PCLMUL, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, MOVBE,
/// POPCNT, AES, XSAVE, AVX, F16C, RDRAND.
const ONE_ECX: u32 = bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
/// Always: x2APIC, TSC deadline, hypervisor.
const ONE_ECX_ALWAYS: u32 = bits(&[21, 24, 31]);
/// Leaf 1 EDX, in every 64-bit CPU: FPU DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT
/// PSE36 CLFLUSH MMX FXSR SSE SSE2.
const ONE_EDX: u32 =
    bits(&[0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
/// Leaf 7 EBX: BMI1, AVX2, BMI2, ERMS, INVPCID, RDSEED, ADX, CLFLUSHOPT, CLWB, SHA.
const SEVEN_EBX: u32 = bits(&[3, 5, 8, 9, 10, 18, 19, 23, 24, 29]);
/// Always: FSGSBASE, TSC_ADJUST, SMEP, SMAP.
const SEVEN_EBX_ALWAYS: u32 = bits(&[0, 1, 7, 20]);
/// Leaf 7 ECX: GFNI, VAES, VPCLMULQDQ, LA57, RDPID.
const SEVEN_ECX: u32 = bits(&[8, 9, 10, 16, 22]);
/// Always: UMIP.
const SEVEN_ECX_ALWAYS: u32 = bits(&[2]);
/// Leaf 8000_0001H ECX: LAHF, LZCNT, SSE4A, misaligned SSE, PREFETCHW.
const EXTENDED_ECX: u32 = bits(&[0, 5, 6, 7, 8]);
/// Leaf 8000_0001H EDX: SYSCALL, NX, MMXEXT, 1 GiB pages, RDTSCP, long mode.
const EXTENDED_EDX: u32 = bits(&[11, 20, 22, 26, 27, 29]);

/// CPUID of the host. It traps to an outer hypervisor where there is one: not for hot paths.
fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = __cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

fn is_amd(ebx: u32) -> bool {
    matches!(ebx, AMD_EBX | HYGON_EBX)
}

/// Whether the guest's CPU is AMD's (or a licensee's): where the vendors differ, it decides.
pub(crate) fn amd(cpu: &Cpu) -> bool {
    is_amd(cpu.vm.model.query(0, 0)[1])
}

/// The CPU that guests of this engine see by default on this host.
pub fn host_model() -> CpuModel {
    static MODEL: OnceLock<CpuModel> = OnceLock::new();
    MODEL.get_or_init(build_model).clone()
}

fn build_model() -> CpuModel {
    let mut entries = Vec::new();
    let [max, ebx, ecx, edx] = host(0, 0);
    let amd = is_amd(ebx);
    add(&mut entries, 0, None, [if amd { 0xd } else { 0x16 }, ebx, ecx, edx]);
    basic(&mut entries, max, amd);
    hypervisor(&mut entries);
    extended(&mut entries, amd);
    CpuModel::new(entries)
}

fn add(entries: &mut Vec<CpuidEntry>, leaf: u32, subleaf: Option<u32>, result: [u32; 4]) {
    entries.push(CpuidEntry { leaf, subleaf, result });
}

fn basic(entries: &mut Vec<CpuidEntry>, max: u32, amd: bool) {
    let [version, _, ecx, edx] = host(1, 0);
    let mut features = (ecx & ONE_ECX) | ONE_ECX_ALWAYS;
    // XSAVE's instructions are helpers, but the AVX state comes and goes by the host's.
    let avx = features & bits(&[26, 28]) == bits(&[26, 28]);
    if !avx {
        features &= !bits(&[12, 28, 29]);
    }
    add(entries, 1, None, [version, 8 << 8, features, edx & ONE_EDX]);
    if !amd {
        add(entries, 2, None, host(2, 0));
        caches(entries, 4);
    }
    // ARAT: the LAPIC timer never stops.
    add(entries, 6, None, [4, 0, 0, 0]);
    if max >= 7 {
        let [_, ebx, ecx, edx] = host(7, 0);
        let vex = if avx { u32::MAX } else { !bits(&[5]) };
        let vector = if avx { u32::MAX } else { !bits(&[9, 10]) };
        // FSRM; for Intel IBRS and ARCH_CAPABILITIES, which say that nothing needs mitigation.
        let edx = edx & bits(&[4]) | if amd { 0 } else { bits(&[26, 29]) };
        let ebx = (ebx & SEVEN_EBX & vex) | SEVEN_EBX_ALWAYS;
        let ecx = (ecx & SEVEN_ECX & vector) | SEVEN_ECX_ALWAYS;
        add(entries, 7, Some(0), [0, ebx, ecx, edx]);
    }
    if features & bits(&[26]) != 0 {
        let (components, size) = if avx { (7, 832) } else { (3, 576) };
        add(entries, 0xd, Some(0), [components, size, size, 0]);
        // XSAVEOPT, XSAVEC, XGETBV with ECX 1.
        add(entries, 0xd, Some(1), [7, 0, 0, 0]);
        if avx {
            add(entries, 0xd, Some(2), [256, 576, 0, 0]);
        }
    }
    if !amd {
        let khz = tsc_khz();
        let crystal_khz = APIC_HZ / 1000;
        let numerator = (khz * 1000 / crystal_khz) as u32;
        add(entries, 0x15, None, [1000, numerator, APIC_HZ as u32, 0]);
        let mhz = (khz / 1000) as u32;
        add(entries, 0x16, None, [mhz, mhz, 100, 0]);
    }
}

/// Cache parameters; how many vCPUs share them is filled in when the guest asks.
fn caches(entries: &mut Vec<CpuidEntry>, leaf: u32) {
    for subleaf in 0..8 {
        let result = host(leaf, subleaf);
        if result[0] & 0x1f == 0 {
            break;
        }
        add(entries, leaf, Some(subleaf), result);
    }
}

fn hypervisor(entries: &mut Vec<CpuidEntry>) {
    let name = |part: &[u8; 4]| u32::from_le_bytes(*part);
    let signature = [LEAF_TIMING, name(b"Bivi"), name(b"sorB"), name(b"ivis")];
    add(entries, LEAF_HYPERVISOR, None, signature);
    let timing = [tsc_khz() as u32, (APIC_HZ / 1000) as u32, 0, 0];
    add(entries, LEAF_TIMING, None, timing);
}

fn extended(entries: &mut Vec<CpuidEntry>, amd: bool) {
    let [max, ..] = host(0x8000_0000, 0);
    let [_, ebx, ecx, edx] = host(0, 0);
    let vendor = if amd { [ebx, ecx, edx] } else { [0; 3] };
    let top = if amd { 0x8000_0021 } else { 0x8000_0008 };
    add(entries, 0x8000_0000, None, [top, vendor[0], vendor[1], vendor[2]]);
    let [version, brand, ecx, edx] = host(0x8000_0001, 0);
    let mut features = edx & EXTENDED_EDX;
    let mut more = ecx & EXTENDED_ECX;
    if amd {
        // The AMD leaf repeats leaf 1; and its topology leaves exist.
        features |= ONE_EDX & 0x0183_f3ff;
        more |= bits(&[22]);
    }
    add(entries, 0x8000_0001, None, [version, brand & 0xf000_0000, more, features]);
    for leaf in 0x8000_0002..=0x8000_0006 {
        if leaf <= max && (amd || leaf != 0x8000_0005) {
            add(entries, leaf, None, host(leaf, 0));
        }
    }
    // Invariant TSC.
    add(entries, 0x8000_0007, None, [0, 0, 0, 1 << 8]);
    let linear = if host(7, 0)[2] & 1 << 16 != 0 { 57 } else { 48 };
    // SSB_NO and BTC_NO for AMD: nothing to mitigate.
    let immune = if amd { bits(&[26, 29]) } else { 0 };
    add(entries, 0x8000_0008, None, [PHYSICAL_BITS | linear << 8, immune, 0, 0]);
    if amd {
        caches(entries, 0x8000_001d);
        // LFENCE serialises, null selectors clear bases, automatic IBRS (which spares guests
        // their retpolines), SRSO_NO; ECX: TSA_SQ_NO, TSA_L1_NO.
        add(entries, 0x8000_0021, None, [bits(&[2, 6, 8, 29]), 0, bits(&[1, 2]), 0]);
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

/// Whether the guest's CPU does not have an instruction, although the decoder knows it.
pub fn hidden(insn: &Instruction) -> bool {
    // These lie in the space of reserved NOPs: without the feature they do nothing.
    if matches!(insn.mnemonic(), Mnemonic::Rdsspd | Mnemonic::Rdsspq) {
        return false;
    }
    !insn.cpuid_features().iter().all(|f| offered(*f))
}

fn offered(feature: F) -> bool {
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::ADX
            | F::AES
            | F::AVX
            | F::AVX2
            | F::BMI1
            | F::BMI2
            | F::CET_IBT
            | F::CLDEMOTE
            | F::CLFLUSHOPT
            | F::CLFSH
            | F::CLWB
            | F::CMOV
            | F::CMPXCHG16B
            | F::CPUID
            | F::CX8
            | F::F16C
            | F::FMA
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::FSGSBASE
            | F::FXSR
            | F::GFNI
            | F::INVPCID
            | F::LZCNT
            | F::MMX
            | F::MOVBE
            | F::MSR
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::PCLMULQDQ
            | F::POPCNT
            | F::PREFETCHITI
            | F::PREFETCHW
            | F::PREFETCHWT1
            | F::RDPID
            | F::RDPMC
            | F::RDRAND
            | F::RDSEED
            | F::RDTSCP
            | F::SEP
            | F::SHA
            | F::SMAP
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSE4A
            | F::SSE4_1
            | F::SSE4_2
            | F::SSSE3
            | F::SYSCALL
            | F::TSC
            | F::VAES
            | F::VPCLMULQDQ
            | F::WBNOINVD
            | F::XSAVE
            | F::XSAVEC
            | F::XSAVEOPT
    )
}
