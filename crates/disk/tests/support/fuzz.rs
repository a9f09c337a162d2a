//! Mutated images, and what is done with them: shared by the test and the example that fuzzes for
//! longer.
#![allow(clippy::unwrap_used, reason = "a panic is what a fuzzer looks for")]

use super::random::Random;
use disk::format::{self, OpenOptions};
use disk::qcow2::{CreateOptions, Qcow2, Repair, Version};
use disk::{Disk, FileOptions, Format, manage};
use std::fs;
use std::path::Path;

/// Values that numbers in headers are replaced by, besides random ones.
const INTERESTING: [u64; 12] = [
    0,
    1,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 16,
    1 << 40,
    1 << 62,
    1 << 63,
    u64::MAX,
    0x8000_0000_0001_0000,
    0x4000_0000_0000_0000,
    0x00ff_ffff_ffff_fe00,
];

/// What a guest has written.
const DATA: u8 = 0xda;

/// An image that begins a fuzzing campaign.
struct Seed {
    format: Format,
    bytes: Vec<u8>,
    /// Where its metadata is: mutations elsewhere are only seen by the guest.
    metadata: Vec<(usize, usize)>,
}

/// Images that are mutated.
pub struct Corpus(Vec<Seed>);

impl Corpus {
    /// Images of Bivisor's own.
    pub fn new(folder: &Path) -> Self {
        let mut seeds = Vec::new();
        let versions = [(Version::V2, 512), (Version::V3, 4096), (Version::V3, 65536)];
        for (version, cluster_size) in versions {
            let path = folder.join("seed.qcow2");
            let options = CreateOptions { cluster_size, version, ..CreateOptions::new(1 << 20) };
            Qcow2::create(&path, &options, FileOptions::write()).unwrap();
            let disk = format::open(&path, Some(Format::Qcow2), OpenOptions::write()).unwrap();
            for index in 0..4 {
                disk.write_at(index * 200_000, &[DATA; 30_000]).unwrap();
            }
            disk.discard(0, 8192).unwrap();
            drop(disk);
            seeds.push(Seed::read(&path, Format::Qcow2));
            fs::remove_file(path).unwrap();
        }
        for format in [Format::Vmdk, Format::Vdi, Format::Vhd, Format::Vhdx] {
            let path = folder.join("seed");
            let disk = format::create(&path, format, 9 << 20).unwrap();
            disk.write_at(0, &[DATA; 30_000]).unwrap();
            disk.write_at(8 << 20, &[DATA; 30_000]).unwrap();
            drop(disk);
            seeds.push(Seed::read(&path, format));
            fs::remove_file(path).unwrap();
        }
        Self(seeds)
    }

    /// With images that `qemu_img` makes, which have what Bivisor does not make.
    pub fn with_qemu(folder: &Path, qemu_img: &dyn Fn(&[&str])) -> Self {
        let mut corpus = Self::new(folder);
        let raw = folder.join("seed.raw");
        let text: Vec<u8> = (0..1 << 20).map(|index: u32| (index / 999) as u8).collect();
        fs::write(&raw, text).unwrap();
        let (raw, path) = (raw.to_str().unwrap(), folder.join("seed.qcow2"));
        let name = path.to_str().unwrap();
        for compression in ["zlib", "zstd"] {
            let options = format!("cluster_size=4k,compression_type={compression}");
            let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, raw, name];
            qemu_img(&convert);
            qemu_img(&["snapshot", "-c", "one", name]);
            qemu_img(&["bitmap", "--add", "--enable", name, "b"]);
            corpus.0.push(Seed::read(&path, Format::Qcow2));
        }
        corpus
    }

    /// The mutant of a number.
    pub fn mutant(&self, number: u64) -> (Format, Vec<u8>) {
        let mut random = Random(number);
        let seed = &self.0[random.below(self.0.len() as u64) as usize];
        let mut bytes = seed.bytes.clone();
        for _ in 0..=random.below(4) {
            let (start, end) = match random.below(3) {
                0 => (0, 120),
                1 => seed.metadata[random.below(seed.metadata.len() as u64) as usize],
                _ => (0, bytes.len()),
            };
            let at = start + random.below((end - start) as u64) as usize;
            let width = [1, 2, 4, 8][random.below(4) as usize];
            let at = (at - at % width).min(bytes.len() - width);
            let value = match random.below(3) {
                0 => random.next(),
                1 => INTERESTING[random.below(INTERESTING.len() as u64) as usize],
                // A place in the file that is something else.
                _ => random.below(bytes.len() as u64) & !511 | random.below(2) << 63,
            };
            if seed.format == Format::Qcow2 || random.below(4) == 0 {
                bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
            } else {
                bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
        }
        if random.below(10) == 0 {
            bytes.truncate(random.below(bytes.len() as u64) as usize);
        }
        (seed.format, bytes)
    }
}

impl Seed {
    fn read(path: &Path, format: Format) -> Self {
        let bytes = fs::read(path).unwrap();
        // What is neither empty nor the guest's.
        let sectors = bytes.chunks(512).enumerate();
        let metadata =
            sectors.filter(|(_, sector)| sector.iter().any(|byte| ![0, DATA].contains(byte)));
        let metadata = metadata.map(|(index, sector)| (index * 512, index * 512 + sector.len()));
        Self { format, metadata: metadata.collect(), bytes }
    }
}

/// Writes an image down and does to it whatever a user or a guest can do. Errors are expected.
/// Whether it could be opened.
pub fn exercise((format, bytes): &(Format, Vec<u8>), folder: &Path, seed: u64) -> bool {
    let path = folder.join("mutant");
    fs::write(&path, bytes).unwrap();
    let mut random = Random(seed);
    let _ = manage::info(&path, Some(*format));
    let _ = manage::check(&path, Some(*format), Repair::Nothing);
    let opened = format::open(&path, Some(*format), OpenOptions::read());
    if let Ok(disk) = &opened {
        operate(&**disk, &mut random);
    }
    let opens = opened.is_ok();
    drop(opened);
    if let Ok(disk) = format::open(&path, Some(*format), OpenOptions::write()) {
        operate(&*disk, &mut random);
    }
    let _ = manage::check(&path, Some(*format), Repair::Everything);
    if let Ok(disk) = format::open(&path, Some(*format), OpenOptions::write()) {
        operate(&*disk, &mut random);
    }
    opens
}

fn operate(disk: &dyn Disk, random: &mut Random) {
    let mut buffer = vec![0; 70_000];
    // What a mutation made of the size is often far more than there is.
    let size = disk.size().min(2 << 20);
    for _ in 0..30 {
        let offset = random.below(size.saturating_sub(buffer.len() as u64) + 1);
        let length = random.below(buffer.len() as u64).min(size);
        let part = &mut buffer[..length as usize];
        let _ = match random.below(6) {
            0 | 1 => disk.read_at(offset, part),
            2 => disk.write_at(offset, part),
            3 => disk.discard(offset, length),
            4 => disk.write_zeroes(offset, length),
            _ => disk.extent(offset, length.max(1)).and_then(|_| disk.flush()),
        };
    }
    let end = disk.size().saturating_sub(512);
    let _ = disk.read_at(end, &mut [0; 512]);
    let _ = disk.write_at(end, &[1; 512]);
}
