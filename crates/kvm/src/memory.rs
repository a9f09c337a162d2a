//! Guest memory as KVM's slots (api.rst §4.35, KVM_SET_USER_MEMORY_REGION).
#![allow(unsafe_code)]
use crate::error::refused;
use arch::address::PAGE_SIZE;
use engine::{EngineError, GuestMemory, VmConfig};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use std::sync::Arc;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

/// Guest-physical ranges (first byte, byte after the last) that guests cannot write.
pub type ReadOnly = Vec<(u64, u64)>;

/// A stretch of guest memory that becomes one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    start: u64,
    end: u64,
    read_only: bool,
}

/// A VM whose memory KVM knows. The VM is closed before the memory goes away.
pub struct MappedVm {
    /// The VM.
    pub fd: VmFd,
    /// Its read-only ranges.
    pub read_only: ReadOnly,
    /// Its slots, by number.
    slots: Vec<kvm_userspace_memory_region>,
    _memory: Arc<GuestMemory>,
}

impl MappedVm {
    /// Gives all memory of `config` to KVM.
    ///
    /// # Errors
    /// A range that KVM cannot map, by address.
    pub fn new(kvm: &Kvm, fd: VmFd, config: &VmConfig) -> Result<Self, EngineError> {
        let read_only = read_only(config)?;
        let memory = config.memory.clone();
        let stretches: Vec<(Stretch, u64)> = memory
            .iter()
            .flat_map(|region| {
                let (start, host) = (region.start_addr().0, region.as_ptr() as u64);
                let whole = split(start, start + region.len(), &read_only);
                whole.into_iter().map(move |s| (s, host + (s.start - start)))
            })
            .collect();
        let most = kvm.get_nr_memslots();
        if stretches.len() > most {
            return Err(EngineError::Unsupported(format!(
                "the guest's memory has {} parts, and this kernel's KVM takes {most} \
                 (KVM_CAP_NR_MEMSLOTS); use --engine soft",
                stretches.len()
            )));
        }
        let mut mapped = Self { fd, read_only, slots: Vec::new(), _memory: memory };
        for (slot, (stretch, userspace_addr)) in (0..).zip(stretches) {
            let Stretch { start, end, read_only } = stretch;
            let region = kvm_userspace_memory_region {
                slot,
                flags: if read_only { KVM_MEM_READONLY } else { 0 },
                guest_phys_addr: start,
                memory_size: end - start,
                userspace_addr,
            };
            mapped.set_slot(region).map_err(refused(format!(
                "KVM cannot map guest memory {start:#x} to {:#x} (slot {slot}); give the guest \
                 less memory, or use --engine soft",
                end - 1
            )))?;
            mapped.slots.push(region);
        }
        Ok(mapped)
    }

    /// Sets a slot that `new` laid out.
    fn set_slot(&self, region: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
        // SAFETY: the range lies in a mapping that `self` keeps by reference count for as long as
        // the VM is open, and it is guest memory: the guest may write all of it.
        unsafe { self.fd.set_user_memory_region(region) }
    }

    /// The slots that the guest can write.
    pub fn writable(&self) -> impl Iterator<Item = &kvm_userspace_memory_region> {
        self.slots.iter().filter(|slot| slot.flags & KVM_MEM_READONLY == 0)
    }

    /// The guest-physical address at which a slot starts.
    pub fn slot_start(&self, slot: u32) -> Option<u64> {
        self.slots.get(slot as usize).map(|slot| slot.guest_phys_addr)
    }

    /// Has KVM log writes, or stop to.
    ///
    /// # Errors
    /// KVM refuses; it logs no writes then, or goes on to.
    pub fn set_logging(&self, on: bool) -> Result<(), EngineError> {
        let with = |slot: &kvm_userspace_memory_region, on: bool| {
            let flags = slot.flags | if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            self.set_slot(kvm_userspace_memory_region { flags, ..*slot })
        };
        for slot in self.writable() {
            let Err(errno) = with(slot, on) else { continue };
            let back = self.writable().filter(|other| other.slot < slot.slot);
            // What KVM took a moment ago it takes back.
            let results: Vec<_> = back.map(|slot| with(slot, !on)).collect();
            debug_assert!(results.iter().all(Result::is_ok), "{results:?}");
            return Err(refused(format!(
                "KVM does not {} to log writes to memory (KVM_MEM_LOG_DIRTY_PAGES)",
                if on { "begin" } else { "cease" }
            ))(errno));
        }
        Ok(())
    }
}

fn read_only(config: &VmConfig) -> Result<ReadOnly, EngineError> {
    let mut ranges = Vec::with_capacity(config.read_only.len());
    for &(start, length) in &config.read_only {
        let end = start.checked_add(length).map(|end| end.0);
        match end {
            Some(end) if (start.0 | end).is_multiple_of(PAGE_SIZE) => ranges.push((start.0, end)),
            _ => {
                return Err(EngineError::Unsupported(format!(
                    "read-only memory of {length:#x} bytes at {start} is not made of whole pages"
                )));
            }
        }
    }
    ranges.sort_unstable();
    Ok(ranges)
}

/// Cuts a region where it changes between writable and read-only.
fn split(start: u64, end: u64, read_only: &ReadOnly) -> Vec<Stretch> {
    let mut parts = Vec::new();
    let mut at = start;
    for &(from, to) in read_only {
        let (from, to) = (from.max(at), to.min(end));
        if from >= to {
            continue;
        }
        if at < from {
            parts.push(Stretch { start: at, end: from, read_only: false });
        }
        parts.push(Stretch { start: from, end: to, read_only: true });
        at = to;
    }
    if at < end {
        parts.push(Stretch { start: at, end, read_only: false });
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_cut_at_its_read_only_parts() {
        let part = |start, end, read_only| Stretch { start, end, read_only };
        let cut = split(0x1000, 0x9000, &vec![(0, 0x2000), (0x4000, 0x5000), (0x8000, 0xa000)]);
        assert_eq!(
            cut,
            [
                part(0x1000, 0x2000, true),
                part(0x2000, 0x4000, false),
                part(0x4000, 0x5000, true),
                part(0x5000, 0x8000, false),
                part(0x8000, 0x9000, true),
            ]
        );
        assert_eq!(split(0, 0x1000, &vec![]), [part(0, 0x1000, false)]);
    }

    #[test]
    fn overlapping_read_only_ranges_make_slots_that_do_not_overlap() {
        let cut = split(0, 0x4000, &vec![(0, 0x2000), (0x1000, 0x3000)]);
        assert!(cut.windows(2).all(|pair| pair[0].end == pair[1].start), "{cut:?}");
        assert_eq!(cut.last().map(|s| (s.end, s.read_only)), Some((0x4000, false)));
    }
}
