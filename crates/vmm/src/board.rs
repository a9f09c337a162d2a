//! What a machine is from power-on to reset: RAM, vCPUs, buses and devices.
use crate::clock::MachineClock;
use crate::config::MachineConfig;
use crate::console::Output;
use crate::cpu::CpuChoice;
use crate::error::VmmError;
use crate::events::{Events, Stop, Wake};
use crate::memory;
use crate::platform::platform;
use crate::vcpu::{VcpuContext, VcpuThread};
use crate::{disks, nics};
use arch::{CpuModel, GuestPhysical, VcpuState};
use boot::BootRequest;
use chipset::InterruptRouter;
use chipset::acpi_pm::{AcpiPm, AcpiPmConfig};
use chipset::debug_exit::DebugExitConfig;
use chipset::hpet::HpetConfig;
use chipset::i8042::I8042Config;
use chipset::pci::PciHostConfig;
use chipset::pit::PitConfig;
use chipset::rtc::RtcConfig;
use chipset::uart::{SerialOutput, Uart, UartConfig};
use device::{
    AlarmQueue, Bus, Clock, Connections, DoorbellGuard, Doorbells, GuestRam, MapError, MsiSink,
    Notify, PowerEvent, PowerSink, Shared, SharedDevice, Wire, Wiring, WriteObserver, lock,
};
use engine::{
    Doorbell, DoorbellPlace, Engine, GuestMemory, Msi, Rings, Vcpu, VcpuIo, Vm, VmConfig,
};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;
use virtio::rng::RngConfig;

/// Checks the parts of a configuration that need no files; answers the guest's CPU.
///
/// # Errors
/// Names the flag and the limit, or what the engine lacks for the CPU.
pub fn check(
    memory: crate::Bytes,
    vcpus: u32,
    cpu: CpuChoice,
    engine: &dyn Engine,
) -> Result<CpuModel, VmmError> {
    memory::check(memory)?;
    let most = engine.max_vcpus();
    if vcpus == 0 || vcpus > most {
        return Err(VmmError::Vcpus { asked: vcpus, engine: engine.name(), most });
    }
    cpu.on(engine)
}

/// The guest loaded into memory, and vCPUs in the state in which they start: what a board is
/// assembled around.
pub struct Core {
    memory: Arc<GuestMemory>,
    vm: Arc<dyn Vm>,
    vcpus: Vec<Box<dyn Vcpu>>,
}

impl Core {
    /// Allocates memory, loads the guest and makes the vCPUs.
    ///
    /// # Errors
    /// Names what cannot work in the configuration, or what the host or engine refuses.
    pub fn load(config: &MachineConfig, engine: &dyn Engine) -> Result<Self, VmmError> {
        let cpu = check(config.memory, config.vcpus, config.cpu, engine)?;
        let memory = Arc::new(memory::allocate(config.memory)?);
        let request = BootRequest {
            kernel: &config.boot.kernel,
            initrd: config.boot.initrd.as_ref(),
            modules: &config.boot.modules,
            cmdline: &config.boot.cmdline,
            vcpus: config.vcpus,
            platform: &platform(),
        };
        let entry = boot::load(&memory, &request)?;
        let vm = engine.create_vm(VmConfig {
            memory: memory.clone(),
            read_only: Vec::new(),
            cpu,
            vcpus: config.vcpus,
        })?;
        let states =
            std::iter::once(entry.state).chain((1..config.vcpus).map(boot::application_processor));
        let vcpus = (0..)
            .zip(states)
            .map(|(index, state)| create_vcpu(vm.as_ref(), index, &state))
            .collect::<Result<_, VmmError>>()?;
        Ok(Self { memory, vm, vcpus })
    }
}

/// What the host does not give, and the fix.
const NO_THREADS: &str = "a thread for each vCPU; raise its limit (`ulimit -u`) or give the guest \
                          fewer --cpus";

fn create_vcpu(vm: &dyn Vm, index: u32, state: &VcpuState) -> Result<Box<dyn Vcpu>, VmmError> {
    let mut vcpu = vm.create_vcpu(index)?;
    vcpu.set_state(state)?;
    Ok(vcpu)
}

/// The assembled machine. Dropping it ends its vCPU threads.
pub struct Board {
    events: Arc<Events>,
    clock: Arc<MachineClock>,
    alarms: Arc<AlarmQueue>,
    vcpus: Vec<VcpuThread>,
    /// `None` once halted: the devices hold the VM, and with it the guest's memory.
    devices: Option<Devices>,
}

