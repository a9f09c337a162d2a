//! A FAT file system of a few files, as bytes: what a guest finds on a seed disk.
//!
//! FAT12 or FAT16 by the number of clusters, one sector a cluster, all files in the root folder
//! with long names (Microsoft, "FAT: General Overview of On-Disk Format" 1.03; long names: the
//! "Long File Name Specification" in it). The same files always give the same bytes.

/// Bytes of a sector, and of a cluster.
const SECTOR: usize = 512;
/// Entries of the root folder, 32 bytes each: room for some tens of files with long names.
const ROOT_ENTRIES: usize = 512;
/// Sectors of the root folder.
const ROOT_SECTORS: usize = ROOT_ENTRIES * ENTRY / SECTOR;
const ENTRY: usize = 32;
/// The copies of the table that every FAT file system has.
const TABLES: usize = 2;
/// Below this many clusters a file system is FAT12, by definition; from here on FAT16.
const FAT16_CLUSTERS: usize = 4085;
/// A FAT16 file system ends below this many clusters.
const MOST_CLUSTERS: usize = 65_525;
/// The smallest that drivers are used to see: a floppy disk's 1.44 MB.
const LEAST_CLUSTERS: usize = 2_847;
/// UTF-16 units of a name in one entry of a long name.
const UNITS: usize = 13;
/// Ends a chain of clusters.
const END: u16 = 0xffff;

/// What does not fit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FatError {
    /// The files are larger than a FAT16 file system of this kind.
    #[error("{0} bytes do not fit a seed disk; give less than 32 MB")]
    Size(usize),
    /// There are too many files.
    #[error("{0} files do not fit the root folder of a seed disk")]
    Files(usize),
}

/// A file system with this label, of at most eleven ASCII characters, and these files. Names are
/// ASCII, and differ in more than case.
pub(crate) fn build(label: &str, files: &[(&str, &[u8])]) -> Result<Vec<u8>, FatError> {
    let size = files.iter().map(|(_, content)| content.len()).sum();
    let used: usize = files.iter().map(|(_, content)| content.len().div_ceil(SECTOR)).sum();
    let clusters = used.max(LEAST_CLUSTERS);
    if clusters >= MOST_CLUSTERS {
        return Err(FatError::Size(size));
    }
    let shape = Shape::of(clusters);
    let (mut table, mut folder, mut data) = (Table::new(&shape), vec![label_entry(label)], vec![]);
    for (index, (name, content)) in files.iter().enumerate() {
        let first = table.chain(content.len().div_ceil(SECTOR));
        entries(&mut folder, name, index, first, content.len());
        data.extend_from_slice(content);
        data.resize(data.len().next_multiple_of(SECTOR), 0);
    }
    if folder.len() > ROOT_ENTRIES {
        return Err(FatError::Files(files.len()));
    }
    let mut bytes = shape.boot_sector(label);
    for _ in 0..TABLES {
        bytes.extend_from_slice(&table.bytes);
    }
    let root = bytes.len();
    bytes.extend(folder.concat());
    bytes.resize(root + ROOT_SECTORS * SECTOR, 0);
    bytes.extend(data);
    bytes.resize(shape.sectors() * SECTOR, 0);
    Ok(bytes)
}

/// How large the parts are.
struct Shape {
    clusters: usize,
    fat16: bool,
    table_sectors: usize,
}

impl Shape {
    fn of(clusters: usize) -> Self {
        let fat16 = clusters >= FAT16_CLUSTERS;
        // The first two entries stand for no cluster.
        let bits = (clusters + 2) * if fat16 { 16 } else { 12 };
        Self { clusters, fat16, table_sectors: bits.div_ceil(8).div_ceil(SECTOR) }
    }

    fn sectors(&self) -> usize {
        1 + TABLES * self.table_sectors + ROOT_SECTORS + self.clusters
    }

