//! Translated blocks of one vCPU: finding them, linking them to each other, and throwing them
//! away when the guest changes the code they were made from.
mod links;

use crate::codemem::CodeMemory;
use crate::cpu::CELLS;
use crate::emit::{EdgeKind, Emitted, Position};
use crate::helpers::Helped;
use crate::mode::Mode;
use crate::rewritten::{Check, Rewritten};
use crate::translate::Desk;
use crate::translate::flags::Flags;
use engine::EngineError;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;

pub use links::FarLink;

/// Index of a block in [`CodeCache::blocks`].
pub type BlockId = u32;

/// Under which translated code is found again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// Guest instruction pointer (offset in CS in 16- and 32-bit code).
    pub pc: u64,
    /// Guest-physical address of the first byte.
    pub physical: u64,
    /// Mode for which the code was translated.
    pub mode: Mode,
}

/// Guest-physical bytes on which a block depends.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Guest-physical address.
    pub start: u64,
    /// Bytes, not crossing a page.
    pub len: u16,
}

/// A translated block.
pub struct Block {
    /// Its key.
    pub key: Key,
    /// Guest-physical page that follows, if the block's only instruction crosses into it.
    pub second_page: Option<u64>,
    /// Entry for callers with guest flags in host flags.
    pub entry: u64,
    /// Entry for callers with guest flags in `Cpu::raw_flags`.
    pub saved_entry: u64,
    /// Flags that must be in their place on entry.
    live_in: Flags,
    /// Bytes of host code from `entry` on.
    code_len: u32,
    /// Where its positions and sources are in the cache's lists.
    positions: Range<u32>,
    sources: Range<u32>,
    /// Instructions that helpers execute; translated code holds pointers to them.
    _instructions: Box<[Helped]>,
    /// Digest of the guest bytes in `sources`.
    digest: u64,
    /// What the block compares itself, if it is a version of rewritten code.
    checks: Option<Box<[Check]>>,
    /// First of the edges linked to it, [`NONE`] if there is none.
    incoming: u32,
    /// How often a group of accesses could not be served.
    splits: u32,
    alive: bool,
}

impl Block {
    /// What the block compares on entry, if it was made from rewritten code.
    pub fn checks(&self) -> Option<&[Check]> {
        self.checks.as_deref()
    }
}

/// A block whose groups fail so often is translated anew without them.
const TOO_MANY_SPLITS: u32 = 4096;

/// A direct exit.
#[derive(Clone, Copy)]
struct Edge {
    block: BlockId,
    target: u64,
    kind: EdgeKind,
    stub: u64,
    live: Flags,
    /// The block it is linked to, and its neighbours in that block's list; [`NONE`] for none.
    to: BlockId,
    next: u32,
    previous: u32,
}

/// No block, or no edge.
const NONE: u32 = u32::MAX;

#[derive(Default)]
struct PageCode {
    blocks: Vec<BlockId>,
    /// One bit for each 64 bytes that hold code or were looked at.
    lines: u64,
    /// Writes that hit code since something was last translated here.
    hits: u32,
}

/// Writes to a page with code that hit none of it.
#[derive(Clone, Copy, Default)]
struct Misses {
    /// Since translations of the page were last dropped for that reason.
    count: u32,
    /// How often they were.
    drops: u32,
}

/// After so many writes beside its code, a page is taken to hold data by now, its code being what
/// a former user left; doubled each time that this proves wrong.
const DATA_BY_NOW: u32 = 64;

/// After so many hits at one go the whole page is taken to be filled with other code: all its
/// translations go, and writes to it are fast again.
const REWRITTEN: u32 = 4;

/// The cache counts as full when there is a block for each so many bytes of it: what is known of
/// blocks, dead ones too, takes memory beside their code.
const BYTES_A_BLOCK: u64 = 128;

/// What the translator hands over.
pub struct NewBlock<'a> {
    /// Key.
    pub key: Key,
    /// See [`Block::second_page`].
    pub second_page: Option<u64>,
    /// Code.
    pub emitted: &'a Emitted,
    /// Instructions that helpers execute.
    pub instructions: Box<[Helped]>,
    /// Where the code came from.
    pub sources: &'a [Source],
    /// Digest of those bytes.
    pub digest: u64,
    /// What the block compares itself; empty for others.
    pub checks: Vec<Check>,
}

