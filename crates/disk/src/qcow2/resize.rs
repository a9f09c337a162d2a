//! Changing a disk's size.
use super::{Qcow2, Version, header};
use crate::manage::check_shrinking;
use crate::{Disk, DiskError};
use header::{MAX_L1_BYTES, l1_entries_for};

/// Whether a disk may become smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// No.
    Refuse,
    /// If what is cut off reads as zeroes.
    IfUnused,
}

impl Qcow2 {
    /// Changes the disk's size, in bytes; it is rounded up to sectors. What is new reads as zeroes.
    ///
    /// # Errors
    /// [`DiskError::Invalid`] where the disk would shrink and may not, or cannot have that size;
    /// otherwise as [`Disk::write_at`].
    pub fn resize(&mut self, size: u64, shrink: Shrink) -> Result<(), DiskError> {
        self.check_change(0, 0)?;
        let invalid = |problem: String| DiskError::Invalid { file: self.store.name(), problem };
        let size = size.checked_next_multiple_of(512).filter(|size| *size < 1 << 63);
        let size = size.ok_or_else(|| invalid("the disk cannot be that large".to_owned()))?;
        let former = self.size;
        if size == former {
            return Ok(());
        }
        if self.version == Version::V2 && self.meta().has_snapshots() {
            return Err(invalid(
                "a version 2 image with internal snapshots cannot change its size; delete them or \
                 convert it"
                    .to_owned(),
            ));
        }
        if size > former {
            self.grow(size)?;
            self.hide_what_was_beyond(former)?;
            return self.flush();
        }
        check_shrinking(self, &self.store.name(), size, shrink)?;
        self.discard(size, former - size)?;
        self.commit(true)?;
        self.set_size_field(size)
    }

    fn grow(&mut self, size: u64) -> Result<(), DiskError> {
        let needed = l1_entries_for(size, self.cluster_bits);
        if needed * 8 > MAX_L1_BYTES {
            let problem = format!("{size} bytes need larger clusters; convert the image to those");
            return Err(DiskError::Invalid { file: self.store.name(), problem });
        }
        let needed = usize::try_from(needed).unwrap_or(0);
        let (mut l1, former_offset) = {
            let meta = self.meta();
            let (l1, offset) = meta.l1();
            (l1.to_vec(), offset)
        };
        let former_entries = l1.len();
        if needed > former_entries {
            l1.resize(needed, 0);
            self.commit(true)?;
            let clusters = (needed as u64 * 8).div_ceil(self.cluster_size());
            let run = self.meta().refcounts.allocate_at_end(&*self.store, clusters)?;
            let offset = run.first << self.cluster_bits;
            let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.store.write_at(offset, &bytes)?;
            self.commit(true)?;
            // Number of entries and offset are neighbours in the header.
            let mut field = u32::try_from(needed).unwrap_or(u32::MAX).to_be_bytes().to_vec();
            field.extend(offset.to_be_bytes());
            self.store.write_at(36, &field)?;
            self.store.sync()?;
            let mut meta = self.meta();
            meta.replace_l1(l1, offset);
            let former_clusters = (former_entries as u64 * 8).div_ceil(self.cluster_size());
            meta.free_later(super::refcounts::Run {
                first: former_offset >> self.cluster_bits,
                count: former_clusters,
            });
        }
        self.set_size_field(size)
    }

    /// Makes zeroes of what a larger disk would show otherwise: the rest of its formerly last
    /// cluster, and the backing disk beyond the former end.
    fn hide_what_was_beyond(&self, former: u64) -> Result<(), DiskError> {
        let rest = former.next_multiple_of(self.cluster_size());
        let below = self.backing.as_ref().map_or(0, |backing| backing.size());
        let end = rest.max(below).min(self.size);
        if end > former { self.write_zeroes(former, end - former) } else { Ok(()) }
    }

    fn set_size_field(&mut self, size: u64) -> Result<(), DiskError> {
        self.store.write_at(24, &size.to_be_bytes())?;
        self.store.sync()?;
        self.size = size;
        Ok(())
    }
}
