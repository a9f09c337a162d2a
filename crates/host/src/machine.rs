//! Machines and the folder that holds them.
use crate::definition::Definition;
use crate::{HostError, MachineName};
use image::Image;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Names within a machine's folder.
const DEFINITION: &str = "vm.toml";
const DISK: &str = "disk.qcow2";
/// What is being made, or removed, begins so, and no machine's name does.
const UNFINISHED: &str = ".";
/// A machine is made in less than that.
const BEING_MADE: Duration = Duration::from_secs(60);
/// The longest definition that is read.
const LONGEST: u64 = 64 << 10;

/// The machines of a user.
#[derive(Clone, Debug)]
pub struct Machines {
    path: PathBuf,
}

/// A machine that this process has open; nobody else can have it until this is dropped.
#[derive(Debug)]
pub struct Machine {
    name: MachineName,
    folder: PathBuf,
    definition: Definition,
    temporary: bool,
    _lock: File,
}

impl Machines {
    /// Opens the user's folder of machines, `$XDG_DATA_HOME/bivisor/machines` or
    /// `~/.local/share/bivisor/machines` (XDG Base Directory Specification).
    ///
    /// # Errors
    /// The environment names no folder, or it cannot be made.
    pub fn open() -> Result<Self, HostError> {
        let absolute = |name: &str| {
            std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
        };
        let home = || Some(absolute("HOME")?.join(".local/share"));
        let base = absolute("XDG_DATA_HOME").or_else(home).ok_or(HostError::NoFolder)?;
        Self::at(base.join("bivisor/machines"))
    }

    /// Opens a folder of machines, and makes it where it is missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self, HostError> {
        let path = path.into();
        fs::create_dir_all(&path).map_err(HostError::file(&path, "make the folder"))?;
        Ok(Self { path })
    }

    /// The machine of this name, made from `image` if there is none yet.
    ///
    /// # Errors
    /// It is in use, was made from an image of another name, or cannot be made.
    pub fn get_or_make(
        &self,
        name: &MachineName,
        image: &Image,
        image_name: &str,
    ) -> Result<Machine, HostError> {
        let folder = self.path.join(name.as_str());
        if !folder.exists() {
            self.make(name, image, image_name, &folder)?;
        }
        let machine = self.take(name)?;
        if machine.definition.image != image_name {
            let image = machine.definition.image.clone();
            return Err(HostError::OtherImage { name: name.clone(), image });
        }
        Ok(machine)
    }

    /// A machine that is gone when it is dropped.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_temporary(
        &self,
        name: &MachineName,
        image: &Image,
        image_name: &str,
    ) -> Result<Machine, HostError> {
        self.sweep();
        let folder = self.path.join(format!("{UNFINISHED}{name}-{}", instance()?));
        let definition = lay_down(&folder, image, image_name)?;
        let lock = lock(&folder.join(DEFINITION), name)?;
        Ok(Machine { name: name.clone(), folder, definition, temporary: true, _lock: lock })
    }

    /// Makes it beside its place, so that it is there as a whole or not at all.
    fn make(
        &self,
        name: &MachineName,
        image: &Image,
        image_name: &str,
        folder: &Path,
    ) -> Result<(), HostError> {
        let unfinished = Unfinished(self.path.join(format!("{UNFINISHED}{name}-{}", instance()?)));
        lay_down(&unfinished.0, image, image_name)?;
        match fs::rename(&unfinished.0, folder) {
            // Somebody else was faster.
            Err(_) if folder.exists() => Ok(()),
            Err(source) => Err(HostError::file(folder, "give the machine its name")(source)),
            Ok(()) => {
                // The store knows where the overlay is, so that the image stays as long as it.
                image.attach(&folder.join(DISK))?;
                sync_folder(&self.path)
            }
        }
    }

    /// Removes what processes that were killed left behind. What cannot be removed stays.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for folder in entries.flatten().map(|entry| entry.path()) {
            let name = folder.file_name().unwrap_or_default().as_encoded_bytes();
            if name.starts_with(UNFINISHED.as_bytes()) && is_abandoned(&folder) {
                let _ = fs::remove_dir_all(&folder);
            }
        }
    }

    /// Opens a machine that is there.
    fn take(&self, name: &MachineName) -> Result<Machine, HostError> {
        let folder = self.path.join(name.as_str());
        let path = folder.join(DEFINITION);
        if !path.exists() {
            return Err(HostError::NotHere { name: name.clone(), have: self.names()? });
        }
        let lock = lock(&path, name)?;
        let definition = read(&lock, &path)?;
        Ok(Machine { name: name.clone(), folder, definition, temporary: false, _lock: lock })
    }

    /// The names of all machines, in order.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn names(&self) -> Result<Vec<MachineName>, HostError> {
        let entries =
            fs::read_dir(&self.path).map_err(HostError::file(&self.path, "read the folder"))?;
        let mut names: Vec<MachineName> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// All machines, in order of their names.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, HostError> {
        let look = |name: MachineName| {
            let folder = self.path.join(name.as_str());
            let path = folder.join(DEFINITION);
            let file = File::open(&path).ok()?;
            let running = flock(&file, FlockOperation::NonBlockingLockShared).is_err();
            let image = read(&file, &path).map_or_else(|e| e.to_string(), |d| d.image);
            Some(Listed { name, image, running, on_disk: on_disk(&folder.join(DISK)) })
        };
        Ok(self.names()?.into_iter().filter_map(look).collect())
    }

    /// Removes a machine with its disk; says how many bytes that gave back.
    ///
    /// # Errors
    /// There is none of that name, it is in use, or it cannot be removed.
    pub fn remove(&self, name: &MachineName) -> Result<u64, HostError> {
        let folder = self.path.join(name.as_str());
        let path = folder.join(DEFINITION);
        if !folder.exists() {
            return Err(HostError::NotHere { name: name.clone(), have: self.names()? });
        }
        // A machine without a definition is damaged, and can go all the same.
        let _lock = path.exists().then(|| lock(&path, name)).transpose()?;
        let bytes = on_disk(&folder.join(DISK));
        // Under a name that is no machine's, so that it is gone at once.
        let doomed = Unfinished(self.path.join(format!("{UNFINISHED}{name}-{}", instance()?)));
        fs::rename(&folder, &doomed.0).map_err(HostError::file(&folder, "remove it"))?;
        fs::remove_dir_all(&doomed.0).map_err(HostError::file(&doomed.0, "remove it"))?;
        Ok(bytes)
    }
}

