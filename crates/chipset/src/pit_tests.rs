//! Tests of the PIT.
use super::*;
use device::testing::TestMachine;

fn machine() -> TestMachine {
    let mut machine = TestMachine::default();
    PitConfig.wire(machine.builder()).unwrap();
    machine
}
fn program(machine: &TestMachine, control: u8, count: u16) {
    machine.outb(0x43, control);
    let port = 0x40 + u16::from(control >> 6);
    machine.outb(port, count as u8);
    machine.outb(port, (count >> 8) as u8);
}
fn count(machine: &TestMachine, channel: u16) -> u16 {
    u16::from_le_bytes([machine.inb(0x40 + channel), machine.inb(0x40 + channel)])
}
fn advance_ticks(machine: &TestMachine, n: u64) {
    let now = machine.clock.now();
    machine.advance(time_of(ticks(now) + n) - now);
}

#[test]
fn times_and_ticks_convert_without_drift() {
    for n in [0, 1, 65536, FREQUENCY, FREQUENCY * 1_000_000_000 + 12345] {
        assert_eq!(ticks(time_of(n)), n);
    }
}

#[test]
fn a_rate_generator_interrupts_at_its_rate() {
    let machine = machine();
    program(&machine, 0x34, 11932); // 100 Hz
    machine.advance(Duration::from_millis(1005));
    assert_eq!(machine.interrupts.take_edges(), 100);
}

#[test]
fn a_square_wave_interrupts_once_a_period() {
    let machine = machine();
    program(&machine, 0x36, 0);
    advance_ticks(&machine, 3 * 65536);
    assert_eq!(machine.interrupts.take_edges(), 3);
}

#[test]
fn one_shots_interrupt_once() {
    for control in [0x30, 0x38] {
        let machine = machine();
        program(&machine, control, 1000);
        advance_ticks(&machine, 999);
        assert_eq!(machine.interrupts.take_edges(), 0);
        advance_ticks(&machine, 100_000);
        assert_eq!(machine.interrupts.take_edges(), 1);
        program(&machine, control, 1000);
        advance_ticks(&machine, 100_000);
        assert_eq!(machine.interrupts.take_edges(), 1, "programmed again");
    }
}

#[test]
fn nothing_wakes_an_idle_timer() {
    let machine = machine();
    assert_eq!(machine.alarms.next_deadline(), None);
    program(&machine, 0x34, 1000);
    assert!(machine.alarms.next_deadline().is_some());
    machine.outb(0x43, 0x30);
    assert_eq!(machine.alarms.next_deadline(), None);
}

#[test]
fn channel_2_times_what_its_gate_allows_and_shows_its_output_at_port_61() {
    let machine = machine();
    machine.outb(0x61, 0);
    program(&machine, 0xb0, 10_000);
    advance_ticks(&machine, 20_000);
    assert_eq!(machine.inb(0x61) & 0x20, 0, "the gate is closed");
    machine.outb(0x61, 1);
    advance_ticks(&machine, 6_000);
    machine.outb(0x61, 0);
    advance_ticks(&machine, 20_000);
    assert_eq!((machine.inb(0x61) & 0x21, count(&machine, 2)), (0, 4_000));
    machine.outb(0x61, 1);
    advance_ticks(&machine, 3_999);
    assert_eq!(machine.inb(0x61) & 0x20, 0);
    advance_ticks(&machine, 1);
    assert_eq!(machine.inb(0x61) & 0x20, 0x20);
}

#[test]
fn reads_alternate_between_the_bytes_of_a_count_that_runs_down() {
    let machine = machine();
    machine.outb(0x61, 1);
    program(&machine, 0xb0, 0xffff);
    advance_ticks(&machine, 0x100);
    assert_eq!(count(&machine, 2), 0xfeff);
    advance_ticks(&machine, 0x1_0000);
    assert_eq!(count(&machine, 2), 0xfeff, "it wraps");
}

#[test]
fn a_latched_count_stays_until_it_is_read() {
    let machine = machine();
    program(&machine, 0x34, 5000);
    advance_ticks(&machine, 1000);
    machine.outb(0x43, 0x00);
    advance_ticks(&machine, 500);
    assert_eq!(count(&machine, 0), 4000);
    assert_eq!(count(&machine, 0), 3500);
}

#[test]
fn read_back_gives_status_before_count() {
    let machine = machine();
    machine.outb(0x43, 0x34);
    machine.outb(0x43, 0xe2);
    assert_eq!(machine.inb(0x40), 0xf4, "output high, no count yet, both bytes, mode 2");
    program(&machine, 0x34, 5000);
    advance_ticks(&machine, 1000);
    machine.outb(0x43, 0xc2);
    assert_eq!(machine.inb(0x40), 0xb4);
    assert_eq!(count(&machine, 0), 4000);
}

#[test]
fn bcd_counts_are_decimal() {
    let machine = machine();
    program(&machine, 0x35, 0x1000);
    advance_ticks(&machine, 1);
    assert_eq!(count(&machine, 0), 0x0999);
}

#[test]
fn the_refresh_bit_toggles() {
    let machine = machine();
    let before = machine.inb(0x61) & 0x10;
    machine.advance(Duration::from_nanos(15_085));
    assert_ne!(machine.inb(0x61) & 0x10, before);
}

#[test]
fn a_restored_pit_interrupts_when_the_old_one_would_have() {
    let old = machine();
    program(&old, 0x34, 10_000);
    advance_ticks(&old, 4_000);
    let state = lock_first(&old).save();
    let new = machine();
    new.clock.set_now(old.clock.now());
    lock_first(&new).restore(&state).unwrap();
    assert_eq!(new.alarms.next_deadline(), old.alarms.next_deadline());
    assert_eq!(lock_first(&new).save(), state);
}

fn lock_first(machine: &TestMachine) -> std::sync::MutexGuard<'_, dyn Device + 'static> {
    device::lock(&machine.devices()[0])
}
