use super::*;
use crate::testing::{MemoryNetwork, TestGuest};
use ::net::{Accepts, Checksum, Nic, Offload, Packet, SegmentKind, Segmentation};

const MAC: Mac = [0x52, 0x54, 0, 1, 2, 3];
/// The control queue of a card with two pairs.
const CONTROL: usize = 4;

struct Rig {
    network: Arc<MemoryNetwork>,
    device: Net,
    guest: TestGuest,
}

impl Rig {
    fn new() -> Self {
        Self::without(0)
    }
    /// A driver that does not accept these features.
    fn without(features: u64) -> Self {
        let network = Arc::new(MemoryNetwork::default());
        let config = NetConfig {
            name: "nic0".into(),
            network: network.clone(),
            mac: MAC,
            mtu: 1500,
            pairs: 2,
        };
        let mut device = Net::new(config);
        let all = device.features() | crate::feature::TRANSPORT;
        let mut guest = TestGuest::new(&[256, 256, 256, 256, 64], all & !features);
        guest.activate(&mut device);
        Self { network, device, guest }
    }
    fn nic(&self) -> Arc<dyn Nic> {
        self.network.nic().unwrap()
    }
    fn receive(&self, frame: &[u8]) -> bool {
        self.nic().receive(Packet { frame, offload: Offload::default() })
    }
    fn command(&mut self, class: u8, number: u8, data: &[u8]) -> u8 {
        self.guest.request(CONTROL, &[&[class, number], data], &[1])[0]
    }
}

/// A TCP frame over IPv4 between two ports.
fn tcp(to: Mac, source: u16, target: u16, length: usize) -> Vec<u8> {
    let mut frame = vec![0; length];
    frame[..6].copy_from_slice(&to);
    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
    let (from_ip, to_ip) = if source < target { (1, 2) } else { (2, 1) };
    (frame[26], frame[30]) = (from_ip, to_ip);
    frame[34..36].copy_from_slice(&source.to_be_bytes());
    frame[36..38].copy_from_slice(&target.to_be_bytes());
    frame
}

#[test]
fn what_the_guest_sends_reaches_the_network_with_its_offloads() {
    let mut rig = Rig::new();
    let mut header = [0; 12];
    header[..10].copy_from_slice(&[1, 1, 66, 0, 0xa8, 5, 34, 0, 16, 0]);
    rig.guest.request(1, &[&header, b"frame in ", b"two parts"], &[]);
    let checksum = Some(Checksum { start: 34, offset: 16 });
    let segmentation = Some(Segmentation { kind: SegmentKind::Tcp4, size: 1448, header: 66 });
    let sent = (b"frame in two parts".to_vec(), Offload { checksum, segmentation });
    assert_eq!(rig.network.take_sent(), [sent]);
}

#[test]
fn packets_that_make_no_sense_are_dropped_and_given_back() {
    let mut rig = Rig::new();
    rig.guest.request(1, &[&[0; 11]], &[]);
    rig.guest.request(1, &[&[0, 9, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], b"frame"], &[]);
    rig.guest.request(1, &[&[0; 12], &[1; 70_000]], &[]);
    assert_eq!(rig.network.take_sent(), []);
    rig.guest.request(1, &[&[0; 12], &[1; 65_553]], &[]);
    assert_eq!(rig.network.take_sent().len(), 1);
    assert!(!rig.guest.transport.failed());
}

#[test]
fn a_frame_is_received_into_one_buffer_or_several() {
    let mut rig = Rig::new();
    for _ in 0..3 {
        rig.guest.queues[0].add(&[], &[100]);
    }
    let frame = tcp(MAC, 1, 2, 150);
    assert!(rig.receive(&frame));
    let used: Vec<_> = std::iter::from_fn(|| rig.guest.queues[0].take_used()).collect();
    assert_eq!((used.len(), used[0].written, used[1].written), (2, 100, 62));
    assert_eq!(used[0].data[10..12], [2, 0], "two buffers");
    assert_eq!([&used[0].data[12..], &used[1].data[..62]].concat(), frame);
    assert_eq!(rig.guest.transport.take_used(), [0], "one interrupt");
}

