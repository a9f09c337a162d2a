//! Fetching Debian's packages, with programs that play apt on a distribution made up here.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use image::debian::{Debian, prepare_with};
use image::{Cache, ImageError, Programs, Progress, Quiet, Stage, Step};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::PathBuf;

const KERNEL: &[u8] = b"the kernel";
const KERNEL_PACKAGE: &str = "linux-image-6.1.0-1-cloud-amd64";

/// A machine with a made-up distribution and an empty cache.
struct Machine {
    folder: tempfile::TempDir,
    root: bool,
}

impl Machine {
    /// One whose user may or may not refresh the lists, which are not there yet.
    fn new(root: bool) -> Self {
        let machine = Self { folder: tempfile::tempdir().unwrap(), root };
        fs::create_dir(machine.path("programs")).unwrap();
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            let fake = format!("{}/tests/fake/{program}", env!("CARGO_MANIFEST_DIR"));
            std::os::unix::fs::symlink(fake, machine.path("programs").join(program)).unwrap();
        }
        let depends = format!("{KERNEL_PACKAGE} (= 6.1.2-3)");
        machine.package("linux-image-cloud-amd64", &depends, &[]);
        let modules = "lib/modules/6.1.0-1-cloud-amd64/kernel/drivers";
        machine.package(
            KERNEL_PACKAGE,
            "kmod",
            &[
                ("boot/vmlinuz-6.1.0-1-cloud-amd64", KERNEL),
                (&format!("{modules}/acpi/button.ko"), b"the button"),
                (&format!("{modules}/input/evdev.ko"), b"the events"),
            ],
        );
        machine.package("busybox-static", "", &[("usr/bin/busybox", b"the busybox")]);
        machine
    }

    fn with_lists() -> Self {
        let machine = Self::new(false);
        machine.touch("lists");
        machine
    }

    fn package(&self, name: &str, depends: &str, files: &[(&str, &[u8])]) {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o755);
            tar.append_data(&mut header, path, *content).unwrap();
        }
        let deb = tar.into_inner().unwrap();
        let hash: String = Sha256::digest(&deb).iter().map(|byte| format!("{byte:02x}")).collect();
        let show = format!(
            "Package: {name}\nVersion: 6.1.2-3\nDepends: {depends}\nSize: {}\nSHA256: {hash}\n",
            deb.len()
        );
        fs::write(self.path("programs").join(format!("{name}.deb")), deb).unwrap();
        fs::write(self.path("programs").join(format!("{name}.show")), show).unwrap();
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.folder.path().join(relative)
    }

    /// Sets one of the switches of tests/fake/apt-get.
    fn touch(&self, switch: &str) {
        fs::write(self.path("programs").join(switch), "").unwrap();
    }

    fn cache(&self) -> Cache {
        Cache::at(self.path("cache")).unwrap()
    }

    fn prepare_reporting(&self, progress: &mut dyn Progress) -> Result<Debian, ImageError> {
        let programs = Programs::in_folder(self.path("programs"), self.root);
        prepare_with(&programs, &self.cache(), progress)
    }

    fn prepare(&self) -> Result<Debian, ImageError> {
        self.prepare_reporting(&mut Quiet)
    }

    /// How often apt-get was called with a line that holds `words`.
    fn calls(&self, words: &str) -> usize {
        let log = fs::read_to_string(self.path("programs/log")).unwrap_or_default();
        log.lines().filter(|line| line.contains(words)).count()
    }

    /// The names in the cache's image folder, sorted.
    fn cached_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("cache/debian")).unwrap();
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries.map(|entry| name(entry).into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn is_whole(debian: &Debian) -> bool {
    let initrd = fs::read(&debian.initrd).unwrap();
    let holds = |text: &str| initrd.windows(text.len()).any(|part| part == text.as_bytes());
    fs::read(&debian.kernel).unwrap() == KERNEL
        && ["the busybox", "the button", "the events", "cttyhack"].into_iter().all(holds)
}

#[test]
fn a_fetch_gives_kernel_and_initramfs_and_leaves_nothing_else() {
    let machine = Machine::with_lists();
    let debian = machine.prepare().unwrap();
    assert!(is_whole(&debian));
    assert_eq!(debian.version, "6.1.0-1-cloud-amd64 (6.1.2-3)");
    assert_eq!(
        machine.cached_names(),
        ["busybox", "button.ko", "evdev.ko", "initrd.cpio", "manifest", "vmlinuz"]
    );
}

#[test]
fn the_second_run_needs_no_apt() {
    let machine = Machine::with_lists();
    let first = machine.prepare().unwrap();
    fs::remove_dir_all(machine.path("programs")).unwrap();
    assert_eq!(machine.prepare().unwrap(), first);
}

#[test]
fn progress_counts_the_bytes_of_each_package_up_to_its_size() {
    struct Steps(Vec<Step>);
    impl Progress for Steps {
        fn report(&mut self, step: &Step) {
            self.0.push(step.clone());
        }
    }
    let machine = Machine::with_lists();
    let mut steps = Steps(Vec::new());
    machine.prepare_reporting(&mut steps).unwrap();
    for package in [KERNEL_PACKAGE, "busybox-static"] {
        let stage = Stage::Downloading(package.into());
        let last = steps.0.iter().rfind(|step| step.stage == stage).unwrap();
        assert_eq!(Some(last.done), last.total);
        assert!(steps.0.iter().any(|step| step.stage == Stage::Unpacking(package.into())));
    }
}

#[test]
fn a_user_without_package_lists_is_told_what_to_run() {
    let machine = Machine::new(false);
    let text = machine.prepare().unwrap_err().to_string();
    assert!(text.contains("run `sudo apt-get update`"), "{text}");
    assert!(text.contains("bv run hello") && text.contains("--kernel"), "{text}");
    assert_eq!(machine.calls("update"), 0);
}

#[test]
fn root_without_package_lists_refreshes_them() {
    let machine = Machine::new(true);
    machine.touch("mirror");
    assert!(is_whole(&machine.prepare().unwrap()));
    assert_eq!(machine.calls("update"), 1);
}

#[test]
fn root_without_a_network_gets_apts_own_words() {
    let machine = Machine::new(true);
    let error = machine.prepare().unwrap_err();
    assert!(error.to_string().contains("bv run hello"), "{error}");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "E: Could not resolve the mirror");
}

