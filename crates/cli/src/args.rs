//! The command line of `bv`.
use crate::disk::DiskArg;
use ::net::HostForward;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
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
    /// Say what this machine offers to virtual machines, and what bv will use.
    Doctor,
}

const EXAMPLES: &str = "\
Examples:
  bv run                                  Debian: a shell on the serial console
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
    /// A built-in guest to run instead of Debian.
    #[arg(conflicts_with = "kernel")]
    pub guest: Option<Guest>,
    /// Kernel to boot: a bzImage, an ELF file with a PVH note, or a multiboot 1 or 2 image.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Module for a multiboot or PVH kernel, with its arguments; may be repeated.
    #[arg(long = "module", value_name = "'FILE ARGS'", requires = "kernel")]
    pub modules: Vec<String>,
    /// The kernel's command line [default for Debian: "console=ttyS0 quiet"].
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Size of the guest's memory, as 512MiB or 2GiB.
    #[arg(long, value_name = "SIZE", default_value = "512MiB")]
    pub memory: Bytes,
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
    /// Network for the guest: nat reaches whatever this process can, without root.
    #[arg(long, value_enum, default_value_t = Network::Nat)]
    pub network: Network,
    /// Port of this host that leads to one of the guest: [ADDRESS:]PORT:GUEST-PORT[/tcp|/udp];
    /// may be repeated. Without an address only this host reaches it.
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

/// The values of `--network`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// Addresses by DHCP, names by DNS, TCP, UDP and ping to the outside.
    Nat,
    /// No card.
    None,
}

/// Whether the guest gets something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It does.
    On,
    /// It does not.
    Off,
}

/// The guests that `bv` carries in itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// Says what it found, and echoes what is typed.
    Hello,
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
        assert_eq!((run.memory, run.cpus), (Bytes::mib(512), 1));
        assert_eq!(run.cpu, CpuChoice::Host);
        assert_eq!((run.serial, run.engine), (SerialArg::Stdio, Engine::Auto));
        assert!(!run.no_reboot && !run.debug_exit);
    }

    #[test]
    fn a_command_line_may_begin_with_a_hyphen() {
        let run = run(&["bv", "run", "--kernel", "k", "--cmdline", "-v --x"]);
        assert_eq!(run.cmdline.as_deref(), Some("-v --x"));
    }
}
