//! The header of a qcow2 image and its extensions (QEMU, `docs/interop/qcow2.txt`, "Header" and
//! "Header extensions").
use crate::bytes::{be32, be64};
use crate::{DiskError, Store};

/// "QFI" and 0xfb.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Clusters are 512 bytes to 2 MiB.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Largest level 1 table, in bytes, as in QEMU. It is kept in memory.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, in bytes, as in QEMU. It is kept in memory.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots, as in QEMU.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// Longest name of a backing file, in bytes.
pub(crate) const MAX_BACKING_NAME: usize = 1023;

/// Incompatible feature: refcounts may be wrong, because the image was not closed.
pub(crate) const DIRTY: u64 = 1 << 0;
/// Incompatible feature: metadata was found to be damaged.
pub(crate) const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
/// Incompatible feature: the compression is not deflate.
pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Compatible feature: refcounts may be written late.
pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature: the bitmaps extension is consistent with the data.
pub(crate) const BITMAPS_VALID: u64 = 1 << 0;

/// Length of a version 2 header, and of a version 3 header without and with the compression type.
pub(crate) const V2_LENGTH: u32 = 72;
pub(crate) const V3_LENGTH: u32 = 112;
const V3_SHORTEST: u32 = 104;

/// Header extensions, by their type.
const EXTENSION_END: u32 = 0;
pub(crate) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// Version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Without feature bits and zero clusters ("compat 0.10").
    V2,
    /// "compat 1.1".
    V3,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Deflate,
    /// Zstandard frames.
    Zstd,
}

/// The backing file as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// Its name, relative to the image's folder unless absolute.
    pub name: String,
    /// Its format's name in QEMU, where the header has it.
    pub format: Option<String>,
}

/// Where the directory of persistent bitmaps is ("Bitmaps extension").
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bitmaps {
    pub count: u32,
    pub directory_size: u64,
    pub directory_offset: u64,
}

/// A header that was found to be sound by itself: what it points to lies within the file.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub version: Version,
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_entries: u32,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub refcount_order: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub compression: Compression,
    pub backing: Option<BackingName>,
    pub bitmaps: Option<Bitmaps>,
}

impl Header {
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Reads and checks the header.
    pub fn read(store: &dyn Store) -> Result<Self, DiskError> {
        let damaged = |what: String| DiskError::Damaged { file: store.name(), what };
        let unsupported = |feature: &str| DiskError::Unsupported {
            file: store.name(),
            feature: feature.to_owned(),
        };
        let mut fixed = [0; V3_LENGTH as usize];
        store.read_or_zero_at(0, &mut fixed)?;
        if !fixed.starts_with(&MAGIC) {
            return Err(DiskError::NotThisFormat { file: store.name(), format: "qcow2" });
        }
        let version = match be32(&fixed, 4) {
            2 => Version::V2,
            3 => Version::V3,
            other => return Err(unsupported(&format!("version {other} of qcow2"))),
        };
        let cluster_bits = be32(&fixed, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(damaged(format!("its clusters are 2^{cluster_bits} bytes")));
        }
        let mut header = Self {
            version,
            cluster_bits,
            size: be64(&fixed, 24),
            l1_entries: be32(&fixed, 36),
            l1_offset: be64(&fixed, 40),
            refcount_table_offset: be64(&fixed, 48),
            refcount_table_clusters: be32(&fixed, 56),
            refcount_order: 4,
            snapshots: be32(&fixed, 60),
            snapshots_offset: be64(&fixed, 64),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Deflate,
            backing: None,
            bitmaps: None,
        };
        if be32(&fixed, 32) != 0 {
            return Err(unsupported("encryption"));
        }
        let mut length = V2_LENGTH;
        if version == Version::V3 {
            header.incompatible = be64(&fixed, 72);
            header.compatible = be64(&fixed, 80);
            header.autoclear = be64(&fixed, 88);
            header.refcount_order = be32(&fixed, 96);
            length = be32(&fixed, 100);
            if !(V3_SHORTEST..=1 << cluster_bits).contains(&length) || !length.is_multiple_of(8) {
                return Err(damaged(format!("its header is {length} bytes long")));
            }
        }
        let mut first_cluster = vec![0; 1 << cluster_bits];
        store.read_or_zero_at(0, &mut first_cluster)?;
        let extensions = Extensions::parse(&first_cluster, length, be64(&fixed, 8))
            .ok_or_else(|| damaged("its header extensions do not fit its first cluster".into()))?;
        header.refuse_unknown_features(&extensions.feature_names, &unsupported)?;
        if length > V3_SHORTEST {
            header.compression = match fixed.get(V3_SHORTEST as usize).copied().unwrap_or(0) {
                0 => Compression::Deflate,
                1 => Compression::Zstd,
                other => return Err(unsupported(&format!("compression type {other}"))),
            };
        }
        header.bitmaps = extensions.bitmaps;
        header.backing =
            backing_name(&first_cluster, be64(&fixed, 8), be32(&fixed, 16), extensions.format)
                .ok_or_else(|| {
                    damaged("the name of its backing file is not in its header".into())
                })?;
        header.check_layout(store.size()?).map_err(damaged)?;
        Ok(header)
    }

