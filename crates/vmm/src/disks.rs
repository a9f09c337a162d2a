//! A machine's disks: how many queues and threads they have, and a host that is full.
use crate::config::{DiskConfig, OnFull};
use crate::events::{Events, Stop};
use device::{MapError, Wire as _, Wiring};
use std::sync::Arc;
use virtio::blk::{self, BlockConfig};

/// Queues beyond these bring nothing: a queue for each vCPU spares their drivers a lock.
const MAX_QUEUES: u16 = 8;
/// Threads that wait for the host's disk on behalf of one of the guest's.
const THREADS: usize = 4;

/// Wires the disks, `disk0` first.
///
/// # Errors
/// The PCI bus is full.
pub fn wire(
    wiring: &mut Wiring,
    disks: &[DiskConfig],
    vcpus: u32,
    events: &Arc<Events>,
) -> Result<(), MapError> {
    let queues = u16::try_from(vcpus).unwrap_or(MAX_QUEUES).clamp(1, MAX_QUEUES);
    for (number, config) in disks.iter().enumerate() {
        let events = events.clone();
        let on_full = match config.on_full {
            OnFull::Fail => blk::OnFull::Fail,
            OnFull::Pause => blk::OnFull::Pause(Arc::new(move || events.stop(Stop::DiskFull))),
        };
        let name = format!("disk{number}");
        let (disk, serial) = (config.disk.clone(), config.serial.clone());
        BlockConfig { name, disk, serial, queues, threads: THREADS, on_full }.wire(wiring)?;
    }
    Ok(())
}
