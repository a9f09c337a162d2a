//! What `bv` itself says: on standard error, for standard output is the guest's, or that of commands
//! which are asked for something.
use crate::terminal;
use std::error::Error;
use std::fmt::Write as _;
use std::io::Write as _;

/// Prints a message, one or more lines.
pub fn say(message: &str) {
    let mut text = format!("bv: {message}\n");
    if terminal::is_raw() {
        // The cursor is wherever the guest left it.
        text = format!("\r\n{}", text.replace('\n', "\r\n"));
    }
    // Nobody is left to hear that standard error is gone.
    drop(std::io::stderr().write_all(text.as_bytes()));
}

/// Prints what a command was asked for.
pub fn print(text: &str) {
    // Nobody is left to read it where standard output is gone.
    drop(std::io::stdout().write_all(text.as_bytes()));
}

/// An error and its sources as a short numbered list, each adding a fact.
pub fn chain(error: &dyn Error) -> String {
    let mut text = format!("error: {error}");
    let mut source = error.source();
    let mut number = 1;
    while let Some(error) = source {
        // Writing to a string does not fail.
        let _ = write!(text, "\n  {number}: {error}");
        source = error.source();
        number += 1;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Level(&'static str, #[source] Option<Box<Level>>);

    #[test]
    fn an_error_is_a_numbered_list_of_its_sources() {
        let inner = Level("disk full", None);
        let outer =
            Level("cannot start", Some(Box::new(Level("cannot write", Some(inner.into())))));
        assert_eq!(chain(&outer), "error: cannot start\n  1: cannot write\n  2: disk full");
    }
}
