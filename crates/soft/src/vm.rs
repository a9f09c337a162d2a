//! What the vCPUs of one VM share: memory, mailboxes, and which pages hold translated code.
use crate::dirty::{Attendance, Log};
use crate::instruction_set::InstructionSet;
use crate::ram::Ram;
use arch::{CpuModel, FeatureSet};
use engine::{Doorbells, GuestMemory, Msi};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Shared by all vCPUs of a VM.
pub struct VmShared {
    /// How the engine works.
    pub options: crate::Options,
    /// Guest RAM.
    pub ram: Ram,
    /// The same, as the machine gave it.
    pub memory: Arc<GuestMemory>,
    /// Writes that ring.
    pub doorbells: Arc<Doorbells>,
    /// Which pages were written.
    pub dirty: Log,
    /// The CPU shown to the guest.
    pub model: CpuModel,
    /// What a state may need: what the model announces, and a little more.
    pub features: FeatureSet,
    /// The instructions that the model has.
    pub instructions: InstructionSet,
    /// One mailbox a vCPU.
    pub mailboxes: Vec<Mailbox>,
    /// Level of the PIC's output.
    pub pic_output: AtomicBool,
    /// Difference between the guest's and the host's time-stamp counter that vCPUs agree on.
    pub tsc_offset: Mutex<Option<u64>>,
    /// The memory in which the vCPUs lie; it outlives them.
    pub regions: Mutex<Vec<crate::region::CpuRegion>>,
}

/// Bits of [`Mailbox::pending`]: what a vCPU must look at before it goes on.
pub mod pending {
    /// Return from `Vcpu::run`.
    pub const KICK: u32 = 1 << 0;
    /// The LAPIC or the PIC may have an interrupt.
    pub const INTERRUPT: u32 = 1 << 1;
    /// NMI.
    pub const NMI: u32 = 1 << 2;
    /// INIT IPI.
    pub const INIT: u32 = 1 << 3;
    /// Start-up IPI; its vector is in `Mailbox::sipi_vector`.
    pub const SIPI: u32 = 1 << 4;
    /// `Mailbox::written_code` holds ranges whose translations are stale.
    pub const CODE: u32 = 1 << 5;
    /// The LAPIC's timer may be due.
    pub const TIMER: u32 = 1 << 6;
    /// Drop write access to the pages in `Mailbox::guarded`, which now hold code.
    pub const GUARD: u32 = 1 << 7;
    /// Empty the TLBs, and answer through `Mailbox::attendance`.
    pub const EMPTY_TLB: u32 = 1 << 8;
}

/// Where other threads leave word for a vCPU.
#[derive(Default)]
pub struct Mailbox {
    /// Bits of [`pending`].
    pub pending: AtomicU32,
    /// Address of the vCPU's `Cpu::poll`, 0 until the vCPU exists. It stays valid as long as the VM.
    pub poll: AtomicUsize,
    /// Interrupt requests from other threads, 256 vectors; moved to the LAPIC by its owner.
    pub irr: [AtomicU64; 4],
    /// Of those, the level-triggered ones.
    pub level: [AtomicU64; 4],
    /// Vector of the last start-up IPI.
    pub sipi_vector: AtomicU32,
    /// What destination matching needs of the LAPIC: its id, LDR, DFR and mode. Written by the
    /// owner whenever they change.
    pub apic: ApicIdentity,
    /// Guest-physical memory whose translations are, or may be, stale.
    pub written_code: Mutex<Vec<Written>>,
    /// Pages (guest-physical) that the vCPU of the second number began to translate.
    pub guarded: Mutex<Vec<(u64, u32)>>,
    /// Whether the vCPU runs, and has emptied its TLBs as it was asked to.
    pub attendance: Attendance,
    sleeping: Mutex<bool>,
    wake: Condvar,
}

/// Word about written code.
#[derive(Clone, Copy, Debug)]
pub enum Written {
    /// These bytes (start, length) were written.
    Range(u64, usize),
    /// This page may have been written before the writer knew that it holds code: compare.
    Unsure(u64),
}

/// The part of a LAPIC that senders of interrupts look at.
#[derive(Default)]
pub struct ApicIdentity {
    /// The APIC id: 8 bits in xAPIC mode, 32 in x2APIC mode.
    pub id: AtomicU32,
    /// Logical destination register (xAPIC: bits 24–31; x2APIC: all 32).
    pub ldr: AtomicU32,
    /// Destination format register: FFFF_FFFFH is flat, 0FFF_FFFFH cluster.
    pub dfr: AtomicU32,
    /// Whether x2APIC mode is on.
    pub x2apic: AtomicBool,
    /// Whether the APIC is software-enabled (SVR bit 8) and globally on.
    pub enabled: AtomicBool,
}

