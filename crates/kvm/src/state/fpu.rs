//! x87, SSE and AVX registers (Intel SDM 1 13.4; api.rst §4.42).
#![allow(unsafe_code)]
use crate::error::element;
use arch::FpuState;
use arch::registers::xcr0;
use engine::EngineError;
use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;

/// Offsets in the area.
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const X87: usize = 32;
const XMM: usize = 160;
const SOFTWARE: usize = 464;
const HEADER: usize = 512;
const AVX: usize = 576;

const KNOWN: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX;

/// What to do with registers that the neutral state lacks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Beyond {
    /// A state with such registers in use is not read.
    Refuse,
    /// They stay where they are: the state is only lent.
    Keep,
}

/// Reads the registers. All components are marked as in use, those in their initial state too.
///
/// # Errors
/// KVM does not let them be read, or the guest uses a component that the neutral state lacks.
pub fn get(vcpu: &VcpuFd, beyond: Beyond) -> Result<FpuState, EngineError> {
    let saved = vcpu.get_xsave().map_err(element("read", "the FPU and vector registers"))?;
    let mut area = [0; FpuState::SIZE];
    for (bytes, word) in area.chunks_exact_mut(4).zip(&saved.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let in_use = area.get(HEADER..HEADER + 8).map_or(0, |header| {
        header.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte))
    });
    let unknown = in_use & !KNOWN;
    if unknown != 0 && beyond == Beyond::Refuse {
        return Err(EngineError::Unsupported(format!(
            "the guest uses vector or other registers beyond AVX (XSAVE components {unknown:#x}), \
             which a saved state has no place for"
        )));
    }
    let mut clear = |from: usize, to: usize| {
        if let Some(part) = area.get_mut(from..to) {
            part.fill(0);
        }
    };
    if in_use & xcr0::X87 == 0 {
        clear(0, MXCSR);
        clear(X87, XMM);
    }
    if in_use & xcr0::SSE == 0 {
        clear(XMM, SOFTWARE);
    }
    if in_use & xcr0::AVX == 0 {
        clear(AVX, FpuState::SIZE);
    }
    // The mask of MXCSR is the host CPU's, the rest is for software: neither is the guest's.
    clear(MXCSR_MASK, X87);
    clear(SOFTWARE, AVX);
    if in_use & xcr0::X87 == 0 {
        area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    }
    if in_use & (xcr0::SSE | xcr0::AVX) == 0 {
        area[MXCSR..MXCSR_MASK].copy_from_slice(&0x1f80u32.to_le_bytes());
    }
    area[HEADER] = KNOWN as u8;
    Ok(FpuState(area))
}

/// Sets the registers; those that the neutral state lacks get their initial values.
///
/// # Errors
/// KVM does not take them.
pub fn set(vcpu: &VcpuFd, state: &FpuState) -> Result<(), EngineError> {
    write(vcpu, state, kvm_xsave::default())
}

/// Sets the registers; those that the neutral state lacks keep their values.
///
/// # Errors
/// KVM does not take them.
pub fn set_shared(vcpu: &VcpuFd, state: &FpuState) -> Result<(), EngineError> {
    let present = vcpu.get_xsave().map_err(element("read", "the FPU and vector registers"))?;
    write(vcpu, state, present)
}

fn write(vcpu: &VcpuFd, state: &FpuState, mut area: kvm_xsave) -> Result<(), EngineError> {
    let header = HEADER / 4;
    let before = area.region[header];
    for (word, bytes) in area.region.iter_mut().zip(state.0.chunks_exact(4)) {
        *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    }
    // A host without AVX takes no AVX component, and none is in use there.
    let avx = state.0.get(AVX..).is_some_and(|part| part.iter().any(|byte| *byte != 0));
    let present = xcr0::X87 | xcr0::SSE | if avx { xcr0::AVX } else { 0 };
    area.region[header..header + 16].fill(0);
    area.region[header] = present as u32 | before;
    // SAFETY: KVM reads no more than the size that KVM_CAP_XSAVE2 tells, which exceeds this
    // structure only where a process has asked for larger components with arch_prctl
    // (ARCH_REQ_XCOMP_GUEST_PERM); nothing in this program does.
    unsafe { vcpu.set_xsave(&area) }.map_err(element("set", "the FPU and vector registers"))
}
