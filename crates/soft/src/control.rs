//! Control and debug registers, TLB invalidation, time stamps, XCR0 (Intel SDM 3A 2.5, 3B 17.2).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::Done;
use crate::mmu::PHYSICAL_BITS;
use crate::operand::operand_segment;
use arch::registers::gpr::{RAX, RCX, RDX};
use arch::registers::{cr0, cr4, efer, xcr0};
use arch::{Feature, SegmentName};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

const CR0_BITS: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

fn fault_if(bad: bool) -> Result<(), Exception> {
    if bad { Err(Exception::GP0) } else { Ok(()) }
}

/// Ends an instruction that changed the mode; all of them serialize (Intel SDM 3A 9.3).
fn leave(cpu: &mut Cpu) -> Done {
    cpu.serialize();
    cpu.update_mode();
    Ok(Flow::Leave)
}

/// Ends an instruction that made the CPU forget translations, of one page or of many that are not
/// global: code in another global page goes on.
fn end_flush(cpu: &mut Cpu, page: Option<u64>) -> Done {
    cpu.serialize();
    let safe = cpu.fetched_from_global(cpu.rip) && page.is_none_or(|p| p >> 12 != cpu.rip >> 12);
    Ok(if safe && cpu.mode.is_64() { Flow::Next } else { Flow::Leave })
}

/// MOV to and from a control register.
pub(crate) fn mov_cr(cpu: &mut Cpu, insn: &Instruction, write: bool) -> Done {
    let (control, general) = if write {
        (insn.op0_register(), insn.op1_register())
    } else {
        (insn.op1_register(), insn.op0_register())
    };
    if !matches!(
        control,
        Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8
    ) {
        return Err(Exception::INVALID_OPCODE);
    }
    cpu.need_cpl0()?;
    if !write {
        let value = match control {
            Register::CR0 => cpu.sys.cr0,
            Register::CR2 => cpu.sys.cr2,
            Register::CR3 => cpu.sys.cr3,
            Register::CR4 => cpu.sys.cr4,
            _ => cpu.lapic.cr8(),
        };
        cpu.set_register(general, value);
        return Ok(Flow::Next);
    }
    let value = cpu.register(general);
    match control {
        Register::CR0 => set_cr0(cpu, value)?,
        Register::CR2 => cpu.sys.cr2 = value,
        Register::CR3 => {
            set_cr3(cpu, value)?;
            return end_flush(cpu, None);
        }
        Register::CR4 => set_cr4(cpu, value)?,
        _ => {
            fault_if(value > 15)?;
            cpu.lapic.set_cr8(value);
            cpu.outstanding = true;
        }
    }
    leave(cpu)
}

/// Writes CR0 with all its checks (Intel SDM 3A 2.5, 4.1.2, 9.8.5).
fn set_cr0(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    fault_if(value >> 32 != 0)?;
    let value = (value & CR0_BITS) | cr0::ET;
    let on = |bit: u64| value & bit != 0;
    fault_if((on(cr0::PG) && !on(cr0::PE)) || (on(cr0::NW) && !on(cr0::CD)))?;
    let old = cpu.sys.cr0;
    let cs_long = cpu.segment(SegmentName::Cs).long();
    if on(cr0::PG) && old & cr0::PG == 0 {
        if cpu.sys.efer & efer::LME != 0 {
            fault_if(cpu.sys.cr4 & cr4::PAE == 0 || cs_long)?;
            cpu.sys.efer |= efer::LMA;
        } else if cpu.sys.cr4 & cr4::PAE != 0 {
            check_pdptes(cpu, cpu.sys.cr3)?;
        }
    }
    if !on(cr0::PG) && old & cr0::PG != 0 {
        let in_64 = cpu.long_mode() && cs_long;
        fault_if(in_64 || cpu.sys.cr4 & cr4::PCIDE != 0)?;
        cpu.sys.efer &= !efer::LMA;
    }
    cpu.sys.cr0 = value;
    if (old ^ value) & (cr0::PG | cr0::WP | cr0::PE | cr0::AM) != 0 {
        cpu.flush_tlb();
    }
    Ok(())
}

