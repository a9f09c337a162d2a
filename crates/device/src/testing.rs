//! Fakes for the tests of devices: time that moves when told, and sinks that remember.
use crate::{
    AlarmQueue, Bus, Clock, Connections, Doorbells, Gsi, GuestMemory, GuestRam, InterruptSink,
    MachineBuilder, MsiSink, NoDoorbells, PowerEvent, PowerSink, SharedDevice, Wiring, lock,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A clock that stands still until a test moves it.
#[derive(Debug, Default)]
pub struct MockClock {
    now: Mutex<Duration>,
    wall: Mutex<Duration>,
}

impl MockClock {
    /// Moves both times on.
    pub fn advance(&self, by: Duration) {
        *lock(&self.now) += by;
        *lock(&self.wall) += by;
    }
    /// Sets the machine's time alone.
    pub fn set_now(&self, now: Duration) {
        *lock(&self.now) = now;
    }
    /// Sets the wall clock alone, in time since 1970.
    pub fn set_wall(&self, wall: Duration) {
        *lock(&self.wall) = wall;
    }
}
impl Clock for MockClock {
    fn now(&self) -> Duration {
        *lock(&self.now)
    }
    fn wall(&self) -> Duration {
        *lock(&self.wall)
    }
}

/// Remembers each change of an interrupt line.
#[derive(Debug, Default)]
pub struct RecordingInterrupts(Mutex<Vec<(Gsi, bool)>>);
impl RecordingInterrupts {
    /// The changes since the last call.
    pub fn take(&self) -> Vec<(Gsi, bool)> {
        std::mem::take(&mut lock(&self.0))
    }
    /// The number of rising edges since the last call.
    pub fn take_edges(&self) -> usize {
        self.take().iter().filter(|(_, high)| *high).count()
    }
}
impl InterruptSink for RecordingInterrupts {
    fn set_level(&self, gsi: Gsi, high: bool) {
        lock(&self.0).push((gsi, high));
    }
}

/// Remembers each message-signalled interrupt (address, data).
#[derive(Debug, Default)]
pub struct RecordingMsi(Mutex<Vec<(u64, u32)>>);
impl RecordingMsi {
    /// The messages since the last call.
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut lock(&self.0))
    }
}
impl MsiSink for RecordingMsi {
    fn signal(&self, address: u64, data: u32) {
        lock(&self.0).push((address, data));
    }
}

/// Remembers each power request.
#[derive(Debug, Default)]
pub struct RecordingPower(Mutex<Vec<PowerEvent>>);
impl RecordingPower {
    /// The requests since the last call.
    pub fn take(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut lock(&self.0))
    }
}
impl PowerSink for RecordingPower {
    fn request(&self, event: PowerEvent) {
        lock(&self.0).push(event);
    }
}

/// A machine of fakes: wire devices to it, then use [`TestMachine::bus`] and
/// [`TestMachine::advance`].
pub struct TestMachine {
    /// The clock.
    pub clock: Arc<MockClock>,
    /// The interrupt lines.
    pub interrupts: Arc<RecordingInterrupts>,
    /// The message-signalled interrupts.
    pub msi: Arc<RecordingMsi>,
    /// The power requests.
    pub power: Arc<RecordingPower>,
    /// The deadlines.
    pub alarms: Arc<AlarmQueue>,
    /// Guest memory.
    pub ram: GuestRam,
    wiring: Wiring,
}

impl Default for TestMachine {
    /// A machine without guest memory.
    fn default() -> Self {
        Self::with_memory(GuestMemory::new())
    }
}

impl TestMachine {
    /// A machine with guest memory.
    pub fn with_memory(memory: GuestMemory) -> Self {
        Self::with_doorbells(memory, Arc::new(NoDoorbells))
    }

    /// A machine with guest memory and doorbells.
    pub fn with_doorbells(memory: GuestMemory, doorbells: Arc<dyn Doorbells>) -> Self {
        let clock = Arc::new(MockClock::default());
        let interrupts = Arc::new(RecordingInterrupts::default());
        let msi = Arc::new(RecordingMsi::default());
        let power = Arc::new(RecordingPower::default());
        let alarms = AlarmQueue::new(|| {});
        let ram = GuestRam::new(Arc::new(memory), Arc::new(()));
        let wiring = Wiring::new(Connections {
            clock: clock.clone(),
            alarms: alarms.clone(),
            interrupts: interrupts.clone(),
            msi: msi.clone(),
            power: power.clone(),
            ram: ram.clone(),
            doorbells,
        });
        Self { clock, interrupts, msi, power, alarms, ram, wiring }
    }

    /// The builder for [`crate::Wire::wire`].
    pub fn builder(&mut self) -> &mut dyn MachineBuilder {
        &mut self.wiring
    }
    /// The bus with what was wired so far.
    pub fn bus(&self) -> &Bus {
        self.wiring.bus()
    }
    /// The devices wired so far.
    pub fn devices(&self) -> &[SharedDevice] {
        self.wiring.devices()
    }
    /// Moves time on, running each alarm at its deadline on the way.
    pub fn advance(&self, by: Duration) {
        let end = self.clock.now() + by;
        while let Some(deadline) = self.alarms.next_deadline().filter(|d| *d <= end) {
            self.clock.advance(deadline.saturating_sub(self.clock.now()));
            self.alarms.run_due(self.clock.now());
        }
        self.clock.advance(end.saturating_sub(self.clock.now()));
    }
    /// IN of one byte.
    pub fn inb(&self, port: u16) -> u8 {
        let mut data = [0];
        self.bus().pio_read(port, &mut data);
        data[0]
    }
    /// OUT of one byte.
    pub fn outb(&self, port: u16, value: u8) {
        self.bus().pio_write(port, &[value]);
    }
}
