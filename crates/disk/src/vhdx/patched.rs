//! An image that is open to read only and whose log was not replayed: what the log would change is
//! laid over what is read.
use crate::store::{Complain, Store};
use crate::{DiskError, Extent, ExtentKind};

/// Changes that are kept: each one is looked at with each read. A log of 1 MiB has no more than
/// 255 sectors.
const MAX_CHANGES: usize = 4096;

/// A change of a log.
pub(super) struct Change {
    pub offset: u64,
    pub length: u64,
    /// What is there from then on; zeroes where there is nothing.
    pub data: Vec<u8>,
}

/// A store with changes over it, the later ones over the earlier ones.
pub(super) struct Patched {
    store: Box<dyn Store>,
    changes: Vec<Change>,
    size: u64,
}

impl Patched {
    /// `size` is what the store would have after the changes.
    pub(super) fn new(
        store: Box<dyn Store>,
        changes: Vec<Change>,
        size: u64,
    ) -> Result<Self, DiskError> {
        if changes.len() > MAX_CHANGES {
            let feature = format!("a log of {} changes in an image open to read", changes.len());
            return Err(store.unsupported(feature));
        }
        Ok(Self { store, changes, size })
    }
}

impl Store for Patched {
    fn name(&self) -> String {
        self.store.name()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn size(&self) -> Result<u64, DiskError> {
        Ok(self.store.size()?.max(self.size))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let size = self.size()?;
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > size) {
            return Err(self.damaged(format!("it ends before what is expected at {offset}")));
        }
        self.read_or_zero_at(offset, buffer)
    }

    fn read_or_zero_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.store.read_or_zero_at(offset, buffer)?;
        let end = offset.saturating_add(buffer.len() as u64);
        for change in &self.changes {
            let from = change.offset.max(offset);
            let until = change.offset.saturating_add(change.length).min(end);
            if from >= until {
                continue;
            }
            let index = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
            let place = buffer.get_mut(index(from - offset)..index(until - offset));
            let data = change.data.get(index(from - change.offset)..index(until - change.offset));
            match (place, data) {
                (Some(place), Some(data)) => place.copy_from_slice(data),
                (Some(place), None) => place.fill(0),
                (None, _) => {}
            }
        }
        Ok(())
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn sync(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn set_size(&self, _size: u64) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn discard(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn write_zeroes(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        let end = offset.saturating_add(length);
        let touched = |change: &Change| {
            change.offset < end && offset < change.offset.saturating_add(change.length)
        };
        if self.changes.iter().any(touched) {
            return Ok(Extent { kind: ExtentKind::Data, length });
        }
        self.store.extent(offset, length)
    }
}
