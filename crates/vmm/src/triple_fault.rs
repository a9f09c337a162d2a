//! What a triple fault leaves behind, for the developer of the guest.
use arch::registers::{cr0, cr4, efer};
use arch::{Segment, SegmentName, VcpuState};
use engine::GuestMemory;
use std::fmt;
use vm_memory::{Bytes as _, GuestAddress};

/// How many bytes of code are shown: one instruction of the greatest length and the next one's
/// first.
const CODE_BYTES: usize = 16;

/// The state of a vCPU that shut down (Intel SDM 3A 6.15, interrupt 8).
#[derive(Debug)]
pub struct TripleFault {
    vcpu: u32,
    state: VcpuState,
    code: Vec<u8>,
}

impl TripleFault {
    /// From the state of the moment before the shutdown; reads the code at RIP.
    pub fn new(vcpu: u32, state: VcpuState, memory: &GuestMemory) -> Self {
        let code = code_at_rip(&state, memory);
        Self { vcpu, state, code }
    }
}

/// The readable bytes from RIP on, as far as they are mapped.
fn code_at_rip(state: &VcpuState, memory: &GuestMemory) -> Vec<u8> {
    let start = state.segments[SegmentName::Cs].base.wrapping_add(state.rip);
    (0..CODE_BYTES as u64)
        .map_while(|i| {
            let physical = translate(state, memory, start.wrapping_add(i))?;
            memory.read_obj::<u8>(GuestAddress(physical)).ok()
        })
        .collect()
}

/// The physical address of a linear one, from the page tables alone (Intel SDM 3A 4.3 to 4.5):
/// permissions do not matter to a reader outside the guest.
fn translate(state: &VcpuState, memory: &GuestMemory, linear: u64) -> Option<u64> {
    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    if state.cr0 & cr0::PG == 0 {
        return Some(linear & 0xffff_ffff);
    }
    let long = state.efer & efer::LMA != 0;
    let linear = if long { linear } else { linear & 0xffff_ffff };
    if !long && state.cr4 & cr4::PAE == 0 {
        let entry = |table: u64, index: u64| {
            let entry: u32 = memory.read_obj(GuestAddress(table + index * 4)).ok()?;
            (u64::from(entry) & PRESENT != 0).then_some(u64::from(entry))
        };
        let directory = entry(state.cr3 & 0xffff_f000, linear >> 22)?;
        if directory & LARGE != 0 && state.cr4 & cr4::PSE != 0 {
            let high = (directory >> 13 & 0xff) << 32;
            return Some(high | directory & 0xffc0_0000 | linear & 0x3f_ffff);
        }
        let page = entry(directory & 0xffff_f000, linear >> 12 & 0x3ff)?;
        return Some(page & 0xffff_f000 | linear & 0xfff);
    }
    let levels = match (long, state.cr4 & cr4::LA57 != 0) {
        (false, _) => 3,
        (true, false) => 4,
        (true, true) => 5,
    };
    let mut table = if long { state.cr3 & FRAME } else { state.cr3 & 0xffff_ffe0 };
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let index = linear >> shift & 0x1ff;
        let entry: u64 = memory.read_obj(GuestAddress(table.checked_add(index * 8)?)).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        if level == 0 || (level < 3 && entry & LARGE != 0) {
            let offset = (1u64 << shift) - 1;
            return Some(entry & FRAME & !offset | linear & offset);
        }
        table = entry & FRAME;
    }
    None
}

impl fmt::Display for TripleFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const GPRS: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        let s = &self.state;
        write!(f, "vCPU {}: triple fault (a fault while delivering a double fault)", self.vcpu)?;
        for (i, (name, value)) in GPRS.iter().zip(s.gpr).enumerate() {
            f.write_str(if i % 4 == 0 { "\n  " } else { "  " })?;
            write!(f, "{name:<3} {value:016x}")?;
        }
        write!(f, "\n  rip {:016x}  rflags {:08x}  mode {}", s.rip, s.rflags, mode(s))?;
        let names = ["es", "cs", "ss", "ds", "fs", "gs"].iter().zip(&s.segments.regs);
        for (name, segment) in names.chain([(&"ldt", &s.segments.ldtr), (&"tr", &s.segments.tr)]) {
            write_segment(f, name, segment)?;
        }
        write!(f, "\n  gdt base {:016x} limit {:04x}", s.gdtr.base, s.gdtr.limit)?;
        write!(f, "\n  idt base {:016x} limit {:04x}", s.idtr.base, s.idtr.limit)?;
        write!(f, "\n  cr0 {:08x}  cr2 {:016x}  cr3 {:016x}", s.cr0, s.cr2, s.cr3)?;
        write!(f, "\n  cr4 {:08x}  efer {:08x}", s.cr4, s.efer)?;
        f.write_str("\n  code at rip:")?;
        if self.code.is_empty() {
            f.write_str(" (not mapped)")?;
        }
        self.code.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}

