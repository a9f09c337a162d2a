use super::*;
use crate::testing::{MEMORY, TestGuest};
use crate::{ActivateError, read_bytes};
use device::state::Reader;
use device::testing::TestMachine;
use device::{GuestMemory, NoDoorbells};
use registers::status;

/// Where the tests put BAR 0.
const BASE: u64 = 0xc000_0000;

/// Echoes requests in capitals, on the thread that notifies it.
#[derive(Default)]
struct Echo {
    served: Arc<Mutex<Option<Queue>>>,
    config: [u8; 8],
}

impl VirtioDevice for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }
    fn features(&self) -> u64 {
        1
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 8]
    }
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let there = self.config.iter_mut().skip(offset);
        there.zip(data).for_each(|(to, from)| *to = *from);
    }
    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError> {
        let queue =
            activation.queues.into_iter().next().flatten().ok_or(ActivateError::Queue(0))?;
        let served = self.served.clone();
        *lock(&served) = Some(queue);
        let serve = move || {
            for queue in lock(&served).iter() {
                queue.serve(|chain| {
                    let text = chain.reader().read_vec(100).to_ascii_uppercase();
                    let written = chain.writer().write(&text) as u32;
                    queue.push(chain, written);
                });
            }
        };
        serve();
        Ok(vec![Some(Arc::new(serve)), None])
    }
    fn deactivate(&mut self) {
        lock(&self.served).take();
    }
    fn reset(&mut self) {
        self.config = [0; 8];
    }
    fn save(&self, state: &mut SavedState) {
        state.put("echo_config", &self.config);
    }
    fn restore(&mut self, state: &mut Reader<'_>) -> Result<(), RestoreError> {
        self.config = state.get("echo_config")?;
        Ok(())
    }
}

/// A machine with the device, its driver's rings, and what a driver does.
struct Rig {
    machine: TestMachine,
    slot: PciSlot,
    guest: TestGuest,
}

impl Rig {
    fn new() -> Self {
        let guest = TestGuest::new(&[16, 8], 0);
        Self::over(guest)
    }

    /// A machine whose memory is that of `guest`.
    fn over(guest: TestGuest) -> Self {
        Self::with_doorbells(guest, Arc::new(NoDoorbells))
    }

    fn with_doorbells(guest: TestGuest, doorbells: Arc<dyn Doorbells>) -> Self {
        let memory: GuestMemory = guest.ram.memory().clone();
        let mut machine = TestMachine::with_doorbells(memory, doorbells);
        let window = machine.builder().pci().window().clone();
        machine.builder().map_window(GuestPhysical(BASE), 0x100_0000, &window).unwrap();
        let slot = plug(machine.builder(), "echo".into(), Box::new(Echo::default())).unwrap();
        Self { machine, slot, guest }
    }

    fn config(&mut self, offset: u16) -> u32 {
        let function = self.machine.builder().pci().function(self.slot).unwrap();
        lock(&function).read_config(offset)
    }
    fn set_config(&mut self, offset: u16, value: u32) {
        let function = self.machine.builder().pci().function(self.slot).unwrap();
        lock(&function).write_config(offset, value, u32::MAX);
    }
    fn read<const N: usize>(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.machine.bus().mmio_read(GuestPhysical(BASE + at), &mut data[..N]);
        u64::from_le_bytes(data)
    }
    fn write<const N: usize>(&self, at: u64, value: u64) {
        self.machine.bus().mmio_write(GuestPhysical(BASE + at), &value.to_le_bytes()[..N]);
    }
    fn status(&self) -> u8 {
        self.read::<1>(20) as u8
    }

    fn map(&mut self) {
        self.set_config(header::BAR0, BASE as u32);
        self.set_config(header::COMMAND, command::MEMORY | command::BUS_MASTER);
    }

