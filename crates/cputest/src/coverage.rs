//! The list of what the comparison covers and what it does not, by name.
use crate::forms::exclusion;
use crate::sweep::cases_of;
use iced_x86::Code;
use std::collections::BTreeMap;
use std::fmt::Write;

/// How a form stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Compared in these modes: 64-bit, 32-bit.
    Compared(bool, bool),
    /// Not compared, and why.
    Excluded(&'static str),
    /// No case could be made although none of the reasons holds: a gap.
    Gap,
}

/// How a form stands, on a host with all instruction sets.
pub fn coverage(code: Code) -> Coverage {
    if let Some(reason) = exclusion(code) {
        return Coverage::Excluded(reason);
    }
    let made = |wide| !cases_of(code, wide, 4, 1).is_empty();
    let (in64, in32) = (made(true), made(false));
    let info = code.op_code();
    if in64 || in32 {
        Coverage::Compared(in64, in32)
    } else if !info.mode64() && !info.mode32() {
        Coverage::Excluded("exists only in 16-bit code; see the guest tests")
    } else {
        Coverage::Gap
    }
}

/// The whole list as Markdown, the contents of `COVERAGE.md`.
pub fn markdown() -> String {
    let mut excluded: BTreeMap<&str, Vec<Code>> = BTreeMap::new();
    let (mut both, mut only64, mut only32) = (0, Vec::new(), Vec::new());
    let mut gaps = Vec::new();
    for code in Code::values() {
        match coverage(code) {
            Coverage::Compared(true, true) => both += 1,
            Coverage::Compared(true, false) => only64.push(code),
            Coverage::Compared(..) => only32.push(code),
            Coverage::Excluded(reason) => excluded.entry(reason).or_default().push(code),
            Coverage::Gap => gaps.push(code),
        }
    }
    let left_out: usize = excluded.values().map(Vec::len).sum();
    let compared = both + only64.len() + only32.len();
    let mut text = format!(
        "# What the CPU comparison covers\n\n\
         Made by `cargo run -p cputest --bin coverage`; a test keeps it true. Names are those of\n\
         iced-x86's `Code`, one for each form of an instruction.\n\n\
         | forms | |\n|---|---|\n\
         | {compared} | compared with the real CPU: {both} in 64-bit and 32-bit code, {} only in 64-bit, {} only in 32-bit code |\n\
         | {left_out} | not compared, listed below with the reason |\n\n\
         A host that lacks an instruction set leaves its forms out at run time.\n\n\
         Not compared in any form: FIP, FDP and FOP (the address and opcode of the last x87\n\
         instruction), which AMD processors save only with an exception pending.\n",
        only64.len(),
        only32.len(),
    );
    if !gaps.is_empty() {
        list(&mut text, "GAP: no case could be made", &gaps);
    }
    for (reason, codes) in excluded {
        list(&mut text, reason, &codes);
    }
    text
}

fn list(text: &mut String, title: &str, codes: &[Code]) {
    // Writing to a String cannot fail.
    let _ = write!(text, "\n## {}: {title}\n\n", codes.len());
    let names: Vec<String> = codes.iter().map(|c| format!("{c:?}")).collect();
    for line in names.chunks(4) {
        let _ = writeln!(text, "{}", line.join(" "));
    }
}
