//! An engine whose vCPUs run closures instead of guests.
use crate::console::Console;
use crate::{
    BootSource, Bytes, CpuChoice, DeviceConfig, Host, Image, Machine, MachineConfig, Notice, Serial,
};
use arch::{CpuModel, VcpuState};
use engine::{
    Debugger, DirtyLog, Doorbell, DoorbellHandle, Doorbells, Engine, EngineError, GuestMemory,
    Halt, Kick, Msi, MsiLine, Notify, Vcpu, VcpuIo, Vm, VmConfig,
};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

/// What a fake vCPU does in one run.
pub type Script = dyn Fn(&Cpu<'_>) -> Result<Halt, EngineError> + Send + Sync;

/// A vCPU as its script sees it.
pub struct Cpu<'a> {
    /// The vCPU's number.
    pub index: u32,
    /// How often the machine was made before: 0 at the first start.
    pub boot: u32,
    pub io: &'a dyn VcpuIo,
    kick: &'a FakeKick,
    messages: &'a Mutex<Vec<Msi>>,
}

impl Cpu<'_> {
    pub fn out(&self, port: u16, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.io.pio_write(port, &[*byte]));
    }
    pub fn input(&self, port: u16) -> u8 {
        let mut data = [0];
        self.io.pio_read(port, &mut data);
        data[0]
    }
    /// The interrupt messages that the machine sent so far.
    pub fn messages(&self) -> Vec<Msi> {
        self.messages.lock().unwrap().clone()
    }
    /// As a guest in HLT: until the machine kicks the vCPU.
    pub fn halt(&self) -> Result<Halt, EngineError> {
        let mut kicked = self.kick.kicked.lock().unwrap();
        while !*kicked {
            kicked = self.kick.changed.wait(kicked).unwrap();
        }
        *kicked = false;
        Ok(Halt::Kicked)
    }
    /// Whether the machine has kicked the vCPU.
    pub fn kicked(&self) -> bool {
        *self.kick.kicked.lock().unwrap()
    }
}

#[derive(Default)]
struct FakeKick {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Kick for FakeKick {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

struct FakeVcpu {
    index: u32,
    boot: u32,
    state: VcpuState,
    kick: Arc<FakeKick>,
    script: Arc<Script>,
    messages: Arc<Mutex<Vec<Msi>>>,
    doorbells: Arc<Doorbells>,
}

impl Vcpu for FakeVcpu {
    fn run(&mut self, io: &dyn VcpuIo) -> Result<Halt, EngineError> {
        let (kick, messages) = (&*self.kick, &*self.messages);
        let io = &self.doorbells.before(io);
        (self.script)(&Cpu { index: self.index, boot: self.boot, io, kick, messages })
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }
    fn state(&mut self) -> Result<VcpuState, EngineError> {
        Ok(self.state.clone())
    }
    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }
    fn debugger(&mut self) -> Option<&mut dyn Debugger> {
        None
    }
}

struct FakeVm {
    boot: u32,
    script: Arc<Script>,
    messages: Arc<Mutex<Vec<Msi>>>,
    memory: Arc<GuestMemory>,
    doorbells: Arc<Doorbells>,
}

struct FakeLine {
    message: Mutex<Option<Msi>>,
    messages: Arc<Mutex<Vec<Msi>>>,
}

impl MsiLine for FakeLine {
    fn program(&self, message: Option<Msi>) -> Result<(), EngineError> {
        *self.message.lock().unwrap() = message;
        Ok(())
    }
    fn trigger(&self) {
        self.messages.lock().unwrap().extend(*self.message.lock().unwrap());
    }
    fn event(&self) -> Result<Option<OwnedFd>, EngineError> {
        Ok(None)
    }
}

impl Vm for FakeVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(FakeVcpu {
            index,
            boot: self.boot,
            state: VcpuState::reset(),
            kick: Arc::default(),
            script: self.script.clone(),
            messages: self.messages.clone(),
            doorbells: self.doorbells.clone(),
        }))
    }
    fn signal_msi(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
    fn set_pic_output(&self, _high: bool) {}
    fn signal_nmi(&self, _vcpu: u32) {}
    fn doorbell(
        &self,
        doorbell: Doorbell,
        notify: Arc<dyn Notify>,
    ) -> Result<DoorbellHandle, EngineError> {
        Ok(DoorbellHandle::new(self.doorbells.add(&self.memory, doorbell, notify)?))
    }
    fn memory_written(&self, _start: arch::GuestPhysical, _length: usize) {}
    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, EngineError> {
        Ok(Arc::new(FakeLine { message: Mutex::default(), messages: self.messages.clone() }))
    }
    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        None
    }
}

pub struct FakeEngine {
    script: Arc<Script>,
    boots: AtomicU32,
    last: Mutex<Weak<FakeVm>>,
}

impl FakeEngine {
    pub fn new(
        script: impl Fn(&Cpu<'_>) -> Result<Halt, EngineError> + Send + Sync + 'static,
    ) -> Self {
        Self { script: Arc::new(script), boots: AtomicU32::new(0), last: Mutex::default() }
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn max_vcpus(&self) -> u32 {
        8
    }
    fn host_cpu(&self) -> CpuModel {
        CpuModel::default()
    }
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
        let boot = self.boots.fetch_add(1, Ordering::Relaxed);
        let script = self.script.clone();
        let memory = config.memory;
        let (messages, doorbells) = Default::default();
        let vm = Arc::new(FakeVm { boot, script, messages, memory, doorbells });
        let last = std::mem::replace(&mut *self.last.lock().unwrap(), Arc::downgrade(&vm));
        assert!(last.upgrade().is_none(), "the VM from before the reset is still there");
        Ok(vm)
    }
}

/// A multiboot image that says where it is loaded (Multiboot 0.6.96 §3.1.3): four bytes of code
/// at 1 MiB.
pub fn kernel() -> Image {
    const MAGIC: u32 = 0x1bad_b002;
    const FLAGS: u32 = 1 << 16;
    const BASE: u32 = 0x10_0000;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
    let header = [MAGIC, FLAGS, checksum, BASE, BASE, BASE + 36, BASE + 36, BASE + 32];
    let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend([0x0f, 0x0b, 0xeb, 0xfe]);
    Image::from_bytes("test-kernel".into(), bytes).unwrap()
}

pub fn config() -> MachineConfig {
    MachineConfig {
        memory: Bytes::mib(16),
        vcpus: 1,
        cpu: CpuChoice::Host,
        boot: BootSource {
            kernel: kernel(),
            initrd: None,
            modules: Vec::new(),
            cmdline: String::new(),
        },
        serial: Serial::None,
        no_reboot: false,
        debug_exit: true,
        devices: DeviceConfig::default(),
    }
}

/// A machine whose console is connected to these descriptors.
pub fn machine(
    config: MachineConfig,
    engine: &FakeEngine,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
) -> Machine<'_> {
    Machine::with_console(config, engine, |_, wake| Ok(Console::new(input, output, None, wake)))
        .unwrap()
}

/// A host without signals that listens to nothing.
pub fn host(notify: &mut dyn FnMut(Notice<'_>)) -> Host<'_> {
    Host { signals: None, grace: Duration::ZERO, notify }
}
