//! The machine as its user sees it, and its I/O thread.
//!
//! The thread that calls [`Machine::run`] becomes the I/O thread: it moves console bytes, fires
//! device alarms, and carries out commands, signals and what vCPUs and devices report. All state
//! of the life cycle is changed here and nowhere else.
use crate::board::{Board, Core};
use crate::config::{MachineConfig, Serial};
use crate::console::{Console, Typed, Written};
use crate::control::{Command, MachineHandle, MachinePhase};
use crate::error::VmmError;
use crate::events::{Stop, Wake};
use crate::signals::StopSignals;
use crate::triple_fault::TripleFault;
use engine::Engine;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched it off.
    PowerOff,
    /// The guest reset it, and the configuration says not to start again.
    Reset,
    /// The guest triple-faulted, and the configuration says not to start again.
    TripleFault,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u8),
    /// It was stopped from outside.
    Stopped(StopCause),
}

/// Who stopped a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// The user typed the escape key.
    Escape,
    /// The reader of the console's output went away.
    ReaderGone,
    /// [`Command::Stop`].
    Command,
    /// A second signal, or the guest did not switch off in time after the first one.
    Signal,
}

/// What the user should hear of while the machine runs.
#[derive(Debug)]
pub enum Notice<'a> {
    /// A vCPU shut down.
    TripleFault(&'a TripleFault),
    /// A signal arrived; the guest has this long to switch off.
    PowerButton(Duration),
    /// The host has no room for what the guest writes to a disk. The machine is paused, and tries
    /// again this often.
    DiskFull(Duration),
}

/// The outside world of a running machine.
pub struct Host<'a> {
    /// Signals that ask the machine to end, where it shall listen to them.
    pub signals: Option<StopSignals>,
    /// How long a guest may take to switch off after a signal.
    pub grace: Duration,
    /// Hears what the user should hear; called on the I/O thread.
    pub notify: &'a mut dyn FnMut(Notice<'_>),
}

/// One machine, ready to run.
pub struct Machine<'e> {
    config: MachineConfig,
    engine: &'e dyn Engine,
    wake: Arc<Wake>,
    handle: MachineHandle,
    console: Console,
    board: Board,
}

impl<'e> Machine<'e> {
    /// Assembles a machine and loads what it starts. The console's file is created last, so that
    /// bad input leaves nothing behind.
    ///
    /// # Errors
    /// Names what in the configuration cannot work, or what the host or engine refuses.
    pub fn new(config: MachineConfig, engine: &'e dyn Engine) -> Result<Self, VmmError> {
        Self::with_console(config, engine, |config, wake| {
            Console::open(&config.serial, wake).map_err(|source| match &config.serial {
                Serial::File(path) => VmmError::SerialFile { path: path.clone(), source },
                _ => VmmError::Host { what: "its standard input and output", source },
            })
        })
    }

    /// As [`Self::new`], with the console made by `console`.
    pub(crate) fn with_console(
        config: MachineConfig,
        engine: &'e dyn Engine,
        console: impl FnOnce(&MachineConfig, Arc<Wake>) -> Result<Console, VmmError>,
    ) -> Result<Self, VmmError> {
        precise_timers();
        let wake = Wake::new()
            .map_err(|source| VmmError::Host { what: "an eventfd", source })
            .map(Arc::new)?;
        let core = Core::load(&config, engine)?;
        let console = console(&config, wake.clone())?;
        let board = Board::assemble(&config, core, console.output(), &wake)?;
        let handle = MachineHandle::new(wake.clone());
        Ok(Self { config, engine, wake, handle, console, board })
    }

    /// A handle to control the machine while it runs.
    pub fn handle(&self) -> MachineHandle {
        self.handle.clone()
    }

    /// Runs the machine until it ends; the console's output is then written completely.
    ///
    /// # Errors
    /// The engine or the host failed, or a reset could not load the guest again.
    pub fn run(mut self, mut host: Host<'_>) -> Result<Outcome, VmmError> {
        let _ended = EndedOnDrop(self.handle.clone());
        self.resume();
        let mut io = IoThread { machine: &mut self, host: &mut host, asked: None, full: None };
        let result = io.run();
        self.console.output().release(true);
        self.board.halt();
        if !matches!(result, Ok(Outcome::Stopped(StopCause::ReaderGone))) {
            let give_up = host.signals.as_ref().map(AsFd::as_fd);
            self.console.drain(give_up).map_err(VmmError::SerialOutput)?;
        }
        result
    }

