//! Which instruction forms the comparison covers, and why not the others.
use iced_x86::{Code, CpuidFeature as F, EncodingKind, Mnemonic as M};

/// Instruction sets that guests are not offered: CPUID does not list them, and they raise #UD.
const HIDDEN: &str = "an instruction set hidden from guests by CPUID";
/// Instructions of processors long gone.
const EXTINCT: &str = "exists only on processors that are not x86-64";

/// Why a form is not compared, or `None` for one that is.
pub fn exclusion(code: Code) -> Option<&'static str> {
    let info = code.op_code();
    if !info.is_instruction() {
        return Some("not an instruction (a placeholder or a data declaration of the decoder)");
    }
    match code.encoding() {
        EncodingKind::EVEX | EncodingKind::MVEX => {
            return Some("AVX-512 (EVEX) is hidden from guests by CPUID");
        }
        EncodingKind::XOP | EncodingKind::D3NOW => return Some(HIDDEN),
        _ => {}
    }
    if info.is_reserved_nop() {
        return Some("a reserved NOP, which the decoder knows under its later meaning");
    }
    if info.fwait() {
        return Some("two instructions, WAIT and the form that does not wait, covered as such");
    }
    by_feature(code).or_else(|| by_mnemonic(code))
}

fn by_feature(code: Code) -> Option<&'static str> {
    code.cpuid_features().iter().find_map(|feature| match feature {
        F::INTEL8086_ONLY
        | F::INTEL286_ONLY
        | F::INTEL386_ONLY
        | F::INTEL386_A0_ONLY
        | F::INTEL486_A_ONLY
        | F::UMOV
        | F::IA64
        | F::OSS
        | F::FPU287XL_ONLY
        | F::FPU387SL_ONLY
        | F::MOV_TR
        | F::CYRIX_D3NOW
        | F::CYRIX_FPU
        | F::CYRIX_SMM
        | F::CYRIX_SMINT
        | F::CYRIX_SMINT_0F7E
        | F::CYRIX_SHR
        | F::CYRIX_DDI
        | F::CYRIX_EMMI
        | F::CYRIX_DMI
        | F::CENTAUR_AIS
        | F::KNC
        | F::PADLOCK_ACE
        | F::PADLOCK_PHE
        | F::PADLOCK_PMM
        | F::PADLOCK_RNG
        | F::PADLOCK_GMI
        | F::PADLOCK_UNDOC => Some(EXTINCT),
        F::D3NOW | F::D3NOWEXT | F::FMA4 | F::XOP | F::TBM | F::LWP => Some(HIDDEN),
        F::CET_SS | F::CET_IBT => Some("shadow stacks are hidden from guests by CPUID"),
        F::VMX
        | F::INVEPT
        | F::INVVPID
        | F::SVM
        | F::SKINIT
        | F::SKINIT_or_SVM
        | F::SEV_ES
        | F::SEV_SNP
        | F::TDX
        | F::RMPQUERY => Some("nested virtualisation is hidden from guests by CPUID"),
        F::SGX1 | F::SMX | F::SMM | F::PCONFIG | F::KL | F::AESKLE | F::WIDE_KL => Some(HIDDEN),
        F::RTM | F::HLE | F::HLE_or_RTM | F::TSXLDTRK => {
            Some("transactional memory is hidden from guests by CPUID")
        }
        F::AMX_BF16
        | F::AMX_TILE
        | F::AMX_INT8
        | F::AMX_FP16
        | F::AMX_COMPLEX
        | F::MPX
        | F::PKU
        | F::ENQCMD
        | F::MOVDIR64B
        | F::MOVDIRI
        | F::UINTR
        | F::HRESET
        | F::AVX_VNNI
        | F::AVX_IFMA
        | F::AVX_NE_CONVERT
        | F::AVX_VNNI_INT8
        | F::AVX_VNNI_INT16
        | F::SHA512
        | F::SM3
        | F::SM4
        | F::FRED
        | F::LKGS
        | F::UDBG
        | F::RAO_INT
        | F::CMPCCXADD
        | F::MSRLIST
        | F::WRMSRNS
        | F::TSE
        | F::WAITPKG
        | F::PTWRITE
        | F::SERIALIZE
        | F::PREFETCHITI
        | F::PCOMMIT
        | F::CL1INVMB
        | F::CLDEMOTE
        | F::MCOMMIT
        | F::RDPRU
        | F::INVLPGB
        | F::CLZERO
        | F::WBNOINVD
        | F::MONITORX
        | F::MONITOR => Some(HIDDEN),
        F::AVX512F | F::AVX512BW | F::AVX512DQ => {
            Some("AVX-512 (mask registers) is hidden from guests by CPUID")
        }
        F::RDRAND | F::RDSEED => Some("its result is random"),
        F::TSC | F::RDTSCP => Some("its result depends on time"),
        F::RDPMC => Some("its result depends on the host's performance counters"),
        F::RDPID => Some("its result depends on the host CPU it runs on"),
        F::XSAVE | F::XSAVEC | F::XSAVEOPT | F::XSAVES => Some(
            "its format depends on XCR0, which differs between host and guest; see the guest tests",
        ),
        _ => None,
    })
}

