//! The initial RAM disk of a built system: busybox, the modules that the root disk needs, and
//! `system/initrd.sh`. Debian's own brings udev and much else, and takes longer than the rest of
//! the start.

use crate::initramfs::{BuildError, Builder};
use std::collections::BTreeMap;
use std::io::{self, Read};

pub(super) const INIT: &str = include_str!("../system/initrd.sh");
/// What the root file system's disk needs.
const DISK: [&str; 2] = ["virtio_pci", "virtio_blk"];
/// What a seed disk needs beside that.
const SEED: [&str; 3] = ["vfat", "nls_cp437", "nls_ascii"];
/// The largest file that is taken, and all together.
const LARGEST: u64 = 256 << 20;

/// What lacks, so that a system cannot start.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The hook's archive cannot be read.
    #[error("what the build left cannot be read")]
    Read(#[source] io::Error),
    /// A file is missing.
    #[error("the packages brought no {0}")]
    Missing(&'static str),
    /// The archive cannot be made.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// What the hook took out of a built system.
pub(super) struct Built {
    /// The kernel.
    pub kernel: Vec<u8>,
    /// The kernel's release, as `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// The distribution's version, as `12.12`.
    pub version: String,
    busybox: Vec<u8>,
    /// By their path below the folder of modules.
    modules: BTreeMap<String, Vec<u8>>,
    dependencies: String,
}

impl Built {
    /// Takes the archive that `finish.sh` made.
    pub fn read(archive: impl Read) -> Result<Self, InitrdError> {
        let mut files = files(archive).map_err(InitrdError::Read)?;
        let mut take = |path: &str, name| files.remove(path).ok_or(InitrdError::Missing(name));
        let busybox = take("bin/busybox", "busybox")?;
        let version = take("etc/debian_version", "version of the distribution")?;
        let path = files.keys().find(|path| path.starts_with("boot/vmlinuz-")).cloned();
        let path = path.ok_or(InitrdError::Missing("kernel"))?;
        let kernel = files.remove(&path).ok_or(InitrdError::Missing("kernel"))?;
        let release = path.trim_start_matches("boot/vmlinuz-").to_owned();
        let folder = format!("lib/modules/{release}/");
        let mut modules: BTreeMap<String, Vec<u8>> = files
            .into_iter()
            .filter_map(|(path, file)| Some((path.strip_prefix(&folder)?.to_owned(), file)))
            .collect();
        let dependencies = modules.remove("modules.dep");
        let dependencies = dependencies.ok_or(InitrdError::Missing("list of kernel modules"))?;
        Ok(Self {
            kernel,
            release,
            version: String::from_utf8_lossy(&version).trim().to_owned(),
            busybox,
            modules,
            dependencies: String::from_utf8_lossy(&dependencies).into_owned(),
        })
    }

    /// The initial RAM disk.
    pub fn initrd(&self) -> Result<Vec<u8>, InitrdError> {
        let mut builder = Builder::new();
        builder
            .file("init", 0o755, INIT)?
            .file("bin/busybox", 0o755, self.busybox.clone())?
            .symlink("bin/sh", "busybox")?
            // The kernel opens it for init before init can mount devtmpfs.
            .character_device("dev/console", 0o600, 5, 1)?;
        for folder in ["proc", "sys", "root", "seed"] {
            builder.directory(folder, 0o755)?;
        }
        let mut loaded = Vec::new();
        for (list, wanted) in [("disk", &DISK[..]), ("seed", &SEED[..])] {
            let paths = self.with_dependencies(wanted, &mut loaded);
            let mut order = String::new();
            for path in paths {
                let name = path.rsplit('/').next().unwrap_or(path);
                let module = self.modules.get(path).ok_or(InitrdError::Missing("disk drivers"))?;
                builder.file(&format!("modules/{name}"), 0o644, module.clone())?;
                order.push_str(name);
                order.push('\n');
            }
            builder.file(&format!("modules/{list}"), 0o644, order)?;
        }
        Ok(builder.cpio())
    }

    /// The paths of modules and of what they need, in the order in which they can be loaded, but
    /// for those that are `loaded` already. A module that is not among the files is part of the
    /// kernel.
    fn with_dependencies<'a>(&'a self, wanted: &[&str], loaded: &mut Vec<&'a str>) -> Vec<&'a str> {
        let before = loaded.len();
        for name in wanted {
            let line = self.dependencies.lines().find_map(|line| {
                let (path, needs) = line.split_once(':')?;
                let file = path.rsplit('/').next()?;
                (file.split(".ko").next()? == *name).then_some((path, needs))
            });
            let Some((path, needs)) = line else { continue };
            // modules.dep(5): what is to be loaded first comes last.
            for module in needs.split_whitespace().rev().chain([path]) {
                if !loaded.contains(&module) {
                    loaded.push(module);
                }
            }
        }
        loaded.get(before..).unwrap_or_default().to_vec()
    }
}

/// The regular files of an archive by path, with bounds on what a damaged one can ask for.
fn files(archive: impl Read) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let (mut files, mut left) = (BTreeMap::new(), LARGEST);
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        left = left
            .checked_sub(entry.size())
            .ok_or_else(|| io::Error::other("it is too large to be true"))?;
        let path = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        files.insert(path, content);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/virtio_blk.ko: kernel/virtio.ko kernel/virtio_ring.ko\n\
        kernel/virtio_pci.ko.xz: kernel/virtio.ko kernel/virtio_ring.ko\n\
        kernel/vfat.ko: kernel/fat.ko\nkernel/fat.ko:\nkernel/nls_ascii.ko:\n";

    fn archive(without: &str) -> Vec<u8> {
        let modules = ["virtio_blk.ko", "virtio_pci.ko.xz", "virtio.ko", "virtio_ring.ko"];
        let modules = modules.iter().chain(&["vfat.ko", "fat.ko", "nls_ascii.ko"]);
        let mut files: Vec<(String, &str)> =
            modules.map(|name| (format!("lib/modules/6.1/kernel/{name}"), *name)).collect();
        files.push(("lib/modules/6.1/modules.dep".into(), DEP));
        files.push(("boot/vmlinuz-6.1".into(), "the kernel"));
        files.push(("bin/busybox".into(), "the busybox"));
        files.push(("etc/debian_version".into(), "12.12\n"));
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files.iter().filter(|(path, _)| !path.ends_with(without)) {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, content.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    #[test]
    fn modules_come_in_the_order_in_which_they_can_be_loaded_and_once() {
        let built = Built::read(&archive("nothing")[..]).unwrap();
        assert_eq!((built.release.as_str(), built.version.as_str()), ("6.1", "12.12"));
        let mut loaded = Vec::new();
        let disk = built.with_dependencies(&DISK, &mut loaded);
        let names = ["virtio_ring.ko", "virtio.ko", "virtio_pci.ko.xz", "virtio_blk.ko"];
        assert_eq!(disk, names.map(|name| format!("kernel/{name}")));
        let seed = built.with_dependencies(&["virtio_blk", "vfat", "built_in"], &mut loaded);
        assert_eq!(seed, ["kernel/fat.ko", "kernel/vfat.ko"]);
    }

    #[test]
    fn the_initrd_holds_the_modules_and_their_lists() {
        let initrd = Built::read(&archive("nothing")[..]).unwrap().initrd().unwrap();
        let holds = |text: &str| initrd.windows(text.len()).any(|part| part == text.as_bytes());
        assert!(holds("virtio_ring.ko\nvirtio.ko\nvirtio_pci.ko.xz\nvirtio_blk.ko\n"));
        assert!(holds("fat.ko\nvfat.ko\nnls_ascii.ko\n"));
        assert!(holds("modules/virtio_pci.ko.xz") && holds("the busybox"));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (file, word) in [
            ("busybox", "busybox"),
            ("vmlinuz-6.1", "kernel"),
            ("modules.dep", "list of kernel modules"),
            ("debian_version", "version"),
        ] {
            let error = Built::read(&archive(file)[..]).err().unwrap().to_string();
            assert!(error.contains(word), "{file}: {error}");
        }
        let built = Built::read(&archive("virtio_ring.ko")[..]).unwrap();
        assert!(built.initrd().unwrap_err().to_string().contains("disk drivers"));
        assert!(matches!(Built::read(&[7; 600][..]), Err(InitrdError::Read(_))));
    }
}
