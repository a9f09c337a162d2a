//! Pages whose code is rewritten again and again: programs that patch themselves, inline caches of
//! JIT compilers, jump labels.
//!
//! Ordinary translations are kept right by watching the page: each write to it takes the slow
//! path and throws away what it hits. Where that happens too often, the page is no longer watched;
//! instead each block made from it *checks* on entry that the bytes it was made from are still
//! there. A block that finds other bytes goes on to the next *version* of itself, so that code
//! that is patched back and forth is not translated anew. Immediate operands that were seen to
//! change are not compared: the block loads them from the guest's code when it runs.
//!
//! A checked block ends after an instruction that writes memory, which may have changed the next
//! one, and no other block's flag liveness looks at code on the page.
use crate::cache::{BlockId, Key, Mix};
use crate::cpu::Cpu;
use crate::ram::Ram;
use crate::translate::fetch;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// After so many patches, each followed by a translation, a page can become checked.
const OFTEN: u32 = 16;
/// It does if no more than so many blocks were translated for each patch: where a compiler fills a
/// page with fresh code at one go, checks would bring nothing.
const TRANSLATIONS_A_PATCH: u32 = 4;
/// A checked page is watched again once this many new blocks came with no stale one between.
const SETTLED: u32 = 200;
/// Versions of a block that are kept.
const MAX_VERSIONS: usize = 8;

/// An immediate operand or displacement in a block's code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Field {
    /// Index of its instruction in the block.
    pub step: u16,
    /// Bytes from the start of the block.
    pub offset: u16,
    /// 1, 4 or 8 bytes.
    pub len: u8,
}

impl Field {
    fn contains(&self, offset: usize) -> bool {
        let start = usize::from(self.offset);
        (start..start + usize::from(self.len)).contains(&offset)
    }
}

/// Bytes that a block compares on entry, within one page.
#[derive(Clone, Debug)]
pub struct Check {
    /// Guest-physical address.
    pub start: u64,
    /// Host address.
    pub host: u64,
    /// What must be there.
    pub bytes: Box<[u8]>,
    /// Fields that may hold anything.
    pub variable: Vec<Field>,
}

impl Check {
    /// Whether byte `n` counts.
    pub fn fixed(&self, n: usize) -> bool {
        !self.variable.iter().any(|f| f.contains(n))
    }

    fn holds(&self, ram: &Ram) -> bool {
        let mut now = [0; 4096];
        let Some(now) = now.get_mut(..self.bytes.len()) else { return false };
        fetch::copy(ram, self.start, now).is_some()
            && now.iter().zip(&self.bytes).enumerate().all(|(n, (a, b))| a == b || !self.fixed(n))
    }
}

#[derive(Clone, Copy, Default)]
struct History {
    patches: u32,
    translated: u32,
}

#[derive(Default)]
struct CheckedPage {
    blocks: Vec<BlockId>,
    /// Blocks translated since one was because its code had changed.
    fresh: u32,
}

/// Which pages are checked, and what is on them.
#[derive(Default)]
pub struct Rewritten {
    history: Map<u64, History>,
    pages: Map<u64, CheckedPage>,
    versions: Map<Key, Vec<BlockId>>,
}

impl Rewritten {
    /// Whether blocks on the page of guest-physical `address` check their code themselves.
    pub fn checks(&self, address: u64) -> bool {
        !self.pages.is_empty() && self.pages.contains_key(&(address & !0xfff))
    }

    /// A write hit code on `page` for the first time since something was translated there. Says
    /// whether the page is to be checked from now on.
    pub fn note_patch(&mut self, page: u64) -> bool {
        let history = self.history.entry(page).or_default();
        history.patches += 1;
        let often = history.patches >= OFTEN
            && history.translated <= history.patches.saturating_mul(TRANSLATIONS_A_PATCH);
        if often {
            self.history.remove(&page);
            self.pages.insert(page, CheckedPage::default());
        }
        often
    }

