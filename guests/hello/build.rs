//! Assembles and links the guest with the C compiler driver that Rust itself links with.
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    for input in ["hello.S", "report.S", "console.S", "hello.ld", "build.rs"] {
        println!("cargo::rerun-if-changed={input}");
    }
    println!("cargo::rerun-if-env-changed=CC");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let output = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("hello.elf");
    let status = Command::new(&compiler)
        .args(["-m64", "-nostdlib", "-static", "-no-pie", "-s"])
        .args(["-Wl,--build-id=none", "-Wl,-n", "-Wl,-T,hello.ld", "-o"])
        .arg(&output)
        .args(["hello.S", "report.S", "console.S"])
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("`{compiler}` could not assemble hello.S: {status}")),
        Err(error) => fail(&format!(
            "`{compiler}` cannot be run ({error}); install a C compiler (Debian: apt install gcc) \
             or set CC"
        )),
    }
}

fn fail(message: &str) {
    println!("cargo::error={message}");
    exit(1);
}
