//! Small guests and the built `bv`.
#![allow(dead_code, reason = "each test program uses its part")]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// Where the test guests are loaded.
const BASE: u32 = 0x10_0000;
/// Bytes of the multiboot header before the code.
const HEADER: u32 = 32;

/// `mov esi, message; mov dx, 3F8H`, then a loop over `lodsb` and `out dx, al` up to a zero.
/// The message follows `after`.
fn print(message: &[u8], after: &[u8]) -> Vec<u8> {
    let prologue = [0x66, 0xba, 0xf8, 0x03, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8];
    let message_at = BASE + HEADER + 5 + (prologue.len() + after.len()) as u32;
    let mut code = vec![0xbe];
    code.extend(message_at.to_le_bytes());
    code.extend(prologue);
    code.extend(after);
    code.extend(message);
    code.push(0);
    code
}

/// Prints, and writes `value` to the debug-exit port.
pub fn prints_and_exits(message: &[u8], value: u8) -> Vec<u8> {
    print(message, &[0xb0, value, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd])
}

/// Prints, and resets the machine: `mov dx, CF9H; mov al, 6; out dx, al`.
pub fn prints_and_resets(message: &[u8]) -> Vec<u8> {
    print(message, &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4, 0xeb, 0xfd])
}

/// Prints for ever: jumps back to its first instruction.
pub fn prints_for_ever(message: &[u8]) -> Vec<u8> {
    print(message, &[0xeb, 0xed])
}

/// Prints, and executes UD2 without an interrupt descriptor table.
pub fn prints_and_triple_faults(message: &[u8]) -> Vec<u8> {
    print(message, &[0x0f, 0x0b])
}

/// Prints, and waits in HLT with interrupts off.
pub fn prints_and_halts(message: &[u8]) -> Vec<u8> {
    print(message, &[0xf4, 0xeb, 0xfd])
}

/// A folder with a test's files.
pub struct Files(TempDir);

impl Files {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A multiboot image with addresses of its own (Multiboot 0.6.96 §3.1.3).
    pub fn kernel(&self, code: &[u8]) -> PathBuf {
        const MAGIC: u32 = 0x1bad_b002;
        const FLAGS: u32 = 1 << 16;
        let end = BASE + HEADER + code.len() as u32;
        let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
        let header = [MAGIC, FLAGS, checksum, BASE, BASE, end, end, BASE + HEADER];
        let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        image.extend(code);
        self.write("kernel", &image)
    }
}

/// `bv` with its standard streams apart from the test's.
pub fn bv(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bv"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `bv` to its end.
pub fn output(arguments: &[&str]) -> Output {
    bv(arguments).output().unwrap()
}

/// Standard error as text.
pub fn messages(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
