//! Translated blocks of one vCPU: finding them, linking them to each other, and throwing them
//! away when the guest changes the code they were made from.
mod links;
mod records;

use crate::codemem::CodeMemory;
use crate::cpu::CELLS;
use crate::emit::{EdgeKind, Emitted, Position};
use crate::mode::Mode;
use crate::rewritten::Rewritten;
use crate::translate::Desk;
use crate::translate::flags::Flags;
use engine::EngineError;
use hashbrown::HashTable;
use records::{Edge, PackedPosition, PackedSource};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};

pub use links::FarLink;
pub use records::{Block, Rare};

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

/// A block whose groups fail so often is translated anew without them.
const TOO_MANY_SPLITS: u16 = 4096;

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
    /// Code, less than 64 KiB of it.
    pub emitted: &'a Emitted,
    /// Where the code came from.
    pub sources: &'a [Source],
    /// Digest of those bytes.
    pub digest: u64,
    /// What most blocks do not have.
    pub rare: Rare,
}

/// The code cache of one vCPU.
pub struct CodeCache {
    memory: CodeMemory,
    blocks: Vec<Block>,
    edges: Vec<Edge>,
    positions: Vec<PackedPosition>,
    sources: Vec<PackedSource>,
    cells: u32,
    /// The blocks under which keys lead to one, by the hash of the key.
    map: HashTable<BlockId>,
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
            map: HashTable::new(),
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
        let is_it = |id: &BlockId| self.block(*id).is_some_and(|b| b.key() == *key);
        self.map.find(hash(key), is_it).copied()
    }

    /// Has a key lead to a block, in place of another one.
    fn lead_to(&mut self, key: &Key, id: BlockId) {
        let blocks = &self.blocks;
        let key_of = |id: &BlockId| blocks.get(*id as usize).map(Block::key);
        let entry = self.map.entry(
            hash(key),
            |id| key_of(id).as_ref() == Some(key),
            |id| key_of(id).as_ref().map_or(0, hash),
        );
        entry.insert(id);
    }

    /// Has a key lead nowhere, if it leads to this block.
    fn lead_nowhere(&mut self, key: &Key, id: BlockId) {
        if let Ok(entry) = self.map.find_entry(hash(key), |other| *other == id) {
            entry.remove();
        }
    }

    /// The flags that the block under `key` wants in their place; none if there is no block.
    pub fn live_in(&self, key: &Key) -> Flags {
        self.find(key).and_then(|id| self.block(id)).map_or(0, Block::live_in)
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
        let NewBlock { key, emitted, sources, digest, rare } = new;
        let (start, end) = self.memory.range();
        let most = (end - start) / BYTES_A_BLOCK;
        if self.cells as usize + emitted.cells as usize >= CELLS || self.blocks.len() as u64 >= most
        {
            return None;
        }
        let code_len = u16::try_from(emitted.code().len()).ok()?;
        let entry = self.memory.install(emitted.code())?;
        let id = self.blocks.len() as BlockId;
        for spec in emitted.edges() {
            if let EdgeKind::Far(cell) = spec.kind
                && let Some(slot) = cells.get_mut(cell as usize)
            {
                *slot = entry + u64::from(spec.stub);
            }
            self.edges.push(Edge::new(id, spec.target, spec.kind, spec.stub as u16, spec.live));
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
        match &*rare.checks {
            [] => self.rewritten.note_translation(key.physical & !0xfff),
            checks => self.rewritten.add(key, id, checks),
        }
        let mut block = Block::new(key, emitted.live_in, digest, rare);
        block.entry = (entry - start) as u32;
        block.saved_entry = emitted.saved_entry as u16;
        block.code_len = code_len;
        block.positions = self.positions.len() as u32;
        block.sources = self.sources.len() as u32;
        self.blocks.push(block);
        self.positions.extend(emitted.positions().iter().copied().map(PackedPosition::from));
        self.sources.extend(sources.iter().copied().map(PackedSource::from));
        self.lead_to(&key, id);
        Some(id)
    }

    /// Host address at which callers with guest flags in host flags enter a block.
    fn entry(&self, id: BlockId) -> Option<u64> {
        self.block(id).map(|b| self.memory.range().0 + u64::from(b.entry))
    }

    /// Host address at which callers with guest flags in `Cpu::raw_flags` enter a block.
    pub fn saved_entry(&self, id: BlockId) -> Option<u64> {
        Some(self.entry(id)? + u64::from(self.block(id)?.saved_entry))
    }

    fn positions(&self, id: usize) -> &[PackedPosition] {
        list_of(&self.blocks, &self.positions, id, |b| b.positions)
    }

    fn sources(&self, id: usize) -> impl Iterator<Item = Source> {
        sources_of(&self.blocks, &self.sources, id)
    }

    /// The guest address to which an edge leads.
    pub fn edge_target(&self, edge: u32) -> Option<u64> {
        self.edges.get(edge as usize).map(|e| e.target)
    }

    /// The host address at which an edge leaves.
    pub fn edge_host(&self, edge: u32) -> u64 {
        let edge = self.edges.get(edge as usize);
        edge.and_then(|e| Some(self.entry(e.block)? + u64::from(e.stub))).unwrap_or(0)
    }

    /// A block that was not thrown away.
    pub fn alive(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id as usize).filter(|b| b.alive)
    }

    /// Throws a block away; returns its guest address.
    pub fn kill(&mut self, id: BlockId, cells: &mut [u64; CELLS]) -> Option<u64> {
        let block = self.blocks.get_mut(id as usize).filter(|b| b.alive)?;
        block.alive = false;
        let (key, checked) = (block.key(), block.checks().is_some());
        self.lead_nowhere(&key, id);
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
            self.lead_to(key, other);
        }
    }

    /// The blocks to throw away because `len` bytes at guest-physical `start`, within one page,
    /// were written: those that depend on them, or all of a page that is no longer one of code.
    /// `None` where the write changes nothing.
    pub fn affected(&mut self, start: u64, len: usize) -> Option<Vec<BlockId>> {
        let number = start & !0xfff;
        let page = self.pages.get_mut(&number)?;
        let end = start + len as u64;
        let hit = |s: Source| s.start < end && start < s.start + u64::from(s.len);
        let alive = |id: &&BlockId| self.blocks.get(**id as usize).is_some_and(|b| b.alive);
        let touches =
            |id: &&BlockId| sources_of(&self.blocks, &self.sources, **id as usize).any(hit);
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
    pub fn changed(
        &self,
        page: u64,
        digest: impl Fn(&mut dyn Iterator<Item = Source>) -> u64,
    ) -> Vec<BlockId> {
        let Some(code) = self.pages.get(&page) else { return Vec::new() };
        let stale = |id: &&BlockId| {
            let block = self.alive(**id);
            block.is_some_and(|b| digest(&mut self.sources(**id as usize)) != b.digest)
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
            let own = sources_of(blocks, &self.sources, *id as usize);
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

    /// The block whose code begins last below host address `host`, and the offset from there.
    fn last_below(&self, host: u64) -> Option<(usize, u64)> {
        let offset = host.checked_sub(self.memory.range().0)?;
        let after = self.blocks.partition_point(|b| u64::from(b.entry) <= offset);
        let id = after.checked_sub(1)?;
        Some((id, offset - u64::from(self.blocks.get(id)?.entry)))
    }

    /// The guest instruction pointer of the block that holds host address `host`, and what is known
    /// of the code there.
    pub fn position(&self, host: u64) -> Option<(u64, Position)> {
        let (id, offset) = self.last_below(host)?;
        let block = self.blocks.get(id).filter(|b| offset <= u64::from(b.code_len))?;
        let positions = self.positions(id);
        let end = positions.partition_point(|p| u64::from(p.host()) <= offset);
        let position = positions.get(end.checked_sub(1)?).copied()?;
        Some((block.key().pc, position.into()))
    }

    /// The key of the block that holds host address `host`.
    pub fn key_at(&self, host: u64) -> Option<Key> {
        let (id, offset) = self.last_below(host)?;
        let block = self.blocks.get(id).filter(|b| offset <= u64::from(b.code_len))?;
        Some(block.key())
    }

    /// Counts a group that could not be served, in the block that holds host address `host` less
    /// one.
    pub fn note_split(&mut self, host: u64) {
        let Some((id, _)) = self.last_below(host.wrapping_sub(1)) else { return };
        let Some(block) = self.blocks.get_mut(id) else { return };
        block.splits = block.splits.saturating_add(1);
        if block.splits == TOO_MANY_SPLITS {
            self.ungrouped.insert(block.key());
            self.worn_out = Some(id as BlockId);
        }
    }

    /// Notes that the block that holds host address `host` less one is to do without recent pages.
    pub fn note_restless(&mut self, host: u64) -> Option<BlockId> {
        let (id, _) = self.last_below(host.wrapping_sub(1))?;
        self.restless.insert(self.blocks.get(id)?.key());
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

/// The part of a list that belongs to block `id`: from where its own begins to where that of the
/// next one does.
fn list_of<'a, T>(
    blocks: &[Block],
    list: &'a [T],
    id: usize,
    start: impl Fn(&Block) -> u32,
) -> &'a [T] {
    let begin = blocks.get(id).map_or(list.len(), |b| start(b) as usize);
    let end = blocks.get(id + 1).map_or(list.len(), |b| start(b) as usize);
    list.get(begin..end).unwrap_or(&[])
}

fn sources_of<'a>(
    blocks: &[Block],
    list: &'a [PackedSource],
    id: usize,
) -> impl Iterator<Item = Source> + use<'a> {
    list_of(blocks, list, id, |b| b.sources).iter().copied().map(Source::from)
}

fn hash(key: &Key) -> u64 {
    BuildHasherDefault::<Mix>::default().hash_one(key)
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
