//! Guests that attack the devices with queues of their own making: shared folders, the balloon
//! and sockets.
use device::{GuestPhysical, SavedState};
use share::{Limits, Options, Server};
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use virtio::VirtioDevice;
use virtio::balloon::{Balloon, BalloonControl};
use virtio::fs::{FileSystem, Tag};
use virtio::testing::{MEMORY, TestGuest};
use virtio::vsock::{Vsock, VsockHost, VsockOptions};

/// Random numbers that a seed determines (xorshift64*, G. Marsaglia and S. Vigna).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// Panics of any thread since the program began, where [`count_panics`] was called.
pub static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts panics of the devices' threads, which otherwise only fail their device.
pub fn count_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        before(info);
    }));
}

/// A device under attack, and what the host does meanwhile.
enum Target {
    Fs,
    Balloon(BalloonControl),
    /// The folder of its sockets, programs that connected, and one that listens.
    Vsock(std::path::PathBuf, Vec<UnixStream>, UnixListener),
}

impl Target {
    fn make(random: &mut Random, folder: &Path) -> (Self, Box<dyn VirtioDevice>) {
        match random.below(3) {
            0 => {
                let limits = Limits { inodes: 50, descriptors: 16, handles: 8 };
                let folder = folder.to_owned();
                let options = Options { folder, read_only: false, owner: None, limits };
                let server = Arc::new(Server::new(&options).unwrap());
                (Self::Fs, Box::new(FileSystem::new(Tag::numbered(0), server)))
            }
            1 => {
                let control = BalloonControl::new(random.next());
                let balloon = Balloon::new(&control);
                (Self::Balloon(control), Box::new(balloon))
            }
            _ => {
                let options = VsockOptions { path: folder.join("vm"), cid: 3 };
                let vsock = Vsock::new(VsockHost::new(&options).unwrap());
                let listener = UnixListener::bind(folder.join("vm_1")).unwrap();
                listener.set_nonblocking(true).unwrap();
                (Self::Vsock(folder.to_owned(), Vec::new(), listener), Box::new(vsock))
            }
        }
    }

    /// Something that is nearly a request.
    fn request(&self, random: &mut Random) -> Vec<u8> {
        let length = random.below(200);
        let mut bytes = random.bytes(length);
        match self {
            Self::Fs => {
                bytes.resize(bytes.len().max(40), 0);
                let opcode = random.of(&[1u32, 3, 9, 26, 26, 27, 28, 34, 35, 44, 47, 48]);
                let length = bytes.len() as u32;
                bytes[..4].copy_from_slice(&length.to_le_bytes());
                bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
                bytes[16..24].copy_from_slice(&(random.below(5) as u64).to_le_bytes());
                if opcode == 26 && bytes.len() > 48 {
                    bytes[40..48].copy_from_slice(&[7, 0, 0, 0, 38, 0, 0, 0]);
                }
            }
            Self::Balloon(_) => {
                for page in bytes.chunks_exact_mut(4) {
                    page.copy_from_slice(&(random.next() as u32 % 2000).to_le_bytes());
                }
            }
            Self::Vsock(..) => {
                bytes.resize(bytes.len().max(44), 0);
                let data = bytes.len() as u32 - 44;
                bytes[..8].copy_from_slice(&3u64.to_le_bytes());
                bytes[8..16].copy_from_slice(&2u64.to_le_bytes());
                bytes[16..20].copy_from_slice(&(random.below(4) as u32).to_le_bytes());
                let port = random.of(&[1u32, 2, 1 << 30, (1 << 30) + 1]);
                bytes[20..24].copy_from_slice(&port.to_le_bytes());
                bytes[24..28].copy_from_slice(&data.to_le_bytes());
                bytes[28..30].copy_from_slice(&1u16.to_le_bytes());
                bytes[30..32].copy_from_slice(&(random.below(9) as u16).to_le_bytes());
                bytes[36..40].copy_from_slice(&random.of(&[0u32, 10, 70000]).to_le_bytes());
            }
        }
        if random.below(8) == 0 {
            bytes.truncate(random.below(bytes.len() + 1));
        }
        bytes
    }

