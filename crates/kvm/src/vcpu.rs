//! A vCPU: the run loop, and the contract's view of it.
use crate::attention::{Attention, Presence};
use crate::completion::Completer;
use crate::cpuid::Supported;
use crate::debug::{Outside, Whose};
use crate::error::{element, refused};
use crate::exits::{InternalError, PortAccess, mmio_write};
use crate::vm::VmShared;
use crate::{raw, state};
use arch::{GuestPhysical, MpState, VcpuState};
use engine::{DebugPlan, Debugger, EngineError, Halt, Kick, Vcpu, VcpuIo};
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_INTERNAL_ERROR_EMULATION, kvm_debug_exit_arch};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A vCPU on KVM.
pub struct KvmVcpu {
    fd: VcpuFd,
    index: u32,
    shared: Arc<VmShared>,
    attention: Arc<Attention>,
    msrs: state::Available,
    /// Made when the first instruction needs it.
    completer: Option<Completer>,
    outside: Outside,
}

/// What to do after an exit.
enum Next {
    /// Run on.
    Enter,
    /// Return to the machine.
    Stop(Halt),
    /// Execute one instruction elsewhere, then run on.
    Complete,
    /// Have KVM finish what it left undone, then run on.
    Finish,
}

/// An exit, without the borrow of the vCPU that kvm-ioctls gives it.
enum Exit {
    PortRead(PortAccess),
    PortWrite(PortAccess),
    Done,
    Shutdown,
    Internal,
    RingFull,
    Debug(kvm_debug_exit_arch),
    Unexpected(String),
}

impl KvmVcpu {
    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// The host gives no further vCPU, or does not take the CPU model.
    pub fn new(
        shared: Arc<VmShared>,
        attention: Arc<Attention>,
        index: u32,
    ) -> Result<Self, EngineError> {
        let fd = shared.mapped.fd.create_vcpu(index.into()).map_err(refused(format!(
            "KVM does not make vCPU {index}; raise this process's limit of open files \
             (`ulimit -n`) or locked memory, or give the guest fewer CPUs"
        )))?;
        let entries = Supported::of_vcpu(&shared.config.cpu, index, shared.config.vcpus)?;
        fd.set_cpuid2(&entries)
            .map_err(refused("KVM does not take the VM's CPU model (KVM_SET_CPUID2)"))?;
        let mut regs = fd.get_regs().map_err(element("read", "the general registers"))?;
        regs.rdx = u64::from(shared.config.cpu.query(1, 0)[0]);
        fd.set_regs(&regs).map_err(element("set", "the general registers"))?;
        if index != 0 {
            state::set_mp_state(&fd, MpState::WaitForSipi)?;
        }
        let msrs = state::Available::of(&fd)?;
        shared.dirty.add_vcpu(&fd)?;
        let outside = Outside::default();
        Ok(Self { fd, index, shared, attention, msrs, completer: None, outside })
    }

