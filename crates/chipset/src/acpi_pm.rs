//! ACPI power management: PM1a event and control blocks, PM timer, GPE0.
//!
//! Source: ACPI 6.5 §4.8 (fixed hardware). SCI_EN is always set, so there is no SMI_CMD.
use crate::layout::{self, ports};
use device::state::SaveFields;
use device::{
    Alarm, AlarmDevice, Clock, Device, IrqLine, MachineBuilder, MapError, PioDevice, PowerEvent,
    PowerSink, RestoreError, SavedState, Shared, SharedDevice, Width, Wire, saved_fields, share,
};
use std::sync::Arc;
use std::time::Duration;

/// Frequency of the PM timer in Hz (§4.8.2.1).
pub const TIMER_FREQUENCY: u64 = 3_579_545;
const NANOSECONDS: u64 = 1_000_000_000;

/// Bits of the PM1 status and enable registers (§4.8.3.1).
const PM1_TIMER: u16 = 1 << 0;
const PM1_GLOBAL: u16 = 1 << 5;
const PM1_POWER_BUTTON: u16 = 1 << 8;
const PM1_SLEEP_BUTTON: u16 = 1 << 9;
const PM1_RTC: u16 = 1 << 10;
const PM1_WAKE: u16 = 1 << 15;
const PM1_STATUS: u16 =
    PM1_TIMER | PM1_GLOBAL | PM1_POWER_BUTTON | PM1_SLEEP_BUTTON | PM1_RTC | PM1_WAKE;
const PM1_ENABLE: u16 = PM1_TIMER | PM1_GLOBAL | PM1_POWER_BUTTON | PM1_SLEEP_BUTTON | PM1_RTC;
/// Bits of the PM1 control register (§4.8.3.2).
const CONTROL_SCI_ENABLE: u16 = 1 << 0;
const CONTROL_SLEEP_TYPE_SHIFT: u16 = 10;
const CONTROL_SLEEP_ENABLE: u16 = 1 << 13;
const CONTROL_WRITABLE: u16 = 7 << CONTROL_SLEEP_TYPE_SHIFT | 1 << 1;
/// Number of general-purpose events (§4.8.4.1).
const GPES: u8 = 16;

/// First ports of the registers, for byte addressing.
const ENABLE: u16 = ports::PM1A_EVENT + 2;
const GPE_ENABLE: u16 = ports::GPE0 + 2;

/// Timer ticks in `time`.
fn ticks(time: Duration) -> u64 {
    // Fits: 2^30 ns × 2^22 Hz < 2^64.
    time.as_secs() * TIMER_FREQUENCY
        + u64::from(time.subsec_nanos()) * TIMER_FREQUENCY / NANOSECONDS
}

/// The first moment at which [`ticks`] has reached `ticks`.
fn time_of(ticks: u64) -> Duration {
    let nanos = (ticks % TIMER_FREQUENCY * NANOSECONDS).div_ceil(TIMER_FREQUENCY);
    Duration::from_secs(ticks / TIMER_FREQUENCY) + Duration::from_nanos(nanos)
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// How often bit 31 of the timer has changed, as far as the status tells.
    carries_seen: u64,
}
saved_fields!(Registers: status, enable, control, gpe_status, gpe_enable, carries_seen);

/// The power management device.
pub struct AcpiPm {
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    sci: IrqLine,
    power: Arc<dyn PowerSink>,
    registers: Registers,
}

impl AcpiPm {
    /// Presses and releases the power button: the guest is asked to switch off.
    pub fn press_power_button(&mut self) {
        self.registers.status |= PM1_POWER_BUTTON;
        self.update();
    }

    /// Signals general-purpose event 0 to 15 (others do not exist and are ignored).
    pub fn raise_event(&mut self, event: u8) {
        if event < GPES {
            self.registers.gpe_status |= 1 << event;
        }
        self.update();
    }

    /// Notes the timer's carries, drives the SCI, and sets the alarm for the next carry where
    /// the guest wants to know it.
    fn update(&mut self) {
        let carries = ticks(self.clock.now()) >> 31;
        let registers = &mut self.registers;
        if carries != registers.carries_seen {
            registers.carries_seen = carries;
            registers.status |= PM1_TIMER;
        }
        let events = registers.status & registers.enable & PM1_ENABLE;
        let general = registers.gpe_status & registers.gpe_enable;
        self.sci.set(events != 0 || general != 0);
        let wanted = registers.enable & PM1_TIMER != 0 && registers.status & PM1_TIMER == 0;
        self.alarm.set(wanted.then(|| time_of(carries.saturating_add(1) << 31)));
    }

    fn write_control(&mut self, value: u16) {
        self.registers.control = value & CONTROL_WRITABLE;
        let sleep_type = value >> CONTROL_SLEEP_TYPE_SHIFT & 7;
        if value & CONTROL_SLEEP_ENABLE != 0 && sleep_type == u16::from(layout::S5_SLEEP_TYPE) {
            self.power.request(PowerEvent::PowerOff);
        }
    }

