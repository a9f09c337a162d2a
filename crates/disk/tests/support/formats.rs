//! What the tests of all formats do alike: comparisons with QEMU's tools, mutated images.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use crate::recording::Memory;
use crate::support::{self, Random};
use disk::{Disk, DiskError, FileOptions, ImageFile};
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// Opens an image's file.
pub fn file(path: &Path, options: FileOptions) -> ImageFile {
    ImageFile::open(path, options).unwrap()
}

/// All bytes of a disk, read in pieces of odd sizes.
pub fn read_all(disk: &dyn Disk) -> Vec<u8> {
    let mut content = vec![0xee; disk.size() as usize];
    let mut random = Random(disk.size());
    let mut at = 0;
    while at < content.len() {
        let end = (at + 1 + random.below(3_000_000) as usize).min(content.len());
        disk.read_at(at as u64, &mut content[at..end]).unwrap();
        at = end;
    }
    content
}

/// Has QEMU write to an image at random places, in the order of a seed.
pub fn have_qemu_write(path: &Path, format: &str, size: u64, count: u64, seed: u64) {
    let mut random = Random(seed);
    let mut arguments = vec!["-f".to_owned(), format.to_owned()];
    for _ in 0..count {
        let offset = random.below(size / 512) * 512;
        let length = (512 + random.below(400) * 512).min(size - offset);
        arguments.push("-c".to_owned());
        arguments.push(format!("write -P {} {offset} {length}", 1 + random.below(255)));
    }
    arguments.push(path.display().to_string());
    support::qemu("qemu-io", &arguments);
}

/// What QEMU reads from an image.
pub fn as_qemu_reads(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("read-by-qemu");
    let _ = fs::remove_file(&raw);
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    support::qemu("qemu-img", ["convert", "-f", format, "-O", "raw", from, to]);
    fs::read(raw).unwrap()
}

/// Asks QEMU whether an image is in order.
pub fn check_with_qemu(path: &Path, format: &str) {
    let printed = support::qemu("qemu-img", ["check", "-f", format, path.to_str().unwrap()]);
    assert!(printed.contains("No errors were found"), "{printed}");
}

/// The size of the disk in an image as QEMU says it.
pub fn size_in_qemu(path: &Path, format: &str) -> u64 {
    let path = path.to_str().unwrap();
    let printed = support::qemu("qemu-img", ["info", "--output=json", "-f", format, path]);
    let (_, value) = printed.split_once("\"virtual-size\":").unwrap();
    value.split([',', '\n']).next().unwrap().trim().parse().unwrap()
}

