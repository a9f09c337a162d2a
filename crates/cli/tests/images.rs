//! `bv image`: what users see of the images that they have.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Files, bv, messages};
use std::process::Output;

/// Runs `bv image` with a store of its own.
fn image(files: &Files, arguments: &[&str]) -> Output {
    let mut command = bv(&["image"]);
    command.args(arguments).env("XDG_DATA_HOME", files.path("data")).output().unwrap()
}

#[track_caller]
fn done(files: &Files, arguments: &[&str]) -> (String, String) {
    let output = image(files, arguments);
    let messages = messages(&output);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {messages}");
    (String::from_utf8(output.stdout).unwrap(), messages)
}

#[track_caller]
fn refused(files: &Files, arguments: &[&str], words: &[&str]) {
    let output = image(files, arguments);
    let messages = messages(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {messages}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    for word in words {
        assert!(messages.contains(word), "{arguments:?}: `{word}` in:\n{messages}");
    }
}

#[test]
fn an_image_is_imported_listed_and_removed() {
    let files = Files::new();
    let disk = files.write("my.img", &[7; 1_500_000]);
    let disk = disk.to_str().unwrap();
    let (_, message) = done(&files, &["import", disk, "mine:1", "--format", "raw"]);
    assert!(message.contains("mine:1 is there"), "{message}");
    let (table, _) = done(&files, &["ls"]);
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("NAME    ID "), "{table}");
    let line = lines.next().unwrap();
    assert!(
        line.starts_with("mine:1  ") && line.contains("  raw     1 MB     just now"),
        "{table}"
    );
    assert!(line.ends_with("imported from my.img"), "{table}");
    refused(&files, &["import", disk, "mine:1", "--format", "raw"], &["already", "bv image rm"]);
    let (_, message) = done(&files, &["rm", "mine:1"]);
    assert!(message.contains("removed mine:1, 1 MB"), "{message}");
    assert_eq!(done(&files, &["ls"]).0.lines().count(), 1);
}

#[test]
fn the_catalogue_lists_what_can_be_had() {
    let files = Files::new();
    let (table, _) = done(&files, &["ls", "--available"]);
    assert!(table.contains("debian:12  no    debian, debian:bookworm  Debian 12"), "{table}");
}

#[test]
fn what_cannot_be_is_refused_with_the_way_out() {
    let files = Files::new();
    let disk = files.write("disk", &[0; 4096]);
    let disk = disk.to_str().unwrap();
    refused(&files, &["pull", "debain:12"], &["no image debain:12", "debian:12"]);
    refused(&files, &["pull", "../x"], &["cannot be an image's name"]);
    refused(&files, &["rm", "debian:12"], &["no image debian:12 here", "ls --available"]);
    refused(&files, &["import", disk, "x"], &["--format raw"]);
    refused(&files, &["import", disk, "x", "--format", "floppy"], &["raw, qcow2"]);
    refused(&files, &["import", disk, "X"], &["lower-case"]);
    refused(&files, &["import", disk, "x", "--kernel", "k"], &["--cmdline"]);
    refused(&files, &["rm"], &["NAME"]);
    refused(&files, &["import", "no-such-disk", "x"], &["no-such-disk: cannot read the file"]);
}

#[test]
fn prune_removes_all_only_when_told_to() {
    let files = Files::new();
    let disk = files.write("disk", &[1; 9000]);
    done(&files, &["import", disk.to_str().unwrap(), "x", "--format", "raw"]);
    assert!(done(&files, &["prune"]).1.contains("removed 0 images, 0 kB"));
    assert!(done(&files, &["prune", "--all"]).1.contains("removed 1 image, "));
}
