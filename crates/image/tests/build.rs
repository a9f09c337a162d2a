//! Debian, built from its packages with the machine's own programs. The image stays in the user's
//! store, where later tests and runs find it; it is built anew where the recipe changed.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use image::{Catalogue, Image, Origin, Quiet, Store, pull};
use std::process::Command;

const NAME: &str = "debian:12";

fn debian() -> Image {
    let (store, catalogue) = (Store::open().unwrap(), Catalogue::embedded().unwrap());
    let entry = catalogue.find(NAME).unwrap();
    let Origin::Recipe(recipe) = &entry.origin else { panic!("{NAME} has no recipe") };
    let here = store.get(&entry.name).ok().flatten();
    let current = here.is_some_and(|image| image.recipe() == Some(&recipe.digest()));
    pull(&store, &catalogue, NAME, !current, &mut Quiet).unwrap_or_else(|error| {
        panic!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string))
    })
}

/// What debugfs, of e2fsprogs, says of the image's file system.
fn debugfs(image: &Image, command: &str) -> String {
    // /usr/sbin is not in every user's path.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let mut debugfs = Command::new("debugfs");
    let output = debugfs.env("PATH", path).args(["-R", command]).arg(image.disk()).output();
    let output = output.unwrap_or_else(|error| {
        panic!("debugfs: {error}; run `sudo apt-get install e2fsprogs`");
    });
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The lists of the machine's own apt.
fn lists() -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir("/var/lib/apt/lists").unwrap().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    names.sort();
    names
}

#[test]
fn debian_is_built_from_its_packages() {
    // Where there are none the build refreshes them.
    let before = lists();
    let image = debian();
    let after = lists();
    assert!(before.iter().all(|name| after.contains(name)), "{before:?} became {after:?}");
    assert!(image.description().starts_with("Debian 12."), "{}", image.description());
    let kernel = std::fs::read(image.kernel().unwrap()).unwrap();
    // Linux's boot protocol: "HdrS" at 0x202.
    assert_eq!(&kernel[0x202..0x206], b"HdrS");
    let initrd = std::fs::read(image.initrd().unwrap()).unwrap();
    let holds = |text: &str| initrd.windows(text.len()).any(|part| part == text.as_bytes());
    assert!(holds("modules/virtio_pci.ko") && holds("modules/virtio_blk.ko"));
    assert!(holds("modules/vfat.ko"));

    let uuid = image.cmdline().unwrap().trim_start_matches("root=UUID=");
    let uuid = uuid.split(' ').next().unwrap();
    assert!(debugfs(&image, "stats -h").contains(uuid));
    // Files of the system belong to its root, whoever built it.
    for file in ["/usr/lib/systemd/systemd", "/usr/sbin/sshd", "/usr/bin/cloud-init"] {
        let stat = debugfs(&image, &format!("stat {file}"));
        assert!(stat.contains("User:     0   Group:     0"), "{file}: {stat}");
    }
    assert!(debugfs(&image, "cat /etc/fstab").contains(uuid));
    assert_eq!(debugfs(&image, "cat /etc/machine-id"), "", "each machine makes its own");
    let keys = debugfs(&image, "ls -p /etc/ssh");
    assert!(keys.contains("sshd_config") && !keys.contains("ssh_host"), "{keys}");
    let shadow = debugfs(&image, "cat /etc/shadow");
    let open = shadow.lines().filter(|line| {
        let password = line.split(':').nth(1).unwrap_or_default();
        !password.starts_with(['*', '!'])
    });
    assert_eq!(open.collect::<Vec<_>>(), Vec::<&str>::new(), "no user has a password");
}
