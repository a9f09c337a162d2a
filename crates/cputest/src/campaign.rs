//! Fuzzing in child processes, so that an engine that crashes is reported with its seed and the
//! work goes on.
use crate::fuzz::Fuzzer;
use crate::under_test::EngineUnderTest;
use engine::Halt;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a campaign found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Cases run.
    pub cases: u64,
    /// How many of them shut the guest's CPU down.
    pub triple_faults: u64,
    /// Seeds that went wrong, and how.
    pub failures: Vec<(u64, String)>,
}

/// The child's work: cases from seed `first` on, until `time` is up. Says each seed before it
/// runs it, so that the parent knows which one ended the process.
///
/// # Errors
/// Fails where the engine cannot make a VM or the parent is gone.
pub fn child(
    engine: EngineUnderTest,
    first: u64,
    time: Duration,
) -> Result<(), Box<dyn std::error::Error>> {
    let end = Instant::now() + time;
    let mut fuzzer = Fuzzer::new(engine)?;
    let mut out = io::stdout().lock();
    let mut seed = first;
    while Instant::now() < end {
        writeln!(out, "{seed}")?;
        out.flush()?;
        match fuzzer.run(seed) {
            Ok(Halt::TripleFault) => writeln!(out, "shutdown")?,
            Ok(Halt::Kicked | Halt::Debug(_)) => {}
            Err(what) => {
                writeln!(out, "failed: {what}")?;
                // What an engine in an unknown state does next would say little.
                return Ok(());
            }
        }
        seed = seed.wrapping_add(1);
    }
    writeln!(out, "end")?;
    Ok(())
}

/// Runs children until `time` is up or `limit` failures are found.
///
/// # Errors
/// Fails where a child cannot be started.
pub fn parent(
    program: &Path,
    engine: EngineUnderTest,
    seed: u64,
    time: Duration,
    limit: usize,
) -> io::Result<Findings> {
    let end = Instant::now() + time;
    let mut findings = Findings::default();
    let mut first = seed;
    while findings.failures.len() < limit {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let mut child = Command::new(program)
            .args(["--child", engine.name(), &first.to_string(), &left.as_millis().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut last = first;
        let (mut told, mut ended) = (None, false);
        for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()) {
            let line = line?;
            match line.parse() {
                Ok(number) => {
                    last = number;
                    findings.cases += 1;
                }
                Err(_) if line == "shutdown" => findings.triple_faults += 1,
                Err(_) if line == "end" => ended = true,
                Err(_) => told = Some(line),
            }
        }
        let status = child.wait()?;
        if !ended {
            let what = told.unwrap_or_else(|| format!("the process ended: {status}"));
            eprintln!("seed {last}: {what}");
            findings.failures.push((last, what));
        }
        first = last.wrapping_add(1);
    }
    Ok(findings)
}
