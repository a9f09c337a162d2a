//! The software TLBs: the one that translated code probes, a larger one behind it that knows
//! address spaces apart, and one for instruction fetches.
//!
//! Entries of the last two carry a *tag* (see `space`): that of the address space they belong to,
//! or that of global pages. A space is forgotten by giving it a new tag.
use crate::mode::MmuIndex;

/// Entries of one TLB table: a power of two.
pub const TLB_ENTRIES: usize = 512;

/// One page's translation. The probe computes `address ^ tag`: below 4096 it is a hit and the
/// offset in the page.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct TlbEntry {
    /// Linear address of the page; an empty slot holds one that belongs to another slot.
    pub tag: u64,
    /// Host address of the page.
    pub host: u64,
}

/// The set of rights that an access needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Right {
    /// Whose.
    pub mmu: MmuIndex,
    /// To write.
    pub write: bool,
}

impl Right {
    const fn bit(self) -> u64 {
        1 << (2 * self.mmu as u32 + self.write as u32)
    }
}

/// The data TLBs of one vCPU: a table for reads and one for writes for each MMU index. They hold
/// global pages and pages of the present address space.
#[repr(C)]
pub struct Tlb {
    /// Indexed by [`MmuIndex`], then read (0) or write (1), then page number modulo size.
    pub tables: [[[TlbEntry; TLB_ENTRIES]; 2]; MmuIndex::COUNT],
    /// Copies of entries of `tables`, each the page that some places of translated code used last:
    /// see `emit::recent`. Indexed by [`MmuIndex`] and right as they are.
    pub recent: [[[TlbEntry; RECENT]; 2]; MmuIndex::COUNT],
    /// How often each slot of `recent` may be filled until the next [`Tlb::be_patient`].
    pub patience: [[[i32; RECENT]; 2]; MmuIndex::COUNT],
    /// Nonzero where a slot of `recent` was filled since they were last emptied.
    pub recent_filled: u32,
    /// For each table, a bit for each slot that holds a global page, and one for each that holds
    /// another.
    filled: [[Filled; 2]; MmuIndex::COUNT],
}

#[derive(Clone, Copy)]
struct Filled {
    global: [u64; TLB_ENTRIES / 64],
    local: [u64; TLB_ENTRIES / 64],
}

const NOTHING: Filled = Filled { global: [0; TLB_ENTRIES / 64], local: [0; TLB_ENTRIES / 64] };

/// Slots of [`Tlb::recent`] for each right.
pub const RECENT: usize = 32;

/// A place that has to fill its slot so often between two events, mostly ticks of a timer, loses
/// more by that than it gains from finding its page there.
const PATIENCE: i32 = 32_768;

/// What an empty slot of [`Tlb::recent`] holds: an address that is not canonical, whose use as a
/// host address faults.
const EMPTY_RECENT: TlbEntry = TlbEntry { tag: 1 << 63, host: 1 << 63 };

/// What an empty slot holds.
const fn empty(slot: usize) -> TlbEntry {
    TlbEntry { tag: ((slot as u64) ^ 1) << 12, host: 0 }
}

/// Empties the slots whose bits are set, and clears the bits.
fn drain(table: &mut [TlbEntry; TLB_ENTRIES], bits: &mut [u64; TLB_ENTRIES / 64]) {
    for (n, word) in bits.iter_mut().enumerate() {
        let mut left = std::mem::take(word);
        while left != 0 {
            let slot = n * 64 + left.trailing_zeros() as usize;
            table[slot] = empty(slot);
            left &= left - 1;
        }
    }
}

impl Tlb {
    /// Empties `recent`.
    fn forget_recent(&mut self) {
        if std::mem::take(&mut self.recent_filled) != 0 {
            self.recent = [[[EMPTY_RECENT; RECENT]; 2]; MmuIndex::COUNT];
        }
    }

    /// Some time has passed: slots of `recent` may be filled as often again.
    pub fn be_patient(&mut self) {
        if self.recent_filled != 0 {
            self.patience = [[[PATIENCE; RECENT]; 2]; MmuIndex::COUNT];
        }
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.forget_recent();
        for (tables, filled) in self.tables.iter_mut().zip(&mut self.filled) {
            for (table, filled) in tables.iter_mut().zip(filled) {
                drain(table, &mut filled.global);
                drain(table, &mut filled.local);
            }
        }
    }

    /// Forgets all pages that are not global.
    pub fn flush_local(&mut self) {
        self.forget_recent();
        for (tables, filled) in self.tables.iter_mut().zip(&mut self.filled) {
            for (table, filled) in tables.iter_mut().zip(filled) {
                drain(table, &mut filled.local);
            }
        }
    }

    /// Fills every slot with the empty value, whatever is there (for fresh memory).
    pub fn initialise(&mut self) {
        for table in self.tables.iter_mut().flatten() {
            for (slot, entry) in table.iter_mut().enumerate() {
                *entry = empty(slot);
            }
        }
        self.filled = [[NOTHING; 2]; MmuIndex::COUNT];
        self.recent = [[[EMPTY_RECENT; RECENT]; 2]; MmuIndex::COUNT];
        self.patience = [[[PATIENCE; RECENT]; 2]; MmuIndex::COUNT];
    }

