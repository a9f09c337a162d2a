//! Flags that instructions leave undefined (Intel SDM 2, "Flags Affected"), on this host.
//!
//! Translated code gives what the host's CPU gives. If that depends on the operands alone, the old
//! value of an undefined flag is as dead as that of a defined one, which spares most code of saving
//! flags for AF alone. Whether it does is tried here, once.
#![allow(unsafe_code)]
use super::flags::{ALL, Flags};
use iced_x86::{Instruction, Mnemonic, RflagsBits};
use std::arch::asm;
use std::sync::OnceLock;

/// Flags, by kind of instruction, that get a value that does not depend on their old one.
#[derive(Clone, Copy, Default)]
struct Written {
    logic: Flags,
    shift: Flags,
    multiply: Flags,
}

/// Bits of RFLAGS in place of iced's.
const BITS: [(Flags, u64); 6] = [
    (RflagsBits::CF, 1 << 0),
    (RflagsBits::PF, 1 << 2),
    (RflagsBits::AF, 1 << 4),
    (RflagsBits::ZF, 1 << 6),
    (RflagsBits::SF, 1 << 7),
    (RflagsBits::OF, 1 << 11),
];

/// RFLAGS after an instruction on `a` and `b`, begun with the flags `old`.
macro_rules! attempt {
    ($($code:literal),+) => {{
        let run: Attempt = |a, b, old| {
            let after;
            // SAFETY: the instructions change the registers named and arithmetic flags, and use
            // the stack as the compiler expects.
            unsafe {
                asm!("push rdi", "popfq", $($code,)+ "pushfq", "pop rdi",
                    inout("rax") a => _, inout("rcx") b => _, inout("rdi") old => after, out("rdx") _);
            }
            after
        };
        run
    }};
}
type Attempt = fn(u64, u64, u64) -> u64;

/// The flags whose value after each of `attempts` does not depend on that before it.
fn written(attempts: &[Attempt]) -> Flags {
    const VALUES: [u64; 6] = [0, 1, 0x10, 0xff, 0x8000_0000_7fff_fff8, u64::MAX];
    let every = BITS.iter().fold(0, |all, (_, bit)| all | bit);
    let mut differing = 0;
    for attempt in attempts {
        for (a, b) in VALUES.iter().flat_map(|&a| VALUES.map(|b| (a, b))) {
            differing |= attempt(a, b, 0x202) ^ attempt(a, b, 0x202 | every);
        }
    }
    BITS.iter().filter(|(_, bit)| differing & bit == 0).fold(0, |all, (flag, _)| all | flag)
}

fn try_all() -> Written {
    let logic = [
        attempt!("and rax, rcx"),
        attempt!("and al, cl"),
        attempt!("or rax, rcx"),
        attempt!("or ax, cx"),
        attempt!("xor rax, rcx"),
        attempt!("xor eax, ecx"),
        attempt!("test rax, rcx"),
        attempt!("test al, cl"),
    ];
    let shift = [
        attempt!("shl rax, 1"),
        attempt!("shl eax, 5"),
        attempt!("shl al, 3"),
        attempt!("shr rax, 1"),
        attempt!("shr rax, 32"),
        attempt!("shr ax, 7"),
        attempt!("sar rax, 1"),
        attempt!("sar eax, 31"),
    ];
    let multiply = [attempt!("imul rax, rcx"), attempt!("imul eax, ecx, 100"), attempt!("mul rcx")];
    Written { logic: written(&logic), shift: written(&shift), multiply: written(&multiply) }
}

/// The undefined flags of `insn`, a shift being one by a constant that is not 0, whose old value
/// does not matter on this host.
pub fn overwritten(insn: &Instruction) -> Flags {
    use Mnemonic as M;
    static WRITTEN: OnceLock<Written> = OnceLock::new();
    let written = WRITTEN.get_or_init(try_all);
    let on_host = match insn.mnemonic() {
        M::And | M::Or | M::Xor | M::Test => written.logic,
        M::Shl | M::Sal | M::Shr | M::Sar => written.shift,
        M::Imul | M::Mul => written.multiply,
        _ => 0,
    };
    insn.rflags_undefined() & ALL & on_host
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_an_instruction_leaves_alone_count_as_not_written() {
        assert_eq!(written(&[attempt!("mov rdx, rax")]), 0);
        assert_eq!(written(&[attempt!("inc rax")]), ALL & !RflagsBits::CF);
        assert_eq!(written(&[attempt!("add rax, rcx")]), ALL);
        assert_eq!(
            written(&[attempt!("add rax, rcx"), attempt!("inc rax")]),
            ALL & !RflagsBits::CF
        );
        assert_eq!(written(&[attempt!("shl rax, cl")]), 0);
    }

    #[test]
    fn defined_flags_are_written() {
        let all = try_all();
        assert_eq!(all.logic & !RflagsBits::AF, ALL & !RflagsBits::AF);
        let multiply = RflagsBits::CF | RflagsBits::OF;
        assert_eq!(all.multiply & multiply, multiply);
    }
}
