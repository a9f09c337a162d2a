//! A Debian guest in a `bv` of its own, read and written through its serial port.

use image::initramfs::Builder;
use image::{Cache, Progress, Stage, Step, debian};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Far more than any guest of these tests needs: one that lasts longer hangs.
const HANGS: Duration = Duration::from_secs(120);

/// Says what a test waits for: the first one on a machine fetches Debian.
#[derive(Default)]
struct Stages(Option<Stage>);

impl Progress for Stages {
    fn report(&mut self, step: &Step) {
        if self.0.as_ref() != Some(&step.stage) {
            eprintln!("{}", step.stage);
            self.0 = Some(step.stage.clone());
        }
    }
}

/// Debian's kernel and busybox: from the user's cache, or fetched into it.
pub fn debian() -> debian::Debian {
    debian::prepare(&Cache::open().unwrap(), &mut Stages::default()).unwrap()
}

/// An initramfs that runs a script.
pub fn initramfs(script: &str) -> Builder {
    debian::initramfs(std::fs::read(debian().busybox).unwrap(), script).unwrap()
}

/// A running `bv`, killed when dropped.
pub struct Guest {
    child: Child,
    output: Output,
}

impl Guest {
    /// Boots Debian's kernel with `initramfs`, which is written into `folder`.
    pub fn boot(folder: &Path, initramfs: &Builder, cmdline: &str, arguments: &[&str]) -> Self {
        let initrd = folder.join("initrd");
        std::fs::write(&initrd, initramfs.cpio()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bv"));
        command.args(["run", "--cmdline", cmdline, "--kernel"]).arg(debian().kernel);
        command.arg("--initrd").arg(initrd).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = Output::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    pub fn send(&mut self, text: &str) {
        self.child.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Waits until the guest has written `text` after what was waited for before.
    pub fn wait_for(&mut self, text: &str) {
        self.output.wait_for(text);
    }

    /// The status of `bv` at its end, and the whole serial log.
    pub fn end(&mut self) -> (Option<i32>, String) {
        let (status, bytes) = self.end_with_bytes();
        (status, String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn end_with_bytes(&mut self) -> (Option<i32>, Vec<u8>) {
        self.output.take_all();
        (self.child.wait().unwrap().code(), self.output.bytes.clone())
    }

    /// What `bv` itself said, once it has ended.
    pub fn messages(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a guest writes, collected by a thread so that waiting for it can end.
pub struct Output {
    arrives: Receiver<Vec<u8>>,
    bytes: Vec<u8>,
    /// Up to where the text was waited for.
    seen: usize,
    /// When the guest counts as hanging.
    deadline: Instant,
}

impl Output {
    pub fn new(source: impl Into<std::os::fd::OwnedFd>) -> Self {
        let mut source = File::from(source.into());
        let (sender, arrives) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A pseudoterminal without users gives an error where a pipe gives an end.
            while let Ok(length @ 1..) = source.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { arrives, bytes: Vec::new(), seen: 0, deadline: Instant::now() + HANGS }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// Takes what arrives next; `false` at the end.
    fn take(&mut self) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.arrives.recv_timeout(left) {
            Ok(bytes) => self.bytes.extend(bytes),
            Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => panic!("the guest hangs after:\n{}", self.text()),
        }
        true
    }

    pub fn wait_for(&mut self, text: &str) {
        loop {
            let new = &self.bytes[self.seen..];
            if let Some(at) = new.windows(text.len()).position(|part| part == text.as_bytes()) {
                self.seen += at + text.len();
                return;
            }
            assert!(self.take(), "the guest ended without {text:?}:\n{}", self.text());
        }
    }

    /// Asks again and again for what comes about while the output stays open.
    pub fn while_open<T>(&mut self, mut ask: impl FnMut() -> Option<T>) -> T {
        loop {
            if let Some(answer) = ask() {
                return answer;
            }
            assert!(Instant::now() < self.deadline, "no end after:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
            self.bytes.extend(self.arrives.try_iter().flatten());
        }
    }

    pub fn take_all(&mut self) {
        while self.take() {}
    }
}
