//! Control of a running machine from other threads.
use crate::events::Wake;
use device::lock;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// What a machine as a whole does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachinePhase {
    /// Assembled; the guest has not run yet.
    Ready,
    /// The guest runs.
    Running,
    /// All vCPUs and the machine's clock stand still.
    Paused,
    /// It has ended.
    Ended,
}

/// What a machine can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stop vCPUs and time.
    Pause,
    /// Go on.
    Resume,
    /// Press the power button: a guest with ACPI shuts down.
    PowerButton,
    /// Reset, as the button on the case does.
    Reset,
    /// Pull the plug.
    Stop,
}

struct State {
    commands: VecDeque<Command>,
    phase: MachinePhase,
}

/// A handle to control a machine from any thread; it outlives the machine.
#[derive(Clone)]
pub struct MachineHandle(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: Arc<Wake>,
}

impl MachineHandle {
    pub(crate) fn new(wake: Arc<Wake>) -> Self {
        let state = State { commands: VecDeque::new(), phase: MachinePhase::Ready };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), wake }))
    }

    /// Sends a command to the I/O thread, which carries commands out in order. A machine that
    /// has ended drops it.
    pub fn send(&self, command: Command) {
        let mut state = lock(&self.0.state);
        if state.phase == MachinePhase::Ended {
            return;
        }
        state.commands.push_back(command);
        drop(state);
        self.0.wake.wake();
    }

    /// What the machine does at this moment.
    pub fn phase(&self) -> MachinePhase {
        lock(&self.0.state).phase
    }

    /// Waits until the machine is in a phase, or has ended; answers in which of the two it is.
    pub fn wait_for(&self, phase: MachinePhase) -> MachinePhase {
        let mut state = lock(&self.0.state);
        while state.phase != phase && state.phase != MachinePhase::Ended {
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.phase
    }

    pub(crate) fn take(&self) -> Option<Command> {
        lock(&self.0.state).commands.pop_front()
    }

    pub(crate) fn set_phase(&self, phase: MachinePhase) {
        lock(&self.0.state).phase = phase;
        self.0.changed.notify_all();
    }
}