/// #GP where a present page-directory pointer of PAE paging has reserved bits set
/// (Intel SDM 3A 4.4.1).
fn check_pdptes(cpu: &Cpu, cr3: u64) -> Result<(), Exception> {
    let reserved = 0x1e6 | !((1 << PHYSICAL_BITS) - 1);
    for n in 0..4 {
        if let Some(slot) = cpu.vm.ram.entry64((cr3 & 0xffff_ffe0) + 8 * n) {
            let entry = slot.load(std::sync::atomic::Ordering::Relaxed);
            fault_if(entry & 1 != 0 && entry & reserved != 0)?;
        }
    }
    Ok(())
}

fn set_cr3(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let mut value = value;
    let (mut pcid, mut keep) = (0, false);
    if cpu.long_mode() {
        if cpu.sys.cr4 & cr4::PCIDE != 0 {
            // Bit 63: translations of the space stay valid (Intel SDM 3A 4.10.4.1).
            keep = value >> 63 != 0;
            value &= !(1 << 63);
            pcid = (value & 0xfff) as u16;
        }
        fault_if(value >> PHYSICAL_BITS != 0)?;
    } else {
        value &= 0xffff_ffff;
        if cpu.paging() && cpu.sys.cr4 & cr4::PAE != 0 {
            check_pdptes(cpu, value)?;
        }
    }
    cpu.sys.cr3 = value;
    cpu.switch_space(pcid, keep);
    Ok(())
}

/// CR4 bits that this CPU has, given its CPUID.
fn cr4_bits(cpu: &Cpu) -> u64 {
    let features = cpu.vm.model.features();
    let mut bits = cr4::TSD
        | cr4::DE
        | cr4::PSE
        | cr4::PAE
        | cr4::MCE
        | cr4::PGE
        | cr4::PCE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT;
    let mut offer = |feature, bit| bits |= if features.has(feature) { bit } else { 0 };
    offer(Feature::Umip, cr4::UMIP);
    offer(Feature::La57, cr4::LA57);
    offer(Feature::Fsgsbase, cr4::FSGSBASE);
    offer(Feature::Smep, cr4::SMEP);
    offer(Feature::Smap, cr4::SMAP);
    offer(Feature::Pcid, cr4::PCIDE);
    offer(Feature::Xsave, cr4::OSXSAVE);
    bits
}

fn set_cr4(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    fault_if(value & !cr4_bits(cpu) != 0)?;
    let changed = value ^ cpu.sys.cr4;
    let long = cpu.long_mode();
    fault_if(long && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0))?;
    if value & changed & cr4::PCIDE != 0 {
        fault_if(!long || cpu.sys.cr3 & 0xfff != 0)?;
    }
    let paging_bits = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP;
    if cpu.paging() && !long && value & cr4::PAE != 0 && changed & paging_bits != 0 {
        check_pdptes(cpu, cpu.sys.cr3)?;
    }
    cpu.sys.cr4 = value;
    if changed & (paging_bits | cr4::SMAP | cr4::PCIDE | cr4::LA57) != 0 {
        cpu.flush_tlb();
    }
    Ok(())
}

/// LMSW: PE (set only), MP, EM, TS.
pub(crate) fn lmsw(cpu: &mut Cpu, insn: &Instruction) -> Done {
    cpu.need_cpl0()?;
    let word = cpu.operand(insn, 0, 2)?;
    let keep = cpu.sys.cr0 & !(cr0::MP | cr0::EM | cr0::TS);
    set_cr0(cpu, keep | (word & 0xf))?;
    leave(cpu)
}

/// CLTS.
pub(crate) fn clts(cpu: &mut Cpu) -> Done {
    cpu.need_cpl0()?;
    cpu.sys.cr0 &= !cr0::TS;
    leave(cpu)
}

/// MOV to and from a debug register.
pub(crate) fn mov_dr(cpu: &mut Cpu, insn: &Instruction, write: bool) -> Done {
    let (debug, general) = if write {
        (insn.op0_register(), insn.op1_register())
    } else {
        (insn.op1_register(), insn.op0_register())
    };
    let number = match debug.number() {
        4 | 5 if cpu.sys.cr4 & cr4::DE != 0 => return Err(Exception::INVALID_OPCODE),
        n @ 0..4 => n,
        4 | 6 => 4,
        5 | 7 => 5,
        _ => return Err(Exception::INVALID_OPCODE),
    };
    cpu.need_cpl0()?;
    if cpu.sys.debug[5] & 1 << 13 != 0 {
        return Err(Exception::debug(1 << 13));
    }
    if !write {
        let value = cpu.sys.debug[number];
        cpu.set_register(general, value);
        return Ok(Flow::Next);
    }
    let value = cpu.register(general);
    cpu.sys.debug[number] = match number {
        4 | 5 if value >> 32 != 0 => return Err(Exception::GP0),
        4 => (value & 0xe00f) | 0xffff_0ff0,
        5 => (value & 0xffff_2bff) | 0x400,
        _ => value,
    };
    // Pages with watched bytes must leave the TLB.
    cpu.flush_tlb();
    leave(cpu)
}

