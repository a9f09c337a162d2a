use super::*;
use crate::feature as transport_feature;
use crate::testing::TestGuest;

/// A page of a test guest that no queue is in.
const FREE: u64 = 0x20_0000;

fn fill(guest: &TestGuest, start: u64, length: usize) {
    guest.ram.write(GuestPhysical(start), &vec![0xaa; length]).unwrap();
}

/// The first byte of each page.
fn pages(guest: &TestGuest, start: u64, count: u64) -> Vec<u8> {
    let byte = |n| {
        let mut byte = [0];
        guest.ram.read(GuestPhysical(start + n * PAGE), &mut byte).unwrap();
        byte[0]
    };
    (0..count).map(byte).collect()
}

fn numbers(pages: &[u64]) -> Vec<u8> {
    pages.iter().flat_map(|page| ((page / PAGE) as u32).to_le_bytes()).collect()
}

fn config(device: &mut Balloon) -> [u32; 4] {
    let mut space = [0; 16];
    device.read_config(0, &mut space);
    let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    [word(0), word(4), word(8), word(12)]
}

#[test]
fn inflating_gives_pages_back_and_they_read_as_zero() {
    let control = BalloonControl::new(0);
    let mut device = Balloon::new(&control);
    let mut guest = TestGuest::with(&mut device);
    fill(&guest, FREE, 8 * PAGE as usize);
    let given = numbers(&[FREE + 5 * PAGE, FREE + PAGE, FREE + 2 * PAGE, FREE + PAGE, 1 << 40]);
    guest.request(0, &[&given[..6], &given[6..]], &[]);
    assert_eq!(pages(&guest, FREE, 8), [0xaa, 0, 0, 0xaa, 0xaa, 0, 0xaa, 0xaa]);
    guest.request(1, &[&given], &[]);
    fill(&guest, FREE, 8 * PAGE as usize);
    assert_eq!(pages(&guest, FREE, 8), [0xaa; 8], "they are the guest's again");
    assert!(!guest.transport.failed());
}

#[test]
fn the_target_is_told_and_the_driver_says_what_it_has_reached() {
    let control = BalloonControl::new(64 << 20);
    let mut device = Balloon::new(&control);
    assert_eq!(config(&mut device), [16384, 0, 0, 0]);
    let guest = TestGuest::with(&mut device);
    assert_eq!(guest.transport.config_changes(), 0);
    control.set_target(10 * PAGE + 1);
    assert_eq!((guest.transport.config_changes(), control.target()), (1, 10 * PAGE));
    device.write_config(4, &7u32.to_le_bytes());
    assert_eq!((control.actual(), config(&mut device)), (7 * PAGE, [10, 7, 0, 0]));
    device.write_config(0, &[0xff; 4]);
    device.write_config(8, &[0xff; 100]);
    device.write_config(15, &[1, 2]);
    device.write_config(usize::MAX, &[1]);
    assert_eq!(config(&mut device)[..3], [10, 7, 0], "not what the driver may not write");
    control.set_target(u64::MAX);
    assert_eq!(config(&mut device)[0], u32::MAX);
}

#[test]
fn reported_pages_are_freed_unless_they_are_poisoned() {
    let control = BalloonControl::new(0);
    let mut device = Balloon::new(&control);
    let mut guest = TestGuest::with(&mut device);
    fill(&guest, FREE, 4 << 16);
    let report = |guest: &mut TestGuest| {
        let queue = &mut guest.queues[3];
        let descriptors = queue.at.descriptors;
        queue.describe(descriptors, 0, (GuestPhysical(FREE), 1 << 16, 2), Some(1));
        queue.describe(descriptors, 1, (GuestPhysical(FREE + (1 << 17) + 1), 1 << 16, 2), None);
        queue.make_available(0);
        guest.notify(3);
        guest.transport.wait_used(3);
    };
    device.write_config(12, &0x5555_5555u32.to_le_bytes());
    report(&mut guest);
    assert_eq!((control.reported(), pages(&guest, FREE, 64)), (0, vec![0xaa; 64]));
    device.write_config(12, &[0; 4]);
    guest.queues[3].make_available(0);
    guest.notify(3);
    while control.reported() == 0 {
        std::thread::yield_now();
    }
    guest.deactivate(&mut device);
    assert_eq!(control.reported(), (1 << 16) + (15 << 12), "whole pages");
    let left = pages(&guest, FREE, 64);
    assert!(left[..16].iter().all(|byte| *byte == 0) && left[33..48].iter().all(|b| *b == 0));
    assert!(left[16..33].iter().chain(&left[48..]).all(|byte| *byte == 0xaa));
}

#[test]
fn statistics_come_when_the_host_asks() {
    let control = BalloonControl::new(0);
    let mut device = Balloon::new(&control);
    let mut guest = TestGuest::with(&mut device);
    let entry = |tag: Statistic, value: u64| {
        [&(tag as u16).to_le_bytes()[..], &value.to_le_bytes()].concat()
    };
    let first = [entry(Statistic::Free, 1000), entry(Statistic::Total, 5000)].concat();
    let wait = |update| {
        while control.statistics().is_none_or(|found| found.update < update) {
            std::thread::yield_now();
        }
        control.statistics().unwrap()
    };
    guest.queues[2].add(&[&first], &[]);
    guest.notify(2);
    let found = wait(1);
    assert_eq!(found.get(Statistic::Free), Some(1000));
    assert_eq!((found.get(Statistic::Total), found.get(Statistic::SwapIn)), (Some(5000), None));
    assert!(guest.queues[2].take_used().is_none(), "kept until the host asks");
    control.request_statistics();
    assert!(guest.queues[2].take_used().is_some());
    let odd = [entry(Statistic::Free, 2000), vec![0xff; 10], vec![1]].concat();
    guest.queues[2].add(&[&odd], &[]);
    guest.notify(2);
    assert_eq!(wait(2).get(Statistic::Free), Some(2000));
    guest.deactivate(&mut device);
    assert!(guest.queues[2].take_used().is_some(), "nothing is kept over a pause");
}

#[test]
fn a_driver_without_statistics_reports_on_the_third_queue() {
    let control = BalloonControl::new(0);
    let mut device = Balloon::new(&control);
    let features = feature::REPORTING | transport_feature::TRANSPORT;
    let mut guest = TestGuest::new(&[16, 16, 16], features);
    guest.activate(&mut device);
    let queue = &mut guest.queues[2];
    queue.describe(queue.at.descriptors, 0, (GuestPhysical(FREE), 1 << 16, 2), None);
    queue.make_available(0);
    guest.notify(2);
    guest.transport.wait_used(2);
    assert_eq!(control.reported(), 1 << 16);
}

#[test]
fn the_state_comes_back() {
    let control = BalloonControl::new(100 * PAGE);
    let mut device = Balloon::new(&control);
    device.write_config(4, &[1, 0, 0, 0]);
    device.write_config(12, &[2, 0, 0, 0]);
    let mut state = SavedState::new("virtio", 1);
    device.save(&mut state);
    let control = BalloonControl::new(0);
    let mut other = Balloon::new(&control);
    let mut reader = state.reader("virtio", 1).unwrap();
    other.restore(&mut reader).unwrap();
    reader.finish().unwrap();
    assert_eq!(config(&mut other), [100, 1, 0, 2]);
    other.reset();
    assert_eq!(config(&mut other), [100, 0, 0, 0], "the target is the host's");
}
