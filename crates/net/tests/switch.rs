//! A switch among machines, each of which is a port in this process but for one that is killed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use net::switch::Switch;
use net::{
    Accepts, Checksum, Network, Nic, Offload, Packet, SegmentKind, Segmentation, SwitchName,
};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Only says that a test hangs.
const HANG: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Card {
    large: bool,
    refuses: AtomicBool,
    frames: Mutex<VecDeque<(Vec<u8>, Offload)>>,
    arrived: Condvar,
}

impl Nic for Card {
    fn accepts(&self) -> Accepts {
        Accepts { checksum: self.large, tcp4: self.large, tcp6: self.large }
    }

    fn receive(&self, packet: Packet<'_>) -> bool {
        if self.refuses.load(Ordering::SeqCst) {
            return false;
        }
        self.frames.lock().unwrap().push_back((packet.frame.to_vec(), packet.offload));
        self.arrived.notify_all();
        true
    }
}

struct Machine {
    switch: Switch,
    card: Arc<Card>,
    mac: [u8; 6],
}

impl Machine {
    fn new(folder: &Path, number: u8, large: bool) -> Self {
        let name: SwitchName = "lab".parse().unwrap();
        let switch = Switch::join_in(&folder.join("bivisor"), &name).unwrap();
        let card = Arc::new(Card { large, ..Card::default() });
        switch.plug(Some(Arc::clone(&card) as Arc<dyn Nic>));
        Self { switch, card, mac: [2, 0, 0, 0, 0, number] }
    }

    fn send(&self, to: [u8; 6], text: &[u8]) {
        let frame = [&to[..], &self.mac, &[0x88, 0xb5], text].concat();
        self.switch.transmit(Packet { frame: &frame, offload: Offload::default() });
    }

    fn receive(&self) -> (Vec<u8>, Offload) {
        let frames = self.card.frames.lock().unwrap();
        let (mut frames, timeout) =
            self.card.arrived.wait_timeout_while(frames, HANG, |frames| frames.is_empty()).unwrap();
        assert!(!timeout.timed_out(), "machine {} waits in vain", self.mac[5]);
        frames.pop_front().unwrap()
    }

    fn text(&self) -> Vec<u8> {
        self.receive().0[14..].to_vec()
    }

    fn wait_for_others(&self, count: usize) {
        let begun = Instant::now();
        while self.switch.others() != count {
            assert!(begun.elapsed() < HANG, "{} others, not {count}", self.switch.others());
            std::thread::yield_now();
        }
    }

    fn is_quiet(&self) -> bool {
        self.card.frames.lock().unwrap().is_empty()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.switch.plug(None);
    }
}

const ALL: [u8; 6] = [0xff; 6];

fn machines(folder: &Path, count: u8) -> Vec<Machine> {
    let machines: Vec<_> = (1..=count).map(|number| Machine::new(folder, number, false)).collect();
    for machine in &machines {
        machine.wait_for_others(machines.len() - 1);
    }
    machines
}

#[test]
fn frames_reach_all_until_the_receiver_is_known_and_then_only_it() {
    let folder = tempfile::tempdir().unwrap();
    let machines = machines(folder.path(), 4);
    machines[0].send(ALL, b"who is 3?");
    for other in &machines[1..] {
        assert_eq!(other.text(), b"who is 3?");
    }
    machines[2].send(machines[0].mac, b"I am");
    assert_eq!(machines[0].text(), b"I am");
    machines[0].send(machines[2].mac, b"hello");
    assert_eq!(machines[2].text(), b"hello");
    // What would have gone astray has arrived before this.
    machines[0].send(ALL, b"end");
    for other in &machines[1..] {
        assert_eq!(other.text(), b"end");
    }
    assert!(machines[0].is_quiet(), "nothing comes back to its sender");
}

