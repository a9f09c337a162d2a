//! Between instructions: what other threads left in the mailbox, and which event comes next.
use crate::cpu::Cpu;
use crate::exception::Exception;
use crate::interrupt::{deliver_exception, deliver_interrupt, deliver_nmi};
use crate::lapic::timer_expired;
use crate::vm::pending;
use arch::registers::{cr0, gpr::RDX, rflags};
use arch::{InDelivery, MpState, SegmentName, VcpuState};
use std::sync::atomic::Ordering;
use std::time::Instant;

const MINE: u32 =
    pending::INTERRUPT | pending::NMI | pending::INIT | pending::SIPI | pending::TIMER;

/// Takes the mailbox's interrupt words, NMI, INIT, start-up IPI and timer bits over into the CPU.
pub fn poll(cpu: &mut Cpu) {
    let vm = cpu.vm.clone();
    let Some(mailbox) = vm.mailboxes.get(cpu.index as usize) else { return };
    let bits = mailbox.take(MINE);
    if bits & pending::INTERRUPT != 0 {
        for word in 0..4 {
            let mut requests = mailbox.irr[word].swap(0, Ordering::SeqCst);
            let level = mailbox.level[word].fetch_and(!requests, Ordering::SeqCst);
            while requests != 0 {
                let bit = requests.trailing_zeros();
                requests &= requests - 1;
                let vector = (word as u32 * 64 + bit) as u8;
                cpu.lapic.accept(vector, level >> bit & 1 != 0);
            }
        }
    }
    if bits & pending::NMI != 0 {
        cpu.lapic.nmi_pending = true;
    }
    if bits & pending::TIMER != 0 {
        cpu.timer_fired();
        timer_expired(cpu, Instant::now());
    }
    if bits & pending::INIT != 0 {
        init(cpu);
    }
    if bits & pending::SIPI != 0 && cpu.lapic.mp == MpState::WaitForSipi {
        start_up(cpu, mailbox.sipi_vector.load(Ordering::SeqCst) as u8);
    }
}

impl Cpu {
    /// Whether somebody left word for this vCPU.
    pub(crate) fn wanted(&self) -> bool {
        let mailbox = self.vm.mailboxes.get(self.index as usize);
        mailbox.is_some_and(|m| m.pending.load(Ordering::SeqCst) != 0)
    }
}

/// INIT: as RESET, but for caches, x87 and SSE registers and most MSRs (Intel SDM 3A table 10-1).
fn init(cpu: &mut Cpu) {
    let fresh = VcpuState::reset();
    cpu.gpr = fresh.gpr;
    cpu.gpr[RDX] = u64::from(cpu.vm.model.query(1, 0)[0]);
    cpu.rip = fresh.rip;
    cpu.rflags = fresh.rflags;
    cpu.segments = fresh.segments.regs;
    let kept = cpu.sys.cr0 & (cr0::CD | cr0::NW);
    let sys = &mut cpu.sys;
    sys.ldtr = fresh.segments.ldtr;
    sys.tr = fresh.segments.tr;
    sys.gdtr = fresh.gdtr;
    sys.idtr = fresh.idtr;
    sys.cr0 = kept | cr0::ET;
    sys.cr2 = 0;
    sys.cr3 = 0;
    sys.cr4 = 0;
    sys.efer = 0;
    sys.debug = fresh.debug;
    sys.cpl = 0;
    sys.shadow = false;
    sys.shadow_debug = false;
    sys.nmi_blocked = false;
    cpu.lapic.reset_registers();
    cpu.lapic.nmi_pending = false;
    cpu.lapic.mp = if cpu.index == 0 { MpState::Running } else { MpState::WaitForSipi };
    cpu.publish_lapic();
    cpu.flush_tlb();
    cpu.update_mode();
    cpu.timer_changed();
}

/// Start-up IPI: real mode at `vector` × 4096 (Intel SDM 3A 10.4.4).
fn start_up(cpu: &mut Cpu, vector: u8) {
    let cs = &mut cpu.segments[SegmentName::Cs as usize];
    cs.selector = u16::from(vector) << 8;
    cs.base = u64::from(vector) << 12;
    cpu.rip = 0;
    cpu.lapic.mp = MpState::Running;
    cpu.update_mode();
}

fn nmi_deliverable(cpu: &Cpu) -> bool {
    cpu.lapic.nmi_pending && !cpu.sys.nmi_blocked
}

fn pic_wants(cpu: &Cpu) -> bool {
    cpu.index == 0 && cpu.lapic.accepts_pic() && cpu.vm.pic_output.load(Ordering::SeqCst)
}

/// Delivers what a state that was taken over had to deliver first; says whether there was something.
pub fn finish_delivery(cpu: &mut Cpu) -> bool {
    match cpu.sys.in_delivery.take() {
        None => return false,
        // DR6 has its bits already.
        Some(InDelivery::DebugTrap) => deliver_exception(cpu, Exception::debug(cpu.sys.debug[4])),
        Some(InDelivery::Interrupt(vector)) => deliver_interrupt(cpu, vector),
    }
    true
}

/// Delivers the next NMI or interrupt if the CPU can take one now; says whether it did.
pub fn take_event(cpu: &mut Cpu) -> bool {
    if cpu.sys.shadow {
        return false;
    }
    if nmi_deliverable(cpu) {
        cpu.lapic.nmi_pending = false;
        deliver_nmi(cpu);
        return true;
    }
    if cpu.rflags & rflags::IF == 0 {
        return false;
    }
    if pic_wants(cpu)
        && let Some(vector) = cpu.io().acknowledge_pic()
    {
        deliver_interrupt(cpu, vector);
        return true;
    }
    if let Some(vector) = cpu.lapic.deliverable() {
        cpu.lapic.acknowledge(vector);
        deliver_interrupt(cpu, vector);
        return true;
    }
    false
}

/// Whether an interrupt or NMI waits, be it for EFLAGS.IF, a shadow or IRET.
pub fn outstanding(cpu: &Cpu) -> bool {
    cpu.lapic.nmi_pending || pic_wants(cpu) || cpu.lapic.deliverable().is_some()
}

/// Whether something is there that ends HLT.
pub fn can_wake(cpu: &Cpu) -> bool {
    let interrupts = cpu.rflags & rflags::IF != 0;
    nmi_deliverable(cpu) || (interrupts && (pic_wants(cpu) || cpu.lapic.deliverable().is_some()))
}
