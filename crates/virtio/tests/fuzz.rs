//! Hostile drivers, from fixed seeds; `examples/fuzz_devices.rs` goes on for longer.
use virtio::testing::fuzz;

#[test]
fn no_driver_makes_a_device_panic_or_hang() {
    for (name, make) in fuzz::devices() {
        for number in 0..300 {
            // Says which it was, if this is the last line.
            println!("{name} {number}");
            fuzz::attack_by_number(make, number);
        }
    }
}
