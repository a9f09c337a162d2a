//! `--disk`: what the user writes, and opening it.
use ::disk::format::{Backing, Format, OpenOptions};
use ::disk::raw::Raw;
use ::disk::{Disk, DiskError, FileOptions, format};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use vmm::{Bytes, DiskConfig, OnFull};

/// One `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    source: Source,
    format: Option<Format>,
    read_only: bool,
    backing: bool,
    on_full: OnFull,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// An image.
    File(PathBuf),
    /// A new disk of this size, for as long as the machine lives.
    Empty(Bytes),
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let source = match first.strip_prefix("size=") {
            Some(size) => {
                let size: Bytes = size.parse().map_err(|error| format!("size: {error}"))?;
                Source::Empty(size)
            }
            None if first.is_empty() => return Err("write the path of an image first".into()),
            None => Source::File(first.into()),
        };
        let (read_only, backing, on_full) = (false, false, OnFull::Pause);
        let mut arg = Self { source, format: None, read_only, backing, on_full };
        for part in parts {
            arg.option(part)?;
        }
        match arg.source {
            Source::Empty(Bytes(0)) => Err("a disk of no bytes is of no use".into()),
            Source::Empty(_) if arg.read_only || arg.backing || arg.format.is_some() => {
                Err("an empty disk has no format, can be written and stands on nothing".into())
            }
            _ => Ok(arg),
        }
    }
}

impl DiskArg {
    fn option(&mut self, text: &str) -> Result<(), String> {
        match text.split_once('=') {
            Some(("format", name)) => {
                let format =
                    name.parse().map_err(|error: format::UnknownFormatName| error.to_string())?;
                self.format = Some(format);
            }
            Some(("full", "pause")) => self.on_full = OnFull::Pause,
            Some(("full", "fail")) => self.on_full = OnFull::Fail,
            None if text == "readonly" => self.read_only = true,
            None if text == "backing" => self.backing = true,
            _ => {
                return Err(format!(
                    "`{text}` is no option of a disk; there are format=NAME, readonly, backing, \
                     full=pause and full=fail"
                ));
            }
        }
        Ok(())
    }

    /// Opens the disk, number `number` of its machine.
    ///
    /// # Errors
    /// The image is not there, is not what it should be, or is in use.
    pub fn open(&self, number: usize) -> Result<DiskConfig, DiskError> {
        let disk: Arc<dyn Disk> = match &self.source {
            Source::File(path) => self.open_file(path)?.into(),
            Source::Empty(size) => Arc::new(empty(*size, number)?),
        };
        Ok(DiskConfig { disk, serial: format!("disk{number}"), on_full: self.on_full })
    }

    fn open_file(&self, path: &Path) -> Result<Box<dyn Disk>, DiskError> {
        let options = if self.read_only { OpenOptions::read() } else { OpenOptions::write() };
        let backing = if self.backing { Backing::Follow } else { Backing::Refuse };
        format::open(path, self.format, OpenOptions { backing, ..options })
    }
}

/// A disk in a sparse file without a name.
fn empty(Bytes(size): Bytes, number: usize) -> Result<Raw, DiskError> {
    let name = format!("bv-{}-disk{number}.raw", std::process::id());
    let path = std::env::temp_dir().join(name);
    let disk = Raw::create(&path, size, FileOptions::write())?;
    std::fs::remove_file(&path).map_err(|source| DiskError::Host {
        file: path.display().to_string(),
        action: "be taken out of its folder",
        source,
    })?;
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DiskArg, String> {
        text.parse()
    }

    #[test]
    fn a_disk_is_a_path_with_options() {
        let disk = parse("a/b.img,format=raw,readonly,backing,full=fail").unwrap();
        assert_eq!(disk.source, Source::File("a/b.img".into()));
        assert_eq!((disk.format, disk.read_only, disk.backing), (Some(Format::Raw), true, true));
        assert_eq!(disk.on_full, OnFull::Fail);
        let disk = parse("x").unwrap();
        assert_eq!((disk.format, disk.read_only, disk.on_full), (None, false, OnFull::Pause));
        assert_eq!(parse("size=10GiB").unwrap().source, Source::Empty(Bytes(10 << 30)));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would() {
        let error = |text| parse(text).unwrap_err();
        assert!(error("").contains("path of an image"));
        assert!(error("x,cache=none").contains("format=NAME"));
        assert!(error("x,format=iso").contains("vhdx"));
        assert!(error("size=much").contains("size"));
        assert!(error("size=0").contains("no bytes"));
        assert!(error("size=1GiB,readonly").contains("empty disk"));
    }

    #[test]
    fn an_empty_disk_leaves_no_file_behind() {
        let disk = parse("size=1MiB").unwrap().open(7).unwrap();
        assert_eq!(disk.disk.size(), 1 << 20);
        let name = format!("bv-{}-disk7.raw", std::process::id());
        assert!(!std::env::temp_dir().join(name).exists());
    }
}