/// INVLPG.
pub(crate) fn invlpg(cpu: &mut Cpu, insn: &Instruction) -> Done {
    if insn.op_kind(0) == OpKind::Register {
        return Err(Exception::INVALID_OPCODE);
    }
    cpu.need_cpl0()?;
    let name = operand_segment(insn, cpu.mode.is_64());
    let based = !cpu.mode.is_64() || matches!(name, SegmentName::Fs | SegmentName::Gs);
    let base = if based { cpu.segment(name).base } else { 0 };
    let address = base.wrapping_add(cpu.offset_of(insn)) & cpu.address_mask();
    if !cpu.long_mode() || cpu.canonical(address) {
        cpu.flush_tlb_page(address);
    }
    end_flush(cpu, Some(address))
}

/// INVPCID (Intel SDM 2A). Forms 0 to 3 forget a page of a space, a space, everything, and
/// everything but global pages.
pub(crate) fn invpcid(cpu: &mut Cpu, insn: &Instruction) -> Done {
    cpu.need_cpl0()?;
    let form = cpu.register(insn.op0_register());
    let pcid = cpu.operand_field(insn, 0, 8)?;
    let address = cpu.operand_field(insn, 8, 8)?;
    fault_if(form > 3)?;
    if form < 2 {
        let disabled = cpu.sys.cr4 & cr4::PCIDE == 0 && pcid & 0xfff != 0;
        fault_if(pcid >> 12 != 0 || disabled)?;
    }
    match form {
        0 => {
            fault_if(!cpu.canonical(address))?;
            cpu.flush_page_of(pcid as u16, address);
            return end_flush(cpu, Some(address));
        }
        1 => cpu.flush_space(pcid as u16),
        2 => cpu.flush_tlb(),
        _ => {
            cpu.flush_kept();
            cpu.flush_local();
        }
    }
    end_flush(cpu, None)
}

/// RDTSC, RDTSCP, RDPID.
pub(crate) fn time_stamp(cpu: &mut Cpu, insn: &Instruction) -> Done {
    if insn.mnemonic() == Mnemonic::Rdpid {
        let value = cpu.sys.tsc_aux;
        cpu.set_register(insn.op0_register(), value);
        return Ok(Flow::Next);
    }
    fault_if(cpu.sys.cr4 & cr4::TSD != 0 && cpu.sys.cpl != 0)?;
    let tsc = cpu.guest_tsc();
    cpu.gpr[RAX] = tsc & 0xffff_ffff;
    cpu.gpr[RDX] = tsc >> 32;
    if insn.mnemonic() == Mnemonic::Rdtscp {
        cpu.gpr[RCX] = cpu.sys.tsc_aux & 0xffff_ffff;
    }
    Ok(Flow::Next)
}

/// XGETBV and XSETBV.
pub(crate) fn xcr(cpu: &mut Cpu, insn: &Instruction) -> Done {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::INVALID_OPCODE);
    }
    let index = cpu.gpr[RCX] & 0xffff_ffff;
    if insn.mnemonic() == Mnemonic::Xgetbv {
        let value = match index {
            0 => cpu.sys.xcr0,
            1 if cpu.vm.features.has(Feature::Xgetbv1) => cpu.sys.xcr0 & crate::xsave::in_use(cpu),
            _ => return Err(Exception::GP0),
        };
        cpu.gpr[RAX] = value & 0xffff_ffff;
        cpu.gpr[RDX] = value >> 32;
        return Ok(Flow::Next);
    }
    cpu.need_cpl0()?;
    let value = (cpu.gpr[RDX] << 32) | (cpu.gpr[RAX] & 0xffff_ffff);
    let [low, _, _, high] = cpu.vm.model.query(0xd, 0);
    let offered = u64::from(high) << 32 | u64::from(low);
    let avx_without_sse = value & (xcr0::SSE | xcr0::AVX) == xcr0::AVX;
    fault_if(index != 0 || value & xcr0::X87 == 0 || value & !offered != 0 || avx_without_sse)?;
    cpu.sys.xcr0 = value;
    leave(cpu)
}