    fn holder(&self) -> state::Holder<'_> {
        let VmShared { features, xsave, .. } = &*self.shared;
        state::Holder { vcpu: &self.fd, msrs: &self.msrs, features: *features, layout: xsave }
    }

    fn cycle(&mut self, io: &dyn VcpuIo, presence: &Presence<'_>) -> Result<Halt, EngineError> {
        loop {
            if self.attention.is_kicked() {
                // Only what the last exit left undone: the state is complete after it.
                presence.only_finish();
            } else {
                self.give_nmi()?;
                self.give_pic_interrupt(io)?;
            }
            match self.enter(io, presence)? {
                Next::Enter => {
                    if let Some(stop) = self.outside.moved(&self.fd)? {
                        return Ok(Halt::Debug(stop));
                    }
                }
                Next::Finish => presence.only_finish(),
                Next::Stop(halt) => return Ok(halt),
                Next::Complete => {
                    if let Some(halt) = self.complete(io)? {
                        return Ok(halt);
                    }
                    if let Some(stop) = self.outside.executed(&self.fd)? {
                        return Ok(Halt::Debug(stop));
                    }
                }
            }
        }
    }

    /// One KVM_RUN, and what follows from its end.
    fn enter(&mut self, io: &dyn VcpuIo, presence: &Presence<'_>) -> Result<Next, EngineError> {
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                Exit::PortRead(PortAccess::new(port, data.as_ptr(), data.len()))
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                Exit::PortWrite(PortAccess::new(port, data.as_ptr(), data.len()))
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                io.mmio_read(GuestPhysical(address), data);
                Exit::Done
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                mmio_write(io, &self.shared.mapped.read_only, address, data);
                Exit::Done
            }
            Ok(VcpuExit::IoapicEoi(vector)) => {
                io.end_of_interrupt(vector);
                Exit::Done
            }
            Ok(VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::SetTpr) => Exit::Done,
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::InternalError) => Exit::Internal,
            Ok(VcpuExit::Debug(exit)) => Exit::Debug(exit),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Exit::RingFull,
            Ok(VcpuExit::FailEntry(reason, _)) => Exit::Unexpected(format!(
                "the CPU refuses to enter the guest (hardware reason {reason:#x}); the guest's \
                 state may need more than this host's KVM offers"
            )),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => Exit::Unexpected(format!(
                "KVM cannot reach guest memory {gpa:#x} ({size:#x} bytes)"
            )),
            Ok(other) => Exit::Unexpected(format!("KVM ended a run unexpectedly: {other:?}")),
            Err(errno) => return self.interrupted(errno, presence),
        };
        match exit {
            Exit::PortRead(access) => access.read(&mut self.fd, io),
            Exit::PortWrite(access) => access.write(&mut self.fd, io),
            Exit::Done => {}
            Exit::Shutdown => return Ok(Next::Stop(Halt::TripleFault)),
            Exit::Internal => return self.internal_error(),
            Exit::RingFull => self.shared.empty_dirty_rings()?,
            Exit::Debug(exit) => match self.outside.exit(&self.fd, exit)? {
                Whose::Debugger(stop) => return Ok(Next::Stop(Halt::Debug(stop))),
                Whose::Nobody | Whose::Guest => {}
            },
            Exit::Unexpected(what) => return Err(EngineError::Unsupported(what)),
        }
        Ok(if self.outside.steps() { Next::Finish } else { Next::Enter })
    }

    fn interrupted(
        &self,
        errno: kvm_ioctls::Error,
        presence: &Presence<'_>,
    ) -> Result<Next, EngineError> {
        match errno.errno() {
            // EAGAIN: the vCPU waited for its start-up IPI, and something happened.
            libc::EINTR | libc::EAGAIN => {
                presence.clear();
                let kicked = self.attention.take_kick();
                Ok(if kicked { Next::Stop(Halt::Kicked) } else { Next::Enter })
            }
            libc::EFAULT => Err(refused(
                "KVM cannot map the guest's memory (KVM_RUN); the host may be out of memory",
            )(errno)),
            _ => Err(refused(
                "KVM cannot run the guest (KVM_RUN); see the kernel's log (`dmesg`), or use \
                 --engine soft",
            )(errno)),
        }
    }

    fn internal_error(&mut self) -> Result<Next, EngineError> {
        let error = InternalError::of(&mut self.fd);
        if error.suberror == KVM_INTERNAL_ERROR_EMULATION {
            return Ok(Next::Complete);
        }
        Err(EngineError::Unsupported(format!(
            "KVM failed internally (KVM_EXIT_INTERNAL_ERROR, suberror {}, data {:x?}); use \
             --engine soft",
            error.suberror, error.data
        )))
    }

    /// Has the instruction that KVM does not know executed by the companion engine.
    fn complete(&mut self, io: &dyn VcpuIo) -> Result<Option<Halt>, EngineError> {
        let mut completer = match self.completer.take() {
            Some(completer) => completer,
            None => self.shared.completer()?,
        };
        let result = completer.complete(self.holder(), io);
        self.completer = Some(completer);
        result
    }

    fn give_nmi(&self) -> Result<(), EngineError> {
        if self.attention.take_nmi() {
            self.fd.nmi().map_err(refused("KVM does not take an NMI (KVM_NMI)"))?;
        }
        Ok(())
    }

    /// Gives the PIC's interrupt to the vCPU, or asks KVM to say when it can take one. Whether
    /// LINT0 lets it through is KVM's to know.
    fn give_pic_interrupt(&mut self, io: &dyn VcpuIo) -> Result<(), EngineError> {
        if self.index != 0 || self.outside.holds_interrupts() {
            return Ok(());
        }
        let high = || self.shared.pic_output.load(Ordering::SeqCst);
        let run = self.fd.get_kvm_run();
        let ready = std::mem::take(&mut run.ready_for_interrupt_injection) != 0;
        if ready
            && high()
            && let Some(vector) = io.acknowledge_pic()
        {
            raw::interrupt(&self.fd, vector)
                .map_err(refused("KVM does not take the PIC's interrupt (KVM_INTERRUPT)"))?;
        }
        let window = u8::from(high());
        self.fd.get_kvm_run().request_interrupt_window = window;
        Ok(())
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, io: &dyn VcpuIo) -> Result<Halt, EngineError> {
        let attention = self.attention.clone();
        let presence = Presence::begin(&attention, &mut self.fd);
        if attention.take_kick() {
            return Ok(Halt::Kicked);
        }
        self.outside.begin(&self.fd)?;
        let doorbells = self.shared.doorbells.clone();
        self.cycle(&doorbells.before(io), &presence)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.attention.clone()
    }

    fn state(&mut self) -> Result<VcpuState, EngineError> {
        let mut state = VcpuState::save(&mut self.holder())?;
        state.events.nmi_pending |= self.attention.has_nmi();
        Ok(state)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        state.restore(&mut self.holder())?;
        self.attention.take_nmi();
        Ok(())
    }

    fn debugger(&mut self) -> Option<&mut dyn Debugger> {
        Some(self)
    }
}

impl Debugger for KvmVcpu {
    fn set_plan(&mut self, plan: &DebugPlan) -> Result<(), EngineError> {
        self.outside.set(&self.shared.mapped.fd, &self.fd, plan)
    }
}
