use super::*;
use crate::Quiet;

struct World {
    folder: tempfile::TempDir,
    store: Store,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path().join("images")).unwrap();
        Self { folder, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn import(&self, name: &str, content: &[u8]) -> Result<Image, StoreError> {
        let disk = self.path("disk");
        fs::write(&disk, content).unwrap();
        let import = Import { disk, format: Some(Format::Raw), boot: None };
        self.store.import(&import, &name.parse().unwrap(), &mut Quiet)
    }

    fn get(&self, name: &str) -> Option<Image> {
        self.store.get(&name.parse().unwrap()).unwrap()
    }

    fn remove(&self, name: &str) -> Result<u64, StoreError> {
        self.store.remove(&name.parse().unwrap(), &mut Quiet)
    }

    /// What is in the store beside its own two names.
    fn folders(&self) -> Vec<String> {
        let mut folders = self.store.folders().unwrap();
        folders.retain(|name| name != NAMES);
        folders
    }
}

#[test]
fn the_store_follows_the_xdg_rule() {
    let os = |text: &str| Some(OsString::from(text));
    assert_eq!(base_folder(os("/x"), os("/h")), Some(PathBuf::from("/x")));
    assert_eq!(base_folder(os("x"), os("/h")), Some(PathBuf::from("/h/.local/share")));
    assert_eq!(base_folder(None, None), None);
}

#[test]
fn an_imported_disk_is_there_by_name_whole_and_read_only() {
    let world = World::new();
    let image = world.import("mine:1", b"a disk").unwrap();
    assert_eq!(fs::read(image.disk()).unwrap(), b"a disk");
    assert!(fs::metadata(image.disk()).unwrap().permissions().readonly());
    let found = world.get("mine:1").unwrap();
    assert_eq!((found.id(), found.format()), (image.id(), Format::Raw));
    assert!(found.is_whole() && found.kernel().is_none());
    assert_eq!(world.folders(), [image.id()]);
    assert!(world.get("mine:2").is_none());
}

#[test]
fn an_import_keeps_what_boots_the_disk() {
    let world = World::new();
    fs::write(world.path("k"), "kernel").unwrap();
    fs::write(world.path("i"), "initrd").unwrap();
    fs::write(world.path("d"), "QFI\u{fb} is not yet qcow2").unwrap();
    let boot = Boot {
        kernel: world.path("k"),
        initrd: Some(world.path("i")),
        cmdline: "root=/dev/vda".into(),
    };
    let import = Import { disk: world.path("d"), format: Some(Format::Raw), boot: Some(boot) };
    let image = world.store.import(&import, &"b".parse().unwrap(), &mut Quiet).unwrap();
    assert_eq!(fs::read(image.kernel().unwrap()).unwrap(), b"kernel");
    assert_eq!(fs::read(image.initrd().unwrap()).unwrap(), b"initrd");
    assert_eq!(image.cmdline(), Some("root=/dev/vda"));
}

#[test]
fn a_disk_without_a_known_header_needs_its_format_said() {
    let world = World::new();
    fs::write(world.path("d"), [0; 4096]).unwrap();
    let mut import = Import { disk: world.path("d"), format: None, boot: None };
    let name = "x".parse().unwrap();
    let error = world.store.import(&import, &name, &mut Quiet).unwrap_err();
    assert!(error.to_string().contains("--format raw"), "{error}");
    fs::write(world.path("d"), b"QFI\xfb and so on").unwrap();
    let image = world.store.import(&import, &name, &mut Quiet).unwrap();
    assert_eq!(image.format(), Format::Qcow2);
    import.disk = world.path("missing");
    let error = world.store.import(&import, &name, &mut Quiet).unwrap_err();
    assert!(error.to_string().contains("missing: cannot read the file"), "{error}");
    import.disk = world.folder.path().into();
    assert!(world.store.import(&import, &name, &mut Quiet).is_err());
    assert_eq!(world.folders().len(), 1);
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let world = World::new();
    world.import("x", b"one").unwrap();
    let error = world.import("x", b"two").unwrap_err();
    assert!(error.to_string().contains("bv image rm x"), "{error}");
    assert_eq!(fs::read(world.get("x").unwrap().disk()).unwrap(), b"one");
}

