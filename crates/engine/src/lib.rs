//! The contract between a machine and the engine that runs its CPUs.
//!
//! An [`Engine`] makes a [`Vm`] over guest memory; a `Vm` makes [`Vcpu`]s. A vCPU thread calls
//! [`Vcpu::run`], which calls back into the machine through [`VcpuIo`] for ports and device
//! registers and returns only with a reason to stop ([`Halt`]). LAPICs belong to the engine; PIC,
//! IOAPIC and PIT are devices of the machine.
//!
//! No word of any particular engine (no exit structure, no kernel object) is needed to use or to
//! implement this. Where both sides happen to have an event that the kernel can signal, they may
//! offer it to each other to save a way ([`Notify::event`], [`MsiLine::event`]); who has none
//! answers `None`, and everything works all the same.
//!
//! What not every engine can do is asked for: [`Vm::dirty_log`], [`Vcpu::debugger`].
#![forbid(unsafe_code)]

mod debug;
mod dirty;
mod doorbell;
mod line;

pub use debug::{Breakpoint, BreakpointKind, DebugError, DebugPlan, DebugStop, Debugger};
pub use dirty::{DirtyLog, DirtyMap, DirtyRange};
pub use doorbell::{
    Doorbell, DoorbellError, DoorbellHandle, DoorbellPlace, Doorbells, Notify, Ringing, Rings,
};
pub use line::MsiLine;

use arch::{CpuModel, FeatureSet, GuestPhysical, VcpuState};
use std::sync::Arc;

/// Guest RAM: vm-memory's mapping of guest-physical ranges to anonymous memory. Engines and
/// devices share it by reference count.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// What a machine asks of an engine when it makes a VM.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// All RAM of the guest. Each region is read/write memory; all other guest-physical
    /// addresses go to [`VcpuIo`].
    pub memory: Arc<GuestMemory>,
    /// Guest-physical ranges (start, length in bytes) within `memory` that guests can read and
    /// run but not write, such as firmware; writes are dropped.
    pub read_only: Vec<(GuestPhysical, u64)>,
    /// The CPU that every vCPU shows.
    pub cpu: CpuModel,
    /// How many vCPUs will be made, 1 to [`Engine::max_vcpus`].
    pub vcpus: u32,
}

/// A way to run guest CPUs.
pub trait Engine: Send + Sync {
    /// The name as in `--engine NAME`.
    fn name(&self) -> &'static str;
    /// The largest number of vCPUs in one VM.
    fn max_vcpus(&self) -> u32;
    /// The CPU that guests of this engine see by default on this host.
    fn host_cpu(&self) -> CpuModel;
    /// Makes a VM.
    ///
    /// # Errors
    /// Fails where the host cannot give what the engine needs (memory, threads, signals).
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, EngineError>;
}

/// One VM: vCPUs that share memory and interrupts.
pub trait Vm: Send + Sync {
    /// Makes vCPU `index` (its APIC id). Index 0 starts running, the others wait for a start-up IPI.
    ///
    /// # Errors
    /// Fails where the index is out of range or taken, or the host is out of resources.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError>;

    /// Delivers a message-signalled interrupt (Intel SDM 3A 10.11), as devices and the IOAPIC
    /// send them. Callable from any thread.
    fn signal_msi(&self, msi: Msi);

    /// Sets the level of the PIC's INTR output, wired to LINT0 of vCPU 0. While it is high and
    /// LINT0 is in ExtINT mode (or the LAPIC is off), the vCPU asks [`VcpuIo::acknowledge_pic`]
    /// for the vector when it can take an interrupt. Callable from any thread.
    fn set_pic_output(&self, high: bool);

    /// Signals an NMI to a vCPU. Callable from any thread.
    fn signal_nmi(&self, vcpu: u32);

    /// Has guest writes to a place call a notifier instead of [`VcpuIo`], until the handle is
    /// dropped. Reads of the place still go to [`VcpuIo`]. Callable from any thread.
    ///
    /// # Errors
    /// [`EngineError::Doorbell`] where no guest write can come there, or one could ring another
    /// doorbell as well; fails too where the host is out of resources.
    fn doorbell(
        &self,
        doorbell: Doorbell,
        notify: Arc<dyn Notify>,
    ) -> Result<DoorbellHandle, EngineError>;

    /// Says that something other than a vCPU wrote to guest memory, or emptied it: `length` bytes
    /// from `start` on. Devices' writes are coherent with what CPUs run (Intel SDM 3A 8.1.3 asks
    /// only CPUs to serialize), so an engine that holds translations drops those of these bytes.
    /// To be called after the write and before the guest is told of it, from any thread.
    fn memory_written(&self, start: GuestPhysical, length: usize);

    /// Makes an interrupt line of a device, without a message at first.
    ///
    /// # Errors
    /// Fails where the host is out of resources.
    fn msi_line(&self) -> Result<Arc<dyn MsiLine>, EngineError>;

