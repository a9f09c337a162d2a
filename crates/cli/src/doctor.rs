//! `bv doctor`: what this machine offers to virtual machines, in plain words.
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vmm::{Access, DEVICE_PATH, EngineChoice, HostKvm, Virtualisation};

/// Prints the report on standard output.
pub fn run() -> ExitCode {
    let text = report(&HostKvm::probe(), &Files { root: "/".into() });
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody reads it.
        Err(_) => ExitCode::FAILURE,
    }
}

/// The host's files, under a folder of which tests make their own.
struct Files {
    root: PathBuf,
}

impl Files {
    fn path(&self, file: &str) -> PathBuf {
        self.root.join(Path::new(file).strip_prefix("/").unwrap_or(Path::new(file)))
    }

    /// The text of a file without the white space around it, if it can be read.
    fn text(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path(file)).ok().map(|text| text.trim().to_owned())
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.parse().ok()
    }

    /// A field of a file of `Name: value` lines; for sizes, in KiB.
    fn field(&self, file: &str, name: &str) -> Option<String> {
        let text = self.text(file)?;
        text.lines().find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix(':')?.trim();
            Some(value.strip_suffix(" kB").unwrap_or(value).to_owned())
        })
    }
}

/// A report under construction: topics with a fact each, and advice below it.
#[derive(Default)]
struct Report(String);

impl Report {
    fn heading(&mut self, text: &str) {
        let gap = if self.0.is_empty() { "" } else { "\n" };
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{gap}{text}");
    }
    fn fact(&mut self, topic: &str, text: &str) {
        let _ = writeln!(self.0, "  {topic:<16} {text}");
    }
    fn advice(&mut self, text: &str) {
        self.fact("", text);
    }
}

fn report(kvm: &HostKvm, files: &Files) -> String {
    let mut report = Report::default();
    report.heading("CPU");
    cpu(&mut report, kvm);
    report.heading("Memory");
    memory(&mut report, files);
    report.heading("Network");
    network(&mut report, files);
    report.0
}

fn cpu(report: &mut Report, kvm: &HostKvm) {
    let backing = match kvm.virtualisation {
        Virtualisation::Vmx => "Intel VT-x (vmx)",
        Virtualisation::Svm => "AMD-V (svm)",
        Virtualisation::None => "none: the CPU's flags have neither vmx nor svm",
    };
    report.fact("virtualisation", backing);
    report.fact("KVM", &kvm.access.fact(DEVICE_PATH));
    if let Access::Broken(error) = &kvm.access {
        report.advice(&format!("the host says: {error}"));
    }
    if let Some(fix) = kvm.access.fix(DEVICE_PATH) {
        report.advice(&format!("to use it: {fix}"));
    }
    if matches!(kvm.access, Access::Usable) && kvm.virtualisation == Virtualisation::None {
        report.advice("but no hardware backs it (as KVM on PVM): it emulates the code of guest");
        report.advice("kernels, slowly and not completely; small guests run on it");
    }
    let (name, why) = match vmm::automatic(kvm).0 {
        EngineChoice::Kvm => ("kvm", "the hardware runs guests"),
        _ => ("soft", "Bivisor's own engine translates guest code; it needs nothing of the host"),
    };
    report.fact("bv uses", &format!("the {name} engine: {why}"));
}

fn memory(report: &mut Report, files: &Files) {
    let size = |name: &str| {
        let kib = files.field("/proc/meminfo", name)?.parse::<u64>().ok()?;
        Some(format!("{} MiB", kib / 1024))
    };
    let unknown = || "an unknown amount".to_owned();
    let total = size("MemTotal").unwrap_or_else(unknown);
    let available = size("MemAvailable").unwrap_or_else(unknown);
    report.fact("RAM", &format!("{total}, of which {available} are available now"));
    let transparent = files.text("/sys/kernel/mm/transparent_hugepage/enabled");
    let mode = transparent.as_deref().and_then(|text| text.split(['[', ']']).nth(1));
    let text = match mode {
        Some("always") => "used for guests' memory where they fit",
        Some("madvise") => "only where a program asks for them, as the soft engine does",
        Some("never") => "switched off",
        _ => "not known to this kernel",
    };
    report.fact("huge pages", text);
    if mode == Some("never") {
        report.advice(
            "faster guests: `echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`",
        );
    }
    let pool = files.field("/proc/meminfo", "HugePages_Total").filter(|pages| pages != "0");
    if let Some(pages) = pool {
        report.fact("reserved", &format!("a pool of {pages} huge pages, which bv does not use"));
    }
    report.fact("bv uses", "memory as guests touch it, without reserving it");
}

