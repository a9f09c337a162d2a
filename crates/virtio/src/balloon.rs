//! The memory balloon (§5.5): the guest gives memory back to the host.
//!
//! It does so in two ways. The *balloon* itself takes pages from the guest up to a target that the
//! host sets, and lets go of them when the target falls or the guest runs out of memory. *Free page
//! reporting* needs no target: the guest tells of memory that it has not used for a while. In
//! both cases the host frees the pages, and new ones, all zero, appear when the guest touches them.
use crate::chain::Chain;
use crate::discard::discard;
use crate::worker::Worker;
use crate::{
    ActivateError, Activation, DeviceKind, Queue, Transport, VirtioDevice, pci, read_bytes,
};
use device::pci::PciSlot;
use device::state::Reader;
use device::{
    GuestPhysical, GuestRam, MachineBuilder, MapError, Notify, RestoreError, SavedState, Wire, lock,
};
use std::fmt;
use std::sync::{Arc, Mutex};

/// Feature bits (§5.5.3).
mod feature {
    /// Statistics of the guest's memory.
    pub const STATS_VQ: u64 = 1 << 1;
    /// The guest may take pages back when it runs out of memory.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// The guest says with what it fills free pages.
    pub const PAGE_POISON: u64 = 1 << 4;
    /// Free page reporting.
    pub const REPORTING: u64 = 1 << 5;
}

/// Sizes of the queues: inflate, deflate, statistics, reporting. The standard numbers the last one
/// 4, behind a queue for a feature that is not offered here; Linux and the other devices number
/// the queues that there are.
const SIZES: [u16; 4] = [128, 128, 16, 128];

/// Bytes of the pages that drivers count in, whatever the guest's are (§5.5.6).
const PAGE: u64 = 4096;

/// Most pages of a request that are looked at. Drivers send 256.
const MOST_PAGES: usize = 16384;

/// Bytes of the configuration space (§5.5.4).
const CONFIG: usize = 16;

/// A memory balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    worker: Option<Worker>,
}

/// The host's side of a balloon. Clones are the same one.
#[derive(Clone)]
pub struct BalloonControl(Arc<Shared>);

impl fmt::Debug for BalloonControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalloonControl").field("target", &self.target()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    // Guest-visible: the configuration space (§5.5.4).
    /// Pages that the balloon shall have.
    target: u32,
    /// Pages that it has, as the driver says.
    actual: u32,
    /// What the driver fills free pages with.
    poison: u32,
    // Connections.
    transport: Option<Arc<dyn Transport>>,
    /// The driver's buffer for statistics, until the host wants new ones.
    held: Option<(Queue, Chain)>,
    // For the host.
    statistics: Option<Statistics>,
    reported: u64,
}

/// What a guest says of its memory (§5.5.6.3); it need not be true, nor complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// By tag.
    values: [Option<u64>; Statistic::COUNT],
    /// How many updates there have been, this one included.
    pub update: u64,
}

/// One of the [`Statistics`]. Amounts are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Statistic {
    /// Read from swap.
    SwapIn = 0,
    /// Written to swap.
    SwapOut = 1,
    /// Page faults that waited for a disk.
    MajorFaults = 2,
    /// Page faults that did not.
    MinorFaults = 3,
    /// Memory that is not in use.
    Free = 4,
    /// All of it.
    Total = 5,
    /// What new programs could have without swapping.
    Available = 6,
    /// What could be reclaimed from caches of files.
    Caches = 7,
    /// Huge pages given out.
    HugePages = 8,
    /// Huge pages that were asked for in vain.
    HugePageFailures = 9,
}

impl Statistic {
    const COUNT: usize = 10;
}

impl Statistics {
    /// What the guest said, if it did.
    pub fn get(&self, statistic: Statistic) -> Option<u64> {
        self.values.get(usize::from(statistic as u16)).copied().flatten()
    }
}

impl BalloonControl {
    /// The host's side of a balloon that shall have this many bytes at first.
    pub fn new(target: u64) -> Self {
        let control = Self(Arc::default());
        control.set_target(target);
        control
    }

