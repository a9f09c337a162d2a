//! Nothing that a guest or a peer does stops the NAT.
use crate::fuzz::Fuzz;

/// Kilobytes of this process in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn hostile_guests_and_peers_neither_stop_the_nat_nor_make_it_grow() {
    let before = resident();
    for seed in 0..3 {
        let mut fuzz = Fuzz::new(seed);
        for step in 0..15_000 {
            fuzz.step();
            if step % 5000 == 0 {
                fuzz.check();
            }
        }
        fuzz.check();
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 300_000, "{grown} KiB more than before");
}