#[test]
fn the_buffers_of_a_frame_appear_together() {
    let mut rig = Rig::new();
    for _ in 0..100 {
        rig.guest.queues[0].add(&[], &[20]);
    }
    let used_index = device::GuestPhysical(rig.guest.queues[0].at.used.0 + 2);
    let ram = rig.guest.ram.clone();
    let done = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|scope| {
        let seen = scope.spawn(|| {
            let mut seen = std::collections::BTreeSet::new();
            while !done.load(order) {
                seen.insert(ram.load::<u16>(used_index, order).unwrap());
            }
            seen
        });
        (0..20).for_each(|_| assert!(rig.receive(&tcp(MAC, 1, 2, 88))));
        done.store(true, order);
        assert!(seen.join().unwrap().iter().all(|index| index % 5 == 0), "five buffers each");
    });
}

#[test]
fn a_frame_without_room_waits_until_there_is_some() {
    let mut rig = Rig::new();
    rig.network.take_rooms();
    rig.guest.queues[0].add(&[], &[100]);
    let frame = tcp(MAC, 1, 2, 150);
    assert!(!rig.receive(&frame) && !rig.receive(&frame));
    assert!(rig.guest.queues[0].take_used().is_none(), "no part of it was delivered");
    rig.guest.queues[0].add(&[], &[100]);
    assert!(rig.guest.queues[0].wants_notification());
    rig.guest.notify(0);
    assert_eq!(rig.network.take_rooms(), 1);
    assert!(rig.receive(&frame));
    assert_eq!(rig.guest.queues[0].take_used().unwrap().written, 100);
    rig.guest.notify(0);
    assert_eq!(rig.network.take_rooms(), 0, "nobody waits");
}

#[test]
fn without_mergeable_buffers_a_frame_fits_one_or_is_dropped() {
    let mut rig = Rig::without(feature::MRG_RXBUF);
    rig.guest.queues[0].add(&[], &[12, 100]);
    rig.guest.queues[0].add(&[], &[12, 200]);
    assert!(rig.receive(&tcp(MAC, 1, 2, 150)), "dropped");
    assert!(rig.guest.queues[0].take_used().is_none());
    let frame = tcp(MAC, 1, 2, 90);
    assert!(rig.receive(&frame));
    let used = rig.guest.queues[0].take_used().unwrap();
    assert_eq!((used.written, &used.data[12..102]), (102, frame.as_slice()));
}

#[test]
fn the_network_hears_what_the_driver_can_take() {
    let accepts = |features| Rig::without(features).nic().accepts();
    assert_eq!(accepts(0), Accepts { checksum: true, tcp4: true, tcp6: true });
    assert_eq!(accepts(feature::GUEST_TSO6), Accepts { tcp6: false, ..accepts(0) });
    assert_eq!(accepts(feature::GUEST_CSUM), Accepts::default());
}

#[test]
fn a_card_without_a_driver_takes_nothing_and_forgets_nothing() {
    let mut rig = Rig::new();
    rig.guest.queues[0].add(&[], &[100]);
    rig.guest.deactivate(&mut rig.device);
    rig.network.take_rooms();
    assert!(!rig.receive(&tcp(MAC, 1, 2, 60)));
    rig.guest.activate(&mut rig.device);
    assert_eq!(rig.network.take_rooms(), 1, "it says so when it goes on");
    assert!(rig.receive(&tcp(MAC, 1, 2, 60)));
    let network = rig.network.clone();
    drop(rig);
    assert!(network.nic().is_none(), "pulled out");
}

