//! The descriptor of a VMDK image: text that names the image's kind and its extents.
//!
//! "Virtual Disk Format 5.0" (VMware, 2011), "The Descriptor File".
use crate::DiskError;
use crate::store::{Complain, Store};

/// Bytes of the longest descriptor that is read.
pub(super) const MAX_LENGTH: u64 = 1 << 20;
/// Extents that an image may have: 8 TiB in pieces of 2 GiB.
const MAX_EXTENTS: usize = 4096;
/// Sectors of the largest disk, 64 TiB.
const MAX_SECTORS: u64 = (64 << 40) / 512;
/// The parent of an image that has none.
const NO_PARENT: &str = "ffffffff";

/// What an image is, from its `createType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// One file with the descriptor in it, which grows.
    MonolithicSparse,
    /// A descriptor and a file that is the disk.
    MonolithicFlat,
    /// A descriptor and files of at most 2 GiB, which grow.
    SplitSparse,
    /// A descriptor and files of at most 2 GiB, which are the disk.
    SplitFlat,
    /// One file, compressed, which is only read once it is there.
    StreamOptimized,
    /// As [`Variant::MonolithicFlat`], by ESX.
    Vmfs,
}

impl Variant {
    const ALL: [Self; 6] = [
        Self::MonolithicSparse,
        Self::MonolithicFlat,
        Self::SplitSparse,
        Self::SplitFlat,
        Self::StreamOptimized,
        Self::Vmfs,
    ];

    /// Its name in descriptors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::SplitSparse => "twoGbMaxExtentSparse",
            Self::SplitFlat => "twoGbMaxExtentFlat",
            Self::StreamOptimized => "streamOptimized",
            Self::Vmfs => "vmfs",
        }
    }
}

/// How an extent keeps its part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ExtentKind {
    /// As it is, in a file from a byte on.
    Flat { file: String, offset: u64 },
    /// In grains.
    Sparse { file: String },
    /// Nowhere: it reads as zeroes.
    Zero,
}

/// A part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub sectors: u64,
    pub writable: bool,
    pub kind: ExtentKind,
}

/// What a descriptor says.
#[derive(Clone, Debug)]
pub(super) struct Descriptor {
    pub variant: Variant,
    pub extents: Vec<ExtentLine>,
    /// Where the digits of the content identifier are in the text, and how many there are.
    pub content_id: Option<(u64, usize)>,
}

impl Descriptor {
    /// Parses the text of `store`'s image.
    pub(super) fn parse(text: &[u8], store: &dyn Store) -> Result<Self, DiskError> {
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let (mut variant, mut extents, mut content_id) = (None, Vec::new(), None);
        let mut at = 0;
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let start = at;
            at += line.len() as u64;
            let line = String::from_utf8_lossy(line);
            let line = line.trim();
            if let Some(extent) = extent(line, store)? {
                extents.push(extent);
                if extents.len() > MAX_EXTENTS {
                    return Err(store.unsupported(format!("more than {MAX_EXTENTS} extents")));
                }
                continue;
            }
            let Some((key, value)) = line.split_once('=') else { continue };
            let value = value.trim().trim_matches('"');
            match key.trim() {
                "CID" if line.starts_with("CID=") && is_hexadecimal(value) => {
                    content_id = Some((start + 4, value.len()));
                }
                "parentCID" if !value.eq_ignore_ascii_case(NO_PARENT) => {
                    let feature = format!("a delta disk of VMDK, whose parent is {value:?}");
                    return Err(store.unsupported(feature));
                }
                "createType" => {
                    let known = Variant::ALL.into_iter().find(|kind| kind.name() == value);
                    let unknown = || store.unsupported(format!("the kind {value:?} of VMDK"));
                    variant = Some(known.ok_or_else(unknown)?);
                }
                _ => {}
            }
        }
        let Some(variant) = variant else {
            return Err(store.damaged("its descriptor does not name a createType".to_owned()));
        };
        let sectors = extents.iter().try_fold(0_u64, |sum, extent| sum.checked_add(extent.sectors));
        if extents.is_empty() || sectors.is_none_or(|sectors| sectors > MAX_SECTORS) {
            return Err(store.damaged("its extents are none, or too large".to_owned()));
        }
        Ok(Self { variant, extents, content_id })
    }
}

fn is_hexadecimal(value: &str) -> bool {
    (1..=8).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Parses a line as `RW 4192256 SPARSE "disk-s001.vmdk" 0`; `None` where it is another kind of
/// line.
fn extent(line: &str, store: &dyn Store) -> Result<Option<ExtentLine>, DiskError> {
    let mut words = line.splitn(4, ' ').filter(|word| !word.is_empty());
    let writable = match words.next() {
        Some("RW") => true,
        Some("RDONLY") => false,
        Some("NOACCESS") => {
            return Err(store.unsupported("an extent without access".to_owned()));
        }
        _ => return Ok(None),
    };
    let bad = || store.damaged(format!("it has the extent {line:?}"));
    let sectors: u64 = words.next().and_then(|word| word.parse().ok()).ok_or_else(bad)?;
    let kind = words.next().ok_or_else(bad)?;
    let mut quoted = words.next().unwrap_or_default().trim().splitn(3, '"');
    let (before, file, after) = (quoted.next(), quoted.next(), quoted.next());
    let file = || match (before, file, after) {
        (Some(""), Some(file), Some(_)) if !file.is_empty() => Ok(file.to_owned()),
        _ => Err(bad()),
    };
    let kind = match kind {
        "FLAT" | "VMFS" => {
            let offset = match after.unwrap_or_default().trim() {
                "" => 0,
                offset => offset.parse::<u64>().map_err(|_| bad())?,
            };
            let offset = offset.checked_mul(512).ok_or_else(bad)?;
            ExtentKind::Flat { file: file()?, offset }
        }
        "SPARSE" => ExtentKind::Sparse { file: file()? },
        "ZERO" => ExtentKind::Zero,
        other => return Err(store.unsupported(format!("extents of the kind {other}"))),
    };
    Ok(Some(ExtentLine { sectors, writable, kind }))
}

/// The text of a new image's descriptor.
pub(super) fn new_text(variant: Variant, sectors: u64, file: &str, content_id: u32) -> String {
    // The name is for readers only: what it stands in is the file.
    let file: String =
        file.chars().filter(|letter| *letter != '"' && !letter.is_control()).collect();
    let (heads, per_track) = (255, 63);
    let cylinders = (sectors / (heads * per_track)).clamp(1, 65535);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={content_id:08x}\nparentCID={NO_PARENT}\n\
         createType=\"{variant}\"\n\n# Extent description\nRW {sectors} SPARSE \"{file}\"\n\n\
         # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{per_track}\"\nddb.adapterType = \"lsilogic\"\n",
        variant = variant.name(),
    )
}
