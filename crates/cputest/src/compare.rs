//! Tells two outcomes apart, element by element.
//!
//! Not compared, because neither the signal frame nor XSAVE gives them dependably: FIP, FDP and
//! FOP, the address and opcode of the last x87 instruction (AMD processors save them only with an
//! exception pending), in registers and in the images that FXSAVE, FNSAVE and FNSTENV write.
use crate::case::{Case, DATA, Outcome};
use crate::generate::decode;
use arch::FpuState;
use iced_x86::{Formatter, Instruction, Mnemonic as M, NasmFormatter, OpKind, Register};
use std::fmt::Write;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// What differs, one line each; empty where both agree.
pub fn differences(case: &Case, native: &Outcome, engine: &Outcome) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |name: &str, native: u64, engine: u64| {
        if native != engine {
            found.push(format!("{name}: native {native:#x}, engine {engine:#x}"));
        }
    };
    check("vector", native.vector, engine.vector);
    check("error code", error_code(native), error_code(engine));
    let instruction = decode(case.code(), case).unwrap_or_default();
    // Instructions with several accesses: which of them faults first is the processor's affair.
    let several = matches!(
        instruction.mnemonic(),
        M::Retf | M::Iret | M::Iretd | M::Iretq | M::Call | M::Enter | M::Pusha | M::Pushad
    );
    let grain = if several { !0xfff } else { !0 };
    check("cr2", native.cr2 & grain, engine.cr2 & grain);
    check("rip", native.rip, engine.rip);
    check("rflags", native.rflags, engine.rflags);
    for (n, name) in NAMES.iter().enumerate() {
        check(name, native.gpr[n], engine.gpr[n]);
    }
    let segments = ["es", "cs", "ss", "ds", "fs", "gs"];
    for (n, name) in segments.iter().enumerate() {
        check(name, native.selectors[n].into(), engine.selectors[n].into());
    }
    if case.wide && !loads_fs_or_gs(&instruction) {
        check("fs base", native.fs_gs[0], engine.fs_gs[0]);
        check("gs base", native.fs_gs[1], engine.fs_gs[1]);
    }
    vectors(&native.fpu, &engine.fpu, &mut found);
    data(case, &instruction, native, engine, &mut found);
    found
}

/// Linux hides from processes whether an address of its own half is mapped.
fn error_code(outcome: &Outcome) -> u64 {
    let hidden = outcome.vector == 14 && outcome.cr2 >= 0x7fff_ffff_f000;
    if hidden { outcome.error | 1 } else { outcome.error }
}

/// Processors differ in whether a null selector clears the base.
fn loads_fs_or_gs(instruction: &Instruction) -> bool {
    let fs_or_gs = |r: Register| matches!(r, Register::FS | Register::GS);
    fs_or_gs(instruction.op0_register())
        || matches!(instruction.mnemonic(), M::Lfs | M::Lgs | M::Iret | M::Iretd | M::Iretq)
}

fn vectors(native: &FpuState, engine: &FpuState, found: &mut Vec<String>) {
    let (native, engine) = (initialised(native), initialised(engine));
    let mut check = |name: String, at: usize, length: usize| {
        let (n, e) = (&native[at..at + length], &engine[at..at + length]);
        if n != e {
            found.push(format!("{name}: native {}, engine {}", hex(n), hex(e)));
        }
    };
    check("x87 control word".into(), 0, 2);
    check("x87 status word".into(), 2, 2);
    check("x87 tags".into(), 4, 1);
    check("mxcsr".into(), 24, 4);
    for n in 0..8 {
        check(format!("st{n}"), 32 + 16 * n, 10);
    }
    for n in 0..16 {
        check(format!("xmm{n}"), 160 + 16 * n, 16);
        check(format!("upper ymm{n}"), 576 + 16 * n, 16);
    }
}