fn network(report: &mut Report, files: &Files) {
    match namespaces_refused(files) {
        None => report.fact("user namespaces", "can be made without root"),
        Some(setting) => {
            report.fact("user namespaces", "cannot be made without root");
            report.advice(&format!("to allow them: `sudo sysctl {setting}`"));
        }
    }
    let tun = "/dev/net/tun";
    let text = match OpenOptions::new().read(true).write(true).open(files.path(tun)) {
        Ok(_) if may_administer_network(files) => "can be made by this user",
        Ok(_) => "only those that root has made for this user (`ip tuntap add … user $USER`)",
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            "this user may not open /dev/net/tun"
        }
        Err(_) => "there is no /dev/net/tun; load the kernel's module (`modprobe tun`)",
    };
    report.fact("tap devices", text);
    report.fact("bv uses", "none of these: its machines have no network card");
}

/// The setting that would allow user namespaces, where one forbids them.
fn namespaces_refused(files: &Files) -> Option<&'static str> {
    if files.number("/proc/sys/user/max_user_namespaces") == Some(0) {
        return Some("user.max_user_namespaces=15000");
    }
    // Debian's and Ubuntu's own settings.
    if files.number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        return Some("kernel.unprivileged_userns_clone=1");
    }
    if files.number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        return Some("kernel.apparmor_restrict_unprivileged_userns=0");
    }
    None
}

/// Whether this process has CAP_NET_ADMIN (capability 12).
fn may_administer_network(files: &Files) -> bool {
    files
        .field("/proc/self/status", "CapEff")
        .and_then(|mask| u64::from_str_radix(&mask, 16).ok())
        .is_some_and(|mask| mask >> 12 & 1 != 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    /// A folder with these files.
    fn host(list: &[(&str, &str)]) -> (tempfile::TempDir, Files) {
        let folder = tempfile::tempdir().unwrap();
        let files = Files { root: folder.path().into() };
        for (path, text) in list {
            let path = files.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        (folder, files)
    }

    fn text(access: Access, virtualisation: Virtualisation, list: &[(&str, &str)]) -> String {
        let (_folder, files) = host(list);
        report(&HostKvm { access, virtualisation }, &files)
    }

    #[test]
    fn a_usable_hardware_kvm_is_what_bv_uses() {
        let text = text(Access::Usable, Virtualisation::Svm, &[]);
        assert!(text.contains("AMD-V (svm)"), "{text}");
        assert!(text.contains("the kvm engine"), "{text}");
    }

    #[test]
    fn a_kvm_without_hardware_is_explained_and_not_used() {
        let text = text(Access::Usable, Virtualisation::None, &[]);
        assert!(text.contains("no hardware backs it"), "{text}");
        assert!(text.contains("the soft engine"), "{text}");
    }

    #[test]
    fn lack_of_permission_comes_with_the_command() {
        let denied = Access::Denied { group: Some("kvm".into()) };
        let text = text(denied, Virtualisation::Vmx, &[]);
        assert!(text.contains("usermod -aG kvm"), "{text}");
        assert!(text.contains("the soft engine"), "{text}");
    }

    #[test]
    fn memory_and_huge_pages_are_told_from_the_kernels_files() {
        let list = [
            ("/proc/meminfo", "MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\nHugePages_Total: 8"),
            ("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never"),
        ];
        let text = text(Access::Absent, Virtualisation::None, &list);
        for part in ["2048 MiB", "1024 MiB", "only where a program asks", "8 huge pages"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn forbidden_user_namespaces_come_with_the_setting() {
        let setting = [("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")];
        let text = text(Access::Absent, Virtualisation::None, &setting);
        assert!(text.contains("apparmor_restrict_unprivileged_userns=0"), "{text}");
        let (_folder, files) = host(&[("/proc/sys/user/max_user_namespaces", "63000\n")]);
        assert_eq!(namespaces_refused(&files), None);
    }

    #[test]
    fn the_network_capability_is_read_from_the_process() {
        let (_folder, files) =
            host(&[("/proc/self/status", "Name:\tbv\nCapEff:\t0000000000001000")]);
        assert!(may_administer_network(&files));
        let (_folder, files) = host(&[("/proc/self/status", "CapEff:\t0000000000000000")]);
        assert!(!may_administer_network(&files));
    }
}
