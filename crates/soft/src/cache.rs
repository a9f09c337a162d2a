//! Translated blocks of one vCPU: finding them, linking them to each other, and throwing them
//! away when the guest changes the code they were made from.
use crate::codemem::CodeMemory;
use crate::cpu::{CELLS, Cpu, EMPTY_JUMPS};
use crate::emit::{EdgeKind, Emitted, FlagsIn, Position};
use crate::helpers::Helped;
use crate::mode::Mode;
use crate::translate::flags::Flags;
use crate::vm::{Written, pending};
use engine::EngineError;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::Ordering;

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
    positions: Box<[Position]>,
    /// Instructions that helpers execute; translated code holds pointers to them.
    _instructions: Box<[Helped]>,
    sources: Vec<Source>,
    /// Digest of the guest bytes in `sources`.
    digest: u64,
    incoming: Vec<u32>,
    /// How often a group of accesses could not be served.
    splits: u32,
    alive: bool,
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
    /// The block in whose `incoming` it is.
    linked: Option<BlockId>,
}

/// A link that depends on the translation of another page than that of its origin.
#[derive(Clone, Copy)]
pub struct FarLink {
    edge: u32,
    target: BlockId,
}

#[derive(Default)]
struct PageCode {
    blocks: Vec<BlockId>,
    /// One bit for each 64 bytes that hold code or were looked at.
    lines: u64,
    /// Writes that hit code since the page was first translated.
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

/// After so many hits the whole page is taken to be rewritten: all its translations go, and
/// writes to it are fast again.
const REWRITTEN: u32 = 4;

/// What the translator hands over.
pub struct NewBlock {
    /// Key.
    pub key: Key,
    /// See [`Block::second_page`].
    pub second_page: Option<u64>,
    /// Code.
    pub emitted: Emitted,
    /// Instructions that helpers execute.
    pub instructions: Box<[Helped]>,
    /// Where the code came from.
    pub sources: Vec<Source>,
    /// Digest of those bytes.
    pub digest: u64,
}

/// The code cache of one vCPU.
pub struct CodeCache {
    memory: CodeMemory,
    blocks: Vec<Block>,
    edges: Vec<Edge>,
    cells: u32,
    map: HashMap<Key, BlockId, BuildHasherDefault<Mix>>,
    pages: HashMap<u64, PageCode, BuildHasherDefault<Mix>>,
    misses: HashMap<u64, Misses, BuildHasherDefault<Mix>>,
    /// Links that are made and depend on translations of global pages.
    far_global: Vec<FarLink>,
    /// Those that depend on others, of the present address space.
    far_local: Vec<FarLink>,
    /// Translated code was invalidated since this was last cleared.
    pub touched: bool,
    /// Blocks whose groups cross pages again and again: they do without.
    ungrouped: HashSet<Key, BuildHasherDefault<Mix>>,
    /// A block to be thrown away before the next one is entered.
    worn_out: Option<BlockId>,
    /// How often everything was thrown away: numbers of blocks and edges are void after it.
    pub flushes: u64,
    /// Pages that other vCPUs may still write to unnoticed, with the number of answers due.
    pub unsure: Vec<(u64, u32)>,
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
            cells: 0,
            map: HashMap::default(),
            pages: HashMap::default(),
            misses: HashMap::default(),
            far_global: Vec::new(),
            far_local: Vec::new(),
            touched: false,
            ungrouped: HashSet::default(),
            worn_out: None,
            flushes: 0,
            unsure: Vec::new(),
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
    pub fn add(&mut self, new: NewBlock, cells: &mut [u64; CELLS]) -> Option<BlockId> {
        let NewBlock { key, second_page, emitted, instructions, sources, digest } = new;
        if self.cells as usize + emitted.cells as usize >= CELLS {
            return None;
        }
        let entry = self.memory.install(&emitted.code)?;
        let id = self.blocks.len() as BlockId;
        for spec in &emitted.edges {
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
                linked: None,
            });
        }
        self.cells += emitted.cells;
        for source in &sources {
            let page = self.pages.entry(source.start & !0xfff).or_default();
            page.lines |= line_mask(source.start, usize::from(source.len));
            if page.blocks.last() != Some(&id) {
                page.blocks.push(id);
            }
        }
        self.blocks.push(Block {
            key,
            second_page,
            entry,
            saved_entry: entry + u64::from(emitted.saved_entry),
            live_in: emitted.live_in,
            code_len: emitted.code.len() as u32,
            positions: emitted.positions.into_boxed_slice(),
            _instructions: instructions,
            sources,
            digest,
            incoming: Vec::new(),
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

    /// Makes an edge jump straight to a block. If the code there has changed since the edge was
    /// made, and now wants flags that the edge does not keep, the edge's own block is thrown away
    /// instead, to be translated anew.
    pub fn link(&mut self, edge: u32, target: BlockId, global: bool, cells: &mut [u64; CELLS]) {
        let Some(&Edge { block, kind, live, .. }) = self.edges.get(edge as usize) else { return };
        if self.blocks.get(target as usize).is_some_and(|to| to.live_in & !live != 0) {
            self.kill(block, cells);
            return;
        }
        if !self.blocks.get(block as usize).is_some_and(|b| b.alive) {
            return;
        }
        let Some(to) = self.blocks.get(target as usize) else { return };
        // An instruction that crosses a page depends on the translation of the next one too.
        let near = matches!(kind, EdgeKind::Near(_)) && to.second_page.is_none();
        if kind == EdgeKind::Always {
            return;
        }
        self.lead(edge, target, cells);
        if !near {
            let links = if global { &mut self.far_global } else { &mut self.far_local };
            links.push(FarLink { edge, target });
        }
        let Some(to) = self.blocks.get_mut(target as usize) else { return };
        if let Some(from) = self.edges.get_mut(edge as usize)
            && from.linked.replace(target) != Some(target)
        {
            if to.incoming.len() == to.incoming.capacity() {
                to.incoming.sort_unstable();
                to.incoming.dedup();
            }
            to.incoming.push(edge);
        }
    }

    /// Makes an edge leave to the run loop.
    fn unlink(&mut self, edge: u32, cells: &mut [u64; CELLS]) {
        let Some(&Edge { stub, .. }) = self.edges.get(edge as usize) else { return };
        self.point(edge, stub, cells);
    }

    /// Makes an edge lead to a block.
    fn lead(&mut self, edge: u32, target: BlockId, cells: &mut [u64; CELLS]) {
        let Some(to) = self.blocks.get(target as usize).map(|b| b.entry) else { return };
        self.point(edge, to, cells);
    }

    fn point(&mut self, edge: u32, host: u64, cells: &mut [u64; CELLS]) {
        let Some(&Edge { block, kind, .. }) = self.edges.get(edge as usize) else { return };
        match kind {
            EdgeKind::Always => {}
            EdgeKind::Near(at) => {
                let origin = self.blocks.get(block as usize).map_or(0, |b| b.entry);
                self.memory.patch(origin + u64::from(at), host);
            }
            EdgeKind::Far(cell) => {
                if let Some(slot) = cells.get_mut(cell as usize) {
                    *slot = host;
                }
            }
        }
    }

    /// Hands out the links to pages that are not global, leaving `empty` to collect new ones.
    pub fn take_local_links(&mut self, mut empty: Vec<FarLink>) -> Vec<FarLink> {
        empty.clear();
        std::mem::replace(&mut self.far_local, empty)
    }

    /// Undoes links.
    pub fn unmake(&mut self, links: &[FarLink], cells: &mut [u64; CELLS]) {
        for link in links {
            self.unlink(link.edge, cells);
        }
    }

    /// Undoes all links that depend on translations of other pages.
    pub fn unmake_all(&mut self, cells: &mut [u64; CELLS]) {
        let (global, local) = (&mut self.far_global, &mut self.far_local);
        for links in [std::mem::take(global), std::mem::take(local)] {
            self.unmake(&links, cells);
        }
    }

    /// Makes links again that were handed out since the cache was last cleared, as far as both
    /// their ends still live.
    pub fn make_again(&mut self, mut links: Vec<FarLink>, cells: &mut [u64; CELLS]) {
        links.retain(|&FarLink { edge, target }| {
            let from = self.edges.get(edge as usize).map(|e| e.block);
            let alive =
                from.is_some_and(|b| self.alive(b).is_some()) && self.alive(target).is_some();
            if alive {
                self.lead(edge, target, cells);
            }
            alive
        });
        self.far_local = links;
    }

    /// A block that was not thrown away.
    pub fn alive(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id as usize).filter(|b| b.alive)
    }

    /// Throws a block away; returns its guest address.
    fn kill(&mut self, id: BlockId, cells: &mut [u64; CELLS]) -> Option<u64> {
        let block = self.blocks.get_mut(id as usize).filter(|b| b.alive)?;
        block.alive = false;
        let (key, incoming) = (block.key, std::mem::take(&mut block.incoming));
        if self.map.get(&key) == Some(&id) {
            self.map.remove(&key);
        }
        for edge in incoming {
            self.unlink(edge, cells);
        }
        self.touched = true;
        Some(key.pc)
    }

    /// The blocks to throw away because `len` bytes at guest-physical `start`, within one page,
    /// were written: those that depend on them, or all of a page that is no longer one of code.
    /// `None` where the write changes nothing.
    fn affected(&mut self, start: u64, len: usize) -> Option<Vec<BlockId>> {
        let number = start & !0xfff;
        let page = self.pages.get_mut(&number)?;
        let end = start + len as u64;
        let hit = |s: &Source| s.start < end && start < s.start + u64::from(s.len);
        let alive = |id: &&BlockId| self.blocks.get(**id as usize).is_some_and(|b| b.alive);
        let touches = |id: &&BlockId| self.blocks[**id as usize].sources.iter().any(hit);
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
            page.hits >= REWRITTEN
        };
        if rewritten {
            affected = page.blocks.iter().filter(alive).copied().collect();
        }
        (rewritten || !affected.is_empty()).then_some(affected)
    }