#[test]
fn an_image_with_an_overlay_stays_until_the_overlay_is_gone() {
    let world = World::new();
    let image = world.import("x", b"one").unwrap();
    let overlay = world.path("vm/disk.qcow2");
    fs::create_dir(world.path("vm")).unwrap();
    fs::write(&overlay, "").unwrap();
    image.attach(&overlay).unwrap();
    let error = world.remove("x").unwrap_err().to_string();
    assert!(error.contains(overlay.to_str().unwrap()), "{error}");
    assert_eq!(world.store.prune(true, &mut Quiet).unwrap().images, 0);
    assert_eq!(world.store.list().unwrap()[0].users, std::slice::from_ref(&overlay));
    fs::remove_file(overlay).unwrap();
    assert!(world.remove("x").unwrap() > 0);
    assert!(world.get("x").is_none() && world.folders().is_empty());
}

#[test]
fn an_image_that_a_running_machine_holds_stays() {
    let world = World::new();
    let image = world.import("x", b"one").unwrap();
    let hold = image.hold().unwrap();
    let second = image.hold().unwrap();
    assert!(world.remove("x").unwrap_err().to_string().contains("a running machine"));
    drop((hold, second));
    world.remove("x").unwrap();
    assert!(image.hold().is_err());
}

#[test]
fn a_newer_image_leaves_the_old_one_to_its_machines_and_no_longer() {
    let world = World::new();
    let old = world.import("x", b"one").unwrap();
    let new = world.import("y", b"two").unwrap();
    let hold = old.hold().unwrap();
    let lock = world.store.lock(&mut Quiet).unwrap();
    world.store.set_name(&lock, &"x".parse().unwrap(), &new.id()).unwrap();
    drop(lock);
    assert_eq!(world.get("x").unwrap().id(), new.id());
    let listed = world.store.list().unwrap();
    assert_eq!(listed.last().unwrap().image.id(), old.id());
    assert_eq!(listed.last().unwrap().name, None);
    drop(hold);
    let pruned = world.store.prune(false, &mut Quiet).unwrap();
    assert_eq!((pruned.images, world.folders()), (1, vec![new.id()]));
    assert!(pruned.bytes > 0);
}

#[test]
fn what_a_killed_process_left_goes_with_the_next_change() {
    let world = World::new();
    fs::create_dir(world.store.path().join(".tmp-1")).unwrap();
    fs::write(world.store.path().join(".tmp-1/disk.raw"), [1; 9000]).unwrap();
    assert!(world.store.list().unwrap().is_empty());
    assert!(world.store.prune(false, &mut Quiet).unwrap().bytes >= 9000);
    fs::create_dir(world.store.path().join(".tmp-1")).unwrap();
    world.import("x", b"one").unwrap();
    assert_eq!(world.folders().len(), 1);
}

#[test]
fn a_damaged_image_is_named_with_the_way_to_get_it_again() {
    let world = World::new();
    let image = world.import("x", b"one").unwrap();
    let record = world.store.path().join(image.id()).join("image.toml");
    let replace = |path: &Path, content: &str| {
        fs::remove_file(path).unwrap();
        fs::write(path, content).unwrap();
    };
    let text = fs::read_to_string(&record).unwrap();
    let get = || world.store.get(&"x".parse().unwrap()).unwrap_err().to_string();
    replace(&image.disk(), "longer than it was");
    assert!(get().contains("bv image pull --update x"), "{}", get());
    let damaged = world.store.damaged().unwrap();
    assert_eq!((damaged.len(), world.store.list().unwrap().len()), (1, 0));
    replace(&image.disk(), "two");
    assert!(!world.get("x").unwrap().is_whole());
    for record_text in ["", "form = 1", &text.replace("form = 1", "form = 2"), "\0"] {
        replace(&record, record_text);
        assert!(get().contains("damaged"), "{}", get());
    }
    world.remove("x").unwrap();
    assert!(world.folders().is_empty());
}

#[test]
fn removing_what_is_not_there_says_what_is() {
    let world = World::new();
    assert!(world.remove("x").unwrap_err().to_string().contains("no images yet"));
    world.import("y", b"one").unwrap();
    assert!(world.remove("x").unwrap_err().to_string().contains("there are y"));
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let world = World::new();
    let lock = world.store.lock(&mut Quiet).unwrap();
    let staging = Staging::new(&world.store, &lock).unwrap();
    fs::write(staging.folder().join("part"), "half").unwrap();
    let full = io::Error::from(io::ErrorKind::StorageFull);
    let error = staging.disk_error(Format::Raw, 3_000_000, full).to_string();
    assert!(error.contains("the disk is full; free about 3 MB"), "{error}");
    drop(staging);
    assert!(world.folders().is_empty());
}