impl Mailbox {
    /// Leaves word and makes the vCPU look soon, whether it runs or sleeps.
    pub fn post(&self, bits: u32) {
        let before = self.pending.fetch_or(bits, Ordering::SeqCst);
        if before & bits == bits {
            return;
        }
        crate::run::attract(self);
        if *self.lock_sleeping() {
            self.wake.notify_all();
        }
    }

    /// Takes the bits of `mask` that were left, at one go, so that none is lost that is left
    /// meanwhile. Called by the owner only.
    pub fn take(&self, mask: u32) -> u32 {
        self.pending.fetch_and(!mask, Ordering::SeqCst) & mask
    }

    /// Requests an interrupt; callable from any thread.
    pub fn request(&self, vector: u8, level: bool) {
        let (word, bit) = (usize::from(vector >> 6), 1u64 << (vector & 63));
        if level {
            self.level[word].fetch_or(bit, Ordering::SeqCst);
        }
        self.irr[word].fetch_or(bit, Ordering::SeqCst);
        self.post(pending::INTERRUPT);
    }

    /// Sleeps until something is posted or `timeout` has passed. Called by the owner only.
    pub fn sleep(&self, timeout: Option<Duration>) {
        let mut sleeping = self.lock_sleeping();
        if self.pending.load(Ordering::SeqCst) != 0 {
            return;
        }
        *sleeping = true;
        // A poster sets `pending` before it looks at `sleeping` under this lock, so no wake-up is
        // lost; a spurious return only makes the owner look again.
        sleeping = match timeout {
            Some(t) => match self.wake.wait_timeout(sleeping, t) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            },
            None => self.wake.wait(sleeping).unwrap_or_else(|e| e.into_inner()),
        };
        *sleeping = false;
    }

    /// The list of written code.
    pub fn lock_written(&self) -> MutexGuard<'_, Vec<Written>> {
        self.written_code.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The list of pages to stop writing to unnoticed.
    pub fn lock_guarded(&self) -> MutexGuard<'_, Vec<(u64, u32)>> {
        self.guarded.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn lock_sleeping(&self) -> MutexGuard<'_, bool> {
        self.sleeping.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl VmShared {
    /// The TSC offset for a vCPU whose state says that its counter is at `tsc` now. States of one
    /// machine are set one after the other; those that mean the same moment, within a second, get
    /// the same offset, so that the counters of all vCPUs agree.
    pub fn agree_on_tsc(&self, tsc: u64) -> u64 {
        let wanted = tsc.wrapping_sub(crate::clock::host_tsc());
        let mut agreed = self.tsc_offset.lock().unwrap_or_else(|e| e.into_inner());
        let second = crate::clock::tsc_khz() * 1000;
        match *agreed {
            Some(offset) if (wanted.wrapping_sub(offset) as i64).unsigned_abs() < second => offset,
            _ => *agreed.insert(wanted),
        }
    }

    /// Somebody else wrote these bytes: each vCPU with translations of them is told to drop them.
    pub fn memory_written(&self, start: u64, length: usize) {
        // A vCPU that claims a page after this finds the new bytes when it translates them.
        fence(Ordering::SeqCst);
        let (mut at, mut left) = (start, length);
        while left > 0 {
            let here = left.min(4096 - (at & 0xfff) as usize);
            let holders = self.ram.page(at).map_or(0, |page| page.code.load(Ordering::SeqCst));
            for (n, mailbox) in self.mailboxes.iter().enumerate() {
                if holders >> n & 1 != 0 {
                    mailbox.lock_written().push(Written::Range(at, here));
                    mailbox.post(pending::CODE);
                }
            }
            (at, left) = (at.wrapping_add(here as u64), left - here);
        }
    }

    /// Delivers a message-signalled interrupt.
    pub fn signal_msi(&self, msi: Msi) {
        crate::lapic::route_msi(self, msi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_is_lost_that_is_left_while_another_is_taken() {
        const ROUNDS: u32 = 100_000;
        let (mailbox, taken) = (Mailbox::default(), AtomicU32::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    mailbox.post(pending::KICK);
                    // A word that is lost is waited for until the test's time is up.
                    while taken.load(Ordering::SeqCst) < round {
                        mailbox.post(pending::TIMER);
                    }
                }
            });
            while taken.load(Ordering::SeqCst) < ROUNDS {
                if mailbox.take(pending::KICK | pending::TIMER) & pending::KICK != 0 {
                    taken.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
    }
}
