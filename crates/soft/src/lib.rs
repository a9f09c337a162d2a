//! The software CPU engine: runs x86 guests of all modes on any x86-64 host, without `/dev/kvm`,
//! by translating guest code to host code.
//!
//! Where a guest instruction goes: `run` finds the block at the guest's instruction pointer in
//! the code `cache`; if there is none, `translate` decodes guest code and `emit` writes host
//! code for it into `codemem`. Translated code runs between `thunks` with guest registers in
//! host registers and probes the software `tlb` inline; what it cannot do itself it asks
//! of `helpers`: memory accesses that miss (`access`), and instructions that only the system
//! knows how to execute (`execute` and the modules it dispatches to). The whole state of a
//! virtual CPU is `cpu::Cpu`; `mode` is the part of it that decides what code means. `vm`
//! holds what vCPUs share, `signals` turns faults of the host CPU into the guest's.
//!
//! `unsafe` code is confined to `access`, `clock`, `codemem`, `fpu`, `helpers`, `ram`, `region`, `run`,
//! `signals`, `strings`, `thunks`, `translate::fetch`, `translate::undefined` and `vcpu`.
mod access;
mod cache;
mod clock;
mod codemem;
mod control;
mod cpu;
mod cpuid;
mod debug;
mod dirty;
mod emit;
mod events;
mod exception;
mod execute;
mod fpu;
mod helpers;
mod instruction_set;
mod interrupt;
mod invalidate;
mod lapic;
mod legacy;
mod line;
mod mmu;
mod mode;
mod msr;
mod near;
mod operand;
mod ports;
mod ram;
mod region;
mod rewritten;
mod routing;
mod run;
mod segment;
mod signals;
mod space;
mod stack;
mod state;
mod strings;
mod syscall;
mod tables;
mod task;
mod thunks;
mod tlb;
mod transfer;
mod translate;
mod vcpu;
mod vector_memory;
mod vm;
mod xsave;

use engine::{
    DirtyLog, Doorbell, DoorbellHandle, Engine, EngineError, Msi, MsiLine, Notify, Vcpu, Vm,
    VmConfig,
};
use instruction_set::InstructionSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How the engine works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Keep arithmetic flags exact at every faulting memory access, even where the guest
    /// overwrites them before it can read them. Slower; for tests and debuggers.
    pub precise_flags: bool,
    /// Bytes of translated code that a vCPU keeps before it throws all of it away, at least 64 KiB.
    pub code_cache: usize,
    /// Take any CPU model and any state, whether or not the model has all that it needs: for an
    /// engine that executes single instructions on behalf of another one.
    pub companion: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { precise_flags: false, code_cache: 64 << 20, companion: false }
    }
}

/// The software engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftEngine {
    options: Options,
}

impl SoftEngine {
    /// The engine with default options.
    ///
    /// # Errors
    /// The host CPU lacks what the engine needs, or refuses signal handlers.
    pub fn new() -> Result<Self, EngineError> {
        Self::with_options(Options::default())
    }

    /// The engine that executes single instructions on behalf of another one.
    ///
    /// # Errors
    /// As [`SoftEngine::new`].
    pub fn companion() -> Result<Self, EngineError> {
        Self::with_options(Options { companion: true, ..Options::default() })
    }

    /// The engine with other options.
    ///
    /// # Errors
    /// As [`SoftEngine::new`].
    pub fn with_options(options: Options) -> Result<Self, EngineError> {
        signals::install()?;
        thunks::prepare();
        clock::start_measuring();
        Ok(Self { options })
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn max_vcpus(&self) -> u32 {
        ram::MAX_VCPUS
    }

    fn host_cpu(&self) -> arch::CpuModel {
        cpuid::host_model().clone()
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
        if config.vcpus == 0 || config.vcpus > self.max_vcpus() {
            return Err(EngineError::Unsupported(format!(
                "{} vCPUs: the soft engine runs 1 to {}",
                config.vcpus,
                self.max_vcpus()
            )));
        }
        let mut features = cpuid::held(&config.cpu);
        if self.options.companion {
            features = features.or(cpuid::host_model().features());
        } else {
            cpuid::check(&config.cpu)?;
        }
        let read_only: Vec<_> = config.read_only.iter().map(|(a, len)| (a.0, *len)).collect();
        Ok(Arc::new(SoftVm {
            shared: Arc::new(vm::VmShared {
                options: self.options,
                doorbells: Arc::default(),
                dirty: dirty::Log::new(config.memory.clone()),
                ram: ram::Ram::new(config.memory.clone(), &read_only),
                memory: config.memory,
                features,
                instructions: InstructionSet::new(features),
                model: config.cpu,
                mailboxes: (0..config.vcpus).map(|_| vm::Mailbox::default()).collect(),
                pic_output: false.into(),
                tsc_offset: None.into(),
                regions: Vec::new().into(),
            }),
        }))
    }
}

struct SoftVm {
    shared: Arc<vm::VmShared>,
}

impl Vm for SoftVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(vcpu::SoftVcpu::new(self.shared.clone(), index)?))
    }

    fn signal_msi(&self, msi: Msi) {
        self.shared.signal_msi(msi);
    }

    fn set_pic_output(&self, high: bool) {
        self.shared.pic_output.store(high, Ordering::SeqCst);
        if high && let Some(mailbox) = self.shared.mailboxes.first() {
            mailbox.post(vm::pending::INTERRUPT);
        }
    }

    fn signal_nmi(&self, vcpu: u32) {
        if let Some(mailbox) = self.shared.mailboxes.get(vcpu as usize) {
            mailbox.post(vm::pending::NMI);
        }
    }

    fn doorbell(
        &self,
        doorbell: Doorbell,
        notify: Arc<dyn Notify>,
    ) -> Result<DoorbellHandle, EngineError> {
        let entry = self.shared.doorbells.add(&self.shared.memory, doorbell, notify)?;
        Ok(DoorbellHandle::new(entry))
    }

    fn memory_written(&self, start: arch::GuestPhysical, length: usize) {
        self.shared.memory_written(start.0, length);
    }

    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, EngineError> {
        Ok(Arc::new(line::Line::new(self.shared.clone())))
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        Some(self.shared.as_ref())
    }
}