    fn refuse_unknown_features(
        &self,
        names: &[(u8, String)],
        unsupported: &dyn Fn(&str) -> DiskError,
    ) -> Result<(), DiskError> {
        if self.incompatible & EXTERNAL_DATA != 0 {
            return Err(unsupported("an external data file"));
        }
        if self.incompatible & EXTENDED_L2 != 0 {
            return Err(unsupported("extended L2 entries (subclusters)"));
        }
        let unknown = self.incompatible & !(DIRTY | CORRUPT | COMPRESSION_TYPE);
        if unknown == 0 {
            return Ok(());
        }
        let bit = unknown.trailing_zeros();
        let name = names.iter().find(|(number, _)| u32::from(*number) == bit);
        let name = name.map(|(_, name)| format!(" \"{name}\"")).unwrap_or_default();
        Err(unsupported(&format!("the incompatible feature{name} (bit {bit})")))
    }

    /// Everything that the header points to must be aligned and within the file.
    fn check_layout(&self, file_size: u64) -> Result<(), String> {
        let cluster = self.cluster_size();
        let end = file_size.next_multiple_of(cluster);
        let table = |what: &str, offset: u64, bytes: u64, most: u64| {
            if !offset.is_multiple_of(cluster) {
                return Err(format!("its {what} is at {offset}, which is no cluster's start"));
            }
            if bytes > most {
                return Err(format!("its {what} has {bytes} bytes, more than {most}"));
            }
            match offset.checked_add(bytes) {
                Some(table_end) if table_end <= end => Ok(()),
                _ => Err(format!("its {what} at {offset} lies beyond the file's end")),
            }
        };
        if self.refcount_order > 6 {
            return Err(format!("its refcounts have 2^{} bits", self.refcount_order));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        table("L1 table", self.l1_offset, l1_bytes, MAX_L1_BYTES)?;
        let refcount_bytes = u64::from(self.refcount_table_clusters) * cluster;
        let most = MAX_REFCOUNT_TABLE_BYTES.max(cluster);
        table("refcount table", self.refcount_table_offset, refcount_bytes, most)?;
        if refcount_bytes == 0 || self.refcount_table_offset == 0 {
            return Err("it has no refcount table".to_owned());
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(format!("it has {} snapshots, more than {MAX_SNAPSHOTS}", self.snapshots));
        }
        if self.snapshots > 0 {
            table("snapshot table", self.snapshots_offset, cluster, cluster)?;
        }
        let needed = l1_entries_for(self.size, self.cluster_bits);
        if u64::from(self.l1_entries) < needed || (self.l1_offset == 0 && needed > 0) {
            let entries = self.l1_entries;
            return Err(format!(
                "its L1 table has {entries} entries, and {} bytes of disk need {needed}",
                self.size
            ));
        }
        Ok(())
    }
}

/// Entries of the L1 table that a disk of `size` bytes needs.
pub(crate) fn l1_entries_for(size: u64, cluster_bits: u32) -> u64 {
    // An L2 table fills a cluster with entries of 8 bytes, each for a cluster.
    size.div_ceil(1 << (2 * cluster_bits - 3))
}

fn backing_name(
    first_cluster: &[u8],
    offset: u64,
    length: u32,
    format: Option<String>,
) -> Option<Option<BackingName>> {
    if offset == 0 || length == 0 {
        return Some(None);
    }
    let (start, length) = (usize::try_from(offset).ok()?, usize::try_from(length).ok()?);
    if length > MAX_BACKING_NAME {
        return None;
    }
    let name = first_cluster.get(start..start.checked_add(length)?)?;
    let name = str::from_utf8(name).ok()?.to_owned();
    Some(Some(BackingName { name, format }))
}

/// What header extensions say, of those that are known.
#[derive(Default)]
struct Extensions {
    format: Option<String>,
    /// Numbers and names of incompatible features.
    feature_names: Vec<(u8, String)>,
    bitmaps: Option<Bitmaps>,
}

impl Extensions {
    /// `None` where they do not end properly.
    fn parse(first_cluster: &[u8], header_length: u32, backing_offset: u64) -> Option<Self> {
        // They end where the name of the backing file begins, if there is one.
        let end = match usize::try_from(backing_offset).ok()? {
            0 => first_cluster.len(),
            offset => offset.min(first_cluster.len()),
        };
        let mut area = first_cluster.get(usize::try_from(header_length).ok()?..end)?;
        let mut found = Self::default();
        while area.len() >= 8 {
            let kind = be32(area, 0);
            let length = usize::try_from(be32(area, 4)).ok()?;
            if kind == EXTENSION_END {
                break;
            }
            let data = area.get(8..8_usize.checked_add(length)?)?;
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    found.format = Some(String::from_utf8_lossy(data).into_owned());
                }
                EXTENSION_FEATURE_NAMES => found.feature_names = feature_names(data),
                EXTENSION_BITMAPS => {
                    found.bitmaps = Some(Bitmaps {
                        count: be32(data, 0),
                        directory_size: be64(data, 8),
                        directory_offset: be64(data, 16),
                    });
                }
                // Unknown ones may be ignored, says the specification.
                _ => {}
            }
            area = area.get(8 + length.next_multiple_of(8)..).unwrap_or_default();
        }
        Some(found)
    }
}

/// The names of incompatible features (type 0) in a feature name table.
fn feature_names(table: &[u8]) -> Vec<(u8, String)> {
    let (entries, _) = table.as_chunks::<48>();
    let incompatible = entries.iter().filter(|entry| entry[0] == 0);
    incompatible
        .map(|entry| {
            let name = String::from_utf8_lossy(entry.get(2..).unwrap_or_default());
            (entry[1], name.trim_end_matches('\0').escape_debug().to_string())
        })
        .collect()
}
