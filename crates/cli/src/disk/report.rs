//! What `bv disk info` and `bv disk check` say.
use disk::manage;
use disk::qcow2::{CheckReport, Info, Version};
use std::fmt::Write as _;
use std::path::Path;
use vmm::Bytes;

/// What an image is, a line for each fact.
pub fn describe(path: &Path, info: &manage::Info) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<14} {value}");
    };
    line("image", path.display().to_string());
    match &info.qcow2 {
        Some(qcow2) => line("format", format!("qcow2, version {}", number(qcow2.version))),
        None => line("format", info.format.to_string()),
    }
    line("disk size", exact(info.size));
    line("on the host", rounded(info.allocated));
    if let Some(info) = &info.qcow2 {
        qcow2(info, &mut line);
    }
    text
}

fn qcow2(info: &Info, line: &mut impl FnMut(&str, String)) {
    line("cluster size", exact(info.cluster_size));
    if let Some(backing) = &info.backing {
        // The name is whatever the image's maker wrote.
        let format = backing.format.as_deref().unwrap_or("not said");
        let (name, format) = (backing.name.escape_debug(), format.escape_debug());
        line("stands on", format!("{name} ({format})"));
    }
    line("compression", format!("{:?}", info.compression).to_lowercase());
    if info.lazy_refcounts {
        line("refcounts", "written when it is closed".to_owned());
    }
    if info.corrupt {
        line("state", "marked as corrupt: it can only be read".to_owned());
    } else if info.dirty {
        line("state", "in use, or not closed properly".to_owned());
    }
    for snapshot in &info.snapshots {
        let (id, name) = (snapshot.id.escape_debug(), snapshot.name.escape_debug());
        let state = match snapshot.machine_state {
            0 => String::new(),
            bytes => format!(", with {} of a machine's state", rounded(bytes)),
        };
        line("snapshot", format!("{id} {name}{state}"));
    }
}

/// What a check found.
pub fn checked(path: &Path, report: &CheckReport) -> String {
    let mut text = String::new();
    for error in &report.described {
        let _ = writeln!(text, "error: {error}");
    }
    let path = path.display();
    if report.repaired > 0 {
        let _ = writeln!(
            text,
            "{path}: {} put right",
            count(report.repaired, "thing was", "things were")
        );
    }
    let _ = if report.is_clean() {
        writeln!(
            text,
            "{path}: nothing is wrong; {} in use",
            count(report.used, "cluster", "clusters")
        )
    } else {
        let errors = count(report.errors, "error", "errors");
        let leaks = count(report.leaks, "cluster", "clusters");
        writeln!(
            text,
            "{path}: {errors}; {leaks} in use for nothing; `bv disk check --repair` helps"
        )
    };
    text
}

fn count(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn number(version: Version) -> u8 {
    match version {
        Version::V2 => 2,
        Version::V3 => 3,
    }
}

/// A size in its largest unit, and in bytes where that says more.
fn exact(bytes: u64) -> String {
    match Bytes(bytes).to_string() {
        size if bytes < 1024 => size,
        size => format!("{size} ({bytes} bytes)"),
    }
}

/// A size in the unit that makes it easy to read.
pub fn rounded(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
