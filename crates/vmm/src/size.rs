//! Sizes in bytes, as people write them.
use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// The units that sizes are written in, largest first; each counts in powers of 1024, in its
/// short form too, as every virtual machine monitor does for memory.
const UNITS: [(&str, &str, u32); 4] =
    [("TiB", "T", 40), ("GiB", "G", 30), ("MiB", "M", 20), ("KiB", "K", 10)];

impl Bytes {
    /// A number of mebibytes.
    pub const fn mib(count: u32) -> Self {
        Self((count as u64) << 20)
    }
}

/// A text that is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a size: {0}; write it like 512MiB or 2GiB")]
pub struct NotASize(String);

impl FromStr for Bytes {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let error = || NotASize(if text.is_empty() { "(empty)".into() } else { text.into() });
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let shift = match unit.trim_start_matches(' ') {
            "" | "B" => 0,
            unit => UNITS
                .iter()
                .find(|(long, short, _)| {
                    unit.eq_ignore_ascii_case(long) || unit.eq_ignore_ascii_case(short)
                })
                .map(|(_, _, shift)| *shift)
                .ok_or_else(error)?,
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for Bytes {
    /// In the largest unit that leaves no remainder, so that parsing gives the same value back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, _, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift)) {
            Some((long, _, shift)) => write!(f, "{}{long}", self.0 >> shift),
            None => write!(f, "{}B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_long_and_short_units_and_in_plain_bytes() {
        for (text, bytes) in [
            ("512MiB", 512 << 20),
            ("512M", 512 << 20),
            ("1GiB", 1 << 30),
            ("2g", 2 << 30),
            ("64 KiB", 64 << 10),
            ("4096", 4096),
            ("17B", 17),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_an_example_of_one() {
        for text in ["", "12x", "MiB", "-1", "1.5GiB", "0x1000", "99999999999TiB", "1 GiB extra"] {
            let error = text.parse::<Bytes>().unwrap_err().to_string();
            assert!(error.contains("not a size") && error.contains("512MiB"), "{text}: {error}");
        }
    }

    #[test]
    fn a_printed_size_reads_back_as_itself() {
        for bytes in [0, 1, 4095, 4096, 3 << 20, 512 << 20, 5 << 30, u64::MAX] {
            assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }
        assert_eq!(Bytes::mib(512).to_string(), "512MiB");
    }
}