    /// Forgets one page in all tables.
    pub fn flush_page(&mut self, address: u64) {
        self.forget_recent();
        let slot = slot(address);
        for table in self.tables.iter_mut().flatten() {
            if table[slot].tag == address & !0xfff {
                table[slot] = empty(slot);
            }
        }
    }

    /// Forgets write access to a page of host memory, under whatever address.
    pub fn forbid_writes(&mut self, host: u64) {
        self.forget_recent();
        for (tables, filled) in self.tables.iter_mut().zip(&self.filled) {
            for n in 0..TLB_ENTRIES / 64 {
                let mut left = filled[1].global[n] | filled[1].local[n];
                while left != 0 {
                    let slot = n * 64 + left.trailing_zeros() as usize;
                    if tables[1][slot].host == host {
                        tables[1][slot] = empty(slot);
                    }
                    left &= left - 1;
                }
            }
        }
    }

    /// The host address of `address` if the table has it.
    #[inline]
    pub fn probe(&self, mmu: MmuIndex, write: bool, address: u64) -> Option<u64> {
        let entry = &self.tables[mmu as usize][usize::from(write)][slot(address)];
        let offset = entry.tag ^ address;
        (offset < 4096).then(|| entry.host + offset)
    }

    /// Takes a page in.
    pub fn fill(&mut self, right: Right, address: u64, page: Page) {
        let (mmu, write, slot) = (right.mmu as usize, usize::from(right.write), slot(address));
        self.tables[mmu][write][slot] = TlbEntry { tag: address & !0xfff, host: page.host };
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        let filled = &mut self.filled[mmu][write];
        let (in_it, out_of) = match page.global {
            true => (&mut filled.global, &mut filled.local),
            false => (&mut filled.local, &mut filled.global),
        };
        in_it[word] |= bit;
        out_of[word] &= !bit;
    }
}

/// A page to fill in.
pub struct Page {
    /// Host address.
    pub host: u64,
    /// Whether it survives a change of the address space.
    pub global: bool,
}

#[inline]
fn slot(address: u64) -> usize {
    (address >> 12) as usize & (TLB_ENTRIES - 1)
}

/// Entries of [`Walked`]: a power of two.
const WALKED: usize = 4096;

/// Results of page walks, of all address spaces: what spares a walk where [`Tlb`] misses.
pub struct Walked {
    entries: Box<[WalkedEntry; WALKED]>,
}

#[derive(Clone, Copy)]
struct WalkedEntry {
    /// Linear address of the page.
    page: u64,
    tag: u64,
    /// Guest-physical address of the page; below it the [`Right`]s for which it was walked, none
    /// in an empty entry.
    physical: u64,
}

impl Walked {
    /// An empty one.
    pub fn new() -> Self {
        let entry = WalkedEntry { page: 0, tag: 0, physical: 0 };
        let entries = vec![entry; WALKED].into_boxed_slice();
        // The length is that of the array: the conversion cannot fail.
        let entries = entries.try_into().unwrap_or_else(|_| Box::new([entry; WALKED]));
        Self { entries }
    }

    fn slot(page: u64, tag: u64) -> usize {
        ((page >> 12) ^ tag.wrapping_mul(0x9e37_79b9)) as usize & (WALKED - 1)
    }

    fn get(&self, address: u64, tag: u64) -> Option<u64> {
        let page = address & !0xfff;
        let entry = &self.entries[Self::slot(page, tag)];
        (entry.page == page && entry.tag == tag).then_some(entry.physical)
    }

    /// The physical address of `address` if a walk for this right found one, and whether the page
    /// is global; `tag` is that of the present space.
    pub fn find(&self, address: u64, right: Right, tag: Tags) -> Option<(u64, bool)> {
        let known = |tag: u64, global: bool| {
            let physical = self.get(address, tag).filter(|p| p & right.bit() != 0)?;
            Some(((physical & !0xfff) | (address & 0xfff), global))
        };
        known(tag.local, false).or_else(|| known(tag.global, true))
    }

    /// Keeps the result of a walk.
    pub fn add(&mut self, address: u64, right: Right, tag: u64, physical: u64) {
        let (page, physical) = (address & !0xfff, physical & !0xfff);
        let entry = &mut self.entries[Self::slot(page, tag)];
        let same = entry.page == page && entry.tag == tag && entry.physical & !0xfff == physical;
        let rights = if same { entry.physical & 0xfff } else { 0 };
        *entry = WalkedEntry { page, tag, physical: physical | rights | right.bit() };
    }

    /// Forgets a page of one tag.
    pub fn flush_page(&mut self, address: u64, tag: u64) {
        let page = address & !0xfff;
        let entry = &mut self.entries[Self::slot(page, tag)];
        if entry.page == page && entry.tag == tag {
            entry.physical = 0;
        }
    }
}

