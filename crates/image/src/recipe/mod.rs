//! Builds an image from its distribution's packages.
//!
//! mmdebstrap installs the packages into a folder, as root or in a user namespace; the hook
//! `system/finish.sh` makes the disk of that folder with mke2fs, so that neither root nor a loop
//! device is needed. Packages come from where the machine's own apt has them, by the same
//! proxies, and are verified with the same keys.

mod initrd;
mod output;
mod sources;

use crate::apt::apt_says;
use crate::catalogue::Recipe;
use crate::error::AptSays;
use crate::manifest::sha256;
use crate::store::{Format, Image, Lock, Name, Parts, Staging, Store, StoreError};
use crate::{ImageError, Programs, Progress};
use output::Output;
use rustix::io::{FdFlags, fcntl_setfd};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

pub use initrd::InitrdError;

/// What a build needs on disk at its end: the files of the disk. The folder in which packages
/// are installed needs as much again, for a while, where temporary files are.
const NEEDED: u64 = 800 << 20;

const FINISH: &str = include_str!("../system/finish.sh");
/// What `finish.sh` does not do: files of the system, by path.
const FILES: [(&str, &str); 10] = [
    ("etc/hostname", include_str!("../system/root/etc/hostname")),
    ("etc/hosts", include_str!("../system/root/etc/hosts")),
    (
        "etc/systemd/network/80-ethernet.network",
        include_str!("../system/root/etc/systemd/network/80-ethernet.network"),
    ),
    (
        "etc/systemd/system/serial-getty@.service.d/10-bivisor.conf",
        include_str!("../system/root/etc/systemd/system/serial-getty@.service.d/10-bivisor.conf"),
    ),
    (
        "etc/systemd/system/ssh.service.d/10-bivisor.conf",
        include_str!("../system/root/etc/systemd/system/ssh.service.d/10-bivisor.conf"),
    ),
    (
        "etc/systemd/system/systemd-networkd-wait-online.service.d/10-bivisor.conf",
        include_str!(
            "../system/root/etc/systemd/system/systemd-networkd-wait-online.service.d/10-bivisor.conf"
        ),
    ),
    (
        "etc/ssh/sshd_config.d/10-bivisor.conf",
        include_str!("../system/root/etc/ssh/sshd_config.d/10-bivisor.conf"),
    ),
    (
        "etc/cloud/cloud.cfg.d/90-bivisor.cfg",
        include_str!("../system/root/etc/cloud/cloud.cfg.d/90-bivisor.cfg"),
    ),
    ("etc/cloud/ds-identify.cfg", include_str!("../system/root/etc/cloud/ds-identify.cfg")),
    ("etc/default/locale", "LANG=C.UTF-8\n"),
];
/// Documentation and translations, of which no program needs any; licences stay.
const DPKG_OPTIONS: [&str; 6] = [
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];
/// Names in the staging folder.
const SYSTEM: &str = "system.tar";
const FOUND: &str = "files.tar";

