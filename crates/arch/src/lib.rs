//! x86-64 facts and the engine-neutral state of a virtual CPU.
//!
//! Everything here is plain data: no operating system, no engine, no device. Start with
//! [`VcpuState`], the state that any engine can take over from any other; [`address`] keeps the
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
    DescriptorTable, Event, FpuState, LapicState, MpState, MsrState, Segment, SegmentName,
    Segments, VcpuState,
};
