//! What the tests of this crate share: QEMU's tools, temporary folders, random numbers.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

pub mod fuzz;
mod random;

pub use random::Random;

use disk::{Disk, ExtentKind};
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::OnceLock;

/// A folder that goes away, on the disk that is built on: `/tmp` may be in memory, which has other
/// limits and powers.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Sees to it that `qemu-img` and `qemu-io` are there: installs them as root, or fails with the
/// command that does.
fn install_qemu_tools() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        let there = |program| Command::new(program).arg("--version").output().is_ok();
        if there("qemu-img") && there("qemu-io") {
            return;
        }
        let command = "apt-get update && apt-get install -y --no-install-recommends qemu-utils";
        // One installer at a time: apt refuses a second one.
        let lock = std::fs::File::create(Path::new(env!("CARGO_TARGET_TMPDIR")).join("apt.lock"));
        let lock = lock.unwrap();
        lock.lock().unwrap();
        if !(there("qemu-img") && there("qemu-io")) && rustix::process::getuid().is_root() {
            let _ = Command::new("sh").args(["-c", command]).output();
        }
        assert!(
            there("qemu-img") && there("qemu-io"),
            "these tests compare with QEMU's tools; run `sudo sh -c '{command}'`"
        );
    });
}

/// Runs one of QEMU's tools to its end, whatever its exit status.
pub fn try_qemu<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Output {
    install_qemu_tools();
    Command::new(program).args(arguments).output().unwrap()
}

/// A command of one of QEMU's tools, for a test that talks to it.
pub fn qemu_command(program: &str) -> Command {
    install_qemu_tools();
    Command::new(program)
}

/// Runs one of QEMU's tools, which must succeed; what it printed.
pub fn qemu<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> String {
    let output = try_qemu(program, arguments);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} failed: {printed}{errors}");
    printed
}

/// A disk beside what it should hold.
pub struct Model {
    pub bytes: Vec<u8>,
}

impl Model {
    /// Does one random operation on both, and compares what is read.
    pub fn step(&mut self, disk: &dyn Disk, random: &mut Random) {
        let size = self.bytes.len() as u64;
        let unit = [512, 4096, disk.unit()][random.below(3) as usize].min(size);
        let offset = random.below(size / unit) * unit;
        let most = ((4 << 20) / unit).clamp(2, 12);
        let length = ((random.below(most) + 1) * unit).min(size - offset);
        let range = offset as usize..(offset + length) as usize;
        match random.below(12) {
            0..5 => {
                random.fill(&mut self.bytes[range.clone()]);
                disk.write_at(offset, &self.bytes[range]).unwrap();
            }
            5..8 => {
                let mut read = vec![0xaa; range.len()];
                disk.read_at(offset, &mut read).unwrap();
                assert!(read == self.bytes[range], "{offset} + {length} reads wrong");
            }
            8 => {
                disk.write_zeroes(offset, length).unwrap();
                self.bytes[range].fill(0);
            }
            9 => {
                disk.discard(offset, length).unwrap();
                // It may have become zeroes or not, sector by sector, but nothing else.
                let mut now = vec![0xaa; range.len()];
                disk.read_at(offset, &mut now).unwrap();
                for (sector, old) in now.chunks(512).zip(self.bytes[range.clone()].chunks(512)) {
                    assert!(sector == old || sector.iter().all(|byte| *byte == 0));
                }
                self.bytes[range].copy_from_slice(&now);
            }
            10 => {
                let extent = disk.extent(offset, length).unwrap();
                assert!(extent.length > 0 && extent.length <= length);
                let part = &self.bytes[range.start..range.start + extent.length as usize];
                assert!(extent.kind == ExtentKind::Data || part.iter().all(|byte| *byte == 0));
            }
            _ => disk.flush().unwrap(),
        }
    }

    /// Compares everything.
    pub fn compare(&self, disk: &dyn Disk) {
        assert_eq!(disk.size(), self.bytes.len() as u64);
        let mut read = vec![0xaa; self.bytes.len()];
        for (index, chunk) in read.chunks_mut(1 << 20).enumerate() {
            disk.read_at((index as u64) << 20, chunk).unwrap();
        }
        let differs = read.iter().zip(&self.bytes).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the disk differs there");
    }

    /// Has QEMU compare an image with it, and check its metadata if it can check that format's.
    pub fn compare_with_qemu(&self, folder: &Path, image: &Path, format: &str) {
        let raw = folder.join("model.raw");
        std::fs::write(&raw, &self.bytes).unwrap();
        let (raw, image) = (raw.to_str().unwrap(), image.to_str().unwrap());
        qemu("qemu-img", ["compare", "-f", format, "-F", "raw", image, raw]);
        if !["raw", "vpc"].contains(&format) {
            qemu("qemu-img", ["check", "-f", format, image]);
        }
    }
}