/// Why an image cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Apt refuses.
    #[error(transparent)]
    Apt(#[from] ImageError),
    /// The machine lacks the programs.
    #[error(
        "images are built with mmdebstrap, which this machine does not have; run `sudo apt-get \
         install mmdebstrap uidmap`"
    )]
    NoMmdebstrap,
    /// The machine does not have the distribution's keys.
    #[error(
        "{keyring}: not found, and without the keys of {distribution} its packages cannot be \
         verified; install the package with them, as `sudo apt-get install \
         debian-archive-keyring`"
    )]
    NoKeyring {
        /// Whose packages.
        distribution: String,
        /// The file with the keys.
        keyring: String,
    },
    /// An ordinary user may not have a user namespace.
    #[error(
        "this user may not build images without root: that takes a user namespace with names of \
         its own; run `sudo apt-get install uidmap`, see to a line for this user in /etc/subuid \
         and /etc/subgid (`sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 \
         \"$USER\"`), or run this command as root once"
    )]
    NoNamespace {
        /// mmdebstrap's words.
        #[source]
        source: AptSays,
    },
    /// The disk on which packages are installed is full.
    #[error(
        "the disk is full where packages are installed; free about {} MB in {}, or set TMPDIR to \
         a folder on another disk that all users may enter", NEEDED / 1_000_000,
        std::env::temp_dir().display()
    )]
    NoRoom,
    /// Packages cannot be fetched.
    #[error(
        "the packages of {name} cannot be fetched; check the network, and `sudo apt-get update`"
    )]
    Fetch {
        /// The image.
        name: Name,
        /// apt's words.
        #[source]
        source: AptSays,
    },
    /// The build failed in another way.
    #[error("{name} cannot be built from its packages; mmdebstrap says why")]
    Build {
        /// The image.
        name: Name,
        /// Its words.
        #[source]
        source: AptSays,
    },
    /// What was built lacks something.
    #[error("{name} was built and cannot start")]
    Initrd {
        /// The image.
        name: Name,
        /// What is missing.
        #[source]
        source: InitrdError,
    },
}

impl Recipe {
    /// Tells whether two images were built in the same way: the digest of the recipe and of all
    /// that this version of Bivisor adds to it. The versions of packages are not in it.
    #[must_use]
    pub fn digest(&self) -> String {
        sha256(format!("{self:?} {FINISH} {FILES:?} {}", initrd::INIT).as_bytes())
    }
}

/// Builds an image, and puts it in the store under a name.
pub(crate) fn build(
    store: &Store,
    lock: &Lock,
    name: &Name,
    recipe: &Recipe,
    programs: &Programs,
    progress: &mut dyn Progress,
) -> Result<Image, RecipeError> {
    if store.free_space().is_some_and(|free| free < NEEDED) {
        let path = store.path().to_path_buf();
        return Err(StoreError::DiskFull { path, needed: NEEDED }.into());
    }
    let sources = sources::of(programs, recipe, progress)?;
    let staging = Staging::new(store, lock)?;
    let uuid = uuid()?;
    let failed = |source| StoreError::file(staging.folder(), "write the build's files", source);
    fs::write(staging.folder().join(SYSTEM), system(&uuid).map_err(failed)?).map_err(failed)?;
    let disk = staging.disk(Format::Raw)?;
    let found = open_to_hooks(File::create_new(staging.folder().join(FOUND))).map_err(failed)?;
    let disk = open_to_hooks(Ok(disk)).map_err(failed)?;

    let mut output = Output::new(progress);
    let status = {
        let environment = [
            ("BV_DISK", descriptor_path(&disk)),
            ("BV_FILES", descriptor_path(&found)),
            ("BV_UUID", uuid.clone()),
            ("BV_KILOBYTES", (recipe.size / 1024).to_string()),
            ("BV_KERNEL", recipe.kernel.clone()),
            // The image has an initramfs of its own; that the package would make one takes time.
            ("INITRD", "No".to_owned()),
        ];
        let arguments = arguments(recipe, &sources);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let line = |line: &str| output.take(line);
        programs.lines("mmdebstrap", &arguments, &environment, staging.folder(), line)
    };
    let status = status.map_err(|error| match error {
        ImageError::NoProgram { .. } => RecipeError::NoMmdebstrap,
        error => error.into(),
    })?;
    if !status.success() {
        return Err(failure(name, &output.tail()));
    }
    drop((disk, found));
    finish(staging, name, recipe, &uuid)
}