    fn resume(&mut self) {
        self.console.output().release(false);
        self.board.resume();
        self.handle.set_phase(MachinePhase::Running);
    }

    fn pause(&mut self) {
        self.console.output().release(true);
        self.board.pause();
        self.handle.set_phase(MachinePhase::Paused);
    }

    /// Makes the machine anew, as after power-up, and runs it. The console stays connected.
    fn reset(&mut self) -> Result<(), VmmError> {
        self.console.output().release(true);
        self.board.halt();
        let core = Core::load(&self.config, self.engine)?;
        self.board = Board::assemble(&self.config, core, self.console.output(), &self.wake)?;
        self.resume();
        Ok(())
    }
}

/// Tells those who wait for the machine, on any way out.
struct EndedOnDrop(MachineHandle);

impl Drop for EndedOnDrop {
    fn drop(&mut self) {
        self.0.set_phase(MachinePhase::Ended);
    }
}

/// Timers of guests are finer than the 50 µs by which Linux may delay the wake-ups of ordinary
/// threads. vCPU threads inherit this. Where it is refused, timers are just as late as usual.
fn precise_timers() {
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
}

/// A signal that follows the first one sooner than this is the same request: `timeout` and many
/// supervisors signal the process and then its group.
const REPEAT: Duration = Duration::from_millis(500);

/// What became ready.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    input: bool,
    output: bool,
}

/// The run loop with what lives only as long as it does.
struct IoThread<'a, 'e, 'h> {
    machine: &'a mut Machine<'e>,
    host: &'a mut Host<'h>,
    /// When the guest was asked to switch off.
    asked: Option<Instant>,
    /// When the machine was last paused because the host's disk is full.
    full: Option<Instant>,
}

/// How often a machine that is paused because the host's disk is full tries to go on.
const RETRY: Duration = Duration::from_secs(5);

