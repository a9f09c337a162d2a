//! Why `bv run` ends without an outcome of the guest.
use crate::network::NetworkError;
use ::disk::DiskError;
use host::{HostError, NotAName};
use image::seed::SeedError;
use image::{CatalogueError, ImageError, PullError, StoreError};
use vmm::{BootError, EngineError, VmmError};

/// The status of a failure that is not the input's fault.
pub const FAILED: u8 = 1;
/// The status of input that cannot work, as clap has it.
pub const BAD_INPUT: u8 = 2;

/// Why `bv run` ends without an outcome of the guest.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Debian's kernel cannot be had.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image of a whole system cannot be had.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// The catalogue or the store of images refuses.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// The store of images refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The machine cannot be had.
    #[error(transparent)]
    Host(#[from] HostError),
    /// No name for a machine follows from the image's.
    #[error("give the machine a --name")]
    Name(#[from] NotAName),
    /// The guest cannot be told something.
    #[error(transparent)]
    Seed(#[from] SeedError),
    /// The image has nothing that could boot it.
    #[error(
        "{0} comes without a kernel, and there is no firmware yet that could boot it; name its \
         kernel with --kernel, --initrd and --cmdline"
    )]
    NoKernel(String),
    /// The built-in guest with another kernel.
    #[error(
        "hello is a kernel itself; leave --kernel away, or name an image or disk to boot with it"
    )]
    HelloKernel,
    /// A flag that needs an image.
    #[error("{0} is for images, as `bv run debian:12` has one")]
    OnlyImages(&'static str),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The engine does not work here.
    #[error("--engine: this CPU engine does not work on this host")]
    Engine(#[source] EngineError),
    /// A disk cannot be opened.
    #[error("--disk; options follow the path, as in disk.img,format=raw")]
    Disk(#[from] DiskError),
    /// The image's disk cannot be opened.
    #[error("the machine's disk")]
    MachineDisk(#[source] DiskError),
    /// The network cannot be had.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] VmmError),
    /// The terminal.
    #[error("the terminal cannot be prepared; use --serial none or redirect standard input")]
    Terminal(#[source] std::io::Error),
    /// Signals.
    #[error("signals cannot be caught")]
    Signals(#[source] std::io::Error),
}

impl RunError {
    /// The status of the process.
    pub fn status(&self) -> u8 {
        match self {
            Self::Machine(error) if error.is_bad_input() => BAD_INPUT,
            Self::Network(error) if error.is_bad_input() => BAD_INPUT,
            Self::Network(_) => FAILED,
            Self::Machine(_) | Self::Engine(_) | Self::Terminal(_) | Self::Signals(_) => FAILED,
            _ => BAD_INPUT,
        }
    }
}