/// Makes the image of what mmdebstrap's hook left.
fn finish(
    staging: Staging<'_>,
    name: &Name,
    recipe: &Recipe,
    uuid: &str,
) -> Result<Image, RecipeError> {
    let path = staging.folder().join(FOUND);
    let missing = |source| RecipeError::Initrd { name: name.clone(), source };
    let file = File::open(&path)
        .map_err(|source| StoreError::file(&path, "read the build's files", source))?;
    let built = initrd::Built::read(file).map_err(missing)?;
    let parts = Parts {
        initrd: Some(built.initrd().map_err(missing)?),
        cmdline: Some(format!("root=UUID={uuid} rw quiet")),
        recipe: Some(recipe.digest()),
        quick_seed: true,
        kernel: Some(built.kernel),
    };
    let description = format!("Debian {}, Linux {}", built.version, built.release);
    for name in [SYSTEM, FOUND] {
        let path = staging.folder().join(name);
        fs::remove_file(&path)
            .map_err(|source| StoreError::file(&path, "remove the file", source))?;
    }
    Ok(staging.finish(name, description, Format::Raw, None, parts)?)
}

fn arguments(recipe: &Recipe, sources: &sources::Sources) -> Vec<String> {
    let mut packages = vec![recipe.kernel.clone()];
    packages.extend(recipe.packages.iter().cloned());
    let mut arguments: Vec<String> =
        ["--mode=unshare", "--variant=minbase", "--format=null", "--verbose"]
            .map(Into::into)
            .into();
    let apt = sources.options.iter().map(String::as_str).chain(["APT::Install-Recommends \"0\""]);
    arguments.extend(apt.map(|option| format!("--aptopt={option}")));
    arguments.extend(DPKG_OPTIONS.map(|option| format!("--dpkgopt={option}")));
    arguments.push(format!("--include={}", packages.join(",")));
    arguments.push(format!("--customize-hook=tar-in {SYSTEM} /"));
    arguments.push(format!("--customize-hook={FINISH}"));
    // No output but what the hooks write.
    arguments.extend([recipe.suite.clone(), String::new()]);
    arguments.extend(sources.lines.iter().cloned());
    arguments
}

/// The files that every system gets, as a tar archive.
fn system(uuid: &str) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let fstab = format!("UUID={uuid} / ext4 defaults,x-systemd.growfs 0 0\n");
    let given = FILES.iter().map(|(path, text)| (*path, *text));
    for (path, text) in given.chain([("etc/fstab", fstab.as_str())]) {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, text.as_bytes())?;
    }
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    header.set_mode(0o777);
    archive.append_link(
        &mut header,
        "etc/resolv.conf",
        "../run/systemd/resolve/stub-resolv.conf",
    )?;
    archive.into_inner()
}

/// Lets the programs that are started from here write to a file by [`descriptor_path`], although
/// their user is another one in a namespace. Its folder, which others may not enter, keeps all
/// others out.
fn open_to_hooks(file: io::Result<File>) -> io::Result<File> {
    let file = file?;
    file.set_permissions(Permissions::from_mode(0o666))?;
    fcntl_setfd(&file, FdFlags::empty())?;
    Ok(file)
}

fn descriptor_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// A random UUID (RFC 9562 version 4), which the kernel makes.
fn uuid() -> Result<String, StoreError> {
    let path = std::path::Path::new("/proc/sys/kernel/random/uuid");
    let text = fs::read_to_string(path);
    let text = text.map_err(|source| StoreError::file(path, "read a random number", source))?;
    Ok(text.trim().to_owned())
}

/// What a failed build is called, by mmdebstrap's and apt's last lines.
fn failure(name: &Name, tail: &str) -> RecipeError {
    let source = apt_says(tail);
    let name = name.clone();
    let has = |words: &[&str]| words.iter().any(|word| tail.contains(word));
    if has(&["No space left on device"]) {
        RecipeError::NoRoom
    } else if has(&["/etc/subuid", "/etc/subgid", "newuidmap", "unprivileged_userns"]) {
        RecipeError::NoNamespace { source }
    } else if has(&["Failed to fetch", "Temporary failure resolving", "Could not connect"]) {
        RecipeError::Fetch { name, source }
    } else {
        RecipeError::Build { name, source }
    }
}

#[cfg(test)]
mod tests;