impl IoThread<'_, '_, '_> {
    fn run(&mut self) -> Result<Outcome, VmmError> {
        loop {
            let stop = self.machine.board.events().take();
            if let Some(stop) = stop
                && let Some(outcome) = self.stopped(stop)?
            {
                return Ok(outcome);
            }
            while let Some(command) = self.machine.handle.take() {
                if let Some(outcome) = self.command(command)? {
                    return Ok(outcome);
                }
            }
            if self.signalled() {
                return Ok(Outcome::Stopped(StopCause::Signal));
            }
            if self.until_retry().is_some_and(|left| left.is_zero()) {
                self.machine.resume();
            }
            if self.machine.handle.phase() == MachinePhase::Running {
                let Machine { board, console, .. } = &mut *self.machine;
                console.feed(|bytes| board.serial_input(bytes));
                board.run_alarms();
            }
            let ready = self.wait()?;
            if let Some(cause) = self.move_console(ready)? {
                return Ok(Outcome::Stopped(cause));
            }
        }
    }

    /// The vCPUs are at rest, or nearly so, because of `stop`.
    fn stopped(&mut self, stop: Stop) -> Result<Option<Outcome>, VmmError> {
        let no_reboot = self.machine.config.no_reboot;
        match stop {
            Stop::PowerOff => return Ok(Some(Outcome::PowerOff)),
            Stop::DebugExit(value) => return Ok(Some(Outcome::DebugExit(value))),
            Stop::EngineFailed { vcpu, error } => {
                return Err(VmmError::Vcpu { vcpu, source: error });
            }
            Stop::DiskFull => {
                self.disk_full();
                return Ok(None);
            }
            Stop::Reset if no_reboot => return Ok(Some(Outcome::Reset)),
            Stop::Reset => {}
            Stop::TripleFault(fault) => {
                (self.host.notify)(Notice::TripleFault(&fault));
                if no_reboot {
                    return Ok(Some(Outcome::TripleFault));
                }
            }
        }
        self.machine.reset()?;
        Ok(None)
    }

    /// Pauses until there may be room. Says so unless it goes on from before.
    fn disk_full(&mut self) {
        if self.machine.handle.phase() != MachinePhase::Running {
            return;
        }
        self.machine.pause();
        let before = self.full.replace(Instant::now());
        if before.is_none_or(|before| before.elapsed() > 2 * RETRY) {
            (self.host.notify)(Notice::DiskFull(RETRY));
        }
    }

    /// How long until a machine that waits for room tries to go on.
    fn until_retry(&self) -> Option<Duration> {
        let paused = self.machine.handle.phase() == MachinePhase::Paused;
        self.full.filter(|_| paused).map(|full| RETRY.saturating_sub(full.elapsed()))
    }

    fn command(&mut self, command: Command) -> Result<Option<Outcome>, VmmError> {
        let phase = self.machine.handle.phase();
        match command {
            Command::Pause => {
                // A pause that is asked for lasts.
                self.full = None;
                if phase == MachinePhase::Running {
                    self.machine.pause();
                }
            }
            Command::Resume if phase == MachinePhase::Paused => self.machine.resume(),
            Command::Resume => {}
            Command::PowerButton => self.machine.board.power_button(),
            Command::Reset if self.machine.config.no_reboot => return Ok(Some(Outcome::Reset)),
            Command::Reset => self.machine.reset()?,
            Command::Stop => return Ok(Some(Outcome::Stopped(StopCause::Command))),
        }
        Ok(None)
    }

    /// Looks for signals: the first presses the power button. Answers whether patience is over.
    fn signalled(&mut self) -> bool {
        let arrived = self.host.signals.as_ref().is_some_and(StopSignals::take);
        if let Some(asked) = self.asked {
            return (arrived && asked.elapsed() >= REPEAT) || asked.elapsed() >= self.host.grace;
        }
        if arrived {
            if self.machine.handle.phase() == MachinePhase::Paused {
                self.machine.resume();
            }
            self.machine.board.power_button();
            self.asked = Some(Instant::now());
            (self.host.notify)(Notice::PowerButton(self.host.grace));
        }
        false
    }

    /// How long a guest that was asked to switch off still has.
    fn patience(&self) -> Option<Duration> {
        self.asked.map(|asked| self.host.grace.saturating_sub(asked.elapsed()))
    }

    /// Sleeps until something is to do.
    fn wait(&mut self) -> Result<Ready, VmmError> {
        let machine = &*self.machine;
        let alarm = machine.board.next_alarm().into_iter();
        let timeout = alarm.chain(self.patience()).chain(self.until_retry()).min();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let input = machine.console.wants_input();
        let output = machine.console.wants_output();
        let mut fds = Vec::with_capacity(4);
        fds.push(PollFd::new(&*machine.wake, PollFlags::IN));
        fds.extend(self.host.signals.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let input_at = input.map(|fd| push(&mut fds, PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let output_at =
            output.map(|fd| push(&mut fds, PollFd::from_borrowed_fd(fd, PollFlags::OUT)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(source) => {
                let source = io::Error::from(source);
                return Err(VmmError::Host { what: "the means to wait for events", source });
            }
        }
        let ready = |at: Option<usize>| {
            at.and_then(|at| fds.get(at)).is_some_and(|fd| !fd.revents().is_empty())
        };
        let result = Ready { input: ready(input_at), output: ready(output_at) };
        if ready(Some(0)) {
            machine.wake.clear();
        }
        Ok(result)
    }

    fn move_console(&mut self, ready: Ready) -> Result<Option<StopCause>, VmmError> {
        let console = &mut self.machine.console;
        if ready.input && console.read_input() == Typed::Escape {
            return Ok(Some(StopCause::Escape));
        }
        if ready.output
            && console.write_output().map_err(VmmError::SerialOutput)? == Written::ReaderGone
        {
            return Ok(Some(StopCause::ReaderGone));
        }
        Ok(None)
    }
}

fn push<T>(list: &mut Vec<T>, item: T) -> usize {
    list.push(item);
    list.len() - 1
}