    /// Asks the guest to give back this many bytes in all, in whole pages of 4 KiB. It takes its
    /// time, and may not be able to.
    pub fn set_target(&self, bytes: u64) {
        let mut state = lock(&self.0.state);
        state.target = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        if let Some(transport) = &state.transport {
            transport.config_changed();
        }
    }

    /// How many bytes the guest shall give back.
    pub fn target(&self) -> u64 {
        u64::from(lock(&self.0.state).target) * PAGE
    }

    /// How many bytes the guest says that it has given back.
    pub fn actual(&self) -> u64 {
        u64::from(lock(&self.0.state).actual) * PAGE
    }

    /// How many bytes were given back by free page reporting so far, those counted again that
    /// the guest has used meanwhile.
    pub fn reported(&self) -> u64 {
        lock(&self.0.state).reported
    }

    /// Asks the guest for new statistics. They come later, as one more [`Statistics::update`].
    pub fn request_statistics(&self) {
        self.0.release_statistics_buffer();
    }

    /// The latest statistics, where the guest has sent any.
    pub fn statistics(&self) -> Option<Statistics> {
        lock(&self.0.state).statistics
    }
}

impl Balloon {
    /// The guest's side of a balloon: one at a time.
    pub fn new(control: &BalloonControl) -> Self {
        let mut balloon = Self { shared: control.0.clone(), worker: None };
        balloon.reset();
        balloon
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        feature::STATS_VQ | feature::DEFLATE_ON_OOM | feature::PAGE_POISON | feature::REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        SIZES.to_vec()
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        read_bytes(&lock(&self.shared.state).config(), offset, data);
    }

    /// The driver writes `actual` and `poison_val`.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut state = lock(&self.shared.state);
        let mut space = state.config();
        let Some(place) = space.get_mut(offset..) else { return };
        place.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let [_, _, _, _, a0, a1, a2, a3, _, _, _, _, p0, p1, p2, p3] = space;
        state.actual = u32::from_le_bytes([a0, a1, a2, a3]);
        state.poison = u32::from_le_bytes([p0, p1, p2, p3]);
    }

    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError> {
        let with_statistics = activation.has(feature::STATS_VQ);
        let reporting = activation.has(feature::REPORTING);
        let mut queues = activation.queues.into_iter();
        let mut next = |number| queues.next().flatten().ok_or(ActivateError::Queue(number));
        let (inflate, deflate) = (next(0)?, next(1)?);
        let statistics = if with_statistics { Some(next(2)?) } else { None };
        let reporting = if reporting { Some(next(2 + u16::from(with_statistics))?) } else { None };
        lock(&self.shared.state).transport = Some(activation.transport.clone());
        let served = Served {
            shared: self.shared.clone(),
            ram: activation.ram,
            keeps_poison: activation.features & feature::PAGE_POISON != 0,
            inflate,
            deflate,
            statistics,
            reporting,
        };
        let worker = Worker::spawn("virtio-balloon", activation.transport, move || served.serve())?;
        let notifier = worker.notifier();
        self.worker = Some(worker);
        Ok(vec![Some(notifier); SIZES.len()])
    }

    fn deactivate(&mut self) {
        self.worker = None;
        // The driver sends a new buffer when the device goes on.
        self.shared.release_statistics_buffer();
        lock(&self.shared.state).transport = None;
    }

    fn reset(&mut self) {
        let mut state = lock(&self.shared.state);
        (state.actual, state.poison, state.statistics) = (0, 0, None);
    }

    fn save(&self, state: &mut SavedState) {
        let own = lock(&self.shared.state);
        state.put("balloon_target", &own.target);
        state.put("balloon_actual", &own.actual);
        state.put("balloon_poison", &own.poison);
    }

    fn restore(&mut self, state: &mut Reader<'_>) -> Result<(), RestoreError> {
        let mut own = lock(&self.shared.state);
        own.target = state.get("balloon_target")?;
        own.actual = state.get("balloon_actual")?;
        own.poison = state.get("balloon_poison")?;
        Ok(())
    }
}

