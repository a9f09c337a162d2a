//! Mutated images of VMDK, VDI, VHD and VHDX, and what is done with them: shared by the tests and
//! the example that fuzzes for longer.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use crate::recording::Memory;
use crate::support::Random;
use disk::vdi::{self, Vdi};
use disk::vhd::{self, Vhd};
use disk::vhdx::{self, Vhdx};
use disk::vmdk::{Vmdk, write_stream};
use disk::{Disk, DiskError, Store};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const KIB: usize = 1 << 10;

/// Opens an image.
type Open = fn(Arc<Memory>) -> Result<Box<dyn Disk>, DiskError>;

/// An image, and where in it mutations matter.
pub struct Subject {
    pub name: &'static str,
    bytes: Vec<u8>,
    places: Vec<Range<usize>>,
    open: Open,
    /// Makes checksums fit, so that mutations get past them.
    seal: fn(&mut [u8]),
}

/// One subject for each kind of image.
pub fn subjects() -> Vec<Subject> {
    vec![
        vdi_subject(),
        vhd_subject(vhd::Variant::Dynamic),
        vhd_subject(vhd::Variant::Fixed),
        vhdx_subject(),
        sparse_subject(),
        stream_subject(),
        text_subject(),
    ]
}

fn data() -> Vec<u8> {
    Random(4).bytes(100_000)
}

pub fn vdi_subject() -> Subject {
    let memory = Memory::of(Vec::new());
    let disk = Vdi::create_in(Arc::clone(&memory), 6 * MIB, vdi::Variant::Dynamic).unwrap();
    disk.write_at(MIB * 2 - 100, &data()).unwrap();
    drop(disk);
    Subject {
        name: "vdi",
        bytes: memory.bytes(),
        places: vec![0x40..0x60, 0x150..0x200, 0x200..0x218],
        open: |memory| Ok(Box::new(Vdi::open(memory)?)),
        seal: |_| {},
    }
}

pub fn vhd_subject(variant: vhd::Variant) -> Subject {
    let memory = Memory::of(Vec::new());
    let disk = Vhd::create_in(Arc::clone(&memory), 9 * MIB, variant).unwrap();
    disk.write_at(2 * MIB - 100, &data()).unwrap();
    drop(disk);
    let bytes = memory.bytes();
    let end = bytes.len() - 512;
    let dynamic = variant == vhd::Variant::Dynamic;
    let front = [8..64, 68..80, 512 + 16..512 + 40, 1536..1556, 3584..4096];
    let tail = [end + 8..end + 64, end + 68..end + 80];
    Subject {
        name: "vhd",
        bytes,
        places: if dynamic { [&front[..], &tail].concat() } else { tail.to_vec() },
        open: |memory| Ok(Box::new(Vhd::open(memory)?)),
        seal: |bytes| {
            let end = bytes.len().saturating_sub(512);
            for at in [0, end] {
                if let Some(footer) = bytes.get_mut(at..at + 512)
                    && footer.starts_with(b"conectix")
                {
                    seal_vhd(footer, 64);
                }
            }
            if let Some(header) = bytes.get_mut(512..1536)
                && header.starts_with(b"cxsparse")
            {
                seal_vhd(header, 36);
            }
        },
    }
}

/// Makes the checksum of a VHD structure fit.
pub fn seal_vhd(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// A VHDX image that was not closed, so that its log counts.
pub fn vhdx_subject() -> Subject {
    let memory = Memory::of(Vec::new());
    let create = vhdx::CreateOptions::default();
    let disk = Vhdx::create_in(Arc::clone(&memory), 5 * MIB, create).unwrap();
    for at in [0, 2 * MIB + 100, 4 * MIB] {
        disk.write_at(at, &data()).unwrap();
        disk.flush().unwrap();
    }
    let bytes = memory.bytes();
    drop(disk);
    let (log, metadata, table) = (1 << 20, 2 << 20, 3 << 20);
    let items = metadata + 64 * KIB;
    let last = log + 2 * 8192;
    Subject {
        name: "vhdx",
        bytes,
        places: vec![
            64 * KIB + 8..64 * KIB + 80,
            128 * KIB + 8..128 * KIB + 80,
            192 * KIB + 8..192 * KIB + 80,
            log..log + 128,
            last..last + 128,
            last + 4096..last + 4096 + 64,
            metadata + 8..metadata + 200,
            items..items + 40,
            table..table + 64,
        ],
        open: |memory| Ok(Box::new(Vhdx::open(memory)?)),
        seal: |bytes| {
            for (place, length) in [(64, 4), (128, 4), (192, 64), (256, 64)] {
                seal_vhdx(bytes.get_mut(place * KIB..(place + length) * KIB).unwrap_or_default());
            }
            for at in (1 << 20..2 << 20).step_by(4096) {
                let Some(entry) = bytes.get_mut(at..2 << 20) else { break };
                if entry.starts_with(b"loge") {
                    let length = u32::from_le_bytes(entry[8..12].try_into().unwrap()) as usize;
                    seal_vhdx(entry.get_mut(..length).unwrap_or_default());
                }
            }
        },
    }
}

/// Makes the checksum of a VHDX structure fit.
pub fn seal_vhdx(bytes: &mut [u8]) {
    if bytes.len() < 8 {
        return;
    }
    bytes[4..8].fill(0);
    let mut sum = u32::MAX;
    for byte in bytes.iter() {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = if sum & 1 != 0 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 };
        }
    }
    bytes[4..8].copy_from_slice(&(!sum).to_le_bytes());
}

