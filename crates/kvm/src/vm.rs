//! A VM: memory slots, the split interrupt chip, and interrupts from the machine.
use crate::attention::Attention;
use crate::completion::Completer;
use crate::dirty::{Log, Means};
use crate::error::refused;
use crate::line::Line;
use crate::memory::MappedVm;
use crate::routes::{IOAPIC_ROUTES, LevelRoutes, Routes};
use crate::state::Layout;
use crate::vcpu::KvmVcpu;
use crate::{Options, cpuid, doorbell, exits, msr_filter};
use arch::FeatureSet;
use engine::{
    DirtyLog, Doorbell, DoorbellHandle, Doorbells, EngineError, Msi, MsiLine, Notify, Vcpu, Vm,
    VmConfig,
};
use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_APIC_BUS_CYCLES_NS,
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A message's destination has eight bits, of which 255 means all.
const APIC_IDS: u32 = 255;
/// Where KVM may put pages of its own that real mode on older Intel CPUs needs: below the
/// firmware, where no PC has anything (api.rst §4.34 and §4.37).
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;
/// How long KVM's LAPIC timer takes for a count before its divider.
const KVM_APIC_NANOSECONDS: u64 = 1;

/// The largest number of vCPUs that a VM can have.
pub fn max_vcpus(kvm: &Kvm) -> u32 {
    u32::try_from(kvm.get_max_vcpus()).unwrap_or(APIC_IDS).min(APIC_IDS)
}

/// What a VM and its vCPUs share.
pub struct VmShared {
    /// The VM and its memory.
    pub mapped: MappedVm,
    /// How it was asked for.
    pub config: VmConfig,
    /// Each vCPU's, by index.
    pub attention: Vec<Arc<Attention>>,
    /// The PIC's INTR output.
    pub pic_output: AtomicBool,
    /// What the VM's CPU model announces.
    pub features: FeatureSet,
    /// Where vector registers lie.
    pub xsave: Layout,
    /// Writes that ring.
    pub doorbells: Arc<Doorbells>,
    /// Which pages were written.
    pub dirty: Log,
    created: [AtomicU64; 4],
    routes: Mutex<Routes>,
    options: Options,
}

impl VmShared {
    /// What executes an instruction that KVM does not know, on behalf of a vCPU.
    pub fn completer(&self) -> Result<Completer, EngineError> {
        let completer = Completer::new(self.options.companion, &self.config)?;
        self.dirty.add_companion(completer.vm().clone())?;
        Ok(completer)
    }
}

/// Makes a VM that has nothing yet.
///
/// # Errors
/// KVM does not.
pub fn make(kvm: &Kvm) -> Result<VmFd, EngineError> {
    kvm.create_vm().map_err(refused(
        "KVM does not make a VM; another hypervisor may hold the CPU's virtualisation",
    ))
}

/// A VM on KVM.
pub struct KvmVm {
    shared: Arc<VmShared>,
}

impl KvmVm {
    /// Makes a VM without vCPUs, of the one that is `ready` if there is one.
    ///
    /// # Errors
    /// The configuration asks for more than KVM has, or the host refuses something.
    pub fn new(
        kvm: &Kvm,
        ready: Option<VmFd>,
        cpuid: &cpuid::Supported,
        config: VmConfig,
        options: Options,
    ) -> Result<Self, EngineError> {
        let most = max_vcpus(kvm);
        if config.vcpus == 0 || config.vcpus > most {
            return Err(EngineError::Unsupported(format!(
                "{} vCPUs: KVM on this host runs 1 to {most}",
                config.vcpus
            )));
        }
        cpuid.check(&config.cpu)?;
        let fd = ready.map_or_else(|| make(kvm), Ok)?;
        // Before all else: KVM waits for all who read the VM's lists to be done with the old ones,
        // which takes milliseconds unless it is the first such wait.
        msr_filter::set(&fd, &config.cpu)?;
        let mapped = MappedVm::new(kvm, fd, &config)?;
        prepare_chips(kvm, &mapped, &config)?;
        exits::keep_in_guest(&mapped.fd, options.keep_in_guest)?;
        let means = Means::choose(kvm, &mapped, options.dirty_log)?;
        let attention = (0..config.vcpus).map(|_| Arc::default()).collect();
        Ok(Self {
            shared: Arc::new(VmShared {
                mapped,
                features: config.cpu.features(),
                xsave: cpuid.xsave,
                config,
                attention,
                pic_output: AtomicBool::new(false),
                doorbells: Arc::default(),
                dirty: Log::new(means),
                created: [const { AtomicU64::new(0) }; 4],
                routes: Mutex::default(),
                options,
            }),
        })
    }
}

/// What has to be settled before there are vCPUs.
fn prepare_chips(kvm: &Kvm, mapped: &MappedVm, config: &VmConfig) -> Result<(), EngineError> {
    let fd = &mapped.fd;
    fd.set_identity_map_address(IDENTITY_MAP)
        .map_err(refused("KVM does not take KVM_SET_IDENTITY_MAP_ADDR"))?;
    fd.set_tss_address(TSS).map_err(refused("KVM does not take KVM_SET_TSS_ADDR"))?;
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = IOAPIC_ROUTES as u64;
    fd.enable_cap(&split).map_err(refused("KVM does not enable KVM_CAP_SPLIT_IRQCHIP"))?;
    if kvm.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0 {
        // Without it, user code of the guest gets #UD for what the emulator does not know.
        let mut exit =
            kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..Default::default() };
        exit.args[0] = 1;
        fd.enable_cap(&exit)
            .map_err(refused("KVM does not enable KVM_CAP_EXIT_ON_EMULATION_FAILURE"))?;
    }
    match cpuid::apic_nanoseconds(&config.cpu) {
        None | Some(KVM_APIC_NANOSECONDS) => Ok(()),
        Some(nanoseconds) => {
            let mut cycles =
                kvm_enable_cap { cap: KVM_CAP_X86_APIC_BUS_CYCLES_NS, ..Default::default() };
            cycles.args[0] = nanoseconds;
            fd.enable_cap(&cycles).map_err(refused(format!(
                "the VM's CPU model has a LAPIC timer of {nanoseconds} ns a count, for which KVM \
                 needs KVM_CAP_X86_APIC_BUS_CYCLES_NS (Linux 6.11); update the kernel, or use \
                 --engine soft"
            )))
        }
    }
}

