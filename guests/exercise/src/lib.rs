//! The path of `exercise`, a static program for guests: it uses threads, processes, signals,
//! mapped memory, files, sockets and arithmetic, and prints only what must be, so that its
//! output in a guest equals its output on the host.

/// Where the program is, since this crate was built.
pub const PATH: &str = concat!(env!("OUT_DIR"), "/exercise");