    /// The record of what vCPUs write to memory, where the engine can keep one.
    fn dirty_log(&self) -> Option<&dyn DirtyLog>;
}

/// A message-signalled interrupt: a write of `data` to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Address, FEExxxxxH with destination and redirection hint.
    pub address: u64,
    /// Vector, delivery mode, level and trigger mode.
    pub data: u32,
}

/// What a vCPU needs of its machine while it runs. Calls arrive on the vCPU's thread.
pub trait VcpuIo: Sync {
    /// IN: fills `data` (1, 2 or 4 bytes) from `port`.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// OUT: writes `data` (1, 2 or 4 bytes) to `port`.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// Fills `data` (1 to 64 bytes) from device registers at `address`.
    fn mmio_read(&self, address: GuestPhysical, data: &mut [u8]);
    /// Writes `data` (1 to 64 bytes) to device registers at `address`.
    fn mmio_write(&self, address: GuestPhysical, data: &[u8]);
    /// The guest ended a level-triggered interrupt of this vector (for the IOAPIC).
    fn end_of_interrupt(&self, vector: u8);
    /// Interrupt acknowledge cycle to the PIC: its vector, or `None` where the PIC no longer
    /// has a request.
    fn acknowledge_pic(&self) -> Option<u8>;
}

/// One virtual CPU. It is owned by the thread that runs it.
pub trait Vcpu: Send {
    /// Runs the guest until something ends it. HLT waits inside; it is not a reason to return.
    ///
    /// # Errors
    /// Fails when the engine itself cannot go on; the VM is then lost.
    fn run(&mut self, io: &dyn VcpuIo) -> Result<Halt, EngineError>;

    /// A handle with which other threads make [`Vcpu::run`] return [`Halt::Kicked`].
    fn kicker(&self) -> Arc<dyn Kick>;

    /// The complete state, at an instruction boundary.
    ///
    /// # Errors
    /// Fails where the engine cannot read an element.
    fn state(&mut self) -> Result<VcpuState, EngineError>;

    /// Replaces the complete state.
    ///
    /// # Errors
    /// Fails, and names the element, where the engine cannot hold one.
    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError>;

    /// The power to run single instructions, where the engine has it.
    fn stepper(&mut self) -> Option<&mut dyn Step> {
        None
    }

    /// Single steps and breakpoints from outside, where the engine has them.
    fn debugger(&mut self) -> Option<&mut dyn Debugger>;
}

/// A vCPU that can run single instructions. It is an optional power: see [`Vcpu::stepper`].
pub trait Step {
    /// Runs one instruction, with the exception that it raises: where it faults, the vCPU stands
    /// at the handler's first instruction afterwards. An event that waits to be delivered is
    /// delivered instead, a repeated string instruction runs one round, and a vCPU that sleeps
    /// goes on sleeping. `Some` says that the vCPU stopped, as from [`Vcpu::run`].
    ///
    /// # Errors
    /// Fails when the engine itself cannot go on; the VM is then lost.
    fn step(&mut self, io: &dyn VcpuIo) -> Result<Option<Halt>, EngineError>;
}

/// How many bytes an access covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Width {
    /// One byte.
    Byte,
    /// Two bytes.
    Word,
    /// Four bytes.
    Double,
    /// Eight bytes.
    Quad,
}

impl Width {
    /// The number of bytes: 1, 2, 4 or 8.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Double => 4,
            Self::Quad => 8,
        }
    }
}

/// Makes a running or halted vCPU return to its caller.
pub trait Kick: Send + Sync {
    /// Ends the present or, if the vCPU is not running, the next [`Vcpu::run`] soon with
    /// [`Halt::Kicked`]. One kick ends one run; kicks that arrive together count as one.
    fn kick(&self);
}

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// [`Kick::kick`] was called.
    Kicked,
    /// A fault while delivering a double fault (Intel SDM 3A 6.15, interrupt 8): the CPU is shut
    /// down until RESET. The state is that of the moment before.
    TripleFault,
    /// What a [`DebugPlan`] asks for; never without one.
    Debug(DebugStop),
}

/// Why an engine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was asked, and what the user can do.
        what: String,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// The request does not fit this engine.
    #[error("{0}")]
    Unsupported(String),
    /// A doorbell that cannot be.
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
    /// A plan for the debugger that cannot be.
    #[error(transparent)]
    Debug(#[from] DebugError),
    /// A defect of the engine itself.
    #[error("engine defect: {0}; the VM was stopped")]
    Defect(String),
}

/// Whether a CPU with these features can hold a state: for engines to ask at the start of
/// [`Vcpu::set_state`].
///
/// # Errors
/// Names the features that it lacks.
pub fn check_state(state: &VcpuState, features: FeatureSet) -> Result<(), EngineError> {
    arch::requirements::check(state, features).map_err(|lacking| {
        EngineError::Unsupported(format!(
            "the state needs {lacking}, which the VM's CPU model lacks; give the VM the model with \
             which the state was saved"
        ))
    })
}
