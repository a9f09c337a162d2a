//! Reading.
use super::Qcow2;
use super::entry::Mapping;
use crate::{DiskError, Extent, ExtentKind};
use std::sync::{Arc, PoisonError};

/// Most clusters that one look-up goes through, so that others get a turn.
const MOST_AT_ONCE: u64 = 4096;

/// A stretch of the disk, and what it is mapped to: all of it follows `mapping` without a gap.
struct Stretch {
    mapping: Mapping,
    length: u64,
}

impl Qcow2 {
    pub(super) fn read_range(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let _in_flight = self.in_flight.read().unwrap_or_else(PoisonError::into_inner);
        let mut offset = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let stretch = self.stretch(offset, rest.len() as u64)?;
            let length = usize::try_from(stretch.length).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(length);
            self.read_mapping(stretch.mapping, offset, now)?;
            offset += stretch.length;
            rest = later;
        }
        Ok(())
    }

    /// Looks up where the disk is from `offset` on, for at most `length` bytes.
    fn stretch(&self, offset: u64, length: u64) -> Result<Stretch, DiskError> {
        let cluster_size = self.cluster_size();
        let guest = offset >> self.cluster_bits;
        let end = offset.saturating_add(length);
        let mut meta = self.meta();
        let mapping = meta.lookup(&*self.store, guest)?;
        let mut reached = (guest + 1) << self.cluster_bits;
        let mut count = 1;
        while reached < end && count < MOST_AT_ONCE {
            let next = meta.lookup(&*self.store, guest + count)?;
            let continues = match (mapping, next) {
                (Mapping::Unallocated, Mapping::Unallocated)
                | (Mapping::Zero { .. }, Mapping::Zero { .. }) => true,
                (Mapping::Data { host: first, .. }, Mapping::Data { host: next, .. }) => {
                    first + count * cluster_size == next
                }
                _ => false,
            };
            if !continues {
                break;
            }
            count += 1;
            reached += cluster_size;
        }
        Ok(Stretch { mapping, length: reached.min(end) - offset })
    }

    /// Reads a part of the disk that is mapped as given: `mapping` is that of the cluster in which
    /// `offset` lies.
    pub(super) fn read_mapping(
        &self,
        mapping: Mapping,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), DiskError> {
        let within = offset & (self.cluster_size() - 1);
        match mapping {
            Mapping::Zero { .. } => buffer.fill(0),
            Mapping::Unallocated => self.read_backing(offset, buffer)?,
            Mapping::Data { host, .. } => self.store.read_or_zero_at(host + within, buffer)?,
            Mapping::Compressed { host, length } => {
                let cluster = self.decompress(host, length)?;
                let start = usize::try_from(within).unwrap_or(usize::MAX);
                if let Some(part) = cluster.get(start..).and_then(|rest| rest.get(..buffer.len())) {
                    buffer.copy_from_slice(part);
                }
            }
        }
        Ok(())
    }

    fn decompress(&self, host: u64, length: u64) -> Result<Arc<[u8]>, DiskError> {
        self.decompressor.cluster(host, &|| self.store.name(), || {
            let mut compressed = vec![0; usize::try_from(length).unwrap_or(0)];
            self.store.read_or_zero_at(host, &mut compressed)?;
            Ok(compressed)
        })
    }

    /// Reads what is below. Beyond the end of a shorter backing disk are zeroes.
    fn read_backing(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let Some(backing) = &self.backing else {
            buffer.fill(0);
            return Ok(());
        };
        let there = backing.size().saturating_sub(offset).min(buffer.len() as u64);
        let (below, beyond) = buffer.split_at_mut(usize::try_from(there).unwrap_or(0));
        beyond.fill(0);
        if below.is_empty() { Ok(()) } else { backing.read_at(offset, below) }
    }

    pub(super) fn extent_of(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        let _in_flight = self.in_flight.read().unwrap_or_else(PoisonError::into_inner);
        let stretch = self.stretch(offset, length)?;
        let whole = |kind| Extent { kind, length: stretch.length };
        match stretch.mapping {
            Mapping::Zero { .. } => Ok(whole(ExtentKind::Zero)),
            Mapping::Compressed { .. } => Ok(whole(ExtentKind::Data)),
            Mapping::Data { host, .. } => {
                // It may have been set aside and never written.
                let within = offset & (self.cluster_size() - 1);
                self.store.extent(host + within, stretch.length)
            }
            Mapping::Unallocated => match &self.backing {
                Some(backing) if offset < backing.size() => {
                    let there = (backing.size() - offset).min(stretch.length);
                    backing.extent(offset, there)
                }
                _ => Ok(whole(ExtentKind::Zero)),
            },
        }
    }
}
