//! Whole systems: a machine made from an image of the catalogue, or from a disk that the user has.
use super::error::RunError;
use crate::args::Run;
use crate::progress::Bar;
use ::disk::format::{Backing, OpenOptions};
use ::disk::memory::MemoryDisk;
use ::disk::qcow2::Shrink;
use ::disk::{Disk, Format, format, manage};
use host::{Machine, MachineName, Machines};
use image::seed::{Mount, Seed};
use image::{Catalogue, Hold, Image, Store};
use std::path::Path;
use std::sync::Arc;
use vmm::{BootSource, Bytes, DiskConfig, OnFull};

/// What the kernels of images are told beside where their root is: the console is ours, and only
/// errors are worth a line.
const CONSOLE: &str = "console=ttyS0 quiet";

/// The least size of a machine's disk, if its user says nothing.
const DISK_SIZE: Bytes = Bytes::mib(10 << 10);

/// A system that is ready to run.
pub struct System {
    /// What boots it.
    pub boot: BootSource,
    /// Its disks, which come before others.
    pub disks: Vec<DiskConfig>,
    /// What to call it.
    pub title: String,
    /// What must stay as long as it runs.
    pub kept: Option<Kept>,
}

/// A machine of the user's and its image, both held.
pub struct Kept {
    _machine: Machine,
    _image: Hold,
}

/// A machine made from the image of this name, which is fetched or built if it is not there.
pub fn from_image(arguments: &Run, name: &str) -> Result<System, RunError> {
    let store = Store::open()?;
    let catalogue = Catalogue::embedded()?;
    let image = image::pull(&store, &catalogue, name, false, &mut Bar::default())?;
    let machines = Machines::open()?;
    let called = match &arguments.name {
        Some(name) => name.clone(),
        None => MachineName::from_image(name)?,
    };
    let machine = match arguments.temporary {
        true => machines.make_temporary(&called, &image, name)?,
        false => machines.get_or_make(&called, &image, name)?,
    };
    // A machine stays with the image that it was made from, though the name may lead to a newer one.
    let image = match machine.image_id() == image.id() {
        true => image,
        false => by_id(&store, machine.image_id())?.unwrap_or(image),
    };
    let held = image.hold()?;
    let mut disks = vec![root(&machine, arguments)?];
    disks.extend(seed(arguments, &machine, &image)?);
    let boot = boot(arguments, &image, name)?;
    let title = format!("{called} ({})", image.description());
    Ok(System { boot, disks, title, kept: Some(Kept { _machine: machine, _image: held }) })
}

fn by_id(store: &Store, id: &str) -> Result<Option<Image>, RunError> {
    Ok(store.list()?.into_iter().map(|listed| listed.image).find(|image| image.id() == id))
}

/// The machine's own disk.
fn root(machine: &Machine, arguments: &Run) -> Result<DiskConfig, RunError> {
    let Bytes(least) = arguments.disk_size.unwrap_or(DISK_SIZE);
    let open = |path: &Path| {
        let disk = format::open(path, Some(Format::Qcow2), OpenOptions::write())?;
        if disk.size() >= least {
            return Ok(disk);
        }
        drop(disk);
        manage::resize(path, Some(Format::Qcow2), least, Shrink::Refuse)?;
        format::open(path, Some(Format::Qcow2), OpenOptions::write())
    };
    Ok(config(open(&machine.disk()).map_err(RunError::MachineDisk)?.into(), "root"))
}

fn config(disk: Arc<dyn Disk>, serial: &str) -> DiskConfig {
    DiskConfig { disk, serial: serial.to_owned(), on_full: OnFull::Pause }
}

/// The disk that tells the guest its name, keys and folders.
fn seed(arguments: &Run, machine: &Machine, image: &Image) -> Result<Option<DiskConfig>, RunError> {
    let mounts = arguments.mounts.iter().enumerate().map(|(number, mount)| {
        // The tag that the folder's device has, too.
        let tag = format!("share{number}");
        Mount::new(&tag, &mount.guest, mount.read_only)
    });
    let hostname = match &arguments.hostname {
        Some(name) => name.clone(),
        None => machine.name().as_str().parse()?,
    };
    let seed = Seed {
        instance: machine.instance().to_owned(),
        hostname: Some(hostname),
        keys: arguments.ssh_keys.iter().flat_map(|keys| keys.0.clone()).collect(),
        mounts: mounts.collect::<Result<_, _>>()?,
        user_data: arguments.cloud_init.clone(),
        network: arguments.network_config.clone(),
    };
    let bytes = seed.disk(image.seed_reader())?;
    Ok(Some(config(Arc::new(MemoryDisk::read_only(bytes)), "seed")))
}

fn boot(arguments: &Run, image: &Image, name: &str) -> Result<BootSource, RunError> {
    let kernel = match &arguments.kernel {
        Some(path) => Some(path.clone()),
        None => image.kernel(),
    };
    let kernel = kernel.ok_or_else(|| RunError::NoKernel(name.to_owned()))?;
    let initrd = match &arguments.kernel {
        Some(_) => arguments.initrd.clone(),
        None => image.initrd(),
    };
    let given = arguments.cmdline.as_deref();
    let parts = [image.cmdline(), Some(CONSOLE), given];
    Ok(BootSource {
        kernel: vmm::Image::open(&kernel)?,
        initrd: initrd.as_deref().map(vmm::Image::open).transpose()?,
        modules: Vec::new(),
        cmdline: parts.into_iter().flatten().collect::<Vec<_>>().join(" "),
    })
}

/// A machine with a disk of the user's, which is written to; it boots with the kernel that is named.
pub fn from_disk(arguments: &Run, path: &Path) -> Result<System, RunError> {
    let title = path.display().to_string();
    if let Some(flag) = arguments.image_flag() {
        return Err(RunError::OnlyImages(flag));
    }
    // A disk from elsewhere must not name files of this user for its guest to read.
    let options = OpenOptions { backing: Backing::Refuse, ..OpenOptions::write() };
    let disk = format::open(path, arguments.format, options).map_err(RunError::MachineDisk)?;
    let Some(kernel) = &arguments.kernel else { return Err(RunError::NoKernel(title)) };
    let boot = super::kernel(arguments, kernel)?;
    Ok(System { boot, disks: vec![config(disk.into(), "root")], title, kept: None })
}
