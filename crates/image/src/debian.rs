//! Debian's own kernel and busybox, as a guest that boots to a shell.

use crate::apt::{Apt, Package};
use crate::deb::{self, Wanted};
use crate::initramfs::{BuildError, Builder};
use crate::manifest::Manifest;
use crate::{Cache, ImageError, Programs, Progress, Stage, Step, cache};
use std::fs;
use std::path::{Path, PathBuf};

/// The package that always depends on Debian's newest kernel for virtual machines.
const METAPACKAGE: &str = "linux-image-cloud-amd64";
/// What the metapackage's dependency on the kernel itself begins with.
const KERNEL_PACKAGE: &str = "linux-image-";
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// Names within the cache.
const FOLDER: &str = "debian";
const DOWNLOADS: &str = "debian/download";
const KERNEL: &str = "vmlinuz";
const BUSYBOX: &str = "busybox";
const INITRD: &str = "initrd.cpio";

const VMLINUZ: Wanted = Wanted { starts: "boot/vmlinuz-", ends: "" };
/// `/bin` is in the root of older releases and below `/usr` in newer ones.
const BUSYBOX_PLACES: [Wanted; 2] =
    [Wanted { starts: "bin/busybox", ends: "" }, Wanted { starts: "usr/bin/busybox", ends: "" }];
/// Lets the guest hear its power button. Kernels that have them built in have no such files.
const MODULES: [(&str, Wanted); 2] = [
    ("button.ko", Wanted { starts: "lib/modules/", ends: "/kernel/drivers/acpi/button.ko" }),
    ("evdev.ko", Wanted { starts: "lib/modules/", ends: "/kernel/drivers/input/evdev.ko" }),
];

/// What the unpacked files need on disk beside the packages.
const UNPACKED: u64 = 48 << 20;

const INIT: &str = include_str!("guest/init.sh");
const SHELL: &str = include_str!("guest/shell.sh");

/// A Debian guest, ready to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Debian {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs: busybox and an init that gives a shell on the console.
    pub initrd: PathBuf,
    /// busybox itself (static), for [`initramfs`].
    pub busybox: PathBuf,
    /// The kernel's release and, in parentheses, the version of its package.
    pub version: String,
}

/// Gives the Debian guest: from the cache where that is whole, or else from the distribution.
///
/// # Errors
/// Fails where the packages cannot be fetched and verified or the cache cannot be written; the
/// message says what to do.
pub fn prepare(cache: &Cache, progress: &mut dyn Progress) -> Result<Debian, ImageError> {
    prepare_with(&Programs::of_this_machine(), cache, progress)
}

/// As [`prepare`], with the distribution's programs named.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_with(
    programs: &Programs,
    cache: &Cache,
    progress: &mut dyn Progress,
) -> Result<Debian, ImageError> {
    if let Some(debian) = cached(&cache.path().join(FOLDER))? {
        return Ok(debian);
    }
    let lock = cache.lock(progress)?;
    let folder = cache.folder(FOLDER)?;
    // Whoever held the lock until now may have fetched.
    if let Some(debian) = cached(&folder)? {
        return Ok(debian);
    }
    cache.sweep(&lock, &folder);
    fetch(programs, cache, &folder, progress)?;
    cached(&folder)?.ok_or_else(|| ImageError::File {
        path: folder,
        action: "read back what was just written",
        source: std::io::ErrorKind::InvalidData.into(),
    })
}

/// The guest out of the cache, if every file is there and is what was fetched. The initramfs is
/// made anew where this version of Bivisor makes it differently.
fn cached(folder: &Path) -> Result<Option<Debian>, ImageError> {
    let Some(manifest) = Manifest::load(folder) else { return Ok(None) };
    let Some(busybox) = manifest.read(folder, BUSYBOX) else { return Ok(None) };
    if manifest.read(folder, KERNEL).is_none() {
        return Ok(None);
    }
    let mut builder = initramfs(busybox, SHELL)?;
    for (name, _) in MODULES {
        if manifest.has(name) {
            let Some(module) = manifest.read(folder, name) else { return Ok(None) };
            builder.file(&format!("lib/modules/{name}"), 0o644, module)?;
        }
    }
    let cpio = builder.cpio();
    let initrd = folder.join(INITRD);
    if fs::read(&initrd).ok().as_ref() != Some(&cpio) {
        cache::write(folder, INITRD, &cpio)?;
    }
    Ok(Some(Debian {
        kernel: folder.join(KERNEL),
        initrd,
        busybox: folder.join(BUSYBOX),
        version: manifest.version,
    }))
}

