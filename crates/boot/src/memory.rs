//! The guest's physical address space: what is RAM, what the guest is told, and where the loader
//! puts things.
use crate::error::BootError;
use crate::platform::Platform;
use std::fs::File;
use std::ops::Range;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

/// Where the hole for devices begins: RAM below it, at most 3 GiB.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Start of the extended BIOS data area, reserved up to [`LEGACY_HOLE_START`].
pub const EBDA_START: u64 = 0x9_fc00;
/// Video memory, option ROMs and firmware: not RAM to the guest.
pub const LEGACY_HOLE_START: u64 = 0xa_0000;
/// Firmware tables and the rest of the BIOS area start here.
pub const FIRMWARE_START: u64 = 0xe_0000;
/// The first address past the BIOS area.
pub const FIRMWARE_END: u64 = 0x10_0000;

/// The RAM ranges (address and length in bytes) of a machine with `bytes` of memory: up to 3 GiB
/// from address 0, the rest from 4 GiB on.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_RAM_END);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HIGH_RAM_START, bytes - low));
    }
    ranges
}

/// What an address range is for (ACPI 6.5 §15, "System Address Map Interfaces").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Free for the operating system.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// One entry of the map that the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Use.
    pub kind: RangeKind,
}

/// Guest memory as the loader uses it: written with errors of this crate, and with a map.
pub(crate) struct GuestRam<'a> {
    memory: &'a GuestMemoryMmap<()>,
    /// Contiguous RAM, merged across regions, in ascending order.
    ranges: Vec<Range<u64>>,
    /// The map for the guest.
    pub map: Vec<MapEntry>,
}

impl<'a> GuestRam<'a> {
    pub(crate) fn new(memory: &'a GuestMemoryMmap<()>, platform: &Platform) -> Self {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for region in memory.iter() {
            let start = region.start_addr().0;
            let end = start.saturating_add(region.len());
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        let map = address_map(&ranges, platform);
        Self { memory, ranges, map }
    }

    /// All RAM in bytes.
    pub(crate) fn total(&self) -> u64 {
        self.ranges.iter().map(|r| r.end - r.start).fold(0, u64::saturating_add)
    }

    /// Where the RAM that begins at 0 ends.
    pub(crate) fn low_end(&self) -> u64 {
        self.ranges.first().filter(|r| r.start == 0).map_or(0, |r| r.end)
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| BootError::Memory { address, source })
    }

    /// Fills guest memory from the file's current position.
    pub(crate) fn read_from(
        &self,
        name: &str,
        address: u64,
        mut file: &File,
        length: u64,
    ) -> Result<(), BootError> {
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        let target = GuestAddress(address);
        self.memory.read_exact_volatile_from(target, &mut file, count).map_err(|e| match e {
            GuestMemoryError::IOError(source) => BootError::Read { name: name.into(), source },
            source => BootError::Memory { address, source },
        })
    }

    /// Makes a range zero, without touching pages that are zero already: fresh memory stays
    /// unpopulated, and memory of an earlier run is cleaned.
    pub(crate) fn zero(&self, range: Range<u64>) -> Result<(), BootError> {
        const CHUNK: u64 = 4096;
        let mut buffer = [0u8; CHUNK as usize];
        let mut address = range.start;
        while address < range.end {
            let count = (CHUNK - address % CHUNK).min(range.end - address);
            let chunk = buffer.get_mut(..count as usize).unwrap_or_default();
            self.memory
                .read_slice(chunk, GuestAddress(address))
                .map_err(|source| BootError::Memory { address, source })?;
            if chunk.iter().any(|b| *b != 0) {
                chunk.fill(0);
                self.write(address, chunk)?;
            }
            address += count;
        }
        Ok(())
    }
}

/// The map for the guest: RAM less the legacy hole, and what is reserved.
fn address_map(ranges: &[Range<u64>], platform: &Platform) -> Vec<MapEntry> {
    let mut map = Vec::new();
    let mut ram = |range: Range<u64>| {
        if range.start < range.end {
            let length = range.end - range.start;
            map.push(MapEntry { start: range.start, length, kind: RangeKind::Ram });
        }
    };
    for range in ranges {
        ram(range.start..range.end.min(EBDA_START));
        ram(range.start.max(FIRMWARE_END)..range.end);
    }
    for (start, end) in [(EBDA_START, LEGACY_HOLE_START), (FIRMWARE_START, FIRMWARE_END)] {
        map.push(MapEntry { start, length: end - start, kind: RangeKind::Reserved });
    }
    if let Some(ecam) = &platform.ecam {
        let (start, length) = (ecam.base, ecam.length());
        map.push(MapEntry { start, length, kind: RangeKind::Reserved });
    }
    map.sort_by_key(|entry| entry.start);
    map
}

