//! All devices in one machine: they fit together, survive hostile accesses, and a saved machine
//! is the same machine.
#![allow(clippy::unwrap_used)] // The lint's exception for tests does not know helpers.
use chipset::acpi_pm::AcpiPmConfig;
use chipset::debug_exit::DebugExitConfig;
use chipset::hpet::HpetConfig;
use chipset::i8042::I8042Config;
use chipset::pci::PciHostConfig;
use chipset::pit::PitConfig;
use chipset::rtc::RtcConfig;
use chipset::uart::{SerialOutput, UartConfig};
use chipset::{InterruptRouter, layout};
use device::testing::{MockClock, RecordingMsi, RecordingPower};
use device::{
    AlarmQueue, Bus, Clock, Connections, GuestMemory, GuestPhysical, GuestRam, NoDoorbells,
    SavedState, SharedDevice, Wire, Wiring, lock,
};
use std::sync::Arc;
use std::time::Duration;

struct Null;
impl SerialOutput for Null {
    fn write(&mut self, _bytes: &[u8]) {}
}

struct Pc {
    clock: Arc<MockClock>,
    msi: Arc<RecordingMsi>,
    alarms: Arc<AlarmQueue>,
    router: Arc<InterruptRouter>,
    bus: Bus,
    devices: Vec<SharedDevice>,
}

impl Pc {
    fn new() -> Self {
        let clock = Arc::new(MockClock::default());
        clock.set_wall(Duration::from_secs(1_700_000_000));
        let msi = Arc::new(RecordingMsi::default());
        let alarms = AlarmQueue::new(|| {});
        let router = InterruptRouter::new(Arc::new(|_| {}), msi.clone());
        let power = Arc::new(RecordingPower::default());
        let mut machine = Wiring::new(Connections {
            clock: clock.clone(),
            alarms: alarms.clone(),
            interrupts: router.clone(),
            msi: msi.clone(),
            power,
            ram: GuestRam::new(Arc::new(GuestMemory::new()), Arc::new(())),
            doorbells: Arc::new(NoDoorbells),
        });
        router.wire(&mut machine).unwrap();
        let (_, pit) = PitConfig.wire(&mut machine).unwrap();
        let (_, rtc) = RtcConfig { low_ram: 512 << 20, high_ram: 0 }.wire(&mut machine).unwrap();
        HpetConfig { pit, rtc }.wire(&mut machine).unwrap();
        I8042Config.wire(&mut machine).unwrap();
        AcpiPmConfig.wire(&mut machine).unwrap();
        PciHostConfig.wire(&mut machine).unwrap();
        DebugExitConfig.wire(&mut machine).unwrap();
        for index in 0..4 {
            UartConfig { index, peer: Box::new(Null) }.wire(&mut machine).unwrap();
        }
        let (bus, devices) = machine.finish();
        Self { clock, msi, alarms, router, bus, devices }
    }

    fn save(&self) -> Vec<SavedState> {
        self.devices.iter().map(|device| lock(device).save()).collect()
    }

    fn advance(&self, by: Duration) {
        self.clock.advance(by);
        self.alarms.run_due(self.clock.now());
    }
}

/// Steele and Vigna's SplitMix64: the same accesses in every run.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// One access, interrupt or pause that a guest could cause. Returns what the guest read.
fn misbehave(pc: &Pc, random: &mut Random) -> ([u8; 8], Option<u8>) {
    let mut data = random.next().to_le_bytes();
    let width = 1 << random.below(3);
    match random.below(8) {
        0 => pc.advance(Duration::from_nanos(random.next() >> (random.below(24) + 28))),
        1 => pc.router.end_of_interrupt(data[0]),
        2 => return (data, pc.router.acknowledge_pic()),
        kind @ 3..=5 => {
            let bases =
                [0x20, 0x40, 0x60, 0x70, 0x90, 0xa0, 0xf0, 0x2f8, 0x3f8, 0x4d0, 0x600, 0x620];
            let base = bases[random.below(bases.len() as u64) as usize];
            let port = base + random.below(16) as u16;
            // The PCI ports with a likely address.
            let port = if random.below(8) == 0 { 0xcf8 + port % 8 } else { port };
            if kind == 3 {
                pc.bus.pio_read(port, &mut data[..width]);
            } else {
                pc.bus.pio_write(port, &data[..width]);
            }
        }
        kind => {
            let (base, length) = [
                (layout::HPET, 0x180),
                (layout::IOAPIC, 0x48),
                (layout::PCI_ECAM, layout::PCI_ECAM_LENGTH_PER_BUS),
            ][random.below(3) as usize];
            let address = GuestPhysical(base.0 + random.below(length));
            if kind == 6 {
                pc.bus.mmio_read(address, &mut data);
            } else {
                pc.bus.mmio_write(address, &data[..width * 2]);
            }
        }
    }
    (data, None)
}

#[test]
fn no_access_of_a_guest_makes_a_device_panic() {
    for seed in 0..8 {
        let (pc, mut random) = (Pc::new(), Random(seed));
        for _ in 0..30_000 {
            misbehave(&pc, &mut random);
        }
        pc.msi.take();
    }
}

#[test]
fn a_restored_machine_is_the_same_machine() {
    for seed in 0..50 {
        let (old, mut random) = (Pc::new(), Random(seed));
        for _ in 0..500 {
            misbehave(&old, &mut random);
        }
        let new = Pc::new();
        new.clock.set_now(old.clock.now());
        new.clock.set_wall(old.clock.wall());
        for (device, state) in new.devices.iter().zip(old.save()) {
            lock(device).restore(&state).unwrap();
        }
        old.msi.take();
        new.msi.take();
        let mut same = Random(random.0);
        for step in 0..2_000 {
            // What is due by now may come a moment earlier to a machine that has just looked.
            old.alarms.run_due(old.clock.now());
            new.alarms.run_due(new.clock.now());
            let (old_saw, new_saw) = (misbehave(&old, &mut random), misbehave(&new, &mut same));
            assert_eq!(new_saw, old_saw, "seed {seed}, step {step}");
            assert_eq!(new.msi.take(), old.msi.take(), "seed {seed}, step {step}");
        }
    }
}

#[test]
fn a_damaged_state_is_refused_or_harmless() {
    let old = Pc::new();
    let mut random = Random(7);
    for state in old.save() {
        for damaged in 0..state.fields.len() {
            let mut state = state.clone();
            state.fields[damaged].1 = device::state::Value::Number(random.next());
            let new = Pc::new();
            for device in &new.devices {
                let mut device = lock(device);
                if device.save().kind == state.kind {
                    // Refused or not: the device must survive what follows.
                    let _ = device.restore(&state);
                }
            }
            for _ in 0..50 {
                misbehave(&new, &mut random);
            }
        }
    }
}

#[test]
fn reset_brings_every_device_back_to_power_up() {
    let (pc, mut random) = (Pc::new(), Random(3));
    for _ in 0..5_000 {
        misbehave(&pc, &mut random);
    }
    for device in &pc.devices {
        lock(device).reset();
    }
    let fresh = Pc::new().save();
    for (state, fresh) in pc.save().iter().zip(&fresh) {
        // The battery keeps the RTC; the ACPI timer runs on; inputs have the levels they have.
        if !["rtc", "acpi-pm", "pic", "ioapic"].contains(&state.kind.as_str()) {
            assert_eq!(state, fresh);
        }
    }
    assert_eq!(pc.alarms.next_deadline(), None);
}
