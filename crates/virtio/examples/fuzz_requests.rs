//! Attacks devices from the guest's side for as long as wanted:
//! `cargo run --profile checked -p virtio --example fuzz_requests -- --seconds 60 [--seed 1]`.
//! A failure names the seed, with which it comes again, as far as threads allow.
#![allow(clippy::unwrap_used, reason = "a failure is what it looks for")]
#[path = "../tests/hostile/mod.rs"]
mod hostile;

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
    hostile::count_panics();
    let (first, end) = (seed, Instant::now() + Duration::from_secs(seconds));
    while Instant::now() < end {
        hostile::attack(seed, 100);
        seed += 1;
    }
    println!("{} devices, 100 guests each, nothing found", seed - first);
}
