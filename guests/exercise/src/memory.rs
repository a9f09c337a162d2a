//! Mapped memory: shared files, private copies, protection, and memory that is given back.
#![allow(unsafe_code, reason = "mapping memory is what this exercises")]

use crate::hash::{Generator, sha256};
use crate::processes::child;
use std::ffi::{c_int, c_void};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    fn mmap(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn munmap(at: *mut c_void, length: usize) -> c_int;
    fn mprotect(at: *mut c_void, length: usize, protection: c_int) -> c_int;
    fn madvise(at: *mut c_void, length: usize, advice: c_int) -> c_int;
}

/// Values of Linux on x86-64 (`asm-generic/mman.h`).
const READ: c_int = 1;
const WRITE: c_int = 2;
const SHARED: c_int = 1;
const PRIVATE: c_int = 2;
const ANONYMOUS: c_int = 0x20;
const DONT_NEED: c_int = 4;

pub const PAGE: usize = 4096;
/// The file through which processes share memory, how much of it, and its counters.
const FILE: &str = "exercise-shared";
const LENGTH: usize = 64 * PAGE;
const COUNTERS: usize = 16;
const CHILDREN: usize = 3;
const ROUNDS: u64 = 2_000;

/// Mapped memory, unmapped when dropped.
pub struct Map {
    start: *mut u8,
    length: usize,
}

impl Map {
    fn new(file: Option<&File>, length: usize, flags: c_int) -> Self {
        let (fd, flags) = file.map_or((-1, flags | ANONYMOUS), |file| (file.as_raw_fd(), flags));
        // SAFETY: a new mapping at an address of the kernel's choice changes no other memory.
        let start = unsafe { mmap(std::ptr::null_mut(), length, READ | WRITE, flags, fd, 0) };
        assert_ne!(start as isize, -1, "{}", std::io::Error::last_os_error());
        Self { start: start.cast(), length }
    }

    /// Memory of this process alone, all zero.
    pub fn anonymous(length: usize) -> Self {
        Self::new(None, length, PRIVATE)
    }

    pub fn address(&self) -> usize {
        self.start as usize
    }

    /// The eight bytes at a multiple of eight, which other processes may change too.
    pub fn counter(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.length);
        // SAFETY: in the mapping, aligned, and only ever used as this type while it is shared.
        unsafe { AtomicU64::from_ptr(self.start.add(offset).cast()) }
    }

    /// The content. No counter of it may be in use by others meanwhile.
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the whole mapping, readable and writable, borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }

    pub fn protect(&self, writable: bool) {
        let protection = if writable { READ | WRITE } else { READ };
        // SAFETY: the mapping's own range; nothing of Rust's lies in it.
        assert_eq!(unsafe { mprotect(self.start.cast(), self.length, protection) }, 0);
    }

    /// Gives the content of private memory back, which is zero from then on.
    fn forget(&mut self) {
        // SAFETY: the mapping's own range, not borrowed.
        assert_eq!(unsafe { madvise(self.start.cast(), self.length, DONT_NEED) }, 0);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: made by `mmap` with this length, and borrowed by nobody any more.
        unsafe { munmap(self.start.cast(), self.length) };
    }
}

/// Makes the page at `address` writable, from the handler of the fault that writing raised.
pub fn make_writable(address: usize) {
    let page = address & !(PAGE - 1);
    // SAFETY: only `signals` calls this, with an address in a mapping of its own.
    unsafe { mprotect(page as *mut c_void, PAGE, READ | WRITE) };
}

/// What a child of [`exercise`] does: counts in memory that all of them share.
pub fn count_in_shared_file() {
    let file = OpenOptions::new().read(true).write(true).open(FILE).unwrap();
    let map = Map::new(Some(&file), LENGTH, SHARED);
    for round in 0..ROUNDS {
        for counter in 0..COUNTERS {
            map.counter(counter * 4 * PAGE).fetch_add(round, Ordering::Relaxed);
        }
    }
}

pub fn exercise() {
    shared();
    private();
    anonymous();
    fs::remove_file(FILE).unwrap();
}

fn shared() {
    let file = File::create_new(FILE).unwrap();
    file.set_len(LENGTH as u64).unwrap();
    let children: Vec<_> = (0..CHILDREN).map(|_| child(&["count"]).spawn().unwrap()).collect();
    count_in_shared_file();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let content = fs::read(FILE).unwrap();
    println!("memory: first counter {:?}", &content[..8]);
    println!("memory: shared {}", sha256(&content));
}

fn private() {
    let file = OpenOptions::new().read(true).write(true).open(FILE).unwrap();
    let mut copy = Map::new(Some(&file), LENGTH, PRIVATE);
    let mut shared = Map::new(Some(&file), LENGTH, SHARED);
    copy.bytes()[PAGE + 1] = 1;
    shared.bytes()[2 * PAGE..][..4].copy_from_slice(b"seen");
    file.write_all_at(b"by the file", (3 * PAGE) as u64).unwrap();
    println!("memory: {:?} {:?}", copy.bytes()[PAGE + 1], shared.bytes()[PAGE + 1]);
    println!("memory: {}", String::from_utf8_lossy(&shared.bytes()[3 * PAGE..][..11]));
    let mut read = [0; 4];
    file.read_exact_at(&mut read, (2 * PAGE) as u64).unwrap();
    println!("memory: {}", String::from_utf8_lossy(&read));
}

fn anonymous() {
    let mut map = Map::anonymous(24 << 20);
    let mut random = Generator(24);
    for page in (0..map.length).step_by(PAGE) {
        map.bytes()[page + (random.next() % PAGE as u64) as usize] = random.next() as u8;
    }
    let sum: u64 = map.bytes().iter().map(|byte| u64::from(*byte)).sum();
    map.forget();
    let rest: u64 = map.bytes()[..PAGE * 16].iter().map(|byte| u64::from(*byte)).sum();
    println!("memory: anonymous {sum} then {rest}");
    let pieces: Vec<Vec<u8>> = (1..400).map(|size| vec![size as u8; size * 97]).collect();
    let kept: Vec<Vec<u8>> = pieces.into_iter().step_by(3).collect();
    println!("memory: pieces {}", sha256(&kept.concat()));
}
