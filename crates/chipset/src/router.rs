//! From interrupt lines to interrupt controllers.
use crate::ioapic::IoApic;
use crate::pic::{Pic, PicOutput};
use device::{Gsi, InterruptSink, MachineBuilder, MapError, MsiSink, Shared, Wire, lock, share};
use std::sync::Arc;

/// Owns the PIC and the I/O APIC and gives each line's level to both: GSI n goes to I/O APIC
/// input n, and below 16 to PIC input n, where GSI 2 is ISA IRQ 0 (see
/// [`crate::layout::isa_irq`]). It is made before the rest of the machine, which takes it as its
/// [`InterruptSink`], and wired like any device.
///
/// An engine calls [`InterruptRouter::acknowledge_pic`] and
/// [`InterruptRouter::end_of_interrupt`] without holding a lock that its `set_pic_output` or
/// `signal_msi` takes: both are called back with the controller's lock held.
pub struct InterruptRouter {
    pic: Shared<Pic>,
    ioapic: Shared<IoApic>,
}

impl InterruptRouter {
    /// Both controllers. `pic_output` gets the level of the PIC's INTR output, `msi` the
    /// messages of the I/O APIC.
    pub fn new(pic_output: PicOutput, msi: Arc<dyn MsiSink>) -> Arc<Self> {
        let (pic, ioapic) = (share(Pic::new(pic_output)), share(IoApic::new(msi)));
        Arc::new(Self { pic, ioapic })
    }

    /// The acknowledge cycle of a vCPU to the PIC: [`Pic::acknowledge`].
    pub fn acknowledge_pic(&self) -> Option<u8> {
        lock(&self.pic).acknowledge()
    }

    /// A guest ended a level-triggered interrupt: [`IoApic::end_of_interrupt`].
    pub fn end_of_interrupt(&self, vector: u8) {
        lock(&self.ioapic).end_of_interrupt(vector);
    }
}

impl InterruptSink for InterruptRouter {
    fn set_level(&self, gsi: Gsi, high: bool) {
        let irq = match gsi.0 {
            0 => None,
            2 => Some(0),
            n => u8::try_from(n).ok().filter(|irq| *irq < 16),
        };
        if let Some(irq) = irq {
            lock(&self.pic).set_irq(irq, high);
        }
        if let Ok(pin) = usize::try_from(gsi.0) {
            lock(&self.ioapic).set_pin(pin, high);
        }
    }
}

impl Wire for &InterruptRouter {
    type Handle = ();
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<(), MapError> {
        Pic::wire(&self.pic, machine)?;
        IoApic::wire(&self.ioapic, machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;
    use device::testing::{RecordingMsi, TestMachine};
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn the_timer_reaches_irq_0_of_the_pic_and_input_2_of_the_ioapic() {
        let intr = Arc::new(AtomicBool::new(false));
        let (copy, msi) = (intr.clone(), Arc::new(RecordingMsi::default()));
        let output: PicOutput = Arc::new(move |high| copy.store(high, Ordering::Relaxed));
        let router = InterruptRouter::new(output, msi.clone());
        let mut machine = TestMachine::default();
        router.wire(machine.builder()).unwrap();
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)] {
            machine.outb(port, value);
        }
        let window = device::GuestPhysical(layout::IOAPIC.0 + 0x10);
        machine.bus().mmio_write(layout::IOAPIC, &0x14u32.to_le_bytes());
        machine.bus().mmio_write(window, &0x30u32.to_le_bytes());

        router.set_level(layout::isa_irq(layout::PIT_IRQ), true);
        assert!(intr.load(Ordering::Relaxed));
        assert_eq!(router.acknowledge_pic(), Some(0x20));
        assert_eq!(msi.take(), [(0xfee0_0000, 0x30)]);
        router.set_level(Gsi(u32::MAX), true);
    }
}
