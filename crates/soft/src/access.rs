//! Memory accesses of helpers, and of translated code when its inline probe misses: paging,
//! page-crossing operands, device registers, ROM, and writes to pages that hold translated code.
#![allow(unsafe_code)]
use crate::cpu::Cpu;
use crate::debug::data_hits;
use crate::exception::Exception;
use crate::mmu::{As, Want};
use crate::mode::MmuIndex;
use crate::tlb::Right;
use arch::{GuestPhysical, SegmentName};
use std::sync::atomic::Ordering;

/// A write that goes on after the instruction has stored to the place it was given.
#[derive(Clone, Copy, Default)]
pub enum PendingWrite {
    /// Nothing: the store went to RAM.
    #[default]
    None,
    /// The store went to RAM that holds translated code: (guest-physical start, length).
    Code(u64, usize),
    /// The store went to the bounce buffer: up to two pieces of (guest-physical, length).
    Bounced([(u64, usize); 2]),
}

impl Cpu {
    /// Reads `data.len()` bytes (at most 4096) at a linear address.
    ///
    /// # Errors
    /// #PF, or #AC where alignment is checked.
    pub fn load(&mut self, address: u64, data: &mut [u8], who: As) -> Result<(), Exception> {
        if let Some(host) = self.quick(address, data.len(), false, who)? {
            // SAFETY: `quick` returned the host address of as many bytes of guest RAM.
            unsafe {
                std::ptr::copy_nonoverlapping(host as *const u8, data.as_mut_ptr(), data.len())
            };
            return Ok(());
        }
        let first = pieces(address, data.len());
        self.check_alignment(address, data.len(), who)?;
        let (head, tail) = data.split_at_mut(first);
        let physical = self.translate(address, Want::Read, who)?.physical;
        if !tail.is_empty() {
            let next = self.next_page(address);
            let second = self.translate(next, Want::Read, who)?.physical;
            self.physical_read(second, tail);
        }
        self.physical_read(physical, head);
        self.watch(address, data.len(), false, who);
        Ok(())
    }

    /// Writes `data.len()` bytes (at most 4096) at a linear address; nothing is written if any
    /// byte cannot be.
    ///
    /// # Errors
    /// #PF, or #AC where alignment is checked.
    pub fn store(&mut self, address: u64, data: &[u8], who: As) -> Result<(), Exception> {
        if let Some(host) = self.quick(address, data.len(), true, who)? {
            // SAFETY: as in `load`, and the TLB's write table holds only writable RAM.
            unsafe { store_bytes(host as *mut u8, data) };
            return Ok(());
        }
        let first = pieces(address, data.len());
        self.check_alignment(address, data.len(), who)?;
        let (head, tail) = data.split_at(first);
        let physical = self.translate(address, Want::Write, who)?.physical;
        if !tail.is_empty() {
            let next = self.next_page(address);
            let second = self.translate(next, Want::Write, who)?.physical;
            self.physical_write(second, tail);
        }
        self.physical_write(physical, head);
        self.watch(address, data.len(), true, who);
        Ok(())
    }

