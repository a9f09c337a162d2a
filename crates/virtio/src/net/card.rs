//! The card at work: packets between the driver's queues and the network.
use super::control::Settings;
use super::{feature, header};
use crate::{Activation, Chain, Queue};
use ::net::{Accepts, Network, Nic, Packet};
use device::lock;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// The longest frame: 64 KiB of an IP packet, with Ethernet's header and a VLAN tag.
const MAX_FRAME: usize = 65_535 + 18;
/// Flows that are told apart, to answer each on the queue where it was last sent.
const FLOWS: usize = 256;

/// The card that is plugged into the network, whether or not there is a driver.
pub struct Card {
    network: Arc<dyn Network>,
    /// What the driver set through the control queue.
    pub settings: Mutex<Settings>,
    /// Features agreed on, for [`Nic::accepts`].
    features: AtomicU64,
    receiving: RwLock<Option<Receiving>>,
    sending: RwLock<Option<Vec<Sending>>>,
    /// The network was refused a packet and waits for room.
    waiting: AtomicBool,
    /// The pair on which a flow was last sent.
    flows: [AtomicU16; FLOWS],
}

/// The receive queues.
struct Receiving {
    queues: Vec<Mutex<Queue>>,
    mergeable: bool,
}

/// A transmit queue, with a buffer for frames.
struct Sending {
    queue: Queue,
    buffer: Mutex<Vec<u8>>,
}

impl Card {
    /// A card without a driver.
    pub fn new(network: Arc<dyn Network>, settings: Settings) -> Self {
        Self {
            network,
            settings: Mutex::new(settings),
            features: AtomicU64::new(0),
            receiving: RwLock::new(None),
            sending: RwLock::new(None),
            waiting: AtomicBool::new(false),
            flows: std::array::from_fn(|_| AtomicU16::new(0)),
        }
    }

    /// The driver is ready: pairs of receive and transmit queue.
    pub fn start(&self, activation: &Activation, pairs: Vec<(Queue, Queue)>) {
        self.features.store(activation.features, Ordering::SeqCst);
        let (receive, send): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        receive.iter().for_each(|queue| {
            queue.want_notifications(false);
        });
        let queues = receive.into_iter().map(Mutex::new).collect();
        let mergeable = activation.has(feature::MRG_RXBUF);
        let sending = |queue| Sending { queue, buffer: Mutex::default() };
        *write(&self.sending) = Some(send.into_iter().map(sending).collect());
        *write(&self.receiving) = Some(Receiving { queues, mergeable });
        self.waiting.store(false, Ordering::SeqCst);
        self.network.room();
    }

    /// The driver is gone, or the machine pauses: waits for what is under way.
    pub fn stop(&self) {
        write(&self.sending).take();
        write(&self.receiving).take();
    }

    /// Pulls the card out of its network.
    pub fn unplug(&self) {
        self.network.plug(None);
    }

    /// The driver has added receive buffers, and somebody waited for them.
    pub fn refilled(&self) {
        if !self.waiting.swap(false, Ordering::SeqCst) {
            return;
        }
        let receiving = self.receiving.read().unwrap_or_else(PoisonError::into_inner);
        for queue in receiving.iter().flat_map(|active| &active.queues) {
            lock(queue).want_notifications(false);
        }
        // The network may call back into `receive` at once.
        drop(receiving);
        self.network.room();
    }

    /// Sends what is in a transmit queue.
    pub fn transmit(&self, pair: usize) {
        let sending = self.sending.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Sending { queue, buffer }) = sending.as_ref().and_then(|s| s.get(pair)) else {
            return;
        };
        let mut buffer = lock(buffer);
        loop {
            queue.want_notifications(false);
            let mut sent = false;
            while let Some(chain) = queue.pop() {
                self.send(&chain, &mut buffer, pair as u16);
                queue.push_silently(chain, 0);
                sent = true;
            }
            if sent {
                queue.interrupt();
            }
            if !queue.want_notifications(true) {
                return;
            }
        }
    }

    /// Sends one packet; drops what makes no sense, as a wire would.
    fn send(&self, chain: &Chain, buffer: &mut Vec<u8>, pair: u16) {
        let mut reader = chain.reader();
        let Some(offload) = reader.read_array().and_then(header::parse) else { return };
        let length = reader.remaining();
        if length > MAX_FRAME {
            return;
        }
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let frame = buffer.get_mut(..length).unwrap_or_default();
        reader.read(frame);
        if let Some(flow) = flow(frame).and_then(|flow| self.flows.get(flow)) {
            flow.store(pair, Ordering::Relaxed);
        }
        self.network.transmit(Packet { frame, offload });
    }

    /// The receive queue for a frame: where its flow was last sent.
    fn steer<'a>(&self, queues: &'a [Mutex<Queue>], frame: &[u8]) -> Option<&'a Mutex<Queue>> {
        let flow = flow(frame).and_then(|flow| self.flows.get(flow));
        let pair = usize::from(flow.map_or(0, |flow| flow.load(Ordering::Relaxed)));
        let in_use = usize::from(lock(&self.settings).pairs).min(queues.len());
        queues.get(pair).filter(|_| pair < in_use).or_else(|| queues.first())
    }
}

