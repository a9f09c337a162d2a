//! Requests that no kernel would send, and those that one would, in an order that it would not.
use share::{Limits, MAX_REPLY, MAX_REQUEST, Options, Server};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

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
}

const NAMES: [&str; 20] = [
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "link",
    "root",
    "up",
    "loop",
    "..",
    ".",
    "",
    "a/b",
    "../secret",
    "/etc/passwd",
    "user.a",
    "user.",
    "security.capability",
    "x\u{1}",
];
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    0x1000,
    0xffff,
    1 << 20,
    u32::MAX as u64,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];
const OPCODES: [u32; 36] = [
    1, 1, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24, 26, 27,
    28, 29, 30, 35, 38, 42, 43, 44, 45, 46,
];

/// The bytes after a request's header: its fields, or something like them.
fn body(random: &mut Random, opcode: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let name = |random: &mut Random, bytes: &mut Vec<u8>| {
        bytes.extend(random.of(&NAMES).as_bytes());
        if random.below(50) == 0 {
            bytes.extend(vec![b'n'; random.below(5000)]);
        }
        if random.below(50) != 0 {
            bytes.push(0);
        }
    };
    let number = |random: &mut Random| match random.below(4) {
        0 => random.of(&NUMBERS),
        1 => random.next(),
        _ => random.below(12) as u64,
    };
    // Bytes of numbers before the names, and how many names.
    let (fields, names) = match opcode {
        1 | 10 | 11 | 24 => (0, 1),
        6 => (0, 2),
        8 | 35 => (16, 1),
        9 | 13 => (8, 1),
        21 | 22 => (8, 1),
        12 => (8, 2),
        45 => (16, 2),
        4 => (88, 0),
        43 => (32, 0),
        _ => (8 * random.below(8), 0),
    };
    while bytes.len() < fields {
        let number = number(random);
        if random.below(2) == 0 {
            bytes.extend((number as u32).to_le_bytes());
            bytes.extend((random.below(0x200) as u32).to_le_bytes());
        } else {
            bytes.extend(number.to_le_bytes());
        }
    }
    if opcode == 43 && random.below(20) != 0 {
        // No more than the disk has.
        bytes[16..24].copy_from_slice(&(random.next() % (1 << 20)).to_le_bytes());
    }
    for _ in 0..names {
        name(random, &mut bytes);
    }
    if matches!(opcode, 16 | 21) {
        let data = random.below(3000);
        bytes.extend(vec![random.next() as u8; data]);
        if opcode == 16 && bytes.len() >= 40 {
            let size = bytes.len() as u32 - 40;
            bytes[16..20].copy_from_slice(&size.to_le_bytes());
        }
    }
    bytes
}

fn request(random: &mut Random) -> Vec<u8> {
    let opcode = match random.below(100) {
        0 => random.next() as u32,
        // Sessions that end and begin rarely, so that there is something in them.
        1 => 26,
        _ => match random.of(&OPCODES) {
            26 | 38 => 1,
            opcode => opcode,
        },
    };
    let mut bytes = vec![0; 40];
    bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
    let node =
        if random.below(20) == 0 { random.of(&NUMBERS) } else { 1 + random.below(12) as u64 };
    bytes[16..24].copy_from_slice(&node.to_le_bytes());
    if opcode == 26 {
        bytes.extend([7, 0, 0, 0, 38, 0, 0, 0]);
        bytes.extend([0xff; 56]);
    } else {
        bytes.extend(body(random, opcode));
    }
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    // Allocating by accident could fill the disk.
    if opcode != 43 && random.below(10) == 0 {
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len());
            bytes[at] = random.next() as u8;
        }
        if random.below(3) == 0 {
            bytes.truncate(random.below(bytes.len() + 1));
        }
    }
    bytes
}

/// Lays out a folder with a share and something beside it that the guest must not reach.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub fn new(parent: &Path) -> Self {
        let folder = tempfile::tempdir_in(parent).unwrap();
        let share = folder.path().join("share");
        fs::create_dir(&share).unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        fs::create_dir(share.join("d")).unwrap();
        symlink("../secret", share.join("link")).unwrap();
        symlink("/", share.join("root")).unwrap();
        symlink("..", share.join("up")).unwrap();
        symlink("loop", share.join("loop")).unwrap();
        fs::write(share.join("a"), "a").unwrap();
        Self { folder }
    }

    /// Serves `count` requests that the seed determines. No reply may be longer than its room.
    pub fn attack(&self, seed: u64, count: u64) {
        let mut random = Random::new(seed);
        let limits = Limits { inodes: 64, descriptors: 8, handles: 16 };
        let folder = self.folder.path().join("share");
        let options = Options { folder, read_only: false, owner: None, limits };
        let server = Server::new(&options).unwrap();
        let mut reply = Vec::new();
        let mut init = vec![104, 0, 0, 0, 26, 0, 0, 0];
        init.resize(40, 0);
        init.extend([7, 0, 0, 0, 38, 0, 0, 0]);
        init.resize(104, 0);
        server.serve(&init, MAX_REPLY, &mut reply);
        assert_eq!(reply[4], 0, "the session begins");
        for _ in 0..count {
            let request = request(&mut random);
            assert!(request.len() <= MAX_REQUEST);
            let room = match random.below(4) {
                0 => random.below(200),
                _ => MAX_REPLY,
            };
            server.serve(&request, room, &mut reply);
            assert!(reply.len() <= room, "seed {seed}: a reply of {} bytes", reply.len());
        }
        let state = server.save();
        server.restore(&state).unwrap();
    }

    /// Fails if anything outside the share has changed.
    pub fn check(&self) {
        let mut beside: Vec<_> = fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        beside.sort();
        assert_eq!(beside, ["secret", "share"]);
        assert_eq!(fs::read(self.folder.path().join("secret")).unwrap(), b"secret");
    }
}
