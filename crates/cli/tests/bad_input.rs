//! Bad input gets status 2, and a message that names the flag or file and the fix.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Files, messages, output, prints_and_halts};

/// Runs `bv run` with a good kernel, a serial file and these arguments, and checks that it
/// refuses them with all these words.
#[track_caller]
fn refused(arguments: &[&str], words: &[&str]) {
    let files = Files::new();
    let kernel = files.kernel(&prints_and_halts(b""));
    let serial = format!("--serial=file:{}", files.path("serial").display());
    let mut all = vec!["run", "--kernel", kernel.to_str().unwrap(), &serial];
    all.extend(arguments);
    refused_alone(&all, words);
    assert!(!files.path("serial").exists(), "{arguments:?} left a file behind");
}

#[track_caller]
fn refused_alone(arguments: &[&str], words: &[&str]) {
    let output = output(arguments);
    let message = messages(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
    assert!(output.stdout.is_empty(), "{arguments:?}: standard output is the guest's");
    for word in words {
        assert!(message.contains(word), "{arguments:?}: `{word}` in:\n{message}");
    }
}

#[test]
fn a_memory_that_is_not_a_size_is_refused_with_an_example() {
    refused(&["--memory", "12x"], &["--memory", "not a size: 12x", "512MiB"]);
    refused(&["--memory", ""], &["--memory", "512MiB"]);
}

#[test]
fn a_memory_that_cannot_be_is_refused_with_its_limit() {
    refused(&["--memory", "4KiB"], &["--memory", "4KiB is too small", "at least"]);
    refused(&["--memory", "1000TiB"], &["--memory", "more than this host's", "ask for less"]);
    refused(&["--memory", "16777217"], &["--memory", "multiple of 4KiB"]);
}

#[test]
fn a_folder_that_cannot_be_shared_is_refused_with_the_fix() {
    refused(&["--mount", "src"], &["--mount", "HOST:GUEST", "~/src:/src"]);
    refused(&["--mount", "/tmp:src"], &["--mount", "\"src\"", "absolute path like /src"]);
    let missing = &["--mount", "/no/such/folder cannot be shared", "give a folder that exists"];
    refused(&["--mount", "/no/such/folder:/src"], missing);
    refused(&["--mount", "/proc:/host"], &["--mount", "/proc is a procfs"]);
}

#[test]
fn sockets_and_balloons_that_cannot_be_are_refused_with_the_fix() {
    refused(&["--vsock", "s,cid=x"], &["--vsock", "vm.sock,cid=3"]);
    refused(&["--vsock", "s,cid=2"], &["--vsock", "2 is no address of a guest", "from 3"]);
    refused(&["--vsock", "/no/such/s"], &["--vsock", "cannot listen at /no/such/s"]);
    refused(&["--balloon", "much"], &["--balloon", "512MiB"]);
}

#[test]
fn a_number_of_cpus_that_cannot_be_is_refused_with_the_limit() {
    refused(&["--cpus", "0"], &["--cpus: 0", "1 to"]);
    refused(&["--cpus", "100000"], &["--cpus: 100000", "1 to"]);
    refused(&["--cpus", "many"], &["--cpus"]);
}

#[test]
fn a_cpu_that_is_no_model_is_refused_with_all_that_are() {
    let models = "host, x86-64-v2, x86-64-v3 or x86-64-v4";
    refused(&["--cpu", "pentium"], &["--cpu", "not a CPU model: pentium", models]);
    refused(&["--cpu", ""], &["--cpu", models]);
}

#[test]
fn a_cpu_that_the_engine_lacks_is_refused_by_feature_before_anything_is_loaded() {
    let words = ["--cpu: the soft engine", "lacks ", "avx512f", "avx512vl, which x86-64-v4 needs"];
    refused(&["--engine", "soft", "--cpu", "x86-64-v4"], &words);
    // Nor is a kernel looked for.
    let missing = ["run", "--kernel", "no-such-kernel", "--engine=soft", "--cpu=x86-64-v4"];
    refused_alone(&missing, &["--cpu", "or host"]);
}

#[test]
fn a_kernel_that_is_none_is_refused_by_name() {
    let files = Files::new();
    let missing = files.path("missing");
    let empty = files.write("empty", b"");
    let letter = files.write("letter.txt", b"Dear reader, this is not a kernel.\n");
    let folder = files.path("");
    for (path, word) in [
        (missing, "not found"),
        (empty, "is empty"),
        (letter, "not a kernel"),
        (folder, "directory"),
    ] {
        let path = path.to_str().unwrap();
        refused_alone(&["run", "--kernel", path], &["bv: error:", path, word]);
    }
}

#[test]
fn files_beside_the_kernel_are_refused_by_name() {
    refused(&["--module", "no-such-module root=1"], &["no-such-module: not found"]);
    refused(&["--initrd", "no-such-initrd"], &["no-such-initrd: not found"]);
}

#[test]
fn a_serial_console_to_nowhere_is_refused() {
    refused_alone(&["run", "hello", "--serial", "printer"], &["--serial", "file:PATH"]);
    refused_alone(&["run", "hello", "--serial", "file:"], &["--serial", "file:PATH"]);
    let path = "no-such-folder/serial.log";
    let argument = format!("file:{path}");
    refused_alone(&["run", "hello", "--serial", &argument], &["--serial", path, "write"]);
}

#[test]
fn a_disk_that_cannot_be_is_refused_by_name() {
    refused(&["--disk", "no-such.qcow2"], &["--disk", "no-such.qcow2"]);
    refused(&["--disk", "x,cache=none"], &["--disk", "cache=none", "format=NAME"]);
    refused(&["--disk", "size=huge"], &["--disk", "size"]);
    let files = Files::new();
    let raw = files.write("raw.img", &[0; 4096]);
    let raw = raw.to_str().unwrap();
    refused(&["--disk", raw], &["--disk", raw, "raw"]);
    let named = format!("{raw},format=qcow2");
    refused(&["--disk", &named], &["--disk", raw, "qcow2"]);
    let twice = ["--disk", &format!("{raw},format=raw"), "--disk", &format!("{raw},format=raw")];
    refused(&twice, &["--disk", raw, "in use"]);
}

#[test]
fn a_network_that_cannot_be_is_refused_with_what_can() {
    refused(&["--network", "wifi"], &["--network", "nat", "none"]);
    refused(&["--publish", "80"], &["--publish", "8080:80"]);
    refused(&["--network", "none", "-p", "8080:80"], &["--publish", "no network"]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    refused(&["-p", &format!("{port}:80")], &["--network nat", &port.to_string(), "in use"]);
}

#[test]
fn flags_that_do_not_go_together_are_refused() {
    refused_alone(&["run", "hello", "--kernel", "bzImage"], &["--kernel"]);
    refused_alone(&["run", "--initrd", "initrd.cpio"], &["--kernel"]);
    refused_alone(&["run", "goodbye"], &["goodbye", "debian:12"]);
    refused_alone(&["run", "--engine", "steam"], &["--engine", "soft"]);
    refused_alone(&["walk"], &["walk", "help"]);
}

#[test]
fn a_cache_that_cannot_be_made_is_refused_before_any_download() {
    let files = Files::new();
    let occupied = files.write("occupied", b"a file, not a folder");
    let output = common::bv(&["run"]).env("XDG_CACHE_HOME", &occupied).output().unwrap();
    let message = messages(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("occupied"), "{message}");
}

#[test]
fn the_version_and_the_help_with_examples_are_printed() {
    let version = output(&["--version"]);
    assert_eq!(version.status.code(), Some(0));
    assert!(version.stdout.starts_with(b"bv "));
    let help = output(&["run", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(help.contains("Examples:") && help.contains("Ctrl-]"), "{help}");
}
