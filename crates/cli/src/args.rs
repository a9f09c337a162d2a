//! The command line of `bv`.
use crate::disk::DiskCommand;
use crate::disk_arg::DiskArg;
use crate::images::ImageCommand;
use ::disk::Format;
use ::net::{HostForward, NetworkChoice};
use clap::{Args, Parser, Subcommand, ValueEnum};
use host::MachineName;
use image::seed::{Hostname, NetworkConfig, SeedError, SshKey, UserData};
use std::path::{Path, PathBuf};
use vmm::{Bytes, CpuChoice, EngineChoice, Mount, VsockOptions};

/// Boots operating systems in virtual machines on any x86-64 Linux, with or without KVM.
#[derive(Debug, Parser)]
#[command(name = "bv", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine: Debian, a built-in guest, or any kernel.
    ///
    /// Without a guest or kernel, this fetches Debian's kernel and busybox and gives a shell on
    /// the serial console.
    Run(Box<Run>),
    /// Make, inspect, convert and change disk images.
    Disk {
        /// What to do.
        #[command(subcommand)]
        command: DiskCommand,
    },
    /// List, get and remove the images that machines are made from.
    #[command(subcommand)]
    Image(ImageCommand),
    /// List the machines that were made from images.
    Ls,
    /// Remove machines, with their disks.
    Rm {
        /// Their names.
        #[arg(required = true)]
        names: Vec<MachineName>,
    },
    /// Say what this machine offers to virtual machines, and what bv will use.
    Doctor,
}

const EXAMPLES: &str = "\
Examples:
  bv run                                  Debian: a shell on the serial console
  bv run debian:12                        a whole Debian 12, with a disk of its own
  bv run hello                            a tiny built-in guest; needs no network
  bv run --kernel bzImage --initrd initrd.cpio --cmdline 'console=ttyS0' --cpus 2
  bv run --kernel kernel.elf --module 'disk.img root' --no-reboot --debug-exit

Keys:
  Ctrl-]  stops the machine, where the console is a terminal

Exit status:
  0  the guest switched off, or reset with --no-reboot; or it was left with Ctrl-]
  1  the guest triple-faulted with --no-reboot, was stopped by force, or the host failed
  2  bad input: a flag or file that cannot work
  (VALUE << 1) | 1  the guest wrote VALUE to the port of --debug-exit";