fn by_mnemonic(code: Code) -> Option<&'static str> {
    match code {
        Code::Ud0 => return Some("old processors take UD0 without a ModRM byte; covered with it"),
        Code::Loopne_rel8_16_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loop_rel8_16_RCX
        | Code::Jrcxz_rel8_16 => {
            return Some("processors differ in whether 66H truncates RIP in 64-bit mode");
        }
        Code::Int1 => {
            return Some(
                "hypervisors under the host deliver it with another RIP; see the guest tests",
            );
        }
        Code::Call_m1664
        | Code::Jmp_m1664
        | Code::Lss_r64_m1664
        | Code::Lfs_r64_m1664
        | Code::Lgs_r64_m1664 => {
            return Some("processors differ: AMD's ignore REX.W here and read a 32-bit offset");
        }
        _ => {}
    }
    match code.mnemonic() {
        M::Cpuid => Some("answers for the host; see the guest tests"),
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
            Some("shows the host's system registers in user mode; see the guest tests")
        }
        M::Lar | M::Lsl | M::Verr | M::Verw => {
            Some("shows the host's descriptors; see the guest tests")
        }
        M::Syscall | M::Sysenter | M::Sysret | M::Sysexit => {
            Some("enters the host's kernel; see the guest tests")
        }
        M::Montmul | M::Xsha1 | M::Xsha256 => Some(EXTINCT),
        M::Lfs | M::Lgs | M::Lss | M::Lds | M::Les
            if code.op_code().operand_size() == 16 && !code.op_code().mode64() =>
        {
            Some("loads segments that 32-bit Linux code could not run on; see the guest tests")
        }
        M::Jmpe | M::Umonitor | M::Umwait | M::Tpause => Some(HIDDEN),
        _ => None,
    }
}

/// Instruction sets of which a host may lack some: `None` where this host has the form's.
pub fn missing_here(code: Code) -> Option<&'static str> {
    let has = |feature: &F| match feature {
        F::ADX => std::is_x86_feature_detected!("adx"),
        F::AES => std::is_x86_feature_detected!("aes"),
        F::AVX => std::is_x86_feature_detected!("avx"),
        F::AVX2 => std::is_x86_feature_detected!("avx2"),
        F::BMI1 => std::is_x86_feature_detected!("bmi1"),
        F::BMI2 => std::is_x86_feature_detected!("bmi2"),
        F::CMPXCHG16B => std::is_x86_feature_detected!("cmpxchg16b"),
        F::F16C => std::is_x86_feature_detected!("f16c"),
        F::FMA => std::is_x86_feature_detected!("fma"),
        F::GFNI => std::is_x86_feature_detected!("gfni"),
        F::LZCNT => std::is_x86_feature_detected!("lzcnt"),
        F::MOVBE => std::is_x86_feature_detected!("movbe"),
        F::PCLMULQDQ => std::is_x86_feature_detected!("pclmulqdq"),
        F::POPCNT => std::is_x86_feature_detected!("popcnt"),
        F::SHA => std::is_x86_feature_detected!("sha"),
        F::SSE3 => std::is_x86_feature_detected!("sse3"),
        F::SSSE3 => std::is_x86_feature_detected!("ssse3"),
        F::SSE4_1 => std::is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        F::SSE4A => std::is_x86_feature_detected!("sse4a"),
        F::VAES => std::is_x86_feature_detected!("vaes"),
        F::VPCLMULQDQ => std::is_x86_feature_detected!("vpclmulqdq"),
        _ => true,
    };
    let missing = code.cpuid_features().iter().any(|f| !has(f));
    missing.then_some("this host's CPU lacks it")
}
