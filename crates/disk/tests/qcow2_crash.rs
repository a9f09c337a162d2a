//! Killed at any point under write load, an image is sound and holds everything that was flushed.
//!
//! The test runs itself again as a child process that writes from two threads, each to its half of
//! the disk, and tells what it has done. `DISK_KILLS` sets how many children each test kills.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use disk::format::{self, OpenOptions};
use disk::qcow2::{BackingName, CreateOptions, Qcow2, Repair, Version};
use disk::{Disk, FileOptions, Format};
use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use support::{Random, folder, try_qemu};

const SECTOR: u64 = 512;
/// Sectors of a thread's half.
const HALF: u64 = 4096;
/// Operations that a child would do if nobody killed it.
const OPERATIONS: u64 = 100_000;

/// What a thread does in its step number `index`: the same in the child and in the test.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    Write { first: u64, count: u64 },
    Zero { first: u64, count: u64 },
    Discard { first: u64, count: u64 },
    Flush,
}

fn step(seed: u64, thread: u64, index: u64) -> Step {
    let mut random = Random(seed ^ thread << 32 ^ index << 40);
    let most = if random.below(4) == 0 { 300 } else { 16 };
    let count = 1 + random.below(most);
    let first = thread * HALF + random.below(HALF - count);
    match random.below(20) {
        0 | 1 => Step::Flush,
        2 | 3 => Step::Discard { first, count },
        4 | 5 => Step::Zero { first, count },
        _ => Step::Write { first, count },
    }
}

/// What a step writes to a sector.
fn content(seed: u64, index: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    Random(seed ^ index << 20 ^ sector << 44 | 1).fill(&mut bytes);
    bytes
}

