//! The machines that a user keeps: each is a folder with its definition and its disk.
//!
//! A machine is made from an image of `image`'s store: its disk is an overlay that holds what the
//! machine wrote, so that the image stays as it is. The files are the truth; nothing else knows of
//! a machine, and who has it open holds a lock on its definition. Start reading at [`Machines`].
#![forbid(unsafe_code)]

mod definition;
mod error;
mod machine;
mod name;
#[cfg(test)]
mod tests;

pub use error::HostError;
pub use machine::{Listed, Machine, Machines};
pub use name::{MachineName, NotAName};
