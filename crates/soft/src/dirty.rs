//! The dirty log: which pages of RAM vCPUs write to.
//!
//! While it is on, a page enters a TLB's write table only after it was marked, and what writes
//! past the TLBs marks for itself. A harvest takes the marks first and then has each running vCPU
//! empty its TLB: what a vCPU wrote through an entry in between belongs to a page that this
//! harvest has, and whoever reads the page after the harvest sees it.
use crate::vm::{Mailbox, VmShared, pending};
use arch::GuestPhysical;
use engine::{DirtyLog, DirtyMap, DirtyRange, EngineError, GuestMemory};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// The log of a VM.
pub struct Log {
    on: AtomicBool,
    memory: Arc<GuestMemory>,
    /// Made when the log is first started.
    map: OnceLock<DirtyMap>,
    /// Held while the log is started, harvested or stopped.
    turn: Mutex<()>,
}

impl Log {
    /// A log of this memory that is off.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { on: AtomicBool::new(false), memory, map: OnceLock::new(), turn: Mutex::new(()) }
    }

    /// Notes a write, or that the page of `physical` becomes writable unnoticed.
    #[inline]
    pub fn note(&self, physical: u64) {
        if self.on.load(Ordering::Relaxed) {
            self.mark(physical);
        }
    }

    #[cold]
    fn mark(&self, physical: u64) {
        if let Some(map) = self.map.get() {
            map.mark(GuestPhysical(physical));
        }
    }

    /// It guards nothing that a panic could leave half-done.
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a vCPU runs, and how often it was asked to empty its TLB, and did.
#[derive(Default)]
pub struct Attendance {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Default)]
struct Counts {
    running: bool,
    asked: u64,
    done: u64,
}

impl Attendance {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_running(&self, running: bool) {
        self.lock().running = running;
        self.changed.notify_all();
    }

    /// The vCPU has emptied its TLB, after it took the word for it out of its mailbox.
    pub fn answer(&self) {
        let mut counts = self.lock();
        counts.done = counts.asked;
        self.changed.notify_all();
    }

    fn ask(&self) -> u64 {
        let mut counts = self.lock();
        counts.asked += 1;
        counts.asked
    }

    fn wait(&self, number: u64) {
        let mut counts = self.lock();
        while counts.running && counts.done < number {
            counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The time in which a vCPU may run guest code: others wait for it to answer. It looks at its
/// mailbox before it runs any.
pub struct Running {
    vm: Arc<VmShared>,
    index: u32,
}

impl Running {
    /// Begins; ends with the value.
    pub fn new(vm: Arc<VmShared>, index: u32) -> Self {
        let running = Self { vm, index };
        running.set(true);
        running
    }

    fn set(&self, on: bool) {
        if let Some(mailbox) = self.vm.mailboxes.get(self.index as usize) {
            mailbox.attendance.set_running(on);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.set(false);
    }
}

impl VmShared {
    /// Has all vCPUs empty their TLBs before they go on.
    fn empty_tlbs(&self) {
        let ask = |mailbox: &Mailbox| {
            let number = mailbox.attendance.ask();
            mailbox.post(pending::EMPTY_TLB);
            number
        };
        let numbers: Vec<_> = self.mailboxes.iter().map(ask).collect();
        for (mailbox, number) in self.mailboxes.iter().zip(numbers) {
            mailbox.attendance.wait(number);
        }
    }
}

impl DirtyLog for VmShared {
    fn start(&self) -> Result<(), EngineError> {
        let _turn = self.dirty.turn();
        let map = self.dirty.map.get_or_init(|| DirtyMap::new(&self.dirty.memory));
        self.dirty.on.store(true, Ordering::SeqCst);
        map.take();
        self.empty_tlbs();
        Ok(())
    }

    fn harvest(&self) -> Result<Vec<DirtyRange>, EngineError> {
        let _turn = self.dirty.turn();
        match self.dirty.map.get() {
            Some(map) if self.dirty.on.load(Ordering::SeqCst) => {
                let ranges = map.take();
                self.empty_tlbs();
                Ok(ranges)
            }
            _ => Err(EngineError::Unsupported("the dirty log was not started".into())),
        }
    }

    fn stop(&self) -> Result<(), EngineError> {
        let _turn = self.dirty.turn();
        self.dirty.on.store(false, Ordering::SeqCst);
        Ok(())
    }
}
