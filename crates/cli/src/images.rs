//! `bv image`.
use crate::messages::{self, say};
use crate::progress::Bar;
use clap::{Args, Subcommand};
use image::{
    Boot, Catalogue, CatalogueError, Import, Listed, Name, Origin, PullError, Store, StoreError,
    pull,
};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

const IMPORT_EXAMPLES: &str = "\
Examples:
  bv image import disk.qcow2 mine
  bv image import disk.img mine:2 --format raw --kernel vmlinuz --cmdline 'root=/dev/vda1'";

/// What `bv image` does.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List the images that are here.
    Ls {
        /// List those that `bv image pull` can get instead.
        #[arg(long)]
        available: bool,
    },
    /// Get an image of the catalogue, unless it is here.
    Pull {
        /// The image, as debian:12.
        #[arg(value_name = "NAME")]
        name: String,
        /// Get the newest, and let it take the name of the one that is here.
        #[arg(long)]
        update: bool,
    },
    /// Remove images, unless machines use them.
    Rm {
        /// The images.
        #[arg(value_name = "NAME", required = true)]
        names: Vec<image::Name>,
    },
    /// Copy a disk of yours into the images, under a new name.
    Import(ImageImport),
    /// Remove what no machine uses and no name leads to, and what was cut off.
    Prune {
        /// Remove images with names too, if no machine uses them.
        #[arg(long)]
        all: bool,
    },
}

/// The flags of `bv image import`.
#[derive(Debug, Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub struct ImageImport {
    /// The disk.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// What to call it.
    #[arg(value_name = "NAME")]
    pub name: image::Name,
    /// The disk's format, which a raw disk does not show: raw, qcow2, vmdk, vdi, vhd or vhdx.
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<image::Format>,
    /// The kernel that boots it.
    #[arg(long, value_name = "FILE", requires = "cmdline")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, which names the root file system, as root=/dev/vda1.
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
}

/// The status of a failure that is not the input's fault.
const FAILED: u8 = 1;
/// The status of input that cannot work, as clap has it.
const BAD_INPUT: u8 = 2;

/// Why `bv image` does not do what was asked.
#[derive(Debug, thiserror::Error)]
enum ImageCommandError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error("the table cannot be written to standard output")]
    Output(#[source] io::Error),
}

impl ImageCommandError {
    fn status(&self) -> u8 {
        match self {
            Self::Catalogue(_)
            | Self::Pull(PullError::Catalogue(_))
            | Self::Store(
                StoreError::Name(_)
                | StoreError::NotHere { .. }
                | StoreError::Exists(_)
                | StoreError::InUse { .. }
                | StoreError::Given { .. }
                | StoreError::Format { .. },
            ) => BAD_INPUT,
            Self::Store(_) | Self::Pull(_) | Self::Output(_) => FAILED,
        }
    }
}

/// Does what was asked; the answer is the status of the process.
pub fn run(command: ImageCommand) -> ExitCode {
    match try_run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&messages::chain(&error));
            ExitCode::from(error.status())
        }
    }
}

fn try_run(command: ImageCommand) -> Result<(), ImageCommandError> {
    let store = Store::open()?;
    let bar = &mut Bar::default();
    match command {
        ImageCommand::Ls { available: false } => {
            store.damaged()?.iter().for_each(|error| say(&messages::chain(error)));
            print(&images(&store.list()?))
        }
        ImageCommand::Ls { available: true } => print(&available(&store, &Catalogue::embedded()?)),
        ImageCommand::Pull { name, update } => {
            let image = pull(&store, &Catalogue::embedded()?, &name, update, bar)?;
            bar.finish();
            say(&format!("{name} is {}, in {}", image.description(), image.folder().display()));
            Ok(())
        }
        ImageCommand::Rm { names } => remove(&store, &names, bar),
        ImageCommand::Import(arguments) => {
            let name = arguments.name.clone();
            let image = store.import(&import(arguments), &name, bar)?;
            bar.finish();
            say(&format!("{name} is there, in {}", image.folder().display()));
            Ok(())
        }
        ImageCommand::Prune { all } => {
            let pruned = store.prune(all, bar)?;
            let plural = if pruned.images == 1 { "" } else { "s" };
            say(&format!("removed {} image{plural}, {}", pruned.images, size(pruned.bytes)));
            Ok(())
        }
    }
}

