use super::*;
use crate::testing::TestGuest;
use device::lock;
use std::sync::Mutex;

/// A peer that takes so many bytes, and remembers.
#[derive(Default)]
struct Host {
    taken: Vec<u8>,
    room: usize,
    calls: Vec<&'static str>,
}

struct Peer(Arc<Mutex<Host>>);

impl PortPeer for Peer {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut host = lock(&self.0);
        let count = bytes.len().min(host.room);
        host.room -= count;
        host.taken.extend(&bytes[..count]);
        count
    }
    fn input_room(&mut self) {
        lock(&self.0).calls.push("room");
    }
    fn guest_opened(&mut self, open: bool) {
        lock(&self.0).calls.push(if open { "open" } else { "closed" });
    }
}

struct Rig {
    hosts: Vec<Arc<Mutex<Host>>>,
    device: Console,
    guest: TestGuest,
}

impl Rig {
    fn new() -> Self {
        let host = || Arc::new(Mutex::new(Host { room: 1000, ..Host::default() }));
        let hosts = vec![host(), host()];
        let port = |(name, host): (Option<&str>, &Arc<Mutex<Host>>)| PortConfig {
            name: name.map(str::to_owned),
            peer: Box::new(Peer(host.clone())),
        };
        let mut device =
            Console::new([None, Some("agent")].into_iter().zip(&hosts).map(port).collect());
        let guest = TestGuest::with(&mut device);
        Self { hosts, device, guest }
    }
    fn say(&mut self, port: u32, event: u16, value: u16) {
        let message =
            [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.guest.request(3, &[&message], &[]);
    }
    /// Messages about ports: id, event, value, name.
    fn heard(&mut self) -> Vec<(u8, u8, u8, String)> {
        let used = std::iter::from_fn(|| self.guest.queues[2].take_used());
        let message = |used: crate::testing::Used| {
            let name = String::from_utf8_lossy(&used.data[8..used.written as usize]).into_owned();
            (used.data[0], used.data[4], used.data[6], name)
        };
        used.map(message).collect()
    }
}

#[test]
fn the_driver_hears_of_the_ports_once_it_asks_and_has_buffers() {
    let mut rig = Rig::new();
    rig.say(0, 0, 1);
    assert_eq!(rig.heard(), []);
    for _ in 0..2 {
        rig.guest.queues[2].add(&[], &[64]);
    }
    rig.guest.notify(2);
    assert_eq!(rig.heard(), [(0, 1, 1, String::new()), (1, 1, 1, String::new())]);
    for _ in 0..8 {
        rig.guest.queues[2].add(&[], &[64]);
    }
    rig.say(0, 3, 1);
    rig.say(1, 3, 1);
    let none = String::new;
    assert_eq!(
        rig.heard(),
        [(0, 4, 1, none()), (0, 6, 1, none()), (1, 7, 1, "agent".into()), (1, 6, 1, none())]
    );
    rig.say(1, 6, 1);
    rig.say(1, 6, 1);
    rig.say(1, 6, 0);
    rig.say(7, 6, 1);
    rig.say(7, 3, 1);
    assert_eq!(lock(&rig.hosts[1]).calls, ["open", "closed"]);
}

#[test]
fn output_waits_for_the_host_and_none_is_lost_or_doubled() {
    let mut rig = Rig::new();
    lock(&rig.hosts[1]).room = 5;
    rig.guest.queues[5].add(&[b"hello ", b"world"], &[]);
    rig.guest.queues[5].add(&[b"!"], &[]);
    rig.guest.notify(5);
    assert_eq!(
        (lock(&rig.hosts[1]).taken.clone(), rig.guest.queues[5].take_used()),
        (b"hello".to_vec(), None)
    );
    // Also across a save.
    rig.guest.deactivate(&mut rig.device);
    let mut state = SavedState::new("test", 1);
    rig.device.save(&mut state);
    rig.device.reset();
    let mut reader = state.reader("test", 1).unwrap();
    rig.device.restore(&mut reader).unwrap();
    reader.finish().unwrap();
    lock(&rig.hosts[1]).room = 100;
    rig.guest.activate(&mut rig.device);
    assert_eq!(lock(&rig.hosts[1]).taken, b"hello world!");
    lock(&rig.hosts[0]).room = 0;
    rig.guest.queues[1].add(&[b"console"], &[]);
    rig.guest.notify(1);
    lock(&rig.hosts[0]).room = 100;
    rig.device.ports().output_room(0);
    assert_eq!(lock(&rig.hosts[0]).taken, b"console");
}

#[test]
fn input_waits_for_the_guest() {
    let mut rig = Rig::new();
    let ports = rig.device.ports().clone();
    assert_eq!(ports.input(1, b"early"), 0);
    rig.guest.queues[4].add(&[], &[4]);
    rig.guest.notify(4);
    assert_eq!(lock(&rig.hosts[1]).calls, ["room"]);
    assert_eq!(ports.input(1, b"early"), 4);
    let used = rig.guest.queues[4].take_used().unwrap();
    assert_eq!((used.written, used.data), (4, b"earl".to_vec()));
    assert_eq!((ports.input(9, b"x"), ports.input(0, b"")), (0, 0), "no such port, nothing");
    rig.guest.deactivate(&mut rig.device);
    assert_eq!(ports.input(1, b"y"), 0);
    rig.guest.activate(&mut rig.device);
    assert_eq!(lock(&rig.hosts[1]).calls.len(), 2, "it goes on");
}

#[test]
fn a_driver_of_one_port_needs_no_control() {
    let mut rig = Rig::new();
    rig.guest.deactivate(&mut rig.device);
    rig.guest.features &= !MULTIPORT;
    rig.guest.activate(&mut rig.device);
    rig.guest.request(1, &[b"text"], &[]);
    assert_eq!(lock(&rig.hosts[0]).taken, b"text");
    let mut count = [0; 4];
    rig.device.read_config(4, &mut count);
    assert_eq!(count, [2, 0, 0, 0]);
}
