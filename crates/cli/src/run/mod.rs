//! `bv run`.
mod error;
mod system;

use crate::args::{BalloonArg, GuestArg, Run, SerialArg, Switch};
use crate::messages::{self, say};
use crate::network;
use crate::progress::Bar;
use crate::terminal::{self, RawMode};
use error::{FAILED, RunError};
use image::{Cache, debian};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use system::System;
use vmm::{
    BalloonControl, BootError, BootSource, Bytes, DeviceConfig, Engine, Host, Image, Machine,
    MachineConfig, Module, Mount, Notice, Outcome, Selection, Serial, Stdio, StopCause,
    StopSignals, VmmError, VsockHost,
};

/// The command line of Debian's kernel: its console is ours, and only errors are worth a line.
const DEBIAN_CMDLINE: &str = "console=ttyS0 quiet";
/// Memory of a machine if its user says nothing: for kernels and for whole systems.
const MEMORY: Bytes = Bytes::mib(512);
const SYSTEM_MEMORY: Bytes = Bytes::mib(1024);
/// How long a guest may take to switch off after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// Runs a machine until it ends; the answer is the status of the process.
pub fn run(arguments: Run) -> ExitCode {
    match try_run(arguments) {
        Ok(outcome) => ExitCode::from(status(outcome)),
        Err(error) => {
            say(&messages::chain(&error));
            ExitCode::from(error.status())
        }
    }
}

/// The status of the process for each way in which a guest ends.
fn status(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::PowerOff | Outcome::Reset => 0,
        Outcome::TripleFault => FAILED,
        // As QEMU's isa-debug-exit; a status has eight bits.
        Outcome::DebugExit(value) => value << 1 | 1,
        Outcome::Stopped(StopCause::Signal) => FAILED,
        Outcome::Stopped(StopCause::Escape | StopCause::ReaderGone | StopCause::Command) => 0,
    }
}

fn try_run(arguments: Run) -> Result<Outcome, RunError> {
    let Selection { engine, fallback } =
        vmm::engine(arguments.engine.into()).map_err(RunError::Engine)?;
    // What can be told to be wrong without a download is told before it.
    let memory = arguments.memory.unwrap_or(match arguments.guest {
        Some(GuestArg::Image(_) | GuestArg::Disk(_)) => SYSTEM_MEMORY,
        Some(GuestArg::Hello) | None => MEMORY,
    });
    vmm::check(memory, arguments.cpus, arguments.cpu, engine.as_ref())?;
    if let Some(line) = fallback {
        say(&line);
    }
    let keyboard = uses_keyboard(&arguments.serial);
    let mut devices = devices(&arguments)?;
    let System { boot, disks, title, kept } = system(&arguments)?;
    devices.disks.splice(0..0, disks);
    let config = MachineConfig {
        memory,
        vcpus: arguments.cpus,
        cpu: arguments.cpu,
        boot,
        serial: serial(&arguments.serial, keyboard),
        no_reboot: arguments.no_reboot,
        debug_exit: arguments.debug_exit,
        devices,
    };
    let machine = Machine::new(config, engine.as_ref())?;
    if keyboard {
        say(&introduction(&title, memory, &arguments, engine.as_ref()));
    }
    // An image is told by its seed where its folders go.
    if kept.is_none() {
        arguments.mounts.iter().enumerate().for_each(|(n, mount)| say(&mount_hint(n, mount)));
    }
    // Before the terminal is changed, so that a signal finds someone to restore it.
    let signals = StopSignals::catch().map_err(RunError::Signals)?;
    let raw = if keyboard {
        Some(RawMode::enter(rustix::stdio::stdin()).map_err(RunError::Terminal)?)
    } else {
        None
    };
    let notify = &mut |notice: Notice<'_>| say(&describe(&notice, arguments.no_reboot));
    let outcome = machine.run(Host { signals: Some(signals), grace: GRACE, notify });
    match outcome {
        Ok(Outcome::Stopped(StopCause::Signal)) => say("stopped the machine by force"),
        Ok(Outcome::Stopped(StopCause::Escape)) => say("left; the machine was stopped"),
        _ => {}
    }
    drop((raw, kept));
    Ok(outcome?)
}

/// What is plugged into the machine.
fn devices(arguments: &Run) -> Result<DeviceConfig, RunError> {
    let disks = arguments.disks.iter().enumerate().map(|(number, disk)| disk.open(number));
    let balloon = match arguments.balloon {
        BalloonArg::Target(bytes) => Some(BalloonControl::new(bytes.0)),
        BalloonArg::Off => None,
    };
    Ok(DeviceConfig {
        disks: disks.collect::<Result<_, _>>()?,
        nics: network::cards(arguments)?,
        rng: arguments.rng == Switch::On,
        shares: vmm::open_shares(&arguments.mounts)?,
        balloon,
        vsock: arguments.vsock.as_ref().map(VsockHost::new).transpose().map_err(VmmError::from)?,
    })
}

fn describe(notice: &Notice<'_>, no_reboot: bool) -> String {
    match notice {
        Notice::TripleFault(fault) if no_reboot => fault.to_string(),
        Notice::TripleFault(fault) => {
            format!("{fault}\n  the machine resets; --no-reboot ends it instead")
        }
        Notice::DiskFull(retry) => format!(
            "the host has no room for what the guest writes to its disk: the machine is paused\n  \
             free some space, and it goes on within {} seconds",
            retry.as_secs()
        ),
        Notice::PowerButton(grace) => format!(
            "asked the guest to switch off; it has {} seconds (signal again to stop it now)",
            grace.as_secs()
        ),
    }
}

