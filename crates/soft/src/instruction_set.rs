//! Which instructions the guest's CPU has, from what its CPUID announces.
use arch::{Feature, FeatureSet};
use iced_x86::{CpuidFeature as F, DecoderOptions, Instruction, Mnemonic};

const WORDS: usize = 4;

/// The instructions of one CPU model.
#[derive(Clone, Copy, Debug)]
pub struct InstructionSet {
    /// The decoder's feature numbers of which the CPU has the instructions.
    sets: [u64; WORDS],
    /// How encodings read that older CPUs take for something else.
    options: u32,
}

impl InstructionSet {
    /// What a CPU with these features has.
    pub fn new(features: FeatureSet) -> Self {
        let mut sets = [0; WORDS];
        for feature in F::values() {
            let has = match needs(feature) {
                Needs::Nothing => true,
                Needs::One(feature) => features.has(feature),
                Needs::More => false,
            };
            let (word, bit) = place(feature);
            if let Some(word) = sets.get_mut(word).filter(|_| has) {
                *word |= bit;
            }
        }
        // With prefixes that older CPUs ignore (Intel SDM 2A 2.1.1, TZCNT, LZCNT).
        let options = [
            (Feature::Bmi1, DecoderOptions::NO_MPFX_0FBC),
            (Feature::Lzcnt, DecoderOptions::NO_MPFX_0FBD),
            (Feature::LahfLm, DecoderOptions::NO_LAHF_SAHF_64),
        ];
        let options = options.iter().filter(|(feature, _)| !features.has(*feature));
        Self { sets, options: options.fold(DecoderOptions::NONE, |all, (_, one)| all | one) }
    }

    /// Options with which to decode the guest's code.
    pub fn decoder_options(&self) -> u32 {
        self.options
    }

    /// Whether the CPU has an instruction.
    pub fn has(&self, insn: &Instruction) -> bool {
        insn.cpuid_features().iter().all(|feature| {
            let (word, bit) = place(*feature);
            self.sets.get(word).is_some_and(|set| set & bit != 0)
        }) || reserved_nop(insn)
    }
}

fn place(feature: F) -> (usize, u64) {
    (feature as usize / 64, 1 << (feature as usize % 64))
}

/// These lie in the space of reserved NOPs: without the feature they do nothing.
fn reserved_nop(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Rdsspd | Mnemonic::Rdsspq)
}

/// Whether this engine does not have an instruction, whatever the model, although the decoder
/// knows it.
pub fn is_unknown(insn: &Instruction) -> bool {
    let unknown = |feature: &F| matches!(needs(*feature), Needs::More);
    insn.cpuid_features().iter().any(unknown) && !reserved_nop(insn)
}

/// What the instructions of a decoder's feature need.
enum Needs {
    /// Every 64-bit CPU has them, or takes them for NOPs or their older kin.
    Nothing,
    /// A feature of CPUID.
    One(Feature),
    /// More than this engine has.
    More,
}