#[test]
fn root_refreshes_lists_that_name_what_the_mirror_no_longer_has() {
    let machine = Machine::new(true);
    machine.touch("lists");
    machine.touch("mirror");
    machine.touch("gone");
    assert!(is_whole(&machine.prepare().unwrap()));
    assert_eq!(machine.calls("update"), 1);
}

#[test]
fn root_without_a_network_does_not_blame_the_lists() {
    let machine = Machine::new(true);
    machine.touch("lists");
    machine.touch("cut");
    let error = machine.prepare().unwrap_err();
    assert!(matches!(error, ImageError::Download { .. }), "{error:?}");
    assert_eq!(machine.calls("update"), 0);
}

#[test]
fn a_distribution_without_the_package_is_named_as_such() {
    let machine = Machine::with_lists();
    fs::remove_file(machine.path("programs/linux-image-cloud-amd64.show")).unwrap();
    let text = machine.prepare().unwrap_err().to_string();
    assert!(text.contains("no package linux-image-cloud-amd64"), "{text}");
}

#[test]
fn a_machine_without_apt_is_told_what_to_run_instead() {
    let machine = Machine::new(false);
    fs::remove_file(machine.path("programs/apt-get")).unwrap();
    let text = machine.prepare().unwrap_err().to_string();
    assert!(text.contains("no `apt-get`") && text.contains("bv run hello"), "{text}");
}

