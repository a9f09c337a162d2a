//! What an image says of itself, and its internal snapshots (QEMU, `docs/interop/qcow2.txt`,
//! "Snapshots").
use super::header::{BackingName, CORRUPT, Compression, DIRTY, Header, LAZY_REFCOUNTS, Version};
use super::meta::Meta;
use super::{Qcow2, header};
use crate::bytes::{be16, be32, be64};
use crate::{DiskError, FileOptions, ImageFile, Store};
use std::path::Path;

/// Largest snapshot table, in bytes, as in QEMU.
const MAX_TABLE: u64 = 64 << 20;
/// Most bytes of all snapshots' L1 tables: a thousand snapshots of 16 TiB.
const MAX_L1_BYTES: u64 = 256 << 20;
/// Longest extra data of a snapshot, as in QEMU.
const MAX_EXTRA: u32 = 1024;
/// Bytes of a snapshot's entry before its extra data.
const FIXED: u64 = 40;

/// What an image says of itself.
#[derive(Clone, Debug)]
pub struct Info {
    /// Version of the format.
    pub version: Version,
    /// The disk's size, in bytes.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// The file below it.
    pub backing: Option<BackingName>,
    /// How its compressed clusters are compressed.
    pub compression: Compression,
    /// Bits of a refcount.
    pub refcount_bits: u32,
    /// Refcounts are written when the image is closed.
    pub lazy_refcounts: bool,
    /// It is in use, or was not closed.
    pub dirty: bool,
    /// It is marked as corrupt.
    pub corrupt: bool,
    /// Its internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Bytes that its file takes up on the host.
    pub allocated: u64,
}

/// An internal snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its number, a string in the format.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made, in seconds since 1970.
    pub seconds: u32,
    /// Bytes of a machine's saved memory and devices.
    pub machine_state: u64,
    /// The disk's size at that time, where it is recorded.
    pub disk_size: Option<u64>,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
}

impl Qcow2 {
    /// Reads what an image says of itself, without its backing file.
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub fn info(path: &Path, options: FileOptions) -> Result<Info, DiskError> {
        let file = ImageFile::open(path, options)?;
        let header = Header::read(&file)?;
        Ok(Info {
            version: header.version,
            size: header.size,
            cluster_size: header.cluster_size(),
            compression: header.compression,
            refcount_bits: 1 << header.refcount_order,
            lazy_refcounts: header.compatible & LAZY_REFCOUNTS != 0,
            dirty: header.incompatible & DIRTY != 0,
            corrupt: header.incompatible & CORRUPT != 0,
            snapshots: snapshots(&file, &header)?.0,
            allocated: file.allocated()?,
            backing: header.backing,
        })
    }
}

/// The internal snapshots, and the bytes of their table.
pub(super) fn snapshots(
    store: &dyn Store,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64), DiskError> {
    let damaged = |what: &str| DiskError::Damaged { file: store.name(), what: what.to_owned() };
    let file_size = store.size()?;
    let mut found = Vec::new();
    let mut at = header.snapshots_offset;
    let mut l1_bytes = 0;
    for _ in 0..header.snapshots {
        let mut fixed = [0; FIXED as usize];
        store.read_or_zero_at(at, &mut fixed)?;
        let extra = be32(&fixed, 36);
        if extra > MAX_EXTRA {
            return Err(damaged("a snapshot has too much extra data"));
        }
        let (id, name) = (usize::from(be16(&fixed, 12)), usize::from(be16(&fixed, 14)));
        let mut rest = vec![0; extra as usize + id + name];
        store.read_or_zero_at(at + FIXED, &mut rest)?;
        let snapshot = parse(&fixed, &rest, extra as usize, id)
            .ok_or_else(|| damaged("an entry of the snapshot table is cut off"))?;
        at = (at + FIXED + rest.len() as u64).next_multiple_of(8);
        l1_bytes += u64::from(snapshot.l1_entries) * 8;
        let l1_end = snapshot.l1_offset.checked_add(u64::from(snapshot.l1_entries) * 8);
        let aligned = snapshot.l1_offset.is_multiple_of(header.cluster_size());
        let fits = l1_end.is_some_and(|end| end <= file_size.next_multiple_of(512));
        let small = u64::from(snapshot.l1_entries) * 8 <= header::MAX_L1_BYTES;
        if !aligned || !fits || !small || at - header.snapshots_offset > MAX_TABLE {
            return Err(damaged("an entry of the snapshot table points where no table can be"));
        }
        if l1_bytes > MAX_L1_BYTES {
            return Err(damaged("the snapshots' tables take up more than 256 MiB"));
        }
        found.push(snapshot);
    }
    Ok((found, at - header.snapshots_offset))
}

fn parse(fixed: &[u8], rest: &[u8], extra: usize, id: usize) -> Option<Snapshot> {
    let (extra, names) = rest.split_at_checked(extra)?;
    let (id, name) = names.split_at_checked(id)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(Snapshot {
        id: text(id),
        name: text(name),
        seconds: be32(fixed, 16),
        machine_state: match extra.len() {
            0..8 => u64::from(be32(fixed, 32)),
            _ => be64(extra, 0),
        },
        disk_size: (extra.len() >= 16).then(|| be64(extra, 8)),
        l1_offset: be64(fixed, 0),
        l1_entries: be32(fixed, 8),
    })
}

/// Keeps what belongs to snapshots from being allocated because of wrong refcounts.
pub(super) fn protect_snapshots(
    store: &dyn Store,
    header: &Header,
    meta: &mut Meta,
) -> Result<(), DiskError> {
    let (snapshots, length) = snapshots(store, header)?;
    if length == 0 {
        return Ok(());
    }
    meta.refcounts.protect(header.snapshots_offset, length);
    for snapshot in snapshots {
        meta.refcounts.protect(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
    }
    Ok(())
}
