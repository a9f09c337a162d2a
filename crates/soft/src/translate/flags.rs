//! Liveness of the six arithmetic flags.
use crate::translate::classify::Class;
use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// A set of arithmetic flags, as iced's bits.
pub type Flags = u32;

/// All six.
pub const ALL: Flags = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// What an instruction does to the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effect {
    /// Flags whose old value matters.
    pub reads: Flags,
    /// Flags that certainly get a new value; undefined ones as far as `undefined` knows that.
    pub kills: Flags,
    /// Flags that may change.
    pub touches: Flags,
}

/// The effect of one instruction.
pub fn effect(insn: &Instruction, class: Class) -> Effect {
    match class {
        Class::Helper | Class::HelperEnd | Class::Invalid => {
            Effect { reads: ALL, kills: 0, touches: ALL }
        }
        Class::System if insn.mnemonic() == Mnemonic::Pushfq => {
            Effect { reads: ALL, kills: 0, touches: 0 }
        }
        Class::Native | Class::NativeVector | Class::BitString => native(insn),
        Class::Branch => Effect { reads: insn.rflags_read() & ALL, kills: 0, touches: 0 },
        Class::LoopBranch => Effect { reads: insn.rflags_read() & ALL, kills: 0, touches: 0 },
        _ => Effect { reads: 0, kills: 0, touches: 0 },
    }
}

/// The effect of a string instruction that translated code does itself. With a count of 0 no flag
/// changes.
pub fn of_string(insn: &Instruction) -> Effect {
    let touches = if crate::emit::strings::sets_flags(insn) { ALL } else { 0 };
    Effect { reads: 0, kills: 0, touches }
}

fn native(insn: &Instruction) -> Effect {
    let touches = insn.rflags_modified() & ALL;
    let mut kills = (insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set()) & ALL;
    kills |= super::undefined::overwritten(insn);
    let mut reads = insn.rflags_read() & ALL;
    if is_shift(insn.mnemonic()) && !certainly_shifts(insn) {
        // A count of zero leaves all flags as they were.
        kills = 0;
        reads |= touches;
    }
    Effect { reads, kills, touches }
}

/// Whether the effect of an instruction follows from its code alone.
pub fn is_fixed(insn: &Instruction) -> bool {
    !is_shift(insn.mnemonic())
}

fn is_shift(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

fn certainly_shifts(insn: &Instruction) -> bool {
    let last = insn.op_count().saturating_sub(1);
    match insn.op_kind(last) {
        // Counts are masked to 5 bits, with 64-bit operands to 6.
        OpKind::Immediate8 => insn.immediate8() & 0x1f != 0,
        _ => false,
    }
}

/// Flags live before each instruction of a straight run, given those live after it.
pub fn live_before(effect: Effect, live_after: Flags) -> Flags {
    (live_after & !effect.kills) | effect.reads
}
