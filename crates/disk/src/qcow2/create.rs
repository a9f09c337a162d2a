//! Making a new image.
use super::Qcow2;
use super::header::{
    BackingName, CLUSTER_BITS, EXTENSION_BACKING_FORMAT, LAZY_REFCOUNTS, MAGIC, MAX_BACKING_NAME,
    MAX_L1_BYTES, V2_LENGTH, V3_LENGTH, Version, l1_entries_for,
};
use crate::bytes::put;
use crate::create::new_file;
use crate::{DiskError, FileOptions, Store};
use std::path::Path;

/// Bits of the refcounts of new images, as those of QEMU's, as a power of two.
const REFCOUNT_ORDER: u32 = 4;

/// What a new image is to be like.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The disk's size, in bytes; rounded up to sectors.
    pub size: u64,
    /// Bytes of a cluster, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Version of the format.
    pub version: Version,
    /// Write refcounts only when the image is closed (version 3): fewer writes, and a scan of the
    /// image when it is opened after a crash.
    pub lazy_refcounts: bool,
    /// The file below it. Its format must be named, or whoever opens the image would have to guess.
    pub backing: Option<BackingName>,
}

impl CreateOptions {
    /// An image of `size` bytes with QEMU's defaults.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_size: 64 << 10,
            version: Version::V3,
            lazy_refcounts: false,
            backing: None,
        }
    }
}

/// Where things are in a new image: header, refcount table, refcount blocks, L1 table, in this
/// order, each from a cluster's start.
struct Layout {
    cluster_bits: u32,
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
    l1_clusters: u64,
}

impl Layout {
    fn new(size: u64, cluster_bits: u32) -> Self {
        let cluster = 1_u64 << cluster_bits;
        let l1_entries = l1_entries_for(size, cluster_bits);
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let per_block = (cluster * 8) >> REFCOUNT_ORDER;
        let (mut table_clusters, mut blocks) = (1, 1);
        // The blocks count themselves and their table, too; each round is a little less wrong.
        loop {
            let needed = (1 + table_clusters + blocks + l1_clusters).div_ceil(per_block);
            let needed_table = (needed * 8).div_ceil(cluster);
            if needed <= blocks && needed_table <= table_clusters {
                return Self { cluster_bits, table_clusters, blocks, l1_entries, l1_clusters };
            }
            blocks = blocks.max(needed);
            table_clusters = table_clusters.max(needed_table);
        }
    }

    fn offset(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    fn table(&self) -> u64 {
        self.offset(1)
    }

    fn first_block(&self) -> u64 {
        self.offset(1 + self.table_clusters)
    }

    fn l1(&self) -> u64 {
        self.offset(1 + self.table_clusters + self.blocks)
    }

    fn clusters(&self) -> u64 {
        1 + self.table_clusters + self.blocks + self.l1_clusters
    }
}

impl Qcow2 {
    /// Makes a new image. It reads as its backing file does, or as zeroes.
    ///
    /// # Errors
    /// [`DiskError::Invalid`] where such an image cannot be, and those of [`ImageFile::create`].
    ///
    /// [`ImageFile::create`]: crate::ImageFile::create
    pub fn create(
        path: &Path,
        create: &CreateOptions,
        options: FileOptions,
    ) -> Result<(), DiskError> {
        // Before there is a file.
        let parts = plan(&path.display().to_string(), create)?;
        new_file(path, options, |file| write(&file, &parts))
    }

