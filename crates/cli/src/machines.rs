//! `bv ls` and `bv rm`: the machines that were made from images.
use crate::messages::{self, say};
use host::{HostError, MachineName, Machines};
use std::fmt::Write as _;
use std::process::ExitCode;

/// Prints a line for each machine.
pub fn list() -> ExitCode {
    finish(Machines::open().and_then(|machines| machines.list()).map(|listed| {
        let mut text = format!("{:<20} {:<20} {:<8} DISK\n", "NAME", "IMAGE", "STATE");
        for machine in listed {
            let state = if machine.running { "running" } else { "stopped" };
            let disk = indicatif::BinaryBytes(machine.on_disk);
            // Writing to a string does not fail.
            let _ = writeln!(text, "{:<20} {:<20} {state:<8} {disk}", machine.name, machine.image);
        }
        messages::print(&text);
    }))
}

/// Removes machines, up to the first that cannot be.
pub fn remove(names: &[MachineName]) -> ExitCode {
    finish(Machines::open().and_then(|machines| {
        for name in names {
            let bytes = machines.remove(name)?;
            messages::print(&format!("{name}: gave back {}\n", indicatif::BinaryBytes(bytes)));
        }
        Ok(())
    }))
}

fn finish(result: Result<(), HostError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&messages::chain(&error));
            ExitCode::FAILURE
        }
    }
}
