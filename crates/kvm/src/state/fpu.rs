//! x87, vector and mask registers (Intel SDM 1 13.4; api.rst §4.42 and §4.43).
#![allow(unsafe_code)]
use crate::error::element;
use arch::registers::xcr0;
use arch::{Avx512State, Element, FpuState, VcpuState};
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

/// Bytes of the area that KVM_GET_XSAVE and KVM_SET_XSAVE move.
const AREA: usize = 4096;
/// The components whose places are the same on all processors.
const FIXED: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX;

/// Where the components beyond AVX lie in this host's standard-format area, whose order differs
/// between processors (CPUID leaf 0DH): bytes from its start, `None` for one that KVM lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    opmask: Option<usize>,
    upper_zmm: Option<usize>,
    high_zmm: Option<usize>,
    pkru: Option<usize>,
}

impl Layout {
    /// From the offsets that CPUID gives for each component.
    pub fn new(offset: impl Fn(u32) -> Option<u32>) -> Self {
        let place = |component: u64| {
            let at = offset(component.trailing_zeros())? as usize;
            (AVX..AREA).contains(&at).then_some(at)
        };
        Self {
            opmask: place(xcr0::OPMASK),
            upper_zmm: place(xcr0::UPPER_ZMM),
            high_zmm: place(xcr0::HIGH_ZMM),
            pkru: place(xcr0::PKRU),
        }
    }

    /// Whether KVM has all registers that a state uses.
    ///
    /// # Errors
    /// Names those that it lacks.
    pub fn check(&self, state: &VcpuState) -> Result<(), EngineError> {
        let avx512 = self.opmask.and(self.upper_zmm).and(self.high_zmm).is_some();
        let lacking = [
            ("the AVX-512 registers", !avx512 && state.avx512 != Avx512State::default()),
            ("PKRU", self.pkru.is_none() && state.pkru != 0),
        ];
        match lacking.iter().find(|(_, lacks)| *lacks) {
            None => Ok(()),
            Some((what, _)) => Err(EngineError::Unsupported(format!(
                "the state uses {what}, which this host's KVM lacks"
            ))),
        }
    }
}

/// A component, where it lies, and its registers as words.
type Component<'a> = (u64, Option<usize>, Vec<&'a mut u64>);

