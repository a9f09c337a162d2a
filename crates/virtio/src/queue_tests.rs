use super::*;
use crate::testing::TestGuest;

fn guest(features: u64) -> (TestGuest, Queue) {
    let mut guest = TestGuest::new(&[8], features);
    let queue = guest.activation().queues.remove(0).unwrap();
    (guest, queue)
}

#[test]
fn a_chain_gives_out_what_the_driver_put_in_and_takes_what_the_device_writes() {
    for indirect in [false, true] {
        let (mut guest, queue) = guest(feature::INDIRECT_DESC);
        guest.queues[0].indirect = indirect;
        for round in 0..20u16 {
            let head = guest.queues[0].add(&[b"abc", b"defgh"], &[3, 4]);
            let chain = queue.pop().unwrap();
            assert!(queue.pop().is_none());
            let mut reader = chain.reader();
            assert_eq!((reader.remaining(), reader.read_array()), (8, Some(*b"abcd")), "{round}");
            assert_eq!((reader.read_array::<5>(), reader.read_vec(100)), (None, b"efgh".to_vec()));
            let mut writer = chain.writer();
            assert_eq!((writer.remaining(), writer.write(b"12345")), (7, 5));
            let written = writer.written();
            queue.push(chain, written);
            let used = guest.queues[0].take_used().unwrap();
            assert_eq!((used.head, used.written, used.data), (head, 5, b"12345\xee\xee".to_vec()));
        }
        assert!(!guest.transport.failed());
    }
}

#[test]
fn interrupts_come_where_the_driver_wants_them() {
    for features in [0, feature::EVENT_IDX] {
        let (mut guest, queue) = guest(features);
        let take = |guest: &mut TestGuest, wanted| {
            guest.queues[0].want_interrupts(wanted);
            guest.queues[0].add(&[b"x"], &[]);
            queue.push(queue.pop().unwrap(), 0);
            let interrupts = guest.transport.take_used().len();
            guest.queues[0].take_used().unwrap();
            interrupts
        };
        assert_eq!(take(&mut guest, true), 1, "{features:#x}");
        assert_eq!(take(&mut guest, false), 0, "{features:#x}");
        assert_eq!(take(&mut guest, true), 1, "{features:#x}");
    }
}

#[test]
fn notifications_are_off_while_the_device_serves_and_none_is_lost() {
    for features in [0, feature::EVENT_IDX] {
        let (mut guest, queue) = guest(features);
        guest.queues[0].add(&[b"1"], &[]);
        let mut seen = 0;
        queue.serve(|chain| {
            seen += 1;
            // The first chain in the making of which another one comes.
            if seen == 1 {
                guest.queues[0].add(&[b"2"], &[]);
                assert!(!guest.queues[0].wants_notification() || features != 0);
            }
            queue.push(chain, 0);
        });
        assert_eq!(seen, 2);
        guest.queues[0].add(&[b"3"], &[]);
        assert!(guest.queues[0].wants_notification(), "{features:#x}");
    }
}

/// What a driver does, with its queue and a descriptor table in memory.
type Breaking = fn(&mut TestGuest);