impl Board {
    /// Wires all devices and starts the vCPU threads, paused.
    ///
    /// # Errors
    /// The host gives no further thread.
    pub fn assemble(
        config: &MachineConfig,
        core: Core,
        output: &Arc<Output>,
        wake: &Arc<Wake>,
    ) -> Result<Self, VmmError> {
        let Core { memory, vm, vcpus } = core;
        let events = Arc::new(Events::new(wake.clone()));
        let clock = Arc::new(MachineClock::stopped());
        let alarms = AlarmQueue::new({
            let wake = wake.clone();
            move || wake.wake()
        });
        let to_engine = Arc::new(ToEngine(vm.clone()));
        let pic_output = Arc::new(move |high| vm.set_pic_output(high));
        let router = InterruptRouter::new(pic_output, to_engine.clone());
        let mut wiring = Wiring::new(Connections {
            clock: clock.clone(),
            alarms: alarms.clone(),
            interrupts: router.clone(),
            msi: to_engine.clone(),
            power: Arc::new(PowerRequests(events.clone())),
            ram: GuestRam::new(memory.clone(), to_engine.clone()),
            doorbells: to_engine,
        });
        let (com1, acpi) = wire_devices(&mut wiring, &router, config, output, wake)?;
        wire_pci_devices(&mut wiring, config, &events)?;
        let (bus, all) = wiring.finish();
        let devices = Devices { all, com1, acpi };
        let io = Arc::new(MachineIo { bus, router, output: output.clone() });
        let vcpus = (0..)
            .zip(vcpus)
            .map(|(index, vcpu)| {
                let (events, memory) = (events.clone(), memory.clone());
                VcpuThread::spawn(vcpu, VcpuContext { index, io: io.clone(), events, memory })
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| VmmError::Host { what: NO_THREADS, source })?;
        events.set_vcpus(vcpus.iter().map(|vcpu| vcpu.control().clone()).collect());
        Ok(Self { events, clock, alarms, vcpus, devices: Some(devices) })
    }

    /// What vCPUs and devices report.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Lets time pass and the guest run.
    pub fn resume(&self) {
        self.clock.start();
        self.devices.iter().for_each(Devices::resume);
        self.vcpus.iter().for_each(|vcpu| vcpu.control().resume());
    }

    /// Stops the guest and time, and waits until both stand still.
    pub fn pause(&self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.control().pause());
        self.vcpus.iter().for_each(|vcpu| vcpu.control().wait_stopped());
        self.clock.stop();
        self.devices.iter().for_each(Devices::pause);
    }

    /// Ends all vCPU threads and frees the guest's memory.
    pub fn halt(&mut self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.control().finish());
        self.vcpus.clear();
        self.clock.stop();
        self.devices.take().iter().for_each(Devices::pause);
    }

    /// Offers input to the serial port; answers how many bytes it took.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.devices.as_ref().map_or(0, |devices| lock(&devices.com1).push_input(bytes))
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        if let Some(devices) = &self.devices {
            lock(&devices.acpi).press_power_button();
        }
    }

    /// How long until a device wants to be woken.
    pub fn next_alarm(&self) -> Option<Duration> {
        self.alarms.next_deadline().and_then(|deadline| self.clock.until(deadline))
    }

    /// Wakes the devices whose time has come.
    pub fn run_alarms(&self) {
        self.alarms.run_due(self.clock.now());
    }
}

/// All devices, and those that the machine itself talks to.
struct Devices {
    all: Vec<SharedDevice>,
    com1: Shared<Uart>,
    acpi: Shared<AcpiPm>,
}

impl Devices {
    /// Lets devices with threads of their own work.
    fn resume(&self) {
        self.all.iter().for_each(|device| lock(device).resume());
    }

    /// Has devices finish what is under way, and hands on what the guest has sent so far.
    fn pause(&self) {
        self.all.iter().for_each(|device| lock(device).pause());
        lock(&self.com1).flush();
    }
}

