//! Fuzzes the image formats: `cargo run --release -p disk --example fuzz_images -- --seconds 600
//! --seed 1`. Mutated images are opened, read, written, checked and repaired. It ends with a panic,
//! or an abort after 20 seconds of one mutant or for want of memory (4 GiB), and names the mutant,
//! which `--seed` then begins with.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is what a fuzzer looks for")]

#[path = "../tests/support/fuzz.rs"]
mod fuzz;
#[allow(dead_code, reason = "fuzzing needs a part of it")]
#[path = "../tests/support/random.rs"]
mod random;

use rustix::process::{Resource, Rlimit, setrlimit};
use std::process::Command;
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
    // In memory, where nothing has to wait for a disk.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let corpus = fuzz::Corpus::with_qemu(folder.path(), &|arguments| {
        let status = Command::new("qemu-img").args(arguments).status();
        assert!(status.is_ok_and(|status| status.success()), "qemu-img, of qemu-utils, is needed");
    });
    CURRENT.store(first, Ordering::SeqCst);
    std::thread::spawn(watch);
    let start = Instant::now();
    let mut number = first;
    let mut opened = 0_u64;
    while start.elapsed() < Duration::from_secs(seconds) {
        CURRENT.store(number, Ordering::SeqCst);
        opened += u64::from(fuzz::exercise(&corpus.mutant(number), folder.path(), number));
        number += 1;
    }
    let last = number - 1;
    println!("mutants {first} to {last} in {seconds} s, of which {opened} could be opened");
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
