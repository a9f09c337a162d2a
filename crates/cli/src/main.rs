//! `bv`: the command.
#![forbid(unsafe_code)]

mod args;
mod disk;
mod doctor;
mod messages;
mod network;
mod progress;
mod run;
mod terminal;

use args::{Cli, Command};
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    terminal::restore_on_panic();
    match Cli::parse().command {
        Command::Run(arguments) => run::run(*arguments),
        Command::Doctor => doctor::run(),
    }
}