    /// What a driver does up to DRIVER_OK.
    fn start(&mut self) {
        self.map();
        self.write::<1>(20, 3);
        self.write::<4>(8, 1);
        self.write::<4>(12, feature::VERSION_1 >> 32);
        self.write::<1>(20, 0xb);
        assert_eq!(self.status(), 0xb);
        for vector in 0..3u64 {
            let entry = bar::MSIX_TABLE + 16 * vector;
            self.write::<8>(entry, 0xfee0_0000);
            self.write::<8>(entry + 8, 0x40 + vector);
        }
        let control = self.config(0x40);
        self.set_config(0x40, control | 1 << 31);
        self.write::<2>(16, 0);
        for queue in 0..2u64 {
            let at = self.guest.queues[queue as usize].at;
            self.write::<2>(22, queue);
            self.write::<2>(26, queue + 1);
            self.write::<8>(32, at.descriptors.0);
            self.write::<4>(40, at.available.0 & 0xffff_ffff);
            self.write::<4>(44, at.available.0 >> 32);
            self.write::<8>(48, at.used.0);
            self.write::<2>(28, 1);
        }
        self.write::<1>(20, 0xf);
    }

    fn echo(&mut self, text: &[u8]) -> Vec<u8> {
        self.guest.queues[0].add(&[text], &[text.len()]);
        self.write::<2>(bar::NOTIFY, 0);
        self.guest.queues[0].take_used().unwrap().data
    }
}

#[test]
fn a_driver_finds_the_device_sizes_it_and_places_it() {
    let mut rig = Rig::new();
    assert_eq!(rig.config(header::IDS), 0x1044_1af4);
    rig.set_config(header::BAR0, u32::MAX);
    assert_eq!(rig.config(header::BAR0), 0xffff_8000, "32 KiB, 32 bits, not prefetchable");
    assert_eq!(rig.config(header::INTERRUPT) >> 8, 0, "no interrupt pin");
    let mut found = Vec::new();
    let mut at = rig.config(header::CAPABILITIES) as u16;
    while at != 0 {
        let first = rig.config(at);
        let offset = rig.config(at + 8);
        found.push((first as u8, (first >> 24) as u8, offset));
        at = (first >> 8 & 0xff) as u16;
    }
    let vendor = capability::VENDOR;
    assert_eq!(found[0].0, capability::MSIX);
    assert_eq!(
        found[1..],
        [
            (vendor, 1, 0),
            (vendor, 2, 0x3000),
            (vendor, 3, 0x1000),
            (vendor, 4, 0x2000),
            (vendor, 5, 0)
        ]
    );
    rig.map();
    assert_eq!((rig.read::<2>(18), rig.status()), (2, 0));
    rig.set_config(header::COMMAND, 0);
    assert_eq!(rig.read::<2>(18), 0xffff, "it no longer decodes");
}

