//! Lets hostile guests and peers at the NAT.
//!
//! `cargo run --profile checked -p net --example fuzz_nat -- [--seconds N] [--seed N]`
//!
//! Each round has a seed of its own, counted up from the given one. A round that finds something
//! panics and names its seed before.
#![allow(clippy::unwrap_used, reason = "a fuzzer fails by panicking")]

#[path = "../tests/nat/fuzz.rs"]
mod fuzz;

use std::time::{Duration, Instant};

/// Frames of a round.
const ROUND: usize = 20_000;

fn option(name: &str, default: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1).map_or(default, |value| value.parse().unwrap())
}

fn main() {
    // A panic of the NAT's own thread must not go unseen.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let (seconds, first) = (option("--seconds", 60), option("--seed", 0));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0;
    while Instant::now() < end {
        let seed = first + rounds;
        let mut fuzz = fuzz::Fuzz::new(seed);
        println!("seed {seed}");
        for step in 0..ROUND {
            fuzz.step();
            if step % 5000 == 4999 {
                fuzz.check();
                println!("  {} frames, {:?} connections and sockets", step + 1, fuzz.census());
            }
        }
        rounds += 1;
    }
    println!("{rounds} rounds of {ROUND} frames, none found anything");
}
