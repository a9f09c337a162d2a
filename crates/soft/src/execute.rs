//! Executes, in Rust, the instructions that translated code does not: dispatch by mnemonic.
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::helpers::Handler;
use crate::{
    control, cpuid, fpu, interrupt, legacy, msr, ports, segment, strings, syscall, tables,
    transfer, vector_memory,
};
use arch::registers::{cr4, rflags};
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// How a helper ends.
pub(crate) type Done = Result<Flow, Exception>;

/// The function that executes an instruction: when it is called `rip` is the instruction's
/// address, `next_rip` the one after it. An exception leaves registers as before the instruction.
pub fn handler(insn: &Instruction) -> Handler {
    if insn.is_string_instruction() {
        return strings::execute;
    }
    // What kernels do all the time; the rest finds its function each time.
    match insn.mnemonic() {
        M::Cli | M::Sti | M::Cld | M::Std | M::Stac | M::Clac => flag_instruction,
        M::Pushfq => pushf,
        M::Popfq => popf,
        M::Iretq => transfer::iret,
        M::Invlpg => control::invlpg,
        M::Rdmsr => |cpu, _| msr::rdmsr(cpu),
        M::Wrmsr => |cpu, _| msr::wrmsr(cpu),
        M::Rdtscp | M::Rdpid => control::time_stamp,
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => syscall::segment_base,
        M::Swapgs => |cpu, _| syscall::swapgs(cpu),
        M::Syscall => |cpu, _| syscall::syscall(cpu),
        M::Sysret | M::Sysretq => syscall::sysret,
        M::In | M::Out => ports::in_out,
        M::Mov => moves,
        M::Pause => |cpu, _| Ok(pause(cpu)),
        _ => dispatch,
    }
}

fn dispatch(cpu: &mut Cpu, insn: &Instruction) -> Done {
    match insn.mnemonic() {
        M::Mov => moves(cpu, insn),
        M::Cli | M::Sti | M::Cld | M::Std | M::Stac | M::Clac | M::Clc | M::Stc | M::Cmc => {
            flag_instruction(cpu, insn)
        }
        M::Push | M::Pop => segment::push_pop(cpu, insn),
        M::Pushf | M::Pushfd | M::Pushfq => pushf(cpu, insn),
        M::Popf | M::Popfd | M::Popfq => popf(cpu, insn),
        M::Hlt => {
            cpu.need_cpl0()?;
            Ok(Flow::Halt)
        }
        M::In | M::Out => ports::in_out(cpu, insn),
        M::Int | M::Int1 | M::Int3 | M::Into => interrupt::int(cpu, insn),
        M::Iret | M::Iretd | M::Iretq => transfer::iret(cpu, insn),
        M::Call | M::Jmp | M::Retf => transfer::far(cpu, insn),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => segment::load_far_pointer(cpu, insn),
        M::Lgdt | M::Lidt | M::Sgdt | M::Sidt => tables::table_register(cpu, insn),
        M::Lldt | M::Ltr => tables::load_system_segment(cpu, insn),
        M::Sldt | M::Str | M::Smsw => tables::store_system(cpu, insn),
        M::Lar | M::Lsl | M::Verr | M::Verw => tables::inspect(cpu, insn),
        M::Arpl => tables::arpl(cpu, insn),
        M::Lmsw => control::lmsw(cpu, insn),
        M::Clts => control::clts(cpu),
        M::Invd | M::Wbinvd | M::Wbnoinvd => {
            cpu.need_cpl0()?;
            cpu.serialize();
            Ok(Flow::Leave)
        }
        M::Invlpg => control::invlpg(cpu, insn),
        M::Invpcid => control::invpcid(cpu, insn),
        M::Rdmsr => msr::rdmsr(cpu),
        M::Wrmsr => msr::wrmsr(cpu),
        M::Rdpmc => Err(Exception::GP0),
        M::Rdtsc | M::Rdtscp | M::Rdpid => control::time_stamp(cpu, insn),
        M::Cpuid => {
            cpuid::execute(cpu);
            cpu.serialize();
            Ok(Flow::Leave)
        }
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => syscall::segment_base(cpu, insn),
        M::Swapgs => syscall::swapgs(cpu),
        M::Syscall => syscall::syscall(cpu),
        M::Sysret | M::Sysretq => syscall::sysret(cpu, insn),
        M::Sysenter => syscall::sysenter(cpu),
        M::Sysexit | M::Sysexitq => syscall::sysexit(cpu, insn),
        M::Xgetbv | M::Xsetbv => control::xcr(cpu, insn),
        _ => data_instruction(cpu, insn),
    }
}

