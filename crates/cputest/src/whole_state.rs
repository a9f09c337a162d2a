//! A state in which every leaf of the state table has a value that it does not have after reset,
//! so that an engine that forgets an element is found out.
use arch::registers::{cr0, cr4, efer, rflags};
use arch::{
    Event, InDelivery, InterruptShadow, MpState, Msrs, Segment, SegmentName, VcpuState, msr,
};

/// LAPIC registers that are plain state, by number: task priority, logical destination, its
/// format, spurious vector, error status, commands, local vectors, initial count, divider; and the
/// vectors in service, level-triggered and requested.
const LAPIC: [(usize, u32); 14] = [
    (0x08, 0x20),
    (0x0d, 0x0200_0000),
    (0x0e, 0x0fff_ffff),
    (0x0f, 0x1f0),
    (0x30, 0x0000_00f1),
    (0x31, 0x0300_0000),
    (0x32, 0x0002_00f2),
    (0x33, 0x0001_00f3),
    (0x34, 0x0001_00f4),
    (0x35, 0x0001_0700),
    (0x36, 0x0000_0400),
    (0x37, 0x0001_00fe),
    (0x38, 0x1234_5678),
    (0x3e, 0x0000_000b),
];
/// The first words of the registers with a bit for each vector, but for vectors below 16.
const VECTORS: [usize; 3] = [0x10, 0x18, 0x20];

/// Whether a leaf is the same in any state that an engine can hold, or moves by itself.
pub fn is_fixed(path: &str) -> bool {
    // The only types of a loaded LDTR and TR; and fields that are reserved or the host's.
    const FIXED: [&str; 6] = [
        "segments.ldtr.attributes",
        "segments.tr.attributes",
        "fpu.mxcsr_mask",
        "fpu.reserved",
        "fpu.header",
        // Goes on by itself.
        "tsc",
    ];
    let register = |n: &usize| path == format!("lapic.registers[{n}]");
    let vectors = VECTORS.iter().flat_map(|first| *first..first + 8);
    let plain = |n: &usize| LAPIC.iter().any(|(number, _)| number == n);
    let settable = (0..64).filter(|n| plain(n) || vectors.clone().any(|v| v == *n));
    FIXED.contains(&path)
        || path.starts_with("fpu.st_reserved")
        || path.starts_with("lapic.registers[") && !settable.into_iter().any(|n| register(&n))
}

/// The state; `avx512` says whether AVX-512 and protection keys are to be in it.
pub fn whole_state(avx512: bool) -> VcpuState {
    let mut state = VcpuState::reset();
    system(&mut state);
    for (n, register) in state.gpr.iter_mut().enumerate() {
        *register = 0x1111_0000_0000_0000 + n as u64;
    }
    state.rip = 0x8000;
    state.rflags = rflags::FIXED | rflags::CF | rflags::OF;
    vector(&mut state, avx512);
    state.debug = [0x1000, 0x2000, 0x3000, 0x4000, 0xffff_0ff1, 0x402];
    state.tsc = 1 << 60;
    for number in Msrs::numbers() {
        assert!(state.msrs.set(number, msr_value(number)));
    }
    let lapic = &mut state.lapic;
    lapic.base = 0xfed0_0900;
    for (number, value) in LAPIC {
        lapic.registers[number] = value;
    }
    for first in VECTORS {
        for word in 1..8 {
            lapic.registers[first + word] = 1 << (word + 8);
        }
        lapic.registers[first] = 1 << 31;
    }
    state.events = Event {
        interrupt_shadow: InterruptShadow::Sti,
        nmi_pending: true,
        nmi_blocked: true,
        in_delivery: Some(InDelivery::DebugTrap),
    };
    state.mp = MpState::Halted;
    state
}

/// 32-bit protected mode without paging, in which every segment may have a base and a limit.
fn system(state: &mut VcpuState) {
    let data = |n: u16| Segment {
        selector: 8 * (n + 2),
        base: u64::from(n) << 16,
        limit: u32::from(n) << 20 | 0xfff,
        attributes: 0xc093,
    };
    state.segments.regs = [1, 2, 3, 4, 5, 6].map(data);
    state.segments[SegmentName::Cs].attributes = 0xc09b;
    state.segments.ldtr = Segment { selector: 0x50, base: 0x5000, limit: 0x57, attributes: 0x82 };
    state.segments.tr = Segment { selector: 0x58, base: 0x6000, limit: 0x67, attributes: 0x8b };
    (state.gdtr.base, state.gdtr.limit) = (0x1000, 0x5f);
    (state.idtr.base, state.idtr.limit) = (0x3000, 0x7ff);
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE;
    state.cr2 = 0xdead_b000;
    state.cr3 = 0x2_0000;
    state.cr4 = cr4::PSE | cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.efer = efer::SCE | efer::NXE;
}

