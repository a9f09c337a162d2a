//! A switch among the machines of one user, without a process of its own.
//!
//! Each machine that joins a switch has a socket in the switch's folder, `bivisor/switch/NAME` in
//! the user's runtime directory, and a connection to each other one. So nothing is lost to the
//! others when one ends, however it ends: its connections close, and they go on among themselves.
//! Joining happens under a lock of the folder, which makes it sure that any two machines have one
//! connection, and clears away the sockets of those that were killed.
//!
//! A frame goes to where its destination was seen last, or to all. Frames come with what remains
//! to be done on them, so guests exchange large ones; what a receiver cannot take is cut and
//! summed here. Nobody passes on what came from another, so there are no loops.
//!
//! The folder is the user's alone, and so are those that connect. What they send is checked all the
//! same: it comes from processes whose guests are hostile.
//!
//! `folder` finds and joins, `mesh` has the others and what is known of their addresses, `message`
//! is what goes over a connection, `worker` the thread.

mod folder;
mod mesh;
mod message;
mod worker;

use crate::choice::SwitchName;
use crate::{Network, Nic, Packet};
use folder::Membership;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use worker::Shared;

/// Why a switch cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// A folder cannot be made or looked into.
    #[error("cannot use the folder {path}; set XDG_RUNTIME_DIR to one that is yours")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Others could put sockets into the folder, or look into it.
    #[error("the folder {0} is open to other users; run: chmod 700 {0}, or remove it")]
    Open(PathBuf),
    /// The folder is another user's, or none.
    #[error("{0} is not a folder of yours; remove it, or set XDG_RUNTIME_DIR to one that is yours")]
    Foreign(PathBuf),
    /// A socket's path is longer than Linux permits.
    #[error("the path {0} is too long for a socket; set XDG_RUNTIME_DIR to a shorter one")]
    Long(PathBuf),
    /// The host gives no further socket or thread.
    #[error("cannot {action}")]
    Host {
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A port of a switch, with a thread of its own until it is dropped.
pub struct Switch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Removed last, so that nobody connects to who is gone.
    _membership: Membership,
}

impl Switch {
    /// Joins the switch of that name of the calling user. It need not exist before.
    ///
    /// # Errors
    /// The user's runtime directory cannot be used, or the host gives no further socket.
    pub fn join(name: &SwitchName) -> Result<Self, SwitchError> {
        Self::join_in(&folder::runtime_directory()?, name)
    }

    /// Joins a switch whose folder is in `directory`, which is the user's alone.
    ///
    /// # Errors
    /// As [`Switch::join`].
    pub fn join_in(directory: &Path, name: &SwitchName) -> Result<Self, SwitchError> {
        let host = |action| move |source| SwitchError::Host { action, source };
        let (membership, listener, others) = folder::join(directory, name)?;
        let shared = Arc::new(Shared::new(listener, others).map_err(host("watch sockets"))?);
        let run = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("switch".to_owned())
            .spawn(move || run.run())
            .map_err(host("start a thread"))?;
        Ok(Self { shared, thread: Some(thread), _membership: membership })
    }

    /// How many other ports the switch has, as far as is known at present.
    #[must_use]
    pub fn others(&self) -> usize {
        self.shared.others()
    }
}

impl Network for Switch {
    fn plug(&self, nic: Option<Arc<dyn Nic>>) {
        self.shared.plug(nic);
    }

    fn transmit(&self, packet: Packet<'_>) {
        self.shared.transmit(&packet);
    }

    fn room(&self) {
        self.shared.room();
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}
