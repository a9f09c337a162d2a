//! The host's time-stamp counter, and how fast it and the LAPIC timer run.
#![allow(unsafe_code)]
use crate::cpu::Cpu;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Frequency at which the LAPIC timer counts before its divider, in Hz. CPUID leaf 15H calls it
/// the core crystal clock.
pub const APIC_HZ: u64 = 25_000_000;

/// The host's time-stamp counter.
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions; Linux enables it for processes.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn both() -> (u64, Instant) {
    // The pair read most closely together: a pre-emption between the two reads shows as a gap.
    let mut best = (u64::MAX, host_tsc(), Instant::now());
    for _ in 0..8 {
        let before = host_tsc();
        let now = Instant::now();
        let gap = host_tsc().wrapping_sub(before);
        if gap < best.0 {
            best = (gap, before.wrapping_add(gap / 2), now);
        }
    }
    (best.1, best.2)
}

/// Notes the start of the measurement; to be called early, so that the result needs no waiting.
pub fn start_measuring() -> (u64, Instant) {
    static START: OnceLock<(u64, Instant)> = OnceLock::new();
    *START.get_or_init(both)
}

/// The time-stamp counter's frequency in kHz, measured once against the host's monotonic clock
/// and rounded to a multiple of the crystal's, so that CPUID leaf 15H can state it exactly.
pub fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (tsc, instant) = start_measuring();
        let least = Duration::from_millis(5);
        if let Some(rest) = least.checked_sub(instant.elapsed()) {
            std::thread::sleep(rest);
        }
        let (now, later) = both();
        let nanoseconds = later.duration_since(instant).as_nanos().max(1);
        let khz = u128::from(now.wrapping_sub(tsc)) * 1_000_000 / nanoseconds;
        let step = APIC_HZ / 1_000_000;
        ((khz as u64 + step / 2) / step * step).max(step)
    })
}

/// How long the counter takes for `ticks`.
pub fn tsc_duration(ticks: u64) -> Duration {
    let nanoseconds = u128::from(ticks) * 1_000_000 / u128::from(tsc_khz());
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

impl Cpu {
    /// The guest's time-stamp counter.
    pub fn guest_tsc(&self) -> u64 {
        host_tsc().wrapping_add(self.tsc_offset)
    }
}