    /// Blocks on a page whose guest bytes are no longer what they were.
    fn changed(&self, page: u64, digest: impl Fn(&[Source]) -> u64) -> Vec<BlockId> {
        let Some(code) = self.pages.get(&page) else { return Vec::new() };
        let stale = |id: &&BlockId| {
            let block = self.blocks.get(**id as usize);
            block.is_some_and(|b| b.alive && digest(&b.sources) != b.digest)
        };
        code.blocks.iter().filter(stale).copied().collect()
    }

    /// Drops dead blocks from a page's list; says whether none is left.
    fn sweep(&mut self, page: u64) -> bool {
        let blocks = &self.blocks;
        let Some(code) = self.pages.get_mut(&page) else { return true };
        code.blocks.retain(|id| blocks.get(*id as usize).is_some_and(|b| b.alive));
        code.lines = 0;
        for id in &code.blocks {
            for s in blocks[*id as usize].sources.iter().filter(|s| s.start & !0xfff == page) {
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
    fn containing(&self, host: u64) -> Option<(&Block, u32)> {
        let after = self.blocks.partition_point(|b| b.entry <= host);
        let block = self.blocks.get(after.checked_sub(1)?)?;
        let offset = host - block.entry;
        (offset <= u64::from(block.code_len)).then_some((block, offset as u32))
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

    /// Whether a block is to be translated without groups.
    pub fn is_ungrouped(&self, key: &Key) -> bool {
        self.ungrouped.contains(key)
    }

    /// Pages that hold code.
    pub fn code_pages(&self) -> impl Iterator<Item = u64> {
        self.pages.keys().copied()
    }

    fn clear(&mut self) {
        self.memory.clear();
        self.blocks.clear();
        self.edges.clear();
        self.cells = 0;
        self.map.clear();
        self.pages.clear();
        self.misses.clear();
        self.far_global.clear();
        self.far_local.clear();
        self.unsure.clear();
        self.ungrouped.clear();
        self.worn_out = None;
        self.flushes += 1;
        self.touched = true;
    }
}

/// A bit for each 64-byte line of the page that the range touches.
fn line_mask(start: u64, len: usize) -> u64 {
    let first = (start & 0xfff) >> 6;
    let last = ((start & 0xfff) + len.max(1) as u64 - 1).min(4095) >> 6;
    (u64::MAX >> (63 - (last - first))) << first
}

impl Cpu {
    /// Finds the guest instruction to which a host address in translated code belongs: sets `rip`
    /// and `next_rip`, and says where its flags are. `host` is a return address or that of a
    /// faulting instruction plus one.
    pub fn locate(&mut self, host: u64) -> Option<Position> {
        let (block, offset) = self.cache.containing(host.wrapping_sub(1))?;
        let end = block.positions.partition_point(|p| p.host <= offset);
        let position = *block.positions.get(end.checked_sub(1)?)?;
        let pc = block.key.pc;
        let mask = self.ip_mask();
        self.rip = pc.wrapping_add(u64::from(position.guest)) & mask;
        self.next_rip = self.rip.wrapping_add(u64::from(position.length)) & mask;
        Some(position)
    }

    /// As `locate`, where the interrupted flags are in `host_flags` unless the position says that
    /// they are in `raw_flags` already.
    pub fn take_host_flags_at(&mut self, host: u64) -> Option<Position> {
        let position = self.locate(host)?;
        if position.flags == FlagsIn::Host {
            self.raw_flags = self.host_flags;
        }
        Some(position)
    }

    /// Throws all translations away.
    pub fn flush_code(&mut self) {
        let vm = self.vm.clone();
        vm.ram.forget_code(self.index, self.cache.code_pages());
        self.flush_jump_caches();
        self.cache.clear();
    }

    /// Bytes of RAM that may hold translated code were written: drops the translations, of all
    /// vCPUs. Says whether this vCPU had any.
    pub fn code_written(&mut self, physical: u64, len: usize) -> bool {
        let vm = self.vm.clone();
        let Some(page) = vm.ram.page(physical) else { return false };
        let holders = page.code.load(Ordering::SeqCst);
        for (n, mailbox) in vm.mailboxes.iter().enumerate() {
            if n as u32 != self.index && holders >> n & 1 != 0 {
                mailbox.lock_written().push(Written::Range(physical, len));
                mailbox.post(pending::CODE);
            }
        }
        self.drop_code(physical, len)
    }

    /// Drops this vCPU's translations of written bytes.
    pub fn drop_code(&mut self, physical: u64, len: usize) -> bool {
        match self.cache.affected(physical, len) {
            Some(affected) => self.kill_all(physical & !0xfff, &affected),
            None => false,
        }
    }

    /// Compares a page's translations with its bytes as they are now, and drops those that differ.
    pub fn verify_code(&mut self, page: u64) {
        let vm = self.vm.clone();
        let changed = self.cache.changed(page, |s| crate::translate::digest(&vm.ram, s));
        self.kill_all(page, &changed);
    }

    /// Throws a block away that is to be translated differently.
    pub fn drop_worn_out(&mut self) {
        if let Some(id) = self.cache.worn_out.take() {
            let page = self.cache.block(id).map_or(0, |b| b.key.physical & !0xfff);
            self.kill_all(page, &[id]);
        }
    }

    fn kill_all(&mut self, page: u64, blocks: &[BlockId]) -> bool {
        for &id in blocks {
            if let Some(pc) = self.cache.kill(id, &mut self.cells) {
                for cache in &mut self.jumps {
                    while let Some(slot) = cache.find(pc) {
                        cache.pcs[slot] = EMPTY_JUMPS[slot];
                    }
                }
            }
        }
        if self.cache.sweep(page) {
            self.vm.clone().ram.forget_code(self.index, std::iter::once(page));
        }
        !blocks.is_empty()
    }
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