/// The flags of `bv run`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Run {
    /// An image, as debian:12; a disk, as ./disk.qcow2; or the built-in guest hello.
    ///
    /// An image is fetched or built when it is first used, and stays as it is: what the machine
    /// writes goes to a disk of its own, and is there again the next time. Without a guest and a
    /// kernel, Debian's kernel and a shell run from memory.
    #[arg(value_name = "IMAGE|DISK|hello")]
    pub guest: Option<GuestArg>,
    /// What to call the machine made from the image [default: after the image, as debian-12].
    #[arg(long)]
    pub name: Option<MachineName>,
    /// Forget the machine made from the image when it ends.
    #[arg(long)]
    pub temporary: bool,
    /// Make the disk of the machine made from the image at least so large [default: 10GiB].
    ///
    /// It takes up on the host only what is written to it.
    #[arg(long, value_name = "SIZE")]
    pub disk_size: Option<Bytes>,
    /// Format of the disk that is run, where its header does not say or is not to be believed.
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Host name of the guest [default: the machine's name].
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<Hostname>,
    /// Public SSH key, or a file of them, with which to log in as root; may be repeated.
    #[arg(long = "ssh-key", value_name = "KEY|FILE")]
    pub ssh_keys: Vec<Keys>,
    /// User data for cloud-init in the guest.
    #[arg(long, value_name = "FILE", value_parser = user_data)]
    pub cloud_init: Option<UserData>,
    /// Network configuration for cloud-init in the guest.
    #[arg(long, value_name = "FILE", value_parser = network_config)]
    pub network_config: Option<NetworkConfig>,
    /// Kernel to boot: a bzImage, an ELF file with a PVH note, or a multiboot 1 or 2 image.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Module for a multiboot or PVH kernel, with its arguments; may be repeated.
    #[arg(long = "module", value_name = "'FILE ARGS'", requires = "kernel")]
    pub modules: Vec<String>,
    /// The kernel's command line [default for Debian: "console=ttyS0 quiet"]; for an image it is
    /// added to its own.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Size of the guest's memory, as 2GiB [default: 512MiB, for images and disks 1GiB].
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// Number of virtual CPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// CPU that the guest sees: host, or the same one everywhere: x86-64-v2, x86-64-v3, x86-64-v4.
    #[arg(long, value_name = "MODEL", default_value = "host")]
    pub cpu: CpuChoice,
    /// What runs the virtual CPUs.
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    pub engine: Engine,
    /// Where the serial console goes: stdio, file:PATH (a new file) or none.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialArg,
    /// End when the guest resets, instead of booting it again.
    #[arg(long)]
    pub no_reboot: bool,
    /// Give the guest the debug-exit port 0xf4.
    #[arg(long)]
    pub debug_exit: bool,
    /// Disk for the guest; may be repeated, the first is /dev/vda.
    ///
    /// FILE is an image; `format=raw` is needed for raw ones. `readonly` refuses writes,
    /// `backing` allows images that stand on others, `full=fail` has writes fail when the host
    /// has no room instead of pausing. `size=10GiB` is an empty disk that is gone afterwards.
    #[arg(long = "disk", value_name = "FILE|size=SIZE[,OPTIONS]")]
    pub disks: Vec<DiskArg>,
    /// Network for the guest: nat, none, tap=NAME or switch=NAME; may be repeated.
    ///
    /// nat reaches whatever this process can, without root. Machines of yours on one switch reach
    /// each other. tap is an existing device of the host.
    #[arg(long = "network", value_name = "NETWORK", default_value = "nat")]
    pub networks: Vec<NetworkChoice>,
    /// Port of this host that leads to one of the guest, as 8080:80; may be repeated.
    ///
    /// An address of this host may come before it, as 0.0.0.0:8080:80, without which only this host
    /// reaches it, and /tcp or /udp after it.
    #[arg(short, long = "publish", value_name = "FORWARD")]
    pub publish: Vec<HostForward>,
    /// A source of entropy for the guest.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub rng: Switch,
    /// Folder of the host to share, and the place where the guest finds it; may be repeated.
    ///
    /// What the guest makes there belongs to you. The first folder has the virtio-fs tag share0,
    /// the second share1 and so on.
    #[arg(long = "mount", value_name = "HOST:GUEST[:ro]")]
    pub mounts: Vec<Mount>,
    /// Memory that the guest is to give back at first; off for a guest without a balloon.
    ///
    /// With a balloon, memory that the guest has freed goes back to the host by itself.
    #[arg(long, value_name = "SIZE|off", default_value = "0")]
    pub balloon: BalloonArg,
    /// Socket by which programs reach those in the guest (virtio-vsock).
    ///
    /// A program that connects to PATH and sends the line "CONNECT PORT" speaks with what listens
    /// at that port in the guest. The guest reaches what listens at PATH_PORT as port PORT of
    /// address 2. The guest's own address is 3, if none is given.
    #[arg(long, value_name = "PATH[,cid=N]")]
    pub vsock: Option<VsockOptions>,
}

/// Whether the guest gets something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It does.
    On,
    /// It does not.
    Off,
}

/// What `bv run` is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestArg {
    /// The guest that `bv` carries in itself: it says what it found, and echoes what is typed.
    Hello,
    /// An image of this name.
    Image(String),
    /// A disk.
    Disk(PathBuf),
}

impl std::str::FromStr for GuestArg {
    type Err = image::NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = Path::new(text);
        match text {
            "hello" => Ok(Self::Hello),
            _ if text.contains('/') || path.is_file() => Ok(Self::Disk(path.to_owned())),
            _ => text.parse::<image::Name>().map(|name| Self::Image(name.to_string())),
        }
    }
}

