//! Ports at work.
use super::PortConfig;
use super::control::{FromDriver, Owed};
use crate::Queue;
use device::state::Reader;
use device::{RestoreError, SavedState, lock};
use std::sync::Mutex;

/// Bytes that are moved at one go.
const PIECE: usize = 4096;

/// The host's end of a port. Its methods are called with the device locked: they do not wait, and
/// do not call [`Ports`].
pub trait PortPeer: Send {
    /// Bytes of the guest's. Answers how many it took; [`Ports::output_room`] asks for the rest.
    fn write(&mut self, bytes: &[u8]) -> usize;
    /// The guest has room for input again, after it took less than it was given.
    fn input_room(&mut self);
    /// A program in the guest has opened the port, or closed it. Only named ports are opened.
    fn guest_opened(&mut self, open: bool);
}

/// All ports of a device.
pub struct Ports(Mutex<State>);

struct State {
    ports: Vec<Port>,
    queues: Vec<Option<Queue>>,
    multiport: bool,
}

struct Port {
    name: Option<String>,
    peer: Box<dyn PortPeer>,
    /// A program in the guest has it open.
    open: bool,
    owed: Owed,
    /// Bytes of the first chain in the transmit queue that the peer took already.
    sent: u32,
    /// Input was refused.
    refused: bool,
}

/// The numbers of a port's queues: receive, and transmit after it.
fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 + 2 * port }
}
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

impl Ports {
    pub(super) fn new(configs: Vec<PortConfig>) -> Self {
        let port = |PortConfig { name, peer }| {
            let owed = Owed::default();
            Port { name, peer, open: false, owed, sent: 0, refused: false }
        };
        let ports = configs.into_iter().take(31).map(port).collect();
        Self(Mutex::new(State { ports, queues: Vec::new(), multiport: false }))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        lock(&self.0).ports.len()
    }

    /// Input for a port. Answers how many bytes the guest had room for; of the rest
    /// [`PortPeer::input_room`] tells when it is worth another try.
    pub fn input(&self, port: usize, bytes: &[u8]) -> usize {
        let mut state = lock(&self.0);
        let queue = state.queue(receive_queue(port));
        let Some(to) = state.ports.get_mut(port) else { return 0 };
        let mut taken = 0;
        if let Some(queue) = &queue {
            while taken < bytes.len() {
                let Some(chain) = queue.pop() else {
                    // Once more after the notifications are on.
                    if queue.want_notifications(true) { continue } else { break }
                };
                let mut writer = chain.writer();
                taken += writer.write(bytes.get(taken..).unwrap_or_default());
                let written = writer.written();
                queue.push_silently(chain, written);
            }
            queue.interrupt();
        }
        to.refused = taken < bytes.len();
        taken
    }

    /// The peer of a port can take output again.
    pub fn output_room(&self, port: usize) {
        lock(&self.0).transmit(port);
    }

    pub(super) fn start(&self, queues: Vec<Option<Queue>>, multiport: bool) {
        let mut state = lock(&self.0);
        (state.queues, state.multiport) = (queues, multiport);
        for index in 0..state.ports.len() {
            if let Some(queue) = state.queue(receive_queue(index)) {
                queue.want_notifications(false);
            }
        }
    }

    pub(super) fn stop(&self) {
        lock(&self.0).queues.clear();
    }

    pub(super) fn reset(&self) {
        for port in &mut lock(&self.0).ports {
            (port.owed, port.sent) = (Owed::default(), 0);
            port.set_open(false);
        }
    }

    /// The driver notifies a queue.
    pub(super) fn notified(&self, index: usize) {
        let mut state = lock(&self.0);
        match index {
            CONTROL_RECEIVE => state.tell(),
            CONTROL_TRANSMIT => state.listen(),
            0 => state.refilled(0),
            1 => state.transmit(0),
            index if index % 2 == 0 => state.refilled(index / 2 - 1),
            index => state.transmit(index / 2 - 1),
        }
    }