fn vector(state: &mut VcpuState, avx512: bool) {
    state.xcr0 = 7;
    let area = &mut state.fpu.0;
    area[..2].copy_from_slice(&0x027fu16.to_le_bytes());
    // An exception is pending: only then do AMD's processors keep where it was.
    area[2..4].copy_from_slice(&0xb881u16.to_le_bytes());
    area[4] = 0xff;
    area[6..8].copy_from_slice(&0x123u16.to_le_bytes());
    area[8..24].fill(0x01);
    area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
    for n in 0..8 {
        area[32 + 16 * n..42 + 16 * n].fill(0x20 + n as u8);
    }
    for n in 0..16 {
        area[160 + 16 * n..176 + 16 * n].fill(0x40 + n as u8);
        area[576 + 16 * n..592 + 16 * n].fill(0x60 + n as u8);
    }
    if avx512 {
        state.xcr0 |= arch::registers::xcr0::AVX512 | arch::registers::xcr0::PKRU;
        let mut value = 0x8080_0000_0000_0000;
        let words = state.avx512.opmask.iter_mut();
        let words = words.chain(state.avx512.upper_zmm.as_flattened_mut());
        for word in words.chain(state.avx512.high_zmm.as_flattened_mut()) {
            value += 1;
            *word = value;
        }
        state.pkru = 0x5555_5554;
    }
}

/// A value that a register takes, and does not have after reset.
fn msr_value(number: u32) -> u64 {
    match number {
        msr::TSC_ADJUST => 0x1000,
        msr::SPEC_CTRL => 1,
        msr::SYSENTER_CS => 0x10,
        msr::SYSENTER_ESP | msr::SYSENTER_EIP => 0xffff_ffff_8100_0000 + u64::from(number),
        msr::MISC_ENABLE => 0x801,
        // A range of 4 KiB, write-back, and its mask with the valid bit.
        msr::MTRR_PHYS_BASE0..=0x20f if number & 1 == 0 => u64::from(number) << 12 | 6,
        msr::MTRR_PHYS_BASE0..=0x20f => 0xff_ffff_f800,
        msr::MTRR_FIX64K_00000..=0x26f => 0x0606_0606_0606_0606,
        msr::PAT => 0x0007_0406_0007_0401,
        msr::MTRR_DEF_TYPE => 0xc06,
        msr::STAR => 0x23_0010_0000_0000,
        msr::LSTAR | msr::CSTAR => 0xffff_ffff_8200_0000 + u64::from(number & 0xff),
        msr::SFMASK => 0x4_7700,
        msr::KERNEL_GS_BASE => 0xffff_8880_0000_1000,
        msr::TSC_AUX => 5,
        // KVM's own, which only it has, and what no guest here can set.
        _ => Msrs::reset_value(number).unwrap_or(0),
    }
}

/// The registers that [`whole_state`] leaves as they are after reset: only KVM has them, or only
/// some processors.
pub const LEFT_AT_RESET: [u32; 8] = [
    msr::KVM_WALL_CLOCK_OLD,
    msr::KVM_SYSTEM_TIME_OLD,
    msr::KVM_WALL_CLOCK,
    msr::KVM_SYSTEM_TIME,
    msr::KVM_STEAL_TIME,
    msr::KVM_END_OF_INTERRUPT,
    msr::FEATURE_CONTROL,
    msr::DEBUG_CONTROL,
];

/// The leaves in which two states differ, but for those that move by themselves.
pub fn differences(first: &VcpuState, second: &VcpuState) -> Vec<String> {
    let found = first.differences(second);
    found.iter().filter(|d| !is_fixed(&d.path)).map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_of_the_table_has_a_value_of_its_own() {
        let reset = VcpuState::reset().leaves();
        let left = LEFT_AT_RESET.map(|n| format!("msrs.{}", Msrs::name(n).unwrap()));
        let same: Vec<_> = reset
            .into_iter()
            .zip(whole_state(true).leaves())
            .filter(|(reset, whole)| reset == whole)
            .map(|((path, _), _)| path)
            .filter(|path| !is_fixed(path) && !left.contains(path))
            .collect();
        assert_eq!(same, ["lapic.tsc_deadline"], "which is armed in tests of its own");
    }
}
