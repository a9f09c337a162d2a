//! A vCPU as the contract sees it: making one, and its engine-neutral state.
#![allow(unsafe_code)]
use crate::cache::CodeCache;
use crate::cpu::{Bounce, Cpu, System};
use crate::lapic::Lapic;
use crate::mode::Mode;
use crate::region::CpuRegion;
use crate::space::Spaces;
use crate::tlb::{ExecTlb, Walked};
use crate::vm::{VmShared, pending};
use crate::{msr, run, thunks};
use arch::registers::gpr::RDX;
use arch::{Event, MpState, SegmentName, VcpuState};
use engine::{EngineError, Halt, Kick, Vcpu, VcpuIo};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A vCPU of the software engine.
pub struct SoftVcpu {
    cpu: NonNull<Cpu>,
    shared: Arc<VmShared>,
}

// SAFETY: the CPU belongs to this value alone; other threads touch only its poll word, which is
// atomic.
unsafe impl Send for SoftVcpu {}

impl SoftVcpu {
    /// Makes vCPU `index` of a VM.
    ///
    /// # Errors
    /// The index is out of range or taken, or the host gives no memory.
    pub fn new(shared: Arc<VmShared>, index: u32) -> Result<Self, EngineError> {
        let Some(mailbox) = shared.mailboxes.get(index as usize) else {
            return Err(EngineError::Unsupported(format!("there is no vCPU {index}")));
        };
        if mailbox.poll.load(Ordering::SeqCst) != 0 {
            return Err(EngineError::Unsupported(format!("vCPU {index} exists already")));
        }
        let region = CpuRegion::new()?;
        let cpu = region.cpu();
        let cache = CodeCache::new(shared.options.code_cache)?;
        // SAFETY: the region is fresh zeroed memory of the right size and alignment; zero is a
        // valid value for the plain arrays, and `place` writes every field that is not plain.
        unsafe { place(cpu, cache, shared.clone(), index) };
        shared.regions.lock().unwrap_or_else(|e| e.into_inner()).push(region);
        let cpu = NonNull::new(cpu)
            .ok_or_else(|| EngineError::Defect("a region at address zero".into()))?;
        let mut vcpu = Self { cpu, shared: shared.clone() };
        let mut state = VcpuState::reset();
        state.gpr[RDX] = u64::from(shared.model.query(1, 0)[0]);
        state.mp = if index == 0 { MpState::Running } else { MpState::WaitForSipi };
        let cpu = vcpu.cpu();
        cpu.tlb.initialise();
        for mmu in 0..cpu.jumps.len() {
            cpu.empty_jumps(mmu);
        }
        cpu.lapic.reset_registers();
        // The reset state leaves the LAPIC as it is.
        state.lapic = cpu.lapic.save();
        vcpu.set_state(&state)?;
        let poll = &raw const vcpu.cpu().poll as usize;
        mailbox.poll.store(poll, Ordering::SeqCst);
        Ok(vcpu)
    }

    fn cpu(&mut self) -> &mut Cpu {
        // SAFETY: `new` put a whole Cpu there, and nobody else has a reference.
        unsafe { self.cpu.as_mut() }
    }
}

/// Writes the fields of a Cpu for which zeroed memory will not do.
///
/// # Safety
/// `cpu` must point at zeroed memory that is big enough and aligned.
unsafe fn place(cpu: *mut Cpu, cache: CodeCache, vm: Arc<VmShared>, index: u32) {
    let reset = VcpuState::reset();
    // SAFETY: in-bounds writes to memory that holds nothing yet, the caller's promise.
    unsafe {
        (&raw mut (*cpu).thunks).write(thunks::table());
        (&raw mut (*cpu).bounce).write(Bounce([0; 128]));
        (&raw mut (*cpu).area).write(reset.fpu);
        (&raw mut (*cpu).sys).write(System::reset());
        (&raw mut (*cpu).mode).write(Mode::default());
        (&raw mut (*cpu).exec_tlb).write(ExecTlb::new());
        (&raw mut (*cpu).walked).write(Walked::new());
        (&raw mut (*cpu).spaces).write(Spaces::default());
        (&raw mut (*cpu).cache).write(cache);
        (&raw mut (*cpu).lapic).write(Lapic::new(index, vm.mailboxes.len() as u32));
        (&raw mut (*cpu).index).write(index);
        (&raw mut (*cpu).pending_write).write(Default::default());
        (&raw mut (*cpu).vm).write(vm);
        (&raw mut (*cpu).io).write(None);
        (&raw mut (*cpu).defect).write(None);
        (&raw mut (*cpu).timer).write(None);
    }
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        // SAFETY: the Cpu made by `new`; the memory itself stays mapped with the VM, so that late
        // posters still find the poll word.
        unsafe { self.cpu.drop_in_place() };
    }
}

