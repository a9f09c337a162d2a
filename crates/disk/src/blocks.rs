//! Reading and writing of the formats that divide a disk into blocks and keep each, once it is
//! written to, as one piece of the file: VMDK's grains, the blocks of VDI, VHD and VHDX.
//!
//! A block that is in the file stays where it is for as long as the image is open: to discard it
//! gives its space back to the host by a hole in the file, and leaves the image's table alone. So
//! a look-up needs no lock, nothing that a crash could leave half done comes of a discard, and
//! programs that take the number of blocks for the place of the next one (as VirtualBox and QEMU
//! do for VDI) never meet a gap.
use crate::store::Store;
use crate::{DiskError, Extent, ExtentKind};

/// Blocks that one answer about an extent looks at.
const EXTENT_BLOCKS: u64 = 4096;

/// An image of blocks.
pub(crate) trait Blocks {
    fn store(&self) -> &dyn Store;

    /// Bytes of a block; not zero.
    fn block_size(&self) -> u64;

    /// Where in the file a block's data is; `None` where it was never written and reads as zeroes.
    ///
    /// # Errors
    /// The table cannot be read, or the entry leads to where no block can be.
    fn find(&self, block: u64) -> Result<Option<u64>, DiskError>;

    /// As [`Blocks::find`], for a write to come.
    ///
    /// # Errors
    /// As [`Blocks::find`].
    fn find_to_write(&self, block: u64) -> Result<Option<u64>, DiskError> {
        self.find(block)
    }

    /// Puts a block into the file that was not there, with `data` from `within` on and zeroes in
    /// the rest. Where another thread was faster, its block is taken.
    ///
    /// # Errors
    /// As [`crate::Disk::write_at`].
    fn add(&self, block: u64, within: u64, data: &[u8]) -> Result<(), DiskError>;

    /// Comes before each change of the disk.
    ///
    /// # Errors
    /// As [`crate::Disk::write_at`].
    fn before_change(&self) -> Result<(), DiskError> {
        Ok(())
    }

    /// Makes what was never written read as zeroes, after `buffer` was filled with what the file
    /// has at `within` of the block.
    ///
    /// # Errors
    /// As [`Blocks::find`].
    fn mask(&self, _block: u64, _within: u64, _buffer: &mut [u8]) -> Result<(), DiskError> {
        Ok(())
    }
}

/// A part of a request that is together in the file or together not there.
struct Piece {
    block: u64,
    within: u64,
    length: u64,
    place: Option<u64>,
}

/// The first piece of a range that is not empty.
fn first_piece(
    block_size: u64,
    offset: u64,
    length: u64,
    find: &dyn Fn(u64) -> Result<Option<u64>, DiskError>,
) -> Result<Piece, DiskError> {
    let (block, within) = (offset / block_size, offset % block_size);
    let place = find(block)?;
    let mut piece = Piece { block, within, length: length.min(block_size - within), place };
    let Some(first) = place else { return Ok(piece) };
    piece.place = Some(first.saturating_add(within));
    // Blocks that follow each other in the file make one request to the host.
    let mut next = block;
    while piece.length < length {
        next += 1;
        let follows = first.checked_add((next - block).saturating_mul(block_size));
        if follows.is_none() || find(next)? != follows {
            break;
        }
        piece.length = length.min(piece.length.saturating_add(block_size));
    }
    Ok(piece)
}

/// The part of `bytes` from `at` on, `length` long.
fn part(bytes: &[u8], at: u64, length: u64) -> &[u8] {
    let range = usize::try_from(at).ok().zip(usize::try_from(at + length).ok());
    range.and_then(|(start, end)| bytes.get(start..end)).unwrap_or_default()
}

/// As [`crate::Disk::read_at`], for a range that is within the disk.
pub(crate) fn read(
    blocks: &dyn Blocks,
    mut offset: u64,
    mut buffer: &mut [u8],
) -> Result<(), DiskError> {
    let block_size = blocks.block_size();
    while !buffer.is_empty() {
        let piece =
            first_piece(block_size, offset, buffer.len() as u64, &|block| blocks.find(block))?;
        let length = usize::try_from(piece.length).unwrap_or(buffer.len()).min(buffer.len());
        let (now, rest) = buffer.split_at_mut(length);
        match piece.place {
            None => now.fill(0),
            Some(place) => {
                blocks.store().read_or_zero_at(place, now)?;
                mask(blocks, &piece, now)?;
            }
        }
        buffer = rest;
        offset = offset.saturating_add(piece.length);
    }
    Ok(())
}

/// Masks what was read, block by block.
fn mask(blocks: &dyn Blocks, piece: &Piece, mut buffer: &mut [u8]) -> Result<(), DiskError> {
    let (mut block, mut within) = (piece.block, piece.within);
    while !buffer.is_empty() {
        let length = usize::try_from(blocks.block_size() - within).unwrap_or(usize::MAX);
        let (now, rest) = buffer.split_at_mut(length.min(buffer.len()));
        blocks.mask(block, within, now)?;
        buffer = rest;
        (block, within) = (block + 1, 0);
    }
    Ok(())
}