#[test]
fn a_download_that_is_cut_off_is_resumed_by_the_next_run() {
    let machine = Machine::with_lists();
    machine.touch("cut");
    let error = machine.prepare().unwrap_err();
    assert!(matches!(error, ImageError::Download { .. }), "{error:?}");
    assert!(!machine.cached_names().contains(&"manifest".into()));
    assert!(is_whole(&machine.prepare().unwrap()));
    assert_eq!(machine.calls(&format!("resumed {KERNEL_PACKAGE}")), 1);
}

#[test]
fn a_damaged_part_of_a_cut_off_download_is_found_and_fetched_again() {
    let machine = Machine::with_lists();
    machine.touch("cut");
    machine.prepare().unwrap_err();
    let downloads = fs::read_dir(machine.path("cache/debian/download")).unwrap();
    for folder in downloads {
        let part = folder.unwrap().path().join(format!("{KERNEL_PACKAGE}.deb"));
        let damaged = vec![7; fs::metadata(&part).unwrap().len() as usize];
        fs::write(part, damaged).unwrap();
    }
    assert!(is_whole(&machine.prepare().unwrap()));
}

#[test]
fn a_damaged_download_is_fetched_again() {
    let machine = Machine::with_lists();
    machine.touch("corrupt");
    assert!(is_whole(&machine.prepare().unwrap()));
    assert_eq!(machine.calls(&format!("download {KERNEL_PACKAGE}")), 2);
}

#[test]
fn a_package_that_is_never_what_the_lists_promise_is_refused() {
    let machine = Machine::with_lists();
    let deb = machine.path("programs").join(format!("{KERNEL_PACKAGE}.deb"));
    let mut content = fs::read(&deb).unwrap();
    content[700] ^= 1;
    fs::write(deb, content).unwrap();
    let error = machine.prepare().unwrap_err();
    assert!(matches!(error, ImageError::Mismatch { .. }), "{error:?}");
    assert!(machine.cached_names().iter().all(|name| name == "download"));
}

#[test]
fn a_file_of_the_cache_that_was_changed_or_lost_is_fetched_again() {
    for name in ["vmlinuz", "busybox", "button.ko", "manifest"] {
        let machine = Machine::with_lists();
        machine.prepare().unwrap();
        let path = machine.path("cache/debian").join(name);
        fs::write(&path, "something else").unwrap();
        assert!(is_whole(&machine.prepare().unwrap()), "{name} changed");
        fs::remove_file(&path).unwrap();
        assert!(is_whole(&machine.prepare().unwrap()), "{name} lost");
        assert_eq!(machine.calls("download busybox-static"), 3);
    }
}

#[test]
fn a_changed_initramfs_is_made_again_without_apt() {
    let machine = Machine::with_lists();
    let debian = machine.prepare().unwrap();
    fs::write(&debian.initrd, "short").unwrap();
    fs::remove_dir_all(machine.path("programs")).unwrap();
    assert!(is_whole(&machine.prepare().unwrap()));
}

#[test]
fn a_full_disk_is_named_with_its_place() {
    let machine = Machine::with_lists();
    machine.touch("full");
    let error = machine.prepare().unwrap_err();
    assert!(matches!(error, ImageError::DiskFull { .. }), "{error:?}");
    let place = machine.path("cache").display().to_string();
    assert!(error.to_string().starts_with(&place), "{error}");
}

#[test]
fn runs_at_the_same_time_fetch_once_and_all_get_the_guest() {
    let machine = Machine::with_lists();
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| machine.prepare().unwrap())).collect();
        assert!(runs.into_iter().all(|run| is_whole(&run.join().unwrap())));
    });
    assert_eq!(machine.calls("download busybox-static"), 1);
}

#[test]
fn a_package_without_its_file_is_refused_by_name() {
    let machine = Machine::with_lists();
    machine.package("busybox-static", "", &[("usr/share/doc", b"words")]);
    let text = machine.prepare().unwrap_err().to_string();
    assert!(
        text.starts_with("busybox-static: the package holds no readable bin/busybox"),
        "{text}"
    );
}