impl VmShared {
    /// Takes vCPU `index`; answers whether it was free.
    fn claim(&self, index: u32) -> bool {
        let bit = 1 << (index % 64);
        self.created
            .get((index / 64) as usize)
            .is_some_and(|word| word.fetch_or(bit, Ordering::SeqCst) & bit == 0)
    }

    /// A panic cannot leave the routes half-changed.
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells KVM the routes.
    fn commit(&self, routes: &Routes) -> Result<(), EngineError> {
        let entries: Vec<_> = routes.list().map(|(gsi, message)| entry(gsi, message)).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| {
            EngineError::Defect(format!("{} interrupt routes: {e:?}", entries.len()))
        })?;
        self.mapped
            .fd
            .set_gsi_routing(&table)
            .map_err(refused("KVM does not take interrupt routes (KVM_SET_GSI_ROUTING)"))
    }

    /// Adds a level-triggered message to KVM's routes, if it is new.
    fn note_level(&self, message: Msi) {
        let mut routes = self.routes();
        if LevelRoutes::concerns(message) && routes.level.note(message) {
            // Refused only for more routes than KVM has, which lines never take. The interrupt
            // itself is delivered without its route; only its end would go unnoticed.
            let result = self.commit(&routes);
            debug_assert!(result.is_ok(), "{result:?}");
        }
    }

    /// Takes a route for a line; answers its number.
    ///
    /// # Errors
    /// KVM has no further route.
    pub fn new_line_route(&self, message: Option<Msi>) -> Result<u32, EngineError> {
        let most = u32::try_from(self.mapped.fd.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let mut routes = self.routes();
        let gsi = routes.new_line(message, most).ok_or_else(|| {
            EngineError::Unsupported(format!(
                "this host's KVM has no route for a further interrupt line (KVM_CAP_IRQ_ROUTING: \
                 {most}); give the guest fewer devices or queues"
            ))
        })?;
        if message.is_some()
            && let Err(error) = self.commit(&routes)
        {
            routes.end_line(gsi);
            return Err(error);
        }
        drop(routes);
        message.into_iter().for_each(|message| self.note_level(message));
        Ok(gsi)
    }

    /// Changes the message of a line's route.
    ///
    /// # Errors
    /// KVM does not take it; it keeps the old one.
    pub fn set_line_route(&self, gsi: u32, message: Option<Msi>) -> Result<(), EngineError> {
        let mut routes = self.routes();
        let before = routes.set_line(gsi, message);
        if let Err(error) = self.commit(&routes) {
            routes.set_line(gsi, before);
            return Err(error);
        }
        drop(routes);
        message.into_iter().for_each(|message| self.note_level(message));
        Ok(())
    }

    /// Frees a line's route. KVM forgets it with the next change: nothing uses it any more.
    pub fn end_line_route(&self, gsi: u32) {
        self.routes().end_line(gsi);
    }

    /// Delivers a message.
    pub fn signal(&self, msi: Msi) {
        if LevelRoutes::concerns(msi) {
            self.note_level(msi);
        }
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // An error says that no LAPIC takes the message, as on a bus: it is lost.
        let _ = self.mapped.fd.signal_msi(message);
    }
}

fn entry(gsi: u32, message: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

impl Vm for KvmVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        let shared = &self.shared;
        let Some(attention) = shared.attention.get(index as usize) else {
            return Err(EngineError::Unsupported(format!("there is no vCPU {index}")));
        };
        if !shared.claim(index) {
            return Err(EngineError::Unsupported(format!("vCPU {index} exists already")));
        }
        Ok(Box::new(KvmVcpu::new(shared.clone(), attention.clone(), index)?))
    }

    fn signal_msi(&self, msi: Msi) {
        self.shared.signal(msi);
    }

    fn set_pic_output(&self, high: bool) {
        self.shared.pic_output.store(high, Ordering::SeqCst);
        if high && let Some(attention) = self.shared.attention.first() {
            attention.call();
        }
    }

    fn signal_nmi(&self, vcpu: u32) {
        if let Some(attention) = self.shared.attention.get(vcpu as usize) {
            attention.want_nmi();
        }
    }

    fn doorbell(
        &self,
        doorbell: Doorbell,
        notify: Arc<dyn Notify>,
    ) -> Result<DoorbellHandle, EngineError> {
        doorbell::register(&self.shared, doorbell, notify)
    }

    /// The CPU sees all writes, and a companion starts afresh with each instruction.
    fn memory_written(&self, _start: arch::GuestPhysical, _length: usize) {}

    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, EngineError> {
        Ok(Arc::new(Line::new(self.shared.clone())))
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        Some(self.shared.as_ref())
    }
}
