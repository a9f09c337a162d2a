//! Guests made from a seed.
use super::unfit;
use crate::case::{CODE, Case, DATA};
use crate::generate::{decode, generate};
use crate::rng::Rng;
use crate::sweep::covered_forms;
use crate::values::random_case;
use arch::registers::{gpr, rflags};
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Formatter, Instruction, InstructionInfoFactory,
    NasmFormatter, Register,
};
use std::fmt::Write;
use std::sync::OnceLock;

/// Bytes of a slot. What raises an exception goes on with the next slot.
pub const SLOT: u64 = 64;
/// Where the first slot is: the last ones lie on the second code page.
pub const START: u64 = CODE + 0x1000 - 24 * SLOT;
const SLOTS: u64 = 40;
const INT3: u8 = 0xcc;
const NOP: u8 = 0x90;

/// The code's privilege and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 64-bit code at CPL 3.
    User64,
    /// 32-bit code at CPL 3, under a 64-bit kernel.
    User32,
    /// 64-bit code at CPL 0.
    Kernel64,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::User64, Self::User32, Self::Kernel64];

    /// Whether the code is 64-bit code.
    pub fn wide(self) -> bool {
        self != Self::User32
    }
}

/// A guest: code, and the state in which it starts.
pub struct Program {
    /// Privilege and width.
    pub kind: Kind,
    /// The code, from [`START`] on.
    pub code: Vec<u8>,
    /// Registers and data at the start.
    pub start: Case,
}

impl Program {
    /// The guest of a generator's state.
    pub fn generate(kind: Kind, emulated: bool, rng: &mut Rng) -> Self {
        let mut start = random_case(rng, kind.wide());
        start.rip = START;
        start.rflags &= !rflags::AC;
        start.gpr[gpr::RSP] = DATA + 0x800;
        let mut code = Vec::with_capacity((SLOTS * SLOT) as usize);
        for slot in 0..SLOTS {
            let mut bytes = match rng.below(8) {
                _ if slot == SLOTS - 1 => vec![INT3],
                0 => vec![INT3],
                1 => skip(rng, slot),
                _ => piece(kind, emulated, START + slot * SLOT, rng),
            };
            bytes.resize(SLOT as usize, NOP);
            code.append(&mut bytes);
        }
        Self { kind, code, start }
    }

    /// What the last breakpoint saves as its return address.
    pub fn end() -> u64 {
        START + (SLOTS - 1) * SLOT + 1
    }

    /// The code as text, without the NOPs that fill slots.
    pub fn listing(&self) -> String {
        let mut text = String::new();
        let bits = if self.kind.wide() { 64 } else { 32 };
        for (at, slot) in (START..).step_by(SLOT as usize).zip(self.code.chunks(SLOT as usize)) {
            let mut decoder = Decoder::with_ip(bits, slot, at, DecoderOptions::NONE);
            for instruction in &mut decoder {
                if instruction.code() == Code::Nopd || instruction.code() == Code::Nopw {
                    continue;
                }
                let mut line = String::new();
                NasmFormatter::new().format(&instruction, &mut line);
                // Writing to a String cannot fail.
                let _ = writeln!(text, "    {:#x}: {line}", instruction.ip());
            }
        }
        text
    }
}

/// A conditional jump to one of the next slots.
fn skip(rng: &mut Rng, slot: u64) -> Vec<u8> {
    let further = (1 + rng.below(3)).min(SLOTS - 1 - slot);
    let distance = (further * SLOT - 6) as u32;
    let mut bytes = vec![0x0f, 0x80 + rng.below(16) as u8];
    bytes.extend_from_slice(&distance.to_le_bytes());
    bytes
}

/// One generated instruction, after moves that make its operands' registers point where they were
/// aimed at. What registers hold otherwise is what the code before left there.
fn piece(kind: Kind, emulated: bool, at: u64, rng: &mut Rng) -> Vec<u8> {
    loop {
        let form = rng.pick(forms(kind, emulated));
        let Some(case) = generate(form, kind.wide(), rng) else { continue };
        let Some(instruction) = decode(case.code(), &case) else { continue };
        if unfit::instruction(kind, emulated, &case, &instruction).is_some() {
            continue;
        }
        let mut bytes = aimed(kind, &case, &instruction);
        let place = at + bytes.len() as u64;
        if instruction.is_ip_rel_memory_operand() {
            let mut encoder = Encoder::new(64);
            if encoder.encode(&instruction, place).is_err() {
                continue;
            }
            bytes.append(&mut encoder.take_buffer());
        } else {
            bytes.extend_from_slice(case.code());
        }
        if bytes.len() <= SLOT as usize {
            return bytes;
        }
    }
}

/// Moves to the general registers that the instruction addresses memory with.
fn aimed(kind: Kind, case: &Case, instruction: &Instruction) -> Vec<u8> {
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(instruction).used_memory();
    let mut registers: Vec<_> = used
        .iter()
        .flat_map(|memory| [memory.base(), memory.index()])
        .filter(|r| r.is_gpr())
        .map(|r| r.full_register().number())
        .collect();
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        registers.push(Register::RCX.number());
    }
    registers.sort_unstable();
    registers.dedup();
    let mut bytes = Vec::new();
    for number in registers {
        let (low, value) = (number as u8 & 7, case.gpr[number]);
        if kind.wide() {
            bytes.extend_from_slice(&[0x48 | (number as u8 >> 3), 0xb8 | low]);
            bytes.extend_from_slice(&value.to_le_bytes());
        } else {
            bytes.push(0xb8 | low);
            bytes.extend_from_slice(&(value as u32).to_le_bytes());
        }
    }
    bytes
}

/// The forms that programs are made of.
fn forms(kind: Kind, emulated: bool) -> &'static [Code] {
    static FORMS: [OnceLock<Vec<Code>>; 6] = [const { OnceLock::new() }; 6];
    FORMS[2 * kind as usize + usize::from(emulated)].get_or_init(|| {
        let fits = |code: &Code| unfit::form(kind, emulated, *code).is_none();
        covered_forms(kind.wide()).into_iter().filter(fits).collect()
    })
}
