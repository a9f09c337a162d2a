//! The reset control register at port 0xcf9, which is also the ACPI reset register.
//!
//! Source: ICH10 §13.7.5. The host bridge hands it the byte accesses between its configuration
//! registers.
use device::{PowerEvent, PowerSink};

/// The bit that resets; the other writable bits choose how, which is all one here.
const RESET_CPU: u8 = 1 << 2;
const WRITABLE: u8 = 1 << 1 | 1 << 3;

/// The register.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ResetControl {
    pub(crate) value: u8,
}

impl ResetControl {
    /// Writes the register, which may reset the machine.
    pub(crate) fn write(&mut self, value: u8, power: &dyn PowerSink) {
        self.value = value & WRITABLE;
        if value & RESET_CPU != 0 {
            power.request(PowerEvent::Reset);
        }
    }
}
