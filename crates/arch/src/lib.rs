//! x86-64 facts and the engine-neutral state of a virtual CPU.
//!
//! Everything here is plain data: no operating system, no engine, no device. Start with
//! [`state`], whose table lists what any engine can take over from any other; [`address`] keeps the
//! address spaces apart; [`cpuid`] is the model of the CPU that a guest sees; [`registers`] and
//! [`msr`] name the bits.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod address;
pub mod cpuid;
pub mod msr;
pub mod registers;
pub mod state;

pub use address::{GuestPhysical, GuestVirtual};
pub use cpuid::{CpuModel, CpuidEntry};
pub use state::{
    Avx512State, DescriptorTable, Element, Event, FpuState, InterruptShadow, LapicState, MpState,
    Msrs, Segment, SegmentName, Segments, StateHolder, VcpuState,
};
