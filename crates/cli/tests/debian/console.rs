//! `bv run`, as a person at a terminal has it.

use crate::guest::{Output, debian};
use rustix::fs::{Mode, OFlags};
use rustix::pty;
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};

/// `bv run` on a pseudoterminal, killed when dropped.
struct Terminal {
    keyboard: File,
    screen: Output,
    user: OwnedFd,
    /// The settings before `bv` began.
    before: String,
    child: Child,
}

impl Terminal {
    fn bv_run() -> Self {
        // A progress bar has its own tests; this is about what comes after.
        debian();
        let controller = pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY).unwrap();
        pty::grantpt(&controller).unwrap();
        pty::unlockpt(&controller).unwrap();
        let name = pty::ptsname(&controller, Vec::new()).unwrap();
        let user = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let before = settings(&user);
        let stream = || user.try_clone().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_bv"))
            .arg("run")
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .spawn()
            .unwrap();
        let screen = Output::new(controller.try_clone().unwrap());
        Self { keyboard: controller.into(), screen, user, before, child }
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for the prompt, which the terminal by then shows unchanged.
    fn prompt(&mut self) {
        self.screen.wait_for("# ");
        assert!(!tcgetattr(&self.user).unwrap().local_modes.contains(LocalModes::ECHO));
    }

    /// Waits for the end of `bv`, which must be a success and leave the terminal as it was.
    fn ended_well(mut self) {
        let status = self.screen.while_open(|| self.child.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{}", self.screen.text());
        assert_eq!(settings(&self.user), self.before);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn settings(terminal: &OwnedFd) -> String {
    format!("{:?}", tcgetattr(terminal).unwrap())
}

#[test]
fn bv_run_gives_a_shell_and_control_bracket_leaves_it() {
    let mut terminal = Terminal::bv_run();
    terminal.screen.wait_for("leave with Ctrl-]\r\n");
    terminal.prompt();
    terminal.press("echo $((6*7))\r");
    // The keys come back first, then the answer.
    terminal.screen.wait_for("echo $((6*7))\r\n42\r\n");
    terminal.prompt();
    // Ctrl-C is the guest's: it ends what runs there, and no more. The program itself says that
    // it runs, because the shell forgets a Ctrl-C that comes while it starts one.
    terminal.press("sh -c 'echo run\"\"ning; sleep 1000'\r");
    terminal.screen.wait_for("running\r\n");
    terminal.press("\x03");
    terminal.prompt();
    terminal.press("echo status $?\r");
    terminal.screen.wait_for("status 130\r\n");
    terminal.press("\x1d");
    terminal.screen.wait_for("left; the machine was stopped");
    terminal.ended_well();
}

#[test]
fn poweroff_typed_in_the_shell_of_bv_run_ends_it() {
    let mut terminal = Terminal::bv_run();
    terminal.prompt();
    terminal.press("poweroff\r");
    terminal.ended_well();
}
