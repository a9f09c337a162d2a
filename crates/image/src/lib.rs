//! Guest images: fetch, verify, build.
//!
//! [`debian::prepare`] gives a kernel and an initramfs that boot Debian to a shell. Both come
//! from the distribution's own packages, fetched by the machine's own apt (so its mirrors,
//! proxies and keys hold), and stay in a [`Cache`] that is verified at every use.
//! [`initramfs::Builder`] makes initramfs archives of any content.
#![forbid(unsafe_code)]

mod apt;
mod cache;
mod deb;
pub mod debian;
mod error;
mod fat;
pub mod initramfs;
mod manifest;
mod programs;
mod progress;
pub mod seed;

pub use cache::Cache;
pub use error::ImageError;
pub use programs::Programs;
pub use progress::{Progress, Quiet, Stage, Step};