fn data_instruction(cpu: &mut Cpu, insn: &Instruction) -> Done {
    match insn.mnemonic() {
        M::Pusha | M::Pushad => legacy::pusha(cpu, insn),
        M::Popa | M::Popad => legacy::popa(cpu, insn),
        M::Aaa | M::Aas | M::Daa | M::Das | M::Aam | M::Aad => legacy::bcd(cpu, insn),
        M::Salc => legacy::salc(cpu),
        M::Xlatb => legacy::xlat(cpu, insn),
        M::Bound => legacy::bound(cpu, insn),
        M::Enter => legacy::enter(cpu, insn),
        M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor => fpu::environment(cpu, insn),
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => fpu::fx(cpu, insn),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
            crate::xsave::save(cpu, insn)
        }
        M::Xrstor | M::Xrstor64 => crate::xsave::restore(cpu, insn),
        M::Ldmxcsr | M::Stmxcsr | M::Vldmxcsr | M::Vstmxcsr => fpu::mxcsr(cpu, insn),
        M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Vmaskmovps
        | M::Vmaskmovpd
        | M::Vpmaskmovd
        | M::Vpmaskmovq => vector_memory::masked_move(cpu, insn),
        M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd
        | M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq => vector_memory::gather(cpu, insn),
        M::Rdsspd
        | M::Rdsspq
        | M::Endbr32
        | M::Endbr64
        | M::Nop
        | M::Reservednop
        | M::Pause
        | M::Lfence
        | M::Mfence
        | M::Sfence => Ok(Flow::Next),
        M::Clflush
        | M::Clflushopt
        | M::Clwb
        | M::Cldemote
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1 => Ok(Flow::Next),
        // UD0–UD2, INVALID, whatever this CPU does not offer, and what is not enabled now.
        _ => {
            fpu::fpu_allowed(cpu.mode, insn)?;
            Err(Exception::INVALID_OPCODE)
        }
    }
}

/// So many PAUSEs in a row may wait for a vCPU that has a host CPU: an interprocessor interrupt
/// arrives within a few microseconds.
const PATIENCE: u32 = 256;

/// PAUSE, where the guest has executed [`PATIENCE`] of them since this was last called. What it
/// waits for is likely to be a vCPU whose thread has no host CPU now, so ours gives way.
fn pause(cpu: &mut Cpu) -> Flow {
    cpu.patience = PATIENCE;
    if cpu.vm.mailboxes.len() > 1 && !cpu.wanted() {
        std::thread::yield_now();
    }
    Flow::Next
}

/// MOV with a control, debug or segment register (the others are translated).
fn moves(cpu: &mut Cpu, insn: &Instruction) -> Done {
    let special = |r: Register| r.is_cr() || r.is_dr() || r.is_tr() || r.is_segment_register();
    let n = (0..2).find(|&n| insn.op_kind(n) == OpKind::Register && special(insn.op_register(n)));
    let Some(n) = n else { return Err(Exception::INVALID_OPCODE) };
    let register = insn.op_register(n);
    match (register.is_segment_register(), register.is_cr(), register.is_dr()) {
        (true, ..) => segment::mov(cpu, insn),
        (_, true, _) => control::mov_cr(cpu, insn, n == 0),
        (_, _, true) => control::mov_dr(cpu, insn, n == 0),
        _ => Err(Exception::INVALID_OPCODE),
    }
}

