//! The features that CPUID announces, by name: one table, from which engines make their masks,
//! baselines their leaves, and refusals their words.
//!
//! Sources: Intel SDM 2A CPUID, AMD APM 3 appendix E; for KVM's own leaf the kernel's
//! Documentation/virt/kvm/x86/cpuid.rst.
use core::fmt;

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

/// A word of CPUID whose bits are features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input; 0 for leaves that do not look at it.
    pub subleaf: u32,
    /// The register of the answer.
    pub register: Register,
}

/// A row of the table.
#[derive(Debug)]
struct Row {
    name: &'static str,
    word: Word,
    bit: u32,
    needs: &'static [Feature],
}

macro_rules! features {
    ($(($leaf:literal, $subleaf:literal, $register:ident) {
        $($variant:ident $name:literal $bit:literal $([$($need:ident)*])?;)*
    })*) => {
        /// A feature of the CPU. Names ([`Feature::name`]) are those of Linux's `/proc/cpuinfo`,
        /// and where that has none, of QEMU, with underscores.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)] // The names are the manuals' own.
        pub enum Feature { $($($variant,)*)* }

        impl Feature {
            /// All of them, by leaf and bit.
            pub const ALL: &[Self] = &[$($(Self::$variant,)*)*];

            const ROWS: &[Row] = &[$($(Row {
                name: $name,
                word: Word { leaf: $leaf, subleaf: $subleaf, register: Register::$register },
                bit: $bit,
                needs: &[$($(Feature::$need,)*)?],
            },)*)*];
        }

        impl Word {
            /// All words with features.
            pub const ALL: &[Self] =
                &[$(Self { leaf: $leaf, subleaf: $subleaf, register: Register::$register },)*];
        }
    };
}

impl Feature {
    const fn row(self) -> &'static Row {
        &Self::ROWS[self as usize]
    }

    /// The name that users know it by.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Where CPUID announces it.
    pub const fn word(self) -> Word {
        self.row().word
    }

    /// Its bit in that word.
    pub const fn mask(self) -> u32 {
        1 << self.row().bit
    }

    /// Features without which it cannot be.
    pub const fn needs(self) -> &'static [Self] {
        self.row().needs
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

