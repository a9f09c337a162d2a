//! What a guest finds on a CPU with a name: the features of its level, and #UD for what is above.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::registers::{cr4, xcr0};
use arch::{Baseline, Feature, Word};
use cputest::micro::{Guest, Mode, Stop, at, done, say};
use cputest::under_test::EngineUnderTest::Soft;
use iced_x86::code_asm::*;

/// A long-mode guest on a baseline, without the registers that only AVX has.
fn guest(baseline: Baseline) -> Guest {
    let host = Soft.make().unwrap().host_cpu();
    let mut guest = Guest::on(Soft, &baseline.on(&host).unwrap(), Mode::LONG, 1).unwrap();
    if baseline == Baseline::V2 {
        guest.state.cr4 &= !cr4::OSXSAVE;
        guest.state.xcr0 = xcr0::X87;
    }
    guest
}

fn is_amd() -> bool {
    Soft.make().unwrap().host_cpu().is_amd()
}

#[test]
fn cpuid_announces_exactly_the_baseline() {
    for baseline in [Baseline::V2, Baseline::V3] {
        let mut guest = guest(baseline);
        guest.code(at::CODE, |a| {
            for word in Word::ALL {
                a.mov(eax, word.leaf)?;
                a.mov(ecx, word.subleaf)?;
                a.cpuid()?;
                match word.register as usize {
                    1 => a.mov(eax, ebx)?,
                    2 => a.mov(eax, ecx)?,
                    3 => a.mov(eax, edx)?,
                    _ => {}
                }
                say(a)?;
            }
            done(a)
        });
        let end = guest.run();
        let wanted = baseline.features(is_amd());
        assert_eq!(end.done().len(), Word::ALL.len());
        for (word, said) in Word::ALL.iter().zip(end.done()) {
            let named: u32 =
                Feature::ALL.iter().filter(|f| f.word() == *word).fold(0, |m, f| m | f.mask());
            assert_eq!(said & named, wanted.bits(*word), "{baseline} {word:x?}");
        }
    }
}

#[test]
fn instructions_above_the_level_are_invalid_opcodes() {
    let codes: [(&str, &[u8], bool); 7] = [
        ("vpaddd xmm", &[0xc5, 0xf1, 0xfe, 0xc2], true),
        ("vpaddd ymm", &[0xc5, 0xf5, 0xfe, 0xc2], true),
        ("andn", &[0xc4, 0xe2, 0x70, 0xf2, 0xc2], true),
        ("movbe", &[0x0f, 0x38, 0xf0, 0x04, 0x24], true),
        ("aesenc", &[0x66, 0x0f, 0x38, 0xdc, 0xc1], false),
        ("rdtscp", &[0x0f, 0x01, 0xf9], false),
        ("rdrand", &[0x0f, 0xc7, 0xf0], false),
    ];
    for baseline in [Baseline::V2, Baseline::V3] {
        for (name, bytes, in_v3) in codes {
            let mut guest = guest(baseline);
            guest.code(at::CODE, |a| {
                a.db(bytes)?;
                done(a)
            });
            let end = guest.run();
            if in_v3 && baseline == Baseline::V3 {
                assert_eq!(end.stop, Stop::Done, "{name} on {baseline}");
            } else {
                let exception = end.exception();
                assert_eq!((exception.vector, exception.rip), (6, at::CODE), "{name} {baseline}");
            }
        }
    }
}

#[test]
fn trailing_zero_counts_are_bit_scans_where_the_level_has_no_tzcnt() {
    for (baseline, of_zero) in [(Baseline::V2, 77), (Baseline::V3, 32)] {
        let mut guest = guest(baseline);
        guest.code(at::CODE, |a| {
            a.mov(ecx, 0x50)?;
            a.db(&[0xf3, 0x0f, 0xbc, 0xc1])?; // tzcnt eax, ecx
            say(a)?;
            a.mov(eax, 77)?;
            a.xor(ecx, ecx)?;
            a.db(&[0xf3, 0x0f, 0xbc, 0xc1])?;
            say(a)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [4, of_zero], "{baseline}");
    }
}

#[test]
fn xsave_cannot_be_switched_on_where_the_level_has_none() {
    let mut guest = guest(Baseline::V2);
    guest.code(at::CODE, |a| {
        a.mov(rax, cr4)?;
        a.or(eax, cr4::OSXSAVE as i32)?;
        a.mov(cr4, rax)?;
        done(a)
    });
    assert_eq!(guest.run().exception().vector, 13);
}

#[test]
fn a_state_that_needs_more_than_the_model_is_refused_by_name_and_changes_nothing() {
    let mut guest = guest(Baseline::V2);
    let state = guest.state.clone();
    let vcpu = &mut guest.vcpus[0];
    vcpu.set_state(&state).unwrap();
    let before = vcpu.state().unwrap();
    let mut more = state.clone();
    (more.rip, more.xcr0) = (0x1234, 7);
    more.cr4 |= cr4::SMEP | cr4::OSXSAVE;
    let error = vcpu.set_state(&more).unwrap_err().to_string();
    for name in ["smep (CR4 bit 20)", "xsave (CR4 bit 18)", "avx (XCR0 bit 2)"] {
        assert!(error.contains(name), "{name} in {error}");
    }
    let after = vcpu.state().unwrap();
    assert_eq!((after.rip, after.cr4, after.xcr0), (before.rip, before.cr4, before.xcr0));
}

#[test]
fn a_model_that_the_engine_lacks_is_refused_by_name() {
    let engine = Soft.make().unwrap();
    let mut entries = engine.host_cpu().entries().to_vec();
    let seven = entries.iter_mut().find(|e| (e.leaf, e.subleaf) == (7, Some(0))).unwrap();
    seven.result[1] |= Feature::Avx512f.mask() | Feature::Rtm.mask();
    let model = arch::CpuModel::new(entries);
    let error = Guest::on(Soft, &model, Mode::LONG, 1).map(drop).unwrap_err().to_string();
    assert!(error.contains("lacks rtm, avx512f,"), "{error}");
}
