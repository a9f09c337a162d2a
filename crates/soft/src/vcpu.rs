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
use crate::{events, run, thunks};
use arch::VcpuState;
use arch::registers::gpr::RDX;
use engine::{DebugPlan, Debugger, EngineError, Halt, Kick, Step, Vcpu, VcpuIo};
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
        let mut state = match index {
            0 => VcpuState::reset(),
            id => VcpuState::reset_application_processor(id),
        };
        state.gpr[RDX] = u64::from(shared.model.query(1, 0)[0]);
        let cpu = vcpu.cpu();
        cpu.tlb.initialise();
        for mmu in 0..cpu.jumps.len() {
            cpu.empty_jumps(mmu);
        }
        // With the PIC's way to the bootstrap processor open, as firmware leaves it.
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
        (&raw mut (*cpu).outside).write(Default::default());
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
        let doorbells = self.shared.doorbells.clone();
        run::run(self.cpu(), &doorbells.before(io))
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        // SAFETY: as in `cpu`; only an integer is read.
        let index = unsafe { self.cpu.as_ref() }.index;
        Arc::new(Kicker { shared: self.shared.clone(), index })
    }

    fn state(&mut self) -> Result<VcpuState, EngineError> {
        let cpu = self.cpu();
        // What others have sent is part of the state.
        events::poll(cpu);
        VcpuState::save(cpu)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        let cpu = self.cpu();
        // What others have sent belongs to the state that goes.
        events::poll(cpu);
        state.restore(cpu)?;
        cpu.triple_fault = false;
        cpu.publish_lapic();
        cpu.flush_code();
        cpu.flush_tlb();
        cpu.update_mode();
        Ok(())
    }

    fn stepper(&mut self) -> Option<&mut dyn Step> {
        Some(self)
    }

    fn debugger(&mut self) -> Option<&mut dyn Debugger> {
        Some(self)
    }
}

impl Debugger for SoftVcpu {
    fn set_plan(&mut self, plan: &DebugPlan) -> Result<(), EngineError> {
        Ok(self.cpu().set_debug_plan(plan)?)
    }
}

impl Step for SoftVcpu {
    fn step(&mut self, io: &dyn VcpuIo) -> Result<Option<Halt>, EngineError> {
        let doorbells = self.shared.doorbells.clone();
        run::step(self.cpu(), &doorbells.before(io))
    }
}
