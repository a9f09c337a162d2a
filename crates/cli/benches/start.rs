//! How long `bv` takes from its start to the guest's first instruction, and how much memory it
//! takes beside the guest's: `cargo bench -p cli --bench start`.
//!
//! The guest is an ELF kernel of 4 KiB with a PVH entry, whose first instructions write a byte to
//! the serial port. The time runs from before the process is made to the arrival of that byte,
//! least and median of many runs; the guest ends itself at once, so that the byte is not held back
//! to be sent with others. Memory is looked at in one that waits in HLT.
#![allow(clippy::unwrap_used, reason = "a measurement that fails has nothing to say")]

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 100;
/// The guest's memory, which tells its mapping from others.
const GUEST_KIB: u64 = 96 << 10;
/// `mov dx, 3F8H; mov al, '!'; out dx, al`.
const SAY: [u8; 7] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee];
/// `out F4H, al`, the debug-exit port.
const END: [u8; 2] = [0xe6, 0xf4];
/// `hlt; jmp $`.
const WAIT: [u8; 3] = [0xf4, 0xeb, 0xfe];
const ENTRY: u32 = 0x10_0000;

fn main() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = |name: &str, then: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, elf(&[&SAY, then, &WAIT].concat())).unwrap();
        path
    };
    let (ends, waits) = (kernel("ends", &END), kernel("waits", &[]));
    println!(
        "{RUNS} runs each; times in ms from the start of the process to the guest's first byte"
    );
    println!("| engine | least | median | anonymous KiB beside the guest's | file KiB |");
    println!("|---|---|---|---|---|");
    for engine in ["soft", "kvm"] {
        match measure(engine, &ends, &waits) {
            Some(row) => println!("{row}"),
            None => println!("| {engine} | does not work here (`bv doctor` says why) | | | |"),
        }
    }
}

fn measure(engine: &str, ends: &Path, waits: &Path) -> Option<String> {
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let start = Instant::now();
        let mut child = bv(engine, ends);
        let arrived = child.stdout.take().unwrap().read_exact(&mut [0]).is_ok();
        times.push(start.elapsed());
        child.wait().unwrap();
        if !arrived {
            return None;
        }
    }
    let mut child = bv(engine, waits);
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    let memory = beside_the_guest(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    times.sort_unstable();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let (least, median) = (milliseconds(times[0]), milliseconds(times[RUNS / 2]));
    let (anonymous, file) = memory;
    Some(format!("| {engine} | {least:.2} | {median:.2} | {anonymous} | {file} |"))
}

fn bv(engine: &str, kernel: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_bv"))
        .args(["run", "--engine", engine, "--debug-exit", "--memory"])
        .args([&format!("{GUEST_KIB}KiB"), "--kernel"])
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The resident KiB, anonymous and of files, of all mappings but the guest's memory.
fn beside_the_guest(process: u32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let (mut size, mut resident, mut anonymous, mut file) = (0, 0, 0, 0);
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let Ok(kib) = value.trim().trim_end_matches(" kB").parse::<u64>() else { continue };
        match name {
            "Size" => size = kib,
            "Rss" => resident = kib,
            "Anonymous" if size < GUEST_KIB => {
                anonymous += kib;
                file += resident - kib;
            }
            _ => {}
        }
    }
    (anonymous, file)
}

/// An ELF64 file of 4 KiB: a note with the PVH entry (Xen, docs/misc/pvh.pandoc) and the code.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM: u64 = 56;
    const NOTE: u64 = HEADER + 2 * PROGRAM;
    const CODE_AT: u64 = 0x100;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    // Executable, x86-64, version 1; entry; program headers, no sections.
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    [u64::from(ENTRY), HEADER, 0].iter().for_each(|word| put(&word.to_le_bytes()));
    [0u16, 0, HEADER as u16, PROGRAM as u16, 2, 0, 0, 0].iter().for_each(|w| put(&w.to_le_bytes()));
    let mut program = |kind: u32, at: u64, address: u64, length: u64| {
        [kind, 7].iter().for_each(|word| put(&word.to_le_bytes()));
        [at, address, address, length, length, 4].iter().for_each(|w| put(&w.to_le_bytes()));
    };
    program(4, NOTE, 0, 20);
    program(1, CODE_AT, u64::from(ENTRY), code.len() as u64);
    // XEN_ELFNOTE_PHYS32_ENTRY.
    [4u32, 4, 18].iter().for_each(|word| put(&word.to_le_bytes()));
    put(b"Xen\0");
    put(&ENTRY.to_le_bytes());
    file.resize(CODE_AT as usize, 0);
    file.extend_from_slice(code);
    file.resize(4096, 0);
    file
}
