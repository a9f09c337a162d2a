//! Arithmetic: floating point to the last bit, 128-bit integers, large numbers, conversions.

use crate::hash::{Generator, sha256};

/// Motion of five bodies under gravity; the sum of all kinds of rounding.
fn bodies() -> f64 {
    let mut random = Generator(5);
    let mut unit = || (random.next() >> 11) as f64 / (1u64 << 53) as f64;
    let mut bodies: Vec<([f64; 3], [f64; 3], f64)> =
        (0..5).map(|_| (std::array::from_fn(|_| unit() * 10.0), [0.0; 3], unit() + 0.5)).collect();
    for _ in 0..2_000 {
        for i in 0..bodies.len() {
            for j in 0..bodies.len() {
                if i != j {
                    let (from, to) = (bodies[i].0, bodies[j].0);
                    let apart: [f64; 3] = std::array::from_fn(|axis| to[axis] - from[axis]);
                    let square = apart.iter().map(|x| x * x).sum::<f64>() + 0.01;
                    let pull = 0.001 * bodies[j].2 / (square * square.sqrt());
                    for (speed, x) in bodies[i].1.iter_mut().zip(apart) {
                        *speed += x * pull;
                    }
                }
            }
        }
        for (place, speed, _) in &mut bodies {
            for (x, v) in place.iter_mut().zip(speed) {
                *x += *v * 0.001;
            }
        }
    }
    bodies.iter().flat_map(|(place, speed, _)| place.iter().chain(speed)).sum()
}

/// Points of the Mandelbrot set, counted in single precision.
fn mandelbrot() -> u32 {
    let inside = |x: f32, y: f32| {
        let (mut a, mut b) = (0f32, 0f32);
        (0..100).all(|_| {
            (a, b) = (a * a - b * b + x, 2.0 * a * b + y);
            a * a + b * b < 4.0
        })
    };
    let row = |y: i16| {
        let y = f32::from(y) / 40.0;
        (-80i16..40).filter(|x| inside(f32::from(*x) / 40.0, y)).count() as u32
    };
    (-40..40).map(row).sum()
}

/// The first digits of pi, by Machin's formula in units of 10^-`digits` (as a number of base
/// 10^9 in a vector).
fn pi(digits: usize) -> String {
    const BASE: u64 = 1_000_000_000;
    let limbs = digits / 9 + 2;
    let divide = |number: &mut Vec<u64>, divisor: u64| {
        let mut rest = 0;
        for limb in number {
            let all = rest * BASE + *limb;
            (*limb, rest) = (all / divisor, all % divisor);
        }
    };
    let mut sum = vec![0i64; limbs];
    for (factor, x, sign) in [(16, 5u64, 1i64), (4, 239, -1)] {
        let mut power = vec![0; limbs];
        power[0] = factor;
        divide(&mut power, x);
        let mut sign = sign;
        for odd in (1..).step_by(2) {
            let mut term = power.clone();
            divide(&mut term, odd);
            if term.iter().all(|limb| *limb == 0) {
                break;
            }
            for (total, limb) in sum.iter_mut().zip(term) {
                *total += sign * limb as i64;
            }
            divide(&mut power, x * x);
            sign = -sign;
        }
    }
    for index in (1..limbs).rev() {
        let carry = sum[index].div_euclid(BASE as i64);
        sum[index] -= carry * BASE as i64;
        sum[index - 1] += carry;
    }
    sum[1..limbs - 1].iter().map(|limb| format!("{limb:09}")).collect()
}

/// Powers modulo a prime of 127 bits, by 128-bit multiplication and division.
fn wide() {
    const PRIME: u128 = (1 << 127) - 1;
    let product = |a: u128, b: u128| {
        let mut sum = 0;
        for bit in (0..128).rev() {
            sum = sum * 2 % PRIME;
            if b >> bit & 1 == 1 {
                sum = (sum + a) % PRIME;
            }
        }
        sum
    };
    let base = 0x0123_4567_89ab_cdef_u128;
    let power = (0..127).fold((1, base), |(result, square), bit| {
        let result = if (PRIME - 1) >> bit & 1 == 1 { product(result, square) } else { result };
        (result, product(square, square))
    });
    println!("fermat {} square {:x}", power.0, power.1);
    assert_eq!(power.0, 1);
    let mut random = Generator(128);
    let mut mix = 0u128;
    for _ in 0..5_000 {
        let a = u128::from(random.next()) << 64 | u128::from(random.next());
        let b = u128::from(random.next()) << (random.next() % 64) | 1;
        assert_eq!(a / b * b + a % b, a);
        let signed = (a as i128 / -(b as i128)) as u128;
        mix = mix.rotate_left(7) ^ (a / b).wrapping_add(a % b) ^ signed;
        mix = mix.wrapping_add(u128::from((a as u64).leading_zeros() + (b as u64).count_ones()));
    }
    println!("u128 {mix:032x}");
}

/// Text of numbers and back, and what conversions do at their limits.
fn conversions() {
    let mut random = Generator(64);
    let mut text = String::new();
    for _ in 0..2_000 {
        let value = f64::from_bits(random.next());
        let printed = format!("{value:e}");
        let back: f64 = printed.parse().unwrap();
        assert!(back.to_bits() == value.to_bits() || value.is_nan());
        text += &format!("{printed} {} {} {}\n", value as f32, value as i64, value as u8);
    }
    println!("conversions sha256 {}", sha256(text.as_bytes()));
    let values = [0.1f64, -2.5, 1e300, 5e-324, f64::INFINITY];
    for value in values {
        let fused = value.mul_add(value, -value);
        let rounded = [value.floor(), value.round(), value.trunc(), value.sqrt()];
        println!("{value:?}: {fused:?} {rounded:?} {:?}", value.to_bits());
    }
    // The last bits of these are the C library's choice by CPU, so only the first digits count.
    println!("functions {:.9} {:.9} {:.9}", 1f64.exp(), 0.5f64.sin(), 10f64.ln());
}

/// A product of matrices, which compilers turn into vector instructions.
fn matrices() -> f64 {
    const N: usize = 96;
    let mut random = Generator(96);
    let mut matrix = || -> Vec<f64> {
        (0..N * N).map(|_| (random.next() >> 40) as f64 / 4096.0 - 2048.0).collect()
    };
    let (a, b) = (matrix(), matrix());
    let mut c = vec![0.0; N * N];
    for i in 0..N {
        for k in 0..N {
            let factor = a[i * N + k];
            for (sum, x) in c[i * N..][..N].iter_mut().zip(&b[k * N..][..N]) {
                *sum += factor * x;
            }
        }
    }
    c.iter().sum()
}

pub fn exercise() {
    let (bodies, matrices) = (bodies(), matrices());
    println!("bodies {bodies:?} {:016x}", bodies.to_bits());
    println!("matrices {matrices:?} {:016x}", matrices.to_bits());
    println!("mandelbrot {}", mandelbrot());
    println!("pi 3.{}", pi(180));
    wide();
    conversions();
}
