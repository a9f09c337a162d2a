//! Why a machine cannot be had.
use crate::MachineName;
use disk::DiskError;
use image::StoreError;
use std::io;
use std::path::{Path, PathBuf};

/// Why a machine cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The environment names no place for machines.
    #[error(
        "no folder for machines: neither XDG_DATA_HOME nor HOME is an absolute path; set \
         XDG_DATA_HOME to a folder that you may write to"
    )]
    NoFolder,
    /// There is no machine of that name.
    #[error("there is no machine {name}; {}", list(have))]
    NotHere {
        /// The name that was asked for.
        name: MachineName,
        /// Those that are there.
        have: Vec<MachineName>,
    },
    /// It runs.
    #[error("the machine {0} is in use; stop it first, or run another one beside it with --name")]
    InUse(MachineName),
    /// The machine of that name was made from another image.
    #[error(
        "the machine {name} was made from {image}; run it with that, give another --name, or remove \
         it with `bv rm {name}`"
    )]
    OtherImage {
        /// The machine.
        name: MachineName,
        /// The image it stands on.
        image: String,
    },
    /// Its definition cannot be read.
    #[error("{}: {fault}; remove the machine with `bv rm`", path.display())]
    Damaged {
        /// The definition's file.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// The image's store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its disk cannot be made.
    #[error("the machine's disk cannot be made")]
    Disk(#[source] DiskError),
    /// The host refused something.
    #[error("{}: cannot {action}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

impl HostError {
    /// The host refused something.
    pub(crate) fn file(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { path: path.to_owned(), action, source }
    }
}

fn list(names: &[MachineName]) -> String {
    let names: Vec<&str> = names.iter().map(MachineName::as_str).collect();
    match names.as_slice() {
        [] => "there are none; `bv run debian:12` makes one".to_owned(),
        names => format!("there are {}", names.join(", ")),
    }
}