    /// A block was made from code on a page that is watched.
    pub fn note_translation(&mut self, page: u64) {
        if !self.history.is_empty()
            && let Some(history) = self.history.get_mut(&page)
        {
            history.translated = history.translated.saturating_add(1);
        }
    }

    /// A checked block was made.
    pub fn add(&mut self, key: Key, id: BlockId, checks: &[Check]) {
        for check in checks {
            if let Some(page) = self.pages.get_mut(&(check.start & !0xfff)) {
                page.blocks.push(id);
            }
        }
        self.versions.entry(key).or_default().push(id);
    }

    /// A block is thrown away.
    pub fn remove(&mut self, key: &Key, id: BlockId) {
        if let Some(versions) = self.versions.get_mut(key) {
            versions.retain(|v| *v != id);
            if versions.is_empty() {
                self.versions.remove(key);
            }
        }
    }

    /// The versions of a block, oldest first.
    pub fn versions(&self, key: &Key) -> &[BlockId] {
        self.versions.get(key).map_or(&[], Vec::as_slice)
    }

    /// Counts a block about to be translated on a checked page. Returns the blocks to throw away
    /// if the page is to be watched again.
    fn settle(&mut self, page: u64, stale: bool) -> Option<Vec<BlockId>> {
        let checked = self.pages.get_mut(&page)?;
        checked.fresh = if stale { 0 } else { checked.fresh + 1 };
        if checked.fresh < SETTLED {
            return None;
        }
        self.pages.remove(&page).map(|p| p.blocks)
    }
}

impl Cpu {
    /// The version of the block under `key` that fits the code as it is now.
    pub(crate) fn fitting_version(&self, key: &Key) -> Option<BlockId> {
        let versions = self.cache.rewritten.versions(key).iter();
        versions.copied().find(|&id| {
            self.cache
                .block(id)
                .and_then(|b| b.checks())
                .is_some_and(|checks| checks.iter().all(|c| c.holds(&self.vm.ram)))
        })
    }

    /// Called before a block is translated on a checked page: may make it a watched one again.
    pub(crate) fn prepare_checked(&mut self, key: &Key) {
        let page = key.physical & !0xfff;
        if !self.cache.rewritten.checks(page) {
            return;
        }
        let stale = !self.cache.rewritten.versions(key).is_empty();
        if let Some(blocks) = self.cache.rewritten.settle(page, stale) {
            self.kill_all(page, &blocks);
        }
    }

    /// Compares a new version of a block with the old ones: where only fields differ from one of
    /// them, those become variable and the new version takes its place.
    pub(crate) fn generalise(&mut self, key: &Key, checks: &mut [Check], fields: &[Field]) {
        let versions = self.cache.rewritten.versions(key).to_vec();
        if let [new] = checks {
            for &id in &versions {
                let old = self.cache.block(id).and_then(|b| b.checks());
                if let Some([old]) = old
                    && let Some(variable) = difference(old, new, fields)
                {
                    new.variable = variable;
                    self.kill_all(key.physical & !0xfff, &[id]);
                    return;
                }
            }
        }
        if versions.len() >= MAX_VERSIONS {
            self.kill_all(key.physical & !0xfff, &versions);
        }
    }
}

/// The fields of `new` that must be variable for it to stand for `old` as well, if that is all in
/// which they differ.
fn difference(old: &Check, new: &Check, fields: &[Field]) -> Option<Vec<Field>> {
    if old.start != new.start || old.bytes.len() != new.bytes.len() {
        return None;
    }
    let mut variable = old.variable.clone();
    for (n, (a, b)) in old.bytes.iter().zip(&new.bytes).enumerate() {
        if a == b || variable.iter().any(|f| f.contains(n)) {
            continue;
        }
        variable.push(*fields.iter().find(|f| f.contains(n))?);
    }
    // The same opcodes at the same places: the old block's fields are fields here too.
    variable.iter().all(|f| fields.contains(f)).then_some(variable)
}
