//! Looking into a state: every leaf by its path, as in `segments.cs.base`.
use alloc::format;
use alloc::vec::Vec;
use core::fmt;

/// The value of a leaf.
#[derive(Clone, PartialEq, Eq)]
pub enum Value {
    /// A number or a register of up to 64 bits.
    Number(u64),
    /// A wider register, least significant byte first.
    Bytes(Vec<u8>),
    /// One of a few named states.
    Word(&'static str),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number:#x}"),
            Self::Bytes(bytes) => {
                f.write_str("0x")?;
                bytes.iter().rev().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
            Self::Word(word) => f.write_str(word),
        }
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Something with leaves.
pub trait Inspect {
    /// Calls `visit` with the path and value of each leaf; `path` is that of `self`.
    fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value));
}

macro_rules! numbers {
    ($($type:ty),*) => { $(
        impl Inspect for $type {
            fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
                visit(path, Value::Number(u64::from(*self)));
            }
        }
    )* };
}
numbers!(bool, u8, u16, u32, u64);

impl<T: Inspect, const N: usize> Inspect for [T; N] {
    fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
        for (n, part) in self.iter().enumerate() {
            part.inspect(&format!("{path}[{n}]"), visit);
        }
    }
}

/// Derives [`Inspect`] for a structure from the list of its fields; the compiler refuses a list
/// that is not complete.
macro_rules! fields {
    ($type:ident { $($field:ident),* $(,)? }) => {
        impl $crate::state::Inspect for $type {
            fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, $crate::state::Value)) {
                let Self { $($field),* } = self;
                $( $field.inspect(&alloc::format!("{path}.{}", stringify!($field)), visit); )*
            }
        }
    };
}
pub(crate) use fields;

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn wide_registers_read_as_one_number() {
        assert_eq!(Value::Bytes(alloc::vec![0x34, 0x12, 0]).to_string(), "0x001234");
        assert_eq!(Value::Number(16).to_string(), "0x10");
    }
}
