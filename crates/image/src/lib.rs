//! Guest images: fetch, verify, build.
//!
//! [`debian::prepare`] gives a kernel and an initramfs that boot Debian to a shell. Both come
//! from the distribution's own packages, fetched by the machine's own apt (so its mirrors,
//! proxies and keys hold), and stay in a [`Cache`] that is verified at every use.
//! [`initramfs::Builder`] makes initramfs archives of any content.
#![forbid(unsafe_code)]

mod apt;
mod cache;
mod catalogue;
mod deb;
pub mod debian;
mod download;
mod error;
mod fat;
pub mod initramfs;
mod manifest;
mod programs;
mod progress;
mod pull;
mod recipe;
pub mod seed;
mod store;

pub use cache::Cache;
pub use catalogue::{Catalogue, CatalogueError, Entry, Origin, Recipe, Remote};
pub use download::DownloadError;
pub use error::ImageError;
pub use programs::Programs;
pub use progress::{Progress, Quiet, Stage, Step};
pub use pull::{PullError, pull, pull_with};
pub use recipe::{InitrdError, RecipeError};
pub use store::{
    Boot, Format, Hold, Image, Import, Listed, Name, NameError, Pruned, Store, StoreError,
};