#[test]
fn a_driver_that_breaks_the_rules_fails_its_device_once_and_gets_no_further() {
    let breaches: [(&str, Breaking); 9] = [
        ("more entries than the ring has", |guest| guest.queues[0].set_available_index(9)),
        ("a head beyond the table", |guest| guest.queues[0].make_available(8)),
        ("a chain that loops", |guest| {
            let queue = &mut guest.queues[0];
            let buffer = (queue.allocate(16), 16, 0);
            queue.describe(queue.at.descriptors, 1, buffer, Some(2));
            queue.describe(queue.at.descriptors, 2, buffer, Some(1));
            queue.make_available(1);
        }),
        ("a chain that leaves the table", |guest| {
            let queue = &mut guest.queues[0];
            let buffer = (queue.allocate(16), 16, 0);
            queue.describe(queue.at.descriptors, 1, buffer, Some(8));
            queue.make_available(1);
        }),
        ("a buffer beyond memory", |guest| {
            let queue = &mut guest.queues[0];
            let buffer = (GuestPhysical(crate::testing::MEMORY as u64 - 8), 16, 0);
            queue.describe(queue.at.descriptors, 1, buffer, None);
            queue.make_available(1);
        }),
        ("a readable buffer after a writable one", |guest| {
            let queue = &mut guest.queues[0];
            let start = queue.allocate(16);
            queue.describe(queue.at.descriptors, 1, (start, 16, 2), Some(2));
            queue.describe(queue.at.descriptors, 2, (start, 16, 0), None);
            queue.make_available(1);
        }),
        ("an indirect table within one", |guest| {
            let queue = &mut guest.queues[0];
            let table = queue.allocate(16);
            queue.describe(table, 0, (table, 16, 4), None);
            queue.describe(queue.at.descriptors, 1, (table, 16, 4), None);
            queue.make_available(1);
        }),
        ("an indirect table of half a descriptor", |guest| {
            let queue = &mut guest.queues[0];
            let table = queue.allocate(24);
            queue.describe(queue.at.descriptors, 1, (table, 24, 4), None);
            queue.make_available(1);
        }),
        ("buffers of more than 4 GiB", |guest| {
            let queue = &mut guest.queues[0];
            let start = queue.allocate(16);
            queue.describe(queue.at.descriptors, 1, (start, 0, 0), Some(2));
            queue.describe(queue.at.descriptors, 2, (start, 16, 0), Some(3));
            queue.describe(queue.at.descriptors, 3, (start, u32::MAX as usize, 0), None);
            queue.make_available(1);
        }),
    ];
    for (what, breaking) in breaches {
        let (mut guest, queue) = guest(feature::INDIRECT_DESC);
        breaking(&mut guest);
        assert!(queue.pop().is_none() && guest.transport.failed(), "{what}");
        guest.queues[0].set_available_index(1);
        assert!(queue.pop().is_none() && !queue.want_notifications(true), "{what}");
    }
}

#[test]
fn indirect_tables_that_were_not_agreed_on_fail_the_device() {
    let (mut guest, queue) = guest(0);
    guest.queues[0].indirect = true;
    guest.queues[0].add(&[b"x"], &[]);
    assert!(queue.pop().is_none() && guest.transport.failed());
}

#[test]
fn a_closed_queue_gives_out_nothing_and_still_takes_back() {
    let (mut guest, queue) = guest(0);
    guest.queues[0].add(&[b"1"], &[]);
    guest.queues[0].add(&[b"2"], &[]);
    let first = queue.pop().unwrap();
    queue.close();
    assert!(queue.pop().is_none() && !guest.transport.failed());
    queue.push(first, 0);
    assert_eq!(queue.position(), Position { available: 1, used: 1 });
    assert!(guest.queues[0].take_used().is_some());
}

#[test]
fn a_chain_that_was_taken_before_a_save_can_be_taken_again() {
    let (mut guest, queue) = guest(0);
    let head = guest.queues[0].add(&[b"abc"], &[]);
    drop(queue.pop().unwrap());
    let again = queue.take_again(head).unwrap();
    assert_eq!(again.reader().read_vec(9), b"abc");
    assert!(queue.take_again(8).is_none() && guest.transport.failed());
}

#[test]
fn a_queue_that_cannot_be_there_is_refused() {
    let mut guest = TestGuest::new(&[8], 0);
    let at = guest.queues[0].at;
    let mut make = |size, at| {
        let (ram, transport) = (guest.ram.clone(), guest.transport.clone());
        let _ = guest.activation();
        Queue::new(0, size, at, Position::default(), 0, ram, transport).err()
    };
    assert_eq!(make(0, at), Some(QueueError::Size(0)));
    assert_eq!(make(24, at), Some(QueueError::Size(24)));
    let odd = GuestPhysical(at.used.0 + 2);
    let moved = QueueAddresses { used: odd, ..at };
    assert_eq!(make(8, moved), Some(QueueError::Alignment(odd)));
    let moved = QueueAddresses { descriptors: GuestPhysical(!15), ..at };
    assert!(matches!(make(8, moved), Some(QueueError::Memory(_))));
}
