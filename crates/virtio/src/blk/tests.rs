use super::*;
use crate::testing::{MemoryDisk, TestGuest};
use device::lock;
use std::sync::atomic::{AtomicUsize, Ordering};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn config(disk: &Arc<MemoryDisk>) -> BlockConfig {
    BlockConfig {
        name: "disk0".into(),
        disk: disk.clone(),
        serial: "a serial number that is too long".into(),
        queues: 2,
        threads: 2,
        on_full: OnFull::Fail,
    }
}

struct Rig {
    disk: Arc<MemoryDisk>,
    device: Block,
    guest: TestGuest,
}

impl Rig {
    fn new() -> Self {
        Self::with(MemoryDisk::new(1 << 20), |_| {})
    }
    fn with(disk: MemoryDisk, change: impl FnOnce(&mut BlockConfig)) -> Self {
        let disk = Arc::new(disk);
        let mut config = config(&disk);
        change(&mut config);
        let mut device = Block::new(config);
        let guest = TestGuest::with(&mut device);
        Self { disk, device, guest }
    }

    /// A request; answers its data and status.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (Vec<u8>, u8) {
        let header = header(kind, sector);
        let readable: &[&[u8]] = if data.is_empty() { &[&header] } else { &[&header, data] };
        let writable: &[usize] = if room == 0 { &[1] } else { &[room, 1] };
        let mut answer = self.guest.request(1, readable, writable);
        let status = answer.pop().unwrap();
        (answer, status)
    }
    fn read(&mut self, sector: u64, length: usize) -> (Vec<u8>, u8) {
        self.request(0, sector, &[], length)
    }
    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.request(1, sector, data, 0).1
    }
    fn clear(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        self.request(kind, 0, &segment(sector, count, flags), 0).1
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn segment(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&count.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}

#[test]
fn what_is_written_is_read_back_directly_and_through_indirect_tables() {
    for indirect in [false, true] {
        let mut rig = Rig::new();
        rig.guest.queues[1].indirect = indirect;
        let data: Vec<u8> = (0..4096).map(|n| (n % 251) as u8).collect();
        assert_eq!(rig.write(8, &data), OK);
        assert_eq!(rig.read(8, 4096), (data.clone(), OK));
        assert_eq!(rig.read(7, 1024).0[512..], data[..512]);
        assert_eq!(lock(&rig.disk.data)[4096..8192], data);
    }
}

#[test]
fn many_requests_of_several_queues_are_under_way_together() {
    let mut rig = Rig::new();
    for n in 0..40u8 {
        let queue = usize::from(n % 2);
        rig.guest.queues[queue].add(&[&header(1, n.into()), &[n + 1; 512]], &[1]);
        rig.guest.notify(queue);
    }
    rig.guest.deactivate(&mut rig.device);
    let answers = |queue: &mut crate::testing::DriverQueue| {
        std::iter::from_fn(|| queue.take_used()).map(|used| used.data).collect::<Vec<_>>()
    };
    for queue in &mut rig.guest.queues {
        assert_eq!(answers(queue), vec![vec![OK]; 20]);
    }
    for (n, sector) in lock(&rig.disk.data).chunks(512).take(40).enumerate() {
        assert_eq!(sector, [n as u8 + 1; 512]);
    }
}

#[test]
fn a_guest_is_held_to_the_budget_and_served_completely() {
    let mut rig = Rig::with(MemoryDisk::new(8 << 20), |_| {});
    // Readable buffers may be the same memory: 120 MiB of writes from 1 MiB of it.
    let queue = &mut rig.guest.queues[0];
    let (data, head) = (queue.allocate(1 << 20), queue.allocate(16));
    rig.guest.ram.write(head, &header(1, 0)).unwrap();
    let status = queue.allocate(1);
    let table = queue.allocate(16 * 10);
    queue.describe(table, 0, (head, 16, 0), Some(1));
    for n in 1..9 {
        queue.describe(table, n, (data, 1 << 20, 0), Some(n + 1));
    }
    queue.describe(table, 9, (status, 1, 2), None);
    for n in 0..15 {
        queue.describe(queue.at.descriptors, n, (table, 160, 4), None);
        queue.make_available(n);
    }
    // An interrupt at the last of them only.
    let event = device::GuestPhysical(queue.at.available.0 + 4 + 2 * u64::from(queue.size));
    rig.guest.ram.write(event, &[14, 0]).unwrap();
    rig.guest.notify(0);
    rig.guest.transport.wait_used(0);
    let mut answer = [9];
    rig.guest.ram.read(status, &mut answer).unwrap();
    assert_eq!((answer, rig.guest.transport.failed()), ([OK], false));
}

#[test]
fn requests_that_cannot_be_fail_and_the_device_goes_on() {
    let mut rig = Rig::new();
    let sectors = (1 << 20) / 512;
    assert_eq!(rig.read(sectors, 512).1, IO_ERROR, "beyond the end");
    assert_eq!(rig.read(sectors - 1, 1024).1, IO_ERROR, "partly beyond the end");
    assert_eq!(rig.read(u64::MAX, 512).1, IO_ERROR);
    assert_eq!(rig.read(0, 511).1, IO_ERROR, "not whole sectors");
    assert_eq!(rig.read(0, 0).1, IO_ERROR, "nothing");
    assert_eq!(rig.write(0, &[1; 100]), IO_ERROR);
    assert_eq!(rig.request(2, 0, &[], 512).1, UNSUPPORTED);
    let answer = rig.guest.request(1, &[&[0; 15]], &[1]);
    assert_eq!(answer, [IO_ERROR], "half a header");
    rig.disk.broken.store(true, Ordering::SeqCst);
    assert_eq!((rig.read(0, 512).1, rig.request(4, 0, &[], 0).1), (IO_ERROR, IO_ERROR));
    rig.disk.broken.store(false, Ordering::SeqCst);
    assert_eq!(rig.read(0, 512), (vec![0; 512], OK));
    assert!(!rig.guest.transport.failed());
}

#[test]
fn a_request_without_room_for_its_status_fails_the_device() {
    let mut rig = Rig::new();
    rig.guest.queues[0].add(&[&header(4, 0)], &[]);
    rig.guest.notify(0);
    assert!(rig.guest.transport.failed());
}

#[test]
fn the_serial_number_has_twenty_bytes() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(8, 0, &[], 20), (b"a serial number that".to_vec(), OK));
    assert_eq!(rig.request(8, 0, &[], 4), (b"a se".to_vec(), OK));
}

