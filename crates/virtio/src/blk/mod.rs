//! The block device (§5.2): a disk of any format.
//!
//! A request is read and submitted on the thread that notifies, carried out on the disk's own
//! threads ([`disk::requests`]), and completed there. It owns its buffer, so nothing that the
//! guest does to its memory meanwhile matters. What is under way together is bounded in bytes.
mod request;
mod service;

use crate::{ActivateError, Activation, DeviceKind, VirtioDevice, pci, read_bytes};
use device::pci::PciSlot;
use device::state::Reader;
use device::{MachineBuilder, MapError, Notify, RestoreError, SavedState, Wire};
use disk::{Disk, SECTOR, requests};
use service::{Parked, Service};
use std::io;
use std::sync::Arc;

/// Feature bits (§5.2.3).
mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;
/// Data segments in a request: with header and status they fill a queue.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of a segment.
const MAX_SEGMENT: u32 = 64 << 10;
/// Bytes of data in a request: what the two limits above come to.
const MAX_TRANSFER: usize = MAX_SEGMENTS as usize * MAX_SEGMENT as usize;
/// Sectors that one discard or write-zeroes covers: 2 GiB.
const MAX_CLEAR: u32 = 1 << 22;
/// Bytes of a serial number (§5.2.6).
const SERIAL: usize = 20;
/// Offset of `writeback` in the configuration.
const WRITEBACK: usize = 32;

/// What happens when the host has no room for what the guest writes.
#[derive(Clone)]
pub enum OnFull {
    /// The request fails; the guest decides.
    Fail,
    /// The request waits, and this is called, which asks the machine to pause. When it goes on,
    /// the request is made again.
    Pause(Arc<dyn Fn() + Send + Sync>),
}

/// A disk for a machine.
pub struct BlockConfig {
    /// The name of the device, unique in its machine.
    pub name: String,
    /// The disk. It is read-only for the guest where it is so itself.
    pub disk: Arc<dyn Disk>,
    /// What the guest reads as the serial number; 20 bytes at most count.
    pub serial: String,
    /// Queues, 1 to 256: one for each vCPU is best.
    pub queues: u16,
    /// Threads that carry out requests, at least one.
    pub threads: usize,
    /// What happens when the host has no room.
    pub on_full: OnFull,
}

impl Wire for BlockConfig {
    type Handle = PciSlot;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<PciSlot, MapError> {
        pci::plug(machine, self.name.clone(), Box::new(Block::new(self)))
    }
}

/// The device.
pub struct Block {
    config: BlockConfig,
    /// The driver lets writes be cached until it flushes (§5.2.5).
    writeback: bool,
    /// Requests that wait for the machine to go on.
    parked: Vec<Parked>,
    /// Made with the first activation; its threads stay.
    requests: Option<Arc<requests::Queue>>,
    service: Option<Arc<Service>>,
}

impl Block {
    /// A device for a disk.
    pub fn new(config: BlockConfig) -> Self {
        Self { config, writeback: true, parked: Vec::new(), requests: None, service: None }
    }

    fn requests(&mut self) -> Result<Arc<requests::Queue>, ActivateError> {
        if let Some(requests) = &self.requests {
            return Ok(requests.clone());
        }
        let (disk, threads) = (self.config.disk.clone(), self.config.threads);
        let requests = requests::Queue::start(disk, threads).map_err(|error| {
            ActivateError::Host { what: "threads for a disk", source: io::Error::other(error) }
        })?;
        Ok(self.requests.insert(Arc::new(requests)).clone())
    }

    fn queues(&self) -> u16 {
        self.config.queues.clamp(1, 256)
    }

    /// The configuration structure (§5.2.4).
    fn space(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            space.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        let unit = u32::try_from(self.config.disk.unit() / SECTOR).unwrap_or(1).max(1);
        put(0, &(self.config.disk.size() / SECTOR).to_le_bytes());
        put(8, &MAX_SEGMENT.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Blocks of the host are of 4 KiB, 2³ sectors.
        put(24, &[3, 0, 8, 0]);
        put(28, &unit.to_le_bytes());
        put(WRITEBACK, &[u8::from(self.writeback)]);
        put(34, &self.queues().to_le_bytes());
        for (at, alignment) in [(36, Some(unit)), (48, None)] {
            put(at, &MAX_CLEAR.to_le_bytes());
            put(at + 4, &1u32.to_le_bytes()); // one segment
            alignment.into_iter().for_each(|unit| put(at + 8, &unit.to_le_bytes()));
        }
        put(56, &[1]); // zeroes may be unmapped
        space
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        use feature::*;
        let always = SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | MQ;
        always | if self.config.disk.read_only() { RO } else { DISCARD | WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues().into()]
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        read_bytes(&self.space(), offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (WRITEBACK, [value]) = (offset, data) {
            self.writeback = *value != 0;
            self.service.iter().for_each(|service| service.set_writeback(self.writeback));
        }
    }

    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError> {
        let requests = self.requests()?;
        let writeback = match (activation.has(feature::FLUSH), activation.has(feature::CONFIG_WCE))
        {
            (true, true) => self.writeback,
            // A driver that does not know the setting has the default (§5.2.5.1).
            (flushes, _) => flushes,
        };
        let service = Arc::new(Service::new(&self.config, requests, activation, writeback));
        service.resume(std::mem::take(&mut self.parked));
        self.service = Some(service.clone());
        let notifier = |index: usize| {
            let service = service.clone();
            let serve = move || service.serve(index);
            serve();
            Some(Arc::new(serve) as Arc<dyn Notify>)
        };
        Ok((0..usize::from(self.queues())).map(notifier).collect())
    }

    fn deactivate(&mut self) {
        if let Some(service) = self.service.take() {
            self.parked = service.stop();
        }
    }

    fn reset(&mut self) {
        self.writeback = true;
        self.parked.clear();
    }

    fn save(&self, state: &mut SavedState) {
        state.put("blk_writeback", &self.writeback);
        let parked = self.parked.iter().flat_map(|parked| parked.to_bytes());
        state.put("blk_parked", &parked.collect::<Vec<u8>>());
    }

    fn restore(&mut self, state: &mut Reader<'_>) -> Result<(), RestoreError> {
        self.writeback = state.get("blk_writeback")?;
        let queues = self.queues();
        let parked: Vec<u8> = state.get("blk_parked")?;
        let parked = parked.chunks(Parked::BYTES).map(|bytes| Parked::from_bytes(bytes, queues));
        let parked = parked.collect::<Option<Vec<_>>>();
        self.parked = parked.ok_or_else(|| state.out_of_range("blk_parked"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
