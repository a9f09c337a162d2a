//! CPU states at the kernel's first instruction, as each boot protocol asks for them.
use crate::error::BootError;
use crate::memory::GuestRam;
use arch::registers::{cr0, cr4, efer, gpr};
use arch::{DescriptorTable, Segment, SegmentName, VcpuState, msr};

/// Selector of the code segment (`__BOOT_CS` of the Linux boot protocol, GRUB's too).
const CODE: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS`).
const DATA: u16 = 0x18;
/// Bytes of the descriptor table: null, unused, code, data.
pub(crate) const GDT_SIZE: u64 = 32;
/// Bytes of the page tables: PML4, PDPT and four page directories, 4 GiB in pages of 2 MiB.
pub(crate) const PAGE_TABLES_SIZE: u64 = 6 * 4096;

const CODE32: u16 = 0xc09b;
const CODE64: u16 = 0xa09b;
const DATA32: u16 = 0xc093;

/// The state of the boot vCPU before a protocol's own registers: the reset state and what every
/// firmware has done by then: memory types, and virtual wire mode of the local APIC
/// (MultiProcessor Specification 1.4 §3.6.2.2), which lets the 8259's interrupts through LINT0.
fn firmware_state() -> VcpuState {
    const SPURIOUS: usize = 0xf0 / 16;
    const LINT0: usize = 0x350 / 16;
    const LINT1: usize = 0x360 / 16;
    let mut state = with_memory_types(VcpuState::reset());
    let lapic = &mut state.lapic.registers;
    (lapic[SPURIOUS], lapic[LINT0], lapic[LINT1]) = (0x1ff, 0x700, 0x400);
    state
}

/// The state of an application processor that waits for its start-up IPI, with the memory types
/// that firmware sets on all processors (Intel SDM 3A 11.11.8 wants them equal).
pub fn application_processor(apic_id: u32) -> VcpuState {
    with_memory_types(VcpuState::reset_application_processor(apic_id))
}

/// MTRRs on, everything write-back: the engines give devices their own meaning
/// (Intel SDM 3A 11.11.2.1).
fn with_memory_types(mut state: VcpuState) -> VcpuState {
    let is_state = state.msrs.set(msr::MTRR_DEF_TYPE, 1 << 11 | 6);
    debug_assert!(is_state);
    state
}

/// Writes the descriptor table and gives its register.
fn write_gdt(ram: &GuestRam<'_>, gdt: u64, code: u16) -> Result<DescriptorTable, BootError> {
    // Base 0, limit FFFFFH; the attribute bits sit at 40 to 55, the limit's upper bits between.
    let descriptor = |attributes: u16| 0x000f_0000_0000_ffff | u64::from(attributes) << 40;
    let mut table = Vec::with_capacity(GDT_SIZE as usize);
    for entry in [0, 0, descriptor(code), descriptor(DATA32)] {
        table.extend_from_slice(&entry.to_le_bytes());
    }
    ram.write(gdt, &table)?;
    Ok(DescriptorTable { base: gdt, limit: GDT_SIZE as u16 - 1 })
}

/// 32-bit protected mode, paging off, flat segments: the start of multiboot (1: §3.2, 2: §3.3),
/// of PVH and of the Linux 32-bit boot protocol.
pub(crate) fn protected_mode(
    ram: &GuestRam<'_>,
    gdt: u64,
    entry: u32,
) -> Result<VcpuState, BootError> {
    let mut state = firmware_state();
    state.gdtr = write_gdt(ram, gdt, CODE32)?;
    state.idtr = DescriptorTable { base: 0, limit: 0 };
    for name in SegmentName::ALL {
        state.segments[name] = Segment::flat(DATA, DATA32);
    }
    state.segments[SegmentName::Cs] = Segment::flat(CODE, CODE32);
    // PVH: "TR: must be a 32-bit TSS (active) with a base of 0 and a limit of 67H".
    state.segments.tr = Segment { selector: 0, base: 0, limit: 0x67, attributes: 0x8b };
    state.cr0 = cr0::PE | cr0::ET;
    state.rip = entry.into();
    Ok(state)
}

/// Long mode with the first 4 GiB mapped to themselves: the Linux 64-bit boot protocol
/// (boot.rst, "64-bit Boot Protocol").
pub(crate) fn long_mode(
    ram: &GuestRam<'_>,
    gdt: u64,
    page_tables: u64,
    entry: u64,
) -> Result<VcpuState, BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let directories = page_tables + 2 * 4096;
    let mut tables = vec![0u64; PAGE_TABLES_SIZE as usize / 8];
    for (index, slot) in tables.iter_mut().enumerate() {
        let number = index as u64;
        *slot = match index {
            0 => (page_tables + 4096) | PRESENT_WRITABLE,
            512..516 => (directories + (number - 512) * 4096) | PRESENT_WRITABLE,
            1024.. => (number - 1024) << 21 | PRESENT_WRITABLE | LARGE,
            _ => 0,
        };
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    ram.write(page_tables, &bytes)?;

    let mut state = protected_mode(ram, gdt, 0)?;
    state.gdtr = write_gdt(ram, gdt, CODE64)?;
    state.segments[SegmentName::Cs] = Segment::flat(CODE, CODE64);
    state.cr0 |= cr0::PG;
    state.cr3 = page_tables;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    state.rip = entry;
    Ok(state)
}

/// Sets general registers by their encoding number.
pub(crate) fn with_registers(mut state: VcpuState, registers: &[(usize, u64)]) -> VcpuState {
    for (number, value) in registers {
        if let Some(register) = state.gpr.get_mut(*number) {
            *register = *value;
        }
    }
    // Protocols leave the stack to the kernel; a defined value keeps runs alike.
    if let Some(rsp) = state.gpr.get_mut(gpr::RSP) {
        *rsp = 0;
    }
    state
}