fn remove(store: &Store, names: &[Name], bar: &mut Bar) -> Result<(), ImageCommandError> {
    for name in names {
        let bytes = store.remove(name, bar)?;
        say(&format!("removed {name}, {}", size(bytes)));
    }
    Ok(())
}

fn import(arguments: ImageImport) -> Import {
    let ImageImport { file, name: _, format, kernel, initrd, cmdline } = arguments;
    let boot = kernel.map(|kernel| Boot { kernel, initrd, cmdline: cmdline.unwrap_or_default() });
    Import { disk: file, format, boot }
}

/// The table of the images that are there.
fn images(listed: &[Listed]) -> String {
    let rows = listed.iter().map(|listed| {
        let name = listed.name.as_ref().map_or_else(|| "-".to_owned(), Name::to_string);
        let age = listed.image.made().map_or_else(|| "-".to_owned(), age);
        let users = match listed.users.len() {
            0 => "-".to_owned(),
            1 => "1 disk".to_owned(),
            count => format!("{count} disks"),
        };
        let (id, what) = (listed.image.id(), listed.image.description().to_owned());
        [name, id, listed.image.format().to_string(), size(listed.on_disk), age, users, what]
    });
    table(["NAME", "ID", "FORMAT", "ON DISK", "MADE", "USED BY", "WHAT"], rows)
}

/// The table of the images that can be had.
fn available(store: &Store, catalogue: &Catalogue) -> String {
    let rows = catalogue.entries().iter().map(|entry| {
        let here = match (store.get(&entry.name), &entry.origin) {
            (Ok(Some(image)), Origin::Recipe(recipe))
                if image.recipe() != Some(recipe.digest().as_str()) =>
            {
                "by another recipe"
            }
            (Ok(Some(_)), _) => "yes",
            _ => "no",
        };
        let aliases: Vec<String> = entry.aliases.iter().map(Name::to_string).collect();
        [entry.name.to_string(), here.to_owned(), aliases.join(", "), entry.description.clone()]
    });
    table(["NAME", "HERE", "ALSO CALLED", "WHAT"], rows)
}

/// Columns as wide as their widest cell, two spaces apart.
fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = write!(line, "{cell:0$}  ", width(column).unwrap_or_default());
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn print(text: &str) -> Result<(), ImageCommandError> {
    match io::stdout().write_all(text.as_bytes()) {
        // Who reads no further has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(ImageCommandError::Output(error))
        }
        _ => Ok(()),
    }
}

/// A number of bytes, for people.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{} kB", bytes.div_ceil(1000)),
        1_000_000..1_000_000_000 => format!("{} MB", bytes / 1_000_000),
        _ => format!("{}.{} GB", bytes / 1_000_000_000, bytes / 100_000_000 % 10),
    }
}

/// How long ago something was.
fn age(made: SystemTime) -> String {
    // A clock that was set back makes it come from the future; then it is new.
    let minutes = made.elapsed().map_or(0, |elapsed| elapsed.as_secs() / 60);
    let unit = |count: u64, unit: &str| {
        let plural = if count == 1 { "" } else { "s" };
        format!("{count} {unit}{plural} ago")
    };
    match minutes {
        0 => "just now".to_owned(),
        1..60 => unit(minutes, "minute"),
        60..1440 => unit(minutes / 60, "hour"),
        _ => unit(minutes / 1440, "day"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_without_spaces() {
        let rows = [["debian:12".to_owned(), "x".to_owned()], ["a".to_owned(), String::new()]];
        let text = table(["NAME", "WHAT"], rows.into_iter());
        assert_eq!(text, "NAME       WHAT\ndebian:12  x\na\n");
    }

    #[test]
    fn sizes_and_ages_are_for_people() {
        assert_eq!(size(1), "1 kB");
        assert_eq!(size(510_000_000), "510 MB");
        assert_eq!(size(2_147_483_648), "2.1 GB");
        let ago = |seconds| age(SystemTime::now() - Duration::from_secs(seconds));
        assert_eq!(ago(5), "just now");
        assert_eq!(ago(60), "1 minute ago");
        assert_eq!(ago(3 * 3600), "3 hours ago");
        assert_eq!(ago(2 * 86_400), "2 days ago");
        assert_eq!(age(SystemTime::now() + Duration::from_secs(99)), "just now");
    }
}
