//! Doorbells on KVM: the run loop rings them when a guest's write leaves KVM; where the notifier
//! has an event, KVM signals it without leaving (api.rst §4.59, KVM_IOEVENTFD).
//!
//! Writes that a companion engine executes ring in the run loop too: its machine is the same.
//! To take down one with an event takes KVM milliseconds, in which it waits for all vCPUs.
use crate::error::refused;
use crate::raw;
use crate::vm::VmShared;
use engine::{Doorbell, DoorbellHandle, DoorbellPlace, EngineError, Notify, Rings};
use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;

/// An event that KVM signals.
struct Assigned {
    shared: Arc<VmShared>,
    event: kvm_ioeventfd,
    /// Keeps the number in `event` that of the same eventfd.
    _fd: OwnedFd,
}

impl Drop for Assigned {
    fn drop(&mut self) {
        let mut event = self.event;
        event.flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
        let result = raw::ioeventfd(&self.shared.mapped.fd, &event);
        // It is refused only for what was not assigned.
        debug_assert!(result.is_ok(), "{result:?}");
    }
}

/// Makes a doorbell.
///
/// # Errors
/// It cannot be rung, or KVM does not take its event.
pub fn register(
    shared: &Arc<VmShared>,
    doorbell: Doorbell,
    notify: Arc<dyn Notify>,
) -> Result<DoorbellHandle, EngineError> {
    let entry = shared.doorbells.add(&shared.config.memory, doorbell, notify.clone())?;
    let assigned = match notify.event() {
        None => None,
        Some(fd) => {
            let fd = fd.try_clone_to_owned().map_err(|source| EngineError::Host {
                what: "the host does not let a doorbell's event be duplicated; raise this \
                       process's limit of open files (`ulimit -n`)"
                    .into(),
                source,
            })?;
            let mut event = described(doorbell);
            event.fd = fd.as_raw_fd();
            raw::ioeventfd(&shared.mapped.fd, &event).map_err(refused(format!(
                "KVM does not take the event of a doorbell at {} (KVM_IOEVENTFD)",
                doorbell.place
            )))?;
            Some(Assigned { shared: shared.clone(), event, _fd: fd })
        }
    };
    // The event is taken back before the entry.
    Ok(DoorbellHandle::new((assigned, entry)))
}

fn described(doorbell: Doorbell) -> kvm_ioeventfd {
    let mut event = kvm_ioeventfd::default();
    match doorbell.place {
        DoorbellPlace::Port(port) => {
            event.addr = port.into();
            event.flags |= 1 << kvm_ioeventfd_flag_nr_pio;
        }
        DoorbellPlace::Mmio(address) => event.addr = address.0,
    }
    // No length means any.
    event.len = doorbell.rings.width().map_or(0, |width| width.bytes() as u32);
    if let Rings::Value(_, value) = doorbell.rings {
        event.datamatch = value;
        event.flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    event
}