#[test]
fn a_request_goes_through_and_interrupts_by_the_queues_vector() {
    let mut rig = Rig::new();
    rig.start();
    assert_eq!(rig.echo(b"hello"), b"HELLO");
    assert_eq!(rig.machine.msi.take(), [(0xfee0_0000, 0x41)]);
    assert_eq!(rig.read::<1>(bar::ISR), 0);
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_not_accepted() {
    let mut rig = Rig::new();
    rig.map();
    let offered = rig.read::<4>(4);
    rig.write::<4>(0, 1);
    assert_eq!((offered, rig.read::<4>(4)), (0x3000_0001, 1));
    for (select, features) in [(0, 2), (0, 1), (2, 1)] {
        rig.write::<1>(20, 0);
        rig.write::<4>(8, 1);
        rig.write::<4>(12, if features == 1 && select == 0 { 0 } else { 1 });
        rig.write::<4>(8, select);
        rig.write::<4>(12, features);
        rig.write::<1>(20, 0xb);
        assert_eq!(rig.status(), 3, "{select} {features}");
        rig.write::<1>(20, 0xf);
        assert_eq!(rig.status(), 3, "not ready without features");
    }
}

#[test]
fn queues_freeze_once_the_driver_is_ready() {
    let mut rig = Rig::new();
    rig.start();
    rig.write::<2>(22, 0);
    let before: Vec<_> = [24, 28, 32, 40, 48].map(|at| rig.read::<2>(at)).into();
    for at in [32, 40, 48] {
        rig.write::<8>(at, 0x1234_0000);
    }
    rig.write::<2>(24, 4);
    rig.write::<2>(28, 0);
    assert_eq!(before, [24, 28, 32, 40, 48].map(|at| rig.read::<2>(at)));
    rig.write::<4>(8, 0);
    rig.write::<4>(12, 1);
    assert_eq!(rig.read::<4>(12), 0, "so do features");
    assert_eq!(rig.echo(b"x"), b"X");
}

#[test]
fn sizes_and_vectors_that_cannot_be_are_not_taken() {
    let mut rig = Rig::new();
    rig.map();
    for size in [0, 3, 32] {
        rig.write::<2>(24, size);
        assert_eq!(rig.read::<2>(24), 16);
    }
    rig.write::<2>(24, 8);
    rig.write::<2>(26, 3);
    assert_eq!((rig.read::<2>(24), rig.read::<2>(26)), (8, 0xffff), "there are three vectors");
    rig.write::<2>(22, 2);
    assert_eq!((rig.read::<2>(24), rig.read::<2>(26)), (0, 0), "no such queue");
    rig.write::<2>(26, 1);
    rig.write::<8>(32, 0x1000);
    assert_eq!(rig.read::<8>(32), 0);
}

#[test]
fn a_queue_outside_memory_makes_the_device_need_a_reset() {
    let mut rig = Rig::new();
    rig.map();
    rig.write::<4>(8, 1);
    rig.write::<4>(12, 1);
    rig.write::<1>(20, 0xb);
    rig.write::<8>(32, MEMORY as u64);
    rig.write::<2>(28, 1);
    rig.write::<1>(20, 0xf);
    assert_eq!(rig.status(), 0xf | status::NEEDS_RESET);
    rig.write::<1>(20, 0);
    assert_eq!(rig.status(), 0);
    rig.start();
    assert_eq!(rig.echo(b"again"), b"AGAIN");
}

#[test]
fn a_malformed_chain_makes_the_device_need_a_reset_and_says_so() {
    let mut rig = Rig::new();
    rig.start();
    rig.guest.queues[0].make_available(16);
    rig.write::<2>(bar::NOTIFY, 0);
    assert_eq!(rig.status(), 0xf | status::NEEDS_RESET);
    assert_eq!(rig.machine.msi.take(), [(0xfee0_0000, 0x40)], "a configuration interrupt");
}

#[test]
fn a_reset_forgets_what_the_driver_set() {
    let mut rig = Rig::new();
    rig.start();
    rig.write::<4>(bar::DEVICE + 4, 7);
    rig.write::<1>(20, 0);
    assert_eq!((rig.status(), rig.read::<8>(bar::DEVICE)), (0, 0));
    assert_eq!((rig.read::<2>(16), rig.read::<2>(28), rig.read::<8>(32)), (0xffff, 0, 0));
    rig.write::<2>(bar::NOTIFY, 0);
    assert_eq!(rig.config(header::BAR0), BASE as u32, "the function stays where it is");
}

#[test]
fn configuration_space_reaches_the_registers_too() {
    let mut rig = Rig::new();
    rig.start();
    let access = 0x90;
    assert_eq!(rig.config(access) >> 24, u32::from(kind::PCI));
    let mut through = |offset: u32, width: u32, write: Option<u32>| {
        rig.set_config(access + 4, 0);
        rig.set_config(access + 8, offset);
        rig.set_config(access + 12, width);
        write.into_iter().for_each(|value| rig.set_config(access + 16, value));
        rig.config(access + 16)
    };
    assert_eq!(through(0x2004, 4, Some(0x1122_3344)), 0x1122_3344);
    assert_eq!(through(0x2006, 1, None), 0x22);
    assert_eq!(through(0x2004, 3, None), 0, "no such width");
    assert_eq!(through(0x8000, 4, Some(1)), 0, "beyond the end");
    assert_eq!(through(0x2005, 2, None), 0, "unaligned");
    assert_eq!(rig.read::<4>(bar::DEVICE + 4), 0x1122_3344);
}

#[test]
fn a_paused_device_does_nothing_and_goes_on_where_it_was() {
    let mut rig = Rig::new();
    rig.start();
    assert_eq!(rig.echo(b"one"), b"ONE");
    let device = rig.machine.devices()[0].clone();
    lock(&device).pause();
    rig.guest.queues[0].add(&[b"two"], &[3]);
    rig.write::<2>(bar::NOTIFY, 0);
    assert_eq!(rig.guest.queues[0].take_used(), None);
    lock(&device).resume();
    assert_eq!(rig.guest.queues[0].take_used().unwrap().data, b"TWO");
    assert_eq!(rig.echo(b"three"), b"THREE");
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_was() {
    let mut old = Rig::new();
    old.start();
    assert_eq!(old.echo(b"one"), b"ONE");
    old.write::<4>(bar::DEVICE, 9);
    lock(&old.machine.devices()[0]).pause();
    let state = lock(&old.machine.devices()[0]).save();
    old.guest.queues[0].add(&[b"two"], &[3]);
    let mut new = Rig::over(old.guest);
    let device = new.machine.devices()[0].clone();
    lock(&device).restore(&state).unwrap();
    lock(&device).pause();
    assert_eq!(lock(&device).save(), state);
    lock(&device).resume();
    assert_eq!(new.guest.queues[0].take_used().unwrap().data, b"TWO");
    assert_eq!(new.echo(b"three"), b"THREE");
    assert_eq!((new.read::<4>(bar::DEVICE), new.status()), (9, 0xf));
    let interrupt = (0xfee0_0000, 0x41);
    assert_eq!(new.machine.msi.take(), [interrupt, interrupt]);
}

#[test]
fn a_damaged_state_is_refused_by_its_field() {
    let mut rig = Rig::new();
    rig.start();
    let device = rig.machine.devices()[0].clone();
    lock(&device).pause();
    let state = lock(&device).save();
    for field in 0..state.fields.len() {
        let mut damaged = state.clone();
        let name = damaged.fields.remove(field).0;
        let error = lock(&device).restore(&damaged).unwrap_err();
        assert!(error.to_string().contains(&name), "{name}: {error}");
    }
    let mut damaged = state.clone();
    for (name, value) in &mut damaged.fields {
        if name == "driver_features" {
            *value = device::state::Value::Number(u64::MAX);
        }
    }
    assert!(lock(&device).restore(&damaged).unwrap_err().to_string().contains("status"));
}

#[test]
fn a_device_that_moves_takes_its_doorbells_along() {
    #[derive(Default)]
    struct Bells(Mutex<Vec<(u64, std::sync::Weak<()>)>>);
    impl Doorbells for Bells {
        fn register(&self, at: GuestPhysical, _: Arc<dyn Notify>) -> Option<DoorbellGuard> {
            let guard = Arc::new(());
            lock(&self.0).push((at.0, Arc::downgrade(&guard)));
            Some(Box::new(guard))
        }
    }
    let bells = Arc::new(Bells::default());
    let hung = || {
        let bells = lock(&bells.0);
        bells.iter().filter(|bell| bell.1.strong_count() > 0).map(|bell| bell.0).collect::<Vec<_>>()
    };
    let mut rig = Rig::with_doorbells(TestGuest::new(&[16, 8], 0), bells.clone());
    rig.start();
    assert_eq!(hung(), [BASE + 0x3000], "the other queue needs none");
    rig.set_config(header::BAR0, BASE as u32 + 0x10_0000);
    assert_eq!(hung(), [BASE + 0x10_3000]);
    rig.set_config(header::COMMAND, 0);
    assert!(hung().is_empty());
    rig.map();
    rig.write::<1>(20, 0);
    assert!(hung().is_empty());
}