#[test]
fn the_driver_chooses_which_frames_it_gets() {
    let mut rig = Rig::new();
    for _ in 0..16 {
        rig.guest.queues[0].add(&[], &[100]);
    }
    let group = [0x33, 0x33, 0, 0, 0, 1];
    let other = [0x52, 0x54, 0, 9, 9, 9];
    let gets = |rig: &mut Rig| {
        let mut got = |to| {
            assert!(rig.receive(&tcp(to, 1, 2, 60)));
            rig.guest.queues[0].take_used().is_some()
        };
        [got(MAC), got([0xff; 6]), got(group), got(other)]
    };
    assert_eq!(gets(&mut rig), [true; 4], "all, before it says");
    assert_eq!(rig.command(0, 0, &[0]), 0);
    assert_eq!(gets(&mut rig), [true, true, false, false]);
    let table = [&[1, 0, 0, 0], &other[..], &[1, 0, 0, 0], &group[..]].concat();
    assert_eq!(rig.command(1, 0, &table), 0);
    assert_eq!(gets(&mut rig), [true; 4]);
    assert_eq!(rig.command(1, 0, &[0; 8]), 0);
    assert_eq!(rig.command(0, 1, &[1]), 0);
    assert_eq!(gets(&mut rig), [true, true, true, false]);
    assert_eq!((rig.command(1, 1, &other), rig.command(0, 1, &[0])), (0, 0));
    assert_eq!(gets(&mut rig), [false, true, false, true]);
    let mut mac = [0; 6];
    rig.device.read_config(0, &mut mac);
    assert_eq!(mac, other);
    assert!(!rig.receive(&[0; 3]) || rig.guest.queues[0].take_used().is_none(), "half an address");
}

#[test]
fn commands_that_cannot_be_are_refused() {
    let mut rig = Rig::new();
    let cases: [(u8, u8, &[u8]); 8] = [
        (0, 0, &[]),
        (1, 0, &[255, 255, 255, 255]),
        (1, 0, &[65, 0, 0, 0]),
        (1, 0, &[1, 0, 0, 0, 1, 2, 3]),
        (1, 1, &[1, 2, 3]),
        (4, 0, &[0, 0]),
        (4, 0, &[3, 0]),
        (9, 9, &[1]),
    ];
    for (class, number, data) in cases {
        assert_eq!(rig.command(class, number, data), 1, "{class} {number} {data:?}");
    }
    assert_eq!(rig.command(1, 0, &[0; 2000]), 1, "longer than any command");
}

#[test]
fn answers_come_back_on_the_pair_on_which_their_flow_was_sent() {
    let mut rig = Rig::new();
    for queue in [0, 2] {
        rig.guest.queues[queue].add(&[], &[100]);
        rig.guest.queues[queue].add(&[], &[100]);
    }
    rig.guest.request(3, &[&[0; 12], &tcp([0xff; 6], 1000, 80, 60)], &[]);
    assert!(rig.receive(&tcp(MAC, 80, 1000, 60)));
    assert!(rig.guest.queues[0].take_used().is_some(), "one pair is in use");
    assert_eq!(rig.command(4, 0, &[2, 0]), 0);
    assert!(rig.receive(&tcp(MAC, 80, 1000, 60)));
    assert!(rig.guest.queues[2].take_used().is_some());
    assert!(rig.receive(&tcp(MAC, 80, 1001, 60)));
    assert!(rig.guest.queues[0].take_used().is_some(), "another flow");
}

#[test]
fn a_driver_of_one_pair_has_its_control_queue_next_to_it() {
    let mut rig = Rig::without(feature::MQ);
    assert_eq!(rig.guest.request(2, &[&[0, 0], &[0]], &[1]), [0]);
    assert_eq!(rig.guest.request(2, &[&[4, 0], &[2, 0]], &[1]), [1], "there is one pair");
}

#[test]
fn settings_survive_a_save() {
    let mut rig = Rig::new();
    rig.command(0, 0, &[0]);
    rig.command(4, 0, &[2, 0]);
    rig.command(1, 0, &[&[1, 0, 0, 0][..], &MAC, &[0; 4]].concat());
    let before = lock(&rig.device.card.settings).clone();
    let mut state = SavedState::new("test", 1);
    rig.device.save(&mut state);
    rig.guest.deactivate(&mut rig.device);
    rig.device.reset();
    assert_ne!(*lock(&rig.device.card.settings), before);
    let mut reader = state.reader("test", 1).unwrap();
    rig.device.restore(&mut reader).unwrap();
    reader.finish().unwrap();
    assert_eq!(*lock(&rig.device.card.settings), before);
}
