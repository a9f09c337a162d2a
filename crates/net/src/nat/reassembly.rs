//! Datagrams that the guest sends in fragments (RFC 791 §3.2, RFC 8200 §4.5).
use crate::wire::ip::{Fragment, Ip, Pair};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Datagrams under way; one more takes the place of the oldest.
const MOST: usize = 16;
/// Fragments of one; a datagram of the largest size in fragments of 1280 bytes has 54.
const MOST_FRAGMENTS: usize = 128;
/// No datagram's payload is larger.
const LARGEST: usize = 65_535;
/// Seconds of patience (RFC 8200 §4.5).
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Partial {
    addresses: Pair,
    protocol: u8,
    id: u32,
    begun: Instant,
    bytes: Vec<u8>,
    /// What was received: begin and end.
    ranges: Vec<(usize, usize)>,
    /// Known once the last fragment has come.
    total: Option<usize>,
}

/// Datagrams of which some fragments have come.
#[derive(Debug, Default)]
pub(crate) struct Reassembly {
    partial: VecDeque<Partial>,
}

impl Reassembly {
    /// Takes a fragment; answers the datagram's protocol and payload if it was the last to come.
    pub fn add(&mut self, ip: &Ip<'_>, fragment: Fragment, now: Instant) -> Option<(u8, Vec<u8>)> {
        self.partial.retain(|partial| now.saturating_duration_since(partial.begun) < PATIENCE);
        let end = fragment.offset + ip.payload.len();
        if end > LARGEST
            || ip.payload.is_empty()
            || (fragment.more && !ip.payload.len().is_multiple_of(8))
        {
            return None;
        }
        let is_same = |partial: &Partial| {
            partial.addresses == ip.addresses
                && partial.id == fragment.id
                && partial.protocol == ip.protocol
        };
        let index = match self.partial.iter().position(is_same) {
            Some(index) => index,
            None => {
                if self.partial.len() >= MOST {
                    self.partial.pop_front();
                }
                self.partial.push_back(Partial {
                    addresses: ip.addresses,
                    protocol: ip.protocol,
                    id: fragment.id,
                    begun: now,
                    bytes: Vec::new(),
                    ranges: Vec::new(),
                    total: None,
                });
                self.partial.len() - 1
            }
        };
        match self.partial.get_mut(index)?.add(fragment, ip.payload) {
            Step::Wait => None,
            Step::Broken => {
                self.partial.remove(index);
                None
            }
            Step::Whole => {
                let whole = self.partial.remove(index)?;
                Some((whole.protocol, whole.bytes))
            }
        }
    }
}

/// What a fragment made of its datagram.
enum Step {
    Wait,
    Whole,
    /// It contradicts another: the datagram is given up (RFC 5722).
    Broken,
}

impl Partial {
    fn add(&mut self, fragment: Fragment, payload: &[u8]) -> Step {
        let (begin, end) = (fragment.offset, fragment.offset + payload.len());
        if self.ranges.contains(&(begin, end)) {
            return Step::Wait;
        }
        let overlaps = self.ranges.iter().any(|range| begin < range.1 && range.0 < end);
        let beyond = self.total.is_some_and(|total| end > total || !fragment.more);
        if overlaps || beyond || self.ranges.len() >= MOST_FRAGMENTS {
            return Step::Broken;
        }
        if !fragment.more {
            if self.bytes.len() > end {
                return Step::Broken;
            }
            self.total = Some(end);
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        if let Some(place) = self.bytes.get_mut(begin..end) {
            place.copy_from_slice(payload);
        }
        self.ranges.push((begin, end));
        let have: usize = self.ranges.iter().map(|range| range.1 - range.0).sum();
        if self.total == Some(have) { Step::Whole } else { Step::Wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ip::UDP;

    fn add(
        reassembly: &mut Reassembly,
        now: Instant,
        id: u32,
        offset: usize,
        payload: &[u8],
        more: bool,
    ) -> Option<Vec<u8>> {
        let fragment = Fragment { id, offset, more };
        let ip = Ip {
            addresses: Pair::V4 { source: [10, 0, 2, 15].into(), destination: [1; 4].into() },
            protocol: UDP,
            hops: 64,
            fragment: Some(fragment),
            payload,
            packet: payload,
        };
        reassembly.add(&ip, fragment, now).map(|(_, bytes)| bytes)
    }

    #[test]
    fn fragments_in_any_order_make_the_datagram() {
        let (mut reassembly, now) = (Reassembly::default(), Instant::now());
        assert_eq!(add(&mut reassembly, now, 1, 16, b"end", false), None);
        assert_eq!(add(&mut reassembly, now, 1, 8, b"89abcdef", true), None);
        assert_eq!(add(&mut reassembly, now, 1, 8, b"89abcdef", true), None);
        let whole = add(&mut reassembly, now, 1, 0, b"01234567", true).unwrap();
        assert_eq!(whole, b"0123456789abcdefend");
    }

    #[test]
    fn overlaps_endless_fragments_and_old_ones_are_given_up() {
        let (mut reassembly, now) = (Reassembly::default(), Instant::now());
        assert_eq!(add(&mut reassembly, now, 1, 0, &[1; 16], true), None);
        assert_eq!(add(&mut reassembly, now, 1, 8, &[2; 16], true), None);
        assert_eq!(reassembly.partial.len(), 0, "an overlap ends it");
        assert_eq!(add(&mut reassembly, now, 2, 65_528, &[1; 16], true), None);
        for id in 0..1000 {
            add(&mut reassembly, now, id, 65_520, &[1; 8], true);
        }
        assert_eq!(reassembly.partial.len(), MOST);
        add(&mut reassembly, now + PATIENCE, 5000, 0, &[1; 8], true);
        assert_eq!(reassembly.partial.len(), 1);
    }
}
