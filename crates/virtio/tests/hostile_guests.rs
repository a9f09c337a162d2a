//! No guest makes a device panic or hang.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#[path = "hostile/mod.rs"]
mod hostile;

#[test]
fn hostile_guests_fail_their_devices_at_most() {
    hostile::count_panics();
    for seed in 0..60 {
        hostile::attack(seed, 10);
    }
}