    /// The first sector: the BIOS parameter block with its extension.
    fn boot_sector(&self, label: &str) -> Vec<u8> {
        let mut sector = vec![0; SECTOR];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = sector.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        let sectors = self.sectors() as u32;
        put(0, &[0xeb, 0x3c, 0x90]);
        put(3, b"BIVISOR ");
        put(11, &(SECTOR as u16).to_le_bytes());
        put(13, &[1]); // sectors of a cluster
        put(14, &1u16.to_le_bytes()); // sectors before the tables
        put(16, &[TABLES as u8]);
        put(17, &(ROOT_ENTRIES as u16).to_le_bytes());
        // The number of sectors is here if it has 16 bits, or else at 32.
        put(19, &u16::try_from(sectors).unwrap_or(0).to_le_bytes());
        put(21, &[0xf8]); // a fixed disk
        put(22, &(self.table_sectors as u16).to_le_bytes());
        put(24, &32u16.to_le_bytes()); // sectors of a track
        put(26, &64u16.to_le_bytes()); // heads
        put(32, &if sectors > u32::from(u16::MAX) { sectors } else { 0 }.to_le_bytes());
        put(36, &[0x80, 0, 0x29]); // drive, reserved, "what follows is there"
        put(39, b"BVSD"); // the volume's number
        put(43, &padded(label));
        put(54, if self.fat16 { b"FAT16   " } else { b"FAT12   " });
        put(510, &[0x55, 0xaa]);
        sector
    }
}

/// The file allocation table: for each cluster the next of its file.
struct Table {
    bytes: Vec<u8>,
    fat16: bool,
    next: u16,
}

impl Table {
    fn new(shape: &Shape) -> Self {
        let bytes = vec![0; shape.table_sectors * SECTOR];
        let mut table = Self { bytes, fat16: shape.fat16, next: 2 };
        table.set(0, 0xfff8);
        table.set(1, END);
        table
    }

    /// Takes the next `count` clusters as one file's, and says which is its first: none (0) for
    /// an empty file.
    fn chain(&mut self, count: usize) -> u16 {
        let first = self.next;
        for left in (0..count).rev() {
            let after = if left == 0 { END } else { self.next + 1 };
            self.set(self.next, after);
            self.next += 1;
        }
        if count == 0 { 0 } else { first }
    }

    fn set(&mut self, cluster: u16, value: u16) {
        let cluster = usize::from(cluster);
        if self.fat16 {
            self.merge(2 * cluster, value, u16::MAX);
        } else if cluster % 2 == 0 {
            self.merge(cluster * 3 / 2, value & 0x0fff, 0x0fff);
        } else {
            self.merge(cluster * 3 / 2, value << 4, 0xfff0);
        }
    }

    fn merge(&mut self, at: usize, value: u16, mask: u16) {
        if let Some([low, high]) = self.bytes.get_mut(at..at + 2) {
            let old = u16::from_le_bytes([*low, *high]);
            [*low, *high] = (old & !mask | value).to_le_bytes();
        }
    }
}

/// A name of eleven bytes, filled with spaces.
fn padded(name: &str) -> [u8; 11] {
    let mut bytes = [b' '; 11];
    bytes.iter_mut().zip(name.bytes()).for_each(|(place, byte)| *place = byte);
    bytes
}

fn label_entry(label: &str) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    entry[..11].copy_from_slice(&padded(label));
    entry[11] = 0x08;
    entry
}

/// The entries of one file: its long name, last part first, and its short name with the rest.
fn entries(folder: &mut Vec<[u8; ENTRY]>, name: &str, index: usize, first: u16, size: usize) {
    let short = padded(&format!("FILE{index:04}"));
    let sum = short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let units: Vec<u16> = name.encode_utf16().collect();
    let parts = units.len().div_ceil(UNITS);
    for (number, part) in units.chunks(UNITS).enumerate().rev() {
        let last = if number + 1 == parts { 0x40 } else { 0 };
        folder.push(long_entry(part, (number + 1) as u8 | last, sum));
    }
    let mut entry = [0; ENTRY];
    entry[..11].copy_from_slice(&short);
    entry[26..28].copy_from_slice(&first.to_le_bytes());
    entry[28..].copy_from_slice(&(size as u32).to_le_bytes());
    folder.push(entry);
}

