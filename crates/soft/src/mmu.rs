//! Guest-linear to guest-physical: page walks and the software TLBs.
//!
//! Translated code probes [`Tlb`] inline (see `emit::memory`); everything here runs when a probe
//! misses, and for the accesses of helpers.
use crate::cpu::Cpu;
use crate::exception::Exception;
use crate::mode::MmuIndex;
use arch::registers::{cr0, cr4, efer};
use std::sync::atomic::{AtomicU64, Ordering};

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

/// The data TLBs of one vCPU: a table for reads and one for writes for each MMU index.
#[repr(C)]
pub struct Tlb {
    /// Indexed by [`MmuIndex`], then read (0) or write (1), then page number modulo size.
    pub tables: [[[TlbEntry; TLB_ENTRIES]; 2]; MmuIndex::COUNT],
    /// For each table, whether it holds anything: what makes flushing an unused one free.
    pub used: [[bool; 2]; MmuIndex::COUNT],
    /// For each table, a bit for each slot that holds a global page.
    pub global: [[[u64; TLB_ENTRIES / 64]; 2]; MmuIndex::COUNT],
}

const EMPTY: [TlbEntry; TLB_ENTRIES] = {
    let mut table = [TlbEntry { tag: 0, host: 0 }; TLB_ENTRIES];
    let mut i = 0;
    while i < TLB_ENTRIES {
        table[i].tag = ((i as u64) ^ 1) << 12;
        i += 1;
    }
    table
};

impl Tlb {
    /// Forgets everything.
    pub fn flush(&mut self) {
        for (tables, used) in self.tables.iter_mut().zip(&mut self.used) {
            for (table, used) in tables.iter_mut().zip(used) {
                if std::mem::take(used) {
                    *table = EMPTY;
                }
            }
        }
    }

    /// Forgets all pages that are not global.
    pub fn flush_non_global(&mut self) {
        for mmu in 0..MmuIndex::COUNT {
            for write in 0..2 {
                if !self.used[mmu][write] {
                    continue;
                }
                let global = self.global[mmu][write];
                self.used[mmu][write] = global.iter().any(|word| *word != 0);
                let table = &mut self.tables[mmu][write];
                for (slot, entry) in table.iter_mut().enumerate() {
                    if global[slot / 64] >> (slot % 64) & 1 == 0 {
                        *entry = EMPTY[slot];
                    }
                }
            }
        }
    }

    /// Fills every slot with the empty value, whatever is there (for fresh memory).
    pub fn initialise(&mut self) {
        self.used = [[true; 2]; MmuIndex::COUNT];
        self.flush();
    }

    /// Forgets one page in all tables.
    pub fn flush_page(&mut self, address: u64) {
        let slot = slot(address);
        for tables in &mut self.tables {
            for table in tables {
                if table[slot].tag == address & !0xfff {
                    table[slot] = EMPTY[slot];
                }
            }
        }
    }