#[test]
fn discarded_and_zeroed_ranges_are_cleared_within_limits() {
    let mut rig = Rig::new();
    assert_eq!(rig.write(0, &[7; 4096]), OK);
    assert_eq!(
        (rig.clear(11, 0, 1, 0), rig.clear(13, 2, 2, 1), rig.clear(13, 5, 1, 0)),
        (OK, OK, OK)
    );
    let sectors: Vec<_> = rig.read(0, 4096).0.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [0, 7, 0, 0, 7, 0, 7, 7]);
    assert_eq!(rig.clear(11, 0, 1, 1), UNSUPPORTED, "a flag that discards do not have");
    assert_eq!(rig.clear(13, 0, 1, 2), UNSUPPORTED);
    assert_eq!(rig.clear(13, 0, MAX_CLEAR + 1, 0), IO_ERROR);
    assert_eq!(rig.clear(13, 1 << 60, 1, 0), IO_ERROR);
    let two = [segment(0, 1, 0), segment(1, 1, 0)].concat();
    assert_eq!(rig.request(11, 0, &two, 0).1, IO_ERROR, "one segment was offered");
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let disk = MemoryDisk { read_only: true, ..MemoryDisk::new(4096) };
    let mut rig = Rig::with(disk, |_| {});
    let features = rig.device.features();
    assert_eq!(features & (feature::RO | feature::DISCARD | feature::WRITE_ZEROES), feature::RO);
    assert_eq!((rig.write(0, &[1; 512]), rig.read(0, 512).1), (IO_ERROR, OK));
}