/// The code cache of one vCPU.
pub struct CodeCache {
    memory: CodeMemory,
    blocks: Vec<Block>,
    edges: Vec<Edge>,
    positions: Vec<Position>,
    sources: Vec<Source>,
    cells: u32,
    map: HashMap<Key, BlockId, BuildHasherDefault<Mix>>,
    pages: HashMap<u64, PageCode, BuildHasherDefault<Mix>>,
    misses: HashMap<u64, Misses, BuildHasherDefault<Mix>>,
    /// Pages that are no longer watched.
    pub rewritten: Rewritten,
    /// Links that are made and depend on translations of global pages.
    far_global: Vec<FarLink>,
    /// Those that depend on others, of the present address space.
    far_local: Vec<FarLink>,
    /// Translated code was invalidated since this was last cleared.
    pub touched: bool,
    /// Blocks whose groups cross pages again and again: they do without.
    ungrouped: HashSet<Key, BuildHasherDefault<Mix>>,
    /// Blocks that look for recent pages in vain again and again: they do without.
    restless: HashSet<Key, BuildHasherDefault<Mix>>,
    /// A block to be thrown away before the next one is entered.
    pub worn_out: Option<BlockId>,
    /// How often everything was thrown away: numbers of blocks and edges are void after it.
    pub flushes: u64,
    /// Pages that other vCPUs may still write to unnoticed, with the number of answers due.
    pub unsure: Vec<(u64, u32)>,
    /// What the translator needs for the next block.
    pub desk: Option<Box<Desk>>,
}

impl CodeCache {
    /// An empty cache of `size` bytes.
    ///
    /// # Errors
    /// The host gives no memory.
    pub fn new(size: usize) -> Result<Self, EngineError> {
        Ok(Self {
            memory: CodeMemory::new(size)?,
            blocks: Vec::new(),
            edges: Vec::new(),
            positions: Vec::new(),
            sources: Vec::new(),
            cells: 0,
            map: HashMap::default(),
            pages: HashMap::default(),
            misses: HashMap::default(),
            rewritten: Rewritten::default(),
            far_global: Vec::new(),
            far_local: Vec::new(),
            touched: false,
            ungrouped: HashSet::default(),
            restless: HashSet::default(),
            worn_out: None,
            flushes: 0,
            unsure: Vec::new(),
            desk: None,
        })
    }

    /// The range of executable host addresses.
    pub fn range(&self) -> (u64, u64) {
        self.memory.range()
    }

    /// Looks a block up.
    pub fn find(&self, key: &Key) -> Option<BlockId> {
        self.map.get(key).copied()
    }

    /// The flags that the block under `key` wants in their place; none if there is no block.
    pub fn live_in(&self, key: &Key) -> Flags {
        self.find(key).and_then(|id| self.block(id)).map_or(0, |b| b.live_in)
    }