    pub(super) fn save(&self, state: &mut SavedState) {
        for (n, port) in lock(&self.0).ports.iter().enumerate() {
            state.put(&format!("console_port{n}_open"), &port.open);
            state.put(&format!("console_port{n}_owed"), &port.owed.to_byte());
            state.put(&format!("console_port{n}_sent"), &port.sent);
        }
    }

    pub(super) fn restore(&self, state: &mut Reader<'_>) -> Result<(), RestoreError> {
        for (n, port) in lock(&self.0).ports.iter_mut().enumerate() {
            port.set_open(state.get(&format!("console_port{n}_open"))?);
            let field = format!("console_port{n}_owed");
            let owed = Owed::from_byte(state.get(&field)?);
            port.owed = owed.ok_or_else(|| state.out_of_range(&field))?;
            port.sent = state.get(&format!("console_port{n}_sent"))?;
        }
        Ok(())
    }
}

impl Port {
    fn set_open(&mut self, open: bool) {
        if self.open != open {
            self.open = open;
            self.peer.guest_opened(open);
        }
    }
}

impl State {
    fn queue(&self, index: usize) -> Option<Queue> {
        self.queues.get(index)?.clone()
    }

    fn refilled(&mut self, port: usize) {
        let Some(queue) = self.queue(receive_queue(port)) else { return };
        if let Some(port) = self.ports.get_mut(port)
            && std::mem::take(&mut port.refused)
        {
            queue.want_notifications(false);
            port.peer.input_room();
        }
    }

    /// Hands the guest's output on, as far as the peer takes it.
    fn transmit(&mut self, port: usize) {
        let Some(queue) = self.queue(receive_queue(port) + 1) else { return };
        let Some(port) = self.ports.get_mut(port) else { return };
        loop {
            queue.want_notifications(false);
            while let Some(chain) = queue.pop() {
                let mut reader = chain.reader();
                reader.skip(port.sent as usize);
                while reader.remaining() > 0 {
                    let piece = reader.read_vec(PIECE);
                    let took = port.peer.write(&piece).min(piece.len());
                    port.sent = port.sent.saturating_add(took as u32);
                    if took < piece.len() {
                        // The chain is taken again when there is room.
                        queue.undo_pops(1);
                        return;
                    }
                }
                port.sent = 0;
                queue.push(chain, 0);
            }
            if !queue.want_notifications(true) {
                return;
            }
        }
    }

    /// Hears what the driver says.
    fn listen(&mut self) {
        let Some(queue) = self.queue(CONTROL_TRANSMIT).filter(|_| self.multiport) else { return };
        queue.serve(|chain| {
            match FromDriver::parse(&chain) {
                None => {}
                Some(FromDriver::Ready) => {
                    self.ports.iter_mut().for_each(|port| port.owed.add(Owed::ADD));
                }
                Some(FromDriver::PortReady(port)) => {
                    let port = self.ports.get_mut(port).into_iter();
                    port.for_each(|port| port.owed.add(Owed::DESCRIPTION));
                }
                Some(FromDriver::PortOpen(port, open)) => {
                    self.ports.get_mut(port).into_iter().for_each(|port| port.set_open(open));
                }
            }
            queue.push(chain, 0);
        });
        self.tell();
    }

    /// Tells the driver what it is owed, as far as it has buffers.
    fn tell(&mut self) {
        let Some(queue) = self.queue(CONTROL_RECEIVE).filter(|_| self.multiport) else { return };
        queue.want_notifications(true);
        for (id, port) in (0..).zip(&mut self.ports) {
            while !port.owed.is_nothing() {
                let Some(chain) = queue.pop() else { return };
                let Some(message) = port.owed.take(id, port.name.as_deref()) else {
                    queue.undo_pops(1);
                    break;
                };
                let mut writer = chain.writer();
                writer.write(&message);
                let written = writer.written();
                queue.push(chain, written);
            }
        }
    }
}