fn introduction(guest: &str, memory: Bytes, arguments: &Run, engine: &dyn Engine) -> String {
    let plural = if arguments.cpus == 1 { "" } else { "s" };
    format!(
        "{guest}: {} CPU{plural}, {memory}, {} engine; leave with Ctrl-]",
        arguments.cpus,
        engine.name()
    )
}

/// How a guest that is told nothing at its start mounts a shared folder.
fn mount_hint(number: usize, mount: &Mount) -> String {
    let host = mount.host.display();
    let options = if mount.read_only { " -o ro" } else { "" };
    format!("in the guest, {host} is: mount -t virtiofs{options} share{number} {}", mount.guest)
}

/// Whether the guest's console is the user's keyboard.
fn uses_keyboard(serial: &SerialArg) -> bool {
    *serial == SerialArg::Stdio && terminal::is_ours(rustix::stdio::stdin())
}

fn serial(argument: &SerialArg, keyboard: bool) -> Serial {
    match argument {
        SerialArg::None => Serial::None,
        SerialArg::File(path) => Serial::File(path.clone()),
        SerialArg::Stdio => {
            // A terminal that is another job's must not be read.
            let input = keyboard || !rustix::termios::isatty(rustix::stdio::stdin());
            Serial::Stdio(Stdio { input, escape: keyboard.then_some(terminal::ESCAPE) })
        }
    }
}

/// What to run.
fn system(arguments: &Run) -> Result<System, RunError> {
    match &arguments.guest {
        Some(GuestArg::Image(name)) => return system::from_image(arguments, name),
        Some(GuestArg::Disk(path)) => return system::from_disk(arguments, path),
        Some(GuestArg::Hello) if arguments.kernel.is_some() => return Err(RunError::HelloKernel),
        Some(GuestArg::Hello) | None => {}
    }
    if let Some(flag) = arguments.image_flag() {
        return Err(RunError::OnlyImages(flag));
    }
    let (boot, title) = boot_source(arguments)?;
    Ok(System { boot, disks: Vec::new(), title, kept: None })
}

/// What to boot, and what to call it, where it is no whole system.
fn boot_source(arguments: &Run) -> Result<(BootSource, String), RunError> {
    let cmdline = |default: &str| arguments.cmdline.clone().unwrap_or_else(|| default.to_owned());
    if arguments.guest == Some(GuestArg::Hello) {
        let kernel = Image::embedded("hello".into(), hello_guest::IMAGE);
        let source = BootSource { kernel, initrd: None, modules: Vec::new(), cmdline: cmdline("") };
        return Ok((source, "hello".into()));
    }
    if let Some(path) = &arguments.kernel {
        return Ok((kernel(arguments, path)?, path.display().to_string()));
    }
    let debian = debian::prepare(&Cache::open()?, &mut Bar::default())?;
    let source = BootSource {
        kernel: Image::open(&debian.kernel)?,
        initrd: Some(Image::open(&debian.initrd)?),
        modules: Vec::new(),
        cmdline: cmdline(DEBIAN_CMDLINE),
    };
    Ok((source, format!("Debian {}", debian.version)))
}

/// The kernel that the user names, with what goes with it.
fn kernel(arguments: &Run, path: &Path) -> Result<BootSource, BootError> {
    let modules = arguments.modules.iter().map(|text| module(text));
    Ok(BootSource {
        kernel: Image::open(path)?,
        initrd: arguments.initrd.as_deref().map(Image::open).transpose()?,
        modules: modules.collect::<Result<_, BootError>>()?,
        cmdline: arguments.cmdline.clone().unwrap_or_default(),
    })
}

/// A module from its path and arguments, separated by the first space.
fn module(text: &str) -> Result<Module, BootError> {
    let path = text.split_once(' ').map_or(text, |(path, _)| path);
    Ok(Module { image: Image::open(Path::new(path))?, arguments: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_folder_comes_with_the_command_that_mounts_it() {
        let hint = |text: &str| mount_hint(1, &text.parse().unwrap());
        let command = "in the guest, /a is: mount -t virtiofs -o ro share1 /b";
        assert_eq!(hint("/a:/b:ro"), command);
        assert_eq!(hint("/a:/b"), command.replace(" -o ro", ""));
    }

    #[test]
    fn the_debug_exit_status_is_odd_and_holds_the_value() {
        assert_eq!(status(Outcome::DebugExit(0)), 1);
        assert_eq!(status(Outcome::DebugExit(0x10)), 0x21);
        assert_eq!(status(Outcome::DebugExit(0xff)), 0xff);
    }

    #[test]
    fn a_guest_that_ends_by_itself_is_a_success_and_one_that_crashes_is_not() {
        assert_eq!(status(Outcome::PowerOff), 0);
        assert_eq!(status(Outcome::Reset), 0);
        assert_eq!(status(Outcome::Stopped(StopCause::Escape)), 0);
        assert_eq!(status(Outcome::TripleFault), 1);
    }

    #[test]
    fn only_a_keyboard_has_an_escape_key() {
        let stdio = |keyboard| match serial(&SerialArg::Stdio, keyboard) {
            Serial::Stdio(stdio) => stdio.escape,
            _ => None,
        };
        assert_eq!(stdio(true), Some(terminal::ESCAPE));
        assert_eq!(stdio(false), None);
    }
}
