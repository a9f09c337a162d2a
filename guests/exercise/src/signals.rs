//! Signals: handlers, faults that a handler repairs, and faults that kill.
#![allow(unsafe_code, reason = "raising faults is what this exercises")]

use crate::memory::{self, Map, PAGE};
use std::arch::asm;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

unsafe extern "C" {
    fn sigaction(signal: c_int, new: *const Action, old: *mut Action) -> c_int;
    fn raise(signal: c_int) -> c_int;
}

/// `struct sigaction` of the C library on x86-64 Linux.
#[repr(C)]
struct Action {
    handler: usize,
    mask: [u64; 16],
    flags: c_int,
    restorer: usize,
}

/// Values of Linux on x86-64 (`asm/signal.h`).
const TRAP: c_int = 5;
const SEGV: c_int = 11;
const USER2: c_int = 12;
const WITH_INFO: c_int = 4;
/// Offsets of the faulting address in `siginfo_t`, and of RIP in `ucontext_t`, in words.
const INFO_ADDRESS: usize = 2;
const CONTEXT_RIP: usize = 5 + 16;

const PAGES: usize = 200;
static COUNTED: AtomicU64 = AtomicU64::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);
static GUARDED: AtomicUsize = AtomicUsize::new(0);
static TRAPPED_AT: AtomicUsize = AtomicUsize::new(0);

type Handler = extern "C" fn(c_int, *const usize, *const c_void);

extern "C" fn count(_signal: c_int, _info: *const usize, _context: *const c_void) {
    COUNTED.fetch_add(1, Ordering::Relaxed);
}

/// Repairs a write to a guarded page; the instruction then runs again.
extern "C" fn repair(_signal: c_int, info: *const usize, _context: *const c_void) {
    // SAFETY: the kernel passes a whole siginfo_t.
    let address = unsafe { info.add(INFO_ADDRESS).read() };
    let start = GUARDED.load(Ordering::Relaxed);
    if !(start..start + PAGES * PAGE).contains(&address) {
        std::process::abort();
    }
    FAULTS.fetch_add(1, Ordering::Relaxed);
    memory::make_writable(address);
}

extern "C" fn trapped(_signal: c_int, _info: *const usize, context: *const c_void) {
    // SAFETY: the kernel passes a whole ucontext_t.
    let rip = unsafe { context.cast::<usize>().add(CONTEXT_RIP).read() };
    TRAPPED_AT.store(rip, Ordering::Relaxed);
}

fn handle(signal: c_int, handler: Handler) {
    let action = Action { handler: handler as usize, mask: [0; 16], flags: WITH_INFO, restorer: 0 };
    // SAFETY: the layout is the C library's, and the handlers do only what a handler may.
    assert_eq!(unsafe { sigaction(signal, &raw const action, std::ptr::null_mut()) }, 0);
}

pub fn exercise() {
    handle(USER2, count);
    for _ in 0..1000 {
        // SAFETY: the handler of this signal only counts.
        unsafe { raise(USER2) };
    }
    println!("signals: counted {}", COUNTED.load(Ordering::Relaxed));
    repaired_faults();
    breakpoint();
}

/// Writes to each page of protected memory: one fault a page, no write lost or done twice.
fn repaired_faults() {
    let map = Map::anonymous(PAGES * PAGE);
    for page in 0..PAGES {
        map.counter(page * PAGE).store(page as u64, Ordering::Relaxed);
    }
    map.protect(false);
    GUARDED.store(map.address(), Ordering::Relaxed);
    handle(SEGV, repair);
    let before: u64 =
        (0..PAGES).map(|page| map.counter(page * PAGE).fetch_add(1000, Ordering::Relaxed)).sum();
    let after: u64 = (0..PAGES).map(|page| map.counter(page * PAGE).load(Ordering::Relaxed)).sum();
    println!("signals: {} faults, {before} became {after}", FAULTS.load(Ordering::Relaxed));
}

/// A breakpoint's handler sees the address after it.
fn breakpoint() {
    handle(TRAP, trapped);
    let after: usize;
    // SAFETY: the handler returns to the instruction after INT3.
    unsafe { asm!("int3", "2: lea {}, [rip + 2b]", out(reg) after) };
    println!(
        "signals: trapped at the right place: {}",
        TRAPPED_AT.load(Ordering::Relaxed) == after
    );
}

/// Ends the process by a fault.
pub fn die(how: &str) {
    let null = std::hint::black_box(std::ptr::null_mut::<u8>());
    // SAFETY: each of these ends the process, which has asked for it.
    unsafe {
        match how {
            "invalid opcode" => asm!("ud2"),
            "division by zero" => asm!("xor ecx, ecx", "div ecx", out("ecx") _,
                out("eax") _, inout("edx") 0 => _),
            "division overflow" => asm!("idiv ecx", inout("ecx") -1 => _,
                inout("eax") i32::MIN => _, inout("edx") -1 => _),
            "null" => asm!("mov byte ptr [{}], 1", in(reg) null),
            "not canonical" => asm!("mov al, [{}]", in(reg) 1u64 << 60, out("al") _),
            "breakpoint" => asm!("int3"),
            "privileged" => asm!("cli"),
            "port" => asm!("in al, 0x70", out("al") _),
            "x87" => asm!("push 0x33b", "fldcw [rsp]", "pop rax", "fldz", "fld1", "fdivrp",
                "fwait", out("rax") _),
            "sse" => asm!("push 0x1d00", "ldmxcsr [rsp]", "pop rax", "xorps xmm0, xmm0",
                "divss xmm0, xmm0", out("rax") _, out("xmm0") _),
            "jump" => asm!("jmp {}", in(reg) null),
            "stack" => asm!("mov rsp, {}", "push rax", in(reg) 1u64 << 60),
            _ => std::process::abort(),
        }
    }
}
