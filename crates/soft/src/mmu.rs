//! Guest-linear to guest-physical: page walks, and filling the TLBs of `tlb` from them.
//!
//! Translated code probes the TLB inline (see `emit::memory`); everything here runs when a probe
//! misses, and for the accesses of helpers.
use crate::cpu::Cpu;
use crate::exception::Exception;
use crate::mode::MmuIndex;
use crate::tlb::{ExecEntry, Page, Right};
use arch::registers::{cr0, cr4, efer};
use std::sync::atomic::{AtomicU64, Ordering};

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
    /// Size of the page as a power of two: 12 without paging.
    pub bits: u32,
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
            return Ok(Translation { physical: address, bits: 12, global: false });
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
                let bits = 12 + 9 * (level - 1);
                let offset = (1u64 << bits) - 1;
                let physical = (entry & ADDRESS & !offset) | (address & offset);
                return Ok(Translation { physical, bits, global: self.is_global(entry) });
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
            return Ok(Translation { physical, bits: 22, global: self.is_global(entry) });
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
        Ok(Translation { physical, bits: 12, global: self.is_global(leaf) })
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
        let right = Right { mmu: self.mode.mmu(), write: want == Want::Write };
        self.fill(address, right, As::Current)
    }

    /// The same for a right that is not that of the present privilege. What the system may access
    /// is what supervisor code may while EFLAGS.AC is clear ([`MmuIndex::Supervisor`]).
    ///
    /// # Errors
    /// #PF.
    pub fn fill(&mut self, address: u64, right: Right, who: As) -> Result<Option<u64>, Exception> {
        let (physical, global) = match self.walked.find(address, right, self.spaces.tags()) {
            Some(known) => known,
            None => {
                let want = if right.write { Want::Write } else { Want::Read };
                let Translation { physical, bits, global } = self.translate(address, want, who)?;
                let tag = self.note_walk(address, bits, global);
                self.walked.add(address, right, tag, physical);
                (physical, global)
            }
        };
        let watched = self.data_breakpoints() || right.mmu == MmuIndex::Aligned;
        let Some(page) = self.vm.ram.page(physical) else { return Ok(None) };
        if watched || self.lapic.claims(physical) {
            return Ok(None);
        }
        if right.write && (page.read_only || page.code.load(Ordering::SeqCst) != 0) {
            return Ok(None);
        }
        let host = page.host as u64;
        if right.write {
            self.vm.dirty.note(physical);
        }
        self.tlb.fill(right, address, Page { host, global });
        Ok(Some(host + (address & 0xfff)))
    }

    /// Guest-physical address of an instruction byte.
    ///
    /// # Errors
    /// #PF.
    pub fn translate_fetch(&mut self, address: u64) -> Result<u64, Exception> {
        let user = self.sys.cpl == 3;
        if let Some(page) = self.exec_tlb.find(address, user, self.spaces.tags()) {
            return Ok(page | (address & 0xfff));
        }
        let Translation { physical, bits, global } =
            self.translate(address, Want::Execute, As::Current)?;
        self.spaces.note_walk(address, bits, global);
        let tag = self.spaces.note_fetch(address, global);
        self.exec_tlb.fill(ExecEntry::new(address, user, tag, physical));
        Ok(physical)
    }

    /// Notes the walk to a page of data of 2 to the power of `bits` bytes; gives its tag.
    fn note_walk(&mut self, address: u64, bits: u32, global: bool) -> u64 {
        if bits > 12 && self.spaces.crowded() {
            self.flush_tlb();
        }
        self.spaces.note_walk(address, bits, global)
    }

    /// Whether the page of an instruction that was just fetched is global.
    pub fn fetched_from_global(&self, address: u64) -> bool {
        self.exec_tlb.tag_of(address) == Some(self.spaces.tags().global)
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