impl Shared {
    fn release_statistics_buffer(&self) {
        let held = lock(&self.state).held.take();
        if let Some((queue, chain)) = held {
            queue.push(chain, 0);
        }
    }
}

impl State {
    /// `num_pages`, `actual`, `free_page_hint_cmd_id` (of a feature that is not offered) and
    /// `poison_val`.
    fn config(&self) -> [u8; CONFIG] {
        let mut space = [0; CONFIG];
        let words = [self.target, self.actual, 0, self.poison];
        let bytes = words.into_iter().flat_map(u32::to_le_bytes);
        space.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        space
    }
}

impl Wire for BalloonControl {
    type Handle = PciSlot;

    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<PciSlot, MapError> {
        pci::plug(machine, "balloon".into(), Box::new(Balloon::new(&self)))
    }
}

/// The queues of an active balloon.
struct Served {
    shared: Arc<Shared>,
    ram: GuestRam,
    /// PAGE_POISON was agreed on.
    keeps_poison: bool,
    inflate: Queue,
    deflate: Queue,
    statistics: Option<Queue>,
    reporting: Option<Queue>,
}

impl Served {
    fn serve(&self) {
        self.inflate.serve(|chain| {
            inflate(&self.ram, &chain);
            self.inflate.push(chain, 0);
        });
        // The pages come back by themselves when the guest touches them.
        self.deflate.serve(|chain| self.deflate.push(chain, 0));
        if let Some(queue) = &self.statistics {
            queue.serve(|chain| self.take_statistics(queue, chain));
        }
        if let Some(queue) = &self.reporting {
            queue.serve(|chain| {
                self.report(&chain);
                queue.push(chain, 0);
            });
        }
    }

    /// Frees reported pages. A guest that fills free pages with something other than zeroes expects
    /// to find that again (§5.5.6.5): then they stay.
    fn report(&self, chain: &Chain) {
        if self.keeps_poison && lock(&self.shared.state).poison != 0 {
            return;
        }
        let mut dropped = 0;
        for segment in chain.writable().iter().chain(chain.readable()) {
            // What the host does not free stays as it is, which is allowed.
            dropped += discard(&self.ram, segment.start, segment.length.into()).unwrap_or(0);
        }
        let mut state = lock(&self.shared.state);
        state.reported = state.reported.saturating_add(dropped);
    }

    /// Takes the driver's statistics and keeps its buffer until there shall be new ones.
    fn take_statistics(&self, queue: &Queue, chain: Chain) {
        let mut reader = chain.reader();
        let mut state = lock(&self.shared.state);
        let mut taken = Statistics { update: 1, ..Statistics::default() };
        taken.update += state.statistics.map_or(0, |before| before.update);
        // A driver sends each value once.
        for _ in 0..Statistic::COUNT {
            let Some([t0, t1, value @ ..]) = reader.read_array::<10>() else { break };
            let tag = usize::from(u16::from_le_bytes([t0, t1]));
            if let Some(place) = taken.values.get_mut(tag) {
                *place = Some(u64::from_le_bytes(value));
            }
        }
        state.statistics = Some(taken);
        let before = state.held.replace((queue.clone(), chain));
        drop(state);
        // There should be one buffer only.
        if let Some((queue, chain)) = before {
            queue.push(chain, 0);
        }
    }
}

/// Frees the pages whose numbers a chain has.
fn inflate(ram: &GuestRam, chain: &Chain) {
    let mut reader = chain.reader();
    let mut pages = Vec::new();
    while pages.len() < MOST_PAGES
        && let Some(number) = reader.read_array()
    {
        pages.push(u32::from_le_bytes(number));
    }
    pages.sort_unstable();
    pages.dedup();
    for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
        if let Some(first) = run.first() {
            let length = run.len() as u64 * PAGE;
            // What the host does not free stays the host's loss; what is no memory, the guest's.
            let _ = discard(ram, GuestPhysical(u64::from(*first) * PAGE), length);
        }
    }
}

#[cfg(test)]
#[path = "balloon_tests.rs"]
mod tests;
