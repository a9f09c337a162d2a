//! The three requests to a tap device that set it up (linux/if_tun.h). rustix knows how to make a
//! request, but not these.
#![allow(unsafe_code)]

use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, ioctl, opcode};
use std::os::fd::AsFd;

const TUNSETIFF: Opcode = opcode::write::<u32>(b'T', 202);
const TUNSETOFFLOAD: Opcode = opcode::write::<u32>(b'T', 208);
const TUNSETVNETHDRSZ: Opcode = opcode::write::<u32>(b'T', 216);

/// struct ifreq of linux/if.h, as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Attaches an open `/dev/net/tun` to the device of that name, which ends with a zero.
pub(super) fn attach(file: impl AsFd, name: [u8; 16], flags: u16) -> Result<(), Errno> {
    let request = InterfaceRequest { name, flags, rest: [0; 22] };
    // SAFETY: TUNSETIFF reads a struct ifreq, for which `InterfaceRequest` has size and layout
    // (40 bytes: the name, then the flags in a union), and keeps no pointer to it.
    unsafe { ioctl(file, Setter::<TUNSETIFF, InterfaceRequest>::new(request)) }
}

/// Says how many bytes of header are before each frame.
pub(super) fn set_header_size(file: impl AsFd, bytes: i32) -> Result<(), Errno> {
    // SAFETY: TUNSETVNETHDRSZ reads an int and keeps no pointer to it.
    unsafe { ioctl(file, Setter::<TUNSETVNETHDRSZ, i32>::new(bytes)) }
}

/// Says what frames from the device may leave to do.
pub(super) fn set_offload(file: impl AsFd, flags: usize) -> Result<(), Errno> {
    // SAFETY: TUNSETOFFLOAD takes its argument as a number and follows no pointer.
    unsafe { ioctl(file, IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags)) }
}
