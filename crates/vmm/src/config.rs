//! What a machine is made of.
use crate::{Bytes, CpuChoice};
use boot::{Image, Module};
use disk::Disk;
use net::Network;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use virtio::balloon::BalloonControl;
use virtio::fs::FsConfig;
use virtio::vsock::VsockHost;

/// The configuration of one machine.
#[derive(Debug)]
pub struct MachineConfig {
    /// Size of the guest's RAM.
    pub memory: Bytes,
    /// Number of vCPUs, 1 to [`engine::Engine::max_vcpus`].
    pub vcpus: u32,
    /// The CPU that the guest sees.
    pub cpu: CpuChoice,
    /// What the machine starts.
    pub boot: BootSource,
    /// Where the serial console COM1 goes.
    pub serial: Serial,
    /// End instead of starting again when the guest resets.
    pub no_reboot: bool,
    /// Give the guest the debug-exit port.
    pub debug_exit: bool,
    /// What is plugged into the PCI bus.
    pub devices: DeviceConfig,
}

/// The devices on the PCI bus. They come in the order of the fields, each kind in its own order;
/// a guest sees them in that order too.
#[derive(Debug, Default)]
pub struct DeviceConfig {
    /// Disks: the first is /dev/vda to Linux.
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    pub nics: Vec<NicConfig>,
    /// A source of entropy.
    pub rng: bool,
    /// Folders of the host.
    pub shares: Vec<FsConfig>,
    /// Through which the guest gives memory back.
    pub balloon: Option<BalloonControl>,
    /// Through which programs on the host and in the guest speak with each other.
    pub vsock: Option<VsockHost>,
}

/// A disk. It stays open, so that a reset finds the same one.
pub struct DiskConfig {
    /// What the guest reads and writes.
    pub disk: Arc<dyn Disk>,
    /// The serial number that the guest sees, of 20 bytes at most.
    pub serial: String,
    /// What happens when the host has no room for what the guest writes.
    pub on_full: OnFull,
}

impl fmt::Debug for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, on_full) = (self.disk.size(), self.on_full);
        write!(f, "DiskConfig({:?}, {size} bytes, on_full: {on_full:?})", self.serial)
    }
}

/// A network card.
pub struct NicConfig {
    /// What it is plugged into.
    pub network: Arc<dyn Network>,
    /// Its Ethernet address.
    pub mac: [u8; 6],
}

impl fmt::Debug for NicConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NicConfig({:02x?})", self.mac)
    }
}

/// What happens when the host has no room for what a guest writes to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// The machine pauses until there is room, and then makes the request again.
    Pause,
    /// The guest's request fails.
    Fail,
}

/// A kernel and what it is given. The files stay open, so that a reset loads the same ones.
#[derive(Debug)]
pub struct BootSource {
    /// The kernel: bzImage, ELF with a PVH note, multiboot 1 or 2.
    pub kernel: Image,
    /// Initial RAM disk, for kernels that take one.
    pub initrd: Option<Image>,
    /// Modules, for kernels that take them.
    pub modules: Vec<Module>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// The host's end of the serial console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// Standard input and output.
    Stdio(Stdio),
    /// Output into a new file, no input.
    File(PathBuf),
    /// Not connected: output is dropped, there is no input.
    None,
}

/// How standard input and output serve as a console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stdio {
    /// Whether to read standard input.
    pub input: bool,
    /// The byte of input that ends the machine, where the input comes from a keyboard.
    pub escape: Option<u8>,
}
