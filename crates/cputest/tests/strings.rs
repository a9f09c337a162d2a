//! String instructions as whole programs use them: beside, up to and across the ends of pages,
//! overlapping, with a count of 0, and with flags that must survive.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use cputest::layout::{read, write};
use cputest::micro::{Guest, Mode, at, done, say};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Two pages of data.
const AREA: u64 = at::DATA;
const SIZE: usize = 0x2000;
/// Each operation is made so often, so that later ones find the TLB filled.
const TIMES: u32 = 3;

type Operation = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn pattern() -> Vec<u8> {
    (0..SIZE).map(|n| (n * 7 + n / 256) as u8).collect()
}

/// Runs `operation` [`TIMES`] times with RSI and RDI at these offsets of the area, RCX = `count`,
/// RAX = 0x4142434445464748 and CF set; returns the area and what RSI, RDI, RCX and the flags CF
/// and ZF (in bits 0 and 6) are after the last time.
fn run(operation: Operation, from: u64, to: u64, count: u32) -> (Vec<u8>, Vec<u32>) {
    let mut guest = Guest::new(Mode::LONG);
    write(&guest.memory, AREA, &pattern());
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.mov(ebp, TIMES)?;
        a.set_label(&mut again)?;
        a.mov(esi, (AREA + from) as u32)?;
        a.mov(edi, (AREA + to) as u32)?;
        a.mov(ecx, count)?;
        a.mov(rax, 0x4142_4344_4546_4748u64)?;
        a.cmp(ecx, -1)?;
        operation(a)?;
        a.lahf()?;
        a.movzx(ebx, ah)?;
        a.and(ebx, 0x41)?;
        a.dec(ebp)?;
        a.jne(again)?;
        for register in [esi, edi, ecx, ebx] {
            a.mov(eax, register)?;
            say(a)?;
        }
        done(a)
    });
    let said = guest.run().done().to_vec();
    let mut area = vec![0; SIZE];
    read(&guest.memory, AREA, &mut area);
    (area, said)
}

fn expect(what: &str, got: (Vec<u8>, Vec<u32>), area: &[u8], ends: [u64; 3], flags: u32) {
    let [from, to, count] = ends;
    let said = [AREA + from, AREA + to, count].map(|v| v as u32);
    assert_eq!(got.1, [&said[..], &[flags]].concat(), "registers after {what}");
    let wrong = got.0.iter().zip(area).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "first wrong byte after {what}");
}

#[test]
fn moves_copy_what_they_should_wherever_pages_end() {
    let shapes: [(Operation, usize); 4] = [
        (|a| a.rep().movsb(), 1),
        (|a| a.rep().movsw(), 2),
        (|a| a.rep().movsd(), 4),
        (|a| a.rep().movsq(), 8),
    ];
    for (operation, size) in shapes {
        for (from, to) in [(0, 0x1000), (0x10, 0x13), (0x13, 0x10), (0xfc1, 0x40), (0x40, 0xfff)] {
            for count in [0, 1, 3, 8, 250] {
                let mut area = pattern();
                for _ in 0..TIMES {
                    for n in 0..count * size {
                        // Elements are read whole; only distances of whole elements overlap.
                        if n % size == 0 {
                            let element = area[from + n..from + n + size].to_vec();
                            area[to + n..to + n + size].copy_from_slice(&element);
                        }
                    }
                }
                let moved = (count * size) as u64;
                // CMP of a count with -1 borrows.
                let got = run(operation, from as u64, to as u64, count as u32);
                let what = format!("{count} moves of {size} bytes from {from:#x} to {to:#x}");
                expect(&what, got, &area, [from as u64 + moved, to as u64 + moved, 0], 1);
            }
        }
    }
}

