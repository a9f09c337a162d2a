//! The socket device (§5.10): streams between programs in the guest and programs on the host.
//!
//! Programs on the host use Unix sockets, as with Firecracker and Cloud Hypervisor, so that no
//! root and no kernel module is needed. A program that connects to `PATH` sends a line `CONNECT
//! PORT`, is answered `OK` with a port of the host's once the guest has accepted, and then speaks
//! with what listens at that port in the guest. A program in the guest that connects to the host
//! (CID 2) and a port reaches what listens at `PATH_PORT`.
//!
//! `exchange` holds all connections, `connection` one of them, with its buffers and the credit
//! that bounds them, and `packet` the headers. One thread does all of it, and waits for nobody.
mod connection;
mod exchange;
mod options;
mod packet;

pub use options::{NotVsockOptions, VsockOptions};

use crate::worker::{FailOnPanic, Signal};
use crate::{ActivateError, Activation, DeviceKind, Queue, VirtioDevice, pci, read_bytes};
use device::pci::PciSlot;
use device::state::Reader;
use device::{MachineBuilder, MapError, Notify, RestoreError, SavedState, Wire, lock};
use exchange::Exchange;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

/// Queues (§5.10.2): to the guest, from the guest, events.
const SIZES: [u16; 3] = [256, 256, 16];

/// The event after which a driver gives up all connections (§5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// Why a guest cannot have sockets.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The address is one that no guest can have.
    #[error("{0} is no address of a guest; give one from 3 to 4294967294")]
    Cid(u64),
    /// The Unix socket cannot be made.
    #[error(
        "cannot listen at {path}; give a path in a folder that you may write to, and that no \
         other VM uses"
    )]
    Bind {
        /// The path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// The host's side: a guest's address, and the Unix socket through which it is reached. A machine
/// that starts again goes on with the same one. Clones are the same one.
#[derive(Clone)]
pub struct VsockHost {
    guest_cid: u64,
    /// `None` while a device is active.
    exchange: Arc<Mutex<Option<Exchange>>>,
}

impl VsockHost {
    /// Listens for programs that want to reach the guest.
    ///
    /// # Errors
    /// The address is reserved, or the socket cannot be made.
    pub fn new(options: &VsockOptions) -> Result<Self, VsockError> {
        let guest_cid = options.cid;
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        let exchange = Arc::new(Mutex::new(Some(Exchange::new(guest_cid, &options.path)?)));
        Ok(Self { guest_cid, exchange })
    }
}

impl fmt::Debug for VsockHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockHost").field("guest_cid", &self.guest_cid).finish_non_exhaustive()
    }
}

impl Wire for VsockHost {
    type Handle = PciSlot;

    fn wire(self, machine: &mut dyn MachineBuilder) -> Result<PciSlot, MapError> {
        pci::plug(machine, "vsock".into(), Box::new(Vsock::new(self)))
    }
}

/// A socket device.
pub struct Vsock {
    // Connections.
    host: VsockHost,
    active: Option<Active>,
    // Guest-visible state.
    /// The driver has connections that are gone, and must be told.
    lost: bool,
}

struct Active {
    signal: Arc<Signal>,
    thread: JoinHandle<Exchange>,
    /// Whether the driver was told of lost connections.
    told: Arc<AtomicBool>,
}

impl Vsock {
    /// The guest's side: one at a time.
    pub fn new(host: VsockHost) -> Self {
        let mut vsock = Self { host, active: None, lost: false };
        vsock.reset();
        vsock
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    /// None: streams are what there is where nothing was agreed on (§5.10.3).
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        SIZES.to_vec()
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        read_bytes(&self.host.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(
        &mut self,
        activation: Activation,
    ) -> Result<Vec<Option<Arc<dyn Notify>>>, ActivateError> {
        let mut queues = activation.queues.into_iter();
        let mut next = |number| queues.next().flatten().ok_or(ActivateError::Queue(number));
        let (receive, transmit, events) = (next(0)?, next(1)?, next(2)?);
        let host = |what| move |source: io::Error| ActivateError::Host { what, source };
        let signal = Arc::new(Signal::new()?);
        let gone = || io::Error::other("its thread has panicked");
        let exchange =
            lock(&self.host.exchange).take().ok_or_else(gone).map_err(host("the sockets"))?;
        exchange.watch(signal.descriptor()).map_err(Into::into).map_err(host("an event"))?;
        let told = Arc::new((!self.lost).into());
        let mut served = Served {
            exchange,
            signal: signal.clone(),
            receive,
            transmit,
            events,
            told: Arc::clone(&told),
        };
        let transport = activation.transport;
        let thread = Builder::new().name("virtio-vsock".into()).spawn(move || {
            let _guard = FailOnPanic(transport);
            served.serve();
            served.exchange
        });
        let thread = thread.map_err(host("a thread"))?;
        self.active = Some(Active { signal: signal.clone(), thread, told });
        Ok(vec![Some(signal); SIZES.len()])
    }

    fn deactivate(&mut self) {
        if let Some(Active { signal, thread, told }) = self.active.take() {
            signal.end();
            // A panic has failed the device.
            if let Ok(exchange) = thread.join() {
                exchange.unwatch(signal.descriptor());
                *lock(&self.host.exchange) = Some(exchange);
            }
            self.lost = !told.load(Ordering::SeqCst);
        }
    }

    fn reset(&mut self) {
        self.lost = false;
        if let Some(exchange) = &mut *lock(&self.host.exchange) {
            exchange.clear();
        }
    }

    /// Connections lead to programs of this host, and end with this process.
    fn save(&self, _state: &mut SavedState) {}

    fn restore(&mut self, _state: &mut Reader<'_>) -> Result<(), RestoreError> {
        self.reset();
        self.lost = true;
        Ok(())
    }
}

/// What the thread of an active device has.
struct Served {
    exchange: Exchange,
    signal: Arc<Signal>,
    receive: Queue,
    transmit: Queue,
    events: Queue,
    told: Arc<AtomicBool>,
}

impl Served {
    fn serve(&mut self) {
        loop {
            self.tell_of_loss();
            self.exchange.accept();
            let stalled = self.take_all();
            let more = self.exchange.send(&self.receive);
            self.receive.interrupt();
            // Buffers for the guest matter only while there is something to put into them.
            let buffers = self.receive.want_notifications(more) && more;
            if buffers || (stalled && self.exchange.can_take()) {
                continue;
            }
            if self.exchange.wait() && !self.signal.wait() {
                return;
            }
        }
    }

    /// Takes what the guest sends; answers whether it must wait.
    fn take_all(&mut self) -> bool {
        loop {
            self.transmit.want_notifications(false);
            while self.exchange.can_take() {
                let Some(chain) = self.transmit.pop() else { break };
                self.exchange.take(&chain);
                self.transmit.push_silently(chain, 0);
            }
            self.transmit.interrupt();
            if !self.exchange.can_take() {
                return true;
            }
            if !self.transmit.want_notifications(true) {
                return false;
            }
        }
    }

    fn tell_of_loss(&mut self) {
        if self.told.load(Ordering::SeqCst) {
            return;
        }
        self.events.want_notifications(true);
        if let Some(chain) = self.events.pop() {
            let mut writer = chain.writer();
            writer.write(&TRANSPORT_RESET.to_le_bytes());
            let written = writer.written();
            self.events.push(chain, written);
            self.told.store(true, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests;
