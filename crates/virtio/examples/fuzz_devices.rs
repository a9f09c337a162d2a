//! Attacks all devices for a time: `fuzz_devices [--seconds N] [--seed N]`. The number of the
//! attack that is under way is in the message of a panic's thread, `DEVICE NUMBER`.
use std::process::ExitCode;
use std::time::{Duration, Instant};
use virtio::testing::fuzz;

fn argument(name: &str, default: u64) -> Result<u64, String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match (arguments.next(), arguments.next()) {
        (None, _) => Ok(default),
        (Some(_), Some(value)) => value.parse().map_err(|_| format!("{name}: write a number")),
        (Some(_), None) => Err(format!("{name}: a number is missing")),
    }
}

fn run() -> Result<(), String> {
    let (seconds, seed) = (argument("--seconds", 60)?, argument("--seed", 0)?);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut done = 0u64;
    while Instant::now() < end {
        for (name, make) in fuzz::devices() {
            let number = seed.wrapping_add(done);
            let attack = std::thread::Builder::new()
                .name(format!("{name} {number}"))
                .spawn(move || fuzz::attack_by_number(make, number))
                .map_err(|error| error.to_string())?;
            attack.join().map_err(|_| format!("{name} panicked at {number}"))?;
        }
        done += 1;
    }
    println!("{done} attacks on each device, from seed {seed}: no panic, no hang");
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
