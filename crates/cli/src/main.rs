//! `bv`: the command.
#![forbid(unsafe_code)]

mod args;
mod disk;
mod disk_arg;
mod doctor;
mod images;
mod machines;
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
        Command::Disk { command } => disk::run(&command),
        Command::Ls => machines::list(),
        Command::Rm { names } => machines::remove(&names),
        Command::Doctor => doctor::run(),
        Command::Image(command) => images::run(command),
    }
}
