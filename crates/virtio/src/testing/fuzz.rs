//! A hostile driver: arbitrary bytes become register writes, rings and notifications.
//!
//! [`attack`] takes any device; [`devices`] makes those of this crate. What it looks for shows by
//! itself: a panic, a hang, or memory without bounds.
use super::{MemoryDisk, MemoryNetwork};
use crate::balloon::{Balloon, BalloonControl};
use crate::blk::{Block, BlockConfig, OnFull};
use crate::console::{Console, PortConfig, PortPeer};
use crate::net::{Net, NetConfig};
use crate::rng::Rng;
use crate::{VirtioDevice, pci};
use device::pci::{PciDevice, header};
use device::testing::TestMachine;
use device::{GuestMemory, GuestPhysical, SavedState, Shared, SharedDevice, lock};
use std::sync::Arc;
use vm_memory::GuestAddress;

/// Guest memory: small, so that buffers, tables and rings overlap.
const MEMORY: usize = 64 << 10;
/// Where BAR 0 is.
const BASE: u64 = 0xc000_0000;
/// Where the driver puts queue n: descriptors, then both rings.
const STRIDE: u64 = 0x1000;
/// The size that the driver gives its queues.
const SIZE: u64 = 16;

/// Makes a device.
pub type Maker = fn() -> Box<dyn VirtioDevice>;

/// The devices of this crate, by name.
pub fn devices() -> Vec<(&'static str, Maker)> {
    vec![
        ("blk", || {
            let pause = OnFull::Pause(Arc::new(|| {}));
            Box::new(Block::new(BlockConfig {
                name: "disk0".into(),
                disk: Arc::new(MemoryDisk::new(32 << 10)),
                serial: "fuzz".into(),
                queues: 2,
                threads: 1,
                on_full: pause,
            }))
        }),
        ("net", || {
            let network = MemoryNetwork::default();
            network.echoes.store(true, std::sync::atomic::Ordering::SeqCst);
            let (network, mac) = (Arc::new(network), [2, 0, 0, 0, 0, 1]);
            let name = "nic0".into();
            Box::new(Net::new(NetConfig { name, network, mac, mtu: 1500, pairs: 2 }))
        }),
        ("console", || {
            let port = |name: Option<&str>| PortConfig {
                name: name.map(str::to_owned),
                peer: Box::new(FullNowAndThen(0)),
            };
            Box::new(Console::new(vec![port(None), port(Some("agent"))]))
        }),
        ("rng", || Box::new(Rng::new())),
        ("balloon", || Box::new(Balloon::new(&BalloonControl::new(1 << 20)))),
    ]
}

/// A peer that takes part of what it gets.
struct FullNowAndThen(usize);

impl PortPeer for FullNowAndThen {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.0 = (self.0 + 1) % 3;
        bytes.len() / (self.0 + 1)
    }
    fn input_room(&mut self) {}
    fn guest_opened(&mut self, _open: bool) {}
}

/// Bytes to decide by; zeroes once they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }
    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
    fn number(&mut self) -> u64 {
        std::iter::repeat_with(|| self.byte()).take(8).fold(0, |n, byte| n << 8 | u64::from(byte))
    }
}

struct Attack<'a> {
    choices: Choices<'a>,
    machine: TestMachine,
    function: Shared<dyn PciDevice>,
    device: SharedDevice,
    saved: Option<SavedState>,
    queues: u64,
    features: u64,
}

/// Has a driver that follows `data` drive a device.
pub fn attack(device: Box<dyn VirtioDevice>, data: &[u8]) {
    let Ok(memory) = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]) else { return };
    let queues = device.queue_sizes().len() as u64;
    let features = device.features() | crate::feature::TRANSPORT;
    let mut machine = TestMachine::with_memory(memory);
    let bus = machine.builder().pci();
    let mapped = machine.builder().map_window(GuestPhysical(BASE), 0x10_0000, bus.window());
    let (Ok(()), Ok(slot)) = (mapped, pci::plug(machine.builder(), "fuzzed".into(), device)) else {
        return;
    };
    let (Some(function), Some(device)) = (bus.function(slot), machine.devices().first().cloned())
    else {
        return;
    };
    let choices = Choices(data);
    let mut attack = Attack { choices, machine, function, device, saved: None, queues, features };
    attack.start();
    while !attack.choices.0.is_empty() {
        attack.step();
    }
    lock(&attack.device).pause();
}

