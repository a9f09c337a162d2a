//! Writing: in place where a cluster is this image's alone, into new clusters elsewhere.
use super::Qcow2;
use super::entry::{COPIED, Mapping};
use super::meta::Meta;
use super::refcounts::Run;
use crate::DiskError;
use std::sync::{MutexGuard, PoisonError};

/// Most clusters that one step of a write takes, so that others get a turn.
const MOST_AT_ONCE: u64 = 1024;

/// What to do with the first part of what remains of a write.
enum Step {
    /// Write `length` bytes at `host`.
    InPlace { host: u64, length: u64 },
    /// Write to new clusters, and link them.
    Move(Move),
    /// Another request moves the first cluster.
    Wait,
}

/// Guest clusters that get new host clusters.
struct Move {
    /// The first guest cluster; `to.count` of them follow each other.
    guest: u64,
    to: Run,
    /// Whether the new clusters read as zeroes.
    fresh: bool,
    /// What the first and the last were before, for the parts of them that are not written.
    first: Mapping,
    last: Mapping,
}

impl Qcow2 {
    pub(super) fn write_range(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.relieve()?;
        let _in_flight = self.in_flight.read().unwrap_or_else(PoisonError::into_inner);
        let mut offset = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let meta = self.meta();
            let length = match self.next_step(meta, offset, rest.len() as u64)? {
                Step::InPlace { host, length } => {
                    let now = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
                    self.store.write_at(host, rest.get(..now).unwrap_or_default())?;
                    now
                }
                Step::Move(work) => {
                    let now = self.length_of(&work, offset, rest.len());
                    self.move_clusters(&work, offset, rest.get(..now).unwrap_or_default())?;
                    now
                }
                Step::Wait => 0,
            };
            offset += length as u64;
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(())
    }

    /// Decides on the next step of a write of `length` bytes at `offset`, under the lock, which is
    /// released when it returns; waits there if the first cluster is being moved.
    fn next_step(
        &self,
        mut meta: MutexGuard<'_, Meta>,
        offset: u64,
        length: u64,
    ) -> Result<Step, DiskError> {
        let guest = offset >> self.cluster_bits;
        if meta.moving.contains(&guest) {
            drop(self.moved.wait(meta).unwrap_or_else(PoisonError::into_inner));
            return Ok(Step::Wait);
        }
        let within = offset & (self.cluster_size() - 1);
        let clusters = (within + length).div_ceil(self.cluster_size()).min(MOST_AT_ONCE);
        let first = meta.lookup(&*self.store, guest)?;
        if let Some(host) = meta.in_place(&*self.store, first)? {
            let mut count = 1;
            while count < clusters && !meta.moving.contains(&(guest + count)) {
                let next = meta.lookup(&*self.store, guest + count)?;
                if meta.in_place(&*self.store, next)? != Some(host + count * self.cluster_size()) {
                    break;
                }
                count += 1;
            }
            let length = length.min(count * self.cluster_size() - within);
            return Ok(Step::InPlace { host: host + within, length });
        }
        // All within one L2 table, so that there is one to be made at most.
        let clusters = clusters.min(meta.per_l2() - guest % meta.per_l2());
        let mut count = 1;
        let mut last = first;
        while count < clusters && !meta.moving.contains(&(guest + count)) {
            let next = meta.lookup(&*self.store, guest + count)?;
            if meta.in_place(&*self.store, next)?.is_some() {
                break;
            }
            last = next;
            count += 1;
        }
        meta.prepare_link(&*self.store, guest)?;
        let (to, fresh) = meta.refcounts.allocate(&*self.store, count)?;
        if to.count < count {
            last = meta.lookup(&*self.store, guest + to.count - 1)?;
        }
        meta.moving.extend(guest..guest + to.count);
        Ok(Step::Move(Move { guest, to, fresh, first, last }))
    }

    /// Bytes of a write at `offset` that fall into the clusters that move.
    fn length_of(&self, work: &Move, offset: u64, length: usize) -> usize {
        let end = (work.guest + work.to.count) << self.cluster_bits;
        usize::try_from(end - offset).unwrap_or(usize::MAX).min(length)
    }

    /// Fills new clusters and links them in place of what was there; or gives them back.
    fn move_clusters(&self, work: &Move, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let filled = self.fill(work, offset, data);
        let mut meta = self.meta();
        let linked = match filled {
            Ok(()) => self.link_all(&mut meta, work),
            Err(error) => meta.give_back(&*self.store, work.to).and(Err(error)),
        };
        for guest in work.guest..work.guest + work.to.count {
            meta.moving.remove(&guest);
        }
        drop(meta);
        self.moved.notify_all();
        linked
    }

    fn link_all(&self, meta: &mut Meta, work: &Move) -> Result<(), DiskError> {
        for index in 0..work.to.count {
            let host = (work.to.first + index) << self.cluster_bits;
            meta.link(&*self.store, work.guest + index, host | COPIED)?;
        }
        Ok(())
    }

    /// Writes `data` to the new clusters, and around it what was there before.
    fn fill(&self, work: &Move, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let start = work.guest << self.cluster_bits;
        let end = (work.guest + work.to.count) << self.cluster_bits;
        let host = work.to.first << self.cluster_bits;
        let data_end = offset + data.len() as u64;
        self.keep(work.first, work.fresh, start..offset, host)?;
        self.store.write_at(host + (offset - start), data)?;
        self.keep(work.last, work.fresh, data_end..end, host + (data_end - start))
    }

    /// Copies a part of a cluster, mapped as given, to a new place.
    fn keep(
        &self,
        mapping: Mapping,
        fresh: bool,
        part: std::ops::Range<u64>,
        to: u64,
    ) -> Result<(), DiskError> {
        let zero = match mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated => {
                self.backing.as_ref().is_none_or(|backing| part.start >= backing.size())
            }
            Mapping::Data { .. } | Mapping::Compressed { .. } => false,
        };
        if part.is_empty() || (zero && fresh) {
            return Ok(());
        }
        let mut kept = vec![0; usize::try_from(part.end - part.start).unwrap_or(0)];
        self.read_mapping(mapping, part.start, &mut kept)?;
        self.store.write_at(to, &kept)
    }
}
