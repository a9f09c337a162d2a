//! A tap device of the host that exists: the guest is a station on whatever the host has connected
//! it to, such as a bridge.
//!
//! Making the device needs root, once: `ip tuntap add dev NAME mode tap user USER`. Using it does
//! not. Frames carry the header of virtio-net, so that large ones pass whole (IFF_VNET_HDR).

mod header;
mod ioctl;
mod worker;

use crate::choice::TapName;
use crate::{Network, Nic, Packet};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use worker::Shared;

/// Where tap devices are opened.
const DEVICE: &str = "/dev/net/tun";
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Why a tap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is none of that name.
    #[error("there is no device {0}; make it: sudo ip tuntap add dev {0} mode tap user $USER")]
    Missing(TapName),
    /// The device of that name is of another kind.
    #[error("{0} is no tap device; `ip -details link show {0}` says what it is, choose another")]
    NotTap(TapName),
    /// The device is another user's.
    #[error(
        "{0} is not yours to use; have it made anew for you: sudo ip tuntap del dev {0} mode tap; \
         sudo ip tuntap add dev {0} mode tap user $USER"
    )]
    NotYours(TapName),
    /// Another machine is attached to the device.
    #[error("{0} is in use by another program; give each machine a tap device of its own")]
    Busy(TapName),
    /// The host has no tap devices.
    #[error("{DEVICE} is missing; load the driver: sudo modprobe tun")]
    NoDriver,
    /// The user may not open the device file.
    #[error("{DEVICE} may not be opened; let all users do: sudo chmod 666 {DEVICE}")]
    NoAccess,
    /// The host refused something else.
    #[error("cannot {action} {name}")]
    Host {
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// The device.
        name: TapName,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A tap device in use, with a thread of its own until it is dropped.
pub struct Tap {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Tap {
    /// Attaches to an existing tap device.
    ///
    /// # Errors
    /// There is none, it is in use or another user's, or the host has no driver for it.
    pub fn open(name: &TapName) -> Result<Self, TapError> {
        let file = attach(name)?;
        let host = |action| move |source| TapError::Host { action, name: name.clone(), source };
        ioctl::set_header_size(&file, header::SIZE as i32)
            .map_err(|error| host("set up")(error.into()))?;
        let shared = Arc::new(Shared::new(file).map_err(host("watch"))?);
        let run = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("tap".to_owned())
            .spawn(move || run.run())
            .map_err(host("start a thread for"))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

/// Opens the device; it is not made where it does not exist, as that would be another one.
fn attach(name: &TapName) -> Result<OwnedFd, TapError> {
    let host = |action| {
        move |error: Errno| TapError::Host { action, name: name.clone(), source: error.into() }
    };
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(host("look for"))?;
    match name_to_index(any, name.as_str()) {
        Ok(_) => {}
        Err(Errno::NODEV) => return Err(TapError::Missing(name.clone())),
        Err(error) => return Err(host("look for")(error)),
    }
    let mode = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(DEVICE, mode, Mode::empty()).map_err(|error| match error {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => TapError::NoDriver,
        Errno::ACCESS | Errno::PERM => TapError::NoAccess,
        error => host("open")(error),
    })?;
    let mut bytes = [0; 16];
    // The name has at most 15 bytes, so that a zero follows.
    for (to, from) in bytes.iter_mut().zip(name.as_str().bytes()) {
        *to = from;
    }
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    let attached = match ioctl::attach(&file, bytes, flags) {
        // A device made for several queues is only attached to as such.
        Err(Errno::INVAL) => ioctl::attach(&file, bytes, flags | IFF_MULTI_QUEUE),
        result => result,
    };
    match attached {
        Ok(()) => Ok(file),
        Err(Errno::INVAL) => Err(TapError::NotTap(name.clone())),
        Err(Errno::BUSY) => Err(TapError::Busy(name.clone())),
        Err(Errno::PERM | Errno::ACCESS) => Err(TapError::NotYours(name.clone())),
        Err(error) => Err(host("attach to")(error)),
    }
}

impl Network for Tap {
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

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_or_no_tap_is_refused_with_the_fix() {
        let error = Tap::open(&"no-such-tap".parse().unwrap()).err().unwrap().to_string();
        assert!(error.contains("sudo ip tuntap add dev no-such-tap mode tap user"), "{error}");
        let error = Tap::open(&"lo".parse().unwrap()).err().unwrap().to_string();
        assert!(error.contains("lo is no tap device"), "{error}");
    }
}