fn open_vmdk(memory: Arc<Memory>) -> Result<Box<dyn Disk>, DiskError> {
    let extent = |_: &str| Ok(Memory::of(vec![1; 100_000]) as Arc<dyn Store>);
    Ok(Box::new(Vmdk::open_with(memory, &extent)?))
}

fn sparse_vmdk() -> (Arc<Memory>, Vmdk) {
    let memory = Memory::of(Vec::new());
    let disk = Vmdk::create_in(Arc::clone(&memory) as Arc<dyn Store>, 5 * MIB).unwrap();
    disk.write_at(2 * MIB - 100, &data()).unwrap();
    disk.write_at(3 * MIB, &[5; 100_000]).unwrap();
    disk.flush().unwrap();
    (memory, disk)
}

pub fn sparse_subject() -> Subject {
    let (memory, disk) = sparse_vmdk();
    drop(disk);
    let bytes = memory.bytes();
    let place =
        |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize * 512;
    let (redundant, directory) = (place(48), place(56));
    let places = vec![
        4..80,
        512..900,
        redundant..redundant + 8,
        directory..directory + 8,
        place(directory) + 120..place(directory) + 136,
    ];
    Subject { name: "vmdk", bytes, places, open: open_vmdk, seal: |_| {} }
}

pub fn stream_subject() -> Subject {
    let (_, disk) = sparse_vmdk();
    let target = Memory::of(Vec::new());
    write_stream(&disk, &*target, &mut |_| ControlFlow::Continue(())).unwrap();
    let bytes = target.bytes();
    let end = bytes.len();
    let places =
        vec![4..80, 512..900, 65536..65560, 66000..70000, end - 6000..end, end - 1024..end - 512];
    Subject { name: "stream-optimised vmdk", bytes, places, open: open_vmdk, seal: |_| {} }
}

pub fn text_subject() -> Subject {
    let bytes = b"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
        createType=\"twoGbMaxExtentFlat\"\n\nRW 100 FLAT \"x\" 0\nRW 8 ZERO\n\
        RW 100 FLAT \"x\" 8\nddb.adapterType = \"ide\"\n"
        .to_vec();
    let places = Vec::from([20..60, 60..bytes.len()]);
    Subject { name: "vmdk descriptor", bytes, places, open: open_vmdk, seal: |_| {} }
}

impl Subject {
    /// Opens the mutant of a number and uses it. A panic, a hang, or an allocation that memory does
    /// not have is what must not be; whether it opened.
    pub fn try_mutant(&self, number: u64) -> bool {
        let mut random = Random(number);
        let mut bytes = self.bytes.clone();
        for _ in 0..1 + random.below(3) {
            mutate(&mut bytes, &self.places, &mut random);
        }
        (self.seal)(&mut bytes);
        let read_only = random.below(3) == 0;
        let memory = if read_only { Memory::read_only(bytes) } else { Memory::of(bytes) };
        let Ok(disk) = (self.open)(Arc::clone(&memory)) else { return false };
        use_briefly(&*disk, &mut random);
        drop(disk);
        // And once more what that has made of it.
        if let Ok(disk) = (self.open)(Memory::read_only(memory.bytes())) {
            use_briefly(&*disk, &mut random);
        }
        true
    }

    /// Tries some mutants, of which enough have to open for this to say something.
    pub fn survives(&self, count: u64) {
        let opened = (0..count).filter(|number| self.try_mutant(*number)).count();
        assert!(opened as u64 * 20 > count, "only {opened} of {count} mutants were opened");
    }
}

fn mutate(bytes: &mut Vec<u8>, places: &[Range<usize>], random: &mut Random) {
    let place = &places[random.below(places.len() as u64) as usize];
    let at = place.start + random.below(place.len() as u64) as usize;
    let values = [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff_ffff, 0xffff_ffff, u64::MAX, 1 << 63];
    let value = match random.below(3) {
        0 => random.next(),
        1 => values[random.below(values.len() as u64) as usize],
        _ => random.next() >> (24 + random.below(40)),
    };
    let width = 1 << random.below(4);
    let field = if random.below(2) == 0 { value.to_le_bytes() } else { value.to_be_bytes() };
    let field = if random.below(2) == 0 { &field[..width] } else { &field[8 - width..] };
    let aligned = at / width * width;
    for (index, byte) in field.iter().enumerate() {
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
