//! Address spaces: what a vCPU remembers of linear addresses, kept apart by process-context
//! identifier (Intel SDM 3A 4.10).
//!
//! Translations of global pages belong to all spaces. Those of other pages belong to the space in
//! which they were made: entries of the larger TLBs carry its tag, and what leads straight to
//! translated code, links between pages and the jump cache of CPL 3, is put aside when CR3 goes to
//! another space and brought back on return. A space loses everything by getting a new tag.
use crate::cache::{BlockId, FarLink};
use crate::cpu::{Cpu, EMPTY_JUMPS, JUMP_CACHE_ENTRIES};
use crate::mode::{MmuIndex, Mode};
use crate::tlb::Tags;
use arch::registers::cr4;
use std::collections::HashSet;
use std::hash::BuildHasherDefault;

/// Spaces remembered beside the present one: Linux uses six identifiers at a time.
const KEPT: usize = 7;
/// So many large pages, and pages of code, are told apart in a space.
const LARGE_PAGES: usize = 4096;
const CODE_PAGES: usize = 1 << 16;

type Set = HashSet<u64, BuildHasherDefault<crate::cache::Mix>>;

/// One space.
#[derive(Default)]
pub struct Space {
    pcid: u16,
    tag: u64,
    /// Linear pages from which code was fetched.
    fetched: Set,
    /// Pages larger than 4 KiB that were walked to: linear address plus number of offset bits.
    large: Set,
    /// Slots of the jump cache of CPL 3 that were filled.
    jumps: Vec<(u16, BlockId)>,
    /// The mode for which they were.
    jump_mode: Mode,
    /// Links between pages that are made.
    far: Vec<FarLink>,
    /// `CodeCache::flushes` when it was left: with another, links and jumps are void.
    flushes: u64,
}

impl Space {
    fn forget(&mut self, tag: u64) {
        self.tag = tag;
        self.fetched.clear();
        self.large.clear();
        self.forget_code();
    }

    fn forget_code(&mut self) {
        self.jumps.clear();
        self.far.clear();
    }

    fn is_large(&self, address: u64) -> bool {
        !self.large.is_empty()
            && [21, 22, 30].iter().any(|&bits| self.large.contains(&large_key(address, bits)))
    }
}

fn large_key(address: u64, bits: u32) -> u64 {
    address >> bits << bits | u64::from(bits)
}

/// All spaces of a vCPU.
pub struct Spaces {
    present: Space,
    /// Others, those left last at the end.
    kept: Vec<Space>,
    /// Of global pages; its links and jumps are not listed here.
    global: Space,
    next_tag: u64,
}

impl Default for Spaces {
    fn default() -> Self {
        let with_tag = |tag| Space { tag, ..Space::default() };
        // Tag 0 is that of empty entries.
        Self { present: with_tag(1), kept: Vec::new(), global: with_tag(2), next_tag: 3 }
    }
}

impl Spaces {
    /// The tags that are valid now.
    #[inline]
    pub fn tags(&self) -> Tags {
        Tags { local: self.present.tag, global: self.global.tag }
    }

    fn new_tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    fn of(&mut self, global: bool) -> &mut Space {
        if global { &mut self.global } else { &mut self.present }
    }

    /// Notes that code is fetched from a page; gives the tag for it.
    pub fn note_fetch(&mut self, address: u64, global: bool) -> u64 {
        let space = self.of(global);
        space.fetched.insert(address & !0xfff);
        space.tag
    }

    /// Notes a walk to a page of 2 to the power of `bits` bytes; gives the tag for it.
    pub fn note_walk(&mut self, address: u64, bits: u32, global: bool) -> u64 {
        let space = self.of(global);
        if bits > 12 {
            space.large.insert(large_key(address, bits));
        }
        space.tag
    }

    /// Whether there are more pages than are told apart: everything is to be forgotten.
    pub fn crowded(&self) -> bool {
        [&self.present, &self.global]
            .iter()
            .any(|s| s.large.len() > LARGE_PAGES || s.fetched.len() > CODE_PAGES)
    }

    /// The jump cache of CPL 3 learnt a block that is not global.
    pub fn note_jump(&mut self, slot: usize, block: BlockId) {
        self.present.jumps.push((slot as u16, block));
    }

