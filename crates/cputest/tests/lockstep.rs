//! Guests that move between the software engine and KVM end as they do on one engine.
//!
//! `CPUTEST_CASES` sets the number of guests of each kind (by default 1500 of user code and 800 of
//! kernel code), `CPUTEST_SEED` the first seed.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use cputest::lockstep::pair::Pair;
use cputest::lockstep::program::Kind;
use cputest::lockstep::{Tally, check};
use cputest::under_test::EngineUnderTest;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Both engines, or `None` where this host has no KVM, which is then checked to be explained.
fn pair() -> Option<Pair> {
    let kvm = EngineUnderTest::Kvm.make_or_explain()?;
    Some(Pair::new(kvm.as_ref()).unwrap())
}

/// How many failures are told.
const FAILURES: usize = 5;

fn move_around(kind: Kind, count: u64) {
    let Some(mut pair) = self::pair() else { return };
    let (first, count) = (setting("CPUTEST_SEED", 1), setting("CPUTEST_CASES", count));
    let mut sum = Tally::default();
    let mut failures = Vec::new();
    for seed in first..first + count {
        match check(&mut pair, kind, seed) {
            Ok(tally) => sum += tally,
            Err(what) => failures.push(what),
        }
        if failures.len() == FAILURES {
            break;
        }
    }
    println!("{kind:?}: {count} guests from seed {first}: {sum:?}");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(count < 10 || sum.moves > 0 && sum.events > 0, "nothing was tested");
}

#[test]
fn user_code_of_64_bits_moves_between_engines_unnoticed() {
    move_around(Kind::User64, 1500);
}

#[test]
fn kernel_code_moves_between_engines_unnoticed() {
    move_around(Kind::Kernel64, 800);
}

/// A KVM without hardware behind it emulates 32-bit user code, and gives it #UD for what the
/// emulator does not know, breakpoints among it: no such guest comes to its end.
#[test]
fn user_code_of_32_bits_moves_between_engines_unnoticed_where_hardware_runs_it() {
    let Some(mut pair) = pair() else { return };
    if !pair.is_emulated() {
        return move_around(Kind::User32, 1500);
    }
    for seed in 1..10 {
        let what = check(&mut pair, Kind::User32, seed).map(|_| ()).unwrap_err();
        assert!(what.contains("kvm: Kvm: exceptions without end"), "{what}");
    }
}