fn flag_instruction(cpu: &mut Cpu, insn: &Instruction) -> Done {
    match insn.mnemonic() {
        M::Clc => cpu.set_flag(rflags::CF, false),
        M::Stc => cpu.set_flag(rflags::CF, true),
        M::Cmc => cpu.rflags ^= rflags::CF,
        M::Cld => cpu.set_flag(rflags::DF, false),
        M::Std => cpu.set_flag(rflags::DF, true),
        M::Cli => {
            need_iopl(cpu)?;
            cpu.set_flag(rflags::IF, false);
            return Ok(Flow::Next);
        }
        M::Sti => {
            need_iopl(cpu)?;
            if cpu.rflags & rflags::IF == 0 {
                cpu.set_flag(rflags::IF, true);
                cpu.sys.shadow = true;
            }
        }
        // STAC and CLAC (Intel SDM 2B).
        _ => {
            if cpu.sys.cpl != 0 || cpu.sys.cr4 & cr4::SMAP == 0 {
                return Err(Exception::INVALID_OPCODE);
            }
            cpu.set_flag(rflags::AC, insn.mnemonic() == M::Stac);
        }
    }
    if matches!(insn.mnemonic(), M::Clc | M::Stc | M::Cmc) {
        return Ok(Flow::Next);
    }
    cpu.update_mode();
    Ok(Flow::Leave)
}

/// CLI and STI: CPL at most IOPL, or #GP(0) (also in virtual-8086 mode, where CPL is 3).
pub(crate) fn need_iopl(cpu: &Cpu) -> Result<(), Exception> {
    if iopl(cpu) < cpu.sys.cpl { Err(Exception::GP0) } else { Ok(()) }
}

/// The I/O privilege level.
pub(crate) fn iopl(cpu: &Cpu) -> u8 {
    (cpu.rflags >> 12 & 3) as u8
}

fn stack_bytes(insn: &Instruction) -> usize {
    insn.stack_pointer_increment().unsigned_abs() as usize
}

/// PUSHF/PUSHFD/PUSHFQ (Intel SDM 2B): VM and RF read as zero.
fn pushf(cpu: &mut Cpu, insn: &Instruction) -> Done {
    need_flags_access(cpu)?;
    let image = (cpu.rflags & !(rflags::VM | rflags::RF)) | rflags::FIXED;
    let mut stack = crate::stack::Stack::current(cpu);
    stack.push(cpu, image, stack_bytes(insn))?;
    stack.commit(cpu);
    Ok(Flow::Next)
}

fn need_flags_access(cpu: &Cpu) -> Result<(), Exception> {
    let vm86 = cpu.rflags & rflags::VM != 0;
    if vm86 && iopl(cpu) < 3 { Err(Exception::GP0) } else { Ok(()) }
}

/// Flags that POPF and IRET may write at the present privilege.
pub(crate) fn writable_flags(cpu: &Cpu, size: usize) -> u64 {
    let mut bits = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        bits |= rflags::AC | rflags::ID | rflags::RF;
    }
    if cpu.sys.cpl <= iopl(cpu) {
        bits |= rflags::IF;
    }
    if cpu.sys.cpl == 0 {
        bits |= rflags::IOPL;
    }
    bits
}

/// POPF/POPFD/POPFQ: RF becomes zero, VM stays.
fn popf(cpu: &mut Cpu, insn: &Instruction) -> Done {
    need_flags_access(cpu)?;
    let size = stack_bytes(insn);
    let mut stack = crate::stack::Stack::current(cpu);
    let image = stack.pop(cpu, size)?;
    stack.commit(cpu);
    let writable = writable_flags(cpu, size);
    let before = cpu.rflags;
    let fresh = (before & !writable) | (image & writable);
    cpu.rflags = (fresh & !rflags::RF) | rflags::FIXED;
    let turned_on = !before & cpu.rflags & rflags::IF != 0;
    let modal = rflags::TF | rflags::AC | rflags::DF;
    if turned_on || (before ^ cpu.rflags) & modal != 0 {
        cpu.update_mode();
        return Ok(Flow::Leave);
    }
    Ok(Flow::Next)
}