fn needs(feature: F) -> Needs {
    Needs::One(match feature {
        F::INTEL8086
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CPUID
        | F::FPU287
        | F::FPU387
        | F::CET_IBT
        | F::CLDEMOTE
        | F::MULTIBYTENOP
        | F::PAUSE
        | F::PREFETCHITI
        | F::PREFETCHW
        | F::PREFETCHWT1
        | F::RDPMC
        | F::WBNOINVD => return Needs::Nothing,
        F::ADX => Feature::Adx,
        F::AES => Feature::Aes,
        F::AVX => Feature::Avx,
        F::AVX2 => Feature::Avx2,
        F::BMI1 => Feature::Bmi1,
        F::BMI2 => Feature::Bmi2,
        F::CLFLUSHOPT => Feature::Clflushopt,
        F::CLFSH => Feature::Clflush,
        F::CLWB => Feature::Clwb,
        F::CMOV => Feature::Cmov,
        F::CMPXCHG16B => Feature::Cx16,
        F::CX8 => Feature::Cx8,
        F::F16C => Feature::F16c,
        F::FMA => Feature::Fma,
        F::FPU => Feature::Fpu,
        F::FSGSBASE => Feature::Fsgsbase,
        F::FXSR => Feature::Fxsr,
        F::GFNI => Feature::Gfni,
        F::INVPCID => Feature::Invpcid,
        F::LZCNT => Feature::Lzcnt,
        F::MMX => Feature::Mmx,
        F::MOVBE => Feature::Movbe,
        F::MSR => Feature::Msr,
        F::PCLMULQDQ => Feature::Pclmulqdq,
        F::POPCNT => Feature::Popcnt,
        F::RDPID => Feature::Rdpid,
        F::RDRAND => Feature::Rdrand,
        F::RDSEED => Feature::Rdseed,
        F::RDTSCP => Feature::Rdtscp,
        F::SEP => Feature::Sep,
        F::SHA => Feature::Sha,
        F::SMAP => Feature::Smap,
        F::SSE => Feature::Sse,
        F::SSE2 => Feature::Sse2,
        F::SSE3 => Feature::Sse3,
        F::SSE4A => Feature::Sse4a,
        F::SSE4_1 => Feature::Sse41,
        F::SSE4_2 => Feature::Sse42,
        F::SSSE3 => Feature::Ssse3,
        F::SYSCALL => Feature::Syscall,
        F::TSC => Feature::Tsc,
        F::VAES => Feature::Vaes,
        F::VPCLMULQDQ => Feature::Vpclmulqdq,
        F::XSAVE => Feature::Xsave,
        F::XSAVEC => Feature::Xsavec,
        F::XSAVEOPT => Feature::Xsaveopt,
        _ => return Needs::More,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use arch::Baseline;
    use iced_x86::{Code, Decoder};

    fn decode(set: &InstructionSet, bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, set.decoder_options()).decode()
    }

    #[test]
    fn a_baseline_has_the_instructions_of_its_level_and_no_others() {
        let [v2, v3] = [Baseline::V2, Baseline::V3].map(|b| InstructionSet::new(b.features(true)));
        let has = |set: &InstructionSet, bytes: &[u8]| set.has(&decode(set, bytes));
        let popcnt: &[u8] = &[0xf3, 0x0f, 0xb8, 0xc1];
        let vaddps: &[u8] = &[0xc5, 0xf0, 0x58, 0xc2];
        let andn: &[u8] = &[0xc4, 0xe2, 0x70, 0xf2, 0xc2];
        let aesenc: &[u8] = &[0x66, 0x0f, 0x38, 0xdc, 0xc1];
        let rdtscp: &[u8] = &[0x0f, 0x01, 0xf9];
        assert!(has(&v2, popcnt) && !has(&v2, vaddps) && !has(&v2, andn));
        assert!(has(&v3, popcnt) && has(&v3, vaddps) && has(&v3, andn));
        for none in [aesenc, rdtscp] {
            assert!(!has(&v2, none) && !has(&v3, none), "{none:x?}");
        }
    }

    #[test]
    fn bit_counts_are_bit_scans_on_a_cpu_that_ignores_their_prefix() {
        let [v2, v3] = [Baseline::V2, Baseline::V3].map(|b| InstructionSet::new(b.features(false)));
        let (tzcnt, lzcnt) = ([0xf3, 0x0f, 0xbc, 0xc1], [0xf3, 0x0f, 0xbd, 0xc1]);
        assert_eq!(decode(&v2, &tzcnt).code(), Code::Bsf_r32_rm32);
        assert_eq!(decode(&v2, &lzcnt).code(), Code::Bsr_r32_rm32);
        assert_eq!(decode(&v3, &tzcnt).code(), Code::Tzcnt_r32_rm32);
        assert_eq!(decode(&v3, &lzcnt).code(), Code::Lzcnt_r32_rm32);
        assert!(v2.has(&decode(&v2, &tzcnt)));
    }

    #[test]
    fn all_features_of_the_decoder_have_a_place() {
        let set = InstructionSet::new(FeatureSet::EMPTY);
        assert!(F::values().all(|feature| place(feature).0 < set.sets.len()));
    }
}