#[test]
fn machines_that_join_at_once_have_one_connection_each() {
    let folder = tempfile::tempdir().unwrap();
    let machines: Vec<Machine> = std::thread::scope(|scope| {
        let path = folder.path();
        let join = |number| scope.spawn(move || Machine::new(path, number, false));
        let threads: Vec<_> = (1..=12).map(join).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for machine in &machines {
        machine.wait_for_others(11);
    }
    machines[5].send(ALL, b"once");
    machines[5].send(ALL, b"end");
    for (number, machine) in machines.iter().enumerate() {
        if number != 5 {
            assert_eq!((machine.text(), machine.text()), (b"once".to_vec(), b"end".to_vec()));
        }
    }
}

#[test]
fn the_others_go_on_when_one_leaves_whichever_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let mut machines = machines(folder.path(), 3);
    // The first is no more than the others.
    drop(machines.remove(0));
    for machine in &machines {
        machine.wait_for_others(1);
    }
    machines[0].send(ALL, b"still here");
    assert_eq!(machines[1].text(), b"still here");
    let late = Machine::new(folder.path(), 9, false);
    late.wait_for_others(2);
    late.send(ALL, b"new");
    assert_eq!((machines[0].text(), machines[1].text()), (b"new".to_vec(), b"new".to_vec()));
}

/// Not a test of its own: what the next one runs as another process.
#[test]
fn child_joins_and_waits_to_be_killed() {
    let Some(folder) = std::env::var_os("SWITCH_TEST_FOLDER") else { return };
    let machine = Machine::new(Path::new(&folder), 7, false);
    machine.wait_for_others(1);
    machine.send(ALL, b"I live");
    std::thread::sleep(HANG);
}

#[test]
fn the_others_go_on_when_one_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let machine = Machine::new(folder.path(), 1, false);
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_joins_and_waits_to_be_killed"])
        .env("SWITCH_TEST_FOLDER", folder.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(machine.text(), b"I live");
    child.kill().unwrap();
    child.wait().unwrap();
    machine.wait_for_others(0);
    machine.send(ALL, b"into the void");
    let late = Machine::new(folder.path(), 2, false);
    late.wait_for_others(1);
    machine.wait_for_others(1);
    late.send(ALL, b"hello");
    assert_eq!(machine.text(), b"hello");
}

#[test]
fn a_card_that_refuses_gets_all_frames_in_order_when_it_has_room() {
    let folder = tempfile::tempdir().unwrap();
    let machines = machines(folder.path(), 2);
    machines[1].card.refuses.store(true, Ordering::SeqCst);
    for number in 0..1000u32 {
        machines[0].send(machines[1].mac, &number.to_be_bytes());
    }
    machines[1].card.refuses.store(false, Ordering::SeqCst);
    machines[1].switch.room();
    for number in 0..1000u32 {
        assert_eq!(machines[1].text(), number.to_be_bytes());
    }
}

/// A frame of TCP over IPv4 with so many bytes of data.
fn tcp_frame(data: usize) -> Vec<u8> {
    let mut frame = [&ALL[..], &[2, 0, 0, 0, 0, 1], &[8, 0]].concat();
    let length = (40 + data) as u16;
    frame.extend([0x45, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([0, 7, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 80, 0, 90, 0, 0, 1, 0, 0, 0, 0, 9, 5 << 4, 0x18, 1, 0]);
    frame.extend([0, 0, 0, 0]);
    frame.extend((0..data).map(|n| (n % 251) as u8));
    // The sum over the pseudo-header: addresses, protocol, length.
    let sum: u32 = [0x0a00u32, 1, 0x0a00, 2, 6, 20 + data as u32].iter().sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[50..52].copy_from_slice(&(sum as u16).to_be_bytes());
    frame
}

fn large(size: u16) -> Offload {
    Offload {
        checksum: Some(Checksum { start: 34, offset: 16 }),
        segmentation: Some(Segmentation { kind: SegmentKind::Tcp4, size, header: 54 }),
    }
}

/// Whether the checksum of a frame's TCP segment is right.
fn is_summed(frame: &[u8]) -> bool {
    let mut sum: u32 = 6 + (frame.len() as u32 - 34);
    for pair in frame[26..].chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum == 0xffff
}

#[test]
fn large_frames_stay_whole_for_who_takes_them_and_are_cut_for_who_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let sender = Machine::new(folder.path(), 1, true);
    let takes = Machine::new(folder.path(), 2, true);
    let cuts = Machine::new(folder.path(), 3, false);
    sender.wait_for_others(2);
    let frame = tcp_frame(60_001);
    sender.switch.transmit(Packet { frame: &frame, offload: large(1400) });
    let whole = takes.receive();
    assert!(whole.0 == frame);
    assert_eq!(whole.1, large(1400));
    let mut data = Vec::new();
    for number in 0..43u32 {
        let (part, offload) = cuts.receive();
        assert_eq!(offload, Offload::default());
        assert!(is_summed(&part), "segment {number}");
        assert_eq!(part[38..42], (0x100 + 1400 * number).to_be_bytes());
        assert_eq!(part[47] == 0x18, number == 42, "only the last is pushed");
        data.extend_from_slice(&part[54..]);
    }
    assert!(data == frame[54..]);
}

#[test]
fn what_contradicts_itself_is_not_passed_on() {
    let folder = tempfile::tempdir().unwrap();
    let machines = machines(folder.path(), 2);
    let frame = tcp_frame(3000);
    let beyond = Some(Checksum { start: 34, offset: 60_000 });
    let mut udp = large(1400);
    udp.segmentation = Some(Segmentation { kind: SegmentKind::Udp, size: 1400, header: 42 });
    for offload in [large(0), large(1), udp, Offload { checksum: beyond, segmentation: None }] {
        machines[0].switch.transmit(Packet { frame: &frame, offload });
    }
    machines[0].switch.transmit(Packet { frame: &[1; 9], offload: Offload::default() });
    machines[0].switch.transmit(Packet { frame: &vec![1; 80_000], offload: Offload::default() });
    machines[0].send(ALL, b"end");
    assert_eq!(machines[1].text(), b"end");
}

/// A process of the same user that sends anything but what it should.
#[test]
fn what_others_send_is_not_believed() {
    use rustix::net::{
        AddressFamily, SendFlags, SocketAddrUnix, SocketType, connect, send, socket,
    };
    let folder = tempfile::tempdir().unwrap();
    let machines = machines(folder.path(), 2);
    let switch = folder.path().join("bivisor/switch/lab");
    let port = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with("port");
    let mut state = 1u64;
    let mut random = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    for entry in std::fs::read_dir(switch).unwrap().flatten().filter(port) {
        let stranger = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        connect(&stranger, &SocketAddrUnix::new(entry.path()).unwrap()).unwrap();
        for _ in 0..3000 {
            let mut message = vec![0; 1 + random() % 400];
            message.iter_mut().for_each(|byte| *byte = random() as u8);
            if random() % 8 > 0 && message.len() > 28 {
                message[..4].copy_from_slice(b"bvs1");
                message[26..28].copy_from_slice(&[8, 0]);
            }
            send(&stranger, &message, SendFlags::empty()).unwrap();
        }
    }
    machines[0].send(ALL, b"end");
    while machines[1].text() != b"end" {}
    machines[1].send(ALL, b"end");
    while machines[0].text() != b"end" {}
}
