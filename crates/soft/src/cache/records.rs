//! What is remembered of each block, in few bytes: there are several hundred thousand of them in a
//! full cache, most of them small, so that what is known of code easily outweighs the code.
use super::{BlockId, Key, NONE, Source};
use crate::emit::{EdgeKind, FlagsIn, Position};
use crate::helpers::Helped;
use crate::mode::Mode;
use crate::rewritten::Check;
use crate::translate::flags::Flags;

/// A translated block.
pub struct Block {
    /// Its key, in parts.
    pc: u64,
    physical: u64,
    mode: Mode,
    /// Entry for callers with guest flags in host flags, from the start of the code memory.
    pub(super) entry: u32,
    /// Digest of the guest bytes in its sources.
    pub(super) digest: u64,
    /// What few blocks have.
    rare: Option<Box<Rare>>,
    /// Where its positions and sources begin in the cache's lists; the next block's follow.
    pub(super) positions: u32,
    pub(super) sources: u32,
    /// First of the edges linked to it, [`NONE`] if there is none.
    pub(super) incoming: u32,
    /// Bytes of host code from `entry` on.
    pub(super) code_len: u16,
    /// Entry for callers with guest flags in `Cpu::raw_flags`, from `entry`.
    pub(super) saved_entry: u16,
    /// Flags that must be in their place on entry.
    live_in: u16,
    /// How often a group of accesses could not be served.
    pub(super) splits: u16,
    pub(super) alive: bool,
}

const _: () = assert!(size_of::<Block>() == 64 && size_of::<Edge>() == 40);

/// What few blocks have.
#[derive(Default)]
pub struct Rare {
    /// Guest-physical page that follows, if the block's only instruction crosses into it.
    pub second_page: Option<u64>,
    /// Instructions that helpers execute; translated code holds pointers to them.
    pub instructions: Box<[Helped]>,
    /// What the block compares itself, if it is a version of rewritten code.
    pub checks: Box<[Check]>,
}

impl Rare {
    fn is_empty(&self) -> bool {
        self.second_page.is_none() && self.instructions.is_empty() && self.checks.is_empty()
    }
}

impl Block {
    /// A block without code as yet.
    pub(super) fn new(key: Key, live_in: Flags, digest: u64, rare: Rare) -> Self {
        Self {
            pc: key.pc,
            physical: key.physical,
            mode: key.mode,
            entry: 0,
            digest,
            rare: (!rare.is_empty()).then(|| Box::new(rare)),
            positions: 0,
            sources: 0,
            incoming: NONE,
            code_len: 0,
            saved_entry: 0,
            live_in: arithmetic(live_in),
            splits: 0,
            alive: true,
        }
    }

    /// Its key.
    pub fn key(&self) -> Key {
        Key { pc: self.pc, physical: self.physical, mode: self.mode }
    }

    /// Guest-physical page that follows, if the block's only instruction crosses into it.
    pub fn second_page(&self) -> Option<u64> {
        self.rare.as_ref()?.second_page
    }

    /// What the block compares on entry, if it was made from rewritten code.
    pub fn checks(&self) -> Option<&[Check]> {
        self.rare.as_ref().map(|r| &*r.checks).filter(|c| !c.is_empty())
    }

    /// Flags that must be in their place on entry.
    pub(super) fn live_in(&self) -> Flags {
        self.live_in.into()
    }
}

/// The arithmetic flags lie in the lower 12 bits.
fn arithmetic(flags: Flags) -> u16 {
    debug_assert!(flags <= 0xfff);
    flags as u16
}

/// A direct exit.
#[derive(Clone, Copy)]
pub struct Edge {
    /// Guest address to go to.
    pub target: u64,
    pub kind: EdgeKind,
    pub block: BlockId,
    /// The block it is linked to, and its neighbours in that block's list; [`NONE`] for none.
    pub to: BlockId,
    pub next: u32,
    pub previous: u32,
    /// Where it leaves to the run loop, from the block's entry.
    pub stub: u16,
    live: u16,
}

impl Edge {
    /// An edge that is not linked.
    pub fn new(block: BlockId, target: u64, kind: EdgeKind, stub: u16, live: Flags) -> Self {
        let live = arithmetic(live);
        Self { target, kind, block, to: NONE, next: NONE, previous: NONE, stub, live }
    }

    /// Flags that are in their place when it is taken.
    pub fn live(&self) -> Flags {
        self.live.into()
    }
}

/// A [`Position`] in four bytes.
#[derive(Clone, Copy)]
pub struct PackedPosition {
    /// First host byte, from the block's entry.
    host: u16,
    /// Guest offset in bits 0 to 9, length in 10 to 13, flags in 14, transfer in 15.
    rest: u16,
}

impl PackedPosition {
    /// First host byte, from the block's entry.
    pub fn host(self) -> u32 {
        self.host.into()
    }
}

impl From<Position> for PackedPosition {
    fn from(p: Position) -> Self {
        debug_assert!(p.host <= 0xffff && p.guest <= 0x3ff && p.length <= 15);
        let saved = u16::from(p.flags == FlagsIn::Saved);
        let rest = p.guest & 0x3ff
            | u16::from(p.length & 15) << 10
            | saved << 14
            | u16::from(p.transfer) << 15;
        Self { host: p.host as u16, rest }
    }
}

impl From<PackedPosition> for Position {
    fn from(p: PackedPosition) -> Self {
        Self {
            host: p.host.into(),
            guest: p.rest & 0x3ff,
            length: (p.rest >> 10 & 15) as u8,
            flags: if p.rest >> 14 & 1 != 0 { FlagsIn::Saved } else { FlagsIn::Host },
            transfer: p.rest >> 15 != 0,
        }
    }
}

/// A [`Source`] in eight bytes: the address, and the length less one in the upper 12 bits.
#[derive(Clone, Copy)]
pub struct PackedSource(u64);

impl From<Source> for PackedSource {
    fn from(s: Source) -> Self {
        let len = u64::from(s.len.clamp(1, 4096)) - 1;
        Self(s.start & u64::MAX >> 12 | len << 52)
    }
}

impl From<PackedSource> for Source {
    fn from(p: PackedSource) -> Self {
        Self { start: p.0 & u64::MAX >> 12, len: (p.0 >> 52) as u16 + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_and_a_source_survive_being_packed() {
        for (host, guest, length) in [(0, 0, 1), (0xffff, 0x3ff, 15), (77, 270, 3)] {
            for (flags, transfer) in [(FlagsIn::Host, true), (FlagsIn::Saved, false)] {
                let before = Position { host, guest, length, flags, transfer };
                let after = Position::from(PackedPosition::from(before));
                assert_eq!(format!("{after:?}"), format!("{before:?}"));
            }
        }
        for (start, len) in [(0, 1), (0xf_ffff_ffff_f000, 4096), (0x1234_5678, 271)] {
            let after = Source::from(PackedSource::from(Source { start, len }));
            assert_eq!((after.start, after.len), (start, len));
        }
    }
}