/// The tags that are valid at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tags {
    /// Of the present address space.
    pub local: u64,
    /// Of global pages.
    pub global: u64,
}

/// Entries of [`ExecTlb`]: a power of two.
const EXEC: usize = 512;

/// Translations of pages from which instructions were fetched.
pub struct ExecTlb {
    entries: [ExecEntry; EXEC],
}

/// One of them.
#[derive(Clone, Copy)]
pub struct ExecEntry {
    /// Linear page, with bit 1 set for CPL 3; bit 0 marks an empty entry.
    key: u64,
    tag: u64,
    /// Guest-physical page.
    physical: u64,
}

impl ExecEntry {
    /// For the page of `address`, fetched from at CPL 3 or not.
    pub fn new(address: u64, user: bool, tag: u64, physical: u64) -> Self {
        Self { key: Self::key(address, user), tag, physical: physical & !0xfff }
    }

    const fn key(address: u64, user: bool) -> u64 {
        (address & !0xfff) | (user as u64) << 1
    }
}

impl ExecTlb {
    const EMPTY: ExecEntry = ExecEntry { key: 1, tag: 0, physical: 0 };

    /// An empty one.
    pub const fn new() -> Self {
        Self { entries: [Self::EMPTY; EXEC] }
    }

    fn slot(address: u64) -> usize {
        (address >> 12) as usize & (EXEC - 1)
    }

    /// The guest-physical page of `address`.
    #[inline]
    pub fn find(&self, address: u64, user: bool, tags: Tags) -> Option<u64> {
        let entry = &self.entries[Self::slot(address)];
        let valid = entry.tag == tags.local || entry.tag == tags.global;
        (entry.key == ExecEntry::key(address, user) && valid).then_some(entry.physical)
    }

    /// The tag of a page that was just found.
    pub fn tag_of(&self, address: u64) -> Option<u64> {
        let entry = &self.entries[Self::slot(address)];
        (entry.key & !0xfff == address & !0xfff && entry.key & 1 == 0).then_some(entry.tag)
    }

    /// Takes a page in.
    pub fn fill(&mut self, entry: ExecEntry) {
        self.entries[Self::slot(entry.key)] = entry;
    }

    /// Forgets a page, in whatever space.
    pub fn flush_page(&mut self, address: u64) {
        let entry = &mut self.entries[Self::slot(address)];
        if entry.key & !0xfff == address & !0xfff {
            *entry = Self::EMPTY;
        }
    }
}

impl Default for ExecTlb {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Right = Right { mmu: MmuIndex::User, write: false };
    const WRITE: Right = Right { mmu: MmuIndex::User, write: true };
    const TAGS: Tags = Tags { local: 7, global: 1 };

    #[test]
    fn a_walk_is_remembered_for_its_space_and_its_right_only() {
        let mut walked = Walked::new();
        walked.add(0x7000_1234, READ, 7, 0x5000);
        assert_eq!(walked.find(0x7000_1010, READ, TAGS), Some((0x5010, false)));
        assert_eq!(walked.find(0x7000_1010, WRITE, TAGS), None);
        assert_eq!(walked.find(0x7000_1010, READ, Tags { local: 8, global: 1 }), None);
    }

    #[test]
    fn a_walk_to_another_page_takes_the_place_of_all_rights_to_the_first() {
        let mut walked = Walked::new();
        walked.add(0x1000, READ, 7, 0x5000);
        walked.add(0x1000, WRITE, 7, 0x5000);
        assert_eq!(walked.find(0x1000, READ, TAGS), Some((0x5000, false)));
        walked.add(0x1000, WRITE, 7, 0x6000);
        assert_eq!(walked.find(0x1000, READ, TAGS), None);
        assert_eq!(walked.find(0x1000, WRITE, TAGS), Some((0x6000, false)));
    }

    #[test]
    fn global_pages_are_known_in_every_space_and_one_page_can_be_forgotten() {
        let mut walked = Walked::new();
        walked.add(0x1000, READ, 1, 0x5000);
        assert_eq!(walked.find(0x1000, READ, Tags { local: 9, global: 1 }), Some((0x5000, true)));
        walked.flush_page(0x1fff, 1);
        assert_eq!(walked.find(0x1000, READ, TAGS), None);
    }

    #[test]
    fn fetches_are_remembered_by_space_and_privilege() {
        let mut exec = ExecTlb::new();
        exec.fill(ExecEntry::new(0x4000, true, 7, 0x9000));
        assert_eq!(exec.find(0x4fff, true, TAGS), Some(0x9000));
        assert_eq!(exec.find(0x4000, false, TAGS), None);
        assert_eq!(exec.find(0x4000, true, Tags { local: 8, global: 1 }), None);
        exec.flush_page(0x4008);
        assert_eq!(exec.find(0x4000, true, TAGS), None);
    }
}
