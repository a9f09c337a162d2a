//! `bv disk`: making, inspecting and changing disk images.
mod report;

use crate::messages::{self, say};
use crate::progress::ByteBar;
use clap::{Args, Subcommand, ValueEnum};
use disk::convert::{self, Progress};
use disk::format::{self, OpenOptions};
use disk::qcow2::{Repair, Shrink};
use disk::{Disk, DiskError, FileOptions, Format, ImageFile, Lock, manage, overlay};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmm::Bytes;

/// What `bv disk` does.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make an image.
    Create(Create),
    /// Say what an image is.
    Info(Info),
    /// Look for damage in an image, and put it right if asked.
    ///
    /// Ends with status 0 where nothing is wrong, 2 where there are errors, 3 where space is lost
    /// but no data.
    Check(Check),
    /// Copy a disk into a new image, of any format; what is zero takes up no space in it.
    Convert(Convert),
    /// Change the size of a disk; what is new reads as zeroes.
    Resize(Resize),
    /// Give back to the host what is zero in an image.
    Compact(Compact),
}

/// Options of `bv disk create`.
#[derive(Debug, Args)]
pub struct Create {
    /// The new image.
    path: PathBuf,
    /// The disk's size, as 10GiB; with --backing it may be left out.
    #[arg(required_unless_present = "backing")]
    size: Option<Bytes>,
    /// Its format.
    #[arg(long, default_value = "qcow2")]
    format: Format,
    /// An image that is only read, over which the new one holds what is written.
    #[arg(long, value_name = "FILE", requires = "backing_format")]
    backing: Option<PathBuf>,
    /// The format of that image.
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<Format>,
}

/// Options of `bv disk info`.
#[derive(Debug, Args)]
pub struct Info {
    #[command(flatten)]
    image: ImageArgs,
}

/// Options of `bv disk check`.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    image: ImageArgs,
    /// Put right what is wrong: lost space only, or everything that can be.
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "all")]
    repair: Option<RepairArg>,
}

/// The values of `--repair`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RepairArg {
    /// Space that is in use for nothing.
    Leaks,
    /// That, and wrong counts of uses.
    All,
}

/// Options of `bv disk convert`.
#[derive(Debug, Args)]
pub struct Convert {
    #[command(flatten)]
    image: ImageArgs,
    /// The new image.
    target: PathBuf,
    /// The new image's format.
    #[arg(long, value_name = "FORMAT")]
    to: Format,
}

/// Options of `bv disk resize`.
#[derive(Debug, Args)]
pub struct Resize {
    #[command(flatten)]
    image: ImageArgs,
    /// The new size, as 10GiB.
    size: Bytes,
    /// Allow a smaller size, which cuts off the disk's end where there is no data.
    #[arg(long)]
    shrink: bool,
}

/// Options of `bv disk compact`.
#[derive(Debug, Args)]
pub struct Compact {
    #[command(flatten)]
    image: ImageArgs,
}

