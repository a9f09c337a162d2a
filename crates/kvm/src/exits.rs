//! What a guest asks of the machine: ports and device registers.
#![allow(unsafe_code)]
use crate::KeepInGuest;
use crate::error::refused;
use crate::memory::ReadOnly;
use arch::GuestPhysical;
use engine::{EngineError, VcpuIo};
use kvm_bindings::{
    KVM_CAP_X86_DISABLE_EXITS, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_X86_DISABLE_EXITS_HLT,
    KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_DISABLE_EXITS_PAUSE, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};

/// The accesses of one KVM_EXIT_IO: a string instruction makes several.
#[derive(Clone, Copy)]
pub struct PortAccess {
    port: u16,
    data: *mut u8,
    length: usize,
}

impl PortAccess {
    /// From what kvm-ioctls makes of an exit.
    pub fn new(port: u16, data: *const u8, length: usize) -> Self {
        Self { port, data: data.cast_mut(), length }
    }

    /// The bytes, and how many belong to each access.
    fn parts(self, vcpu: &mut VcpuFd) -> (&mut [u8], usize) {
        let run = vcpu.get_kvm_run();
        let size = if run.exit_reason == KVM_EXIT_IO {
            // SAFETY: the exit reason says that this is the union's present field.
            usize::from(unsafe { run.__bindgen_anon_1.io }.size)
        } else {
            1
        };
        // SAFETY: kvm-ioctls gave this slice of the run structure's mapping for the present exit;
        // it lies behind the structure itself, and the borrow of the vCPU keeps both from being
        // used or run meanwhile.
        let data = unsafe { std::slice::from_raw_parts_mut(self.data, self.length) };
        (data, size.max(1))
    }

    /// IN and INS.
    pub fn read(self, vcpu: &mut VcpuFd, io: &dyn VcpuIo) {
        let (data, size) = self.parts(vcpu);
        data.chunks_exact_mut(size).for_each(|value| io.pio_read(self.port, value));
    }

    /// OUT and OUTS.
    pub fn write(self, vcpu: &mut VcpuFd, io: &dyn VcpuIo) {
        let (data, size) = self.parts(vcpu);
        data.chunks_exact(size).for_each(|value| io.pio_write(self.port, value));
    }
}

/// A write to device registers; one to read-only memory is dropped.
pub fn mmio_write(io: &dyn VcpuIo, read_only: &ReadOnly, address: u64, data: &[u8]) {
    if !read_only.iter().any(|&(start, end)| (start..end).contains(&address)) {
        io.mmio_write(GuestPhysical(address), data);
    }
}

/// Has KVM not leave the guest for some instructions, before there are vCPUs (api.rst §7.13).
///
/// # Errors
/// Names the instructions for which this host's KVM must leave.
pub fn keep_in_guest(vm: &VmFd, keep: KeepInGuest) -> Result<(), EngineError> {
    let all = [
        (keep.hlt, KVM_X86_DISABLE_EXITS_HLT, "HLT"),
        (keep.pause, KVM_X86_DISABLE_EXITS_PAUSE, "PAUSE"),
        (keep.mwait, KVM_X86_DISABLE_EXITS_MWAIT, "MWAIT"),
    ];
    let wanted = all.iter().filter(|(on, ..)| *on);
    let bits = wanted.clone().fold(0, |bits, (_, bit, _)| bits | bit);
    if bits == 0 {
        return Ok(());
    }
    let offered = vm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into()) as u32;
    let missing: Vec<_> =
        wanted.filter(|(_, bit, _)| offered & bit == 0).map(|(.., name)| *name).collect();
    if !missing.is_empty() {
        return Err(EngineError::Unsupported(format!(
            "this host's KVM cannot keep {} in the guest (KVM_CAP_X86_DISABLE_EXITS); leave that \
             option out",
            missing.join(" and ")
        )));
    }
    let mut enable = kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, ..Default::default() };
    enable.args[0] = bits.into();
    vm.enable_cap(&enable).map_err(refused("KVM does not enable KVM_CAP_X86_DISABLE_EXITS"))
}

/// What KVM says of an internal error (api.rst §5, KVM_EXIT_INTERNAL_ERROR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// Its kind.
    pub suberror: u32,
    /// The words that explain it.
    pub data: [u64; 4],
}

impl InternalError {
    /// Of the present exit.
    pub fn of(vcpu: &mut VcpuFd) -> Self {
        let run = vcpu.get_kvm_run();
        if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return Self { suberror: 0, data: [0; 4] };
        }
        // SAFETY: the exit reason says that this is the union's present field.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let mut data = [0; 4];
        let words = internal.data.iter().take(internal.ndata as usize);
        data.iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        Self { suberror: internal.suberror, data }
    }
}
