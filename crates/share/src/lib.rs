//! Folders of the host, shared with a guest.
//!
//! A [`Server`] speaks FUSE (Linux's `include/uapi/linux/fuse.h`, protocol 7.31 and later) for one
//! folder: [`Server::serve`] takes a request as bytes and gives the reply as bytes, whatever carries
//! them; virtio-fs is the one carrier of this project. It runs in the VM's own process as the user
//! who started it, without root and without a daemon. Start reading at `server`, which takes
//! requests apart; `names`, `files`, `folders` and `metadata` hold the operations.
//!
//! # Confinement
//! The guest is the adversary, and so is whoever changes the folder meanwhile. The host's kernel
//! is only ever given an open folder of the share and one name in it, which is neither `.` nor `..`
//! nor has a slash, and never follows a symbolic link (`O_PATH`, `O_NOFOLLOW`): links
//! are text that the guest reads and follows by itself. So no sequence of requests, and no race,
//! reaches what is not below the folder. Only regular files and folders are ever opened. Devices
//! cannot be made, set-user-ID programs cannot be left behind, and a procfs below the folder is
//! refused, because its files are the memory of processes. What the user may not do on the host,
//! the guest may not either. A folder that the host moves out of the share while the guest uses it
//! stays within the guest's reach, as it does for a program that has it as its working directory.
//!
//! # Owners
//! The host knows one user, the one who runs the server. What belongs to it is shown as belonging
//! to [`Options::owner`]; everything else to `nobody`, as in a rootless container. Everything the
//! guest makes belongs to the user, whoever in the guest made it, and `chown` of what belongs to
//! the user succeeds and changes nothing (as NFS's `all_squash` and virtiofsd's `squash-guest` do):
//! unpacking archives and `cp -a` as the guest's root work. Permission bits are kept, and hold for
//! the guest's kernel and the host's.
//!
//! # What the guest sees of the host's changes
//! What the guest was told holds for a second; the content of a file is read anew when it is
//! opened after a change. Writes reach the host's page cache before they end, `fsync` and `sync`
//! the host's disk. Memory maps work, as they go through the guest's page cache. Locks hold among the
//! guest's programs, not towards the host's.
#![forbid(unsafe_code)]

mod attributes;
mod files;
mod folders;
mod handles;
mod inodes;
mod metadata;
mod mount;
mod names;
mod protocol;
mod reopen;
mod server;
mod state;
mod wire;

pub use attributes::Owner;
pub use mount::{Mount, MountError};
pub use server::{Limits, MAX_DATA, MAX_REPLY, MAX_REQUEST, Options, Server, ShareError};
pub use state::StateError;
