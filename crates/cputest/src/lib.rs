//! Proof of the CPU engines, written only against the `engine` contract.
//!
//! - *The CPU against the CPU* ([`sweep`]): every instruction form runs natively ([`native`]) and
//!   in a guest ([`guest`]), and all that a program can see must be equal.
//! - *Micro-tests* (`tests/`): small guests made with [`machine`] and [`layout`] for what only a
//!   whole machine shows, on each engine ([`on_each_engine!`]). [`limits`] names those that this
//!   host's KVM cannot pass.
// All of this crate is test code: a failed expectation is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod aim;
pub mod campaign;
pub mod case;
pub mod compare;
pub mod coverage;
pub mod forms;
pub mod fuzz;
pub mod generate;
pub mod guest;
pub mod layout;
pub mod limits;
pub mod lockstep;
pub mod machine;
pub mod micro;
pub mod native;
pub mod redzone;
pub mod rng;
pub mod sweep;
pub mod under_test;
pub mod values;
pub mod whole_state;
