//! Instructions that KVM's emulator does not know are executed by a companion engine: same memory,
//! state moved over, one instruction, state moved back.
//!
//! The contract has no "run one instruction", so the CPU's own means serve: the companion runs
//! with the trap flag set and without a usable interrupt descriptor table. The debug trap that
//! ends the instruction cannot be delivered, nor can its double fault, and the companion returns
//! with a triple fault and the state of the moment before: the instruction is executed, nothing of
//! the guest's memory was touched for the trap. The LAPIC stays KVM's all the while; the
//! companion's is off, so that no interrupt is taken there.
//!
//! An instruction that faults looks the same but for its RIP, which stays. The breakpoint traps
//! are delivered by KVM; any other fault of an instruction that KVM does not know ends the VM with
//! an error that shows the instruction.
use crate::Companion;
use crate::state::{self, Holder};
use arch::registers::{rflags, vector};
use arch::{
    DescriptorTable, InterruptShadow, LapicState, MpState, Msrs, SegmentName, VcpuState, msr,
};
use engine::{EngineError, GuestMemory, Halt, Vcpu, VcpuIo, Vm, VmConfig};
use std::sync::Arc;
use vm_memory::{Bytes as _, GuestAddress};

/// Bytes of code to show or look at: the longest instruction.
const CODE: u64 = 15;
const INT3: u8 = 0xcc;

/// A vCPU of the companion engine, to execute single instructions.
pub struct Completer {
    vcpu: Box<dyn Vcpu>,
    memory: Arc<GuestMemory>,
    _vm: Arc<dyn Vm>,
}

impl Completer {
    /// Makes one over the memory of a VM.
    ///
    /// # Errors
    /// There is no companion engine, or it has no resources.
    pub fn new(companion: Option<Companion>, config: &VmConfig) -> Result<Self, EngineError> {
        let Some(companion) = companion else {
            return Err(EngineError::Unsupported(
                "KVM on this host cannot execute an instruction of the guest (emulation failure); \
                 use --engine soft"
                    .into(),
            ));
        };
        let vm = companion()?.create_vm(VmConfig { vcpus: 1, ..config.clone() })?;
        Ok(Self { vcpu: vm.create_vcpu(0)?, memory: config.memory.clone(), _vm: vm })
    }

    /// Executes the instruction at which a vCPU stands.
    ///
    /// # Errors
    /// The state cannot be moved, or the instruction faults.
    pub fn complete(&mut self, mut kvm: Holder<'_>, io: &dyn VcpuIo) -> Result<(), EngineError> {
        let before = VcpuState::save(&mut kvm)?;
        self.vcpu.set_state(&for_one_instruction(&before))?;
        let halt = self.vcpu.run(io)?;
        let ran = self.vcpu.state()?;
        if halt != Halt::TripleFault {
            return Err(EngineError::Defect(format!(
                "the companion engine ended an instruction at {:#x} with {halt:?}",
                before.rip
            )));
        }
        // A repeated string instruction is trapped after each round, where it is.
        if (ran.rip, ran.gpr) == (before.rip, before.gpr) {
            return self.faulted(kvm, &before);
        }
        let after = after_it(&before, ran);
        kvm.take_executed(&before, &after)?;
        if before.rflags & rflags::TF != 0 {
            // The guest's own single step.
            state::inject(kvm.vcpu, vector::DB)?;
        }
        Ok(())
    }

    /// INT3 at the present instruction is a trap that KVM can deliver; it cannot other faults.
    fn faulted(&self, mut kvm: Holder<'_>, before: &VcpuState) -> Result<(), EngineError> {
        let code = self.code_at(&kvm, before);
        if code.first() == Some(&INT3) {
            let mut after = before.clone();
            after.rip = after.rip.wrapping_add(1);
            kvm.take_executed(before, &after)?;
            return state::inject(kvm.vcpu, vector::BP);
        }
        let text: Vec<_> = code.iter().map(|byte| format!("{byte:02x}")).collect();
        Err(EngineError::Unsupported(format!(
            "KVM on this host cannot execute the guest's instruction at {:#x} (bytes {}), which \
             faults; use --engine soft",
            before.rip,
            text.join(" ")
        )))
    }

    /// The readable bytes at the present instruction.
    fn code_at(&self, kvm: &Holder<'_>, state: &VcpuState) -> Vec<u8> {
        let start = state.segments[SegmentName::Cs].base.wrapping_add(state.rip);
        (0..CODE)
            .map_while(|i| {
                let place = kvm.vcpu.translate_gva(start.wrapping_add(i)).ok()?;
                let address = GuestAddress(place.physical_address);
                (place.valid != 0).then(|| self.memory.read_obj(address).ok()).flatten()
            })
            .collect()
    }
}

/// Registers that the companion is given; others are not touched by instructions that end here.
fn is_needed(number: u32) -> bool {
    let common = [msr::KERNEL_GS_BASE, msr::TSC_AUX, msr::PAT];
    (msr::STAR..=msr::SFMASK).contains(&number)
        || (msr::SYSENTER_CS..=msr::SYSENTER_EIP).contains(&number)
        || common.contains(&number)
}

/// `base` with the needed registers of `other`.
fn with_needed(mut base: Msrs, other: &Msrs) -> Msrs {
    for (number, value) in other.iter().filter(|(number, _)| is_needed(*number)) {
        // Every register of one table is in the other.
        let _ = base.set(number, value);
    }
    base
}

fn for_one_instruction(before: &VcpuState) -> VcpuState {
    let fresh = VcpuState::reset();
    let mut state = before.clone();
    state.rflags |= rflags::TF;
    state.idtr = DescriptorTable { base: 0, limit: 0 };
    // No data or instruction breakpoints: KVM's hits are KVM's.
    state.debug = fresh.debug;
    // Registers that the companion may lack, and that it does not touch.
    (state.avx512, state.pkru) = (fresh.avx512, fresh.pkru);
    state.msrs = with_needed(fresh.msrs, &before.msrs);
    // The bootstrap processor's LAPIC, switched off.
    state.lapic =
        LapicState { base: LapicState::DEFAULT_BASE | LapicState::BOOTSTRAP, ..fresh.lapic };
    state.mp = MpState::Running;
    state.events = arch::Event { nmi_blocked: true, ..Default::default() };
    state
}

/// What the guest's state is after the instruction.
fn after_it(before: &VcpuState, ran: VcpuState) -> VcpuState {
    let flags = rflags::TF | rflags::RF;
    let mut after = ran;
    after.rflags = after.rflags & !flags | before.rflags & rflags::TF;
    after.idtr = before.idtr;
    after.debug = before.debug;
    if before.rflags & rflags::TF != 0 {
        // BS: the debug trap is a single step (Intel SDM 3A 18.2.3).
        after.debug[4] |= 1 << 14;
    }
    (after.avx512, after.pkru) = (before.avx512.clone(), before.pkru);
    after.msrs = with_needed(before.msrs.clone(), &after.msrs);
    after.events = arch::Event { interrupt_shadow: InterruptShadow::None, ..before.events };
    after
}
