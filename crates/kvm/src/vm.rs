//! A VM: memory slots, the split interrupt chip, and interrupts from the machine.
use crate::Companion;
use crate::attention::Attention;
use crate::completion::Completer;
use crate::cpuid;
use crate::error::refused;
use crate::memory::MappedVm;
use crate::routes::{IOAPIC_ROUTES, LevelRoutes};
use crate::state::Layout;
use crate::vcpu::KvmVcpu;
use arch::FeatureSet;
use engine::{EngineError, Msi, Vcpu, Vm, VmConfig};
use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_APIC_BUS_CYCLES_NS,
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::Kvm;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
    created: [AtomicU64; 4],
    routes: Mutex<LevelRoutes>,
    companion: Option<Companion>,
}

impl VmShared {
    /// What executes an instruction that KVM does not know, on behalf of a vCPU.
    pub fn completer(&self) -> Result<Completer, EngineError> {
        Completer::new(self.companion, &self.config)
    }
}

/// A VM on KVM.
pub struct KvmVm {
    shared: Arc<VmShared>,
}

impl KvmVm {
    /// Makes a VM without vCPUs.
    ///
    /// # Errors
    /// The configuration asks for more than KVM has, or the host refuses something.
    pub fn new(
        kvm: &Kvm,
        cpuid: &cpuid::Supported,
        config: VmConfig,
        companion: Option<Companion>,
    ) -> Result<Self, EngineError> {
        let most = max_vcpus(kvm);
        if config.vcpus == 0 || config.vcpus > most {
            return Err(EngineError::Unsupported(format!(
                "{} vCPUs: KVM on this host runs 1 to {most}",
                config.vcpus
            )));
        }
        cpuid.check(&config.cpu)?;
        let fd = kvm.create_vm().map_err(refused(
            "KVM does not make a VM; another hypervisor may hold the CPU's virtualisation",
        ))?;
        let mapped = MappedVm::new(kvm, fd, &config)?;
        prepare_chips(kvm, &mapped, &config)?;
        let attention = (0..config.vcpus).map(|_| Arc::default()).collect();
        Ok(Self {
            shared: Arc::new(VmShared {
                mapped,
                features: config.cpu.features(),
                xsave: cpuid.xsave,
                config,
                attention,
                pic_output: AtomicBool::new(false),
                created: [const { AtomicU64::new(0) }; 4],
                routes: Mutex::default(),
                companion,
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

    /// Adds a level-triggered message to KVM's routes, if it is new.
    fn route(&self, message: Msi) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if !routes.note(message) {
            return;
        }
        let entries: Vec<_> = (0..).zip(routes.list()).map(|(gsi, m)| entry(gsi, *m)).collect();
        if let Ok(table) = KvmIrqRouting::from_entries(&entries) {
            // Refused only for more routes than KVM has (4,096). The interrupt itself is
            // delivered without its route; only its end would go unnoticed.
            let result = self.mapped.fd.set_gsi_routing(&table);
            debug_assert!(result.is_ok(), "{result:?}");
        }
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
        if LevelRoutes::concerns(msi) {
            self.shared.route(msi);
        }
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // An error says that no LAPIC takes the message, as on a bus: it is lost.
        let _ = self.shared.mapped.fd.signal_msi(message);
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
}
