//! The user's terminal: raw while it is the guest's console, and restored on every way out.
use rustix::termios::{self, OptionalActions, Termios};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError, TryLockError};

/// The key that leaves, as the terminal sends it: Ctrl-].
pub const ESCAPE: u8 = 0x1d;

/// The terminal that is raw now, with the settings that it had before. Global, because a panic
/// on any thread must find it.
static SAVED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// A terminal in raw mode; dropping it restores the terminal.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Makes a terminal raw: each key reaches the guest at once and unchanged.
    ///
    /// # Errors
    /// It is not a terminal, or it hung up.
    pub fn enter(terminal: impl AsFd) -> io::Result<Self> {
        let before = termios::tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        let descriptor = terminal.as_fd().try_clone_to_owned()?;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((descriptor, before));
        let mode = Self(());
        termios::tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(mode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal, if it is raw.
pub fn restore() {
    // Not to wait: a panic hook may run on the thread that holds the lock.
    let mut saved = match SAVED.try_lock() {
        Ok(saved) => saved,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some((descriptor, before)) = saved.take() {
        // A terminal that cannot be restored is one that hung up.
        let _ = termios::tcsetattr(descriptor, OptionalActions::Now, &before);
    }
}

/// Whether a terminal is raw now, so that lines must end with a carriage return.
pub fn is_raw() -> bool {
    SAVED.try_lock().is_ok_and(|saved| saved.is_some())
}

/// Restores the terminal before a panic is printed.
pub fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        print(info);
    }));
}

/// Whether a descriptor is a terminal that this process may read and set: not one that belongs
/// to another job of the shell, which would stop a background process that touches it.
pub fn is_ours(descriptor: impl AsFd) -> bool {
    if !termios::isatty(&descriptor) {
        return false;
    }
    // A terminal that does not control this session has no foreground job.
    termios::tcgetpgrp(&descriptor).map_or(true, |group| group == rustix::process::getpgrp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty;
    use rustix::termios::LocalModes;

    /// A pseudoterminal: the end of the terminal program, and the end of the user's programs.
    fn open_pty() -> (OwnedFd, OwnedFd) {
        let controller = pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY).unwrap();
        pty::grantpt(&controller).unwrap();
        pty::unlockpt(&controller).unwrap();
        let name = pty::ptsname(&controller, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let user = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
        (controller, user)
    }

    fn echoes(terminal: &OwnedFd) -> bool {
        termios::tcgetattr(terminal).unwrap().local_modes.contains(LocalModes::ECHO)
    }

    // One test, because the raw terminal is one for the whole process.
    #[test]
    fn the_terminal_is_restored_at_the_end_and_after_a_panic() {
        let (_controller, user) = open_pty();
        assert!(is_ours(&user) && echoes(&user));
        let raw = RawMode::enter(&user).unwrap();
        assert!(is_raw() && !echoes(&user));
        drop(raw);
        assert!(!is_raw() && echoes(&user));

        let raw = RawMode::enter(&user).unwrap();
        restore_on_panic();
        let panicking = std::thread::spawn(|| panic!("a panic for this test"));
        assert!(panicking.join().is_err());
        assert!(echoes(&user), "another thread's panic restores the terminal too");
        drop(raw);

        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert!(!is_ours(&reader));
        assert!(RawMode::enter(&reader).is_err());
    }
}