    /// A block.
    pub fn block(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id as usize)
    }

    /// The number the next block's first edge will have, and the first free link cell.
    pub fn next_numbers(&self) -> (u32, u32) {
        (self.edges.len() as u32, self.cells)
    }

    /// Takes a block over, or returns `None` when the cache is full and must be cleared first.
    /// `cells` is the vCPU's array of link cells.
    pub fn add(&mut self, new: NewBlock<'_>, cells: &mut [u64; CELLS]) -> Option<BlockId> {
        let NewBlock { key, second_page, emitted, instructions, sources, digest, checks } = new;
        let (start, end) = self.memory.range();
        let most = (end - start) / BYTES_A_BLOCK;
        if self.cells as usize + emitted.cells as usize >= CELLS || self.blocks.len() as u64 >= most
        {
            return None;
        }
        let entry = self.memory.install(emitted.code())?;
        let id = self.blocks.len() as BlockId;
        for spec in emitted.edges() {
            let stub = entry + u64::from(spec.stub);
            if let EdgeKind::Far(cell) = spec.kind
                && let Some(slot) = cells.get_mut(cell as usize)
            {
                *slot = stub;
            }
            self.edges.push(Edge {
                block: id,
                target: spec.target,
                kind: spec.kind,
                stub,
                live: spec.live,
                to: NONE,
                next: NONE,
                previous: NONE,
            });
        }
        self.cells += emitted.cells;
        for source in sources {
            let page = self.pages.entry(source.start & !0xfff).or_default();
            page.lines |= line_mask(source.start, usize::from(source.len));
            page.hits = 0;
            if page.blocks.last() != Some(&id) {
                page.blocks.push(id);
            }
        }
        let checks = (!checks.is_empty()).then(|| checks.into_boxed_slice());
        match &checks {
            Some(checks) => self.rewritten.add(key, id, checks),
            None => self.rewritten.note_translation(key.physical & !0xfff),
        }
        self.blocks.push(Block {
            key,
            second_page,
            entry,
            saved_entry: entry + u64::from(emitted.saved_entry),
            live_in: emitted.live_in,
            code_len: emitted.code().len() as u32,
            positions: append(&mut self.positions, emitted.positions()),
            _instructions: instructions,
            sources: append(&mut self.sources, sources),
            digest,
            checks,
            incoming: NONE,
            splits: 0,
            alive: true,
        });
        self.map.insert(key, id);
        Some(id)
    }

    /// The guest address to which an edge leads.
    pub fn edge_target(&self, edge: u32) -> Option<u64> {
        self.edges.get(edge as usize).map(|e| e.target)
    }

    /// The host address at which an edge leaves.
    pub fn edge_host(&self, edge: u32) -> u64 {
        self.edges.get(edge as usize).map_or(0, |e| e.stub)
    }

    /// A block that was not thrown away.
    pub fn alive(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id as usize).filter(|b| b.alive)
    }

    /// Throws a block away; returns its guest address.
    pub fn kill(&mut self, id: BlockId, cells: &mut [u64; CELLS]) -> Option<u64> {
        let block = self.blocks.get_mut(id as usize).filter(|b| b.alive)?;
        block.alive = false;
        let (key, checked) = (block.key, block.checks.is_some());
        if self.map.get(&key) == Some(&id) {
            self.map.remove(&key);
        }
        if checked {
            self.forget_version(&key, id);
        }
        while let Some(edge) =
            self.blocks.get(id as usize).map(|b| b.incoming).filter(|e| *e != NONE)
        {
            self.unlink(edge, cells);
        }
        self.touched = true;
        Some(key.pc)
    }

    /// Takes a version out of its block's list; another one takes its place in the map.
    fn forget_version(&mut self, key: &Key, id: BlockId) {
        self.rewritten.remove(key, id);
        if let Some(&other) = self.rewritten.versions(key).last() {
            self.map.insert(*key, other);
        }
    }

    /// The blocks to throw away because `len` bytes at guest-physical `start`, within one page,
    /// were written: those that depend on them, or all of a page that is no longer one of code.
    /// `None` where the write changes nothing.
    pub fn affected(&mut self, start: u64, len: usize) -> Option<Vec<BlockId>> {
        let number = start & !0xfff;
        let page = self.pages.get_mut(&number)?;
        let end = start + len as u64;
        let hit = |s: &Source| s.start < end && start < s.start + u64::from(s.len);
        let alive = |id: &&BlockId| self.blocks.get(**id as usize).is_some_and(|b| b.alive);
        let touches = |id: &&BlockId| {
            let block = self.blocks.get(**id as usize);
            block.is_some_and(|b| slice(&self.sources, &b.sources).iter().any(hit))
        };
        let mut affected = Vec::new();
        if page.lines & line_mask(start, len) != 0 {
            affected.extend(page.blocks.iter().filter(alive).filter(touches));
        }
        let rewritten = if affected.is_empty() {
            let misses = self.misses.entry(number).or_default();
            misses.count += 1;
            let data = misses.count >= DATA_BY_NOW << misses.drops.min(14);
            if data {
                *misses = Misses { count: 0, drops: misses.drops + 1 };
            }
            data
        } else {
            page.hits += 1;
            let patched = page.hits == 1 && self.rewritten.note_patch(number);
            patched || page.hits >= REWRITTEN
        };
        if rewritten {
            affected = page.blocks.iter().filter(alive).copied().collect();
        }
        (rewritten || !affected.is_empty()).then_some(affected)
    }

    /// Blocks on a page whose guest bytes are no longer what they were.
    pub fn changed(&self, page: u64, digest: impl Fn(&[Source]) -> u64) -> Vec<BlockId> {
        let Some(code) = self.pages.get(&page) else { return Vec::new() };
        let stale = |id: &&BlockId| {
            let block = self.blocks.get(**id as usize);
            block.is_some_and(|b| b.alive && digest(slice(&self.sources, &b.sources)) != b.digest)
        };
        code.blocks.iter().filter(stale).copied().collect()
    }

    /// Drops dead blocks from a page's list; says whether none is left.
    pub fn sweep(&mut self, page: u64) -> bool {
        let blocks = &self.blocks;
        let Some(code) = self.pages.get_mut(&page) else { return true };
        code.blocks.retain(|id| blocks.get(*id as usize).is_some_and(|b| b.alive));
        code.lines = 0;
        for id in &code.blocks {
            let Some(block) = blocks.get(*id as usize) else { continue };
            let own = slice(&self.sources, &block.sources).iter();
            for s in own.filter(|s| s.start & !0xfff == page) {
                code.lines |= line_mask(s.start, usize::from(s.len));
            }
        }
        let empty = code.blocks.is_empty();
        if empty {
            self.pages.remove(&page);
        }
        empty
    }

    /// The block that holds host address `host`, and the offset in it.
    pub fn containing(&self, host: u64) -> Option<(&Block, u32)> {
        let after = self.blocks.partition_point(|b| b.entry <= host);
        let block = self.blocks.get(after.checked_sub(1)?)?;
        let offset = host - block.entry;
        (offset <= u64::from(block.code_len)).then_some((block, offset as u32))
    }

    /// What is known of the code from host offset `offset` of a block on.
    pub fn position(&self, block: &Block, offset: u32) -> Option<Position> {
        let positions = slice(&self.positions, &block.positions);
        let end = positions.partition_point(|p| p.host <= offset);
        positions.get(end.checked_sub(1)?).copied()
    }

    /// Counts a group that could not be served, in the block that holds host address `host`.
    pub fn note_split(&mut self, host: u64) {
        let after = self.blocks.partition_point(|b| b.entry < host);
        let Some(block) = after.checked_sub(1).and_then(|n| self.blocks.get_mut(n)) else { return };
        block.splits += 1;
        if block.splits == TOO_MANY_SPLITS {
            self.ungrouped.insert(block.key);
            self.worn_out = Some(after as BlockId - 1);
        }
    }

    /// Notes that the block that holds host address `host` is to do without recent pages.
    pub fn note_restless(&mut self, host: u64) -> Option<BlockId> {
        let after = self.blocks.partition_point(|b| b.entry < host);
        let id = after.checked_sub(1)?;
        self.restless.insert(self.blocks.get(id)?.key);
        Some(id as BlockId)
    }

    /// Whether a block is to be translated without looking for recent pages.
    pub fn is_restless(&self, key: &Key) -> bool {
        self.restless.contains(key)
    }

    /// Whether a block is to be translated without groups.
    pub fn is_ungrouped(&self, key: &Key) -> bool {
        self.ungrouped.contains(key)
    }

    /// Pages that hold code.
    pub fn code_pages(&self) -> impl Iterator<Item = u64> {
        self.pages.keys().copied()
    }

    /// Throws everything away.
    pub fn clear(&mut self) {
        self.memory.clear();
        self.blocks.clear();
        self.edges.clear();
        self.positions.clear();
        self.sources.clear();
        self.cells = 0;
        self.map.clear();
        self.pages.clear();
        self.misses.clear();
        self.rewritten = Rewritten::default();
        self.far_global.clear();
        self.far_local.clear();
        self.unsure.clear();
        self.ungrouped.clear();
        self.restless.clear();
        self.worn_out = None;
        self.flushes += 1;
        self.touched = true;
    }
}

fn append<T: Copy>(list: &mut Vec<T>, new: &[T]) -> Range<u32> {
    let start = list.len() as u32;
    list.extend_from_slice(new);
    start..list.len() as u32
}

fn slice<'a, T>(list: &'a [T], range: &Range<u32>) -> &'a [T] {
    list.get(range.start as usize..range.end as usize).unwrap_or(&[])
}

/// A bit for each 64-byte line of the page that the range touches.
fn line_mask(start: u64, len: usize) -> u64 {
    let first = (start & 0xfff) >> 6;
    let last = ((start & 0xfff) + len.max(1) as u64 - 1).min(4095) >> 6;
    (u64::MAX >> (63 - (last - first))) << first
}

/// A multiplicative hasher for small fixed keys, whose values no adversary gains from choosing:
/// a guest can at worst slow its own translator down.
#[derive(Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
}
