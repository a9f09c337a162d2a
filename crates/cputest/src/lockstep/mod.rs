//! Guests that move between engines, against guests that stay on one.
//!
//! [`program`] makes a guest from a seed: generated instructions in slots of equal size, with a
//! breakpoint in some of them. An exception is noted and goes on with the next slot. [`pair`] holds
//! a vCPU of each engine over the same memory, and runs the guest on one of them, or moves it at
//! breakpoints and after any number of single steps. Events on the way, registers and memory must
//! be the same however it ran.
//!
//! User code covers a KVM that runs it natively, kernel code one that emulates it.
pub mod pair;
pub mod program;
pub mod ran;
mod unfit;

use crate::rng::Rng;
use pair::{Pair, Place};
use program::{Kind, Program};
use std::ops::AddAssign;

/// What became of one guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Exceptions that its code raised.
    pub events: usize,
    /// Moves from one engine to the other.
    pub moves: usize,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.events += other.events;
        self.moves += other.moves;
    }
}

/// Runs the guest of a seed on each engine alone and on both in turn.
///
/// # Errors
/// Says what differs, with the program.
pub fn check(pair: &mut Pair, kind: Kind, seed: u64) -> Result<Tally, String> {
    let mut rng = Rng::new(seed);
    let program = Program::generate(kind, pair.is_emulated(), &mut rng);
    let explain = |what: String| format!("seed {seed}, {kind:?}: {what}\n{}", program.listing());
    let alone = pair.run(&program, Place::soft).map_err(|e| explain(format!("soft: {e}")))?;
    let on_kvm = pair.run(&program, Place::kvm).map_err(|e| explain(format!("kvm: {e}")))?;
    let found = alone.differences(&on_kvm, pair.is_emulated());
    if !found.is_empty() {
        return Err(explain(format!("soft and KVM alone differ:\n    {}", found.join("\n    "))));
    }
    let mut turn = rng.chance(50);
    let moving = pair.run(&program, || {
        turn = !turn;
        if turn { Place::kvm() } else { Place::soft_for(&mut rng) }
    });
    let moving = moving.map_err(|e| explain(format!("moving: {e}")))?;
    let found = alone.differences(&moving, pair.is_emulated());
    if !found.is_empty() {
        let trail = format!("alone and moving ({:?}) differ", moving.trail);
        return Err(explain(format!("{trail}:\n    {}", found.join("\n    "))));
    }
    Ok(Tally { events: alone.events.len(), moves: moving.trail.len() - 1 })
}
