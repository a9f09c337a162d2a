//! The one ioctl that kvm-ioctls has no wrapper for.
#![allow(unsafe_code)]
use kvm_bindings::kvm_interrupt;
use kvm_ioctls::{Error, VcpuFd};
use std::os::fd::AsRawFd;

/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`: direction 1 (write), size 4, type AEH.
const KVM_INTERRUPT: libc::c_ulong = 1 << 30 | 4 << 16 | 0xae << 8 | 0x86;

/// Hands a vector from the PIC to the vCPU (api.rst §4.10, KVM_INTERRUPT).
///
/// # Errors
/// KVM does not take it now.
pub fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<(), Error> {
    let interrupt = kvm_interrupt { irq: u32::from(vector) };
    // SAFETY: the file is a vCPU's, and KVM_INTERRUPT reads the four bytes of this structure.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &raw const interrupt) };
    if result == 0 { Ok(()) } else { Err(Error::last()) }
}
