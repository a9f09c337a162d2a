//! What programs leave out, and why.
//!
//! Little is open in the architecture or between processors. Most is about a KVM without hardware
//! behind it ("emulated"), which runs 64-bit user code natively as a process of the host, and all
//! other code by its instruction emulator.
use super::program::Kind;
use crate::case::Case;
use crate::compare::has_several_accesses;
use crate::generate::memory_bytes;
use arch::registers::gpr;
use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess,
    OpCodeOperandKind as K, OpKind, Register,
};

/// Why no instruction of a form is part of programs, or `None` for one that is.
pub fn form(kind: Kind, emulated: bool, code: Code) -> Option<&'static str> {
    if code.flow_control() != FlowControl::Next {
        return Some("it leaves the slot");
    }
    if kind == Kind::Kernel64 && code.is_privileged() {
        return Some("it changes the system");
    }
    if has_several_accesses(code.mnemonic()) {
        return Some("which access faults first is each processor's affair");
    }
    if loads_a_segment(code) {
        return Some("native user code is left with what the host's kernel makes of it");
    }
    match code.mnemonic() {
        M::Fstenv | M::Fsave => {
            Some("it stores the address of the last x87 instruction, which soft does not keep")
        }
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => {
            Some("which operand is read first is each processor's affair")
        }
        M::Movsxd if code == Code::Movsxd_r16_rm16 => Some("AMD reads 32 bits, Intel 16"),
        M::Rcl | M::Rcr | M::Rol | M::Ror => Some("OF is undefined"),
        mnemonic if emulated => emulated_form(kind, mnemonic),
        _ => None,
    }
}

fn loads_a_segment(code: Code) -> bool {
    let far = matches!(code.mnemonic(), M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss);
    let first = code.op_code().op_kinds().first();
    let segment = matches!(first, Some(K::seg_reg | K::es | K::ss | K::ds | K::fs | K::gs));
    far || segment && code.mnemonic() != M::Push
}

/// What a KVM without hardware behind it runs otherwise than the CPU does.
fn emulated_form(kind: Kind, mnemonic: M) -> Option<&'static str> {
    match (kind, mnemonic) {
        (_, M::Popf | M::Popfd | M::Popfq) => Some("EFLAGS.NT and IOPL are lost"),
        (Kind::User64 | Kind::User32, _) => None,
        (_, M::Tzcnt | M::Lzcnt) => Some("the emulator takes it for BSF or BSR"),
        (_, M::Movbe) => Some("#UD, for CPUID does not offer it"),
        (_, M::Cmpxchg | M::Bsf | M::Bsr) => {
            Some("the emulator clears the upper half of a register that stays as it is")
        }
        (_, M::Movq) => Some("the emulator enters MMX state before a fault"),
        (_, M::Scasb | M::Scasw | M::Scasd | M::Scasq) => {
            Some("the emulator loses flags where a repeated one faults")
        }
        _ => None,
    }
}

/// Why an instruction cannot be part of a program with the operands that it has.
pub fn instruction(
    kind: Kind,
    emulated: bool,
    case: &Case,
    instruction: &Instruction,
) -> Option<&'static str> {
    match instruction.mnemonic() {
        M::Bt | M::Btc | M::Btr | M::Bts if instruction.op0_kind() == OpKind::Memory => {
            Some("it reaches far from where its operand is aimed at")
        }
        _ if emulated => emulated_instruction(kind, case, instruction),
        _ => None,
    }
}

fn emulated_instruction(kind: Kind, case: &Case, insn: &Instruction) -> Option<&'static str> {
    let operands = operands(case, insn);
    if operands.iter().any(|o| o.first.max(o.last) >= 1 << 46) {
        return Some("addresses beyond the user's half are the host kernel's, or not canonical");
    }
    if kind != Kind::Kernel64 {
        let is_rsp = |n| insn.op_register(n).full_register() == Register::RSP;
        let spoils = case.gpr[gpr::RSP] >= 1 << 46 || (0..insn.op_count()).any(is_rsp);
        return spoils.then_some("user code whose RSP is not canonical is emulated");
    }
    if insn.mnemonic() == M::Mov && insn.op1_register().is_segment_register() {
        return Some("the emulator stores a selector with REX.W as 8 bytes");
    }
    let across = operands.iter().any(Operand::is_stored_across_pages);
    across.then_some("the emulator stores to the first page before it looks at the second")
}

/// Memory that an instruction uses, or of a repeated one the first round.
struct Operand {
    first: u64,
    last: u64,
    written: bool,
    string: bool,
}

impl Operand {
    /// The later rounds of a string instruction cross pages where the first is not aligned.
    fn is_stored_across_pages(&self) -> bool {
        let aligned = self.first & (self.last - self.first) == 0;
        self.written && (self.first >> 12 != self.last >> 12 || self.string && !aligned)
    }
}

fn operands(case: &Case, instruction: &Instruction) -> Vec<Operand> {
    let mut factory = InstructionInfoFactory::new();
    let value = |register: Register, _, _| {
        Some(match register {
            Register::FS => case.fs_gs[0],
            Register::GS => case.fs_gs[1],
            r if r.is_gpr() => case.gpr[r.full_register().number()],
            _ => 0,
        })
    };
    let used = factory.info(instruction).used_memory().iter();
    used.map(|memory| {
        let first = memory.virtual_address(0, value).unwrap_or(u64::MAX);
        let size = memory_bytes(instruction).max(memory.memory_size().size() as u64);
        Operand {
            first,
            last: first.saturating_add(size.saturating_sub(1)),
            written: !matches!(memory.access(), OpAccess::Read | OpAccess::CondRead),
            string: instruction.is_string_instruction(),
        }
    })
    .collect()
}
