//! From host addresses back to guest instructions, and throwing translations away: what translated
//! code assumes about guest memory and address translation ceases to hold here.
use crate::cache::BlockId;
use crate::cpu::{Cpu, EMPTY_JUMPS};
use crate::emit::{FlagsIn, Position};
use crate::vm::{Written, pending};
use std::sync::atomic::Ordering;

impl Cpu {
    /// Finds the guest instruction to which a host address in translated code belongs: sets `rip`
    /// and `next_rip`, and says where its flags are. `host` is a return address or that of a
    /// faulting instruction plus one.
    pub fn locate(&mut self, host: u64) -> Option<Position> {
        let (pc, position) = self.cache.position(host.wrapping_sub(1))?;
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
            let page = self.cache.block(id).map_or(0, |b| b.key().physical & !0xfff);
            self.kill_all(page, &[id]);
        }
    }

    /// Throws blocks away, and the page's watch with the last of them; says whether there were any.
    pub(crate) fn kill_all(&mut self, page: u64, blocks: &[BlockId]) -> bool {
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