impl Receiving {
    /// Puts a packet into a queue's buffers. `false`: there are not enough.
    fn deliver(&self, queue: &Queue, packet: &Packet<'_>) -> bool {
        let needed = header::LENGTH + packet.frame.len();
        loop {
            let (mut chains, mut room) = (Vec::new(), 0);
            while room < needed {
                let Some(chain) = queue.pop() else { break };
                room += chain.writer().remaining();
                chains.push(chain);
                if !self.mergeable {
                    break;
                }
            }
            let taken = chains.len() as u16;
            if room >= needed {
                fill(queue, chains, packet);
                return true;
            }
            queue.undo_pops(taken);
            if taken > 0 && !self.mergeable {
                // It will never fit: dropped, as by a driver without a buffer of that size.
                return true;
            }
            if !has_new(queue, taken) {
                return false;
            }
        }
    }
}

/// Asks for a notification of new buffers; whether some came beside the `known` ones.
fn has_new(queue: &Queue, known: u16) -> bool {
    queue.want_notifications(true);
    queue.waiting() > known
}

/// Writes a packet into chains that are large enough. The driver sees them together: it takes the
/// number of buffers in the header at its word (§5.1.6.4.1).
fn fill(queue: &Queue, chains: Vec<Chain>, packet: &Packet<'_>) {
    let header = header::build(packet.offload, chains.len() as u16);
    let mut rest = packet.frame;
    let mut first = true;
    queue.push_together(chains.into_iter().map(|chain| {
        let mut writer = chain.writer();
        if std::mem::take(&mut first) {
            writer.write(&header);
        }
        let count = writer.write(rest);
        rest = rest.get(count..).unwrap_or_default();
        let written = writer.written();
        (chain, written)
    }));
    queue.interrupt();
}

impl Nic for Card {
    fn accepts(&self) -> Accepts {
        let features = self.features.load(Ordering::SeqCst);
        let has = |feature| features & feature != 0;
        let checksum = has(feature::GUEST_CSUM);
        // Without the first, the others were not to be accepted (§5.1.3.1).
        let tcp4 = checksum && has(feature::GUEST_TSO4);
        let tcp6 = checksum && has(feature::GUEST_TSO6);
        Accepts { checksum, tcp4, tcp6 }
    }

    fn receive(&self, packet: Packet<'_>) -> bool {
        let receiving = self.receiving.read().unwrap_or_else(PoisonError::into_inner);
        let Some(active) = &*receiving else { return false };
        if packet.frame.len() > MAX_FRAME || !lock(&self.settings).wants(packet.frame) {
            return true;
        }
        let Some(queue) = self.steer(&active.queues, packet.frame) else { return true };
        let queue = lock(queue);
        if active.deliver(&queue, &packet) {
            return true;
        }
        self.waiting.store(true, Ordering::SeqCst);
        // Buffers that came before the flag was set told nobody.
        let came = active.deliver(&queue, &packet);
        if came {
            self.waiting.store(false, Ordering::SeqCst);
            queue.want_notifications(false);
        }
        came
    }
}

/// A number for the connection that a frame belongs to, the same in both directions.
fn flow(frame: &[u8]) -> Option<usize> {
    let (_, packet) = frame.split_at_checked(14)?;
    let sum = |bytes: &[u8]| {
        bytes.iter().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()))
    };
    let addresses = match frame.get(12..14)? {
        [8, 0] => (packet.get(12..16)?, packet.get(16..20)?, packet.get(20..24)),
        [0x86, 0xdd] => (packet.get(8..24)?, packet.get(24..40)?, packet.get(40..44)),
        _ => return None,
    };
    let (from, to, ports) = addresses;
    let (source, target) = ports.unwrap_or(&[0; 4]).split_at(2);
    let number =
        sum(from).wrapping_add(sum(to)).wrapping_add(sum(source)).wrapping_add(sum(target));
    Some((number ^ number >> 8 ^ number >> 16) as usize % FLOWS)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