/// Which parts of the guest's RAM are still free while the loader fills it.
pub(crate) struct Placement {
    free: Vec<Range<u64>>,
}

impl Placement {
    /// All RAM that the map names, less the first page (interrupt vectors and BIOS data area).
    pub(crate) fn new(map: &[MapEntry]) -> Self {
        let free = map
            .iter()
            .filter(|entry| entry.kind == RangeKind::Ram)
            .map(|entry| entry.start.max(0x1000)..entry.start.saturating_add(entry.length))
            .filter(|range| range.start < range.end)
            .collect();
        Self { free }
    }

    /// Takes exactly this range; `false` where part of it is not free RAM.
    pub(crate) fn claim(&mut self, range: &Range<u64>) -> bool {
        if range.start >= range.end {
            return range.start == range.end;
        }
        let found = self.free.iter().position(|f| f.start <= range.start && range.end <= f.end);
        let Some(index) = found else { return false };
        let whole = self.free.remove(index);
        for rest in [range.end..whole.end, whole.start..range.start] {
            if rest.start < rest.end {
                self.free.insert(index, rest);
            }
        }
        true
    }

    /// Takes the lowest `length` bytes aligned to `align` (a power of two) inside `window`.
    pub(crate) fn lowest(&mut self, length: u64, align: u64, window: Range<u64>) -> Option<u64> {
        let start = self.free.iter().find_map(|f| {
            let start = f.start.max(window.start).checked_next_multiple_of(align)?;
            let end = start.checked_add(length)?;
            (end <= f.end.min(window.end)).then_some(start)
        })?;
        self.claim(&(start..start + length)).then_some(start)
    }

    /// Takes the highest `length` bytes aligned to `align` (a power of two) inside `window`.
    pub(crate) fn highest(&mut self, length: u64, align: u64, window: Range<u64>) -> Option<u64> {
        let start = self.free.iter().rev().find_map(|f| {
            let start = f.end.min(window.end).checked_sub(length)?;
            let start = start - start % align;
            (start >= f.start.max(window.start)).then_some(start)
        })?;
        self.claim(&(start..start + length)).then_some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement() -> Placement {
        Placement { free: vec![0x1000..0x9_fc00, 0x10_0000..0x80_0000] }
    }

    #[test]
    fn ram_beyond_three_gib_goes_above_four_gib() {
        assert_eq!(ram_ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn the_map_leaves_out_the_legacy_hole_and_reserves_what_is_not_ram() {
        let map = address_map(std::slice::from_ref(&(0..0x4000_0000)), &Platform::default());
        let entry = |start, end: u64, kind| MapEntry { start, length: end - start, kind };
        assert_eq!(
            map,
            [
                entry(0, 0x9_fc00, RangeKind::Ram),
                entry(0x9_fc00, 0xa_0000, RangeKind::Reserved),
                entry(0xe_0000, 0x10_0000, RangeKind::Reserved),
                entry(0x10_0000, 0x4000_0000, RangeKind::Ram),
                entry(0xe000_0000, 0xf000_0000, RangeKind::Reserved),
            ]
        );
    }

    #[test]
    fn a_range_is_given_out_once_only() {
        let mut p = placement();
        assert!(p.claim(&(0x20_0000..0x30_0000)));
        assert!(!p.claim(&(0x2f_ffff..0x30_0001)));
        assert!(p.claim(&(0x30_0000..0x80_0000)));
        assert_eq!(p.free, [0x1000..0x9_fc00, 0x10_0000..0x20_0000]);
    }

    #[test]
    fn searches_respect_alignment_window_and_what_is_taken() {
        let mut p = placement();
        assert_eq!(p.lowest(0x1000, 0x1000, 0x10_0000..u64::MAX), Some(0x10_0000));
        assert_eq!(p.lowest(0x1000, 0x10_0000, 0x10_0000..u64::MAX), Some(0x20_0000));
        assert_eq!(p.highest(0x1001, 0x1000, 0..0x80_0000), Some(0x7f_e000));
        assert_eq!(p.highest(0x100_0000, 0x1000, 0..u64::MAX), None);
        assert_eq!(p.lowest(u64::MAX, 0x1000, 0..u64::MAX), None);
        assert_eq!(p.highest(0x10, 1, 0..0x500), None);
    }
}