/// The child: does steps and prints a byte for each, with the thread's number, after it.
fn write_until_killed(path: &Path, seed: u64) {
    let disk = format::open(path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
    let disk = &*disk;
    std::thread::scope(|scope| {
        for thread in 0..2 {
            scope.spawn(move || {
                for index in 0..OPERATIONS {
                    perform(disk, seed, index, step(seed, thread, index));
                    std::io::stderr().write_all(&[b'0' + thread as u8]).unwrap();
                }
            });
        }
    });
}

fn perform(disk: &dyn Disk, seed: u64, index: u64, step: Step) {
    match step {
        Step::Write { first, count } => {
            let sectors = first..first + count;
            let data: Vec<u8> = sectors.flat_map(|sector| content(seed, index, sector)).collect();
            disk.write_at(first * SECTOR, &data).unwrap();
        }
        Step::Zero { first, count } => {
            disk.write_zeroes(first * SECTOR, count * SECTOR).unwrap();
        }
        Step::Discard { first, count } => disk.discard(first * SECTOR, count * SECTOR).unwrap(),
        Step::Flush => disk.flush().unwrap(),
    }
}

/// Runs a child until it has told of `steps`, and kills it; how many each thread told of.
fn run_and_kill(test: &str, path: &Path, seed: u64, steps: u64) -> [u64; 2] {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--quiet"])
        .env("DISK_CRASH_CHILD", path)
        .env("DISK_CRASH_SEED", seed.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = child.stderr.take().unwrap();
    let mut done = [0; 2];
    let mut messages = Vec::new();
    let mut byte = [0];
    let mut killed = false;
    while told.read(&mut byte).unwrap() == 1 {
        match byte[0] {
            digit @ (b'0' | b'1') if messages.is_empty() => done[usize::from(digit - b'0')] += 1,
            other => messages.push(other),
        }
        if !killed && done[0] + done[1] >= steps {
            child.kill().unwrap();
            killed = true;
        }
    }
    let status = child.wait().unwrap();
    let messages = String::from_utf8_lossy(&messages);
    assert!(killed && messages.is_empty(), "the child ended by itself: {status} {messages}");
    done
}

/// What a sector may hold after a thread was killed.
enum Allowed {
    /// What was there before the first step.
    Before,
    Zero,
    Written(u64),
}

/// Checks the half of a thread that told of `done` steps.
fn check_half(disk: &dyn Disk, before: &[u8], seed: u64, thread: u64, done: u64) {
    // What it told of up to its last flush is certain. The rest may be there, and one step more.
    let flushed = (0..done).rev().find(|index| step(seed, thread, *index) == Step::Flush);
    let mut allowed: HashMap<u64, Vec<Allowed>> = HashMap::new();
    for index in 0..=done {
        let certain = flushed.is_some_and(|flushed| index < flushed);
        let (first, count) = match step(seed, thread, index) {
            Step::Flush => continue,
            Step::Write { first, count }
            | Step::Zero { first, count }
            | Step::Discard { first, count } => (first, count),
        };
        for sector in first..first + count {
            let values = allowed.entry(sector).or_insert_with(|| vec![Allowed::Before]);
            let replaces = certain && !matches!(step(seed, thread, index), Step::Discard { .. });
            if replaces {
                values.clear();
            }
            values.push(match step(seed, thread, index) {
                Step::Write { .. } => Allowed::Written(index),
                _ => Allowed::Zero,
            });
        }
    }
    let mut now = [0; SECTOR as usize];
    for sector in thread * HALF..(thread + 1) * HALF {
        disk.read_at(sector * SECTOR, &mut now).unwrap();
        let place = (sector * SECTOR) as usize;
        let original = before.get(place..place + SECTOR as usize).unwrap_or(&[0; 512]);
        let fits = match allowed.get(&sector) {
            None => now == original,
            Some(values) => values.iter().any(|value| match value {
                Allowed::Before => now == original,
                Allowed::Zero => now == [0; SECTOR as usize],
                Allowed::Written(index) => now == content(seed, *index, sector),
            }),
        };
        assert!(fits, "sector {sector} of seed {seed} holds what it must not");
    }
}

fn kills() -> u64 {
    std::env::var("DISK_KILLS").map_or(7, |number| number.parse().unwrap())
}

/// Kills children that write to an image as given, and looks at what they leave.
fn survives_kills(test: &str, options: &CreateOptions) {
    if let Some(path) = std::env::var_os("DISK_CRASH_CHILD") {
        let seed = std::env::var("DISK_CRASH_SEED").unwrap().parse().unwrap();
        return write_until_killed(Path::new(&path), seed);
    }
    let folder = folder();
    let path = folder.path().join("image.qcow2");
    let base = Random(99).bytes(1_500_160);
    fs::write(folder.path().join("base.raw"), &base).unwrap();
    for kill in 0..kills() {
        let seed = kill * 1000 + 17;
        let _ = fs::remove_file(&path);
        Qcow2::create(&path, options, FileOptions::write()).unwrap();
        let done = run_and_kill(test, &path, seed, 1 + Random(seed).below(250));
        // Nothing but leaks, even before anyone repairs it; lazy refcounts are wrong by design.
        let codes = if options.lazy_refcounts { vec![0, 2, 3] } else { vec![0, 3] };
        let check = try_qemu("qemu-img", ["check", path.to_str().unwrap()]);
        assert!(codes.contains(&check.status.code().unwrap()), "{seed}: {check:?}");
        let disk = format::open(&path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
        let before = if options.backing.is_some() { base.as_slice() } else { &[] };
        for thread in 0..2 {
            check_half(&*disk, before, seed, thread, done[thread as usize]);
        }
        drop(disk);
        if options.version == Version::V2 {
            // It has no mark by which to see that it was not closed.
            Qcow2::check(&path, Repair::Leaks, FileOptions::write()).unwrap();
        }
        let check = try_qemu("qemu-img", ["check", path.to_str().unwrap()]);
        assert!(check.status.success(), "{seed}: {check:?}");
    }
}

fn options() -> CreateOptions {
    CreateOptions { cluster_size: 4096, ..CreateOptions::new(2 * HALF * SECTOR) }
}

#[test]
fn an_overlay_survives_being_killed() {
    let backing = BackingName { name: "base.raw".to_owned(), format: Some("raw".to_owned()) };
    let options = CreateOptions { backing: Some(backing), ..options() };
    survives_kills("an_overlay_survives_being_killed", &options);
}

#[test]
fn an_image_with_large_clusters_survives_being_killed() {
    let options = CreateOptions { cluster_size: 64 << 10, ..options() };
    survives_kills("an_image_with_large_clusters_survives_being_killed", &options);
}

#[test]
fn an_image_with_lazy_refcounts_survives_being_killed() {
    let options = CreateOptions { lazy_refcounts: true, ..options() };
    survives_kills("an_image_with_lazy_refcounts_survives_being_killed", &options);
}

#[test]
fn an_image_of_version_2_survives_being_killed() {
    let options = CreateOptions { version: Version::V2, cluster_size: 512, ..options() };
    survives_kills("an_image_of_version_2_survives_being_killed", &options);
}
