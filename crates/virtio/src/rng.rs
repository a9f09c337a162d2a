//! The entropy device (§5.4): random bytes of the host's.
//!
//! Requests are served on the thread that notifies: a few microseconds each.
use crate::{ActivateError, Activation, DeviceKind, Queue, VirtioDevice, pci};
use device::pci::PciSlot;
use device::state::Reader;
use device::{MachineBuilder, MapError, Notify, RestoreError, SavedState, Wire, lock};
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::{Arc, Mutex};

/// Entries of the queue: drivers in use have one request under way.
const QUEUE_SIZE: u16 = 8;
/// The most bytes that a request gets; a driver asks again for more (§5.4.6.2).
const MOST: usize = 4096;

/// Fills a buffer with random bytes; answers how many it could get, at least one.
type Source = fn(&mut [u8]) -> usize;

/// The device.
pub struct Rng {
    source: Source,
    /// The queue while the device is active. The lock is held while requests are served.
    queue: Arc<Mutex<Option<Queue>>>,
}

impl Rng {
    /// A device that takes its bytes from the host's kernel.
    pub fn new() -> Self {
        Self::from(host)
    }

    fn from(source: Source) -> Self {
        Self { source, queue: Arc::default() }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

/// What the kernel gives without waiting: it has been seeded long before any machine runs.
fn host(buffer: &mut [u8]) -> usize {
    loop {
        match getrandom(&mut *buffer, GetRandomFlags::empty()) {
            Ok(count) => return count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return 0,
        }
    }
}

fn serve(queue: &Mutex<Option<Queue>>, source: Source) {
    let queue = lock(queue);
    let Some(queue) = &*queue else { return };
    queue.serve(|chain| {
        let mut writer = chain.writer();
        let mut bytes = [0; MOST];
        let asked = writer.remaining().min(MOST);
        let got = source(bytes.get_mut(..asked).unwrap_or_default());
        writer.write(bytes.get(..got).unwrap_or_default());
        let written = writer.written();
        queue.push(chain, written);
    });
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }
    fn read_config(&mut self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }
    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError> {
        let queue = activation.queues.into_iter().next().flatten();
        *lock(&self.queue) = Some(queue.ok_or(ActivateError::Queue(0))?);
        let (queue, source) = (self.queue.clone(), self.source);
        let notify = move || serve(&queue, source);
        notify();
        Ok(vec![Some(Arc::new(notify))])
    }
    fn deactivate(&mut self) {
        lock(&self.queue).take();
    }
    fn reset(&mut self) {}
    fn save(&self, _state: &mut SavedState) {}
    fn restore(&mut self, _state: &mut Reader<'_>) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// A source of entropy for a machine.
#[derive(Clone, Copy, Debug)]
pub struct RngConfig;

impl Wire for RngConfig {
    type Handle = PciSlot;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<PciSlot, MapError> {
        pci::plug(machine, "rng".into(), Box::new(Rng::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestGuest;

    #[test]
    fn a_request_gets_random_bytes_but_not_without_end() {
        let mut device = Rng::from(|buffer| {
            buffer.fill(0x5a);
            buffer.len()
        });
        let mut guest = TestGuest::with(&mut device);
        assert_eq!(guest.request(0, &[], &[5, 3]), [0x5a; 8]);
        guest.queues[0].add(&[], &[3 * MOST]);
        guest.notify(0);
        assert_eq!(guest.queues[0].take_used().unwrap().written, MOST as u32);
    }

    #[test]
    fn the_hosts_bytes_differ_from_request_to_request() {
        let mut device = Rng::new();
        let mut guest = TestGuest::with(&mut device);
        let (a, b) = (guest.request(0, &[], &[32]), guest.request(0, &[], &[32]));
        assert!(a != b && a != [0xee; 32]);
    }

    #[test]
    fn a_request_without_room_comes_back_empty() {
        let mut device = Rng::new();
        let mut guest = TestGuest::with(&mut device);
        guest.queues[0].add(&[b"x"], &[]);
        guest.notify(0);
        assert_eq!(guest.queues[0].take_used().unwrap().written, 0);
    }

    #[test]
    fn requests_made_while_it_was_not_active_are_served_afterwards() {
        let mut device = Rng::new();
        let mut guest = TestGuest::with(&mut device);
        guest.deactivate(&mut device);
        guest.queues[0].add(&[], &[16]);
        guest.notify(0);
        assert_eq!(guest.queues[0].take_used(), None);
        guest.activate(&mut device);
        assert_eq!(guest.queues[0].take_used().unwrap().written, 16);
    }
}
