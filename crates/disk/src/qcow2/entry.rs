//! Entries of L1 and L2 tables (QEMU, `docs/interop/qcow2.txt`, "Cluster mapping").

/// The cluster or table is used once only, by this entry, and may be overwritten in place.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Reads as zeroes, whatever the offset says (version 3).
pub(crate) const ZERO: u64 = 1;
/// Bits 9 to 55, an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Unit of the length of compressed data, in bytes.
const SECTOR: u64 = 512;

/// What an L2 entry says about its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Not here: what is below shows through.
    Unallocated,
    /// Zeroes. The cluster at `host` is set aside for it, if there is one.
    Zero { host: Option<u64> },
    /// The data is at offset `host`. It may be overwritten if `copied`.
    Data { host: u64, copied: bool },
    /// Compressed data begins at `host` and ends within `length` bytes.
    Compressed { host: u64, length: u64 },
}

impl Mapping {
    /// What an entry says, or what is wrong with it.
    pub fn parse(entry: u64, cluster_bits: u32) -> Result<Self, &'static str> {
        if entry & COMPRESSED != 0 {
            // Bits 0 to x-1 are the offset, x to 61 the number of further sectors.
            let x = 62 - (cluster_bits - 8);
            let host = entry & ((1 << x) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> x) + 1;
            return Ok(Self::Compressed { host, length: sectors * SECTOR - host % SECTOR });
        }
        let host = entry & OFFSET;
        if !host.is_multiple_of(1 << cluster_bits) {
            return Err("points into the middle of a cluster");
        }
        if entry & ZERO != 0 {
            return Ok(Self::Zero { host: (host != 0).then_some(host) });
        }
        match (host, entry & COPIED != 0) {
            (0, false) => Ok(Self::Unallocated),
            (0, true) => Err("points to the image's header"),
            (host, copied) => Ok(Self::Data { host, copied }),
        }
    }

    /// First host cluster that it uses, and how many, for their refcounts.
    pub fn host_clusters(self, cluster_bits: u32) -> Option<(u64, u64)> {
        match self {
            Self::Unallocated | Self::Zero { host: None } => None,
            Self::Zero { host: Some(host) } | Self::Data { host, .. } => {
                Some((host >> cluster_bits, 1))
            }
            Self::Compressed { host, length } => {
                let first = host >> cluster_bits;
                let last = (host + length - 1) >> cluster_bits;
                Some((first, last - first + 1))
            }
        }
    }
}

/// The offset of the L2 table in an L1 entry, or of a bitmap's data in its table's entry; 0 if
/// there is none.
pub(crate) fn table_offset(entry: u64) -> u64 {
    entry & OFFSET
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_mean_what_the_specification_says() {
        let parse = |entry| Mapping::parse(entry, 16);
        assert_eq!(parse(0), Ok(Mapping::Unallocated));
        assert_eq!(parse(1), Ok(Mapping::Zero { host: None }));
        assert_eq!(parse(0x5_0001), Ok(Mapping::Zero { host: Some(0x5_0000) }));
        assert_eq!(parse(0x5_0000), Ok(Mapping::Data { host: 0x5_0000, copied: false }));
        assert_eq!(parse(COPIED | 0x5_0000), Ok(Mapping::Data { host: 0x5_0000, copied: true }));
        assert!(parse(0x5_0200).is_err());
        // x = 62 - (16 - 8) = 54: the offset has 54 bits, two further sectors are counted above.
        let compressed = COMPRESSED | 2 << 54 | 0x1_fff0;
        let mapping = Mapping::Compressed { host: 0x1_fff0, length: 3 * 512 - 0x1f0 };
        assert_eq!(parse(compressed), Ok(mapping));
        assert_eq!(mapping.host_clusters(16), Some((1, 2)));
    }
}