#[test]
fn stores_fill_what_they_should_wherever_pages_end() {
    let shapes: [(Operation, usize); 5] = [
        (|a| a.rep().stosb(), 1),
        (|a| a.rep().stosd(), 4),
        (|a| a.rep().stosq(), 8),
        (|a| a.repne().stosb(), 1),
        (|a| a.stosw(), 2),
    ];
    for (n, (operation, size)) in shapes.into_iter().enumerate() {
        let once = n == 4;
        for to in [0usize, 0x801, 0xff0, 0xfff] {
            for count in [0usize, 1, 2, 500] {
                let elements = if once { 1 } else { count };
                let mut area = pattern();
                let value = 0x4142_4344_4546_4748u64.to_le_bytes();
                for element in area[to..to + elements * size].chunks_mut(size) {
                    element.copy_from_slice(&value[..size]);
                }
                let left = if once { count as u64 } else { 0 };
                let end = (to + elements * size) as u64;
                let got = run(operation, 5, to as u64, count as u32);
                let what = format!("{elements} stores of {size} bytes to {to:#x}");
                expect(&what, got, &area, [5, end, left], 1);
            }
        }
    }
}

#[test]
fn scans_and_comparisons_stop_where_they_should() {
    let area = pattern();
    // The byte in AL, 48H, is first at offset 165.
    let first = area.iter().position(|b| *b == 0x48).unwrap() as u64;
    let scan: Operation = |a| a.repne().scasb();
    expect("a scan that finds", run(scan, 0, 0, 4000), &area, [0, first + 1, 3999 - first], 0x40);
    let less = u32::from(0x48 < area[9]);
    expect("a scan that does not", run(scan, 0, 0, 10), &area, [0, 10, 0], less);
    expect("a scan of nothing", run(scan, 0, 0, 0), &area, [0, 0, 0], 1);
    let across = (0xff8..SIZE).find(|&n| area[n] == 0x48).unwrap() as u64;
    let found = run(scan, 0, 0xff8, 1000);
    expect("a scan across pages", found, &area, [0, across + 1, 999 - (across - 0xff8)], 0x40);

    let compare: Operation = |a| a.repe().cmpsb();
    expect("equal bytes", run(compare, 64, 64, 100), &area, [164, 164, 0], 0x40);
    let less = u32::from(area[0] < area[1]);
    expect("bytes that differ", run(compare, 0, 1, 100), &area, [1, 2, 99], less);
    expect("no bytes", run(compare, 0, 1, 0), &area, [0, 1, 0], 1);
    let quads: Operation = |a| a.repe().cmpsq();
    expect(
        "equal bytes in two pages",
        run(quads, 0xff0, 0xff0, 4),
        &area,
        [0x1010, 0x1010, 0],
        0x40,
    );
}

#[test]
fn loads_end_with_the_last_element() {
    let area = pattern();
    let load: Operation = |a| {
        a.rep().lodsb()?;
        // Kept in the area, where the test can see it.
        a.mov(byte_ptr(AREA), al)
    };
    for count in [1usize, 20, 700] {
        let mut expected = area.clone();
        expected[0] = expected[0x100 + count - 1];
        let end = 0x100 + count as u64;
        expect("loads", run(load, 0x100, 7, count as u32), &expected, [end, 7, 0], 1);
    }
}

#[test]
fn stores_by_strings_to_code_that_runs_are_seen() {
    let mut guest = Guest::new(Mode::LONG);
    let code = at::DATA + 0x1000;
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.mov(ebx, code as u32)?;
        a.xor(ebp, ebp)?;
        a.set_label(&mut again)?;
        // mov eax, EBP + 0xc3000000..: the bytes are put down one by one.
        a.mov(edi, ebx)?;
        a.mov(eax, 0xb8)?;
        a.stosb()?;
        a.mov(eax, ebp)?;
        a.stosd()?;
        a.mov(eax, 0xc3)?;
        a.mov(ecx, 2)?;
        a.rep().stosb()?;
        a.call(rbx)?;
        a.cmp(eax, ebp)?;
        let mut same = a.create_label();
        a.je(same)?;
        a.ud2()?;
        a.set_label(&mut same)?;
        a.inc(ebp)?;
        a.cmp(ebp, 200)?;
        a.jne(again)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [199]);
}