/// A machine as `bv ls` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: MachineName,
    /// The image that it was made from.
    pub image: String,
    /// Somebody has it open.
    pub running: bool,
    /// Bytes that its disk takes up on the host.
    pub on_disk: u64,
}

impl Machine {
    /// Its name.
    pub fn name(&self) -> &MachineName {
        &self.name
    }

    /// Its disk, a qcow2 overlay.
    pub fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    /// Which image of the store it stands on.
    pub fn image_id(&self) -> &str {
        &self.definition.image_id
    }

    /// What tells it from all other machines that ever were.
    pub fn instance(&self) -> &str {
        &self.definition.instance
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.temporary {
            // What is left begins with a dot and is no machine.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// A folder that goes away where it does not become what it is to be.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Under its final name it is no longer here.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Fills the folder of a new machine.
fn lay_down(folder: &Path, image: &Image, image_name: &str) -> Result<Definition, HostError> {
    fs::create_dir(folder).map_err(HostError::file(folder, "make the folder"))?;
    let definition = Definition::new(image_name.to_owned(), image.id(), instance()?);
    let overlay = folder.join(DISK);
    disk::overlay::create(&overlay, &image.disk(), image.format()).map_err(HostError::Disk)?;
    let path = folder.join(DEFINITION);
    let text = toml::to_string(&definition)
        .map_err(|error| HostError::Damaged { path: path.clone(), fault: error.to_string() })?;
    let failed = "write the machine's definition";
    fs::write(&path, text).map_err(HostError::file(&path, failed))?;
    for path in [&path, &overlay] {
        let file = File::open(path).map_err(HostError::file(path, failed))?;
        file.sync_all().map_err(HostError::file(path, failed))?;
    }
    sync_folder(folder)?;
    Ok(definition)
}

/// Whether nobody holds an unfinished or temporary machine, and it is not just being made.
fn is_abandoned(folder: &Path) -> bool {
    let age = fs::metadata(folder).and_then(|folder| folder.modified()).map(|time| time.elapsed());
    let settled = matches!(age, Ok(Ok(age)) if age > BEING_MADE);
    let free = |file: File| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    settled && File::open(folder.join(DEFINITION)).map_or(true, free)
}

fn sync_folder(folder: &Path) -> Result<(), HostError> {
    let file = File::open(folder).map_err(HostError::file(folder, "open the folder"))?;
    file.sync_all().map_err(HostError::file(folder, "make the folder durable"))
}

/// Takes the lock of a machine, by its definition.
fn lock(path: &Path, name: &MachineName) -> Result<File, HostError> {
    let file = File::open(path).map_err(HostError::file(path, "open the file"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(HostError::InUse(name.clone())),
        Err(errno) => Err(HostError::file(path, "lock the file")(errno.into())),
    }
}

fn read(file: &File, path: &Path) -> Result<Definition, HostError> {
    let mut text = String::new();
    let read = file.take(LONGEST).read_to_string(&mut text);
    read.map_err(HostError::file(path, "read the file"))?;
    Definition::parse(&text).map_err(|fault| HostError::Damaged { path: path.to_owned(), fault })
}

/// Bytes that a file takes up; none where it is not there.
fn on_disk(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).map_or(0, |file| file.blocks().saturating_mul(512))
}

/// 128 random bits, in hexadecimal.
fn instance() -> Result<String, HostError> {
    let source = Path::new("/dev/urandom");
    let mut bits = [0; 16];
    let read: io::Result<()> = File::open(source).and_then(|mut file| file.read_exact(&mut bits));
    read.map_err(HostError::file(source, "read random bytes"))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bits)))
}