/// An initramfs of a static busybox: mounts the usual file systems, runs `script` with its
/// shell on the console, with job control, and powers off when the script ends. Within it
/// `poweroff` and `reboot` work as anywhere. More can be added before [`Builder::cpio`].
///
/// # Errors
/// Fails where busybox or the script is too large.
pub fn initramfs(busybox: Vec<u8>, script: &str) -> Result<Builder, BuildError> {
    let mut builder = Builder::new();
    builder
        .file("init", 0o755, INIT)?
        .file("etc/start", 0o755, script)?
        .file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n")?
        .file("etc/group", 0o644, "root:x:0:\n")?
        .file("bin/busybox", 0o755, busybox)?
        // `#!/bin/sh` must work before init installs the other names.
        .symlink("bin/sh", "busybox")?
        // The kernel opens the console for init before init can mount devtmpfs.
        .character_device("dev/console", 0o600, 5, 1)?
        .character_device("dev/null", 0o666, 1, 3)?
        .directory("root", 0o700)?;
    for folder in ["proc", "sys", "run", "tmp"] {
        builder.directory(folder, 0o755)?;
    }
    Ok(builder)
}

/// Fetches the packages and fills `folder` from them.
fn fetch(
    programs: &Programs,
    cache: &Cache,
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ImageError> {
    let apt = Apt::new(programs);
    let result = fetch_listed(programs, &apt, cache, folder, progress);
    let lists_are_to_blame = match &result {
        Err(ImageError::NoPackage { .. }) => programs.root() || !apt.has_lists()?,
        Err(ImageError::Mismatch { .. }) => programs.root(),
        // Old lists name packages that the mirrors no longer have.
        Err(ImageError::Download { source, .. }) => programs.root() && source.0.contains(" 404 "),
        _ => false,
    };
    if !lists_are_to_blame {
        return result;
    }
    apt.refresh(progress)?;
    fetch_listed(programs, &apt, cache, folder, progress)
}

/// Fetches what the present package lists name.
fn fetch_listed(
    programs: &Programs,
    apt: &Apt<'_>,
    cache: &Cache,
    folder: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ImageError> {
    let kernel = apt.describe(&kernel_package(&apt.describe(METAPACKAGE)?)?)?;
    let busybox = apt.describe(BUSYBOX_PACKAGE)?;
    let needed = kernel.size.saturating_add(busybox.size).saturating_add(UNPACKED);
    if cache.free_space().is_some_and(|free| free < needed) {
        return Err(ImageError::DiskFull { path: cache.path().to_path_buf(), needed });
    }

    let wanted: Vec<Wanted> =
        [VMLINUZ].into_iter().chain(MODULES.map(|(_, wanted)| wanted)).collect();
    let kernel_files = fetch_files(programs, apt, cache, &kernel, &wanted, progress)?;
    let busybox_files = fetch_files(programs, apt, cache, &busybox, &BUSYBOX_PLACES[..], progress)?;

    let mut kernel_files = kernel_files.into_iter();
    let vmlinuz = kernel_files.next().flatten().ok_or_else(|| lacks(&kernel, VMLINUZ.starts))?;
    let busybox_file =
        busybox_files.into_iter().flatten().next().ok_or_else(|| lacks(&busybox, "bin/busybox"))?;

    let release = vmlinuz.path.trim_start_matches(VMLINUZ.starts);
    let mut manifest = Manifest::new(format!("{release} ({})", kernel.version));
    manifest.add(folder, KERNEL, &vmlinuz.content)?;
    manifest.add(folder, BUSYBOX, &busybox_file.content)?;
    for ((name, _), module) in MODULES.iter().zip(kernel_files) {
        if let Some(module) = module {
            manifest.add(folder, name, &module.content)?;
        }
    }
    manifest.save(folder)?;
    // The packages have served; leftovers would cost only space.
    let _ = fs::remove_dir_all(cache.path().join(DOWNLOADS));
    Ok(())
}

/// Downloads one package and takes files out of it.
fn fetch_files(
    programs: &Programs,
    apt: &Apt<'_>,
    cache: &Cache,
    package: &Package,
    wanted: &[Wanted],
    progress: &mut dyn Progress,
) -> Result<Vec<Option<deb::Found>>, ImageError> {
    // One folder for each content, so that what an interrupted run left is resumed only as the
    // package that it is part of.
    let downloads = cache.folder(&format!("{DOWNLOADS}/{}", package.sha256))?;
    let path = apt.download(package, &downloads, progress)?;
    let stage = Stage::Unpacking(package.name.clone());
    progress.report(&Step { stage, done: 0, total: None });
    deb::read(programs, &path, wanted)
}

/// The kernel behind the metapackage.
fn kernel_package(metapackage: &Package) -> Result<String, ImageError> {
    let kernel = metapackage.depends.iter().find(|name| name.starts_with(KERNEL_PACKAGE));
    kernel.cloned().ok_or_else(|| ImageError::Description {
        package: metapackage.name.clone(),
        field: "Depends",
    })
}

fn lacks(package: &Package, file: &str) -> ImageError {
    ImageError::Package { package: package.name.clone(), file: file.to_owned() }
}
