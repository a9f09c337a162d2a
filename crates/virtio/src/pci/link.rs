//! The way from a device back to its driver: interrupts, and what devices' threads change.
use crate::Transport;
use device::MsiSink;
use device::lock;
use device::pci::Msix;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

/// No MSI-X vector (§4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status (§4.1.4.5).
mod isr {
    pub const QUEUE: u8 = 1;
    pub const CONFIG: u8 = 2;
}

/// Interrupts of a function, with their routing.
pub struct Interrupts {
    /// The table.
    pub msix: Msix,
    /// Vector of configuration changes.
    pub config: u16,
    /// Vector of each queue.
    pub queues: Vec<u16>,
}

impl Interrupts {
    /// The vector as a driver may set it: one that is there, or none.
    pub fn vector(&self, asked: u16) -> u16 {
        if asked < self.msix.vectors() { asked } else { NO_VECTOR }
    }

    /// Forgets which vectors are whose.
    pub fn reset_routing(&mut self) {
        self.config = NO_VECTOR;
        self.queues.fill(NO_VECTOR);
    }
}

/// What the threads of a device share with its registers.
pub struct Link {
    /// Interrupts.
    pub interrupts: Mutex<Interrupts>,
    isr: AtomicU8,
    failed: AtomicBool,
    generation: AtomicU8,
}

impl Link {
    /// The link of a function with so many queues, and a vector for each and the configuration.
    pub fn new(queues: u16, vectors: u16, sink: Arc<dyn MsiSink>) -> Self {
        let msix = Msix::new(vectors, sink);
        let queues = vec![NO_VECTOR; queues.into()];
        Self {
            interrupts: Mutex::new(Interrupts { msix, config: NO_VECTOR, queues }),
            isr: AtomicU8::new(0),
            failed: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        }
    }

    /// Reads and clears the ISR status.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// The ISR status.
    pub fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    /// Whether the device needs a reset.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Changes with each change of the configuration space.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// As after a reset of the device; the generation goes on.
    pub fn reset(&self) {
        lock(&self.interrupts).reset_routing();
        self.isr.store(0, Ordering::SeqCst);
        self.failed.store(false, Ordering::SeqCst);
    }

    /// Takes over what was saved.
    pub fn restore(&self, isr: u8, failed: bool, generation: u8) {
        self.isr.store(isr, Ordering::SeqCst);
        self.failed.store(failed, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
    }

    fn signal(&self, cause: u8, vector: impl FnOnce(&Interrupts) -> u16) {
        let mut interrupts = lock(&self.interrupts);
        if interrupts.msix.is_enabled() {
            let vector = vector(&interrupts);
            interrupts.msix.signal(vector);
        } else {
            // The function has no interrupt pin: a driver without MSI-X polls this.
            self.isr.fetch_or(cause, Ordering::SeqCst);
        }
    }
}

impl Transport for Link {
    fn queue_used(&self, queue: u16) {
        self.signal(isr::QUEUE, |interrupts| {
            interrupts.queues.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR)
        });
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.signal(isr::CONFIG, |interrupts| interrupts.config);
    }

    fn fail(&self) {
        self.failed.store(true, Ordering::SeqCst);
        self.signal(isr::CONFIG, |interrupts| interrupts.config);
    }
}
