//! The engine-neutral state of a vCPU, from KVM's structures and to them.
//!
//! The order of the table in `arch` is one that KVM can take: control registers decide which other
//! registers are valid, the LAPIC's timer counts from a clock that has been set, and what the vCPU
//! is doing comes last. For what the vCPU is doing KVM takes a pending INIT or start-up IPI into
//! account, so that it is read first.
mod events;
mod fpu;
mod lapic;
mod msrs;
mod registers;

pub use fpu::Layout;
pub use msrs::Available;

use crate::cpuid;
use crate::error::element;
use arch::{Element, FeatureSet, MpState, StateHolder, VcpuState, msr};
use engine::EngineError;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

/// A vCPU as the holder of its state.
#[derive(Clone, Copy)]
pub struct Holder<'a> {
    /// The vCPU.
    pub vcpu: &'a VcpuFd,
    /// The MSRs that its KVM has.
    pub msrs: &'a Available,
    /// What its CPU model announces.
    pub features: FeatureSet,
    /// Where its vector registers lie.
    pub layout: &'a Layout,
}

impl StateHolder for Holder<'_> {
    type Error = EngineError;

    fn check(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        cpuid::check_state(state, self.features)?;
        self.layout.check(state)?;
        self.msrs.check(state)
    }

    fn read(&mut self, element: Element, state: &mut VcpuState) -> Result<(), EngineError> {
        let vcpu = self.vcpu;
        match element {
            Element::System => registers::get_system(vcpu, state)?,
            Element::General => registers::get_general(vcpu, state)?,
            Element::Vector => {
                state.xcr0 = xcr0(vcpu)?;
                fpu::get(vcpu, self.layout, state)?;
            }
            Element::Debug => registers::get_debug(vcpu, state)?,
            Element::Clock => state.tsc = msrs::read(vcpu, msr::TSC)?.unwrap_or(0),
            Element::Msr => state.msrs = self.msrs.get(vcpu)?,
            Element::Interrupts => {
                state.lapic = lapic::get(vcpu)?;
                events::get(vcpu, state)?;
            }
            Element::Activity => state.mp = mp_state(vcpu)?,
        }
        Ok(())
    }

    fn write(&mut self, element: Element, state: &VcpuState) -> Result<(), EngineError> {
        let vcpu = self.vcpu;
        match element {
            Element::System => registers::set_system(vcpu, state),
            Element::General => registers::set_general(vcpu, state),
            Element::Vector => {
                set_xcr0(vcpu, state.xcr0)?;
                fpu::set(vcpu, self.layout, state)
            }
            Element::Debug => registers::set_debug(vcpu, state),
            Element::Clock => msrs::write(vcpu, msr::TSC, state.tsc),
            Element::Msr => self.msrs.set(vcpu, &state.msrs),
            Element::Interrupts => {
                lapic::set(vcpu, &state.lapic)?;
                events::set(vcpu, state)
            }
            Element::Activity => set_mp_state(vcpu, state.mp),
        }
    }
}

impl Holder<'_> {
    /// What an instruction of a running vCPU that is executed elsewhere needs: not the LAPIC and
    /// the clock. Each call of the host's kernel costs more than most instructions.
    ///
    /// # Errors
    /// As [`StateHolder::read`].
    pub fn lend(&mut self) -> Result<VcpuState, EngineError> {
        let mut state = VcpuState::reset();
        let needed =
            [Element::System, Element::General, Element::Vector, Element::Debug, Element::Msr];
        needed.into_iter().try_for_each(|element| self.read(element, &mut state))?;
        events::get_blocked(self.vcpu, &mut state)?;
        Ok(state)
    }

    /// Takes over what an instruction changed that was executed elsewhere: not the LAPIC, the
    /// clock, and what other CPUs and devices do to this one meanwhile.
    ///
    /// # Errors
    /// As [`StateHolder::write`].
    pub fn take_executed(
        &mut self,
        before: &VcpuState,
        after: &VcpuState,
    ) -> Result<(), EngineError> {
        let ours = |e: &Element| !matches!(e, Element::Clock | Element::Interrupts);
        let changed = |e: &Element| !before.same(*e, after);
        let elements = Element::ALL.into_iter().filter(ours).filter(changed);
        elements.into_iter().try_for_each(|element| self.write(element, after))?;
        events::set_executed(self.vcpu, after)
    }
}

fn xcr0(vcpu: &VcpuFd) -> Result<u64, EngineError> {
    let xcrs = vcpu.get_xcrs().map_err(element("read", "XCR0"))?;
    let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0);
    Ok(xcr0.map_or(1, |xcr| xcr.value))
}

fn set_xcr0(vcpu: &VcpuFd, value: u64) -> Result<(), EngineError> {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = value;
    vcpu.set_xcrs(&xcrs).map_err(element("set", "XCR0"))
}

fn mp_state(vcpu: &VcpuFd) -> Result<MpState, EngineError> {
    let state = vcpu.get_mp_state().map_err(element("read", "what the CPU is doing"))?.mp_state;
    match state {
        KVM_MP_STATE_RUNNABLE => Ok(MpState::Running),
        KVM_MP_STATE_HALTED => Ok(MpState::Halted),
        KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_UNINITIALIZED => Ok(MpState::WaitForSipi),
        other => Err(EngineError::Unsupported(format!(
            "the vCPU is in KVM's MP state {other}, which cannot be saved"
        ))),
    }
}

/// Says what a vCPU is doing.
///
/// # Errors
/// KVM does not take it.
pub fn set_mp_state(vcpu: &VcpuFd, state: MpState) -> Result<(), EngineError> {
    let mp_state = match state {
        MpState::Running => KVM_MP_STATE_RUNNABLE,
        MpState::Halted => KVM_MP_STATE_HALTED,
        // Only in this state does KVM heed a start-up IPI.
        MpState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(element("set", "what the CPU is doing"))
}