    /// The 16-bit register that holds a port.
    fn register(&mut self, port: u16) -> u16 {
        match port & !1 {
            ports::PM1A_EVENT => {
                self.update();
                self.registers.status
            }
            ENABLE => self.registers.enable,
            ports::PM1A_CONTROL => self.registers.control | CONTROL_SCI_ENABLE,
            ports::GPE0 => self.registers.gpe_status,
            GPE_ENABLE => self.registers.gpe_enable,
            _ => 0,
        }
    }

    /// Writes the bits of `mask` to the 16-bit register that holds a port. Status bits are
    /// cleared by writing ones.
    fn set_register(&mut self, port: u16, value: u16, mask: u16) {
        let merge = |old: u16| old & !mask | value & mask;
        let registers = &mut self.registers;
        match port & !1 {
            ports::PM1A_EVENT => registers.status &= !(value & mask),
            ENABLE => registers.enable = merge(registers.enable) & PM1_ENABLE,
            ports::PM1A_CONTROL => {
                let merged = merge(registers.control);
                self.write_control(merged);
            }
            ports::GPE0 => registers.gpe_status &= !(value & mask),
            GPE_ENABLE => registers.gpe_enable = merge(registers.gpe_enable),
            _ => return,
        }
        self.update();
    }
}

impl PioDevice for AcpiPm {
    fn read_byte(&mut self, port: u16) -> u8 {
        if (ports::PM_TIMER..ports::PM_TIMER + 4).contains(&port) {
            let timer = ticks(self.clock.now()) as u32;
            return (timer >> (8 * (port - ports::PM_TIMER))) as u8;
        }
        (self.register(port) >> (8 * (port & 1))) as u8
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        let shift = 8 * (port & 1);
        self.set_register(port, u16::from(value) << shift, 0xff << shift);
    }

    fn read(&mut self, port: u16, width: Width) -> u32 {
        if port == ports::PM_TIMER && width == Width::Dword {
            return ticks(self.clock.now()) as u32;
        }
        // Registers are words; a dword spans two.
        match width {
            Width::Word if port & 1 == 0 => self.register(port).into(),
            Width::Dword if port & 1 == 0 => {
                u32::from(self.register(port)) | u32::from(self.register(port + 2)) << 16
            }
            _ => (0..width.bytes().min(4))
                .fold(0, |value, i| value | u32::from(self.read_byte(port + i as u16)) << (8 * i)),
        }
    }

    fn write(&mut self, port: u16, width: Width, value: u32) {
        // A word at a time: SLP_TYP and SLP_EN are in one byte, but status and enable words must
        // not be seen half-written.
        match width {
            Width::Word if port & 1 == 0 => self.set_register(port, value as u16, u16::MAX),
            Width::Dword if port & 1 == 0 => {
                self.set_register(port, value as u16, u16::MAX);
                self.set_register(port + 2, (value >> 16) as u16, u16::MAX);
            }
            _ => {
                for i in 0..width.bytes().min(4) {
                    self.write_byte(port + i as u16, (value >> (8 * i)) as u8);
                }
            }
        }
    }
}

impl AlarmDevice for AcpiPm {
    fn on_alarm(&mut self, _now: Duration) {
        self.update();
    }
}

impl Device for AcpiPm {
    fn name(&self) -> &str {
        "acpi-pm"
    }
    fn pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
    fn alarms(&mut self) -> Option<&mut dyn AlarmDevice> {
        Some(self)
    }
    fn reset(&mut self) {
        let carries_seen = ticks(self.clock.now()) >> 31;
        self.registers = Registers { carries_seen, ..Registers::default() };
        self.update();
    }
    fn save(&self) -> SavedState {
        let mut state = SavedState::new("acpi-pm", 1);
        self.registers.save_fields("", &mut state);
        state
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let mut reader = state.reader("acpi-pm", 1)?;
        self.registers.restore_fields("", &mut reader)?;
        if self.registers.status & !PM1_STATUS != 0 {
            return Err(reader.out_of_range("status"));
        }
        reader.finish()?;
        self.update();
        Ok(())
    }
}

/// ACPI power management at the ports of [`crate::layout`], with the SCI on IRQ 9.
#[derive(Debug)]
pub struct AcpiPmConfig;