/// Makes random requests of a disk and of a model, of which it must not differ.
pub fn use_at_random(disk: &dyn Disk, model: &mut [u8], count: usize, seed: u64) {
    let mut random = Random(seed);
    let size = disk.size();
    assert_eq!(size, model.len() as u64);
    for _ in 0..count {
        let unit = if random.below(3) == 0 { 1 } else { 512 };
        let offset = random.below(size / unit) * unit;
        let longest = if random.below(6) == 0 { 5_000_000 } else { 100_000 };
        let length = ((1 + random.below(longest / unit)) * unit).min(size - offset);
        let range = offset as usize..(offset + length) as usize;
        match random.below(10) {
            0..4 => {
                let mut data = vec![0; length as usize];
                random.fill(&mut data);
                disk.write_at(offset, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
            4..7 => {
                let mut data = vec![0xee; length as usize];
                disk.read_at(offset, &mut data).unwrap();
                assert!(data == model[range], "{length} bytes at {offset} read otherwise");
            }
            7 => {
                disk.write_zeroes(offset, length).unwrap();
                model[range].fill(0);
            }
            8 => {
                disk.discard(offset, length).unwrap();
                let mut data = vec![0; length as usize];
                disk.read_at(offset, &mut data).unwrap();
                for (now, before) in data.iter().zip(&mut model[range]) {
                    assert!(*now == *before || *now == 0, "a discard gave other content");
                    *before = *now;
                }
            }
            _ => disk.flush().unwrap(),
        }
    }
    check_extents(disk, model);
}

/// Sees to it that what a disk calls zeroes are zeroes, and that all of it is accounted for.
pub fn check_extents(disk: &dyn Disk, model: &[u8]) {
    let mut at = 0;
    while at < disk.size() {
        let extent = disk.extent(at, disk.size() - at).unwrap();
        assert!(extent.length >= 1 && extent.length <= disk.size() - at);
        if extent.kind == disk::ExtentKind::Zero {
            let range = at as usize..(at + extent.length) as usize;
            assert!(model[range].iter().all(|byte| *byte == 0), "data is called zeroes at {at}");
        }
        at += extent.length;
    }
}

/// Compares an image with a model through QEMU, to the size.
pub fn compare_with_qemu(path: &Path, format: &str, model: &[u8]) {
    assert_eq!(size_in_qemu(path, format), model.len() as u64);
    let raw = path.with_extension("model");
    fs::write(&raw, model).unwrap();
    let (image, raw) = (path.to_str().unwrap(), raw.to_str().unwrap());
    support::qemu("qemu-img", ["compare", "-f", format, "-F", "raw", image, raw]);
}

/// Opens mutations of an image and uses what opens. A panic, a hang, or an allocation that
/// memory does not have is what must not be.
pub fn survives_mutation(
    image: &[u8],
    places: &[std::ops::Range<usize>],
    open: &dyn Fn(Arc<Memory>) -> Result<Box<dyn Disk>, DiskError>,
    count: usize,
    seed: u64,
) {
    let mut random = Random(seed);
    let mut opened = 0;
    for _ in 0..count {
        let mut bytes = image.to_vec();
        for _ in 0..1 + random.below(3) {
            mutate(&mut bytes, places, &mut random);
        }
        let read_only = random.below(3) == 0;
        let memory = if read_only { Memory::read_only(bytes) } else { Memory::of(bytes) };
        if let Ok(disk) = open(memory) {
            opened += 1;
            use_briefly(&*disk, &mut random);
        }
    }
    assert!(opened * 20 > count, "only {opened} of {count} mutations were opened");
}

fn mutate(bytes: &mut Vec<u8>, places: &[std::ops::Range<usize>], random: &mut Random) {
    let place = &places[random.below(places.len() as u64) as usize];
    let at = place.start + random.below(place.len() as u64) as usize;
    let values = [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff_ffff, 0xffff_ffff, u64::MAX, 1 << 63];
    let value = match random.below(3) {
        0 => random.next(),
        1 => values[random.below(values.len() as u64) as usize],
        _ => random.next() >> (24 + random.below(40)),
    };
    let width = 1 << random.below(4);
    let field = value.to_le_bytes();
    let aligned = at / width * width;
    for (index, byte) in field[..width].iter().enumerate() {
        if let Some(target) = bytes.get_mut(aligned + index) {
            *target = *byte;
        }
    }
    if random.below(40) == 0 {
        let length = random.below(bytes.len() as u64) as usize;
        bytes.truncate(length);
    }
}

fn use_briefly(disk: &dyn Disk, random: &mut Random) {
    let size = disk.size();
    let mut buffer = vec![0; 70_000];
    for round in 0..6 {
        let offset = match round {
            0 => 0,
            1 => size.saturating_sub(512),
            _ => random.below(size),
        };
        let length = (buffer.len() as u64).min(size - offset) as usize;
        let _ = disk.read_at(offset, &mut buffer[..length]);
        let _ = disk.extent(offset, size - offset);
        let _ = match round {
            0 | 3 => disk.write_at(offset, &buffer[..length]),
            1 => disk.write_zeroes(offset, length as u64),
            4 => disk.discard(offset, length as u64),
            _ => disk.flush(),
        };
    }
}
