//! Attacks the server from the guest's side for as long as wanted:
//! `cargo run --profile checked -p share --example fuzz -- --seconds 60 [--seed 1]`.
//! A failure names the seed, with which it comes again.
#![allow(clippy::unwrap_used, reason = "a failure is what it looks for")]
#[path = "../tests/fuzzing/mod.rs"]
mod fuzzing;

use std::time::{Duration, Instant};

fn main() {
    let (mut seconds, mut seed) = (10, 1);
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().and_then(|value| value.parse().ok());
        match (flag.as_str(), value) {
            ("--seconds", Some(value)) => seconds = value,
            ("--seed", Some(value)) => seed = value,
            _ => {
                eprintln!("usage: fuzz [--seconds N] [--seed N]");
                std::process::exit(2);
            }
        }
    }
    let (first, end) = (seed, Instant::now() + Duration::from_secs(seconds));
    while Instant::now() < end {
        let place = fuzzing::Place::new(&std::env::temp_dir());
        println!("seed {seed}");
        place.attack(seed, 100_000);
        place.check();
        seed += 1;
    }
    println!("{} rounds of 100000 requests, nothing found", seed - first);
}
