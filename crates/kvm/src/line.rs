//! Interrupt lines of devices on KVM.
//!
//! A trigger is one KVM_SIGNAL_MSI (0.45 µs on the machine where this was measured), which beats
//! the write to an irqfd (0.54 µs) and needs no route, whose every change costs 17 to 36 µs. The
//! irqfd is there for those who cannot make the call, and only once one asks for the event.
use crate::error::refused;
use crate::raw;
use crate::vm::VmShared;
use engine::{EngineError, Msi, MsiLine};
use kvm_bindings::{KVM_IRQFD_FLAG_DEASSIGN, kvm_irqfd};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A line of a VM.
pub struct Line {
    shared: Arc<VmShared>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    message: Option<Msi>,
    wire: Option<Wire>,
}

/// An eventfd that triggers the line, by a route of its own.
struct Wire {
    shared: Arc<VmShared>,
    event: OwnedFd,
    gsi: u32,
    assigned: bool,
}

impl Wire {
    fn irqfd(&self, flags: u32) -> kvm_irqfd {
        kvm_irqfd { fd: self.event.as_raw_fd() as u32, gsi: self.gsi, flags, ..Default::default() }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.assigned {
            let result = raw::irqfd(&self.shared.mapped.fd, &self.irqfd(KVM_IRQFD_FLAG_DEASSIGN));
            // It is refused only for what was not assigned.
            debug_assert!(result.is_ok(), "{result:?}");
        }
        self.shared.end_line_route(self.gsi);
    }
}

impl Line {
    /// A line without a message.
    pub fn new(shared: Arc<VmShared>) -> Self {
        Self { shared, state: Mutex::default() }
    }

    /// A panic cannot leave the state half-changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_wire(&self, message: Option<Msi>) -> Result<Wire, EngineError> {
        let event = raw::eventfd().map_err(refused(
            "the host gives no event for an interrupt line; raise this process's limit of open \
             files (`ulimit -n`)",
        ))?;
        let gsi = self.shared.new_line_route(message)?;
        let mut wire = Wire { shared: self.shared.clone(), event, gsi, assigned: false };
        raw::irqfd(&self.shared.mapped.fd, &wire.irqfd(0))
            .map_err(refused("KVM does not take an interrupt line's event (KVM_IRQFD)"))?;
        wire.assigned = true;
        Ok(wire)
    }
}

impl MsiLine for Line {
    fn program(&self, message: Option<Msi>) -> Result<(), EngineError> {
        let mut state = self.lock();
        if state.message == message {
            return Ok(());
        }
        if let Some(wire) = &state.wire {
            self.shared.set_line_route(wire.gsi, message)?;
        }
        state.message = message;
        Ok(())
    }

    fn trigger(&self) {
        let message = self.lock().message;
        if let Some(message) = message {
            self.shared.signal(message);
        }
    }

    fn event(&self) -> Result<Option<OwnedFd>, EngineError> {
        let mut state = self.lock();
        let message = state.message;
        let wire = match &mut state.wire {
            Some(wire) => wire,
            none => none.insert(self.make_wire(message)?),
        };
        wire.event.try_clone().map(Some).map_err(|source| EngineError::Host {
            what: "the host does not let an interrupt line's event be duplicated; raise this \
                   process's limit of open files (`ulimit -n`)"
                .into(),
            source,
        })
    }
}
