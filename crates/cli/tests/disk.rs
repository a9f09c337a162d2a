//! `bv disk`, from the command line.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Files, messages, output};
use std::path::Path;

/// Runs `bv disk` with arguments, some of them paths; what it printed.
#[track_caller]
fn disk(arguments: &[&str], status: i32) -> String {
    let all: Vec<&str> = ["disk"].iter().chain(arguments).copied().collect();
    let output = output(&all);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", messages(&output));
    let errors = messages(&output);
    String::from_utf8(output.stdout).unwrap() + &errors
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn an_image_is_made_described_and_found_clean() {
    let files = Files::new();
    let path = files.path("a.qcow2");
    disk(&["create", text(&path), "10GiB"], 0);
    let info = disk(&["info", text(&path)], 0);
    for fact in ["qcow2, version 3", "10GiB (10737418240 bytes)", "64KiB"] {
        assert!(info.contains(fact), "{fact} in {info}");
    }
    assert!(disk(&["check", text(&path)], 0).contains("nothing is wrong"));
}

#[test]
fn a_raw_disk_goes_through_qcow2_and_back_and_stays_sparse() {
    use std::os::unix::fs::MetadataExt;
    let files = Files::new();
    let (raw, image, back) = (files.path("a.raw"), files.path("a.qcow2"), files.path("b.raw"));
    let mut bytes = vec![0; 8 << 20];
    bytes[3 << 20..][..10].copy_from_slice(b"0123456789");
    std::fs::write(&raw, &bytes).unwrap();
    disk(&["convert", "--format", "raw", "--to", "qcow2", text(&raw), text(&image)], 0);
    disk(&["convert", "--to", "raw", text(&image), text(&back)], 0);
    assert!(std::fs::read(&back).unwrap() == bytes);
    for path in [&image, &back] {
        let blocks = std::fs::metadata(path).unwrap().blocks();
        assert!(blocks * 512 < 1 << 20, "{path:?} takes {blocks} blocks");
    }
}

#[test]
fn an_overlay_shows_the_disk_below_it_and_may_be_larger() {
    let files = Files::new();
    let (below, over) = (files.path("below.raw"), files.path("over.qcow2"));
    std::fs::write(&below, vec![7; 1 << 20]).unwrap();
    let backing = ["--backing", text(&below), "--backing-format", "raw"];
    disk(&[&["create", text(&over), "2MiB"], &backing[..]].concat(), 0);
    let info = disk(&["info", text(&over)], 0);
    assert!(info.contains("stands on") && info.contains("below.raw (raw)"), "{info}");
    let whole = files.path("whole.raw");
    disk(&["convert", "--to", "raw", text(&over), text(&whole)], 0);
    let whole = std::fs::read(whole).unwrap();
    assert!(whole[..1 << 20].iter().all(|b| *b == 7) && whole[1 << 20..].iter().all(|b| *b == 0));
}

#[test]
fn a_disk_grows_and_shrinks_only_when_that_is_said() {
    let files = Files::new();
    for format in ["raw", "qcow2"] {
        let path = files.path(format);
        disk(&["create", "--format", format, text(&path), "1MiB"], 0);
        disk(&["resize", "--format", format, text(&path), "4MiB"], 0);
        let info = disk(&["info", "--format", format, text(&path)], 0);
        assert!(info.contains("4MiB"), "{info}");
        let refused = disk(&["resize", "--format", format, text(&path), "2MiB"], 1);
        assert!(refused.contains("--shrink"), "{refused}");
        disk(&["resize", "--shrink", "--format", format, text(&path), "2MiB"], 0);
    }
}

#[test]
fn compacting_gives_back_what_is_zero() {
    let files = Files::new();
    let path = files.path("a.raw");
    std::fs::write(&path, vec![0; 8 << 20]).unwrap();
    let said = disk(&["compact", "--format", "raw", text(&path)], 0);
    assert!(said.contains("8.00 MiB -> 0 B"), "{said}");
}

#[test]
fn a_file_without_a_header_is_not_taken_for_raw_and_nothing_is_overwritten() {
    let files = Files::new();
    let (raw, target) = (files.path("a.img"), files.path("b.qcow2"));
    std::fs::write(&raw, vec![1; 4096]).unwrap();
    let refused = disk(&["info", text(&raw)], 1);
    assert!(refused.contains("--format raw"), "{refused}");
    std::fs::write(&target, b"precious").unwrap();
    let arguments = ["convert", "--format", "raw", "--to", "qcow2", text(&raw), text(&target)];
    let refused = disk(&arguments, 1);
    assert!(refused.contains("exists already"), "{refused}");
    assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    let refused = disk(&["convert", "--to", "iso", text(&raw), text(&files.path("c"))], 2);
    assert!(refused.contains("raw, qcow2, vmdk, vdi, vhd and vhdx"), "{refused}");
}

#[test]
fn a_damaged_image_is_found_out_and_repaired() {
    let files = Files::new();
    let path = files.path("a.qcow2");
    disk(&["create", text(&path), "1MiB"], 0);
    // The first refcount block says that a cluster beyond those in use is in use.
    let mut bytes = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    let free = bytes.len() / 65536;
    bytes[block + 2 * free + 1] = 1;
    bytes.resize((free + 1) * 65536, 0);
    std::fs::write(&path, bytes).unwrap();
    let found = disk(&["check", text(&path)], 3);
    assert!(found.contains("0 errors; 1 cluster in use for nothing"), "{found}");
    assert!(disk(&["check", "--repair=leaks", text(&path)], 0).contains("1 thing was put right"));
    disk(&["check", text(&path)], 0);
}
