//! One machine: engine, memory, devices and the loop that runs them.
//!
//! [`Machine::new`] assembles a machine from its [`MachineConfig`], [`Machine::run`] runs it to
//! its [`Outcome`] on the calling thread, which becomes its I/O thread; each vCPU has a thread of
//! its own. [`MachineHandle`] controls it from other threads.
//!
//! `unsafe` code is confined to `memory`.

mod board;
mod clock;
mod config;
mod console;
mod control;
mod cpu;
mod disks;
mod engines;
mod error;
mod events;
mod machine;
mod memory;
mod nics;
mod platform;
mod shares;
mod signals;
mod size;
mod triple_fault;
mod vcpu;

pub use arch::Baseline;
pub use board::check;
pub use boot::{BootError, Image, Module};
pub use config::{
    BootSource, DeviceConfig, DiskConfig, MachineConfig, NicConfig, OnFull, Serial, Stdio,
};
pub use control::{Command, MachineHandle, MachinePhase};
pub use cpu::{CpuChoice, NotACpu, offered};
pub use engine::{Engine, EngineError};
pub use engines::{EngineChoice, Selection, automatic, engine};
pub use error::VmmError;
pub use kvm::{Access, DEVICE_PATH, HostKvm, Virtualisation};
pub use machine::{Host, Machine, Notice, Outcome, StopCause};
pub use memory::MemoryError;
pub use share::{Mount, MountError};
pub use shares::open_shares;
pub use signals::StopSignals;
pub use size::{Bytes, NotASize};
pub use triple_fault::TripleFault;
pub use virtio::balloon::BalloonControl;
pub use virtio::vsock::{NotVsockOptions, VsockHost, VsockOptions};

#[cfg(test)]
mod tests;
