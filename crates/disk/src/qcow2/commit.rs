//! The order in which changes reach the file, so that it is sound whenever the process or the host
//! stops.
//!
//! Changes of metadata wait in memory until a flush (or until there are many). A commit takes a
//! copy of all of them at one instant and writes, with everything durable before the next step:
//!
//! 1. the data of new clusters (written by the requests themselves) and the refcounts that say
//!    that they are used;
//! 2. L2 entries, which refer to them; 3. L1 entries, which refer to new L2 tables;
//! 4. only then clusters that nothing refers to any more are punched out and their refcounts taken
//!    back, in memory, for the next commit to write. A request that was under way may still read or
//!    write such a cluster, so this waits until all that began before have ended.
//!
//! A crash between two steps leaves at most clusters with a refcount that nobody refers to (leaks).
//! Version 3 images are marked dirty before their first change, so that whoever opens them next
//! puts the refcounts right. With lazy refcounts step 1 leaves the refcounts to the end.
use super::header::DIRTY;
use super::meta::Changes;
use super::refcounts::{RefcountChanges, Run};
use super::{Qcow2, Version};
use crate::{DiskError, Store};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// Clusters that are given back under one hold of the lock.
const RELEASE_BATCH: usize = 4096;

impl Qcow2 {
    /// Writes all changes that were made before this call, in order; they are durable then.
    pub(super) fn commit(&self, with_refcounts: bool) -> Result<(), DiskError> {
        let mut marked_dirty = self.commit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changes = {
            let mut meta = self.meta();
            if !meta.changed() {
                drop((meta, marked_dirty));
                return self.store.sync();
            }
            // Whatever a table refers to must lie within the file. Under the lock no cluster is
            // taken, so that no write can be under way beyond the new end: it would be cut off.
            let end = meta.refcounts.end() << self.cluster_bits;
            if self.store.size()? < end {
                self.store.set_size(end)?;
            }
            let with_refcounts = with_refcounts || !self.lazy_refcounts || meta.refcounts.crowded();
            meta.begin_writing(with_refcounts)
        };
        let written = self.write_out(&changes, &mut marked_dirty);
        self.meta().end_writing(&mut changes, written.is_ok());
        written?;
        self.release(&changes.freed)
    }

    fn write_out(&self, changes: &Changes, marked_dirty: &mut bool) -> Result<(), DiskError> {
        if !*marked_dirty {
            self.mark(DIRTY, true)?;
            *marked_dirty = true;
        }
        write_pages(&*self.store, &changes.refcounts.pages)?;
        self.store.sync()?;
        self.write_refcount_table(&changes.refcounts)?;
        if changes.l2.is_empty() && changes.l1.is_empty() {
            return Ok(());
        }
        write_pages(&*self.store, &changes.l2)?;
        self.store.sync()?;
        if !changes.l1.is_empty() {
            write_fields(&*self.store, &changes.l1)?;
            self.store.sync()?;
        }
        Ok(())
    }

    fn write_refcount_table(&self, changes: &RefcountChanges) -> Result<(), DiskError> {
        if !changes.fields.is_empty() {
            write_fields(&*self.store, &changes.fields)?;
            self.store.sync()?;
        }
        if let Some(moved) = &changes.moved {
            self.store.write_at(moved.place.offset, &moved.bytes)?;
            self.store.sync()?;
            // Offset and clusters of the table are neighbours in the header.
            let mut field = moved.place.offset.to_be_bytes().to_vec();
            field.extend(moved.place.clusters.to_be_bytes());
            self.store.write_at(48, &field)?;
            self.store.sync()?;
        }
        Ok(())
    }

    /// Gives clusters back that no table in the file refers to any more.
    fn release(&self, freed: &[Run]) -> Result<(), DiskError> {
        if freed.is_empty() {
            return Ok(());
        }
        // Wait for the requests that may have looked a cluster up before it was freed.
        drop(self.in_flight.write().unwrap_or_else(PoisonError::into_inner));
        self.decompressor.forget();
        let unused = self.meta().about_to_be_free(&*self.store, freed)?;
        if let Err(error) = self.punch(&unused) {
            freed.iter().for_each(|run| self.meta().free_later(*run));
            return Err(error);
        }
        for run in freed {
            for first in (run.first..run.end()).step_by(RELEASE_BATCH) {
                let count = (run.end() - first).min(RELEASE_BATCH as u64);
                self.meta().release(&*self.store, &[Run { first, count }])?;
            }
        }
        Ok(())
    }

    /// Gives the host back what clusters, in ascending order, take up.
    fn punch(&self, clusters: &[u64]) -> Result<(), DiskError> {
        for run in clusters.chunk_by(|a, b| a + 1 == *b) {
            let Some(first) = run.first() else { continue };
            let length = (run.len() as u64) << self.cluster_bits;
            self.store.discard(first << self.cluster_bits, length)?;
        }
        Ok(())
    }

    /// Sets or clears an incompatible feature bit in the header, durably. Version 2
    /// has none in its header; there it holds until the image is closed.
    pub(super) fn mark(&self, bit: u64, on: bool) -> Result<(), DiskError> {
        let change = |bits: u64| if on { bits | bit } else { bits & !bit };
        let bits = self.incompatible.load(Ordering::SeqCst);
        if self.version == Version::V3 {
            self.store.write_at(72, &change(bits).to_be_bytes())?;
            self.store.sync()?;
        }
        self.incompatible.store(change(bits), Ordering::SeqCst);
        Ok(())
    }

    /// Writes everything, with all refcounts, and says in the header that the image was closed.
    pub(super) fn settle(&self) -> Result<(), DiskError> {
        // What a commit frees leaves refcounts to the next one, which frees nothing.
        for _ in 0..3 {
            if self.meta().changed() {
                self.commit(true)?;
            }
        }
        let mut marked_dirty = self.commit.lock().unwrap_or_else(PoisonError::into_inner);
        if *marked_dirty && !self.meta().changed() {
            self.mark(DIRTY, false)?;
            *marked_dirty = false;
        }
        Ok(())
    }
}

fn write_pages(store: &dyn Store, pages: &[(u64, Box<[u8]>)]) -> Result<(), DiskError> {
    for neighbours in pages.chunk_by(|(a, bytes), (b, _)| a + bytes.len() as u64 == *b) {
        match neighbours {
            [(offset, page)] => store.write_at(*offset, page)?,
            [(offset, _), ..] => {
                let bytes: Vec<u8> =
                    neighbours.iter().flat_map(|(_, page)| page.iter().copied()).collect();
                store.write_at(*offset, &bytes)?;
            }
            [] => {}
        }
    }
    Ok(())
}

fn write_fields(store: &dyn Store, fields: &[(u64, u64)]) -> Result<(), DiskError> {
    fields.iter().try_for_each(|(offset, value)| store.write_at(*offset, &value.to_be_bytes()))
}