/// The SSH keys of one `--ssh-key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys(pub Vec<SshKey>);

impl std::str::FromStr for Keys {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        SshKey::from_file_or_text(text).map(Self)
    }
}

fn user_data(path: &str) -> Result<UserData, SeedError> {
    UserData::read(Path::new(path))
}

fn network_config(path: &str) -> Result<NetworkConfig, SeedError> {
    NetworkConfig::read(Path::new(path))
}

impl Run {
    /// A flag that only machines made from images have, if one is given.
    pub fn image_flag(&self) -> Option<&'static str> {
        let flags = [
            (self.name.is_some(), "--name"),
            (self.temporary, "--temporary"),
            (self.disk_size.is_some(), "--disk-size"),
            (self.hostname.is_some(), "--hostname"),
            (!self.ssh_keys.is_empty(), "--ssh-key"),
            (self.cloud_init.is_some(), "--cloud-init"),
            (self.network_config.is_some(), "--network-config"),
        ];
        flags.into_iter().find(|(given, _)| *given).map(|(_, flag)| flag)
    }
}

/// The values of `--engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// KVM where the hardware backs it and it can be used, else soft; `bv doctor` says which.
    Auto,
    /// The host's KVM.
    Kvm,
    /// Bivisor's software engine, which needs nothing of the host.
    Soft,
}

impl From<Engine> for EngineChoice {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Auto => Self::Auto,
            Engine::Kvm => Self::Kvm,
            Engine::Soft => Self::Soft,
        }
    }
}

/// The values of `--serial`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialArg {
    /// Standard input and output.
    Stdio,
    /// Output into a new file.
    File(PathBuf),
    /// Not connected.
    None,
}

impl std::str::FromStr for SerialArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "none" => Ok(Self::None),
            _ => match text.strip_prefix("file:") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err("write stdio, none, or file:PATH with the path of a new file".into()),
            },
        }
    }
}

/// The values of `--balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonArg {
    /// A balloon that shall have so much at first.
    Target(Bytes),
    /// No balloon.
    Off,
}

impl std::str::FromStr for BalloonArg {
    type Err = vmm::NotASize;

    fn from_str(text: &str) -> Result<Self, vmm::NotASize> {
        if text == "off" { Ok(Self::Off) } else { text.parse().map(Self::Target) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(arguments: &[&str]) -> Run {
        match Cli::parse_from(arguments).command {
            Command::Run(run) => *run,
            other => panic!("not a run: {other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn plain_run_is_debian_with_512_mib_and_one_cpu_on_stdio() {
        let run = run(&["bv", "run"]);
        assert_eq!((run.guest, run.kernel, run.cmdline), (None, None, None));
        assert_eq!((run.memory, run.cpus), (None, 1));
        assert_eq!(run.cpu, CpuChoice::Host);
        assert_eq!((run.serial, run.engine), (SerialArg::Stdio, Engine::Auto));
        assert!(!run.no_reboot && !run.debug_exit);
    }

    #[test]
    fn a_guest_is_an_image_by_its_name_and_a_disk_by_its_path() {
        let guest = |text| run(&["bv", "run", text]).guest.unwrap();
        assert_eq!(guest("hello"), GuestArg::Hello);
        assert_eq!(guest("debian:12"), GuestArg::Image("debian:12".into()));
        assert_eq!(guest("./a.qcow2"), GuestArg::Disk("./a.qcow2".into()));
        assert!(Cli::try_parse_from(["bv", "run", "Debian 12"]).is_err());
    }

    #[test]
    fn a_command_line_may_begin_with_a_hyphen() {
        let run = run(&["bv", "run", "--kernel", "k", "--cmdline", "-v --x"]);
        assert_eq!(run.cmdline.as_deref(), Some("-v --x"));
    }
}