/// An image that is there.
#[derive(Debug, Args)]
struct ImageArgs {
    /// The image.
    path: PathBuf,
    /// Its format, where its header does not say or is not to be believed. A file without a header
    /// is never taken for raw without being told so.
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

impl ImageArgs {
    fn open(&self, options: OpenOptions) -> Result<Box<dyn Disk>, DiskError> {
        format::open(&self.path, self.format, options)
    }
}

/// To look at an image that a machine may be using.
fn inspecting() -> FileOptions {
    FileOptions { lock: Lock::Ignore, ..FileOptions::read() }
}

/// The status where an image has errors, and where it has lost space only, as `qemu-img check` has
/// them.
const HAS_ERRORS: u8 = 2;
const HAS_LEAKS: u8 = 3;

/// Does it; the answer is the status of the process.
pub fn run(command: &DiskCommand) -> ExitCode {
    let result = match command {
        DiskCommand::Create(options) => create(options),
        DiskCommand::Info(options) => info(options),
        DiskCommand::Check(options) => check(options),
        DiskCommand::Convert(options) => convert(options),
        DiskCommand::Resize(options) => resize(options),
        DiskCommand::Compact(options) => compact(options),
    };
    match result {
        Ok(status) => status,
        Err(error) => {
            say(&messages::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn create(options: &Create) -> Result<ExitCode, DiskError> {
    let Create { path, size, format, backing, backing_format } = options;
    let invalid = |problem: &str| DiskError::Invalid {
        file: path.display().to_string(),
        problem: problem.to_owned(),
    };
    match (backing.as_deref().zip(*backing_format), size) {
        (None, size) => {
            let size = size.ok_or_else(|| invalid("give the disk's size, as 10GiB"))?;
            format::create(path, *format, size.0)?;
        }
        (Some(_), _) if *format != Format::Qcow2 => {
            return Err(invalid("only qcow2 images can stand on another one"));
        }
        (Some((below, below_format)), size) => {
            overlay::create(path, below, below_format)?;
            if let Some(size) = size {
                manage::resize(path, Some(Format::Qcow2), size.0, Shrink::IfUnused)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn info(options: &Info) -> Result<ExitCode, DiskError> {
    let ImageArgs { path, format } = &options.image;
    messages::print(&report::describe(path, &manage::info(path, *format)?));
    Ok(ExitCode::SUCCESS)
}

fn check(options: &Check) -> Result<ExitCode, DiskError> {
    let repair = match options.repair {
        None => Repair::Nothing,
        Some(RepairArg::Leaks) => Repair::Leaks,
        Some(RepairArg::All) => Repair::Everything,
    };
    let ImageArgs { path, format } = &options.image;
    let report = manage::check(path, *format, repair)?;
    messages::print(&report::checked(path, &report));
    Ok(match (report.errors, report.leaks) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(HAS_LEAKS),
        _ => ExitCode::from(HAS_ERRORS),
    })
}

fn convert(options: &Convert) -> Result<ExitCode, DiskError> {
    let source = options.image.open(OpenOptions::read())?;
    let watch = Watch::begin(format!("Copying to {}", options.target.display()));
    convert::convert(source.as_ref(), &options.target, options.to, &mut |p| watch.report(p))?;
    Ok(ExitCode::SUCCESS)
}

fn resize(options: &Resize) -> Result<ExitCode, DiskError> {
    let shrink = if options.shrink { Shrink::IfUnused } else { Shrink::Refuse };
    manage::resize(&options.image.path, options.image.format, options.size.0, shrink)?;
    Ok(ExitCode::SUCCESS)
}

fn compact(options: &Compact) -> Result<ExitCode, DiskError> {
    let ImageArgs { path, format } = &options.image;
    let before = host_bytes(path)?;
    let watch = Watch::begin(format!("Compacting {}", path.display()));
    manage::compact(path, *format, &mut |p| watch.report(p))?;
    drop(watch);
    let after = host_bytes(path)?;
    messages::print(&format!("{} -> {}\n", report::rounded(before), report::rounded(after)));
    Ok(ExitCode::SUCCESS)
}

/// Bytes that an image takes up on the host.
fn host_bytes(path: &Path) -> Result<u64, DiskError> {
    ImageFile::open(path, inspecting())?.allocated()
}

/// Shows progress, and has Ctrl-C end the work in good order.
struct Watch {
    bar: ByteBar,
    interrupted: Arc<AtomicBool>,
}

impl Watch {
    fn begin(what: String) -> Self {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            // Where it cannot be caught it ends the program, as it does by default.
            let _ = signal_hook::flag::register(signal, interrupted.clone());
        }
        Self { bar: ByteBar::new(what), interrupted }
    }

    fn report(&self, progress: Progress) -> ControlFlow<()> {
        self.bar.set(progress.done, progress.total);
        match self.interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}
