//! The comparison itself: every covered form, several cases each, native against engine.
use crate::case::Case;
use crate::compare::{describe, differences};
use crate::forms::{exclusion, missing_here};
use crate::generate::generate;
use crate::guest::GuestCpu;
use crate::native::{BATCH, NativeCpu};
use crate::rng::Rng;
use crate::under_test::EngineUnderTest;
use iced_x86::Code;
use std::collections::BTreeMap;
use std::error::Error;

/// What a comparison found.
#[derive(Default)]
pub struct Report {
    /// Cases run.
    pub cases: usize,
    /// Forms of which at least one case ran.
    pub forms: usize,
    /// Cases whose instruction went through to the next.
    pub completed: usize,
    /// How many cases of each form differ.
    pub failing: BTreeMap<String, usize>,
    /// The first failures in full.
    pub details: Vec<String>,
}

/// How many failures are told in full, in all and of each form.
const DETAILS: usize = 40;
const DETAILS_PER_FORM: usize = 1;

/// The forms of one mode that a comparison on this host covers.
pub fn covered_forms(wide: bool) -> Vec<Code> {
    Code::values()
        .filter(|code| exclusion(*code).is_none() && missing_here(*code).is_none())
        .filter(|code| if wide { code.op_code().mode64() } else { code.op_code().mode32() })
        .collect()
}

/// The cases of one form; equal seeds give equal cases.
pub fn cases_of(code: Code, wide: bool, count: usize, seed: u64) -> Vec<Case> {
    let mut rng = Rng::new(seed ^ (code as u64) << 20 ^ u64::from(wide) << 50);
    (0..count).filter_map(|_| generate(code, wide, &mut rng)).collect()
}

/// Runs `count` cases of each form both ways.
///
/// # Errors
/// Fails where the native child or the engine cannot go on; differences are in the report.
pub fn compare_forms(
    forms: &[Code],
    wide: bool,
    count: usize,
    seed: u64,
) -> Result<Report, Box<dyn Error>> {
    let mut native = NativeCpu::start()?;
    let mut guest = GuestCpu::new(EngineUnderTest::Soft)?;
    let mut report = Report::default();
    let trace = std::env::var_os("CPUTEST_TRACE").is_some();
    for &code in forms {
        let cases = cases_of(code, wide, count, seed);
        report.forms += usize::from(!cases.is_empty());
        for batch in cases.chunks(BATCH) {
            let expected = native.run(batch)?;
            for (case, native) in batch.iter().zip(&expected) {
                if trace {
                    // Where the engine takes the process with it, the last line tells the case.
                    eprintln!("{}", describe(case));
                }
                let engine = guest.run(case).map_err(|e| format!("{}: {e}", describe(case)))?;
                report.cases += 1;
                report.completed += usize::from(native.vector == 13 && native.rip != case.rip);
                let found = differences(case, native, &engine);
                if !found.is_empty() {
                    report.fail(code, case, &found);
                }
            }
        }
    }
    Ok(report)
}

impl Report {
    fn fail(&mut self, code: Code, case: &Case, found: &[String]) {
        let count = self.failing.entry(format!("{code:?}")).or_default();
        *count += 1;
        if *count <= DETAILS_PER_FORM && self.details.len() < DETAILS {
            self.details.push(format!("{}\n    {}", describe(case), found.join("\n    ")));
        }
    }

    /// The report in words.
    pub fn summary(&self, mode: &str) -> String {
        let failing: usize = self.failing.values().sum();
        let mut text = format!(
            "{mode}: {} cases of {} forms, {} ran to the next instruction, {failing} differ\n",
            self.cases, self.forms, self.completed
        );
        for detail in &self.details {
            text.push_str(detail);
            text.push('\n');
        }
        if !self.failing.is_empty() {
            text.push_str(&format!("failing forms: {:?}\n", self.failing));
        }
        text
    }
}
