//! A short fuzzing campaign with a fixed seed; `fuzz-cpu` runs long ones.
use cputest::campaign::parent;
use cputest::under_test::EngineUnderTest;
use std::path::Path;
use std::time::Duration;

#[test]
fn arbitrary_code_from_arbitrary_states_neither_breaks_nor_escapes_the_engine() {
    let seconds = std::env::var("CPUTEST_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
    let seed = std::env::var("CPUTEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let time = Duration::from_secs(seconds.unwrap_or(15));
    let program = Path::new(env!("CARGO_BIN_EXE_fuzz-cpu"));
    let findings = parent(program, EngineUnderTest::Soft, seed, time, 5).unwrap();
    assert!(findings.failures.is_empty(), "{findings:?}");
    assert!(findings.cases > 0);
}