fn write_segment(f: &mut fmt::Formatter<'_>, name: &str, s: &Segment) -> fmt::Result {
    let Segment { selector, base, limit, attributes } = s;
    write!(
        f,
        "\n  {name:<3} {selector:04x}  base {base:016x}  limit {limit:08x}  attr {attributes:04x}"
    )
}

/// The name of the operating mode (Intel SDM 3A 2.2).
fn mode(state: &VcpuState) -> &'static str {
    let code = &state.segments[SegmentName::Cs];
    match (state.cr0 & cr0::PE != 0, state.efer & efer::LMA != 0) {
        (false, _) => "real",
        (true, true) if code.long() => "64-bit",
        (true, true) => "compatibility",
        (true, false) if code.db() => "32-bit protected",
        (true, false) => "16-bit protected",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bytes, memory};

    const CODE: [u8; 4] = [0x0f, 0x0b, 0xeb, 0xfe];

    fn memory_with_code_at(address: u64) -> GuestMemory {
        let memory = memory::allocate(Bytes::mib(4)).unwrap();
        memory.write_slice(&CODE, GuestAddress(address)).unwrap();
        memory
    }

    #[test]
    fn the_report_shows_registers_mode_and_code() {
        let memory = memory_with_code_at(0x7c00);
        let mut state = VcpuState::reset();
        state.segments[SegmentName::Cs] = Segment::real_mode(0x7c0);
        state.rip = 0;
        state.gpr[0] = 0x1234_5678_9abc_def0;
        let report = TripleFault::new(3, state, &memory).to_string();
        assert!(report.starts_with("vCPU 3: triple fault"), "{report}");
        for part in ["rax 123456789abcdef0", "mode real", "cs  07c0", "code at rip: 0f 0b eb fe"] {
            assert!(report.contains(part), "{part} in\n{report}");
        }
    }

    #[test]
    fn code_behind_four_level_paging_is_found() {
        let memory = memory_with_code_at(0x20_0123);
        let entry = |address, value: u64| memory.write_obj(value, GuestAddress(address)).unwrap();
        entry(0x1000 + 511 * 8, 0x2003);
        entry(0x2000 + 510 * 8, 0x3003);
        entry(0x3000 + 8, 0x20_0083); // A 2 MiB page.
        let mut state = VcpuState::reset();
        (state.cr0, state.cr3, state.cr4) = (cr0::PE | cr0::PG, 0x1000, cr4::PAE);
        state.efer = efer::LME | efer::LMA;
        state.segments[SegmentName::Cs] = Segment::flat(0x10, 0xa09b);
        state.rip = 0xffff_ffff_8020_0123;
        let fault = TripleFault::new(0, state, &memory);
        assert_eq!(fault.code[..4], CODE);
        assert!(fault.to_string().contains("mode 64-bit"));
    }

    #[test]
    fn code_behind_32_bit_paging_is_found() {
        let memory = memory_with_code_at(0x5010);
        memory.write_obj(0x2001u32, GuestAddress(0x1000 + 0x300 * 4)).unwrap();
        memory.write_obj(0x5001u32, GuestAddress(0x2000 + 4)).unwrap();
        let mut state = VcpuState::reset();
        (state.cr0, state.cr3) = (cr0::PE | cr0::PG, 0x1000);
        state.segments[SegmentName::Cs] = Segment::flat(8, 0xc09b);
        state.rip = 0xc000_1010;
        assert_eq!(TripleFault::new(0, state, &memory).code[..4], CODE);
    }

    #[test]
    fn unmapped_code_and_tables_outside_memory_are_said_to_be_unmapped() {
        let memory = memory_with_code_at(0);
        let mut state = VcpuState::reset();
        (state.cr0, state.cr3, state.cr4) = (cr0::PE | cr0::PG, u64::MAX, cr4::PAE);
        state.efer = efer::LMA;
        let report = TripleFault::new(0, state, &memory).to_string();
        assert!(report.ends_with("(not mapped)"), "{report}");
    }
}
