//! The Rust functions that thunks call: where translated code meets the rest of the engine.
#![allow(unsafe_code)]
use crate::cpu::Cpu;
use crate::exception::{Exception, Flow};
use crate::mmu::Want;
use crate::thunks::exit;
use crate::translate::classify::{Class, classify};
use arch::SegmentName;
use iced_x86::{Instruction, Mnemonic};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a site of translated code tells about its access: one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessInfo(pub u32);

impl AccessInfo {
    const READS: u32 = 1 << 8;
    const WRITES: u32 = 1 << 9;
    const ALIGNED: u32 = 1 << 10;
    const WORN: u32 = 1 << 11;

    /// An access of `size` bytes (1 to 64, of a group up to 4096) through `segment`.
    pub fn new(size: u32, reads: bool, writes: bool, segment: SegmentName) -> Self {
        let flags = if reads { Self::READS } else { 0 } | if writes { Self::WRITES } else { 0 };
        Self(size << 16 | flags | (segment as u32) << 12)
    }
    /// The same for an operand that must be aligned to its size, or #GP(0) follows.
    pub fn aligned(self) -> Self {
        Self(self.0 | Self::ALIGNED)
    }
    /// Says, in place of an access, that the block is to do without recent pages.
    pub fn worn(self) -> Self {
        Self(self.0 | Self::WORN)
    }
    /// Bytes.
    pub fn size(self) -> usize {
        (self.0 >> 16) as usize
    }
    fn reads(self) -> bool {
        self.0 & Self::READS != 0
    }
    /// Whether the operand is written.
    pub fn writes(self) -> bool {
        self.0 & Self::WRITES != 0
    }
    fn segment(self) -> SegmentName {
        SegmentName::ALL[(self.0 >> 12 & 7) as usize % 6]
    }
}

/// RAX and RDX of a helper's answer.
#[repr(C)]
pub struct Answer {
    value: u64,
    /// 0: go on at host address `value`, or if that is 0 leave to the run loop; 1: go on; 3: go on,
    /// and commit the store.
    status: u64,
}

/// Host address that means going on with the next instruction of the same block.
const NEXT: u64 = 1;

/// An instruction that a helper executes, and the function that does it.
pub struct Helped {
    insn: Instruction,
    run: Handler,
}

/// Executes one instruction; see `execute`.
pub type Handler = fn(&mut Cpu, &Instruction) -> Result<Flow, Exception>;

impl Helped {
    /// For an instruction of translated code that the guest's CPU does not have.
    pub fn invalid(insn: Instruction) -> Self {
        Self { insn, run: |_, _| Err(Exception::INVALID_OPCODE) }
    }

    /// For an instruction of translated code.
    pub fn new(insn: Instruction) -> Self {
        let run: Handler = match classify(&insn) {
            Class::Invalid => return Self::invalid(insn),
            // Native in itself, but for the times when it does not go on at once.
            Class::Native if insn.mnemonic() == Mnemonic::Pause => crate::execute::handler(&insn),
            Class::Helper | Class::HelperEnd | Class::ReadTsc => crate::execute::handler(&insn),
            // A native class comes here only where the FPU is not to be used: the exception.
            Class::Native | Class::NativeVector => {
                |cpu, insn| crate::fpu::fpu_allowed(cpu.mode, insn).map(|()| Flow::Next)
            }
            _ => |cpu, insn| crate::near::execute(cpu, insn, classify(insn)),
        };
        Self { insn, run }
    }
}

const LEAVE: Answer = Answer { value: 0, status: 0 };

/// Runs the body of a helper; a panic is a defect of the engine that stops the VM, not the host
/// process.
fn guarded<T>(cpu: *mut Cpu, leave: T, body: impl FnOnce(&mut Cpu) -> T) -> T {
    // SAFETY: thunks pass the Cpu that RSP pointed at; while the helper runs, translated code does
    // not, and the run loop's own reference is not used until `enter` returns.
    let cpu = unsafe { &mut *cpu };
    match catch_unwind(AssertUnwindSafe(|| body(cpu))) {
        Ok(value) => value,
        Err(_) => {
            cpu.defect = Some(format!("a helper panicked at guest address {:#x}", cpu.rip));
            cpu.exit = exit::HELPER;
            leave
        }
    }
}

/// Makes the state that of the start of the instruction at host address `host` and delivers
/// `exception` there, at whose handler translated code goes on.
fn fault_at(cpu: &mut Cpu, host: u64, exception: Exception) -> Answer {
    cpu.locate(host);
    cpu.unpack_flags();
    crate::interrupt::deliver_exception(cpu, exception);
    cpu.exit = exit::HELPER;
    Answer { value: crate::run::resume(cpu), status: 0 }
}

/// The read probe missed.
pub extern "sysv64" fn read(cpu: *mut Cpu, address: u64, info: u32, host: u64) -> Answer {
    guarded(cpu, LEAVE, |cpu| {
        let info = AccessInfo(info);
        if info.0 & AccessInfo::WORN != 0 {
            return wear_out(cpu, host);
        }
        let answer =
            check_address(cpu, address, info).and_then(|()| cpu.prepare_read(address, info.size()));
        match answer {
            Ok(value) => Answer { value, status: 1 },
            Err(exception) => fault_at(cpu, host, exception),
        }
    })
}

