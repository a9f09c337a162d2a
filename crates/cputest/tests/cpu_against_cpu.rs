//! The CPU against the CPU: each instruction form natively and in the engine, bit for bit.
//!
//! `CPUTEST_CASES` sets the number of cases of each form (default 30), `CPUTEST_SEED` the seed,
//! `CPUTEST_FORM` picks the forms whose name contains it, and `CPUTEST_TRACE` names each case
//! before it runs.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use cputest::coverage::{Coverage, coverage, markdown};
use cputest::native::{BATCH, NativeCpu};
use cputest::sweep::{cases_of, compare_forms, covered_forms};
use iced_x86::Code;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn chosen(wide: bool) -> Vec<Code> {
    let part = std::env::var("CPUTEST_FORM").unwrap_or_default();
    covered_forms(wide).into_iter().filter(|c| format!("{c:?}").contains(&part)).collect()
}

fn compare(wide: bool, mode: &str) {
    let (count, seed) = (setting("CPUTEST_CASES", 30), setting("CPUTEST_SEED", 1));
    let report = compare_forms(&chosen(wide), wide, count as usize, seed).unwrap();
    let summary = report.summary(mode);
    println!("{summary}");
    assert!(report.failing.is_empty(), "seed {seed}: {summary}");
}

#[test]
fn every_64_bit_instruction_form_gives_what_the_real_cpu_gives() {
    compare(true, "64-bit");
}

#[test]
fn every_32_bit_instruction_form_gives_what_the_real_cpu_gives() {
    compare(false, "32-bit");
}

#[test]
fn every_instruction_form_is_covered_or_excluded_by_name() {
    let gaps: Vec<Code> = Code::values().filter(|c| coverage(*c) == Coverage::Gap).collect();
    assert!(gaps.is_empty(), "{} forms without a case: {gaps:?}", gaps.len());
}

#[test]
fn the_list_of_covered_forms_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/COVERAGE.md");
    let current = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        current == markdown(),
        "COVERAGE.md is out of date; run `cargo run -p cputest --bin coverage > {path}`"
    );
}

#[test]
fn the_real_cpu_gives_the_same_outcome_twice() {
    let mut native = NativeCpu::start().unwrap();
    for wide in [true, false] {
        for code in covered_forms(wide) {
            let cases = cases_of(code, wide, 2, 7);
            for batch in cases.chunks(BATCH) {
                let first = native.run(batch).unwrap();
                let second = native.run(batch).unwrap();
                for ((case, a), b) in batch.iter().zip(&first).zip(&second) {
                    let found = cputest::compare::differences(case, a, b);
                    let told = cputest::compare::describe(case);
                    assert!(found.is_empty(), "{told}\n{found:?}");
                }
            }
        }
    }
}