    /// The process-context identifier of the present space.
    pub fn pcid(&self) -> u16 {
        self.present.pcid
    }

    fn kept(&mut self, pcid: u16) -> Option<&mut Space> {
        self.kept.iter_mut().find(|s| s.pcid == pcid)
    }
}

impl Cpu {
    /// MOV to CR3: goes to the space `pcid`, with what is known of it if `keep`.
    pub fn switch_space(&mut self, pcid: u16, keep: bool) {
        if pcid == self.spaces.present.pcid {
            if !keep {
                self.flush_local();
            }
            return;
        }
        self.leave_space();
        let spaces = &mut self.spaces;
        let known = spaces.kept.iter().position(|s| s.pcid == pcid);
        let mut next = match known {
            Some(n) => spaces.kept.remove(n),
            None if spaces.kept.len() >= KEPT => Space { tag: 0, ..spaces.kept.remove(0) },
            None => Space::default(),
        };
        if !keep || next.tag == 0 || next.pcid != pcid {
            let tag = spaces.new_tag();
            next.forget(tag);
            next.pcid = pcid;
        }
        let left = std::mem::replace(&mut spaces.present, next);
        spaces.kept.push(left);
        self.enter_space();
    }

    /// Puts the code links of the present space aside.
    fn leave_space(&mut self) {
        self.tlb.flush_local();
        self.empty_volatile_jumps();
        self.tidy_jumps();
        let present = &mut self.spaces.present;
        for &(slot, _) in &present.jumps {
            self.jumps[MmuIndex::User as usize].pcs[usize::from(slot)] =
                EMPTY_JUMPS[usize::from(slot)];
        }
        present.jump_mode = self.jump_modes[MmuIndex::User as usize];
        present.flushes = self.cache.flushes;
        present.far = self.cache.take_local_links(std::mem::take(&mut present.far));
        self.cache.unmake(&present.far, &mut self.cells);
    }

    /// Brings back those of the space that is now the present one.
    fn enter_space(&mut self) {
        let present = &mut self.spaces.present;
        let user = MmuIndex::User as usize;
        if present.flushes != self.cache.flushes {
            present.forget_code();
        }
        if self.jump_modes[user] != present.jump_mode {
            if present.jump_mode.is_64() && !present.jumps.is_empty() {
                self.jumps[user].pcs = EMPTY_JUMPS;
                self.jump_modes[user] = present.jump_mode;
            } else {
                present.jumps.clear();
            }
        }
        let cache = &self.cache;
        let jumps = &mut self.jumps[user];
        present.jumps.retain(|&(slot, block)| {
            let alive = cache.alive(block).zip(cache.saved_entry(block));
            if let Some((block, host)) = alive {
                jumps.pcs[usize::from(slot)] = block.key().pc;
                jumps.hosts[usize::from(slot)] = host;
            }
            alive.is_some()
        });
        let far = std::mem::take(&mut present.far);
        self.cache.make_again(far, &mut self.cells);
    }

    /// Drops what the list of filled slots says twice, or no longer truly.
    fn tidy_jumps(&mut self) {
        let (cache, jumps) = (&self.cache, &self.jumps[MmuIndex::User as usize]);
        let mut seen = [0u64; JUMP_CACHE_ENTRIES / 64];
        self.spaces.present.jumps.retain(|&(slot, block)| {
            let slot = usize::from(slot);
            let (word, bit) = (slot / 64, 1 << (slot % 64));
            let holds = cache.alive(block).is_some_and(|b| jumps.pcs[slot] == b.key().pc);
            let first = seen[word] & bit == 0;
            seen[word] |= bit;
            holds && first
        });
    }

    /// Notes that a slot of the jump cache `mmu` is to learn a block that is not global.
    pub fn note_local_jump(&mut self, mmu: usize, slot: usize, block: BlockId) {
        if mmu != MmuIndex::User as usize {
            self.jumps_volatile[mmu] = true;
            return;
        }
        self.spaces.note_jump(slot, block);
        if self.spaces.present.jumps.len() > 4 * JUMP_CACHE_ENTRIES {
            self.tidy_jumps();
        }
    }

