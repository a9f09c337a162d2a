//! Gets an image of the catalogue into the store.

use crate::catalogue::{Catalogue, CatalogueError, Entry, Origin, Remote};
use crate::download::{self, DownloadError};
use crate::recipe::{self, RecipeError};
use crate::store::{Image, Lock, Parts, Staging, Store, StoreError};
use crate::{Programs, Progress, Stage, Step};
use std::fs;

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The catalogue does not have it.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It cannot be built.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// It cannot be downloaded.
    #[error(transparent)]
    Download(#[from] DownloadError),
}

/// Gives the image of this name: from the store where it is there and whole, or else as the
/// catalogue says. With `update` it is built or downloaded anew in any case, and takes the name
/// of the one before.
///
/// # Errors
/// Fails where the image is neither there nor can be had; the message says what to do.
pub fn pull(
    store: &Store,
    catalogue: &Catalogue,
    name: &str,
    update: bool,
    progress: &mut dyn Progress,
) -> Result<Image, PullError> {
    pull_with(&Programs::of_this_machine(), store, catalogue, name, update, progress)
}

/// As [`pull`], with the machine's programs named.
///
/// # Errors
/// As [`pull`].
pub fn pull_with(
    programs: &Programs,
    store: &Store,
    catalogue: &Catalogue,
    name: &str,
    update: bool,
    progress: &mut dyn Progress,
) -> Result<Image, PullError> {
    // What the user imported needs no catalogue.
    let given = name.parse().map_err(CatalogueError::Name)?;
    if !update && let Ok(Some(image)) = store.get(&given) {
        return Ok(image);
    }
    let entry = catalogue.find(name)?;
    if !update && let Ok(Some(image)) = store.get(&entry.name) {
        return Ok(image);
    }
    let lock = store.lock(progress)?;
    // Whoever held the lock until now may have made it.
    if !update && let Ok(Some(image)) = store.get(&entry.name) {
        return Ok(image);
    }
    match &entry.origin {
        Origin::Recipe(recipe) => {
            Ok(recipe::build(store, &lock, &entry.name, recipe, programs, progress)?)
        }
        Origin::Download(remote) => download(store, &lock, entry, remote, programs, progress),
    }
}

fn download(
    store: &Store,
    lock: &Lock,
    entry: &Entry,
    remote: &Remote,
    programs: &Programs,
    progress: &mut dyn Progress,
) -> Result<Image, PullError> {
    let path = download::fetch(store, lock, remote, programs, progress)?;
    let staging = Staging::new(store, lock)?;
    progress.report(&Step { stage: Stage::MakingDisk, done: 0, total: None });
    let place = staging.folder().join(format!("disk.{}", remote.format));
    fs::rename(&path, &place).map_err(|source| StoreError::file(&path, "move the file", source))?;
    let description = entry.description.clone();
    Ok(staging.finish(&entry.name, description, remote.format, None, Parts::default())?)
}
