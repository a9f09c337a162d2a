//! Back ends in memory.
use ::net::{Network, Nic, Offload, Packet};
use device::lock;
use disk::{Disk, DiskError, Extent, ExtentKind, check_range};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A disk in memory that can be told to fail.
#[derive(Default)]
pub struct MemoryDisk {
    /// Its content.
    pub data: Mutex<Vec<u8>>,
    /// How often it was flushed.
    pub flushes: AtomicUsize,
    /// The host has no room.
    pub full: AtomicBool,
    /// The host cannot read or write.
    pub broken: AtomicBool,
    /// Writes are refused.
    pub read_only: bool,
}

impl MemoryDisk {
    /// A disk of zeroes.
    pub fn new(size: usize) -> Self {
        Self { data: Mutex::new(vec![0; size]), ..Self::default() }
    }

    fn check(&self, offset: u64, length: usize) -> Result<(), DiskError> {
        if self.broken.load(Ordering::SeqCst) {
            let source = std::io::Error::other("for the test");
            return Err(DiskError::Host { file: "memory".into(), action: "be used", source });
        }
        check_range(offset, length as u64, self.size())
    }

    fn write(
        &self,
        offset: u64,
        length: usize,
        byte: impl Fn(usize) -> u8,
    ) -> Result<(), DiskError> {
        self.check(offset, length)?;
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        if self.full.load(Ordering::SeqCst) {
            return Err(DiskError::Full { file: "memory".into() });
        }
        let mut data = lock(&self.data);
        let part = data.iter_mut().skip(offset as usize).take(length);
        part.enumerate().for_each(|(n, to)| *to = byte(n));
        Ok(())
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        lock(&self.data).len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, buffer.len())?;
        let data = lock(&self.data);
        let part = data.iter().skip(offset as usize);
        buffer.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.write(offset, data.len(), |n| data.get(n).copied().unwrap_or(0))
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.check(0, 0)
    }
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.write(offset, length as usize, |_| 0)
    }
    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.write(offset, length as usize, |_| 0)
    }
    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        self.check(offset, length as usize)?;
        Ok(Extent { kind: ExtentKind::Data, length })
    }
}

/// Packets that a [`MemoryNetwork`] remembers.
const REMEMBERED: usize = 1000;

/// A network that remembers what the guest sends, and sends it back where it is told to.
#[derive(Default)]
pub struct MemoryNetwork {
    sent: Mutex<Vec<(Vec<u8>, Offload)>>,
    nic: Mutex<Option<Arc<dyn Nic>>>,
    /// Packets come back to the guest at once.
    pub echoes: AtomicBool,
    rooms: AtomicUsize,
}

impl MemoryNetwork {
    /// What was sent since the last call.
    pub fn take_sent(&self) -> Vec<(Vec<u8>, Offload)> {
        std::mem::take(&mut lock(&self.sent))
    }
    /// The card that is plugged in.
    pub fn nic(&self) -> Option<Arc<dyn Nic>> {
        lock(&self.nic).clone()
    }
    /// How often the card said since the last call that it has room.
    pub fn take_rooms(&self) -> usize {
        self.rooms.swap(0, Ordering::SeqCst)
    }
}

impl Network for MemoryNetwork {
    fn plug(&self, nic: Option<Arc<dyn Nic>>) {
        *lock(&self.nic) = nic;
    }
    fn transmit(&self, packet: Packet<'_>) {
        let mut sent = lock(&self.sent);
        sent.truncate(REMEMBERED);
        sent.push((packet.frame.to_vec(), packet.offload));
        drop(sent);
        let nic = self.nic().filter(|_| self.echoes.load(Ordering::SeqCst));
        nic.iter().for_each(|nic| {
            nic.receive(packet);
        });
    }
    fn room(&self) {
        self.rooms.fetch_add(1, Ordering::SeqCst);
    }
}
