//! Tests of the HPET.
use super::*;
use crate::pit::PitConfig;
use crate::rtc::RtcConfig;
use device::lock;
use device::testing::TestMachine;

fn machine() -> (TestMachine, Shared<Hpet>) {
    let mut machine = TestMachine::default();
    let (_, pit) = PitConfig.wire(machine.builder()).unwrap();
    let config = RtcConfig { low_ram: 1 << 30, high_ram: 0 };
    let (_, rtc) = config.wire(machine.builder()).unwrap();
    let hpet = HpetConfig { pit, rtc }.wire(machine.builder()).unwrap();
    (machine, hpet)
}
fn get(machine: &TestMachine, register: u64) -> u64 {
    let mut data = [0; 8];
    machine.bus().mmio_read(GuestPhysical(layout::HPET.0 + register), &mut data);
    u64::from_le_bytes(data)
}
fn set(machine: &TestMachine, register: u64, value: u64) {
    machine.bus().mmio_write(GuestPhysical(layout::HPET.0 + register), &value.to_le_bytes());
}
fn set32(machine: &TestMachine, register: u64, value: u32) {
    machine.bus().mmio_write(GuestPhysical(layout::HPET.0 + register), &value.to_le_bytes());
}
const fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}
const COMPARATOR_2: u64 = 0x148;
const CONFIG_2: u64 = 0x140;

#[test]
fn the_counter_runs_at_100_mhz_when_enabled() {
    let (machine, _) = machine();
    assert_eq!(get(&machine, CAPABILITIES), 0x0098_9680_8086_a201);
    machine.advance(us(5));
    assert_eq!(get(&machine, COUNTER), 0);
    set(&machine, CONFIGURATION, ENABLE);
    machine.advance(us(7));
    assert_eq!(get(&machine, COUNTER), 700);
    set(&machine, CONFIGURATION, 0);
    machine.advance(us(9));
    assert_eq!(get(&machine, COUNTER), 700);
    set32(&machine, COUNTER + 4, 1);
    assert_eq!(get(&machine, COUNTER), (1 << 32) + 700);
}

#[test]
fn a_one_shot_interrupts_once_at_its_route() {
    let (machine, _) = machine();
    set(&machine, CONFIGURATION, ENABLE);
    set(&machine, CONFIG_2, TIMER_ENABLE | 20 << TIMER_ROUTE_SHIFT);
    set(&machine, COMPARATOR_2, 1000);
    machine.interrupts.take();
    machine.advance(us(9));
    assert_eq!(machine.interrupts.take(), []);
    machine.advance(us(100));
    assert_eq!(machine.interrupts.take(), [(Gsi(20), true), (Gsi(20), false)]);
    assert_eq!(machine.alarms.next_deadline(), None);
}

#[test]
fn the_legacy_route_replaces_pit_and_rtc() {
    let (machine, _) = machine();
    for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0x10)] {
        machine.outb(port, value);
    }
    set(&machine, CONFIGURATION, ENABLE | LEGACY_ROUTE);
    machine.advance(Duration::from_millis(10));
    assert_eq!(machine.interrupts.take_edges(), 0, "the PIT is cut off");
    // As Linux programs a periodic tick: comparator with VAL_SET, then the period.
    let counter = get(&machine, COUNTER) as u32;
    set32(
        &machine,
        TIMER_FIRST,
        (TIMER_ENABLE | TIMER_PERIODIC | TIMER_SET_VALUE | TIMER_32_BITS) as u32,
    );
    set32(&machine, TIMER_FIRST + 8, counter + 100_000);
    set32(&machine, TIMER_FIRST + 8, 100_000);
    machine.advance(Duration::from_millis(10));
    let edges = machine.interrupts.take();
    assert_eq!(edges.len(), 20);
    assert!(edges.iter().all(|(gsi, _)| *gsi == Gsi(2)));
    set(&machine, CONFIGURATION, ENABLE);
    machine.advance(Duration::from_millis(7));
    assert!(machine.interrupts.take_edges() >= 2, "the PIT is back");
}

#[test]
fn a_level_stays_until_its_status_is_cleared() {
    let (machine, _) = machine();
    set(&machine, CONFIGURATION, ENABLE);
    set(&machine, CONFIG_2, TIMER_ENABLE | TIMER_LEVEL | 16 << TIMER_ROUTE_SHIFT);
    set(&machine, COMPARATOR_2, get(&machine, COUNTER) + 100);
    machine.interrupts.take();
    machine.advance(us(10));
    assert_eq!(machine.interrupts.take(), [(Gsi(16), true)]);
    assert_eq!(get(&machine, STATUS), 1 << 2);
    set(&machine, STATUS, 1 << 2);
    assert_eq!(machine.interrupts.take(), [(Gsi(16), false)]);
}

#[test]
fn a_timer_can_send_messages() {
    let (machine, _) = machine();
    set(&machine, CONFIGURATION, ENABLE);
    set(&machine, 0x150, 0xfee0_1000 << 32 | 0x4123);
    set(&machine, CONFIG_2, TIMER_ENABLE | TIMER_FSB_ENABLE);
    set(&machine, COMPARATOR_2, 500);
    machine.msi.take();
    machine.advance(us(10));
    assert_eq!(machine.msi.take(), [(0xfee0_1000, 0x4123)]);
}

#[test]
fn a_comparator_that_was_passed_waits_for_the_wrap_in_32_bit_mode() {
    let (machine, _) = machine();
    machine.interrupts.take();
    set(&machine, COUNTER, 5_000);
    set(&machine, CONFIGURATION, ENABLE);
    set(&machine, CONFIG_2, TIMER_ENABLE | TIMER_32_BITS | 16 << TIMER_ROUTE_SHIFT);
    set(&machine, COMPARATOR_2, 4_000);
    machine.advance(Duration::from_secs(42));
    assert_eq!(machine.interrupts.take_edges(), 0);
    machine.advance(Duration::from_secs(1));
    assert_eq!(machine.interrupts.take_edges(), 1);
}

#[test]
fn the_shortest_period_does_not_flood_the_machine() {
    let (machine, _) = machine();
    set(&machine, CONFIGURATION, ENABLE);
    set(&machine, CONFIG_2, TIMER_ENABLE | TIMER_PERIODIC | TIMER_SET_VALUE | 16 << 9);
    set(&machine, COMPARATOR_2, get(&machine, COUNTER) + 1);
    machine.interrupts.take();
    machine.advance(Duration::from_millis(1));
    assert!(machine.interrupts.take_edges() <= 21);
}

#[test]
fn registers_that_do_not_exist_are_harmless() {
    let (machine, _) = machine();
    for register in (0..layout::HPET_LENGTH - 8).step_by(4) {
        set(&machine, register, u64::MAX);
        get(&machine, register);
    }
    machine.advance(Duration::from_millis(1));
}

#[test]
fn a_restored_hpet_interrupts_when_the_old_one_would_have() {
    let (old, hpet) = machine();
    set(&old, CONFIGURATION, ENABLE | LEGACY_ROUTE);
    set(&old, CONFIG_2, TIMER_ENABLE | 20 << TIMER_ROUTE_SHIFT);
    set(&old, COMPARATOR_2, 1000);
    let state = lock(&hpet).save();
    let (new, hpet) = machine();
    lock(&hpet).restore(&state).unwrap();
    assert_eq!(lock(&hpet).save(), state);
    assert_eq!(new.alarms.next_deadline(), Some(us(10)));
}
