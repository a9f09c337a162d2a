//! The debug-exit port of virtual machines: a written byte ends the machine with a status, as
//! test suites of operating systems expect (QEMU's isa-debug-exit).
use crate::layout::ports;
use device::{
    Device, MachineBuilder, MapError, PioDevice, PowerEvent, PowerSink, RestoreError, SavedState,
    Wire, share,
};
use std::sync::Arc;

/// The device: one write-only port.
pub struct DebugExit {
    power: Arc<dyn PowerSink>,
}

impl PioDevice for DebugExit {
    fn read_byte(&mut self, _port: u16) -> u8 {
        0xff
    }
    fn write_byte(&mut self, _port: u16, value: u8) {
        self.power.request(PowerEvent::DebugExit(value));
    }
}

impl Device for DebugExit {
    fn name(&self) -> &str {
        "debug-exit"
    }
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
    fn reset(&mut self) {}
    fn save(&self) -> SavedState {
        SavedState::stateless("debug-exit")
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.reader("debug-exit", 1)?.finish()
    }
}

/// A debug-exit port at its usual place.
#[derive(Debug)]
pub struct DebugExitConfig;

impl Wire for DebugExitConfig {
    type Handle = ();
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<(), MapError> {
        let device = share(DebugExit { power: machine.power() });
        machine.map_ports(ports::DEBUG_EXIT..=ports::DEBUG_EXIT, &(device.clone() as _))?;
        machine.add_device(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::testing::TestMachine;

    #[test]
    fn a_write_of_any_width_ends_the_machine_with_its_lowest_byte() {
        let mut machine = TestMachine::default();
        DebugExitConfig.wire(machine.builder()).unwrap();
        machine.outb(0xf4, 3);
        machine.bus().pio_write(0xf4, &0x10u32.to_le_bytes());
        assert_eq!(machine.power.take(), [PowerEvent::DebugExit(3), PowerEvent::DebugExit(0x10)]);
    }
}