/// A place of translated code looks for its page in vain too often: the block goes, to be
/// translated without such attempts from the present instruction on.
fn wear_out(cpu: &mut Cpu, host: u64) -> Answer {
    cpu.locate(host);
    cpu.unpack_flags();
    if let Some(id) = cpu.cache.note_restless(host) {
        let page = cpu.cache.block(id).map_or(0, |b| b.key().physical & !0xfff);
        cpu.kill_all(page, &[id]);
    }
    cpu.exit = exit::HELPER;
    LEAVE
}

/// The write probe missed.
pub extern "sysv64" fn write(cpu: *mut Cpu, address: u64, info: u32, host: u64) -> Answer {
    guarded(cpu, LEAVE, |cpu| {
        let info = AccessInfo(info);
        let answer = check_address(cpu, address, info)
            .and_then(|()| cpu.prepare_write(address, info.size(), info.reads()));
        match answer {
            Ok(value) => {
                let commit = !matches!(cpu.pending_write, crate::access::PendingWrite::None);
                Answer { value, status: if commit { 3 } else { 1 } }
            }
            Err(exception) => fault_at(cpu, host, exception),
        }
    })
}

/// The probe of a group of accesses missed: finds the host address of the group if it lies in one
/// page of plain RAM; else leaves, to go on without groups.
pub extern "sysv64" fn group(cpu: *mut Cpu, address: u64, info: u32, host: u64) -> Answer {
    guarded(cpu, LEAVE, |cpu| {
        let info = AccessInfo(info);
        let want = if info.writes() { Want::Write } else { Want::Read };
        let inside = (address & 0xfff) as usize + info.size() <= 4096;
        if inside
            && check_address(cpu, address, info).is_ok()
            && let Ok(Some(value)) = cpu.fill_tlb(address, want)
        {
            return Answer { value, status: 1 };
        }
        cpu.locate(host);
        cpu.unpack_flags();
        cpu.cache.note_split(host);
        cpu.plain = true;
        cpu.exit = exit::HELPER;
        LEAVE
    })
}

/// Faults that come before those of paging: addresses that are not canonical, and operands that
/// must be aligned.
fn check_address(cpu: &Cpu, address: u64, info: AccessInfo) -> Result<(), Exception> {
    let misaligned = address & (info.size() as u64 - 1) != 0;
    if info.0 & AccessInfo::ALIGNED != 0 && misaligned && !cpu.misaligned_allowed() {
        return Err(Exception::GP0);
    }
    let last = address.wrapping_add(info.size() as u64 - 1);
    if cpu.mode.is_64() && !(cpu.canonical(address) && cpu.canonical(last)) {
        let stack = info.segment() == SegmentName::Ss;
        return Err(if stack { Exception::SS0 } else { Exception::GP0 });
    }
    Ok(())
}

/// Limit and type check of a segment that is not flat.
pub extern "sysv64" fn segment(cpu: *mut Cpu, offset: u64, info: u32, host: u64) -> Answer {
    guarded(cpu, LEAVE, |cpu| {
        let info = AccessInfo(info);
        match cpu.linear(info.segment(), offset, info.size() as u64, info.writes()) {
            Ok(value) => Answer { value, status: 1 },
            Err(exception) => fault_at(cpu, host, exception),
        }
    })
}

/// A store that must be carried further has been made. Returns where to go on: `NEXT`, the host
/// address of another block, or 0 to leave.
pub extern "sysv64" fn commit(cpu: *mut Cpu, host: u64) -> u64 {
    guarded(cpu, 0, |cpu| {
        if !cpu.commit_write() {
            return NEXT;
        }
        if cpu.take_host_flags_at(host).is_some_and(|position| position.transfer) {
            // The push of a CALL, at the end of its block: the transfer is still to come.
            return NEXT;
        }
        cpu.rip = cpu.next_rip;
        cpu.unpack_flags();
        cpu.exit = exit::HELPER;
        0
    })
}

/// Executes one instruction in Rust. Returns where to go on, as [`commit`].
pub extern "sysv64" fn execute(cpu: *mut Cpu, helped: *const Helped) -> u64 {
    guarded(cpu, 0, |cpu| {
        // SAFETY: translated code passes the address of an instruction in its own block's list,
        // which is freed only by a flush of the code cache, from the run loop.
        let Helped { insn, run } = unsafe { &*helped };
        cpu.rip = insn.ip();
        cpu.next_rip = insn.next_ip() & cpu.ip_mask();
        cpu.unpack_flags();
        cpu.exit = exit::HELPER;
        cpu.cache.touched = false;
        let flow = run(cpu, insn);
        let touched = std::mem::take(&mut cpu.cache.touched);
        match flow {
            // It may have written to translated code, perhaps to what follows it.
            Ok(Flow::Next) if !touched => {
                cpu.pack_flags();
                return NEXT;
            }
            Ok(Flow::Next | Flow::Leave) => cpu.rip = cpu.next_rip,
            Ok(Flow::Jump) => {}
            Ok(Flow::Halt) => {
                cpu.rip = cpu.next_rip;
                cpu.lapic.mp = arch::MpState::Halted;
            }
            Err(exception) => crate::interrupt::deliver_exception(cpu, exception),
        }
        crate::run::resume(cpu)
    })
}
