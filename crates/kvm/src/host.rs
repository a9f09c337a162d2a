//! What this host offers, and opening it.
use crate::error::io_error;
use engine::EngineError;
use kvm_ioctls::{Cap, Kvm};
use std::ffi::CStr;
use std::io::{self, BufRead as _, BufReader};
use std::path::Path;

/// Where KVM is.
const DEVICE: &CStr = c"/dev/kvm";
/// The version that KVM has had since Linux 2.6.22 (api.rst §4.1).
const API_VERSION: i32 = 12;

/// What the engine cannot do without: capability, name, and the Linux version that brought it.
const NEEDED: [(Cap, &str, &str); 12] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "2.6.25"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "2.6.25"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "2.6.26"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "2.6.26"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "2.6.33"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS", "2.6.35"),
    (Cap::Xsave, "KVM_CAP_XSAVE", "2.6.36"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "2.6.36"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI", "3.5"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM", "3.7"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP", "4.4"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "4.13"),
];

/// The hardware's virtualisation, from the CPU's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualisation {
    /// Intel VT-x: `vmx`.
    Vmx,
    /// AMD-V: `svm`.
    Svm,
    /// Neither: a `/dev/kvm` here runs guests by software, as KVM on PVM does.
    None,
}

/// Whether this process can use `/dev/kvm`.
#[derive(Debug)]
pub enum Access {
    /// Yes.
    Usable,
    /// There is no such device.
    Absent,
    /// It is there, but this user may not open it.
    Denied {
        /// Name or number of the group that may open it, if one may.
        group: Option<String>,
    },
    /// It cannot be opened for another reason.
    Broken(io::Error),
    /// It is not the KVM of this architecture and age.
    Version(i32),
    /// The kernel lacks capabilities: their names and the Linux versions that brought them.
    Lacking(Vec<(&'static str, &'static str)>),
}

/// What this host offers.
#[derive(Debug)]
pub struct HostKvm {
    /// Whether `/dev/kvm` can be used.
    pub access: Access,
    /// What backs it.
    pub virtualisation: Virtualisation,
}

impl HostKvm {
    /// Looks at this host.
    pub fn probe() -> Self {
        let access = match probe_device(DEVICE) {
            Ok(_) => Access::Usable,
            Err(access) => access,
        };
        Self { access, virtualisation: virtualisation() }
    }

    /// Whether KVM is usable and the hardware does the work.
    pub fn is_hardware_backed(&self) -> bool {
        matches!(self.access, Access::Usable) && self.virtualisation != Virtualisation::None
    }
}

/// The path of the device.
pub const DEVICE_PATH: &str = "/dev/kvm";

/// Opens KVM.
///
/// # Errors
/// Says what is missing, and what to do.
pub fn open() -> Result<Kvm, EngineError> {
    open_at(DEVICE)
}

fn open_at(device: &CStr) -> Result<Kvm, EngineError> {
    probe_device(device).map_err(|access| error(access, &device.to_string_lossy()))
}

fn error(access: Access, device: &str) -> EngineError {
    let fix = access.fix(device).map_or_else(String::new, |fix| format!("{fix}, or "));
    let what = format!("{}; {fix}use --engine soft", access.fact(device));
    match access {
        Access::Broken(source) => EngineError::Host { what, source },
        _ => EngineError::Unsupported(what),
    }
}

impl Access {
    /// The fact, about the device at a path.
    pub fn fact(&self, device: &str) -> String {
        match self {
            Self::Usable => format!("{device} can be used"),
            Self::Absent => format!("there is no {device}"),
            Self::Denied { .. } => format!("this user may not open {device}"),
            Self::Broken(_) => format!("{device} cannot be opened"),
            Self::Version(version) => format!(
                "{device} speaks version {version} of KVM's interface, and not {API_VERSION}"
            ),
            Self::Lacking(list) => {
                let names: Vec<_> =
                    list.iter().map(|(name, since)| format!("{name} (Linux {since})")).collect();
                format!("this kernel's KVM lacks {}", names.join(", "))
            }
        }
    }

    /// What the user can do so that KVM can be used.
    pub fn fix(&self, device: &str) -> Option<String> {
        match self {
            Self::Usable | Self::Broken(_) => None,
            Self::Absent => Some(
                "load the kernel's module (`modprobe kvm_intel` or `modprobe kvm_amd`), switch \
                 virtualisation on in the firmware's settings, or have this machine's own host \
                 pass it on"
                    .into(),
            ),
            Self::Denied { group: Some(group) } => Some(format!(
                "join the group {group} (`sudo usermod -aG {group} $USER`, then log in again)"
            )),
            Self::Denied { group: None } => Some(format!(
                "let a group open it (`sudo chgrp kvm {device} && sudo chmod 660 {device}`) and \
                 join that (`sudo usermod -aG kvm $USER`, then log in again)"
            )),
            Self::Version(_) | Self::Lacking(_) => Some("update the kernel".into()),
        }
    }
}

