//! Compiles `main.rs` once more as a static program, which runs in a guest without libraries.
use std::path::PathBuf;
use std::process::{Command, exit};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("exercise");
    let mut command = Command::new(rustc);
    command
        .args(["--edition", "2024", "--crate-name", "exercise", "--crate-type", "bin"])
        .args(["--target", TARGET, "-C", "target-feature=+crt-static"])
        .args(["-C", "opt-level=2", "-C", "strip=symbols", "src/main.rs", "-o"])
        .arg(output);
    if let Some(linker) = std::env::var_os("RUSTC_LINKER") {
        command.arg("-C").arg(format!("linker={}", linker.display()));
    }
    let fault = match command.output() {
        Ok(output) if output.status.success() => return,
        Ok(output) => format!(
            "exercise cannot be compiled as a static program, which needs the target {TARGET} \
             and the C library's static form (Debian: apt install libc6-dev): {}",
            String::from_utf8_lossy(&output.stderr).replace('\n', " ")
        ),
        Err(error) => format!("rustc cannot be run: {error}"),
    };
    println!("cargo::error={fault}");
    exit(1);
}
