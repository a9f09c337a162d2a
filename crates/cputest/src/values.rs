//! Random machine states with the values at which arithmetic changes its behaviour.
use crate::case::{CODE, Case, DATA_SIZE, READ_ONLY_SIZE};
use crate::rng::Rng;
use arch::FpuState;
use arch::registers::rflags;

/// A state in which nothing is aimed yet: every register, flag, vector and data byte random.
pub fn random_case(rng: &mut Rng, wide: bool) -> Case {
    let mut case = Case {
        rip: CODE + 16 + rng.below(64),
        gpr: [0; 16],
        rflags: rflags::FIXED | rflags::IF | (rng.bits() & rflags::ARITHMETIC),
        fs_gs: [rng.below(0x8000), rng.below(0x8000)],
        fpu: fpu(rng, wide),
        length: 0,
        bytes: [0; 16],
        wide,
        data: [0; DATA_SIZE],
        read_only: [0; READ_ONLY_SIZE],
    };
    if rng.chance(30) {
        case.rflags |= rflags::DF;
    }
    if rng.chance(3) {
        case.rflags |= rflags::AC;
    }
    for register in &mut case.gpr {
        *register = rng.word();
    }
    if !wide {
        case.fs_gs = [0; 2];
        for register in &mut case.gpr[..8] {
            *register &= 0xffff_ffff;
        }
        case.gpr[8..].fill(0);
    }
    numbers(rng, &mut case.data);
    numbers(rng, &mut case.read_only);
    case
}

/// Fills memory with lanes of floating-point and integer values.
fn numbers(rng: &mut Rng, memory: &mut [u8]) {
    for chunk in memory.chunks_exact_mut(16) {
        chunk.copy_from_slice(&lane(rng));
    }
}

/// Sixteen bytes: two doubles, four singles, integers, an extended or plain noise.
fn lane(rng: &mut Rng) -> [u8; 16] {
    let mut lane = [0; 16];
    match rng.below(6) {
        0 => {
            for part in lane.chunks_exact_mut(8) {
                part.copy_from_slice(&double(rng).to_le_bytes());
            }
        }
        1 => {
            for part in lane.chunks_exact_mut(4) {
                part.copy_from_slice(&single(rng).to_le_bytes());
            }
        }
        2 => lane[..10].copy_from_slice(&extended(rng)),
        3 => {
            for part in lane.chunks_exact_mut(8) {
                part.copy_from_slice(&rng.word().to_le_bytes());
            }
        }
        _ => rng.fill(&mut lane),
    }
    lane
}

fn double(rng: &mut Rng) -> u64 {
    let sign = rng.bits() & (1 << 63);
    let exponent = rng.pick(&[0, 0, 1, 1022, 1023, 1024, 1054, 1075, 2046, 2047, 2047]);
    let exponent = if rng.chance(40) { 960 + rng.below(128) } else { exponent };
    let fraction = match rng.below(5) {
        0 => 0,
        1 => 1 << 51,
        2 => 1,
        3 => (1 << 52) - 1,
        _ => rng.bits() >> 12,
    };
    sign | exponent << 52 | fraction
}

fn single(rng: &mut Rng) -> u32 {
    let sign = (rng.bits() as u32) & (1 << 31);
    let exponent = rng.pick(&[0, 0, 1, 126, 127, 128, 150, 158, 254, 255, 255]);
    let exponent = if rng.chance(40) { 96 + rng.below(64) as u32 } else { exponent };
    let fraction = match rng.below(5) {
        0 => 0,
        1 => 1 << 22,
        2 => 1,
        3 => (1 << 23) - 1,
        _ => (rng.bits() >> 41) as u32,
    };
    sign | exponent << 23 | fraction
}

/// An 80-bit x87 value, now and then one of the unsupported encodings.
fn extended(rng: &mut Rng) -> [u8; 10] {
    let exponent = rng.pick(&[0, 0, 1, 16382, 16383, 16384, 16445, 32766, 32767, 32767]);
    let exponent = if rng.chance(50) { 16383 - 40 + rng.below(80) as u16 } else { exponent };
    let integer = if exponent == 0 || rng.chance(4) { 0 } else { 1 << 63 };
    let fraction = match rng.below(5) {
        0 => 0,
        1 => 1 << 62,
        2 => 1,
        _ => rng.bits() >> 1,
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&(integer | fraction).to_le_bytes());
    let sign = (rng.bits() as u16) & 0x8000;
    bytes[8..].copy_from_slice(&(sign | exponent).to_le_bytes());
    bytes
}

/// x87, SSE and AVX state: mostly with exceptions masked, sometimes with one pending.
fn fpu(rng: &mut Rng, wide: bool) -> FpuState {
    let mut state = FpuState::default();
    let area = &mut state.0;
    let unmasked = if rng.chance(20) { rng.bits() as u16 & 0x3f } else { 0 };
    let rounding = (rng.bits() as u16) & 0x0c00;
    let precision = rng.pick(&[0x300u16, 0x300, 0x200, 0x000]);
    let control = 0x40 | (0x3f & !unmasked) | rounding | precision;
    let mut status = (rng.bits() as u16) & 0x7f3f;
    if !rng.chance(25) {
        status &= !unmasked;
    }
    if status & unmasked & 0x3f != 0 {
        status |= 0x8080;
    }
    if rng.chance(50) {
        status &= !0x3800;
    }
    area[0..2].copy_from_slice(&control.to_le_bytes());
    area[2..4].copy_from_slice(&status.to_le_bytes());
    area[4] = if rng.chance(60) { 0xff } else { rng.bits() as u8 };
    let mxcsr_masks = if rng.chance(15) { rng.bits() as u32 & 0x1f80 } else { 0x1f80 };
    let mut mxcsr = mxcsr_masks | (rng.bits() as u32 & 0x6000);
    if rng.chance(20) {
        mxcsr |= rng.bits() as u32 & 0x8040;
    }
    if rng.chance(50) {
        mxcsr |= rng.bits() as u32 & 0x3f;
    }
    area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for register in 0..8 {
        area[32 + 16 * register..][..10].copy_from_slice(&extended(rng));
    }
    for register in 0..if wide { 16 } else { 8 } {
        area[160 + 16 * register..][..16].copy_from_slice(&lane(rng));
        area[576 + 16 * register..][..16].copy_from_slice(&lane(rng));
    }
    state
}
