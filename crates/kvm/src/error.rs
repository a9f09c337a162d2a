//! How the host's refusals become errors of the engine.
use engine::EngineError;
use kvm_ioctls::Error as Errno;
use std::io;

/// The host refused `what`.
pub fn refused(what: impl Into<String>) -> impl FnOnce(Errno) -> EngineError {
    let what = what.into();
    move |errno| EngineError::Host { what, source: io_error(errno) }
}

/// KVM refused to give (`verb` "read") or take ("set") an element of a vCPU's state.
pub fn element(verb: &'static str, name: &'static str) -> impl FnOnce(Errno) -> EngineError {
    refused(format!("KVM does not let {name} be {verb}"))
}

/// An errno as the standard library has it.
pub fn io_error(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno.errno())
}
