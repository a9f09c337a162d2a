//! Giving free clusters back to the host.
use super::Qcow2;
use super::refcounts::Run;
use crate::{DiskError, ExtentKind};

impl Qcow2 {
    /// Gives the host back what free clusters take up in the file, and cuts off those at its end.
    /// (What Bivisor frees it gives back at once; others leave it there.)
    ///
    /// # Errors
    /// As [`crate::Disk::write_at`].
    pub fn give_back_free(&mut self) -> Result<(), DiskError> {
        self.check_change(0, 0)?;
        let result = self.punch_free();
        self.watch(result)
    }

    fn punch_free(&self) -> Result<(), DiskError> {
        self.settle()?;
        let mut meta = self.meta();
        let end = meta.refcounts.end();
        for run in meta.refcounts.free_runs(&*self.store)? {
            let offset = run.first << self.cluster_bits;
            if run.end() == end {
                meta.refcounts.cut_off(run.first);
                self.store.set_size(offset)?;
                continue;
            }
            let length = run.count << self.cluster_bits;
            let extent = self.store.extent(offset, length)?;
            if extent.kind == ExtentKind::Data || extent.length < length {
                self.store.discard(offset, length)?;
            }
        }
        self.store.sync()
    }
}

/// Adds a run to others that are in ascending order.
pub(super) fn push_run(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first => last.count += run.count,
        _ => runs.push(run),
    }
}