/// An XSAVE image leaves out components that are in their initial state; put that in.
fn initialised(fpu: &FpuState) -> [u8; FpuState::SIZE] {
    let mut area = fpu.0;
    let initial = FpuState::default().0;
    let present = area[512];
    if present & 1 == 0 {
        area[..24].copy_from_slice(&initial[..24]);
        area[32..160].fill(0);
    }
    if present & 2 == 0 {
        area[160..416].fill(0);
    }
    if present & 4 == 0 {
        area[576..832].fill(0);
    }
    area
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn data(
    case: &Case,
    instruction: &Instruction,
    native: &Outcome,
    engine: &Outcome,
    found: &mut Vec<String>,
) {
    if native.data == engine.data {
        return;
    }
    let skipped = last_x87_pointers(case, instruction);
    let differing: Vec<usize> = (0..native.data.len())
        .filter(|&n| native.data[n] != engine.data[n] && !skipped.contains(&(DATA + n as u64)))
        .collect();
    if let (Some(&first), Some(&last)) = (differing.first(), differing.last()) {
        let last = last.min(first + 31);
        found.push(format!(
            "{} bytes of memory from {:#x}: before {}, native {}, engine {}",
            differing.len(),
            DATA + first as u64,
            hex(&case.data[first..=last]),
            hex(&native.data[first..=last]),
            hex(&engine.data[first..=last])
        ));
    }
}

/// Addresses of FIP, FDP, FOP and their selectors in an x87 image that the instruction wrote.
fn last_x87_pointers(case: &Case, instruction: &Instruction) -> std::ops::Range<u64> {
    let operand_size = instruction.code().op_code().operand_size();
    let (from, to) = match instruction.mnemonic() {
        M::Fxsave | M::Fxsave64 => (6, 24),
        M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave if operand_size == 16 => (6, 14),
        M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave => (12, 28),
        _ => return 0..0,
    };
    let memory = (0..instruction.op_count()).find(|&n| instruction.op_kind(n) == OpKind::Memory);
    let address = memory.and_then(|operand| {
        instruction.virtual_address(operand, 0, |register, _, _| {
            Some(match register {
                Register::FS => case.fs_gs[0],
                Register::GS => case.fs_gs[1],
                r if r.is_segment_register() => 0,
                r => {
                    let value = case.gpr[r.full_register().number()];
                    if r.is_gpr32() { value & 0xffff_ffff } else { value }
                }
            })
        })
    });
    let address = address.unwrap_or(0);
    address.wrapping_add(from)..address.wrapping_add(to)
}

/// A case in words: bytes, disassembly, and the registers it starts with.
pub fn describe(case: &Case) -> String {
    let mut text = String::new();
    let instruction = decode(case.code(), case);
    let mut disassembly = String::new();
    match &instruction {
        Some(i) => NasmFormatter::new().format(i, &mut disassembly),
        None => disassembly.push_str("(invalid)"),
    }
    let code = instruction.map(|i| format!("{:?}", i.code())).unwrap_or_default();
    let mode = if case.wide { 64 } else { 32 };
    let bytes: String = case.code().iter().map(|b| format!("{b:02x} ")).collect();
    let _ = writeln!(text, "{bytes}| {disassembly} | {code}, {mode}-bit, at {:#x}", case.rip);
    for (n, name) in NAMES.iter().enumerate().take(if case.wide { 16 } else { 8 }) {
        let _ = write!(text, "{name}={:#x} ", case.gpr[n]);
    }
    let mxcsr = hex(&case.fpu.0[24..28]);
    let (control, status) = (hex(&case.fpu.0[0..2]), hex(&case.fpu.0[2..4]));
    let _ = write!(
        text,
        "rflags={:#x} fs={:#x} gs={:#x} mxcsr={mxcsr} fcw={control} fsw={status} ftw={:02x}",
        case.rflags, case.fs_gs[0], case.fs_gs[1], case.fpu.0[4]
    );
    text
}
