//! Packages through the machine's own apt: describe, refresh, download, verify.

use crate::error::AptSays;
use crate::manifest::sha256;
use crate::{ImageError, Programs, Progress, Stage, Step};
use std::fs;
use std::path::{Path, PathBuf};

/// The machine's apt.
pub(crate) struct Apt<'a> {
    programs: &'a Programs,
}

/// One package of the distribution, as its signed lists describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub name: String,
    pub version: String,
    /// Of the .deb file, in bytes.
    pub size: u64,
    /// Of the .deb file, in lower-case hexadecimal.
    pub sha256: String,
    /// The names of the packages it depends on (the first of each set of alternatives).
    pub depends: Vec<String>,
}

impl<'a> Apt<'a> {
    pub fn new(programs: &'a Programs) -> Self {
        Self { programs }
    }

    /// Whether any package list is there.
    pub fn has_lists(&self) -> Result<bool, ImageError> {
        let arguments = ["indextargets", "--format", "$(FILENAME)", "Created-By: Packages"];
        Ok(!self.programs.output("apt-get", &arguments)?.stdout.trim_ascii().is_empty())
    }

    /// Runs `apt-get update` where this user may.
    pub fn refresh(&self, progress: &mut dyn Progress) -> Result<(), ImageError> {
        if !self.programs.root() {
            return Err(ImageError::NoLists);
        }
        let step = Step { stage: Stage::RefreshingLists, done: 0, total: None };
        let (status, text) =
            self.programs.watch("apt-get", &["-q", "update"], Path::new("/"), || {
                progress.report(&step);
            })?;
        if status.success() && self.has_lists()? {
            return Ok(());
        }
        Err(ImageError::Refresh { source: apt_says(&text) })
    }

    /// The version of a package that apt would install.
    pub fn describe(&self, name: &str) -> Result<Package, ImageError> {
        let arguments = ["show", "--no-all-versions", name];
        let output = self.programs.output("apt-cache", &arguments)?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() || text.trim().is_empty() {
            return Err(ImageError::NoPackage { package: name.to_owned() });
        }
        Package::parse(name, &text)
    }

    /// Downloads a package into `folder`, which holds nothing else, goes on with what an earlier
    /// run left there, and verifies the result.
    pub fn download(
        &self,
        package: &Package,
        folder: &Path,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, ImageError> {
        let wanted = format!("{}={}", package.name, package.version);
        let mut step = Step {
            stage: Stage::Downloading(package.name.clone()),
            done: 0,
            total: Some(package.size),
        };
        // Two tries: apt resumes a cut-off file but takes a file of the right size as it is, so a
        // damaged one is found only here and must go before the second try.
        for _ in 0..2 {
            if let Some(path) = package.find_verified(folder) {
                return Ok(path);
            }
            discard_if_complete(folder, package.size)?;
            let (status, text) =
                self.programs.watch("apt-get", &["-qq", "download", &wanted], folder, || {
                    step.done = bytes_in(folder).min(package.size);
                    progress.report(&step);
                })?;
            if !status.success() {
                return Err(download_error(package, folder, &text));
            }
        }
        package.find_verified(folder).ok_or_else(|| {
            // Only space is at stake: the next run verifies again.
            let _ = fs::remove_dir_all(folder);
            ImageError::Mismatch { package: package.name.clone() }
        })
    }
}

impl Package {
    /// Reads the first stanza of `apt-cache show` (deb-control(5)).
    fn parse(name: &str, text: &str) -> Result<Self, ImageError> {
        let stanza: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).collect();
        let field = |field: &'static str| {
            let value = stanza.iter().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(field).then_some(value.trim())
            });
            value.ok_or_else(|| ImageError::Description { package: name.to_owned(), field })
        };
        let bad = |field| ImageError::Description { package: name.to_owned(), field };
        let sha256 = field("SHA256")?.to_ascii_lowercase();
        if sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad("SHA256"));
        }
        let first_word = |text: &str| text.split([' ', '(', '|', ':']).next().map(str::to_owned);
        Ok(Self {
            name: name.to_owned(),
            version: field("Version")?.to_owned(),
            size: field("Size")?.parse().map_err(|_| bad("Size"))?,
            sha256,
            depends: field("Depends")
                .unwrap_or_default()
                .split(',')
                .filter_map(|entry| first_word(entry.trim()))
                .filter(|name| !name.is_empty())
                .collect(),
        })
    }

    /// The file in `folder` that is this package, checked by its content.
    fn find_verified(&self, folder: &Path) -> Option<PathBuf> {
        let path = fs::read_dir(folder).ok()?.flatten().next()?.path();
        // The size first: hashing a cut-off file would be for nothing.
        if fs::metadata(&path).ok()?.len() != self.size {
            return None;
        }
        (sha256(&fs::read(&path).ok()?) == self.sha256).then_some(path)
    }
}

/// Empties `folder` where its file is as long as it should be or longer, and yet wrong.
fn discard_if_complete(folder: &Path, size: u64) -> Result<(), ImageError> {
    if bytes_in(folder) < size {
        return Ok(());
    }
    let again = fs::remove_dir_all(folder).and_then(|()| fs::create_dir(folder));
    again.map_err(|source| ImageError::file(folder, "empty the folder", 0, source))
}

fn bytes_in(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum()
}

fn download_error(package: &Package, folder: &Path, text: &str) -> ImageError {
    if text.contains("No space left on device") {
        return ImageError::DiskFull { path: folder.to_path_buf(), needed: package.size };
    }
    ImageError::Download { package: package.name.clone(), source: apt_says(text) }
}

/// Apt's error lines, or its last line where none is marked as an error.
pub(crate) fn apt_says(text: &str) -> AptSays {
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("E:")).take(3).collect();
    AptSays(match (errors.is_empty(), text.lines().last()) {
        (false, _) => errors.join("\n"),
        (true, Some(line)) => line.to_owned(),
        (true, None) => "apt says nothing more".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
        Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), kmod:any, a | b\n\
        Size: 1504\nDescription: kernel\n Size: 3\n\
        SHA256: 00BE21c0c17f08ddf26e82d3b53fe7a41efa4a288938da6bb69e89c4b25c281d\n\n\
        Package: linux-image-cloud-amd64\nVersion: 5\n";

    #[test]
    fn the_first_stanza_of_a_description_is_read() {
        let package = Package::parse("linux-image-cloud-amd64", SHOWN).unwrap();
        assert_eq!(package.version, "6.1.192-2");
        assert_eq!(package.size, 1504);
        assert_eq!(package.depends, ["linux-image-6.1.0-56-cloud-amd64", "kmod", "a"]);
        assert!(package.sha256.starts_with("00be21c0"));
    }

    #[test]
    fn a_description_without_a_hash_or_size_is_refused_by_name() {
        for (line, field) in [("SHA256:", "SHA256"), ("Size: 1504", "Size")] {
            let text = SHOWN.replace(line, "Other: x");
            let error = Package::parse("p", &text).unwrap_err().to_string();
            assert!(error.contains(&format!("no usable {field}")), "{error}");
        }
    }

    #[test]
    fn apts_error_lines_are_shown_rather_than_its_warnings() {
        assert_eq!(apt_says("W: one\nE: two\nW: three").to_string(), "E: two");
        assert_eq!(apt_says("one\ntwo").to_string(), "two");
    }
}
