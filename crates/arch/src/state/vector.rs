//! x87, vector and mask registers (Intel SDM 1 13.4).
use super::inspect::{Inspect, Value};
use alloc::format;
use alloc::string::String;

/// x87, SSE and AVX registers: the standard-format XSAVE area (Intel SDM 1 13.4) up to and with
/// the AVX component, 832 bytes. The components beyond it, whose places differ between
/// processors, are elements of their own.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FpuState(pub [u8; Self::SIZE]);

impl FpuState {
    /// Bytes of the legacy region, the header and the AVX component.
    pub const SIZE: usize = 832;
}

impl core::fmt::Debug for FpuState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("FpuState { .. }")
    }
}

impl Default for FpuState {
    /// The state after INIT or power-up: FCW 037FH as FNINIT leaves it, MXCSR 1F80H, registers
    /// zero, all components marked as in use.
    fn default() -> Self {
        let mut area = [0; Self::SIZE];
        area[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        area[512] = 7;
        Self(area)
    }
}

impl Inspect for FpuState {
    fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
        let mut part = |name: String, at: usize, length: usize| {
            let bytes = self.0.get(at..at + length).unwrap_or_default();
            visit(&format!("{path}.{name}"), Value::Bytes(bytes.into()));
        };
        let control = [
            ("fcw", 0, 2),
            ("fsw", 2, 2),
            ("ftw", 4, 2),
            ("fop", 6, 2),
            ("fip", 8, 8),
            ("fdp", 16, 8),
        ];
        for (name, at, length) in control {
            part(name.into(), at, length);
        }
        part("mxcsr".into(), 24, 4);
        part("mxcsr_mask".into(), 28, 4);
        (0..8).for_each(|n| part(format!("st[{n}]"), 32 + 16 * n, 10));
        // What is reserved beside each of the x87 registers, and behind all registers.
        (0..8).for_each(|n| part(format!("st_reserved[{n}]"), 42 + 16 * n, 6));
        (0..16).for_each(|n| part(format!("xmm[{n}]"), 160 + 16 * n, 16));
        part("reserved".into(), 416, 96);
        part("header".into(), 512, 64);
        (0..16).for_each(|n| part(format!("upper_ymm[{n}]"), 576 + 16 * n, 16));
    }
}

/// The registers that AVX-512 adds: XSAVE components 5, 6 and 7.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Avx512State {
    /// K0 to K7.
    pub opmask: [u64; 8],
    /// Bits 256 to 511 of ZMM0 to ZMM15.
    pub upper_zmm: [[u64; 4]; 16],
    /// ZMM16 to ZMM31.
    pub high_zmm: [[u64; 8]; 16],
}
super::inspect::fields!(Avx512State { opmask, upper_zmm, high_zmm });

impl core::fmt::Debug for Avx512State {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(if *self == Self::default() {
            "Avx512State(initial)"
        } else {
            "Avx512State { .. }"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leaves_of_the_fpu_cover_each_byte_of_its_area() {
        let mut total = 0;
        FpuState::default().inspect("fpu", &mut |path, value| match value {
            Value::Bytes(bytes) => total += bytes.len(),
            other => panic!("{path} is {other}"),
        });
        assert_eq!(total, FpuState::SIZE);
    }
}