features! {
    (0x1, 0, Ecx) {
        Sse3 "pni" 0 [Sse2];
        Pclmulqdq "pclmulqdq" 1 [Sse2];
        Monitor "monitor" 3;
        Vmx "vmx" 5;
        Smx "smx" 6;
        Ssse3 "ssse3" 9 [Sse3];
        Fma "fma" 12 [Avx];
        Cx16 "cx16" 13;
        Pdcm "pdcm" 15;
        Pcid "pcid" 17;
        Sse41 "sse4_1" 19 [Ssse3];
        Sse42 "sse4_2" 20 [Sse41];
        X2apic "x2apic" 21 [Apic];
        Movbe "movbe" 22;
        Popcnt "popcnt" 23;
        TscDeadline "tsc_deadline_timer" 24 [Apic Tsc];
        Aes "aes" 25 [Sse2];
        Xsave "xsave" 26 [Fxsr];
        Avx "avx" 28 [Xsave Sse42];
        F16c "f16c" 29 [Avx];
        Rdrand "rdrand" 30;
        Hypervisor "hypervisor" 31;
    }
    (0x1, 0, Edx) {
        Fpu "fpu" 0;
        Vme "vme" 1;
        De "de" 2;
        Pse "pse" 3;
        Tsc "tsc" 4;
        Msr "msr" 5;
        Pae "pae" 6;
        Mce "mce" 7;
        Cx8 "cx8" 8;
        Apic "apic" 9;
        Sep "sep" 11;
        Mtrr "mtrr" 12;
        Pge "pge" 13;
        Mca "mca" 14;
        Cmov "cmov" 15;
        Pat "pat" 16;
        Pse36 "pse36" 17;
        Clflush "clflush" 19;
        Mmx "mmx" 23;
        Fxsr "fxsr" 24;
        Sse "sse" 25 [Fxsr];
        Sse2 "sse2" 26 [Sse];
        SelfSnoop "ss" 27;
    }
    (0x6, 0, Eax) {
        Arat "arat" 2;
    }
    (0x7, 0, Ebx) {
        Fsgsbase "fsgsbase" 0;
        TscAdjust "tsc_adjust" 1;
        Sgx "sgx" 2;
        Bmi1 "bmi1" 3;
        Hle "hle" 4;
        Avx2 "avx2" 5 [Avx];
        FdpExceptionOnly "fdp_excptn_only" 6;
        Smep "smep" 7;
        Bmi2 "bmi2" 8;
        Erms "erms" 9;
        Invpcid "invpcid" 10;
        Rtm "rtm" 11;
        ZeroFcsFds "zero_fcs_fds" 13;
        Mpx "mpx" 14 [Xsave];
        Avx512f "avx512f" 16 [Avx2 Fma F16c];
        Avx512dq "avx512dq" 17 [Avx512f];
        Rdseed "rdseed" 18;
        Adx "adx" 19;
        Smap "smap" 20;
        Avx512ifma "avx512ifma" 21 [Avx512f];
        Clflushopt "clflushopt" 23;
        Clwb "clwb" 24;
        IntelPt "intel_pt" 25;
        Avx512pf "avx512pf" 26 [Avx512f];
        Avx512er "avx512er" 27 [Avx512f];
        Avx512cd "avx512cd" 28 [Avx512f];
        Sha "sha_ni" 29 [Sse2];
        Avx512bw "avx512bw" 30 [Avx512f];
        Avx512vl "avx512vl" 31 [Avx512f];
    }
    (0x7, 0, Ecx) {
        Avx512vbmi "avx512vbmi" 1 [Avx512bw];
        Umip "umip" 2;
        Pku "pku" 3 [Xsave];
        Waitpkg "waitpkg" 5;
        Avx512vbmi2 "avx512_vbmi2" 6 [Avx512bw];
        ShadowStack "shstk" 7 [Xsave];
        Gfni "gfni" 8 [Sse2];
        Vaes "vaes" 9 [Avx Aes];
        Vpclmulqdq "vpclmulqdq" 10 [Avx Pclmulqdq];
        Avx512vnni "avx512_vnni" 11 [Avx512f];
        Avx512bitalg "avx512_bitalg" 12 [Avx512bw];
        Avx512vpopcntdq "avx512_vpopcntdq" 14 [Avx512f];
        La57 "la57" 16 [Lm];
        Rdpid "rdpid" 22;
        KeyLocker "aeskle" 23;
        BusLockDetect "bus_lock_detect" 24;
        Cldemote "cldemote" 25;
        Movdiri "movdiri" 27;
        Movdir64b "movdir64b" 28;
        SgxLaunchControl "sgx_lc" 30;
        Pks "pks" 31;
    }
    (0x7, 0, Edx) {
        Avx512Vnniw4 "avx512_4vnniw" 2 [Avx512f];
        Avx512Fmaps4 "avx512_4fmaps" 3 [Avx512f];
        Fsrm "fsrm" 4;
        Uintr "uintr" 5;
        Avx512vp2intersect "avx512_vp2intersect" 8 [Avx512f];
        SrbdsControl "srbds_ctrl" 9;
        MdClear "md_clear" 10;
        TsxForceAbort "tsx_force_abort" 13;
        Serialize "serialize" 14;
        TsxLoadTracking "tsxldtrk" 16;
        BranchTracking "ibt" 20;
        AmxBf16 "amx_bf16" 22 [AmxTile];
        Avx512fp16 "avx512_fp16" 23 [Avx512bw];
        AmxTile "amx_tile" 24 [Xsave];
        AmxInt8 "amx_int8" 25 [AmxTile];
        SpecCtrl "spec_ctrl" 26;
        Stibp "stibp" 27;
        FlushL1d "flush_l1d" 28;
        ArchCapabilities "arch_capabilities" 29;
        Ssbd "ssbd" 31;
    }
    (0x7, 1, Eax) {
        Sha512 "sha512" 0 [Avx2];
        Sm3 "sm3" 1 [Avx];
        Sm4 "sm4" 2 [Avx2];
        AvxVnni "avx_vnni" 4 [Avx2];
        Avx512bf16 "avx512_bf16" 5 [Avx512bw];
        Lass "lass" 6;
        Cmpccxadd "cmpccxadd" 7;
        Fzrm "fzrm" 10;
        Fsrs "fsrs" 11;
        Fsrc "fsrc" 12;
        Fred "fred" 17 [Lkgs];
        Lkgs "lkgs" 18;
        Wrmsrns "wrmsrns" 19;
        AmxFp16 "amx_fp16" 21 [AmxTile];
        AvxIfma "avx_ifma" 23 [Avx2];
        Lam "lam" 26;
    }
    (0x7, 1, Edx) {
        AvxVnniInt8 "avx_vnni_int8" 4 [Avx2];
        AvxNeConvert "avx_ne_convert" 5 [Avx2];
        AmxComplex "amx_complex" 8 [AmxTile];
        AvxVnniInt16 "avx_vnni_int16" 10 [Avx2];
        Prefetchiti "prefetchiti" 14;
        Avx10 "avx10" 19 [Avx512f];
        Apx "apx" 21 [Xsave];
    }
    (0x7, 2, Edx) {
        Psfd "intel_psfd" 0;
        IpredControl "ipred_ctrl" 1;
        RrsbaControl "rrsba_ctrl" 2;
        DdpdU "ddpd_u" 3;
        BhiControl "bhi_ctrl" 4;
        McdtNo "mcdt_no" 5;
    }
    (0xd, 1, Eax) {
        Xsaveopt "xsaveopt" 0 [Xsave];
        Xsavec "xsavec" 1 [Xsave];
        Xgetbv1 "xgetbv1" 2 [Xsave];
        Xsaves "xsaves" 3 [Xsavec];
        Xfd "xfd" 4 [Xsave];
    }
    (0x4000_0001, 0, Eax) {
        KvmClock "kvmclock" 0;
        KvmNoIoDelay "kvm_nopiodelay" 1;
        KvmClock2 "kvmclock2" 3;
        KvmAsyncPageFault "kvm_asyncpf" 4;
        KvmStealTime "kvm_steal_time" 5;
        KvmPvEoi "kvm_pv_eoi" 6;
        KvmPvUnhalt "kvm_pv_unhalt" 7;
        KvmPvTlbFlush "kvm_pv_tlb_flush" 9;
        KvmPvIpi "kvm_pv_ipi" 11;
        KvmPvSchedYield "kvm_pv_sched_yield" 13;
        KvmClockStable "kvmclock_stable_bit" 24;
    }
    (0x8000_0001, 0, Ecx) {
        LahfLm "lahf_lm" 0;
        Svm "svm" 2;
        Cr8Legacy "cr8_legacy" 4;
        Lzcnt "abm" 5;
        Sse4a "sse4a" 6 [Sse3];
        MisalignSse "misalignsse" 7;
        Prefetchw "3dnowprefetch" 8;
        Osvw "osvw" 9;
        Ibs "ibs" 10;
        Xop "xop" 11 [Avx];
        Skinit "skinit" 12;
        Lwp "lwp" 15;
        Fma4 "fma4" 16 [Avx];
        Tce "tce" 17;
        Tbm "tbm" 21;
        TopologyExtensions "topoext" 22;
        PerfctrCore "perfctr_core" 23;
        PerfctrNb "perfctr_nb" 24;
    }
    (0x8000_0001, 0, Edx) {
        Syscall "syscall" 11;
        Nx "nx" 20;
        MmxExt "mmxext" 22;
        FxsrOpt "fxsr_opt" 25 [Fxsr];
        Pdpe1gb "pdpe1gb" 26;
        Rdtscp "rdtscp" 27 [Tsc];
        Lm "lm" 29 [Pae];
        ThreeDNowExt "3dnowext" 30;
        ThreeDNow "3dnow" 31;
    }
    (0x8000_0007, 0, Edx) {
        InvariantTsc "invtsc" 8 [Tsc];
    }
    (0x8000_0008, 0, Ebx) {
        Clzero "clzero" 0;
        XsaveErrorPointers "xsaveerptr" 2;
        Rdpru "rdpru" 4;
        Wbnoinvd "wbnoinvd" 9;
        Ibpb "ibpb" 12;
        AmdIbrs "ibrs" 14;
        AmdStibp "amd_stibp" 15;
        StibpAlwaysOn "stibp_always_on" 17;
        IbrsSameMode "ibrs_same_mode" 19;
        AmdSsbd "amd_ssbd" 24;
        VirtSsbd "virt_ssbd" 25;
        SsbNo "amd_no_ssb" 26;
        AmdPsfd "amd_psfd" 28;
        BtcNo "btc_no" 29;
        IbpbRet "ibpb_ret" 30;
    }
    (0x8000_0021, 0, Eax) {
        NoNestedDataBreakpoint "no_nested_data_bp" 0;
        FsGsBaseNonSerializing "fs_gs_base_ns" 1;
        LfenceSerializing "lfence_always_serializing" 2;
        VerwClear "verw_clear" 5;
        NullSelectorClearsBase "null_sel_clr_base" 6;
        AutoIbrs "auto_ibrs" 8;
        Prefetchi "prefetchi" 20;
        Sbpb "sbpb" 27;
        IbpbBranchType "ibpb_brtype" 28;
        SrsoNo "srso_no" 29;
        SrsoUserKernelNo "srso_user_kernel_no" 30;
    }
    (0x8000_0021, 0, Ecx) {
        TsaSqNo "tsa_sq_no" 1;
        TsaL1No "tsa_l1_no" 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::string::ToString;

    #[test]
    fn no_two_features_share_a_name_or_a_place() {
        let names: HashSet<_> = Feature::ALL.iter().map(|f| f.name()).collect();
        assert_eq!(names.len(), Feature::ALL.len());
        let places: HashSet<_> = Feature::ALL
            .iter()
            .map(|f| (f.word().leaf, f.word().subleaf, f.word().register as u32, f.mask()))
            .collect();
        assert_eq!(places.len(), Feature::ALL.len());
    }

    #[test]
    fn features_are_where_the_manuals_have_them() {
        for (feature, name, leaf, register, bit) in [
            (Feature::Cx16, "cx16", 1, Register::Ecx, 13),
            (Feature::Sse2, "sse2", 1, Register::Edx, 26),
            (Feature::Avx2, "avx2", 7, Register::Ebx, 5),
            (Feature::Avx512vl, "avx512vl", 7, Register::Ebx, 31),
            (Feature::LahfLm, "lahf_lm", 0x8000_0001, Register::Ecx, 0),
            (Feature::Lzcnt, "abm", 0x8000_0001, Register::Ecx, 5),
            (Feature::Syscall, "syscall", 0x8000_0001, Register::Edx, 11),
        ] {
            let word = feature.word();
            assert_eq!((word.leaf, word.register), (leaf, register), "{name}");
            assert_eq!((feature.to_string().as_str(), feature.mask()), (name, 1 << bit));
        }
    }
}
