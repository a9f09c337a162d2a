//! Runs arbitrary code from arbitrary states in the engine under test, for as long as asked.
//!
//! `fuzz-cpu --minutes 20 --seed 1` runs a campaign; `fuzz-cpu --case 4711` runs one case, in
//! this process, to look at it.
use cputest::campaign::{child, parent};
use cputest::fuzz::Fuzzer;
use cputest::under_test::EngineUnderTest;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str =
    "usage: fuzz-cpu [--engine soft|kvm] [--minutes M | --seconds S] [--seed N] [--case SEED]";

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fuzz-cpu: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitCode, Box<dyn std::error::Error>> {
    if let [flag, engine, first, time] = arguments
        && flag == "--child"
    {
        child(engine.parse()?, first.parse()?, Duration::from_millis(time.parse()?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let (mut seconds, mut seed) = (60u64, 1u64);
    let mut engine = EngineUnderTest::Soft;
    for pair in arguments.chunks(2) {
        let [flag, value] = pair else { return Err(USAGE.into()) };
        if flag == "--engine" {
            engine = value.parse()?;
            continue;
        }
        let value: u64 = value.parse().map_err(|_| USAGE)?;
        match flag.as_str() {
            "--minutes" => seconds = value * 60,
            "--seconds" => seconds = value,
            "--seed" => seed = value,
            "--case" => {
                println!("{:?}", Fuzzer::new(engine)?.run(value)?);
                return Ok(ExitCode::SUCCESS);
            }
            _ => return Err(USAGE.into()),
        }
    }
    let program = std::env::current_exe()?;
    let findings = parent(&program, engine, seed, Duration::from_secs(seconds), 100)?;
    println!(
        "{} cases from seed {seed}, {} shut the guest down, {} failures",
        findings.cases,
        findings.triple_faults,
        findings.failures.len()
    );
    for (seed, what) in &findings.failures {
        println!("seed {seed}: {what}");
    }
    Ok(if findings.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