    /// What others on the host do.
    fn disturb(&mut self, random: &mut Random) {
        match self {
            Self::Fs => {}
            Self::Balloon(control) => match random.below(3) {
                0 => control.set_target(random.next()),
                1 => control.request_statistics(),
                _ => drop(control.statistics()),
            },
            Self::Vsock(folder, programs, listener) => {
                match random.below(4) {
                    0 if programs.len() < 20 => {
                        if let Ok(stream) = UnixStream::connect(folder.join("vm")) {
                            stream.set_nonblocking(true).unwrap();
                            programs.push(stream);
                        }
                    }
                    1 => programs.truncate(random.below(20)),
                    _ => programs.extend(listener.accept().map(|(stream, _)| stream)),
                }
                for program in programs {
                    let _ = program.set_nonblocking(true);
                    let _ = program.write(random.of(&[&b"CONNECT 1\n"[..], b"x", b"data"]));
                    let _ = program.read(&mut [0; 100]);
                }
            }
        }
    }
}

/// Attacks one device, which the seed chooses, in `rounds` guests. It must neither panic nor hang.
pub fn attack(seed: u64, rounds: u32) {
    let mut random = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let (mut target, mut device) = Target::make(&mut random, folder.path());
    for _ in 0..rounds {
        let mut guest = TestGuest::with(&mut *device);
        let well_behaved = random.below(3) > 0;
        let mut room: Vec<_> = guest.queues.iter().map(|queue| queue.size / 4).collect();
        for _ in 0..random.below(40) {
            let queue = random.below(guest.queues.len());
            if well_behaved && room[queue] > 0 {
                room[queue] -= 1;
                add_request(&mut guest, queue, &target, &mut random);
            } else if !well_behaved {
                break_ring(&mut guest, queue, &target, &mut random);
            }
            match random.below(8) {
                0 => {
                    let data = random.next().to_le_bytes();
                    let length = random.below(9);
                    device.write_config(random.below(70), &data[..length]);
                }
                1 => device.read_config(random.below(70), &mut [0; 9]),
                2 => target.disturb(&mut random),
                _ => guest.notify(queue),
            }
        }
        // It serves what is there before it ends.
        guest.deactivate(&mut *device);
        guest.activate(&mut *device);
        target.disturb(&mut random);
        guest.deactivate(&mut *device);
        if random.below(2) == 0 {
            let mut state = SavedState::new("virtio", 1);
            device.save(&mut state);
            device.restore(&mut state.reader("virtio", 1).unwrap()).unwrap();
        } else {
            device.reset();
        }
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "seed {seed}");
    }
}

/// A chain as a driver makes it, with any contents.
fn add_request(guest: &mut TestGuest, queue: usize, target: &Target, random: &mut Random) {
    let request = target.request(random);
    let writable = random.of(&[&[][..], &[16], &[44], &[4096], &[1, 200, 3000]]);
    let readable: &[&[u8]] = if request.is_empty() { &[] } else { &[&request] };
    if !readable.is_empty() || !writable.is_empty() {
        guest.queues[queue].add(readable, writable);
    }
}

/// Descriptors and ring entries that point anywhere.
fn break_ring(guest: &mut TestGuest, queue: usize, target: &Target, random: &mut Random) {
    let request = target.request(random);
    let driver = &mut guest.queues[queue];
    let start = driver.allocate(request.len().max(1));
    guest.ram.write(start, &request).unwrap();
    for _ in 0..random.below(4) {
        let start = match random.below(4) {
            0 => GuestPhysical(random.next()),
            1 => GuestPhysical(random.below(MEMORY) as u64),
            _ => start,
        };
        let length = match random.below(4) {
            0 => random.next() as u32 as usize,
            1 => random.below(100_000),
            _ => request.len(),
        };
        let next = (random.below(2) == 0).then(|| random.below(6) as u16);
        let flags = random.below(8) as u16;
        driver.describe(
            driver.at.descriptors,
            random.below(6) as u16,
            (start, length, flags),
            next,
        );
    }
    match random.below(20) {
        0 => driver.set_available_index(random.next() as u16),
        1 => driver.make_available(random.next() as u16),
        _ => driver.make_available(random.below(6) as u16),
    }
}