    /// Forgets all translations, as changes of the paging mode do; control registers are as they
    /// will be from now on.
    pub fn flush_tlb(&mut self) {
        let pcid = self.sys.cr3 & 0xfff;
        self.spaces.present.pcid = if self.sys.cr4 & cr4::PCIDE != 0 { pcid as u16 } else { 0 };
        self.tlb.flush();
        let (local, global) = (self.spaces.new_tag(), self.spaces.new_tag());
        self.flush_jump_caches();
        self.spaces.kept.clear();
        self.spaces.present.forget(local);
        self.spaces.global.forget(global);
    }

    /// Forgets the translations of the present space, as MOV to CR3 does.
    pub fn flush_local(&mut self) {
        self.tlb.flush_local();
        self.forget_local_code();
        let tag = self.spaces.new_tag();
        self.spaces.present.forget(tag);
    }

    /// Forgets those of the spaces that are not present, as INVPCID of type 3 does among others.
    pub fn flush_kept(&mut self) {
        self.spaces.kept.clear();
    }

    /// Forgets those of one space, as INVPCID of type 1 does.
    pub fn flush_space(&mut self, pcid: u16) {
        if pcid == self.spaces.pcid() {
            self.flush_local();
        } else {
            self.spaces.kept.retain(|s| s.pcid != pcid);
        }
    }

    /// INVLPG: forgets a page of the present space, or a global one.
    pub fn flush_tlb_page(&mut self, address: u64) {
        if self.spaces.global.is_large(address) {
            return self.flush_tlb();
        }
        if self.spaces.present.is_large(address) {
            self.flush_local();
        }
        let page = address & !0xfff;
        let tags = self.spaces.tags();
        self.tlb.flush_page(address);
        self.walked.flush_page(address, tags.local);
        self.walked.flush_page(address, tags.global);
        self.exec_tlb.flush_page(address);
        if self.spaces.global.fetched.remove(&page) {
            self.flush_jump_caches();
        }
        if self.spaces.present.fetched.remove(&page) {
            self.forget_local_code();
        }
    }

    /// INVPCID of type 0: forgets a page of one space.
    pub fn flush_page_of(&mut self, pcid: u16, address: u64) {
        if pcid == self.spaces.pcid() {
            return self.flush_tlb_page(address);
        }
        let Some(space) = self.spaces.kept(pcid) else { return };
        if space.is_large(address) || space.fetched.contains(&(address & !0xfff)) {
            return self.flush_space(pcid);
        }
        let tag = space.tag;
        self.walked.flush_page(address, tag);
    }

    /// Undoes the links and jumps that depend on translations of the present space.
    fn forget_local_code(&mut self) {
        self.empty_volatile_jumps();
        let jumps = &mut self.jumps[MmuIndex::User as usize];
        for (slot, _) in self.spaces.present.jumps.drain(..) {
            jumps.pcs[usize::from(slot)] = EMPTY_JUMPS[usize::from(slot)];
        }
        let links = self.cache.take_local_links(Vec::new());
        self.cache.unmake(&links, &mut self.cells);
    }

    /// Empties the jump caches of which it is not known what they hold of the present space.
    fn empty_volatile_jumps(&mut self) {
        for mmu in 0..MmuIndex::COUNT {
            if self.jumps_volatile[mmu] {
                self.empty_jumps(mmu);
            }
        }
    }

    /// Empties the jump caches, and undoes all links between pages, of all spaces.
    pub fn flush_jump_caches(&mut self) {
        self.cache.unmake_all(&mut self.cells);
        for mmu in 0..MmuIndex::COUNT {
            self.empty_jumps(mmu);
        }
        for space in &mut self.spaces.kept {
            space.forget_code();
        }
    }

    /// Empties the jump cache of one MMU index.
    pub fn empty_jumps(&mut self, mmu: usize) {
        if let Some(cache) = self.jumps.get_mut(mmu) {
            cache.pcs = EMPTY_JUMPS;
            self.jumps_volatile[mmu] = false;
        }
        if mmu == MmuIndex::User as usize {
            self.spaces.present.jumps.clear();
        }
    }
}