fn avx512<'a>(state: &'a mut Avx512State, layout: &Layout) -> [Component<'a>; 3] {
    let Avx512State { opmask, upper_zmm, high_zmm } = state;
    [
        (xcr0::OPMASK, layout.opmask, opmask.iter_mut().collect()),
        (xcr0::UPPER_ZMM, layout.upper_zmm, upper_zmm.as_flattened_mut().iter_mut().collect()),
        (xcr0::HIGH_ZMM, layout.high_zmm, high_zmm.as_flattened_mut().iter_mut().collect()),
    ]
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// Reads the registers. The components that all processors have are marked as in use, those in
/// their initial state too.
///
/// # Errors
/// KVM does not let them be read, or the guest uses a component that the neutral state lacks.
pub fn get(vcpu: &VcpuFd, layout: &Layout, state: &mut VcpuState) -> Result<(), EngineError> {
    let saved = vcpu.get_xsave().map_err(element("read", Element::Vector.name()))?;
    let mut area = [0; AREA];
    for (bytes, word) in area.chunks_exact_mut(4).zip(&saved.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let in_use = little_endian(&area[HEADER..HEADER + 8]);
    let mut known = FIXED;
    let present = |component: u64| in_use & component != 0;
    state.avx512 = Avx512State::default();
    for (component, at, registers) in avx512(&mut state.avx512, layout) {
        let Some(at) = at else { continue };
        known |= component;
        if present(component) {
            let words = area.get(at..).unwrap_or_default().chunks_exact(8);
            registers.into_iter().zip(words).for_each(|(r, word)| *r = little_endian(word));
        }
    }
    state.pkru = 0;
    if let Some(at) = layout.pkru {
        known |= xcr0::PKRU;
        if present(xcr0::PKRU) {
            state.pkru = little_endian(area.get(at..at + 4).unwrap_or_default()) as u32;
        }
    }
    if in_use & !known != 0 {
        return Err(EngineError::Unsupported(format!(
            "the guest uses registers (XSAVE components {:#x}) that a saved state has no place for",
            in_use & !known
        )));
    }
    state.fpu = legacy_and_avx(&area, in_use);
    Ok(())
}

/// The components that all processors have, each with its initial values where it is not in use.
fn legacy_and_avx(area: &[u8; AREA], in_use: u64) -> FpuState {
    let mut fpu = FpuState::default();
    let mut copy = |from: usize, to: usize| fpu.0[from..to].copy_from_slice(&area[from..to]);
    if in_use & xcr0::X87 != 0 {
        copy(0, MXCSR);
        copy(X87, XMM);
    }
    if in_use & xcr0::SSE != 0 {
        copy(XMM, SOFTWARE);
    }
    if in_use & xcr0::AVX != 0 {
        copy(AVX, FpuState::SIZE);
    }
    // The mask of MXCSR is the host CPU's, and what lies behind the registers is for software.
    if in_use & (xcr0::SSE | xcr0::AVX) != 0 {
        copy(MXCSR, MXCSR_MASK);
    }
    fpu
}

/// Sets the registers.
///
/// # Errors
/// KVM does not take them.
pub fn set(vcpu: &VcpuFd, layout: &Layout, state: &VcpuState) -> Result<(), EngineError> {
    let mut area = [0; AREA];
    area[..FpuState::SIZE].copy_from_slice(&state.fpu.0);
    // A host without a component takes none, and it is not in use there.
    let avx = state.fpu.0[AVX..].iter().any(|byte| *byte != 0);
    let mut present = xcr0::X87 | xcr0::SSE | if avx { xcr0::AVX } else { 0 };
    for (component, at, registers) in avx512(&mut state.avx512.clone(), layout) {
        let Some(at) = at else { continue };
        if registers.iter().all(|register| **register == 0) {
            continue;
        }
        present |= component;
        let words = area.get_mut(at..).unwrap_or_default().chunks_exact_mut(8);
        words.zip(registers).for_each(|(word, r)| word.copy_from_slice(&r.to_le_bytes()));
    }
    if let Some(at) = layout.pkru
        && state.pkru != 0
        && let Some(word) = area.get_mut(at..at + 4)
    {
        present |= xcr0::PKRU;
        word.copy_from_slice(&state.pkru.to_le_bytes());
    }
    area[HEADER..AVX].fill(0);
    area[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(area.chunks_exact(4)) {
        *word = little_endian(bytes) as u32;
    }
    // SAFETY: KVM reads no more than the size that KVM_CAP_XSAVE2 tells, which exceeds this
    // structure only where a process has asked for larger components with arch_prctl
    // (ARCH_REQ_XCOMP_GUEST_PERM); nothing in this program does.
    unsafe { vcpu.set_xsave(&xsave) }.map_err(element("set", Element::Vector.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The places on AMD's Zen 4, which has no bounds registers before them.
    fn zen4(component: u32) -> Option<u32> {
        match component {
            5 => Some(832),
            6 => Some(896),
            7 => Some(1408),
            9 => Some(2432),
            _ => None,
        }
    }

    #[test]
    fn components_are_where_cpuid_says_and_nowhere_else() {
        let layout = Layout::new(zen4);
        assert_eq!((layout.opmask, layout.pkru), (Some(832), Some(2432)));
        assert_eq!(Layout::new(|_| Some(9000)), Layout::default());
        assert_eq!(Layout::new(|_| None), Layout::default());
    }

    #[test]
    fn registers_that_kvm_lacks_are_refused_by_name() {
        let mut state = VcpuState::reset();
        assert!(Layout::default().check(&state).is_ok());
        state.pkru = 4;
        let error = Layout::default().check(&state).unwrap_err().to_string();
        assert!(error.contains("PKRU"), "{error}");
        assert!(Layout::new(zen4).check(&state).is_ok());
        state.avx512.opmask[1] = 1;
        let error = Layout::default().check(&state).unwrap_err().to_string();
        assert!(error.contains("AVX-512"), "{error}");
    }
}
