//! What every test needs around a vCPU: the engine, memory, and a watchdog.
use arch::{CpuModel, GuestPhysical};
use engine::{Engine, EngineError, GuestMemory, Kick, VcpuIo, Vm, VmConfig};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use vm_memory::GuestAddress;

/// A VM with `size` bytes of RAM from address 0.
///
/// # Errors
/// Fails where the engine or the host's memory does.
pub fn make_vm(
    engine: &dyn Engine,
    size: u64,
    vcpus: u32,
) -> Result<(Arc<dyn Vm>, Arc<GuestMemory>), EngineError> {
    make_vm_on(engine, engine.host_cpu(), size, vcpus)
}

/// As [`make_vm`], with a CPU model.
///
/// # Errors
/// As [`make_vm`]; and the engine lacks what the model has.
pub fn make_vm_on(
    engine: &dyn Engine,
    cpu: CpuModel,
    size: u64,
    vcpus: u32,
) -> Result<(Arc<dyn Vm>, Arc<GuestMemory>), EngineError> {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), size as usize)])
        .map_err(|e| EngineError::Unsupported(format!("guest memory: {e}")))?;
    let memory = Arc::new(memory);
    let config = VmConfig { memory: memory.clone(), read_only: Vec::new(), cpu, vcpus };
    Ok((engine.create_vm(config)?, memory))
}

/// One access of the guest to a port or to device registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// OUT of a value.
    Out(u16, u32),
    /// IN.
    In(u16),
    /// A write to device registers.
    Write(GuestPhysical, u64),
    /// A read of device registers.
    Read(GuestPhysical),
    /// The end of a level-triggered interrupt.
    Eoi(u8),
}

/// The last port: a guest that writes to it has finished.
pub const DONE: u16 = 0xf4;

/// Ports to which a guest's last-resort exception handlers write.
pub const EXCEPTIONS: std::ops::Range<u16> = 0x80..0xa0;

/// Records what the guest says, and stops it when it is done.
pub struct Recorder {
    log: Mutex<Vec<Access>>,
    /// Kicked at [`DONE`]; all vCPUs of the VM.
    pub kickers: Mutex<Vec<Arc<dyn Kick>>>,
    /// What IN and device reads answer, repeated to the operand's width.
    pub answer: AtomicU64,
    /// Set when the guest wrote to [`DONE`].
    pub done: AtomicBool,
    /// Vector that the next acknowledge of the PIC gives, 256 for none.
    pub pic_vector: AtomicU64,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            log: Mutex::default(),
            kickers: Mutex::default(),
            answer: AtomicU64::new(u64::MAX),
            done: AtomicBool::new(false),
            pic_vector: AtomicU64::new(256),
        }
    }
}

impl Recorder {
    /// The accesses so far.
    pub fn log(&self) -> Vec<Access> {
        self.log.lock().map(|l| l.clone()).unwrap_or_default()
    }
    /// The values written to one port, in order.
    pub fn out(&self, port: u16) -> Vec<u32> {
        let of_port = |a: &Access| match a {
            Access::Out(p, value) if *p == port => Some(*value),
            _ => None,
        };
        self.log().iter().filter_map(of_port).collect()
    }
    /// Forgets all accesses.
    pub fn clear(&self) {
        if let Ok(mut log) = self.log.lock() {
            log.clear();
        }
        self.done.store(false, Ordering::SeqCst);
    }
    /// Makes all vCPUs return.
    pub fn stop(&self) {
        self.done.store(true, Ordering::SeqCst);
        if let Ok(kickers) = self.kickers.lock() {
            kickers.iter().for_each(|k| k.kick());
        }
    }
    fn note(&self, access: Access) {
        if let Ok(mut log) = self.log.lock()
            // A guest that loops around an access must not fill the host's memory.
            && log.len() < 100_000
        {
            log.push(access);
        }
    }
    fn fill(&self, data: &mut [u8]) {
        let bytes = self.answer.load(Ordering::SeqCst).to_le_bytes();
        data.iter_mut().zip(bytes.iter().cycle()).for_each(|(d, b)| *d = *b);
    }
}

fn little_endian(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.iter_mut().zip(data).for_each(|(b, d)| *b = *d);
    u64::from_le_bytes(bytes)
}

impl VcpuIo for Recorder {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Access::In(port));
        self.fill(data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.note(Access::Out(port, little_endian(data) as u32));
        if port == DONE || EXCEPTIONS.contains(&port) {
            self.stop();
        }
    }
    fn mmio_read(&self, address: GuestPhysical, data: &mut [u8]) {
        self.note(Access::Read(address));
        self.fill(data);
    }
    fn mmio_write(&self, address: GuestPhysical, data: &[u8]) {
        self.note(Access::Write(address, little_endian(data)));
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.note(Access::Eoi(vector));
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        let vector = self.pic_vector.swap(256, Ordering::SeqCst);
        u8::try_from(vector).ok()
    }
}

/// Kicks a vCPU that does not finish, and ends the process where not even that helps: a test
/// that hangs says nothing.
pub struct Watchdog {
    shared: Arc<Watched>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Watched {
    /// Odd while something runs.
    epoch: AtomicU64,
    fired: AtomicBool,
    quit: AtomicBool,
    what: Mutex<String>,
}

/// How often the watchdog looks.
const TICK: Duration = Duration::from_millis(100);
/// Ticks after which it kicks.
const PATIENCE: u32 = 100;

impl Watchdog {
    /// Watches over one VM.
    pub fn new(kickers: Vec<Arc<dyn Kick>>) -> Self {
        let shared = Arc::new(Watched {
            epoch: AtomicU64::new(0),
            fired: AtomicBool::new(false),
            quit: AtomicBool::new(false),
            what: Mutex::default(),
        });
        let watched = shared.clone();
        let thread = thread::spawn(move || watch(&watched, &kickers));
        Self { shared, thread: Some(thread) }
    }
    /// Begins to watch; `what` is told where it hangs for good.
    pub fn begin(&self, what: impl FnOnce() -> String) {
        if let Ok(mut text) = self.shared.what.lock() {
            *text = what();
        }
        self.shared.fired.store(false, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
    }
    /// Ends; returns whether the guest had to be stopped.
    pub fn end(&self) -> bool {
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        self.shared.fired.load(Ordering::SeqCst)
    }
}

fn watch(watched: &Watched, kickers: &[Arc<dyn Kick>]) {
    let (mut seen, mut ticks) = (0, 0u32);
    while !watched.quit.load(Ordering::SeqCst) {
        thread::park_timeout(TICK);
        let epoch = watched.epoch.load(Ordering::SeqCst);
        if epoch != seen || epoch.is_multiple_of(2) {
            (seen, ticks) = (epoch, 0);
            continue;
        }
        ticks += 1;
        if ticks >= PATIENCE {
            watched.fired.store(true, Ordering::SeqCst);
            kickers.iter().for_each(|k| k.kick());
        }
        if ticks >= PATIENCE * 3 {
            let what = watched.what.lock().map(|w| w.clone()).unwrap_or_default();
            eprintln!("the engine hangs and does not answer kicks: {what}");
            std::process::abort();
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A watchdog that panicked has nothing left to say.
            drop(thread.join());
        }
    }
}
