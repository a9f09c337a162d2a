//! Interrupt lines of devices: a message, sent when the line is triggered.
use crate::vm::VmShared;
use engine::{EngineError, Msi, MsiLine};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// A line of a VM.
pub struct Line {
    shared: Arc<VmShared>,
    message: Mutex<Option<Msi>>,
}

impl Line {
    /// A line without a message.
    pub fn new(shared: Arc<VmShared>) -> Self {
        Self { shared, message: Mutex::default() }
    }
}

impl MsiLine for Line {
    fn program(&self, message: Option<Msi>) -> Result<(), EngineError> {
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = message;
        Ok(())
    }

    fn trigger(&self) {
        let message = *self.message.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(message) = message {
            self.shared.signal_msi(message);
        }
    }

    fn event(&self) -> Result<Option<OwnedFd>, EngineError> {
        Ok(None)
    }
}
