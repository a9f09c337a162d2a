//! The network card (§5.1): several queue pairs, checksum and TCP segmentation left to the
//! receiver both ways, mergeable receive buffers.
//!
//! Frames are sent on the thread that notifies, and received on the network's threads.
mod card;
mod control;
mod header;

pub use control::Mac;

use crate::{ActivateError, Activation, DeviceKind, Queue, VirtioDevice, pci, read_bytes};
use ::net::Network;
use card::Card;
use control::Settings;
use device::pci::PciSlot;
use device::state::Reader;
use device::{MachineBuilder, MapError, Notify, RestoreError, SavedState, Wire, lock};
use std::sync::{Arc, Mutex};

/// Feature bits (§5.1.3).
mod feature {
    pub const CSUM: u64 = 1;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const MQ: u64 = 1 << 22;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
}

/// Entries of a receive or transmit queue, and of the control queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Status in the configuration: the link is up.
const LINK_UP: u16 = 1;

/// A network card for a machine.
pub struct NetConfig {
    /// The name of the device, unique in its machine.
    pub name: String,
    /// What it is plugged into.
    pub network: Arc<dyn Network>,
    /// Its address.
    pub mac: Mac,
    /// The largest IP packet, in bytes, that it carries without segmentation.
    pub mtu: u16,
    /// Queue pairs, 1 to 64: one for each vCPU is best.
    pub pairs: u16,
}

impl Wire for NetConfig {
    type Handle = PciSlot;
    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<PciSlot, MapError> {
        pci::plug(machine, self.name.clone(), Box::new(Net::new(self)))
    }
}

/// The device.
pub struct Net {
    config: NetConfig,
    card: Arc<Card>,
    /// The control queue while the device is active. Held while it is served.
    control: Arc<Mutex<Option<Queue>>>,
}

impl Net {
    /// A card, plugged into its network.
    pub fn new(config: NetConfig) -> Self {
        let card = Arc::new(Card::new(config.network.clone(), Settings::new(config.mac)));
        config.network.plug(Some(card.clone()));
        Self { config, card, control: Arc::default() }
    }

    fn pairs(&self) -> u16 {
        self.config.pairs.clamp(1, 64)
    }

    /// The configuration structure (§5.1.4).
    fn space(&self) -> [u8; 12] {
        let mut space = [0; 12];
        let mac = lock(&self.card.settings).mac;
        let numbers = [LINK_UP, self.pairs(), self.config.mtu];
        let bytes = mac.into_iter().chain(numbers.into_iter().flat_map(u16::to_le_bytes));
        space.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        space
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        use feature::*;
        let offloads = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6;
        let control = CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR;
        offloads | control | MTU | MAC | MRG_RXBUF | STATUS | if self.pairs() > 1 { MQ } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.pairs())];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        read_bytes(&self.space(), offset, data);
    }

    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError> {
        // Where only one pair was agreed on, the control queue follows it (§5.1.2).
        let most = if activation.has(feature::MQ) { self.pairs() } else { 1 };
        let queue = |index: usize| activation.queues.get(index).cloned().flatten();
        let pairs: Vec<_> =
            (0..usize::from(most)).map_while(|n| queue(2 * n).zip(queue(2 * n + 1))).collect();
        if pairs.is_empty() {
            return Err(ActivateError::Queue(0));
        }
        let working = pairs.len();
        *lock(&self.control) = queue(2 * usize::from(most));
        self.card.start(&activation, pairs);
        let mut notifiers: Vec<Option<Arc<dyn Notify>>> = Vec::new();
        for pair in 0..working {
            let (card, sender) = (self.card.clone(), self.card.clone());
            sender.transmit(pair);
            notifiers.push(Some(Arc::new(move || card.refilled())));
            notifiers.push(Some(Arc::new(move || sender.transmit(pair))));
        }
        notifiers.resize(2 * usize::from(most), None);
        let (card, control) = (self.card.clone(), self.control.clone());
        let serve = move || {
            let control = lock(&control);
            control.iter().for_each(|queue| {
                queue.serve(|chain| {
                    let written = lock(&card.settings).serve(most, &chain);
                    queue.push(chain, written);
                });
            });
        };
        serve();
        notifiers.push(Some(Arc::new(serve)));
        Ok(notifiers)
    }

    fn deactivate(&mut self) {
        self.card.stop();
        lock(&self.control).take();
    }

    fn reset(&mut self) {
        *lock(&self.card.settings) = Settings::new(self.config.mac);
    }

    fn save(&self, state: &mut SavedState) {
        let settings = lock(&self.card.settings);
        state.put("net_mac", &settings.mac);
        state.put("net_pairs", &settings.pairs);
        state.put("net_promiscuous", &settings.promiscuous);
        state.put("net_all_multicast", &settings.all_multicast);
        state.put("net_unicast", &settings.unicast.concat());
        state.put("net_multicast", &settings.multicast.concat());
    }

    fn restore(&mut self, state: &mut Reader<'_>) -> Result<(), RestoreError> {
        let most = self.pairs();
        let list = |bytes: Vec<u8>| {
            bytes.chunks(6).filter_map(|mac| mac.try_into().ok()).collect::<Vec<Mac>>()
        };
        let whole = |bytes: &Vec<u8>| bytes.len().is_multiple_of(6);
        let settings = Settings {
            mac: state.get("net_mac")?,
            pairs: state.get_if("net_pairs", |pairs| (1..=most).contains(pairs))?,
            promiscuous: state.get("net_promiscuous")?,
            all_multicast: state.get("net_all_multicast")?,
            unicast: list(state.get_if("net_unicast", whole)?),
            multicast: list(state.get_if("net_multicast", whole)?),
        };
        *lock(&self.card.settings) = settings;
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.card.unplug();
    }
}

#[cfg(test)]
mod tests;
