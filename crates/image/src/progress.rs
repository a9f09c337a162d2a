//! How a fetch tells what it is doing.

use std::fmt;

/// What is being done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Another process is fetching into the same cache; its result will serve this one too.
    Waiting,
    /// Apt is refreshing its package lists.
    RefreshingLists,
    /// Apt is downloading this package.
    Downloading(String),
    /// Files are being taken out of this package.
    Unpacking(String),
    /// This disk is being copied.
    Copying(String),
    /// The packages of an image are being downloaded.
    DownloadingPackages,
    /// The packages of an image are being installed; `done` and `total` count them, each twice:
    /// unpacked, and set up.
    Installing,
    /// The disk of an image is being made.
    MakingDisk,
    /// The disk of an image is being compared with its sum.
    Verifying,
}

impl Stage {
    /// Whether what is done is counted in bytes.
    #[must_use]
    pub fn counts_bytes(&self) -> bool {
        *self != Self::Installing
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting => write!(out, "waiting for another bv that is fetching"),
            Self::RefreshingLists => write!(out, "refreshing the package lists"),
            Self::Downloading(package) => write!(out, "downloading {package}"),
            Self::Unpacking(package) => write!(out, "unpacking {package}"),
            Self::Copying(name) => write!(out, "copying {name}"),
            Self::DownloadingPackages => write!(out, "downloading packages"),
            Self::Installing => write!(out, "installing packages"),
            Self::MakingDisk => write!(out, "making the disk"),
            Self::Verifying => write!(out, "verifying"),
        }
    }
}

/// One report: the stage, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is being done.
    pub stage: Stage,
    /// Bytes done so far, or what the stage counts instead.
    pub done: u64,
    /// As many in all, where that is known before the end.
    pub total: Option<u64>,
}

/// Receives the reports of a fetch. A stage begins with `done` at what was there already (0, or
/// the part of an earlier download that is resumed) and may be reported any number of times.
pub trait Progress {
    /// Takes one report, on the thread that fetches.
    fn report(&mut self, step: &Step);
}

/// Drops every report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn report(&mut self, _step: &Step) {}
}
