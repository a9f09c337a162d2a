//! Where everything is: the fixed ports, addresses and interrupt lines of the PC. Devices wire
//! themselves there and the ACPI tables are built from the same constants.
use device::{Gsi, GuestPhysical};

/// Ports.
pub mod ports {
    /// Master PIC: command, data at +1.
    pub const PIC_MASTER: u16 = 0x20;
    /// Slave PIC: command, data at +1.
    pub const PIC_SLAVE: u16 = 0xa0;
    /// Edge/level control registers of both PICs: master, slave at +1.
    pub const ELCR: u16 = 0x4d0;
    /// PIT: channels 0 to 2, control at +3.
    pub const PIT: u16 = 0x40;
    /// System control port B: gate and output of PIT channel 2, refresh toggle.
    pub const SYSTEM_CONTROL_B: u16 = 0x61;
    /// i8042 data.
    pub const I8042_DATA: u16 = 0x60;
    /// i8042 command and status.
    pub const I8042_COMMAND: u16 = 0x64;
    /// System control port A: fast A20 and reset.
    pub const SYSTEM_CONTROL_A: u16 = 0x92;
    /// RTC index; data at +1.
    pub const RTC: u16 = 0x70;
    /// POST codes and delays. No device claims it: writes are dropped without a lock.
    pub const POST: u16 = 0x80;
    /// The other port that is written for delays. No device claims it.
    pub const DELAY: u16 = 0xed;
    /// Debug exit: a written byte ends the machine.
    pub const DEBUG_EXIT: u16 = 0xf4;
    /// First ports of the four serial ports, 8 ports each.
    pub const SERIAL: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
    /// PCI configuration address (dword only; its byte at +1 is the reset control).
    pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
    /// Reset control register, also the ACPI reset register.
    pub const RESET_CONTROL: u16 = 0xcf9;
    /// PCI configuration data, 4 ports.
    pub const PCI_CONFIG_DATA: u16 = 0xcfc;
    /// ACPI PM1a event block: status, enable at +2; 4 ports.
    pub const PM1A_EVENT: u16 = 0x600;
    /// ACPI PM1a control block, 2 ports.
    pub const PM1A_CONTROL: u16 = 0x604;
    /// ACPI PM timer, 4 ports, 32 bits.
    pub const PM_TIMER: u16 = 0x608;
    /// ACPI GPE0 block: 2 ports of status, 2 of enable.
    pub const GPE0: u16 = 0x620;
}

/// Length of the PM1a event block, in bytes.
pub const PM1A_EVENT_LENGTH: u8 = 4;
/// Length of the PM1a control block, in bytes.
pub const PM1A_CONTROL_LENGTH: u8 = 2;
/// Length of the PM timer block, in bytes.
pub const PM_TIMER_LENGTH: u8 = 4;
/// Length of the GPE0 block (status and enable), in bytes.
pub const GPE0_LENGTH: u8 = 4;
/// SLP_TYP of S5 for the `\_S5` package (ACPI 6.5 §7.4.2.6).
pub const S5_SLEEP_TYPE: u8 = 5;
/// Value that resets the machine when written to [`ports::RESET_CONTROL`].
pub const RESET_VALUE: u8 = 0x06;
/// CMOS index of the century, for the FADT.
pub const RTC_CENTURY_INDEX: u8 = 0x32;

/// ISA IRQ of the PIT.
pub const PIT_IRQ: u8 = 0;
/// ISA IRQ of the keyboard.
pub const KEYBOARD_IRQ: u8 = 1;
/// ISA IRQs of the four serial ports.
pub const SERIAL_IRQS: [u8; 4] = [4, 3, 4, 3];
/// ISA IRQ of the RTC.
pub const RTC_IRQ: u8 = 8;
/// ISA IRQ of the ACPI SCI, level-triggered, active high.
pub const SCI_IRQ: u8 = 9;
/// ISA IRQ of the mouse.
pub const AUX_IRQ: u8 = 12;

/// The GSI of an ISA IRQ: the same number, but 2 for IRQ 0. The MADT says so in an interrupt
/// source override.
pub const fn isa_irq(irq: u8) -> Gsi {
    match irq {
        0 => Gsi(2),
        irq => Gsi(irq as u32),
    }
}

/// The IOAPIC's registers.
pub const IOAPIC: GuestPhysical = GuestPhysical(0xfec0_0000);
/// Bytes of the IOAPIC's registers.
pub const IOAPIC_LENGTH: u64 = 0x1000;
/// APIC id of the IOAPIC.
pub const IOAPIC_ID: u8 = 0;
/// Number of inputs of the IOAPIC: GSIs 0 to 23.
pub const IOAPIC_PINS: usize = 24;
/// The local APICs' registers (which belong to the engine).
pub const LAPIC: GuestPhysical = GuestPhysical(0xfee0_0000);
/// The HPET's registers.
pub const HPET: GuestPhysical = GuestPhysical(0xfed0_0000);
/// Bytes of the HPET's registers.
pub const HPET_LENGTH: u64 = 0x400;
/// PCI configuration space in memory (ECAM), bus 0 first.
pub const PCI_ECAM: GuestPhysical = GuestPhysical(0xe000_0000);
/// Bytes of ECAM for one bus (PCI Express 5.0 §7.2.2).
pub const PCI_ECAM_LENGTH_PER_BUS: u64 = 1 << 20;
/// Number of PCI buses.
pub const PCI_BUSES: u8 = 1;
/// Guest-physical addresses for the registers of PCI devices below 4 GiB.
pub const PCI_MMIO_START: GuestPhysical = GuestPhysical(0xc000_0000);
/// First address after [`PCI_MMIO_START`]'s range.
pub const PCI_MMIO_END: GuestPhysical = PCI_ECAM;
/// End of the RAM below 4 GiB at most: RAM beyond it continues at 4 GiB.
pub const LOW_RAM_END: GuestPhysical = PCI_MMIO_START;
