//! Small disks whose content is in memory, as those that tell a guest its name.
use crate::{Disk, DiskError, Extent, ExtentKind, SECTOR, check_range};

/// A disk that is only read, from memory.
#[derive(Debug)]
pub struct MemoryDisk {
    bytes: Vec<u8>,
}

impl MemoryDisk {
    /// A disk with this content, filled up with zeroes to whole sectors.
    #[must_use]
    pub fn read_only(mut bytes: Vec<u8>) -> Self {
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        Self { bytes }
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        check_range(offset, buffer.len() as u64, self.size())?;
        // The range lies within the vector, as was just checked.
        let from = self.bytes.get(offset as usize..).unwrap_or_default();
        buffer.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn extent(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        check_range(offset, length, self.size())?;
        Ok(Extent { kind: ExtentKind::Data, length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_in_memory_has_whole_sectors_and_is_only_read() {
        let disk = MemoryDisk::read_only(vec![5; 513]);
        assert_eq!(disk.size(), 1024);
        let mut bytes = [1; 4];
        disk.read_at(511, &mut bytes).unwrap();
        assert_eq!(bytes, [5, 5, 0, 0]);
        assert!(disk.read_at(1021, &mut bytes).is_err());
        assert!(matches!(disk.write_at(0, &bytes), Err(DiskError::ReadOnly)));
    }
}
