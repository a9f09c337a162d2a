//! IN and OUT, and the permission to use a port (Intel SDM 1 chapter 19).
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::execute::{Done, iopl};
use crate::task;
use arch::registers::rflags;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// #GP(0) unless the port may be used: CPL at most IOPL, or the TSS's bitmap allows it.
pub(crate) fn check_port(cpu: &mut Cpu, port: u16, size: usize) -> Result<(), Exception> {
    if cpu.sys.cr0 & arch::registers::cr0::PE == 0 {
        return Ok(());
    }
    let vm86 = cpu.rflags & rflags::VM != 0;
    if (!vm86 && cpu.sys.cpl <= iopl(cpu)) || task::ports_allowed(cpu, port, size)? {
        return Ok(());
    }
    Err(Exception::GP0)
}

/// Reads a port; the permission was checked.
pub(crate) fn read(cpu: &mut Cpu, port: u16, size: usize) -> u64 {
    let mut data = [0; 4];
    cpu.io().pio_read(port, data.get_mut(..size).unwrap_or(&mut []));
    watch(cpu, port, size);
    u64::from(u32::from_le_bytes(data))
}

/// Writes a port; the permission was checked.
pub(crate) fn write(cpu: &mut Cpu, port: u16, value: u64, size: usize) {
    let data = value.to_le_bytes();
    cpu.io().pio_write(port, data.get(..size.min(4)).unwrap_or(&[]));
    watch(cpu, port, size);
}

/// Notes hits of I/O breakpoints (Intel SDM 3B 17.2.4: kind 2 with CR4.DE).
fn watch(cpu: &mut Cpu, port: u16, size: usize) {
    let dr7 = cpu.sys.debug[5];
    if dr7 & 0xff == 0 || !task::debug_extensions(cpu) {
        return;
    }
    for n in 0..4 {
        let enabled = dr7 >> (2 * n) & 3 != 0 && dr7 >> (16 + 4 * n) & 3 == 2;
        let length = [1, 2, 8, 4][(dr7 >> (18 + 4 * n) & 3) as usize];
        let start = cpu.sys.debug[n] & !(length - 1);
        let at = u64::from(port);
        if enabled && at < start.saturating_add(length) && start < at + size as u64 {
            cpu.sys.debug_hits |= 1 << n;
        }
    }
}

/// IN and OUT with an immediate port or DX.
pub(crate) fn in_out(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let input = insn.mnemonic() == Mnemonic::In;
    let (data, port) = if input { (0, 1) } else { (1, 0) };
    let register = insn.op_register(data);
    let port = match insn.op_kind(port) {
        OpKind::Register => cpu.register(insn.op_register(port)) as u16,
        _ => u16::from(insn.immediate8()),
    };
    let size = register.size();
    check_port(cpu, port, size)?;
    if input {
        let value = read(cpu, port, size);
        cpu.set_register(register, value);
    } else {
        let value = cpu.register(register);
        write(cpu, port, value, size);
    }
    // A device may have asked for an interrupt, a reset or the end: at this very instruction.
    Ok(if cpu.wanted() { Flow::Leave } else { Flow::Next })
}