#[test]
fn writes_are_durable_at_once_unless_the_driver_flushes() {
    let mut rig = Rig::new();
    let flushes = |rig: &Rig| rig.disk.flushes.load(Ordering::SeqCst);
    assert_eq!((rig.write(0, &[1; 512]), flushes(&rig)), (OK, 0));
    assert_eq!((rig.request(4, 0, &[], 0).1, flushes(&rig)), (OK, 1));
    rig.device.write_config(WRITEBACK, &[0]);
    assert_eq!((rig.write(0, &[1; 512]), flushes(&rig)), (OK, 2));
    assert_eq!((rig.read(0, 512).1, flushes(&rig)), (OK, 2));
    rig.device.write_config(WRITEBACK, &[1]);
    assert_eq!((rig.write(0, &[1; 512]), flushes(&rig)), (OK, 2));
    rig.guest.deactivate(&mut rig.device);
    rig.guest.features &= !feature::FLUSH;
    rig.guest.activate(&mut rig.device);
    assert_eq!((rig.write(0, &[1; 512]), flushes(&rig)), (OK, 3), "a driver that cannot flush");
}

#[test]
fn the_configuration_describes_the_disk() {
    let mut rig = Rig::new();
    let mut read = |at, length| {
        let mut data = [0; 8];
        rig.device.read_config(at, &mut data[..length]);
        u64::from_le_bytes(data)
    };
    assert_eq!((read(0, 8), read(8, 4), read(12, 4)), (2048, 65536, 254));
    assert_eq!((read(20, 4), read(24, 4), read(28, 4)), (512, 0x0008_0003, 8));
    assert_eq!((read(32, 1), read(34, 2)), (1, 2));
    assert_eq!((read(36, 4), read(40, 4), read(44, 4)), (1 << 22, 1, 8));
    assert_eq!((read(48, 4), read(52, 4), read(56, 1), read(60, 4)), (1 << 22, 1, 1, 0));
}

#[test]
fn on_a_full_host_the_request_fails_or_waits_as_configured() {
    let mut rig = Rig::new();
    rig.disk.full.store(true, Ordering::SeqCst);
    assert_eq!(rig.write(0, &[1; 512]), IO_ERROR);

    let paused = Arc::new(AtomicUsize::new(0));
    let count = paused.clone();
    let pause = OnFull::Pause(Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    }));
    let mut rig = Rig::with(MemoryDisk::new(8192), |config| config.on_full = pause.clone());
    rig.disk.full.store(true, Ordering::SeqCst);
    rig.guest.queues[1].add(&[&header(1, 3), &[5; 512]], &[1]);
    rig.guest.notify(1);
    rig.guest.deactivate(&mut rig.device);
    assert_eq!((paused.load(Ordering::SeqCst), rig.guest.queues[1].take_used()), (1, None));
    // The machine is saved in this state, and goes on in another one.
    let mut state = SavedState::new("test", 1);
    rig.device.save(&mut state);
    let mut device = Block::new(BlockConfig { on_full: pause, ..config(&rig.disk) });
    let mut reader = state.reader("test", 1).unwrap();
    device.restore(&mut reader).unwrap();
    reader.finish().unwrap();
    rig.disk.full.store(false, Ordering::SeqCst);
    rig.guest.activate(&mut device);
    rig.guest.transport.wait_used(1);
    assert_eq!(rig.guest.queues[1].take_used().unwrap().data, [OK]);
    assert_eq!(lock(&rig.disk.data)[3 * 512..4 * 512], [5; 512]);
}

#[test]
fn a_reset_forgets_what_waits() {
    let pause = OnFull::Pause(Arc::new(|| {}));
    let mut rig = Rig::with(MemoryDisk::new(8192), |config| config.on_full = pause);
    rig.disk.full.store(true, Ordering::SeqCst);
    rig.guest.queues[0].add(&[&header(1, 3), &[5; 512]], &[1]);
    rig.guest.notify(0);
    rig.guest.deactivate(&mut rig.device);
    rig.device.reset();
    rig.disk.full.store(false, Ordering::SeqCst);
    rig.guest.activate(&mut rig.device);
    rig.guest.deactivate(&mut rig.device);
    assert_eq!(rig.guest.queues[0].take_used(), None);
}
