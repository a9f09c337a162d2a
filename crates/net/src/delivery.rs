//! Handing packets that come from elsewhere to a guest's card, in a form that it takes.
use crate::offload::adapt;
use crate::{Nic, Offload, Packet};
use std::collections::VecDeque;

/// What a card has refused so far, and memory to cut packets in.
#[derive(Debug, Default)]
pub(crate) struct Delivery {
    held: VecDeque<(Vec<u8>, Offload)>,
    scratch: Vec<u8>,
}

impl Delivery {
    /// Hands a packet over. What the card refuses is held, as are the packet's other segments: it
    /// is at most one packet's worth as long as no further one is delivered before
    /// [`Delivery::resume`] has answered `true`.
    pub fn deliver(&mut self, packet: Packet<'_>, nic: &dyn Nic) {
        let held = &mut self.held;
        adapt(packet, nic.accepts(), &mut self.scratch, |packet| {
            if !held.is_empty() || !nic.receive(packet) {
                held.push_back((packet.frame.to_vec(), packet.offload));
            }
            true
        });
    }

    /// Hands over what was held; answers whether nothing is any more.
    pub fn resume(&mut self, nic: &dyn Nic) -> bool {
        while let Some((frame, offload)) = self.held.front() {
            if !nic.receive(Packet { frame, offload: *offload }) {
                return false;
            }
            self.held.pop_front();
        }
        true
    }

    /// Forgets what was held: its card is gone.
    pub fn clear(&mut self) {
        self.held.clear();
    }

    pub fn is_free(&self) -> bool {
        self.held.is_empty()
    }
}