impl Attack<'_> {
    fn write(&self, offset: u64, width: usize, value: u64) {
        let bytes = value.to_le_bytes();
        let data = bytes.get(..width).unwrap_or_default();
        self.machine.bus().mmio_write(GuestPhysical(BASE + offset), data);
    }

    fn configure(&self, offset: u16, value: u32) {
        lock(&self.function).write_config(offset, value, u32::MAX);
    }

    /// Sets the device up as a driver should, with the features that are chosen.
    fn start(&mut self) {
        self.configure(header::BAR0, BASE as u32);
        self.configure(header::COMMAND, 6);
        self.write(20, 1, 0);
        // Mostly all that is offered, sometimes less, rarely what is not.
        let (kind, some) = (self.choices.byte(), self.choices.number());
        let features = match kind {
            0..=99 => self.features,
            100..=250 => self.features & some | crate::feature::VERSION_1,
            _ => some,
        };
        for half in 0..2 {
            self.write(8, 4, half);
            self.write(12, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.write(20, 1, 0xb);
        for queue in 0..self.queues {
            let at = STRIDE * queue % MEMORY as u64;
            self.write(22, 2, queue);
            self.write(24, 2, SIZE);
            self.write(26, 2, queue);
            self.write(32, 8, at);
            self.write(40, 8, at + 16 * SIZE);
            self.write(48, 8, at + 0x400);
            let enabled = u64::from(self.choices.byte() != 0);
            self.write(28, 2, enabled);
        }
        self.write(20, 1, 0xf);
    }

    fn step(&mut self) {
        match self.choices.byte() {
            0..=99 => self.chain(),
            100..=139 => self.notify(),
            140..=169 => self.scribble(),
            170..=199 => self.register(),
            200..=214 => {
                let (offset, value) = (self.choices.word() & 0xffc, self.choices.number());
                self.configure(offset, value as u32);
                lock(&self.function).read_config(offset);
            }
            215..=224 => self.start(),
            225..=239 => {
                lock(&self.device).pause();
                if self.choices.byte() < 128 {
                    self.saved = Some(lock(&self.device).save());
                }
                lock(&self.device).resume();
            }
            _ => self.restore(),
        }
    }

    /// Makes a chain of plausible buffers available and tells the device.
    fn chain(&mut self) {
        let queue = u64::from(self.choices.byte()) % self.queues;
        let table = STRIDE * queue % MEMORY as u64;
        let count = self.choices.byte() % 5 + 1;
        let first = self.choices.byte() % SIZE as u8;
        for n in 0..count {
            let (number, next) = ((first + n) % SIZE as u8, (first + n + 1) % SIZE as u8);
            let start = u64::from(self.choices.word()) & 0xfff8;
            let length = match self.choices.byte() {
                byte @ 0..=199 => u32::from(byte),
                200..=240 => 512,
                _ => u32::from(self.choices.word()) << (self.choices.byte() % 17),
            };
            let odd = self.choices.byte();
            let flags = u16::from(n + 1 < count) | if n + 1 == count { 2 } else { 0 };
            let flags = if odd < 200 { flags } else { u16::from(odd % 8) };
            let mut bytes = start.to_le_bytes().to_vec();
            bytes.extend(length.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(u16::from(next).to_le_bytes());
            self.poke(table + 16 * u64::from(number), &bytes);
            if n == 0 {
                // What many requests begin with: a small number.
                self.poke(start, &[odd % 16, 0, 0, 0]);
            }
        }
        let available = table + 16 * SIZE;
        let mut index = [0; 2];
        let _ = self.machine.ram.read(GuestPhysical(available + 2), &mut index);
        let index = u16::from_le_bytes(index);
        self.poke(available + 4 + 2 * (u64::from(index) % SIZE), &[first, 0]);
        self.poke(available + 2, &index.wrapping_add(1).to_le_bytes());
        self.write(0x3000 + 4 * queue, 2, queue);
    }

    fn notify(&mut self) {
        let queue = u64::from(self.choices.byte());
        self.write(0x3000 + 4 * queue, 2, queue);
    }

    fn scribble(&mut self) {
        let (at, value) = (u64::from(self.choices.word()), self.choices.number());
        self.poke(at, &value.to_le_bytes());
    }

    fn register(&mut self) {
        let offset = match self.choices.byte() {
            0..=149 => u64::from(self.choices.byte() % 64),
            150..=200 => 0x2000 + u64::from(self.choices.byte()),
            _ => u64::from(self.choices.word()) & 0x7fff,
        };
        let width = 1 << (self.choices.byte() % 4);
        let value = self.choices.number() >> (8 * (self.choices.byte() % 8));
        self.write(offset, width, value);
        let mut data = [0; 8];
        let data = data.get_mut(..width).unwrap_or_default();
        self.machine.bus().mmio_read(GuestPhysical(BASE + offset), data);
    }

    /// Restores what was saved, perhaps with a field that is damaged.
    fn restore(&mut self) {
        let Some(mut state) = self.saved.clone() else { return };
        let (which, value) = (usize::from(self.choices.byte()), self.choices.number());
        if let Some((_, field)) = state.fields.get_mut(which) {
            *field = device::state::Value::Number(value >> (value % 64));
        }
        let mut device = lock(&self.device);
        device.pause();
        if device.restore(&state).is_err() {
            device.reset();
        }
        device.resume();
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        // Beyond the end is as good as anywhere.
        let _ = self.machine.ram.write(GuestPhysical(at), bytes);
    }
}

/// Attacks a device with bytes that follow from a number.
pub fn attack_by_number(make: Maker, number: u64) {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = vec![0; 256 + (number % 8) as usize * 256];
    for byte in &mut data {
        // Xorshift (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 24) as u8;
    }
    attack(make(), &data);
}
