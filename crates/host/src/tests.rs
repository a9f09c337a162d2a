//! Machines from their making to their end.
use crate::{HostError, Machine, MachineName, Machines};
use disk::format::{self, OpenOptions};
use image::{Image, Import, Name, Quiet, Store};
use std::path::PathBuf;
use tempfile::TempDir;

/// A store with one raw image whose bytes are all 7, and a folder of machines.
struct World {
    folder: TempDir,
    store: Store,
    image: Image,
    machines: Machines,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
        let store = Store::at(folder.path().join("images")).unwrap();
        let import = Import { disk, format: Some(image::Format::Raw), boot: None };
        let image = store.import(&import, &image_name(), &mut Quiet).unwrap();
        let machines = Machines::at(folder.path().join("machines")).unwrap();
        Self { folder, store, image, machines }
    }

    fn make(&self, name: &str) -> Machine {
        self.try_make(name, "test:1").unwrap()
    }

    fn try_make(&self, name: &str, image: &str) -> Result<Machine, HostError> {
        self.machines.get_or_make(&machine_name(name), &self.image, image)
    }

    /// Everything in the folder of machines.
    fn left(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.folder.path().join("machines")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

fn image_name() -> Name {
    "test:1".parse().unwrap()
}

fn machine_name(name: &str) -> MachineName {
    name.parse().unwrap()
}

fn first_byte(machine: &Machine) -> u8 {
    let mut byte = [0];
    let disk = format::open(&machine.disk(), None, OpenOptions::read()).unwrap();
    disk.read_at(0, &mut byte).unwrap();
    byte[0]
}

#[test]
fn what_a_machine_writes_stays_in_it_and_out_of_the_image() {
    let world = World::new();
    let machine = world.make("a");
    let disk = format::open(&machine.disk(), None, OpenOptions::write()).unwrap();
    disk.write_at(0, &[1]).unwrap();
    drop((disk, machine));
    assert_eq!(first_byte(&world.make("a")), 1);
    assert_eq!(first_byte(&world.make("b")), 7);
    assert_ne!(world.make("a").instance(), world.make("b").instance());
    assert_eq!(world.make("a").image_id(), world.image.id());
}

#[test]
fn a_machine_is_one_processes_at_a_time() {
    let world = World::new();
    let machine = world.make("a");
    let error = world.try_make("a", "test:1").unwrap_err();
    assert!(error.to_string().contains("--name"), "{error}");
    let error = world.machines.remove(machine.name()).unwrap_err();
    assert!(matches!(error, HostError::InUse(_)));
    assert!(world.machines.list().unwrap()[0].running);
    drop(machine);
    assert!(!world.machines.list().unwrap()[0].running);
}

#[test]
fn a_machine_of_another_image_is_not_taken_for_the_one_that_is_meant() {
    let world = World::new();
    drop(world.make("a"));
    let error = world.try_make("a", "other:2").unwrap_err().to_string();
    assert!(error.contains("test:1") && error.contains("bv rm a"), "{error}");
}

#[test]
fn an_image_stays_as_long_as_a_machine_stands_on_it() {
    let world = World::new();
    drop(world.make("a"));
    assert!(world.store.remove(&image_name(), &mut Quiet).is_err());
    world.machines.remove(&machine_name("a")).unwrap();
    assert!(world.left().is_empty());
    world.store.remove(&image_name(), &mut Quiet).unwrap();
}

#[test]
fn a_temporary_machine_leaves_nothing() {
    let world = World::new();
    let name = machine_name("a");
    let machine = world.machines.make_temporary(&name, &world.image, "test:1").unwrap();
    assert_eq!(first_byte(&machine), 7);
    assert_eq!(world.machines.names().unwrap(), []);
    drop(machine);
    assert!(world.left().is_empty());
}

#[test]
fn a_damaged_definition_is_named_and_the_machine_can_be_removed() {
    let world = World::new();
    drop(world.make("a"));
    let definition = world.folder.path().join("machines/a/vm.toml");
    std::fs::write(&definition, "form = 9").unwrap();
    let error = world.try_make("a", "test:1").unwrap_err().to_string();
    assert!(error.contains("vm.toml"), "{error}");
    world.machines.remove(&machine_name("a")).unwrap();
    let error = world.machines.remove(&machine_name("a")).unwrap_err().to_string();
    assert!(error.contains("there is no machine a"), "{error}");
}

#[test]
fn what_a_killed_process_left_is_swept_away_and_what_is_in_use_is_not() {
    let world = World::new();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    let age = |folder: &std::path::Path| {
        std::fs::File::open(folder).unwrap().set_modified(long_ago).unwrap();
    };
    let name = machine_name("a");
    let used = world.machines.make_temporary(&name, &world.image, "test:1").unwrap();
    let killed = world.machines.make_temporary(&name, &world.image, "test:1").unwrap();
    // As if its process had ended without a word: the lock goes, the folder stays.
    let copy = world.folder.path().join("machines/.left");
    std::fs::create_dir(&copy).unwrap();
    std::fs::write(copy.join("vm.toml"), "").unwrap();
    drop(killed);
    world.left().iter().for_each(|folder| age(folder));
    let fresh = world.machines.make_temporary(&name, &world.image, "test:1").unwrap();
    assert!(!copy.exists());
    assert_eq!((first_byte(&used), first_byte(&fresh)), (7, 7));
}
