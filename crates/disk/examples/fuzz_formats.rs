//! Fuzzes VMDK, VDI, VHD and VHDX: `cargo run --release -p disk --example fuzz_formats --
//! --seconds 600 --seed 1`. Mutated images are opened, read and written, in memory. It ends with a
//! panic, or an abort after 20 seconds of one mutant or for want of memory (4 GiB), and names the
//! mutant, which `--seed` then begins with. Mutant n is one of kind n modulo the kinds of images.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is what a fuzzer looks for")]

#[path = "../tests/support/mutants.rs"]
mod mutants;
#[allow(dead_code, reason = "fuzzing needs a part of it")]
#[path = "../tests/support/random.rs"]
mod random;
#[path = "../tests/support/recording.rs"]
mod recording;

/// Where the tests have it.
mod support {
    pub use crate::random::Random;
}

use rustix::process::{Resource, Rlimit, setrlimit};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);
const MEMORY: u64 = 4 << 30;

static CURRENT: AtomicU64 = AtomicU64::new(0);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        Some(arguments.get(at + 1)?.parse::<u64>().expect("a number follows each flag"))
    };
    let seconds = value("--seconds").unwrap_or(60);
    let first = value("--seed").unwrap_or(1);
    let limit = Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) };
    setrlimit(Resource::As, limit).expect("memory can be limited");
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("mutant {}: {panic}", CURRENT.load(Ordering::SeqCst));
        std::process::abort();
    }));
    let subjects = mutants::subjects();
    let mut opened = vec![(0, 0); subjects.len()];
    CURRENT.store(first, Ordering::SeqCst);
    std::thread::spawn(watch);
    let start = Instant::now();
    let mut number = first;
    while start.elapsed() < Duration::from_secs(seconds) {
        CURRENT.store(number, Ordering::SeqCst);
        let index = (number % subjects.len() as u64) as usize;
        opened[index].0 += u64::from(subjects[index].try_mutant(number));
        opened[index].1 += 1;
        number += 1;
    }
    println!("{} mutants, from {first} to {}, in {seconds} s", number - first, number - 1);
    for (subject, (opened, all)) in subjects.iter().zip(opened) {
        println!("{}: {opened} of {all} opened", subject.name);
    }
}

/// Aborts where one mutant takes too long.
fn watch() {
    loop {
        let before = CURRENT.load(Ordering::SeqCst);
        std::thread::sleep(PATIENCE);
        if CURRENT.load(Ordering::SeqCst) == before {
            eprintln!("mutant {before} does not end");
            std::process::abort();
        }
    }
}
