//! x86-64 facts and the engine-neutral state of a virtual CPU.
//!
//! Everything here is plain data: no operating system, no engine, no device. Start with
//! [`state`], whose table lists what any engine can take over from any other; [`address`] keeps the
//! address spaces apart; [`cpuid`] is the model of the CPU that a guest sees, [`feature`] the names
//! of what it announces, [`baseline`] the models with a name, and [`requirements`] what a state
//! needs of a model; [`registers`] and [`msr`] name the bits.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod address;
pub mod baseline;
pub mod cpuid;
pub mod feature;
pub mod feature_set;
pub mod msr;
pub mod registers;
pub mod requirements;
pub mod state;

pub use address::{GuestPhysical, GuestVirtual};
pub use baseline::Baseline;
pub use cpuid::{CpuModel, CpuidEntry};
pub use feature::{Feature, Register, Word};
pub use feature_set::FeatureSet;
pub use state::{
    Avx512State, DescriptorTable, Element, Event, FpuState, InDelivery, InterruptShadow,
    LapicState, MpState, Msrs, Segment, SegmentName, Segments, StateHolder, VcpuState,
};
