//! How long the KVM engine takes to set a VM up: `cargo run --release -p kvm --example setup_time`.
#![allow(clippy::unwrap_used, reason = "a measurement that fails has nothing to say")]
use arch::VcpuState;
use engine::{Engine, GuestMemory, VmConfig};
use kvm::KvmEngine;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestAddress;

const ROUNDS: usize = 200;

fn main() {
    let mut open = Duration::MAX;
    let mut vm = Duration::MAX;
    let mut vcpu = Duration::MAX;
    let mut state = Duration::MAX;
    let mut all = Duration::MAX;
    for _ in 0..ROUNDS {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 512 << 20)]).unwrap();
        let memory = Arc::new(memory);
        let start = Instant::now();
        let engine = KvmEngine::new().unwrap();
        open = open.min(start.elapsed());
        let cpu = engine.host_cpu();
        let config = VmConfig { memory, read_only: Vec::new(), cpu, vcpus: 1 };
        let (made, time) = timed(|| engine.create_vm(config).unwrap());
        vm = vm.min(time);
        let (mut first, time) = timed(|| made.create_vcpu(0).unwrap());
        vcpu = vcpu.min(time);
        let boot = VcpuState::reset();
        let ((), time) = timed(|| first.set_state(&boot).unwrap());
        state = state.min(time);
        all = all.min(start.elapsed());
    }
    println!("least of {ROUNDS}, 512 MiB, one vCPU:");
    let rows = [("open", open), ("VM", vm), ("vCPU", vcpu), ("state set", state), ("all", all)];
    for (name, time) in rows {
        println!("  {name:<10} {:>5} µs", time.as_micros());
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let made = work();
    (made, start.elapsed())
}
