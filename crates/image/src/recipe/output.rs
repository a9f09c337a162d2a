//! What mmdebstrap and apt write while they work, as progress.

use crate::{Progress, Stage, Step};
use std::collections::VecDeque;

/// How many of the last lines are kept, to say why a build failed.
const KEPT: usize = 40;
/// The longest part of a line that is kept.
const LONGEST: usize = 400;

/// Follows the lines of a build.
pub(super) struct Output<'a> {
    progress: &'a mut dyn Progress,
    tail: VecDeque<String>,
    /// Bytes downloaded and to be downloaded, of both of apt's runs.
    bytes: (u64, u64),
    /// Packages unpacked or set up, and to be.
    packages: (u64, u64),
}

impl<'a> Output<'a> {
    pub fn new(progress: &'a mut dyn Progress) -> Self {
        let step = Step { stage: Stage::RefreshingLists, done: 0, total: None };
        progress.report(&step);
        Self { progress, tail: VecDeque::new(), bytes: (0, 0), packages: (0, 0) }
    }

    /// Takes a line.
    pub fn take(&mut self, line: &str) {
        if self.tail.len() == KEPT {
            self.tail.pop_front();
        }
        self.tail.push_back(line.chars().take(LONGEST).collect());
        if let Some((count, _)) = newly_installed(line) {
            // Each is unpacked, and each is set up.
            self.packages.1 = self.packages.1.saturating_add(count.saturating_mul(2));
        } else if let Some(size) = line.strip_prefix("Need to get ") {
            self.bytes.1 = self.bytes.1.saturating_add(size_in(size).unwrap_or(0));
        } else if line.starts_with("Get:") && self.bytes.1 > 0 {
            let size = line.rsplit_once('[').and_then(|(_, size)| size_in(size)).unwrap_or(0);
            self.bytes.0 = self.bytes.0.saturating_add(size).min(self.bytes.1);
            let (done, total) = self.bytes;
            self.report(Stage::DownloadingPackages, done, total);
        } else if line.starts_with("Unpacking ") || line.starts_with("Setting up ") {
            self.packages.0 = self.packages.0.saturating_add(1).min(self.packages.1);
            let (done, total) = self.packages;
            self.report(Stage::Installing, done, total);
        } else if line.starts_with("I: running --customize-hook in shell") {
            self.report(Stage::MakingDisk, 0, 0);
        }
    }

    /// The last lines.
    pub fn tail(&self) -> String {
        self.tail.iter().map(|line| format!("{line}\n")).collect()
    }

    fn report(&mut self, stage: Stage, done: u64, total: u64) {
        let total = (total > 0).then_some(total);
        self.progress.report(&Step { stage, done, total });
    }
}

/// The number in "0 upgraded, 69 newly installed, ...".
fn newly_installed(line: &str) -> Option<(u64, &str)> {
    let (before, after) = line.split_once(" newly installed")?;
    Some((before.rsplit(' ').next()?.parse().ok()?, after))
}

/// A size as apt writes it: "29.7 MB of archives.", "2759 kB]", "512 B]".
fn size_in(text: &str) -> Option<u64> {
    let mut words = text.split([' ', ']', '/']);
    let number: f64 = words.next()?.replace(',', "").parse().ok()?;
    let factor = match words.find(|word| word.ends_with('B'))? {
        "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return None,
    };
    // A float becomes the nearest integer there is, never an undefined one.
    Some((number * factor) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Steps(Vec<Step>);

    impl Progress for Steps {
        fn report(&mut self, step: &Step) {
            self.0.push(step.clone());
        }
    }

    #[test]
    fn lines_of_a_build_become_progress_that_never_passes_its_total() {
        let mut steps = Steps(Vec::new());
        let mut output = Output::new(&mut steps);
        for line in [
            "Get:1 http://m bookworm InRelease [151 kB]",
            "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
            "Need to get 1,001 kB of archives.",
            "Get:1 http://m bookworm/main amd64 libc6 amd64 2.36 [1000 kB]",
            "Get:2 http://m bookworm/main amd64 zlib amd64 1 [900 kB]",
            "Unpacking libc6:amd64 (2.36) ...",
            "Setting up libc6:amd64 (2.36) ...",
            "I: running --customize-hook in shell: sh -c 'x'",
        ] {
            output.take(line);
        }
        let seen: Vec<_> = steps.0.iter().map(|s| (s.stage.clone(), s.done, s.total)).collect();
        assert_eq!(
            seen,
            [
                (Stage::RefreshingLists, 0, None),
                (Stage::DownloadingPackages, 1_000_000, Some(1_001_000)),
                (Stage::DownloadingPackages, 1_001_000, Some(1_001_000)),
                (Stage::Installing, 1, Some(4)),
                (Stage::Installing, 2, Some(4)),
                (Stage::MakingDisk, 0, None),
            ]
        );
    }

    #[test]
    fn sizes_are_read_as_apt_writes_them() {
        assert_eq!(size_in("29.7 MB of archives."), Some(29_700_000));
        assert_eq!(size_in("12.0 MB/29.7 MB of archives."), None.or(Some(12_000_000)));
        assert_eq!(size_in("512 B]"), Some(512));
        assert_eq!(size_in("many kB]"), None);
        assert_eq!(size_in(""), None);
    }

    #[test]
    fn only_the_last_lines_are_kept_and_not_all_of_long_ones() {
        let mut quiet = crate::Quiet;
        let mut output = Output::new(&mut quiet);
        (0..100).for_each(|number| output.take(&format!("{number} {}", "x".repeat(1000))));
        let tail = output.tail();
        assert!(tail.starts_with("60 x") && tail.lines().count() == 40);
        assert!(tail.lines().all(|line| line.len() <= 400));
    }
}