/// As [`crate::Disk::write_at`], for a range that is within the disk.
pub(crate) fn write(blocks: &dyn Blocks, offset: u64, data: &[u8]) -> Result<(), DiskError> {
    let length = data.len() as u64;
    let mut done = 0;
    while done < length {
        let find = |block| blocks.find_to_write(block);
        let piece = first_piece(blocks.block_size(), offset + done, length - done, &find)?;
        let now = part(data, done, piece.length);
        match piece.place {
            None => blocks.add(piece.block, piece.within, now)?,
            Some(place) => blocks.store().write_at(place, now)?,
        }
        done += piece.length;
    }
    Ok(())
}

/// How a range is emptied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clear {
    /// Its content does not matter any more.
    Discard,
    /// It has to read as zeroes.
    Zero,
}

/// As [`crate::Disk::discard`] and [`crate::Disk::write_zeroes`], for a range that is within the
/// disk.
pub(crate) fn clear(
    blocks: &dyn Blocks,
    offset: u64,
    length: u64,
    how: Clear,
) -> Result<(), DiskError> {
    let mut done = 0;
    while done < length {
        let find = |block| blocks.find_to_write(block);
        let piece = first_piece(blocks.block_size(), offset + done, length - done, &find)?;
        match (piece.place, how) {
            (None, _) => {}
            (Some(place), Clear::Discard) => blocks.store().discard(place, piece.length)?,
            (Some(place), Clear::Zero) => blocks.store().write_zeroes(place, piece.length)?,
        }
        done += piece.length;
    }
    Ok(())
}

/// As [`crate::Disk::extent`], for a range that is within the disk.
pub(crate) fn extent(blocks: &dyn Blocks, offset: u64, length: u64) -> Result<Extent, DiskError> {
    if length == 0 {
        return Ok(Extent { kind: ExtentKind::Zero, length: 0 });
    }
    let block_size = blocks.block_size();
    let length = length.min(block_size.saturating_mul(EXTENT_BLOCKS));
    let piece = first_piece(block_size, offset, length, &|block| blocks.find(block))?;
    if let Some(place) = piece.place {
        return blocks.store().extent(place, piece.length);
    }
    let mut zero = piece.length;
    while zero < length && blocks.find(offset.saturating_add(zero) / block_size)?.is_none() {
        zero = length.min(zero.saturating_add(block_size));
    }
    Ok(Extent { kind: ExtentKind::Zero, length: zero })
}

/// Makes a [`Disk`](crate::Disk) of an image of blocks that has methods `disk_size` and `write_back`.
macro_rules! disk_of_blocks {
    ($image:ty) => {
        impl $crate::Disk for $image {
            fn size(&self) -> u64 {
                self.disk_size()
            }

            fn read_only(&self) -> bool {
                $crate::blocks::Blocks::store(self).read_only()
            }

            fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), $crate::DiskError> {
                $crate::check_range(offset, buffer.len() as u64, self.disk_size())?;
                $crate::blocks::read(self, offset, buffer)
            }

            fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), $crate::DiskError> {
                self.check_change(offset, data.len() as u64)?;
                $crate::blocks::write(self, offset, data)
            }

            fn flush(&self) -> Result<(), $crate::DiskError> {
                if $crate::Disk::read_only(self) {
                    return Ok(());
                }
                self.write_back()
            }

            fn discard(&self, offset: u64, length: u64) -> Result<(), $crate::DiskError> {
                self.check_change(offset, length)?;
                $crate::blocks::clear(self, offset, length, $crate::blocks::Clear::Discard)
            }

            fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), $crate::DiskError> {
                self.check_change(offset, length)?;
                $crate::blocks::clear(self, offset, length, $crate::blocks::Clear::Zero)
            }

            fn extent(
                &self,
                offset: u64,
                length: u64,
            ) -> Result<$crate::Extent, $crate::DiskError> {
                $crate::check_range(offset, length, self.disk_size())?;
                $crate::blocks::extent(self, offset, length)
            }
        }

        impl $image {
            /// Refuses a change that is out of range or not allowed.
            fn check_change(&self, offset: u64, length: u64) -> Result<(), $crate::DiskError> {
                if $crate::Disk::read_only(self) {
                    return Err($crate::DiskError::ReadOnly);
                }
                $crate::check_range(offset, length, self.disk_size())?;
                $crate::blocks::Blocks::before_change(self)
            }
        }
    };
}
pub(crate) use disk_of_blocks;

/// Has an image flushed when it is closed.
macro_rules! flush_when_closed {
    ($image:ty) => {
        /// Closing flushes. Who wants to know whether that works calls `flush` first.
        impl Drop for $image {
            fn drop(&mut self) {
                // There is nobody left to tell.
                let _ = $crate::Disk::flush(self);
            }
        }
    };
}
pub(crate) use flush_when_closed;