    /// Makes a new image of an empty store, as [`Qcow2::create`] does of a file.
    ///
    /// # Errors
    /// As [`Qcow2::create`].
    pub fn create_in(store: &dyn Store, create: &CreateOptions) -> Result<(), DiskError> {
        write(store, &plan(&store.name(), create)?)
    }
}

/// Where things go in a new image, and its first bytes.
fn plan(file: &str, create: &CreateOptions) -> Result<(Layout, Vec<u8>), DiskError> {
    let invalid = |problem: String| DiskError::Invalid { file: file.to_owned(), problem };
    let cluster_bits = create.cluster_size.trailing_zeros();
    if !create.cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
        let asked = create.cluster_size;
        return Err(invalid(format!(
            "clusters cannot have {asked} bytes; choose a power of two from 512 to 2097152"
        )));
    }
    if create.lazy_refcounts && create.version == Version::V2 {
        return Err(invalid("lazy refcounts need version 3 of qcow2".to_owned()));
    }
    let size = create.size.checked_next_multiple_of(512).filter(|size| *size < 1 << 63);
    let size = size.ok_or_else(|| invalid("the disk cannot be that large".to_owned()))?;
    if l1_entries_for(size, cluster_bits) * 8 > MAX_L1_BYTES {
        return Err(invalid(format!(
            "a disk of {size} bytes needs larger clusters than {} bytes; choose up to 2097152",
            create.cluster_size
        )));
    }
    let layout = Layout::new(size, cluster_bits);
    let header = header(create, size, &layout).map_err(invalid)?;
    Ok((layout, header))
}

fn write(store: &dyn Store, (layout, header): &(Layout, Vec<u8>)) -> Result<(), DiskError> {
    store.set_size(layout.offset(layout.clusters()))?;
    let first_block = layout.first_block() >> layout.cluster_bits;
    let table = (first_block..first_block + layout.blocks).map(|block| layout.offset(block));
    let table: Vec<u8> = table.flat_map(u64::to_be_bytes).collect();
    store.write_at(layout.table(), &table)?;
    let ones = usize::try_from(layout.clusters()).unwrap_or(0);
    store.write_at(layout.first_block(), &1_u16.to_be_bytes().repeat(ones))?;
    // The header last: before it, this is no image.
    store.sync()?;
    store.write_at(0, header)?;
    store.sync()
}

/// The first bytes of the image, or why there cannot be such an image.
fn header(create: &CreateOptions, size: u64, layout: &Layout) -> Result<Vec<u8>, String> {
    let (version, length) = match create.version {
        Version::V2 => (2_u32, V2_LENGTH),
        Version::V3 => (3_u32, V3_LENGTH),
    };
    let mut bytes = vec![0; length as usize];
    put(&mut bytes, 0, &MAGIC);
    put(&mut bytes, 4, &version.to_be_bytes());
    put(&mut bytes, 20, &layout.cluster_bits.to_be_bytes());
    put(&mut bytes, 24, &size.to_be_bytes());
    let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
    put(&mut bytes, 36, &narrow(layout.l1_entries));
    put(&mut bytes, 40, &layout.l1().to_be_bytes());
    put(&mut bytes, 48, &layout.table().to_be_bytes());
    put(&mut bytes, 56, &narrow(layout.table_clusters));
    if create.version == Version::V3 {
        let compatible = if create.lazy_refcounts { LAZY_REFCOUNTS } else { 0 };
        put(&mut bytes, 80, &compatible.to_be_bytes());
        put(&mut bytes, 96, &REFCOUNT_ORDER.to_be_bytes());
        put(&mut bytes, 100, &V3_LENGTH.to_be_bytes());
    }
    if let Some(backing) = &create.backing {
        let format = backing.format.as_ref().ok_or("the backing file's format must be named")?;
        bytes.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
        bytes.extend(narrow(format.len() as u64));
        bytes.extend(format.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    // The end of the extensions.
    bytes.extend([0; 8]);
    if let Some(backing) = &create.backing {
        let name = backing.name.as_bytes();
        if name.is_empty() || name.len() > MAX_BACKING_NAME {
            return Err(format!("the backing file's name has more than {MAX_BACKING_NAME} bytes"));
        }
        let offset = bytes.len() as u64;
        put(&mut bytes, 8, &offset.to_be_bytes());
        put(&mut bytes, 16, &narrow(name.len() as u64));
        bytes.extend(name);
    }
    if bytes.len() as u64 > create.cluster_size {
        return Err("the backing file's name does not fit; choose larger clusters".to_owned());
    }
    Ok(bytes)
}