impl Wire for AcpiPmConfig {
    type Handle = Shared<AcpiPm>;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<Self::Handle, MapError> {
        let alarm = machine.alarm();
        let pm = share(AcpiPm {
            clock: machine.clock(),
            alarm: alarm.clone(),
            sci: machine.irq(layout::isa_irq(layout::SCI_IRQ)),
            power: machine.power(),
            registers: Registers::default(),
        });
        let device: SharedDevice = pm.clone();
        alarm.bind(Arc::downgrade(&device));
        for (first, length) in [
            (ports::PM1A_EVENT, layout::PM1A_EVENT_LENGTH),
            (ports::PM1A_CONTROL, layout::PM1A_CONTROL_LENGTH),
            (ports::PM_TIMER, layout::PM_TIMER_LENGTH),
            (ports::GPE0, layout::GPE0_LENGTH),
        ] {
            machine.map_ports(first..=first + u16::from(length) - 1, &device)?;
        }
        machine.add_device(device)?;
        Ok(pm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::testing::TestMachine;
    use device::{Gsi, lock};

    fn machine() -> (TestMachine, Shared<AcpiPm>) {
        let mut machine = TestMachine::default();
        let pm = AcpiPmConfig.wire(machine.builder()).unwrap();
        (machine, pm)
    }
    fn inw(machine: &TestMachine, port: u16) -> u16 {
        let mut data = [0; 2];
        machine.bus().pio_read(port, &mut data);
        u16::from_le_bytes(data)
    }
    fn outw(machine: &TestMachine, port: u16, value: u16) {
        machine.bus().pio_write(port, &value.to_le_bytes());
    }
    fn timer(machine: &TestMachine) -> u32 {
        let mut data = [0; 4];
        machine.bus().pio_read(ports::PM_TIMER, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn sleep_type_5_switches_off_and_others_do_not() {
        let (machine, _) = machine();
        outw(&machine, ports::PM1A_CONTROL, 3 << 10 | CONTROL_SLEEP_ENABLE);
        outw(&machine, ports::PM1A_CONTROL, 5 << 10);
        assert_eq!(machine.power.take(), []);
        outw(&machine, ports::PM1A_CONTROL, 5 << 10 | CONTROL_SLEEP_ENABLE);
        assert_eq!(machine.power.take(), [PowerEvent::PowerOff]);
        assert_eq!(inw(&machine, ports::PM1A_CONTROL), 5 << 10 | CONTROL_SCI_ENABLE);
        machine.outb(ports::PM1A_CONTROL + 1, 0x34);
        assert_eq!(machine.power.take(), [PowerEvent::PowerOff], "by byte too");
    }

    #[test]
    fn the_power_button_raises_the_sci_until_it_is_acknowledged() {
        let (machine, pm) = machine();
        lock(&pm).press_power_button();
        assert_eq!(machine.interrupts.take(), [], "not enabled yet");
        outw(&machine, ENABLE, PM1_POWER_BUTTON);
        assert_eq!(inw(&machine, ports::PM1A_EVENT), PM1_POWER_BUTTON);
        outw(&machine, ports::PM1A_EVENT, PM1_POWER_BUTTON);
        assert_eq!(machine.interrupts.take(), [(Gsi(9), true), (Gsi(9), false)]);
    }

    #[test]
    fn a_general_purpose_event_raises_the_sci() {
        let (machine, pm) = machine();
        outw(&machine, GPE_ENABLE, 1 << 3);
        lock(&pm).raise_event(3);
        lock(&pm).raise_event(255);
        assert_eq!(inw(&machine, ports::GPE0), 1 << 3);
        machine.outb(ports::GPE0, 1 << 3);
        assert_eq!(machine.interrupts.take(), [(Gsi(9), true), (Gsi(9), false)]);
    }

    #[test]
    fn the_timer_runs_at_its_frequency_and_wraps_at_32_bits() {
        let (machine, _) = machine();
        machine.clock.advance(Duration::from_secs(1));
        assert_eq!(timer(&machine), 3_579_545);
        machine.clock.set_now(time_of((1 << 32) + 7));
        assert_eq!(timer(&machine), 7);
        assert_eq!(machine.inb(ports::PM_TIMER), 7);
    }

    #[test]
    fn a_carry_of_the_timer_is_an_event() {
        let (machine, _) = machine();
        assert_eq!(machine.alarms.next_deadline(), None);
        outw(&machine, ENABLE, PM1_TIMER);
        for carry in 1..=3 {
            machine.advance(time_of(carry << 31) - machine.clock.now());
            assert_eq!(machine.interrupts.take(), [(Gsi(9), true)]);
            outw(&machine, ports::PM1A_EVENT, PM1_TIMER);
            assert_eq!(machine.interrupts.take(), [(Gsi(9), false)]);
        }
    }

    #[test]
    fn a_pressed_button_survives_a_restore() {
        let (old, pm) = machine();
        outw(&old, ENABLE, PM1_POWER_BUTTON);
        lock(&pm).press_power_button();
        let state = lock(&pm).save();
        let (new, pm) = machine();
        lock(&pm).restore(&state).unwrap();
        assert_eq!(new.interrupts.take(), [(Gsi(9), true)]);
        assert_eq!(lock(&pm).save(), state);
    }
}