struct Kicker {
    shared: Arc<VmShared>,
    index: u32,
}

impl Kick for Kicker {
    fn kick(&self) {
        if let Some(mailbox) = self.shared.mailboxes.get(self.index as usize) {
            mailbox.post(pending::KICK);
        }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, io: &dyn VcpuIo) -> Result<Halt, EngineError> {
        run::run(self.cpu(), io)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        // SAFETY: as in `cpu`; only an integer is read.
        let index = unsafe { self.cpu.as_ref() }.index;
        Arc::new(Kicker { shared: self.shared.clone(), index })
    }

    fn state(&mut self) -> Result<VcpuState, EngineError> {
        let cpu = self.cpu();
        let sys = &cpu.sys;
        let mut state = VcpuState {
            gpr: cpu.gpr,
            rip: cpu.rip,
            rflags: cpu.rflags,
            segments: cpu.segments_state(),
            gdtr: sys.gdtr,
            idtr: sys.idtr,
            cr0: sys.cr0,
            cr2: sys.cr2,
            cr3: sys.cr3,
            cr4: sys.cr4,
            debug: sys.debug,
            efer: sys.efer,
            xcr0: sys.xcr0,
            fpu: cpu.area.clone(),
            msrs: Vec::new(),
            lapic: cpu.lapic.save(),
            mp: cpu.lapic.mp,
            events: Event {
                interrupt_shadow: sys.shadow,
                nmi_pending: cpu.lapic.nmi_pending,
                nmi_blocked: sys.nmi_blocked,
            },
            tsc: cpu.guest_tsc(),
        };
        state.msrs = msr::save(cpu);
        Ok(state)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        let cpu = self.cpu();
        cpu.gpr = state.gpr;
        cpu.rip = state.rip;
        cpu.rflags = state.rflags | arch::registers::rflags::FIXED;
        cpu.segments = state.segments.regs;
        cpu.tsc_offset = cpu.vm.agree_on_tsc(state.tsc);
        cpu.area = state.fpu.clone();
        let sys = &mut cpu.sys;
        sys.ldtr = state.segments.ldtr;
        sys.tr = state.segments.tr;
        sys.gdtr = state.gdtr;
        sys.idtr = state.idtr;
        sys.cr0 = state.cr0;
        sys.cr2 = state.cr2;
        sys.cr3 = state.cr3;
        sys.cr4 = state.cr4;
        sys.debug = state.debug;
        sys.efer = state.efer;
        sys.xcr0 = state.xcr0;
        sys.shadow = state.events.interrupt_shadow;
        sys.shadow_debug = false;
        sys.nmi_blocked = state.events.nmi_blocked;
        sys.cpl = privilege(state);
        cpu.triple_fault = false;
        msr::restore(cpu, &state.msrs).map_err(|index| {
            EngineError::Unsupported(format!("the soft engine has no MSR {index:#x}"))
        })?;
        cpu.restore_lapic(&state.lapic);
        cpu.lapic.mp = state.mp;
        cpu.lapic.nmi_pending = state.events.nmi_pending;
        cpu.publish_lapic();
        cpu.flush_code();
        cpu.flush_tlb();
        cpu.update_mode();
        Ok(())
    }
}

/// The privilege level of a state: that of SS where there are levels (Intel SDM 3A 5.5).
fn privilege(state: &VcpuState) -> u8 {
    use arch::registers::{cr0, rflags};
    if state.cr0 & cr0::PE == 0 {
        0
    } else if state.rflags & rflags::VM != 0 {
        3
    } else {
        (state.segments[SegmentName::Cs].selector & 3) as u8
    }
}