/// The list of a machine's devices; each wires itself. Answers those that the machine talks to.
fn wire_devices(
    wiring: &mut Wiring,
    router: &Arc<InterruptRouter>,
    config: &MachineConfig,
    output: &Arc<Output>,
    wake: &Arc<Wake>,
) -> Result<(Shared<Uart>, Shared<AcpiPm>), MapError> {
    let peer = Box::new(ConsolePeer { output: output.clone(), wake: wake.clone() });
    router.wire(wiring)?;
    let (_, pit) = PitConfig.wire(wiring)?;
    let (_, rtc) = rtc(config).wire(wiring)?;
    HpetConfig { pit, rtc }.wire(wiring)?;
    PciHostConfig.wire(wiring)?;
    I8042Config.wire(wiring)?;
    let acpi = AcpiPmConfig.wire(wiring)?;
    let com1 = UartConfig { index: 0, peer }.wire(wiring)?;
    if config.debug_exit {
        DebugExitConfig.wire(wiring)?;
    }
    Ok((com1, acpi))
}

/// The list of what is plugged into the PCI bus.
fn wire_pci_devices(
    wiring: &mut Wiring,
    config: &MachineConfig,
    events: &Arc<Events>,
) -> Result<(), MapError> {
    let devices = &config.devices;
    disks::wire(wiring, &devices.disks, config.vcpus, events)?;
    nics::wire(wiring, &devices.nics, config.vcpus)?;
    if devices.rng {
        RngConfig.wire(wiring)?;
    }
    for share in &devices.shares {
        share.clone().wire(wiring)?;
    }
    if let Some(balloon) = &devices.balloon {
        balloon.clone().wire(wiring)?;
    }
    if let Some(vsock) = &devices.vsock {
        vsock.clone().wire(wiring)?;
    }
    Ok(())
}

/// The clock chip, which also tells firmware and old systems how much RAM there is.
fn rtc(config: &MachineConfig) -> RtcConfig {
    let ranges = boot::ram_ranges(config.memory.0);
    let length = |at: usize| ranges.get(at).map_or(0, |(_, length)| *length);
    RtcConfig { low_ram: length(0), high_ram: length(1) }
}

/// The console, as the serial port sees it.
struct ConsolePeer {
    output: Arc<Output>,
    wake: Arc<Wake>,
}

impl SerialOutput for ConsolePeer {
    fn write(&mut self, bytes: &[u8]) {
        self.output.send(bytes);
    }
    fn input_room(&mut self) {
        self.wake.wake();
    }
}

/// The machine's buses, as its vCPUs reach them.
struct MachineIo {
    bus: Bus,
    router: Arc<InterruptRouter>,
    output: Arc<Output>,
}

impl VcpuIo for MachineIo {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.bus.pio_read(port, data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.bus.pio_write(port, data);
        // The one place where a vCPU waits for the console's reader: no device is locked here.
        self.output.throttle();
    }
    fn mmio_read(&self, address: GuestPhysical, data: &mut [u8]) {
        self.bus.mmio_read(address, data);
    }
    fn mmio_write(&self, address: GuestPhysical, data: &[u8]) {
        self.bus.mmio_write(address, data);
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.router.end_of_interrupt(vector);
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        self.router.acknowledge_pic()
    }
}

/// What devices have to tell the engine.
struct ToEngine(Arc<dyn Vm>);

/// Messages of devices and of the IOAPIC, to the engine's LAPICs.
impl MsiSink for ToEngine {
    fn signal(&self, address: u64, data: u32) {
        self.0.signal_msi(Msi { address, data });
    }
}

impl WriteObserver for ToEngine {
    fn written(&self, start: GuestPhysical, length: usize) {
        self.0.memory_written(start, length);
    }
}

impl Doorbells for ToEngine {
    fn register(&self, at: GuestPhysical, notify: Arc<dyn Notify>) -> Option<DoorbellGuard> {
        let doorbell = Doorbell { place: DoorbellPlace::Mmio(at), rings: Rings::Any };
        // An engine that is out of doorbells has the write go over the bus.
        let handle = self.0.doorbell(doorbell, Arc::new(Ringer(notify))).ok()?;
        Some(Box::new(handle))
    }
}

/// A device's notifier, as the engine sees it.
struct Ringer(Arc<dyn Notify>);

impl engine::Notify for Ringer {
    fn notify(&self) {
        self.0.notify();
    }
    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.0.event()
    }
}

/// Power requests of devices, as events.
struct PowerRequests(Arc<Events>);

impl PowerSink for PowerRequests {
    fn request(&self, event: PowerEvent) {
        self.0.stop(match event {
            PowerEvent::PowerOff => Stop::PowerOff,
            PowerEvent::Reset => Stop::Reset,
            PowerEvent::DebugExit(value) => Stop::DebugExit(value),
        });
    }
}