/// One part of a long name. Its units lie in three places; the name ends with a zero, and what
/// is behind that is all ones.
fn long_entry(part: &[u16], order: u8, sum: u8) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    entry[0] = order;
    entry[11] = 0x0f;
    entry[13] = sum;
    let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
    let filled = part.iter().copied().chain([0]).chain(std::iter::repeat(0xffff));
    for (place, unit) in places.zip(filled) {
        entry[place..place + 2].copy_from_slice(&unit.to_le_bytes());
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a file system back, by the specification and not by the code above.
    fn read(disk: &[u8]) -> (String, Vec<(String, Vec<u8>)>) {
        let word = |at: usize| usize::from(u16::from_le_bytes([disk[at], disk[at + 1]]));
        assert_eq!((word(11), disk[13], word(510)), (512, 1, 0xaa55));
        let total = if word(19) != 0 { word(19) } else { word(32) | word(34) << 16 };
        assert_eq!(total * 512, disk.len());
        let (tables, root_entries, table_sectors) = (usize::from(disk[16]), word(17), word(22));
        let root = (word(14) + tables * table_sectors) * 512;
        let data = root + root_entries * 32;
        let fat16 = (disk.len() - data) / 512 >= 4085;
        assert_eq!(&disk[54..59], if fat16 { b"FAT16" } else { b"FAT12" });
        let table = &disk[512..];
        let next = |cluster: usize| match (fat16, cluster % 2) {
            (true, _) => word(512 + 2 * cluster),
            (false, 0) => {
                usize::from(table[cluster * 3 / 2])
                    | usize::from(table[cluster * 3 / 2 + 1] & 15) << 8
            }
            (false, _) => {
                usize::from(table[cluster * 3 / 2] >> 4)
                    | usize::from(table[cluster * 3 / 2 + 1]) << 4
            }
        };
        let end = if fat16 { 0xfff8 } else { 0xff8 };
        let (mut label, mut name, mut files) = (String::new(), Vec::new(), Vec::new());
        for entry in disk[root..data].chunks(32).take_while(|entry| entry[0] != 0) {
            match entry[11] {
                0x08 => label = String::from_utf8(entry[..11].to_vec()).unwrap(),
                0x0f => {
                    let text = [&entry[1..11], &entry[14..26], &entry[28..32]].concat();
                    let units = text.chunks(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
                    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
                    name.splice(0..0, units.into_iter().filter(|unit| *unit != 0xffff));
                }
                _ => {
                    let size = u32::from_le_bytes(entry[28..32].try_into().unwrap()) as usize;
                    let mut cluster = usize::from(u16::from_le_bytes([entry[26], entry[27]]));
                    let mut content = Vec::new();
                    while cluster != 0 && cluster < end {
                        let at = data + (cluster - 2) * 512;
                        content.extend_from_slice(&disk[at..at + 512]);
                        cluster = next(cluster);
                    }
                    assert_eq!(content.len(), size.next_multiple_of(512));
                    content.truncate(size);
                    files.push((String::from_utf16(&std::mem::take(&mut name)).unwrap(), content));
                }
            }
        }
        (label.trim_end().to_owned(), files)
    }

    #[test]
    fn files_read_back_with_their_long_names() {
        let long = vec![7; 3 * 512 + 1];
        let files: [(&str, &[u8]); 4] = [
            ("meta-data", b"instance-id: x\n"),
            ("empty", b""),
            ("a-name-of-exactly-26-letter", &long),
            ("thirteenchars", &[1; 512]),
        ];
        let disk = build("cidata", &files).unwrap();
        let (label, back) = read(&disk);
        assert_eq!(label, "cidata");
        let back: Vec<(&str, &[u8])> = back.iter().map(|(n, c)| (n.as_str(), &c[..])).collect();
        assert_eq!(back, files);
    }

    #[test]
    fn many_bytes_make_a_fat16_file_system_and_too_many_are_refused() {
        let large: Vec<u8> = (0..5_000_000u32).map(|n| n as u8).collect();
        let (_, files) = read(&build("cidata", &[("user-data", &large)]).unwrap());
        assert_eq!(files[0].1, large);
        let most = vec![0; 65_524 * 512];
        let disk = build("cidata", &[("user-data", &most)]).unwrap();
        assert_eq!(read(&disk).1[0].1.len(), most.len());
        let more = vec![0; 65_524 * 512 + 1];
        assert_eq!(build("x", &[("user-data", &more)]), Err(FatError::Size(more.len())));
        let many: Vec<_> = (0..300).map(|_| ("name", &b""[..])).collect();
        assert_eq!(build("x", &many), Err(FatError::Files(300)));
    }
}