fn probe_device(device: &CStr) -> Result<Kvm, Access> {
    let kvm = Kvm::new_with_path(device).map_err(|errno| match errno.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Access::Absent,
        libc::EACCES | libc::EPERM => Access::Denied { group: group_of(device) },
        _ => Access::Broken(io_error(errno)),
    })?;
    match kvm.get_api_version() {
        API_VERSION => {}
        version => return Err(Access::Version(version)),
    }
    let lacking: Vec<_> = NEEDED
        .iter()
        .filter(|(cap, ..)| !kvm.check_extension(*cap))
        .map(|(_, name, since)| (*name, *since))
        .collect();
    if lacking.is_empty() { Ok(kvm) } else { Err(Access::Lacking(lacking)) }
}

/// The group that may read and write a file, by name, or by number where it has no name; `None`
/// where no group but the superuser's may, or the file cannot be looked at.
fn group_of(file: &CStr) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    const GROUP_READ_WRITE: u32 = 0o060;
    let path = file.to_string_lossy();
    let metadata = std::fs::metadata(Path::new(path.as_ref())).ok()?;
    if metadata.gid() == 0 || metadata.mode() & GROUP_READ_WRITE != GROUP_READ_WRITE {
        return None;
    }
    let number = metadata.gid().to_string();
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    Some(group_name(&groups, &number).unwrap_or(number))
}

/// The name of a group in the text of `/etc/group`.
fn group_name(groups: &str, number: &str) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then(|| name.to_owned())
    })
}

/// What backs KVM: from the beginning of `/proc/cpuinfo`, the first CPU's part. The kernel makes the text as it is
/// read, which takes long for all CPUs of a large host.
pub fn virtualisation() -> Virtualisation {
    let mut text = String::new();
    if let Ok(file) = std::fs::File::open("/proc/cpuinfo") {
        let first =
            BufReader::new(file).lines().map_while(Result::ok).take_while(|l| !l.is_empty());
        for line in first {
            text.push_str(&line);
            text.push('\n');
        }
    }
    virtualisation_in(&text)
}

/// The CPU's flag in the text of `/proc/cpuinfo`.
fn virtualisation_in(cpuinfo: &str) -> Virtualisation {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => Virtualisation::Vmx,
        (_, true) => Virtualisation::Svm,
        _ => Virtualisation::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(access: Access) -> String {
        error(access, "/dev/kvm").to_string()
    }

    #[test]
    fn a_missing_device_names_the_modules_and_the_other_engine() {
        let error = open_at(c"/dev/there-is-no-kvm-here").err().map(|e| e.to_string());
        let error = error.unwrap_or_default();
        for part in ["/dev/there-is-no-kvm-here", "modprobe kvm_intel", "--engine soft"] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        assert!(matches!(probe_device(c"/dev/null"), Err(Access::Version(_) | Access::Broken(_))));
    }

    #[test]
    fn lack_of_permission_names_the_group_and_the_command() {
        let error = message(Access::Denied { group: Some("kvm".into()) });
        assert!(error.contains("group kvm"), "{error}");
        assert!(error.contains("usermod -aG kvm"), "{error}");
        let error = message(Access::Denied { group: None });
        assert!(error.contains("chmod 660 /dev/kvm"), "{error}");
    }

    #[test]
    fn an_old_kernel_is_told_the_capability_and_its_version() {
        let error = message(Access::Lacking(vec![("KVM_CAP_SPLIT_IRQCHIP", "4.4")]));
        assert!(error.contains("KVM_CAP_SPLIT_IRQCHIP (Linux 4.4)"), "{error}");
    }

    #[test]
    fn groups_are_found_by_number() {
        let groups = "root:x:0:\nkvm:x:106:alice\n";
        assert_eq!(group_name(groups, "106").as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, "7"), None);
    }

    #[test]
    fn only_a_whole_flag_counts_as_virtualisation() {
        assert_eq!(virtualisation_in("model: svm\nflags\t: fpu svm lm\n"), Virtualisation::Svm);
        assert_eq!(virtualisation_in("flags\t: fpu vmx\n"), Virtualisation::Vmx);
        assert_eq!(virtualisation_in("flags\t: fpu svm_lock vmxoff\n"), Virtualisation::None);
    }

    #[test]
    fn this_host_is_described_without_a_panic_and_open_agrees() {
        let host = HostKvm::probe();
        assert_eq!(matches!(host.access, Access::Usable), open().is_ok(), "{host:?}");
    }
}
