//! SHA-256 (FIPS 180-4), CRC-32 (IEEE 802.3) and generated data: integer arithmetic, tables,
//! and the digests with which the other parts sum up what they made.

/// The SHA-256 round constants: of the cube roots of the first 64 primes, 32 bits of the
/// fraction each (FIPS 180-4 §4.2.2).
fn constants() -> [u32; 64] {
    let mut constants = [0; 64];
    let primes = (2u32..).filter(|n| (2..*n).all(|divisor| n % divisor != 0));
    for (constant, prime) in constants.iter_mut().zip(primes) {
        *constant = fraction(prime, |root, target| root.pow(3) <= target << 96);
    }
    constants
}

/// The first 32 bits of the fraction of a root of `n`; `low` says whether a root in units of
/// 2^-32 is not above it.
fn fraction(n: u32, low: impl Fn(u128, u128) -> bool) -> u32 {
    let (mut below, mut above) = (0u128, 1u128 << 37);
    while above - below > 1 {
        let middle = (below + above) / 2;
        if low(middle, n.into()) { below = middle } else { above = middle }
    }
    below as u32
}

/// The SHA-256 of `data`, in hexadecimal.
pub fn sha256(data: &[u8]) -> String {
    let constants = constants();
    let mut state = [2, 3, 5, 7, 11, 13, 17, 19]
        .map(|prime| fraction(prime, |root, target| root.pow(2) <= target << 64));
    let mut padded = data.to_vec();
    padded.push(0x80);
    padded.resize((padded.len() + 8).next_multiple_of(64) - 8, 0);
    padded.extend((data.len() as u64 * 8).to_be_bytes());
    for block in padded.chunks_exact(64) {
        compress(&mut state, block, &constants);
    }
    state.iter().map(|word| format!("{word:08x}")).collect()
}

/// FIPS 180-4 §6.2.2.
fn compress(state: &mut [u32; 8], block: &[u8], constants: &[u32; 64]) {
    let mut schedule = [0u32; 64];
    for (word, bytes) in schedule.iter_mut().zip(block.chunks_exact(4)) {
        *word = u32::from_be_bytes(bytes.try_into().unwrap());
    }
    for t in 16..64 {
        let (x, y) = (schedule[t - 15], schedule[t - 2]);
        let small0 = x.rotate_right(7) ^ x.rotate_right(18) ^ (x >> 3);
        let small1 = y.rotate_right(17) ^ y.rotate_right(19) ^ (y >> 10);
        schedule[t] = [schedule[t - 16], small0, schedule[t - 7], small1]
            .into_iter()
            .fold(0, u32::wrapping_add);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (word, constant) in schedule.iter().zip(constants) {
        let big1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let first = [h, big1, choice, *constant, *word].into_iter().fold(0, u32::wrapping_add);
        let big0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let second = big0.wrapping_add((a & b) ^ (a & c) ^ (b & c));
        (h, g, f, e) = (g, f, e, d.wrapping_add(first));
        (d, c, b, a) = (c, b, a, first.wrapping_add(second));
    }
    for (word, new) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(new);
    }
}

/// The CRC-32 of `data`, through a table made on the way.
pub fn crc32(data: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|byte| (0..8).fold(byte, |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1))))
        .collect();
    !data.iter().fold(!0, |crc, byte| (crc >> 8) ^ table[usize::from(crc as u8 ^ byte)])
}

/// Numbers that look random (xorshift64*), the same for the same seed.
pub struct Generator(pub u64);

impl Generator {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 56) as u8).collect()
    }
}

pub fn exercise() {
    println!("sha256 abc {}", sha256(b"abc"));
    assert!(sha256(b"abc").starts_with("ba7816bf8f01cfea414140de5dae2223"));
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    for size in [0, 1, 55, 56, 64, 4097, 200_000] {
        let data = Generator(size as u64 + 1).bytes(size);
        println!("data {size}: sha256 {} crc32 {:08x}", sha256(&data), crc32(&data));
    }
}
