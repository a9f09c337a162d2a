//! The KVM engine: guest CPUs run on the hardware's virtualisation, by way of Linux's `/dev/kvm`.
//!
//! `host` says what this host offers. `vm` makes a VM: the MSR filter, memory slots, then the split
//! interrupt chip, with the LAPICs in the kernel and PIC and IOAPIC in the machine. `vcpu` is
//! the run loop and `exits` what guests ask of the machine; `attention` makes a running vCPU
//! look up; `state` translates between KVM's structures and the engine-neutral state. Where
//! KVM's instruction emulator does not know an instruction, `completion` lets a companion engine
//! execute it. `doorbell`, `line`, `dirty` (with `ring`) and `debug` are the contract's powers,
//! `msr_filter` says which MSRs guests reach.
//!
//! Source for KVM's interface: Linux, Documentation/virt/kvm/api.rst; sections are cited as
//! "api.rst §4.35".
//!
//! `unsafe` code is confined to `attention`, `exits`, `memory`, `raw`, `ring` and
//! `state::fpu`.
mod attention;
mod completion;
mod cpuid;
mod debug;
mod dirty;
mod doorbell;
mod error;
mod exits;
mod host;
mod line;
mod memory;
mod msr_filter;
mod raw;
mod ring;
mod routes;
mod state;
mod vcpu;
mod vm;

pub use host::{Access, DEVICE_PATH, HostKvm, Virtualisation};

use arch::CpuModel;
use engine::{Engine, EngineError, Vm, VmConfig};
use kvm_ioctls::{Kvm, VmFd};
use std::sync::{Arc, Mutex, PoisonError};

/// Makes the engine that executes what KVM's instruction emulator does not know, when a guest
/// first needs it.
pub type Companion = fn() -> Result<Arc<dyn Engine>, EngineError>;

/// How the engine works.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Executes what KVM's instruction emulator does not know; without it, guests end with an
    /// error there.
    pub companion: Option<Companion>,
    /// For which instructions the guest is not left.
    pub keep_in_guest: KeepInGuest,
    /// How KVM keeps the dirty log.
    pub dirty_log: DirtyLogMeans,
}

/// How KVM keeps the dirty log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyLogMeans {
    /// In rings where KVM offers them and the hardware does the work, else in bitmaps. A KVM that
    /// emulates guests can write more pages in one go than a ring holds in reserve.
    #[default]
    Auto,
    /// In rings where KVM offers them: harvests cost by the page written and not by the size of
    /// memory. Each vCPU takes 64 KiB of the kernel's memory for its ring.
    Rings,
    /// In bitmaps, one for each part of memory.
    Bitmaps,
}

/// Idle instructions for which KVM does not leave the guest. That saves a latency of some
/// microseconds where each vCPU has a host CPU to itself, and else wastes host CPUs: they seem
/// busy while the guest sleeps. By default it leaves for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeepInGuest {
    /// HLT.
    pub hlt: bool,
    /// PAUSE, for which KVM else leaves when a guest spins.
    pub pause: bool,
    /// MWAIT.
    pub mwait: bool,
}

/// The KVM engine.
pub struct KvmEngine {
    kvm: Kvm,
    /// Asking KVM takes as long as making the VM.
    cpuid: cpuid::Supported,
    options: Options,
    /// A VM made in advance.
    ready: Mutex<Option<VmFd>>,
}

impl KvmEngine {
    /// Opens `/dev/kvm`. Guests end with an error where KVM cannot execute an instruction.
    ///
    /// # Errors
    /// There is no `/dev/kvm`, this user may not open it, or the kernel lacks a capability; the
    /// message says which, and what to do.
    pub fn new() -> Result<Self, EngineError> {
        Self::with_options(Options::default())
    }

    /// The engine with other options than the default ones. Those that need something that this
    /// host's KVM lacks are refused when a VM is made.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_options(options: Options) -> Result<Self, EngineError> {
        attention::install()?;
        let kvm = host::open()?;
        let cpuid = cpuid::Supported::read(&kvm)?;
        Ok(Self { kvm, cpuid, options, ready: Mutex::default() })
    }

    /// As [`Self::new`], with an engine that executes what KVM's instruction emulator does not
    /// know.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_companion(companion: Companion) -> Result<Self, EngineError> {
        Self::with_options(Options { companion: Some(companion), ..Options::default() })
    }

    /// The engine with its first VM made in advance, so that a KVM that opens but makes no VMs is
    /// told apart while there is still a choice of engines.
    ///
    /// # Errors
    /// KVM makes no VM; the message says what may be the reason.
    pub fn with_vm_ready(mut self) -> Result<Self, EngineError> {
        self.ready = Mutex::new(Some(vm::make(&self.kvm)?));
        Ok(self)
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn max_vcpus(&self) -> u32 {
        vm::max_vcpus(&self.kvm)
    }

    fn host_cpu(&self) -> CpuModel {
        self.cpuid.host_model()
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Arc::new(vm::KvmVm::new(&self.kvm, ready, &self.cpuid, config, self.options)?))
    }
}
