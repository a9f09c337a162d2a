//! The CPU as the holder of its engine-neutral state.
use crate::cpu::Cpu;
use crate::msr;
use arch::registers::{cr0, rflags};
use arch::{
    Avx512State, Element, Event, InterruptShadow, Msrs, SegmentName, Segments, StateHolder,
    VcpuState,
};
use engine::EngineError;

impl StateHolder for Cpu {
    type Error = EngineError;

    fn check(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        if !self.vm.options.companion {
            engine::check_state(state, self.vm.features)?;
        }
        let refuse = |what: String| {
            Err(EngineError::Unsupported(format!(
                "the state uses {what}, which the soft engine lacks"
            )))
        };
        if state.avx512 != Avx512State::default() {
            return refuse("the AVX-512 registers".into());
        }
        if state.pkru != 0 {
            return refuse(format!("PKRU (value {:#x})", state.pkru));
        }
        if let Some((number, value)) = msr::unheld(self, &state.msrs) {
            let name = Msrs::name(number).unwrap_or("no name");
            return refuse(format!("MSR {number:#x} ({name}, value {value:#x})"));
        }
        Ok(())
    }

    fn read(&mut self, element: Element, state: &mut VcpuState) -> Result<(), EngineError> {
        match element {
            Element::System => {
                let sys = &self.sys;
                state.segments = Segments { regs: self.segments, ldtr: sys.ldtr, tr: sys.tr };
                (state.gdtr, state.idtr) = (sys.gdtr, sys.idtr);
                (state.cr0, state.cr2, state.cr3, state.cr4) = (sys.cr0, sys.cr2, sys.cr3, sys.cr4);
                state.efer = sys.efer;
            }
            Element::General => {
                (state.gpr, state.rip, state.rflags) = (self.gpr, self.rip, self.rflags);
            }
            Element::Vector => {
                state.xcr0 = self.sys.xcr0;
                state.fpu = self.area.clone();
                (state.avx512, state.pkru) = (Avx512State::default(), 0);
            }
            Element::Debug => state.debug = self.sys.debug,
            Element::Clock => state.tsc = self.guest_tsc(),
            Element::Msr => state.msrs = msr::save(self),
            Element::Interrupts => {
                state.lapic = self.lapic.save();
                state.events = Event {
                    interrupt_shadow: match (self.sys.shadow, self.sys.shadow_debug) {
                        (false, _) => InterruptShadow::None,
                        (true, false) => InterruptShadow::Sti,
                        (true, true) => InterruptShadow::MovSs,
                    },
                    nmi_pending: self.lapic.nmi_pending,
                    nmi_blocked: self.sys.nmi_blocked,
                    in_delivery: self.sys.in_delivery,
                };
            }
            Element::Activity => state.mp = self.lapic.mp,
        }
        Ok(())
    }

    fn write(&mut self, element: Element, state: &VcpuState) -> Result<(), EngineError> {
        let sys = &mut self.sys;
        match element {
            Element::System => {
                self.segments = state.segments.regs;
                (sys.ldtr, sys.tr) = (state.segments.ldtr, state.segments.tr);
                (sys.gdtr, sys.idtr) = (state.gdtr, state.idtr);
                (sys.cr0, sys.cr2, sys.cr3, sys.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
                sys.efer = state.efer;
                sys.cpl = privilege(state);
            }
            Element::General => {
                self.gpr = state.gpr;
                self.rip = state.rip;
                self.rflags = state.rflags | rflags::FIXED;
            }
            Element::Vector => {
                sys.xcr0 = state.xcr0;
                self.area = state.fpu.clone();
            }
            Element::Debug => sys.debug = state.debug,
            Element::Clock => self.tsc_offset = self.vm.agree_on_tsc(state.tsc),
            Element::Msr => msr::restore(self, &state.msrs),
            Element::Interrupts => {
                let shadow = state.events.interrupt_shadow;
                sys.shadow = shadow != InterruptShadow::None;
                sys.shadow_debug = shadow == InterruptShadow::MovSs;
                sys.nmi_blocked = state.events.nmi_blocked;
                sys.in_delivery = state.events.in_delivery;
                self.restore_lapic(&state.lapic);
                self.lapic.nmi_pending = state.events.nmi_pending;
            }
            Element::Activity => self.lapic.mp = state.mp,
        }
        Ok(())
    }
}

/// The privilege level of a state: that of CS where there are levels (Intel SDM 3A 5.5).
fn privilege(state: &VcpuState) -> u8 {
    if state.cr0 & cr0::PE == 0 {
        0
    } else if state.rflags & rflags::VM != 0 {
        3
    } else {
        (state.segments[SegmentName::Cs].selector & 3) as u8
    }
}
