//! What the user of a running guest gets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{
    Files, bv, messages, output, prints_and_exits, prints_and_halts, prints_and_resets,
    prints_and_triple_faults, prints_for_ever,
};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty;
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::time::Duration;

#[test]
fn standard_output_is_exactly_what_the_guest_sent() {
    let files = Files::new();
    let every_byte: Vec<u8> = (1..=255).collect();
    let kernel = files.kernel(&prints_and_exits(&every_byte, 0x10));
    let kernel = kernel.to_str().unwrap();
    let output = output(&["run", "--kernel", kernel, "--debug-exit", "--engine", "soft"]);
    assert_eq!(output.status.code(), Some(0x21), "{}", messages(&output));
    assert_eq!(output.stdout, every_byte);
    assert!(output.stderr.is_empty(), "{}", messages(&output));
}

#[test]
fn where_kvm_is_not_used_unasked_one_line_says_why() {
    let files = Files::new();
    let kernel = files.kernel(&prints_and_exits(b"", 0));
    let output = output(&["run", "--kernel", kernel.to_str().unwrap(), "--debug-exit"]);
    let said = messages(&output);
    if vmm::HostKvm::probe().is_hardware_backed() {
        assert_eq!(said, "");
    } else {
        assert!(said.starts_with("bv: using the soft engine: "), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_serial_file_gets_the_output_instead() {
    let files = Files::new();
    let kernel = files.kernel(&prints_and_exits(b"into the file\n", 0));
    let serial = format!("file:{}", files.path("serial").display());
    let kernel = kernel.to_str().unwrap();
    let output = output(&["run", "--kernel", kernel, "--debug-exit", "--serial", &serial]);
    assert_eq!(output.status.code(), Some(1), "{}", messages(&output));
    assert!(output.stdout.is_empty());
    assert_eq!(std::fs::read(files.path("serial")).unwrap(), b"into the file\n");
}

#[test]
fn a_guest_that_resets_ends_with_success_where_it_shall_not_reboot() {
    let files = Files::new();
    let kernel = files.kernel(&prints_and_resets(b"once\n"));
    let output = output(&["run", "--kernel", kernel.to_str().unwrap(), "--no-reboot"]);
    assert_eq!(output.status.code(), Some(0), "{}", messages(&output));
    assert_eq!(output.stdout, b"once\n");
}

#[test]
fn a_guest_that_resets_boots_again_and_a_reader_that_leaves_ends_it() {
    let files = Files::new();
    let kernel = files.kernel(&prints_and_resets(b"again\n"));
    let mut child = bv(&["run", "--kernel", kernel.to_str().unwrap()]).spawn().unwrap();
    let mut text = [0; 18];
    child.stdout.take().unwrap().read_exact(&mut text).unwrap();
    assert_eq!(&text, b"again\nagain\nagain\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_reader_that_leaves_ends_a_guest_that_prints_for_ever() {
    let files = Files::new();
    let kernel = files.kernel(&prints_for_ever(b"and on\n"));
    let mut child = bv(&["run", "--kernel", kernel.to_str().unwrap()]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "and on\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_triple_fault_prints_the_registers_and_fails_where_it_shall_not_reboot() {
    let files = Files::new();
    let kernel = files.kernel(&prints_and_triple_faults(b"bye\n"));
    let output = output(&["run", "--kernel", kernel.to_str().unwrap(), "--no-reboot"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stdout, b"bye\n");
    for word in ["triple fault", "rip 00000000001000", "cr0", "idt", "code at rip: 0f 0b"] {
        assert!(messages(&output).contains(word), "{word} in\n{}", messages(&output));
    }
}

#[test]
fn hello_says_what_it_found_echoes_what_is_typed_and_switches_off() {
    let mut command = bv(&["run", "hello", "--memory", "64MiB", "--cpus", "2", "--engine", "soft"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"how are you\npoweroff\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", messages(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    for word in ["64-bit long mode", "CPUs     2", "64 MiB", "\nhow are you"] {
        assert!(text.contains(word), "{word:?} in\n{text}");
    }
    assert!(output.stderr.is_empty(), "{}", messages(&output));
}

/// A pseudoterminal: the end of the terminal program, and the end of the user's programs.
fn open_pty() -> (OwnedFd, OwnedFd) {
    let controller = pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY).unwrap();
    pty::grantpt(&controller).unwrap();
    pty::unlockpt(&controller).unwrap();
    let name = pty::ptsname(&controller, Vec::new()).unwrap();
    let user = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (controller, user)
}

fn echoes(terminal: &OwnedFd) -> bool {
    tcgetattr(terminal).unwrap().local_modes.contains(LocalModes::ECHO)
}

/// `bv` with a halted guest on a terminal, which is raw by the time this returns.
fn on_a_terminal(files: &Files, user: &OwnedFd) -> Child {
    let kernel = files.kernel(&prints_and_halts(b"up\n"));
    let mut child = bv(&["run", "--kernel", kernel.to_str().unwrap()])
        .stdin(user.try_clone().unwrap())
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    assert_eq!(&up, b"up\n");
    assert!(!echoes(user));
    child
}

#[test]
fn the_escape_key_leaves_and_the_terminal_is_restored() {
    let files = Files::new();
    let (controller, user) = open_pty();
    let child = on_a_terminal(&files, &user);
    let mut keyboard = File::from(controller);
    keyboard.write_all(b"typed\x1d").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", messages(&output));
    assert!(messages(&output).contains("leave with Ctrl-]"), "{}", messages(&output));
    assert!(echoes(&user));
}

#[test]
fn signals_ask_the_guest_first_then_stop_it_and_the_terminal_is_restored() {
    let files = Files::new();
    let (_controller, user) = open_pty();
    let mut child = on_a_terminal(&files, &user);
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::TERM).unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("asked the guest to switch off") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "bv ended without a word");
    }
    // A signal at once counts as the same request, so this goes on until one counts.
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        kill_process(pid, Signal::INT).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(1));
    assert!(echoes(&user));
}
