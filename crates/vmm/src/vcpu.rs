//! vCPU threads as explicit state machines.
//!
//! A thread owns its vCPU and is in one [`Phase`]; others ask for a phase ([`Wanted`]) and kick
//! the vCPU out of the guest, the thread goes there and says so. The one lock here is a leaf: it
//! is never held while something else is locked, so that a device may pause the machine from
//! within a register access.
use crate::events::{Events, Stop};
use crate::triple_fault::TripleFault;
use engine::{EngineError, GuestMemory, Halt, Kick, Vcpu, VcpuIo};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

/// What a vCPU thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Runs the guest.
    Running,
    /// Waits; the vCPU is at an instruction boundary.
    Paused,
    /// Has ended, or is about to, and will not run the guest again.
    Finished,
}

/// What others want a vCPU thread to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Finish,
}

struct Inner {
    wanted: Wanted,
    phase: Phase,
}

/// The controls of one vCPU thread, for any thread.
pub struct VcpuControl {
    inner: Mutex<Inner>,
    changed: Condvar,
    kick: Arc<dyn Kick>,
}

impl VcpuControl {
    fn new(kick: Arc<dyn Kick>) -> Self {
        let inner = Inner { wanted: Wanted::Pause, phase: Phase::Paused };
        Self { inner: Mutex::new(inner), changed: Condvar::new(), kick }
    }

    /// The lock guards two plain enums, which no panic can leave half-written.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a phase. What has been told to finish cannot be called back.
    fn want(&self, wanted: Wanted) {
        let mut inner = self.lock();
        if inner.wanted == Wanted::Finish {
            return;
        }
        inner.wanted = wanted;
        drop(inner);
        self.changed.notify_all();
        if wanted != Wanted::Run {
            self.kick.kick();
        }
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Asks the vCPU to stop at the next boundary, without waiting for it.
    pub fn pause(&self) {
        self.want(Wanted::Pause);
    }

    /// Asks the thread to end, without waiting for it.
    pub fn finish(&self) {
        self.want(Wanted::Finish);
    }

    /// Waits until the thread does not run the guest.
    pub fn wait_stopped(&self) {
        let mut inner = self.lock();
        while inner.phase == Phase::Running {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Goes to the phase that is wanted, waiting while that is a pause. Answers whether to run.
    fn next(&self) -> bool {
        let mut inner = self.lock();
        loop {
            let (phase, answer) = match inner.wanted {
                Wanted::Run => (Phase::Running, Some(true)),
                Wanted::Pause => (Phase::Paused, None),
                Wanted::Finish => (Phase::Finished, Some(false)),
            };
            if inner.phase != phase {
                inner.phase = phase;
                self.changed.notify_all();
            }
            match answer {
                Some(run) => return run,
                None => inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Marks the thread as ended, whatever was wanted.
    fn end(&self) {
        let mut inner = self.lock();
        inner.wanted = Wanted::Finish;
        inner.phase = Phase::Finished;
        drop(inner);
        self.changed.notify_all();
    }
}

/// A vCPU thread; dropping it finishes the vCPU and joins the thread.
pub struct VcpuThread {
    control: Arc<VcpuControl>,
    thread: Option<JoinHandle<()>>,
}

/// What a vCPU thread works with.
pub struct VcpuContext {
    /// The number of the vCPU.
    pub index: u32,
    /// The machine's buses.
    pub io: Arc<dyn VcpuIo + Send>,
    /// Where the vCPU reports why it stopped.
    pub events: Arc<Events>,
    /// The guest's RAM, to show the code at a triple fault.
    pub memory: Arc<GuestMemory>,
}

impl VcpuThread {
    /// Starts the thread `vcpuN`, paused.
    ///
    /// # Errors
    /// Fails where the host gives no further thread.
    pub fn spawn(vcpu: Box<dyn Vcpu>, context: VcpuContext) -> io::Result<Self> {
        let control = Arc::new(VcpuControl::new(vcpu.kicker()));
        let in_thread = control.clone();
        let thread = Builder::new()
            .name(format!("vcpu{}", context.index))
            .spawn(move || thread_main(vcpu, &context, &in_thread))?;
        Ok(Self { control, thread: Some(thread) })
    }

    /// The controls, which outlive the thread.
    pub fn control(&self) -> &Arc<VcpuControl> {
        &self.control
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.control.finish();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported as an event by its guard.
            drop(thread.join());
        }
    }
}

/// Ends the machine if the thread unwinds: without this vCPU the guest would hang without a word.
struct PanicGuard<'a> {
    context: &'a VcpuContext,
    control: &'a VcpuControl,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let index = self.context.index;
            let defect = EngineError::Defect(format!("the thread of vCPU {index} panicked"));
            self.context.events.stop(Stop::EngineFailed { vcpu: index, error: defect });
        }
        self.control.end();
    }
}

fn thread_main(mut vcpu: Box<dyn Vcpu>, context: &VcpuContext, control: &VcpuControl) {
    let _guard = PanicGuard { context, control };
    while control.next() {
        match vcpu.run(context.io.as_ref()) {
            // A stop for a debugger comes only where one is: the guest just goes on.
            Ok(Halt::Kicked | Halt::Debug(_)) => {}
            Ok(Halt::TripleFault) => {
                // The CPU is shut down until RESET (Intel SDM 3A 6.15), and a reset makes new
                // vCPUs: this thread waits to be finished.
                control.pause_self();
                context.events.stop(triple_fault(vcpu.as_mut(), context));
            }
            Err(error) => {
                context.events.stop(Stop::EngineFailed { vcpu: context.index, error });
                return;
            }
        }
    }
}

impl VcpuControl {
    /// As [`Self::pause`], from the vCPU's own thread while it is outside the guest.
    fn pause_self(&self) {
        let mut inner = self.lock();
        if inner.wanted == Wanted::Run {
            inner.wanted = Wanted::Pause;
        }
    }
}

fn triple_fault(vcpu: &mut dyn Vcpu, context: &VcpuContext) -> Stop {
    let index = context.index;
    match vcpu.state() {
        Ok(state) => Stop::TripleFault(Box::new(TripleFault::new(index, state, &context.memory))),
        Err(error) => Stop::EngineFailed { vcpu: index, error },
    }
}
