//! What the translator asks of each instruction and what depends on no more than its code and on
//! whether it has a memory operand: worked out once, kept in a table.
use super::classify::{Class, Operands, compute, has_memory, reads, writes};
use super::flags::{self, Effect};
use iced_x86::{Instruction, OpKind};
use std::sync::atomic::{AtomicU64, Ordering};

/// What is known of an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Its treatment.
    pub class: Class,
    /// Its effect on the flags; `None` where that depends on its operands.
    pub effect: Option<Effect>,
    /// Whether it uses neither the FPU nor vectors and has no VEX prefix, so that no mode bars it.
    pub general: bool,
    /// Whether it reads its explicit memory operand.
    pub reads_memory: bool,
    /// Whether it writes its explicit memory operand, perhaps only on a condition.
    pub writes_memory: bool,
}

const GENERAL: u64 = 1 << 8;
const READS: u64 = 1 << 9;
const WRITES: u64 = 1 << 10;
const FIXED_EFFECT: u64 = 1 << 11;
/// Places of the three sets of flags of an effect.
const READ_FLAGS: u32 = 12;
const KILLED_FLAGS: u32 = 18;
const TOUCHED_FLAGS: u32 = 24;

static TABLE: [AtomicU64; 16384] = [const { AtomicU64::new(0) }; 16384];

/// The facts of an instruction.
#[inline]
pub fn of(insn: &Instruction) -> Facts {
    let memory = has_memory(insn);
    let slot = (insn.code() as usize) << 1 | usize::from(memory);
    // Code has fewer than 6,000 values today; what does not fit is computed each time.
    let Some(cell) = TABLE.get(slot) else { return work_out(insn, memory) };
    if let Some(facts) = decode(cell.load(Ordering::Relaxed)) {
        return facts;
    }
    let facts = work_out(insn, memory);
    cell.store(encode(facts), Ordering::Relaxed);
    facts
}

fn work_out(insn: &Instruction, memory: bool) -> Facts {
    let class = compute(insn, memory);
    let operand = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory);
    let access = operand.map(|i| Operands::default().accesses(insn)[i as usize]);
    Facts {
        class,
        effect: flags::is_fixed(insn).then(|| flags::effect(insn, class)),
        general: crate::fpu::is_general(insn),
        reads_memory: access.is_some_and(reads),
        writes_memory: access.is_some_and(writes),
    }
}

fn encode(facts: Facts) -> u64 {
    let bit = |on: bool, bit: u64| if on { bit } else { 0 };
    let mut word = facts.class as u64
        | bit(facts.general, GENERAL)
        | bit(facts.reads_memory, READS)
        | bit(facts.writes_memory, WRITES);
    if let Some(Effect { reads, kills, touches }) = facts.effect {
        word |= FIXED_EFFECT | u64::from(reads) << READ_FLAGS;
        word |= u64::from(kills) << KILLED_FLAGS | u64::from(touches) << TOUCHED_FLAGS;
    }
    word
}

fn decode(word: u64) -> Option<Facts> {
    let class = *Class::ALL.get((word as usize & 0xff).wrapping_sub(1))?;
    let set = |at: u32| (word >> at) as u32 & flags::ALL;
    let (reads, kills, touches) = (set(READ_FLAGS), set(KILLED_FLAGS), set(TOUCHED_FLAGS));
    let effect = (word & FIXED_EFFECT != 0).then_some(Effect { reads, kills, touches });
    Some(Facts {
        class,
        effect,
        general: word & GENERAL != 0,
        reads_memory: word & READS != 0,
        writes_memory: word & WRITES != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_gives_back_what_was_put_into_it() {
        const { assert!(flags::ALL < 1 << 6) };
        for class in Class::ALL {
            for n in 0..16u32 {
                let effect = Effect { reads: n, kills: flags::ALL & !n, touches: n << 2 };
                let facts = Facts {
                    class,
                    effect: (n & 1 != 0).then_some(effect),
                    general: n & 2 != 0,
                    reads_memory: n & 4 != 0,
                    writes_memory: n & 8 != 0,
                };
                let back = decode(encode(facts)).map(|f| format!("{f:?}"));
                assert_eq!(back, Some(format!("{facts:?}")));
            }
        }
    }
}
