//! Why a machine cannot start or go on.
use crate::memory::MemoryError;
use arch::{Baseline, FeatureSet};
use boot::BootError;
use device::MapError;
use engine::EngineError;
use share::ShareError;
use std::io;
use std::path::PathBuf;
use virtio::vsock::VsockError;

/// Why a machine cannot start or go on. Messages of bad input name the flag or file and the fix.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The memory size is not one that this host can give.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The number of vCPUs is not one that the engine can give.
    #[error("--cpus: {asked} is not possible; the {engine} engine takes 1 to {most}")]
    Vcpus {
        /// What was asked.
        asked: u32,
        /// The engine's name.
        engine: &'static str,
        /// The engine's limit.
        most: u32,
    },
    /// The CPU model is more than the engine has on this host.
    #[error(
        "--cpu: the {engine} engine on this host lacks {missing}, which {baseline} needs; use \
             --cpu {possible}host"
    )]
    Cpu {
        /// The engine's name.
        engine: &'static str,
        /// What it lacks.
        missing: FeatureSet,
        /// What was asked.
        baseline: Baseline,
        /// The best baseline that it has, with a conjunction, or nothing.
        possible: String,
    },
    /// The files do not make a guest that can start.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The file for the serial console cannot be made.
    #[error("--serial: cannot create {}; give a path that you may write to", .path.display())]
    SerialFile {
        /// The path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The console's output cannot be written.
    #[error("the serial console's output cannot be written; the machine was stopped")]
    SerialOutput(#[source] io::Error),
    /// The engine does not work on this host, or stopped.
    #[error("the CPU engine failed")]
    Engine(#[from] EngineError),
    /// A vCPU stopped.
    #[error("vCPU {vcpu} failed")]
    Vcpu {
        /// Its number.
        vcpu: u32,
        /// Why.
        #[source]
        source: EngineError,
    },
    /// The host is out of something.
    #[error("the host does not give this process {what}")]
    Host {
        /// What it was asked for.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// A folder cannot be shared.
    #[error("--mount: a folder cannot be shared")]
    Share(#[from] ShareError),
    /// The guest's sockets cannot be made.
    #[error("--vsock: the guest cannot be reached by sockets")]
    Vsock(#[from] VsockError),
    /// Two devices want the same place: a defect of the assembly.
    #[error("the machine cannot be assembled")]
    Assembly(#[from] MapError),
}

impl VmmError {
    /// Whether the user's input is at fault, and not the host or the program.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Memory(_)
            | Self::Vcpus { .. }
            | Self::Cpu { .. }
            | Self::Boot(_)
            | Self::SerialFile { .. }
            | Self::Share(_)
            | Self::Vsock(_) => true,
            Self::SerialOutput(_)
            | Self::Engine(_)
            | Self::Vcpu { .. }
            | Self::Host { .. }
            | Self::Assembly(_) => false,
        }
    }
}
