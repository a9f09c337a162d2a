//! Zeroes and discards: whole clusters by their L2 entries, the rest as writes of zeroes.
use super::entry::{Mapping, ZERO};
use super::meta::Meta;
use super::{Qcow2, Version};
use crate::{Disk, DiskError, ExtentKind};
use std::ops::Range;
use std::sync::PoisonError;

/// Clusters that are changed under one hold of the lock.
const BATCH: u64 = 1024;

/// What is done with whole clusters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Aim {
    /// They are to read as zeroes.
    Zero,
    /// Their content no longer matters.
    Discard,
}

impl Qcow2 {
    pub(super) fn discard_range(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let (_, whole, _) = self.split(offset, length);
        // Version 2 cannot say "zeroes", and what is below must not come to light again.
        if self.version == Version::V2 && self.backing.is_some() {
            return Ok(());
        }
        self.clear_clusters(whole, Aim::Discard)
    }

    pub(super) fn zero_range(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let (head, whole, tail) = self.split(offset, length);
        if self.version == Version::V2 && self.backing.is_some() {
            return self.write_plain_zeroes(offset..offset + length);
        }
        self.write_plain_zeroes(head)?;
        self.clear_clusters(whole, Aim::Zero)?;
        self.write_plain_zeroes(tail)
    }

    /// Splits a range into what comes before its whole clusters, those (by index), and what comes
    /// after. The disk's last cluster is whole even where the disk ends within it.
    fn split(&self, offset: u64, length: u64) -> (Range<u64>, Range<u64>, Range<u64>) {
        let end = offset + length;
        let first = offset.div_ceil(self.cluster_size());
        let last = if end == self.size {
            end.div_ceil(self.cluster_size())
        } else {
            end >> self.cluster_bits
        };
        if first >= last {
            return (offset..end, 0..0, end..end);
        }
        let head = offset..first << self.cluster_bits;
        (head, first..last, (last << self.cluster_bits).min(end)..end)
    }

    /// Writes zeroes as data, where it does not read as zeroes anyway.
    fn write_plain_zeroes(&self, range: Range<u64>) -> Result<(), DiskError> {
        let zeroes = vec![0; self.cluster_len()];
        let mut at = range.start;
        while at < range.end {
            let extent = self.extent_of(at, range.end - at)?;
            if extent.kind == ExtentKind::Zero {
                at += extent.length;
                continue;
            }
            let now = extent.length.min(zeroes.len() as u64);
            let part = zeroes.get(..usize::try_from(now).unwrap_or(0)).unwrap_or_default();
            self.write_range(at, part)?;
            at += now;
        }
        Ok(())
    }

    fn clear_clusters(&self, clusters: Range<u64>, aim: Aim) -> Result<(), DiskError> {
        let mut guest = clusters.start;
        while guest < clusters.end {
            self.relieve()?;
            let _in_flight = self.in_flight.read().unwrap_or_else(PoisonError::into_inner);
            let mut meta = self.meta();
            let per_l2 = meta.per_l2();
            let end_of_table = guest - guest % per_l2 + per_l2;
            // Nothing is here, and nothing is to be hidden.
            let nothing = meta.l2_table(&*self.store, guest)?.is_none()
                && (aim == Aim::Discard || !self.shows_backing(guest));
            if nothing {
                guest = end_of_table;
                continue;
            }
            let end = clusters.end.min(end_of_table).min(guest + BATCH);
            while (guest..end).any(|guest| meta.moving.contains(&guest)) {
                meta = self.moved.wait(meta).unwrap_or_else(PoisonError::into_inner);
            }
            for cluster in guest..end {
                self.clear_cluster(&mut meta, cluster, aim)?;
            }
            guest = end;
        }
        Ok(())
    }

    fn clear_cluster(&self, meta: &mut Meta, guest: u64, aim: Aim) -> Result<(), DiskError> {
        let mapping = meta.lookup(&*self.store, guest)?;
        let shows_backing = self.shows_backing(guest);
        let entry = if shows_backing { ZERO } else { 0 };
        match (mapping, aim) {
            (Mapping::Unallocated, Aim::Discard) | (Mapping::Zero { host: None }, _) => Ok(()),
            (Mapping::Unallocated, Aim::Zero) if !shows_backing => Ok(()),
            _ => meta.link(&*self.store, guest, entry),
        }
    }

    /// Whether something is below a cluster that an unallocated one would show.
    fn shows_backing(&self, guest: u64) -> bool {
        let below = |backing: &dyn Disk| guest << self.cluster_bits < backing.size();
        self.backing.as_deref().is_some_and(below)
    }
}
