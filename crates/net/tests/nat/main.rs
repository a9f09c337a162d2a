//! The NAT with a guest on the one side, which is smoltcp's stack, and sockets of this host on the
//! other.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bulk;
mod connections;
mod datagrams;
mod forwards;
mod fuzz;
mod guest;
mod hostile;
mod link;
