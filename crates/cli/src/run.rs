//! `bv run`.
use crate::args::{Guest, Run, SerialArg, Switch};
use crate::messages::{self, say};
use crate::network::{self, NetworkError};
use crate::progress::Bar;
use crate::terminal::{self, RawMode};
use ::disk::DiskError;
use image::{Cache, ImageError, debian};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use vmm::{
    BootError, BootSource, DeviceConfig, Engine, EngineError, Host, Image, Machine, MachineConfig,
    Module, Notice, Outcome, Selection, Serial, Stdio, StopCause, StopSignals, VmmError,
};

/// The command line of Debian's kernel: its console is ours, and only errors are worth a line.
const DEBIAN_CMDLINE: &str = "console=ttyS0 quiet";
/// How long a guest may take to switch off after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// The status of a failure that is not the input's fault.
const FAILED: u8 = 1;
/// The status of input that cannot work, as clap has it.
const BAD_INPUT: u8 = 2;

/// Why `bv run` ends without an outcome of the guest.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("--engine: this CPU engine does not work on this host")]
    Engine(#[source] EngineError),
    #[error("--disk; options follow the path, as in disk.img,format=raw")]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Machine(#[from] VmmError),
    #[error("the terminal cannot be prepared; use --serial none or redirect standard input")]
    Terminal(#[source] std::io::Error),
    #[error("signals cannot be caught")]
    Signals(#[source] std::io::Error),
}

impl RunError {
    fn status(&self) -> u8 {
        match self {
            Self::Image(_) | Self::Boot(_) | Self::Disk(_) => BAD_INPUT,
            Self::Network(error) if error.is_bad_input() => BAD_INPUT,
            Self::Machine(error) if error.is_bad_input() => BAD_INPUT,
            Self::Network(_)
            | Self::Machine(_)
            | Self::Engine(_)
            | Self::Terminal(_)
            | Self::Signals(_) => FAILED,
        }
    }
}

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
    vmm::check(arguments.memory, arguments.cpus, arguments.cpu, engine.as_ref())?;
    if let Some(line) = fallback {
        say(&line);
    }
    let keyboard = uses_keyboard(&arguments.serial);
    let disks = arguments.disks.iter().enumerate().map(|(number, disk)| disk.open(number));
    let disks = disks.collect::<Result<_, _>>()?;
    let nics = network::cards(&arguments)?;
    let (boot, guest) = boot_source(&arguments)?;
    let config = MachineConfig {
        memory: arguments.memory,
        vcpus: arguments.cpus,
        cpu: arguments.cpu,
        boot,
        serial: serial(&arguments.serial, keyboard),
        no_reboot: arguments.no_reboot,
        debug_exit: arguments.debug_exit,
        devices: DeviceConfig { disks, nics, rng: arguments.rng == Switch::On },
    };
    let machine = Machine::new(config, engine.as_ref())?;
    if keyboard {
        say(&introduction(&guest, &arguments, engine.as_ref()));
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
    drop(raw);
    Ok(outcome?)
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

fn introduction(guest: &str, arguments: &Run, engine: &dyn Engine) -> String {
    let plural = if arguments.cpus == 1 { "" } else { "s" };
    format!(
        "{guest}: {} CPU{plural}, {}, {} engine; leave with Ctrl-]",
        arguments.cpus,
        arguments.memory,
        engine.name()
    )
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

/// What to boot, and what to call it.
fn boot_source(arguments: &Run) -> Result<(BootSource, String), RunError> {
    let cmdline = |default: &str| arguments.cmdline.clone().unwrap_or_else(|| default.to_owned());
    match (arguments.guest, &arguments.kernel) {
        (Some(Guest::Hello), _) => {
            let kernel = Image::embedded("hello".into(), hello_guest::IMAGE);
            let source =
                BootSource { kernel, initrd: None, modules: Vec::new(), cmdline: cmdline("") };
            Ok((source, "hello".into()))
        }
        (None, Some(path)) => {
            let kernel = Image::open(path)?;
            let initrd = arguments.initrd.as_deref().map(Image::open).transpose()?;
            let modules = arguments.modules.iter().map(|text| module(text));
            let modules = modules.collect::<Result<_, BootError>>()?;
            let source = BootSource { kernel, initrd, modules, cmdline: cmdline("") };
            Ok((source, path.display().to_string()))
        }
        (None, None) => {
            let debian = debian::prepare(&Cache::open()?, &mut Bar::default())?;
            let source = BootSource {
                kernel: Image::open(&debian.kernel)?,
                initrd: Some(Image::open(&debian.initrd)?),
                modules: Vec::new(),
                cmdline: cmdline(DEBIAN_CMDLINE),
            };
            Ok((source, format!("Debian {}", debian.version)))
        }
    }
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
