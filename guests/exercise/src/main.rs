//! Exercises an operating system, and prints only what does not depend on time, addresses or
//! the order in which threads run: two machines that are both right print the same. Works in
//! the present folder, which it leaves as it was.
#![allow(clippy::unwrap_used, reason = "a panic ends the program, which is the result of the test")]

mod files;
mod hash;
mod memory;
mod numbers;
mod processes;
mod signals;
mod sockets;
mod threads;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((role, arguments)) = arguments.split_first() {
        return processes::play(role, arguments);
    }
    hash::exercise();
    numbers::exercise();
    threads::exercise();
    files::exercise();
    memory::exercise();
    signals::exercise();
    processes::exercise();
    sockets::exercise();
    println!("exercise: done");
    ExitCode::SUCCESS
}
