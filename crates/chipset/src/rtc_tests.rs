//! Tests of the real-time clock.
use super::*;
use device::lock;
use device::testing::TestMachine;

/// 2024-02-29 (a Thursday) 23:59:58 UTC.
const LEAP_DAY: u64 = 1_709_251_198;

fn machine() -> (TestMachine, Shared<Rtc>) {
    let mut machine = TestMachine::default();
    machine.clock.set_wall(Duration::from_secs(LEAP_DAY));
    let config = RtcConfig { low_ram: 3 << 30, high_ram: 1 << 30 };
    let (rtc, _) = config.wire(machine.builder()).unwrap();
    (machine, rtc)
}
fn get(machine: &TestMachine, index: u8) -> u8 {
    machine.outb(0x70, index);
    machine.inb(0x71)
}
fn set(machine: &TestMachine, index: u8, value: u8) {
    machine.outb(0x70, index);
    machine.outb(0x71, value);
}
fn time(machine: &TestMachine) -> [u8; 7] {
    [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|index| get(machine, index))
}

#[test]
fn the_time_is_the_wall_clocks_in_bcd_and_rolls_over_a_leap_day() {
    let (machine, _) = machine();
    assert_eq!(time(&machine), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58]);
    assert_eq!(get(&machine, WEEKDAY), 5);
    machine.advance(Duration::from_secs(2));
    assert_eq!(time(&machine), [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00]);
}

#[test]
fn register_b_selects_binary_and_12_hours() {
    let (machine, _) = machine();
    set(&machine, REG_B, B_BINARY);
    assert_eq!(time(&machine), [20, 24, 2, 29, 11 | PM, 59, 58]);
    machine.advance(Duration::from_secs(2));
    assert_eq!(get(&machine, HOURS), 12, "midnight is 12 in the morning");
}

#[test]
fn a_time_that_is_set_goes_on_from_there() {
    let (machine, _) = machine();
    set(&machine, REG_B, B_SET | B_24_HOURS);
    for (index, value) in [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x23)]
    {
        set(&machine, index, value);
    }
    machine.advance(Duration::from_secs(10));
    assert_eq!(time(&machine), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58], "it stands still");
    set(&machine, REG_B, B_24_HOURS);
    machine.advance(Duration::from_secs(3));
    assert_eq!(time(&machine), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x01]);
}

#[test]
fn update_in_progress_shows_before_the_second_ends() {
    let (machine, _) = machine();
    assert_eq!(get(&machine, REG_A), 0x26);
    machine.advance(Duration::from_micros(999_800));
    assert_eq!(get(&machine, REG_A), 0xa6);
}

#[test]
fn periodic_interrupts_come_at_their_rate_when_acknowledged() {
    let (machine, _) = machine();
    set(&machine, REG_A, 0x2f); // 2 Hz
    set(&machine, REG_B, B_24_HOURS | B_PERIODIC);
    let mut count = 0;
    for _ in 0..40 {
        machine.advance(Duration::from_millis(50));
        count += machine.interrupts.take_edges();
        get(&machine, REG_C);
    }
    assert_eq!(count, 4);
}

#[test]
fn an_interrupt_stays_until_register_c_is_read() {
    let (machine, _) = machine();
    set(&machine, REG_B, B_24_HOURS | B_UPDATE);
    machine.advance(Duration::from_secs(5));
    assert_eq!(machine.interrupts.take(), [(device::Gsi(8), true)]);
    let flags = get(&machine, REG_C);
    assert_eq!(flags & (C_REQUEST | B_UPDATE), C_REQUEST | B_UPDATE);
    assert_eq!(machine.interrupts.take(), [(device::Gsi(8), false)]);
    assert_eq!(get(&machine, REG_C), 0);
}

#[test]
fn the_alarm_fires_at_its_time_and_wildcards_match() {
    let (machine, _) = machine();
    for (index, value) in [(HOURS_ALARM, 0x01), (MINUTES_ALARM, 0xff), (SECONDS_ALARM, 0x30)] {
        set(&machine, index, value);
    }
    set(&machine, REG_B, B_24_HOURS | B_ALARM);
    machine.advance(Duration::from_secs(2 + 3600 + 29));
    assert_eq!(machine.interrupts.take_edges(), 0);
    machine.advance(Duration::from_secs(1));
    assert_eq!(machine.interrupts.take_edges(), 1);
    assert_ne!(get(&machine, REG_C) & B_ALARM, 0);
    machine.advance(Duration::from_secs(60));
    assert_eq!(machine.interrupts.take_edges(), 1, "each minute of that hour");
}

#[test]
fn an_idle_clock_sets_no_alarm() {
    let (machine, _) = machine();
    get(&machine, REG_C);
    assert_eq!(machine.alarms.next_deadline(), None);
}

#[test]
fn cmos_tells_the_memory_sizes() {
    let (machine, _) = machine();
    let word = |i| u16::from_le_bytes([get(&machine, i), get(&machine, i + 1)]);
    assert_eq!([word(0x15), word(0x17), word(0x30)], [640, 0xffff, 0xffff]);
    assert_eq!((word(0x34), word(0x5b), get(&machine, 0x5d)), (0xbf00, 0x4000, 0));
}

#[test]
fn nonsense_dates_are_survived() {
    let (machine, _) = machine();
    for value in [0xff, 0x00, 0x9a] {
        for index in [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, HOURS_ALARM] {
            set(&machine, index, value);
            time(&machine);
        }
        set(&machine, REG_B, B_ALARM | B_PERIODIC | B_UPDATE);
        machine.advance(Duration::from_secs(2));
    }
}

#[test]
fn memory_time_and_interrupts_survive_a_restore() {
    let (old, rtc) = machine();
    set(&old, YEAR, 0x30);
    set(&old, 0x40, 0x77);
    set(&old, REG_B, B_24_HOURS | B_UPDATE);
    let state = lock(&rtc).save();
    let (new, rtc) = machine();
    lock(&rtc).restore(&state).unwrap();
    assert_eq!((time(&new), get(&new, 0x40)), (time(&old), 0x77));
    new.advance(Duration::from_secs(1));
    assert_eq!(new.interrupts.take_edges(), 1);
}