    /// Forgets write access to a page of host memory, under whatever address.
    pub fn forbid_writes(&mut self, host: u64) {
        for (tables, used) in self.tables.iter_mut().zip(&self.used) {
            if used[1] {
                for (slot, entry) in tables[1].iter_mut().enumerate() {
                    if entry.host == host {
                        *entry = EMPTY[slot];
                    }
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

    fn fill(&mut self, mmu: MmuIndex, write: bool, address: u64, page: Page) {
        let (mmu, write, slot) = (mmu as usize, usize::from(write), slot(address));
        self.used[mmu][write] = true;
        self.tables[mmu][write][slot] = TlbEntry { tag: address & !0xfff, host: page.host };
        let bit = 1 << (slot % 64);
        match page.global {
            true => self.global[mmu][write][slot / 64] |= bit,
            false => self.global[mmu][write][slot / 64] &= !bit,
        }
    }
}

/// A page to fill in.
struct Page {
    host: u64,
    global: bool,
}

#[inline]
fn slot(address: u64) -> usize {
    (address >> 12) as usize & (TLB_ENTRIES - 1)
}

/// Translations of pages from which instructions were fetched.
pub struct ExecTlb {
    entries: [ExecEntry; 256],
    /// A filter of the pages fetched from since the last flush: bit `page % 4096`.
    fetched: [u64; 64],
}

#[derive(Clone, Copy)]
struct ExecEntry {
    /// Linear page, with bit 1 set for CPL 3; bit 0 marks an empty entry.
    key: u64,
    physical: u64,
    global: bool,
}

impl ExecTlb {
    const EMPTY: ExecEntry = ExecEntry { key: 1, physical: 0, global: false };

    /// An empty one.
    pub const fn new() -> Self {
        Self { entries: [Self::EMPTY; 256], fetched: [0; 64] }
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        *self = Self::new();
    }

    /// Forgets all pages that are not global. What links to global ones stays.
    pub fn flush_non_global(&mut self) {
        for entry in self.entries.iter_mut().filter(|e| !e.global) {
            *entry = Self::EMPTY;
        }
    }

    /// Whether the page may have been fetched from since the last flush.
    pub fn may_know(&self, address: u64) -> bool {
        let page = address >> 12;
        self.fetched[(page >> 6 & 63) as usize] >> (page & 63) & 1 != 0
    }

    fn fill(&mut self, slot: usize, entry: ExecEntry) {
        let page = entry.key >> 12;
        self.fetched[(page >> 6 & 63) as usize] |= 1 << (page & 63);
        self.entries[slot] = entry;
    }
}

impl Default for ExecTlb {
    fn default() -> Self {
        Self::new()
    }
}

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// A load.
    Read,
    /// A store, or a load that will be followed by a store to the same place.
    Write,
    /// An instruction fetch.
    Execute,
}

/// On whose behalf an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum As {
    /// With the rights of the present privilege level: what instructions' operands use.
    Current,
    /// As the system: descriptor tables, TSS, interrupt stacks at CPL 0 (implicit supervisor
    /// accesses, which SMAP forbids to user pages whatever EFLAGS.AC says).
    System,
}

/// Where a linear page lies.
#[derive(Clone, Copy, Debug)]
pub struct Translation {
    /// Guest-physical address, with the offset of the linear one.
    pub physical: u64,
    /// The page is global: it survives a write to CR3 (Intel SDM 3A 4.10.2.4).
    pub global: bool,
}

/// Error-code bits of #PF (Intel SDM 3A 4.7).
pub mod fault {
    /// Protection violation, not a missing page.
    pub const PRESENT: u32 = 1;
    /// A write.
    pub const WRITE: u32 = 2;
    /// At CPL 3.
    pub const USER: u32 = 4;
    /// A reserved bit is set in an entry.
    pub const RESERVED: u32 = 8;
    /// An instruction fetch (only where NX or SMEP exist).
    pub const FETCH: u32 = 16;
}

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 32;
const DIRTY: u64 = 64;
const LARGE: u64 = 128;
const GLOBAL: u64 = 256;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits of a physical address that this CPU has (CPUID 8000_0008H says the same).
pub const PHYSICAL_BITS: u32 = 48;
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;

/// Rights and purpose of one walk.
#[derive(Clone, Copy)]
struct Request {
    want: Want,
    user: bool,
    /// Supervisor access to user pages allowed although SMAP is on.
    ac: bool,
}

impl Cpu {
    /// Translates a linear address for the given purpose, setting accessed and dirty bits.
    ///
    /// # Errors
    /// #PF, with CR2 and error code.
    pub fn translate(
        &mut self,
        address: u64,
        want: Want,
        who: As,
    ) -> Result<Translation, Exception> {
        if !self.paging() {
            return Ok(Translation { physical: address, global: false });
        }
        let user = who == As::Current && self.sys.cpl == 3;
        let ac = who == As::Current && self.rflags & arch::registers::rflags::AC != 0;
        let request = Request { want, user, ac };
        let walk = if self.sys.cr4 & cr4::PAE != 0 {
            self.walk_64(address, request)
        } else {
            self.walk_32(address, request)
        };
        walk.map_err(|code| self.page_fault(address, code, request))
    }

    fn page_fault(&self, address: u64, code: u32, request: Request) -> Exception {
        let mut error = code;
        if request.want == Want::Write {
            error |= fault::WRITE;
        }
        if request.user {
            error |= fault::USER;
        }
        let nx = self.sys.efer & efer::NXE != 0 && self.sys.cr4 & cr4::PAE != 0;
        if request.want == Want::Execute && (nx || self.sys.cr4 & cr4::SMEP != 0) {
            error |= fault::FETCH;
        }
        Exception::page_fault(error, address)
    }

    /// Level count and physical address of the top table; for PAE paging the level below the four
    /// page-directory pointers, or `None` where that pointer is not present.
    fn root(&self, address: u64) -> Option<(u32, u64)> {
        if self.long_mode() {
            let levels = if self.sys.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
            return Some((levels, self.sys.cr3 & ADDRESS));
        }
        let slot = (self.sys.cr3 & 0xffff_ffe0) + (address >> 30 & 3) * 8;
        let pointer = self.vm.ram.entry64(slot)?.load(Ordering::Relaxed);
        (pointer & PRESENT != 0).then_some((2, pointer & ADDRESS))
    }

    /// PAE, 4-level and 5-level paging (Intel SDM 3A 4.4 and 4.5).
    fn walk_64(&self, address: u64, request: Request) -> Result<Translation, u32> {
        let (mut level, mut table) = self.root(address).ok_or(0u32)?;
        let no_execute_on = self.sys.efer & efer::NXE != 0;
        let mut rights = WRITABLE | USER;
        let mut no_execute = false;
        loop {
            let slot = self.vm.ram.entry64(table | index(address, level) << 3).ok_or(0u32)?;
            let entry = slot.load(Ordering::Acquire);
            if entry & PRESENT == 0 {
                return Err(0);
            }
            let large = entry & LARGE != 0 && (level == 2 || level == 3);
            let reserved = reserved_bits(level, large, no_execute_on, self.long_mode());
            if entry & reserved != 0 {
                return Err(fault::RESERVED | fault::PRESENT);
            }
            rights &= entry;
            no_execute |= entry & NO_EXECUTE != 0;
            if level == 1 || large {
                self.check_rights(rights, no_execute, request)?;
                if set_used(slot, entry, request.want == Want::Write) {
                    self.vm.dirty.note(table);
                }
                let offset = (1u64 << (12 + 9 * (level - 1))) - 1;
                let physical = (entry & ADDRESS & !offset) | (address & offset);
                return Ok(Translation { physical, global: self.is_global(entry) });
            }
            if set_used(slot, entry, false) {
                self.vm.dirty.note(table);
            }
            table = entry & ADDRESS;
            level -= 1;
        }
    }

    /// 32-bit paging with 4 KiB and 4 MiB pages (Intel SDM 3A 4.3).
    fn walk_32(&self, address: u64, request: Request) -> Result<Translation, u32> {
        let directory = (self.sys.cr3 & 0xffff_f000) | (address >> 22 & 0x3ff) << 2;
        let slot = self.vm.ram.entry32(directory).ok_or(0u32)?;
        let entry = u64::from(slot.load(Ordering::Acquire));
        if entry & PRESENT == 0 {
            return Err(0);
        }
        if entry & LARGE != 0 && self.sys.cr4 & cr4::PSE != 0 {
            if entry & 1 << 21 != 0 {
                return Err(fault::RESERVED | fault::PRESENT);
            }
            self.check_rights(entry, false, request)?;
            if set_used_32(slot, entry as u32, request.want == Want::Write) {
                self.vm.dirty.note(directory);
            }
            // PSE-36: bits 13–20 of the entry are bits 32–39 of the address.
            let physical =
                (entry & 0xffc0_0000) | (entry >> 13 & 0xff) << 32 | (address & 0x3f_ffff);
            return Ok(Translation { physical, global: self.is_global(entry) });
        }
        if set_used_32(slot, entry as u32, false) {
            self.vm.dirty.note(directory);
        }
        let table = (entry & 0xffff_f000) | (address >> 12 & 0x3ff) << 2;
        let slot = self.vm.ram.entry32(table).ok_or(0u32)?;
        let leaf = u64::from(slot.load(Ordering::Acquire));
        if leaf & PRESENT == 0 {
            return Err(0);
        }
        let rights = entry & leaf;
        self.check_rights(rights, false, request)?;
        if set_used_32(slot, leaf as u32, request.want == Want::Write) {
            self.vm.dirty.note(table);
        }
        let physical = (leaf & 0xffff_f000) | (address & 0xfff);
        Ok(Translation { physical, global: self.is_global(leaf) })
    }

    fn is_global(&self, entry: u64) -> bool {
        entry & GLOBAL != 0 && self.sys.cr4 & cr4::PGE != 0
    }

    /// Intel SDM 3A 4.6.1.
    fn check_rights(&self, rights: u64, no_execute: bool, request: Request) -> Result<(), u32> {
        let user_page = rights & USER != 0;
        let writable = rights & WRITABLE != 0;
        let denied = if request.user {
            !user_page || (request.want == Want::Write && !writable)
        } else {
            let smap = self.sys.cr4 & cr4::SMAP != 0 && user_page && !request.ac;
            match request.want {
                Want::Read => smap,
                Want::Write => smap || (!writable && self.sys.cr0 & cr0::WP != 0),
                Want::Execute => self.sys.cr4 & cr4::SMEP != 0 && user_page,
            }
        };
        if denied || (request.want == Want::Execute && no_execute) {
            return Err(fault::PRESENT);
        }
        Ok(())
    }

    /// Makes `address`'s page quickly accessible if it is RAM, and returns the host address of
    /// the byte; `None` is a device, ROM written to, or a page whose writes must be watched.
    ///
    /// # Errors
    /// #PF.
    pub fn fill_tlb(&mut self, address: u64, want: Want) -> Result<Option<u64>, Exception> {
        let translation = self.translate(address, want, As::Current)?;
        let mmu = self.mode.mmu();
        let vm = self.vm.clone();
        let Some(page) = vm.ram.page(translation.physical) else { return Ok(None) };
        let write = want == Want::Write;
        let watched = self.data_breakpoints() || mmu == MmuIndex::Aligned;
        let host = page.host as u64;
        if watched || self.lapic.claims(translation.physical) {
            return Ok(None);
        }
        if write && (page.read_only || page.code.load(Ordering::SeqCst) != 0) {
            return Ok(None);
        }
        if write {
            vm.dirty.note(translation.physical);
        }
        self.tlb.fill(mmu, write, address, Page { host, global: translation.global });
        Ok(Some(host + (address & 0xfff)))
    }

    /// Guest-physical address of an instruction byte.
    ///
    /// # Errors
    /// #PF.
    pub fn translate_fetch(&mut self, address: u64) -> Result<u64, Exception> {
        let key = (address & !0xfff) | u64::from(self.sys.cpl == 3) << 1;
        let slot = (address >> 12) as usize & 255;
        let entry = self.exec_tlb.entries[slot];
        if entry.key == key {
            return Ok(entry.physical | (address & 0xfff));
        }
        let Translation { physical, global } =
            self.translate(address, Want::Execute, As::Current)?;
        self.exec_tlb.fill(slot, ExecEntry { key, physical: physical & !0xfff, global });
        Ok(physical)
    }

    /// Whether the page of an instruction that was just fetched is global.
    pub fn fetched_from_global(&self, address: u64) -> bool {
        let entry = self.exec_tlb.entries[(address >> 12) as usize & 255];
        entry.key & !0xfff == address & !0xfff && entry.global
    }

    /// Forgets all translations, as MOV to CR3 and changes of paging mode do.
    pub fn flush_tlb(&mut self) {
        self.tlb.flush();
        self.exec_tlb.flush();
        self.flush_jump_caches();
    }

    /// Forgets translations of pages that are not global, as MOV to CR3 does.
    pub fn flush_tlb_non_global(&mut self) {
        self.tlb.flush_non_global();
        self.exec_tlb.flush_non_global();
        self.flush_jumps_non_global();
    }

    /// INVLPG.
    pub fn flush_tlb_page(&mut self, address: u64) {
        self.tlb.flush_page(address);
        if self.exec_tlb.may_know(address) {
            self.exec_tlb.flush();
            self.flush_jump_caches();
        }
    }
}

fn index(address: u64, level: u32) -> u64 {
    address >> (12 + 9 * (level - 1)) & 0x1ff
}

/// Bits that must be zero in an entry (Intel SDM 3A 4.5.4 and table 4-9).
fn reserved_bits(level: u32, large: bool, no_execute_on: bool, long: bool) -> u64 {
    let mut bits = ((1 << 52) - 1) & !((1u64 << PHYSICAL_BITS) - 1);
    if !no_execute_on {
        bits |= NO_EXECUTE;
    }
    if !long {
        bits |= 0x7ff << 52;
    }
    if large {
        // Between the PAT bit (12) and the page's own address bits.
        bits |= ((1u64 << (12 + 9 * (level - 1))) - 1) & !0x1fff;
    } else if level >= 4 {
        bits |= LARGE;
    }
    bits
}

/// Sets the accessed bit, and the dirty bit for a write; answers whether the entry changed.
fn set_used(slot: &AtomicU64, entry: u64, write: bool) -> bool {
    let wanted = ACCESSED | if write { DIRTY } else { 0 };
    let changes = entry & wanted != wanted;
    if changes {
        slot.fetch_or(wanted, Ordering::AcqRel);
    }
    changes
}

fn set_used_32(slot: &std::sync::atomic::AtomicU32, entry: u32, write: bool) -> bool {
    let wanted = (ACCESSED | if write { DIRTY } else { 0 }) as u32;
    let changes = entry & wanted != wanted;
    if changes {
        slot.fetch_or(wanted, Ordering::AcqRel);
    }
    changes
}
