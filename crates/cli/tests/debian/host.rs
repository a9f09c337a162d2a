//! The host as the measure: the same busybox and program, run without a virtual machine.

use crate::guest::debian;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

/// All that `script` prints on the host.
pub fn on_the_host(folder: &Path, script: &str) -> String {
    let (programs, work) = (folder.join("bin"), folder.join("work"));
    fs::create_dir(&programs).unwrap();
    fs::create_dir(&work).unwrap();
    let busybox = programs.join("busybox");
    fs::copy(debian().busybox, &busybox).unwrap();
    fs::set_permissions(&busybox, Permissions::from_mode(0o755)).unwrap();
    symlink(exercise_guest::PATH, programs.join("exercise")).unwrap();
    let mut install = Command::new(&busybox);
    install.args(["--install", "-s"]).arg(&programs);
    assert!(install.status().unwrap().success());
    let path = folder.join("exercise.sh");
    // Both streams into one pipe, in the order in which they are written, as in the guest.
    fs::write(&path, format!("exec 2>&1\n{script}")).unwrap();
    let output = Command::new(programs.join("sh"))
        .arg(&path)
        .env_clear()
        .env("PATH", &programs)
        .current_dir(&work)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.stderr.is_empty() && output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}
