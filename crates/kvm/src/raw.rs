//! What kvm-ioctls has no wrapper for, or only one that takes another crate's types.
#![allow(unsafe_code)]
use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_interrupt, kvm_ioeventfd, kvm_irqfd,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};

/// The number of an ioctl of type AEH: `direction` is 0 for none, 1 to write, 2 to read, 3 for
/// both; `size` is that of the argument in bytes.
const fn number(direction: u64, size: usize, index: u64) -> libc::c_ulong {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | index
}

const KVM_IRQFD: libc::c_ulong = number(1, size_of::<kvm_irqfd>(), 0x76);
const KVM_IOEVENTFD: libc::c_ulong = number(1, size_of::<kvm_ioeventfd>(), 0x79);
const KVM_INTERRUPT: libc::c_ulong = number(1, size_of::<kvm_interrupt>(), 0x86);
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = number(3, size_of::<kvm_clear_dirty_log>(), 0xc0);
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = number(0, 0, 0xc7);

fn result(answer: libc::c_int) -> Result<(), Error> {
    if answer >= 0 { Ok(()) } else { Err(Error::last()) }
}

/// Hands a vector from the PIC to the vCPU (api.rst §4.10, KVM_INTERRUPT).
///
/// # Errors
/// KVM does not take it now.
pub fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<(), Error> {
    let interrupt = kvm_interrupt { irq: u32::from(vector) };
    // SAFETY: the file is a vCPU's, and KVM_INTERRUPT reads the four bytes of this structure.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &raw const interrupt) })
}

/// Assigns or takes back an event that the guest's writes signal (api.rst §4.59).
///
/// # Errors
/// KVM does not take it.
pub fn ioeventfd(vm: &VmFd, event: &kvm_ioeventfd) -> Result<(), Error> {
    // SAFETY: the file is a VM's, and KVM_IOEVENTFD reads this structure.
    result(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IOEVENTFD, &raw const *event) })
}

/// Assigns or takes back an event that signals an interrupt (api.rst §4.75).
///
/// # Errors
/// KVM does not take it.
pub fn irqfd(vm: &VmFd, event: &kvm_irqfd) -> Result<(), Error> {
    // SAFETY: the file is a VM's, and KVM_IRQFD reads this structure.
    result(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IRQFD, &raw const *event) })
}

/// A new eventfd.
///
/// # Errors
/// The process or the host has no further file descriptor.
pub fn eventfd() -> Result<OwnedFd, Error> {
    // SAFETY: eventfd has no preconditions.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    result(fd)?;
    // SAFETY: the descriptor is new, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Clears pages of a slot in KVM's dirty log and protects them again (api.rst §4.117): those set
/// in `bitmap`, which has a bit for each of the slot's `pages`.
///
/// # Errors
/// KVM does not take it.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, pages: u32, bitmap: &[u64]) -> Result<(), Error> {
    if bitmap.len() < pages.div_ceil(64) as usize {
        return Err(Error::new(libc::EINVAL));
    }
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: 0,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the file is a VM's; KVM_CLEAR_DIRTY_LOG reads this structure and as many bits as
    // there are pages, which the check above found in the bitmap, and writes nothing.
    result(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const log) })
}

/// Gives the collected entries of all dirty rings back to KVM, which protects their pages again
/// (api.rst §8.29).
///
/// # Errors
/// KVM does not take it.
pub fn reset_dirty_rings(vm: &VmFd) -> Result<(), Error> {
    // SAFETY: the file is a VM's, and KVM_RESET_DIRTY_RINGS has no argument.
    result(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) })
}