    /// Reads a little-endian value of 1, 2, 4 or 8 bytes.
    ///
    /// # Errors
    /// As [`Cpu::load`].
    pub fn load_value(&mut self, address: u64, size: usize, who: As) -> Result<u64, Exception> {
        let mut bytes = [0; 8];
        self.load(address, bytes.get_mut(..size).unwrap_or(&mut []), who)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes the low `size` bytes (1, 2, 4 or 8) of `value`.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    pub fn store_value(
        &mut self,
        address: u64,
        value: u64,
        size: usize,
        who: As,
    ) -> Result<(), Exception> {
        let bytes = value.to_le_bytes();
        self.store(address, bytes.get(..size).unwrap_or(&[]), who)
    }

    /// Checks that `size` bytes could be written, without writing (sets dirty bits).
    ///
    /// # Errors
    /// As [`Cpu::store`].
    pub fn probe_store(&mut self, address: u64, size: usize, who: As) -> Result<(), Exception> {
        if self.quick(address, size, true, who)?.is_some() {
            return Ok(());
        }
        self.translate(address, Want::Write, who)?;
        if pieces(address, size) < size {
            self.translate(self.next_page(address), Want::Write, who)?;
        }
        Ok(())
    }

    /// Reads an operand of an instruction through a segment.
    ///
    /// # Errors
    /// Segmentation and paging faults.
    pub fn load_operand(
        &mut self,
        segment: SegmentName,
        offset: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        let address = self.linear(segment, offset, size as u64, false)?;
        self.load_value(address, size, As::Current)
    }

    /// Writes an operand of an instruction through a segment.
    ///
    /// # Errors
    /// Segmentation and paging faults.
    pub fn store_operand(
        &mut self,
        segment: SegmentName,
        offset: u64,
        value: u64,
        size: usize,
    ) -> Result<(), Exception> {
        let address = self.linear(segment, offset, size as u64, true)?;
        self.store_value(address, value, size, As::Current)
    }

    /// Host pointer to the byte at `address` and the number of bytes up to the end of its page,
    /// or `None` where single accesses must be made (device, ROM written to, watched, code).
    /// For bulk string instructions.
    ///
    /// # Errors
    /// #PF.
    pub fn span(
        &mut self,
        address: u64,
        want: Want,
    ) -> Result<Option<(*mut u8, usize)>, Exception> {
        let left = 4096 - (address & 0xfff) as usize;
        if let Some(host) = self.tlb.probe(self.mode.mmu(), want == Want::Write, address) {
            return Ok(Some((host as *mut u8, left)));
        }
        Ok(self.fill_tlb(address, want)?.map(|host| (host as *mut u8, left)))
    }

    /// The host address of `size` bytes within a page of RAM, if they can be accessed there
    /// without further ado.
    ///
    /// # Errors
    /// #PF.
    pub fn quick(
        &mut self,
        address: u64,
        size: usize,
        write: bool,
        who: As,
    ) -> Result<Option<u64>, Exception> {
        let mmu = match who {
            As::Current => self.mode.mmu(),
            As::System => MmuIndex::Supervisor,
        };
        // A misaligned operand's #AC comes before its page fault.
        if pieces(address, size) < size || mmu == MmuIndex::Aligned {
            return Ok(None);
        }
        match self.tlb.probe(mmu, write, address) {
            Some(host) => Ok(Some(host)),
            None => self.fill(address, Right { mmu, write }, who),
        }
    }

    /// AMD's MXCSR.MM: unaligned operands of legacy SSE instructions are allowed.
    pub fn misaligned_allowed(&self) -> bool {
        self.area.0[26] & 2 != 0
    }

    fn next_page(&self, address: u64) -> u64 {
        ((address | 0xfff).wrapping_add(1)) & self.address_mask()
    }

    /// #AC where alignment is checked and the operand is not aligned to its size.
    fn check_alignment(&self, address: u64, size: usize, who: As) -> Result<(), Exception> {
        let checked = self.mode.mmu() == MmuIndex::Aligned && who == As::Current;
        // As CPUs do it: a 10-byte x87 operand counts as 8 bytes, a YMM operand as two of 16, and
        // whole images are not checked.
        let natural = match size {
            1 | 2 | 4 | 8 | 16 => size,
            10 => 8,
            32 => 16,
            _ => 1,
        };
        if checked && address & (natural as u64 - 1) != 0 {
            return Err(Exception::ALIGNMENT);
        }
        Ok(())
    }

    /// Notes hits of data breakpoints (Intel SDM 3B 17.2.5); while any is enabled the CPU steps,
    /// so that the run loop sees them after the instruction.
    fn watch(&mut self, address: u64, size: usize, write: bool, who: As) {
        if who == As::System {
            return;
        }
        let dr7 = self.sys.debug[5];
        if dr7 & 0xff != 0 {
            self.sys.debug_hits |= data_hits(&self.sys.debug, dr7, address, size, write);
        }
        if self.outside.dr7 != 0 {
            let (addresses, dr7) = (&self.outside.addresses, self.outside.dr7);
            self.outside.hits |= data_hits(addresses, dr7, address, size, write);
        }
    }

    /// Reads guest-physical bytes, within one page.
    pub fn physical_read(&mut self, physical: u64, data: &mut [u8]) {
        if self.lapic.claims(physical) {
            self.lapic_read(physical, data);
        } else if let Some(host) = self.vm.ram.bytes(physical, data.len()) {
            // SAFETY: `bytes` vouches for the whole range; guest memory may change at any time
            // and no reference to it is formed.
            unsafe { std::ptr::copy_nonoverlapping(host, data.as_mut_ptr(), data.len()) };
        } else {
            for (i, part) in data.chunks_mut(64).enumerate() {
                self.io().mmio_read(GuestPhysical(physical + 64 * i as u64), part);
            }
        }
    }

    /// Writes guest-physical bytes, within one page.
    pub fn physical_write(&mut self, physical: u64, data: &[u8]) {
        if self.lapic.claims(physical) {
            self.lapic_write(physical, data);
            return;
        }
        let Some(page) = self.vm.ram.page(physical) else {
            for (i, part) in data.chunks(64).enumerate() {
                self.io().mmio_write(GuestPhysical(physical + 64 * i as u64), part);
            }
            return;
        };
        if page.read_only {
            return;
        }
        let Some(host) = self.vm.ram.bytes(physical, data.len()) else { return };
        self.vm.dirty.note(physical);
        // SAFETY: as in `physical_read`; the page is not read-only.
        unsafe { store_bytes(host, data) };
        if page.code.load(Ordering::SeqCst) != 0 {
            self.code_written(physical, data.len());
        }
    }

    /// Finds where translated code shall load `size` bytes from: RAM or the bounce buffer.
    ///
    /// # Errors
    /// #PF, #AC.
    pub fn prepare_read(&mut self, address: u64, size: usize) -> Result<u64, Exception> {
        if pieces(address, size) >= size
            && let Some(host) = self.fill_tlb(address, Want::Read)?
        {
            return Ok(host);
        }
        let mut data = [0; 64];
        let data = data.get_mut(..size).unwrap_or(&mut []);
        self.load(address, data, As::Current)?;
        self.bounce.0[..data.len()].copy_from_slice(data);
        // The offset within 64 bytes is kept so that alignment checks of the host see the guest's.
        Ok(self.bounce_at(address, data.len()))
    }

    /// Moves what is at the start of the bounce buffer to where it has the alignment of `address`.
    fn bounce_at(&mut self, address: u64, size: usize) -> u64 {
        let offset = (address & 63) as usize;
        self.bounce.0.copy_within(..size, offset);
        self.bounce.0.as_ptr() as u64 + offset as u64
    }

    /// Finds where translated code shall store `size` bytes, and notes in `pending_write` what is
    /// to be done after it. `reads` says that the instruction also reads the operand.
    ///
    /// # Errors
    /// #PF, #AC.
    pub fn prepare_write(
        &mut self,
        address: u64,
        size: usize,
        reads: bool,
    ) -> Result<u64, Exception> {
        self.pending_write = PendingWrite::None;
        self.check_alignment(address, size, As::Current)?;
        let first = pieces(address, size);
        let watching = self.data_breakpoints();
        if first >= size && !watching {
            if let Some(host) = self.fill_tlb(address, Want::Write)? {
                return Ok(host);
            }
            let physical = self.translate(address, Want::Write, As::Current)?.physical;
            if let Some(page) = self.vm.ram.page(physical)
                && !page.read_only
                && !self.lapic.claims(physical)
            {
                if page.code.load(Ordering::SeqCst) != 0 {
                    self.pending_write = PendingWrite::Code(physical, size);
                }
                self.vm.dirty.note(physical);
                return Ok(page.host as u64 + (physical & 0xfff));
            }
        }
        self.prepare_bounce(address, size, first.min(size), reads)
    }

    fn prepare_bounce(
        &mut self,
        address: u64,
        size: usize,
        first: usize,
        reads: bool,
    ) -> Result<u64, Exception> {
        let physical = self.translate(address, Want::Write, As::Current)?.physical;
        let mut parts = [(physical, first), (0, 0)];
        if first < size {
            let next = self.next_page(address);
            parts[1] = (self.translate(next, Want::Write, As::Current)?.physical, size - first);
        }
        let mut data = [0; 64];
        let mut at = 0;
        for (part, len) in parts {
            let Some(slice) = data.get_mut(at..at + len) else { break };
            // A device must not see a read that the instruction does not make.
            if reads || self.vm.ram.page(part).is_some() {
                self.physical_read(part, slice);
            }
            at += len;
        }
        self.watch(address, size, true, As::Current);
        self.bounce.0[..64].copy_from_slice(&data);
        self.pending_write = PendingWrite::Bounced(parts);
        self.spill[3] = address;
        Ok(self.bounce_at(address, size.min(64)))
    }

    /// Ends what `prepare_write` began, after the store; says whether translated code changed, so
    /// that the present block must be left.
    pub fn commit_write(&mut self) -> bool {
        self.cache.touched = false;
        match std::mem::take(&mut self.pending_write) {
            PendingWrite::None => false,
            PendingWrite::Code(physical, len) => self.code_written(physical, len),
            PendingWrite::Bounced(parts) => {
                let offset = (self.spill[3] & 63) as usize;
                let data = self.bounce.0;
                let mut at = offset;
                for (physical, len) in parts {
                    if let Some(slice) = data.get(at..at + len)
                        && len > 0
                    {
                        self.physical_write(physical, slice);
                    }
                    at += len;
                }
                std::mem::take(&mut self.cache.touched)
            }
        }
    }
}

/// How many of `size` bytes at `address` lie in its page.
fn pieces(address: u64, size: usize) -> usize {
    size.min(4096 - (address & 0xfff) as usize)
}

/// Stores bytes, naturally aligned words in one piece.
///
/// # Safety
/// `host` must be valid for writes of `data.len()` bytes.
unsafe fn store_bytes(host: *mut u8, data: &[u8]) {
    // SAFETY: the caller's promise; alignment is checked for each word.
    unsafe {
        match (data.len(), host as usize) {
            (8, h) if h % 8 == 0 => {
                host.cast::<u64>().write_volatile(data.as_ptr().cast::<u64>().read_unaligned())
            }
            (4, h) if h % 4 == 0 => {
                host.cast::<u32>().write_volatile(data.as_ptr().cast::<u32>().read_unaligned())
            }
            (2, h) if h % 2 == 0 => {
                host.cast::<u16>().write_volatile(data.as_ptr().cast::<u16>().read_unaligned())
            }
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()),
        }
    }
}
