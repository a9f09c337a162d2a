use super::*;
use crate::{Catalogue, Quiet, pull_with};
use std::path::PathBuf;

/// A machine whose mmdebstrap is the one in `tests/fake`.
struct World {
    folder: tempfile::TempDir,
    store: Store,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path().join("images")).unwrap();
        let world = Self { folder, store };
        fs::create_dir(world.path("programs")).unwrap();
        for program in ["apt-get", "apt-config", "mmdebstrap"] {
            let fake = format!("{}/tests/fake/{program}", env!("CARGO_MANIFEST_DIR"));
            std::os::unix::fs::symlink(fake, world.path("programs").join(program)).unwrap();
        }
        fs::write(world.path("keys"), "").unwrap();
        world.tell("lists");
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Tells the fake mmdebstrap how to fail.
    fn tell(&self, word: &str) {
        fs::write(self.path("programs").join(word), "").unwrap();
    }

    fn pull(&self, update: bool) -> Result<Image, crate::PullError> {
        let catalogue = format!(
            "[image.'d:1']\ndescription='d'\naliases=['d']\nrecipe='r'\nsuite='s'\nsize='1GiB'\n\
             [recipe.r]\ndistribution='Debian'\nkeyring='{}'\nkernel='linux'\npackages=['p', 'q']\n",
            self.path("keys").display()
        );
        let catalogue = Catalogue::parse(&catalogue).unwrap();
        let programs = Programs::in_folder(self.path("programs"), false);
        pull_with(&programs, &self.store, &catalogue, "d", update, &mut Quiet)
    }

    /// The message and its sources.
    fn error(&self) -> String {
        let error = self.pull(false).unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string);
        assert_eq!(self.left(), 0, "a failed build leaves nothing");
        format!("{error}: {}", source.unwrap_or_default())
    }

    /// How many folders are in the store beside its own.
    fn left(&self) -> usize {
        let entries = fs::read_dir(self.store.path()).unwrap().flatten();
        entries.filter(|entry| entry.path().is_dir()).count() - 1
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.path("programs/log")).unwrap_or_default()
    }
}

#[test]
fn a_build_gives_a_disk_with_kernel_initrd_and_command_line() {
    let world = World::new();
    let image = world.pull(false).unwrap();
    assert_eq!(fs::read(image.disk()).unwrap(), b"a disk of 1048576 KB");
    assert_eq!(fs::read(image.kernel().unwrap()).unwrap(), b"the kernel");
    assert!(image.initrd().is_some() && image.is_whole());
    assert_eq!(image.seed_reader(), crate::seed::SeedReader::Bivisor);
    assert_eq!(image.description(), "Debian 12.12, Linux 6.1");
    assert_eq!(image.recipe().map(str::len), Some(64));
    let uuid = fs::read_to_string(world.path("programs/uuid")).unwrap();
    assert_eq!(image.cmdline().unwrap(), format!("root=UUID={} rw quiet", uuid.trim()));
    let calls = world.calls();
    assert!(calls.contains("--include=linux,p,q"), "{calls}");
    assert!(calls.contains("--aptopt=Acquire::http::Proxy \"http://p/\""), "{calls}");
    let keys = world.path("keys").display().to_string();
    assert!(calls.contains(&format!("deb [signed-by={keys}] http://m/ s main")), "{calls}");
    let files: Vec<_> = fs::read_dir(world.store.path().join(image.id())).unwrap().collect();
    assert_eq!(files.len(), 4, "record, disk, kernel, initrd");
}

#[test]
fn what_the_system_is_given_holds_its_root_and_no_password() {
    let archive = system("1234").unwrap();
    let text = String::from_utf8_lossy(&archive).into_owned();
    assert!(text.contains("UUID=1234 / ext4"));
    assert!(text.contains("PasswordAuthentication no"));
    let mut entries = tar::Archive::new(&archive[..]);
    let link = entries.entries().unwrap().flatten().last().unwrap();
    assert!(link.link_name().unwrap().unwrap().ends_with("resolve/stub-resolv.conf"));
}

#[test]
fn an_image_is_built_once_and_again_where_it_shall_be_newer() {
    let world = World::new();
    let first = world.pull(false).unwrap();
    assert_eq!(world.pull(false).unwrap().id(), first.id());
    let hold = first.hold().unwrap();
    // The identity of the root file system makes it another image.
    let second = world.pull(true).unwrap();
    assert_ne!(second.id(), first.id());
    assert_eq!((world.left(), world.calls().matches("--include").count()), (2, 2));
    assert!(first.disk().exists(), "a machine still stands on it");
    drop(hold);
    world.pull(true).unwrap();
    world.store.prune(false, &mut Quiet).unwrap();
    assert_eq!(world.left(), 1);
}

#[test]
fn a_damaged_image_is_built_anew() {
    let world = World::new();
    let image = world.pull(false).unwrap();
    fs::remove_file(image.kernel().unwrap()).unwrap();
    assert!(world.pull(false).unwrap().is_whole());
    assert_eq!(world.left(), 1);
}

#[test]
fn builds_at_the_same_time_build_once() {
    let world = World::new();
    std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..3).map(|_| scope.spawn(|| world.pull(false).unwrap().id())).collect();
        let ids: Vec<String> = runs.into_iter().map(|run| run.join().unwrap()).collect();
        assert!(ids.iter().all(|id| *id == ids[0]));
    });
    assert_eq!(world.calls().matches("--include").count(), 1);
}

#[test]
fn each_failure_of_a_build_says_what_to_do() {
    for (word, words) in [
        ("full", &["the disk is full", "TMPDIR"][..]),
        ("subuid", &["usermod --add-subuids", "E: no entry in /etc/subuid"]),
        ("offline", &["check the network", "E: Failed to fetch http://m"]),
        ("broken", &["d:1 cannot be built", "E: dpkg exploded"]),
        ("empty", &["cannot start", "no busybox"]),
    ] {
        let world = World::new();
        world.tell(word);
        let error = world.error();
        assert!(words.iter().all(|word| error.contains(word)), "{word}: {error}");
        fs::remove_file(world.path("programs").join(word)).unwrap();
        world.pull(false).unwrap();
    }
}

#[test]
fn a_machine_whose_apt_has_no_lists_is_told_to_refresh_them() {
    let world = World::new();
    fs::remove_file(world.path("programs/lists")).unwrap();
    assert!(world.error().contains("run `sudo apt-get update`"));
}

#[test]
fn a_machine_without_the_programs_or_keys_is_told_what_to_install() {
    for (file, words) in [
        ("programs/mmdebstrap", "apt-get install mmdebstrap uidmap"),
        ("programs/apt-get", "apt-get install mmdebstrap uidmap"),
        ("keys", "debian-archive-keyring"),
    ] {
        let world = World::new();
        fs::remove_file(world.path(file)).unwrap();
        let error = world.error();
        assert!(error.contains(words), "{file}: {error}");
    }
}
