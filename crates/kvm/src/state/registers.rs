//! General, segment, control and debug registers.
use crate::error::{element, refused};
use arch::registers::efer;
use arch::{DescriptorTable, Element, Segment, VcpuState};
use engine::EngineError;
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

/// Reads general registers, RIP and RFLAGS.
///
/// # Errors
/// KVM does not let them be read.
pub fn get_general(vcpu: &VcpuFd, state: &mut VcpuState) -> Result<(), EngineError> {
    let r = vcpu.get_regs().map_err(element("read", Element::General.name()))?;
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    state.rip = r.rip;
    state.rflags = r.rflags;
    Ok(())
}

/// Reads segment and control registers, descriptor tables and EFER.
///
/// # Errors
/// KVM does not let them be read.
pub fn get_system(vcpu: &VcpuFd, state: &mut VcpuState) -> Result<(), EngineError> {
    let s = vcpu.get_sregs().map_err(element("read", Element::System.name()))?;
    state.segments.regs = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(|s| from_kvm(&s));
    state.segments.ldtr = from_kvm(&s.ldt);
    state.segments.tr = from_kvm(&s.tr);
    state.gdtr = DescriptorTable { base: s.gdt.base, limit: s.gdt.limit };
    state.idtr = DescriptorTable { base: s.idt.base, limit: s.idt.limit };
    (state.cr0, state.cr2, state.cr3, state.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
    state.efer = s.efer;
    Ok(())
}

/// Reads the debug registers.
///
/// # Errors
/// KVM does not let them be read.
pub fn get_debug(vcpu: &VcpuFd, state: &mut VcpuState) -> Result<(), EngineError> {
    let d = vcpu.get_debug_regs().map_err(element("read", Element::Debug.name()))?;
    let [a0, a1, a2, a3] = d.db;
    state.debug = [a0, a1, a2, a3, d.dr6, d.dr7];
    Ok(())
}

/// Sets general registers, RIP and RFLAGS.
///
/// # Errors
/// KVM does not take them.
pub fn set_general(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let regs = kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    };
    vcpu.set_regs(&regs).map_err(element("set", Element::General.name()))
}

/// Sets segment and control registers, descriptor tables and EFER.
///
/// # Errors
/// KVM does not take them; the message shows those that modes depend on.
pub fn set_system(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    let mut s = vcpu.get_sregs().map_err(element("read", Element::System.name()))?;
    let [es, cs, ss, ds, fs, gs] = state.segments.regs.map(|s| to_kvm(&s));
    (s.es, s.cs, s.ss, s.ds, s.fs, s.gs) = (es, cs, ss, ds, fs, gs);
    s.ldt = to_kvm(&state.segments.ldtr);
    s.tr = to_kvm(&state.segments.tr);
    s.gdt = table(state.gdtr);
    s.idt = table(state.idtr);
    (s.cr0, s.cr2, s.cr3, s.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    s.efer = state.efer;
    if state.efer & efer::LMA == 0 {
        // CS.L means nothing there (Intel SDM 3A 3.4.5), and KVM takes no state with it.
        s.cs.l = 0;
    }
    s.interrupt_bitmap = [0; 4];
    vcpu.set_sregs(&s).map_err(refused(format!(
        "KVM does not take the control registers CR0 {:#x}, CR4 {:#x}, EFER {:#x}; the state may use a CPU feature that this host's KVM lacks",
        state.cr0, state.cr4, state.efer
    )))
}

/// Sets the debug registers.
///
/// # Errors
/// KVM does not take them.
pub fn set_debug(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    let [a0, a1, a2, a3, dr6, dr7] = state.debug;
    let registers = kvm_debugregs { db: [a0, a1, a2, a3], dr6, dr7, ..Default::default() };
    vcpu.set_debug_regs(&registers).map_err(element("set", Element::Debug.name()))
}

fn table(t: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

/// A segment of KVM's, whose "unusable" is our "not present".
fn from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u16| u16::from(value & 1) << at;
    let attributes = if s.unusable != 0 {
        0
    } else {
        u16::from(s.type_ & 0xf)
            | bit(s.s, 4)
            | u16::from(s.dpl & 3) << 5
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15)
    };
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes }
}

fn to_kvm(s: &Segment) -> kvm_segment {
    let bit = |at: u16| (s.attributes >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind() as u8,
        present: bit(7),
        dpl: s.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(!s.present()),
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_keep_all_their_attributes_on_the_way_to_kvm_and_back() {
        for attributes in [0x93, 0x9b, 0xa09b, 0xc0f3, 0xf0ff, 0x8b, 0x82, 0x1093] {
            let segment = Segment { selector: 0x33, base: 0x1234_5000, limit: 0xffff, attributes };
            assert_eq!(from_kvm(&to_kvm(&segment)), segment);
        }
    }

    #[test]
    fn a_null_segment_keeps_its_base() {
        let segment = Segment { selector: 0, base: 0x7fff_0000_1000, limit: 0, attributes: 0 };
        assert_eq!(to_kvm(&segment).unusable, 1);
        assert_eq!(from_kvm(&to_kvm(&segment)), segment);
    }
}
