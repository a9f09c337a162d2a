//! How long the software engine takes for a guest instruction that it has not seen before, and for
//! one that it has translated: `scripts/bench` compares both with another commit.
// Benchmarks fail as tests do.
#![allow(clippy::unwrap_used)]
#![allow(missing_docs)]
use arch::registers::{cr0, cr4, efer};
use arch::{GuestPhysical, Segment, SegmentName, VcpuState};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::{Engine, GuestMemory, Halt, Kick, VcpuIo, VmConfig};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const TABLES: u64 = 0x1000;
const STACK: u64 = 0x7000;
const DATA: u64 = 0x8000;
const MAIN: u64 = 0x10_0000;
const FUNCTIONS: u64 = 0x20_0000;
const COUNT: u64 = 2000;

/// The instructions of one function as compilers make them; N stands for its number.
fn function(n: u32) -> Vec<Vec<u8>> {
    let with_number = |opcode: &[u8]| [opcode, &n.to_le_bytes()].concat();
    [
        &[0x53][..],                     // push rbx
        &[0x48, 0x83, 0xec, 0x20],       // sub rsp, 32
        &[0x48, 0x89, 0xfb],             // mov rbx, rdi
        &[0x8b, 0x47, 0x08],             // mov eax, [rdi+8]
        &[0x48, 0x8b, 0x57, 0x10],       // mov rdx, [rdi+16]
        &[0x8d, 0x04, 0x40],             // lea eax, [rax+rax*2]
        &with_number(&[0x05]),           // add eax, N
        &[0x31, 0xd0],                   // xor eax, edx
        &[0x89, 0x43, 0x18],             // mov [rbx+24], eax
        &[0x48, 0x85, 0xdb],             // test rbx, rbx
        &[0x74, 0x05],                   // jz over the next, not taken
        &with_number(&[0xb9]),           // mov ecx, N
        &[0x41, 0x89, 0xc8],             // mov r8d, ecx
        &[0x49, 0xc1, 0xe0, 0x04],       // shl r8, 4
        &[0x4c, 0x89, 0x44, 0x24, 0x08], // mov [rsp+8], r8
        &[0x0f, 0xb6, 0x4f, 0x01],       // movzx ecx, byte [rdi+1]
        &[0x44, 0x0f, 0xaf, 0xc1],       // imul r8d, ecx
        &[0x4c, 0x03, 0x44, 0x24, 0x08], // add r8, [rsp+8]
        &[0x4d, 0x89, 0xc6],             // mov r14, r8
        &[0x41, 0x83, 0xfe, 0x07],       // cmp r14d, 7
        &[0x0f, 0x94, 0xc0],             // setz al
        &[0x66, 0x0f, 0x6e, 0xc0],       // movd xmm0, eax
        &[0x66, 0x0f, 0xfe, 0xc0],       // paddd xmm0, xmm0
        &[0x48, 0x83, 0xc4, 0x20],       // add rsp, 32
        &[0x5b],                         // pop rbx
        &[0xc3],                         // ret
    ]
    .map(<[u8]>::to_vec)
    .to_vec()
}

/// Passes of the guest after the first, in which it meets nothing new.
const WARM_PASSES: u32 = 20;

/// Notes the time of each port write, with which a pass ends, and stops the guest at the last.
struct Passes {
    ends: Mutex<Vec<Instant>>,
    kick: Arc<dyn Kick>,
}

impl VcpuIo for Passes {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {
        let mut ends = self.ends.lock().unwrap();
        ends.push(Instant::now());
        if ends.len() > WARM_PASSES as usize {
            self.kick.kick();
        }
    }
    fn mmio_read(&self, _: GuestPhysical, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: GuestPhysical, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}

/// A guest in 64-bit mode that calls each function once in a pass, for ever.
struct Guest {
    memory: Arc<GuestMemory>,
    state: VcpuState,
    instructions: u64,
}

impl Guest {
    fn new() -> Self {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap());
        // One 2 MiB page after the other, linear = physical.
        for (at, entry) in [(0, TABLES + 0x1003), (0x1000, TABLES + 0x2003)] {
            memory.write_obj(entry, GuestAddress(TABLES + at)).unwrap();
        }
        for n in 0..8u64 {
            let entry = n << 21 | 0x83;
            memory.write_obj(entry, GuestAddress(TABLES + 0x2000 + 8 * n)).unwrap();
        }
        let mut at = FUNCTIONS;
        let (mut main, mut instructions) = (Vec::new(), 0);
        for n in 0..COUNT {
            let function = function(n as u32);
            let after = MAIN + main.len() as u64 + 5;
            main.push(0xe8);
            main.extend(((at - after) as u32).to_le_bytes());
            instructions += 1 + function.len() as u64;
            let code = function.concat();
            memory.write_slice(&code, GuestAddress(at)).unwrap();
            at = (at + code.len() as u64).next_multiple_of(16);
        }
        // OUT F4H, AL; JMP to the start.
        main.extend([0xe6, 0xf4, 0xe9]);
        main.extend((-(main.len() as i32 + 4)).to_le_bytes());
        memory.write_slice(&main, GuestAddress(MAIN)).unwrap();
        let mut state = VcpuState::reset();
        state.cr0 = cr0::PE | cr0::PG | cr0::MP | cr0::NE;
        state.cr3 = TABLES;
        state.cr4 = cr4::PAE | cr4::OSFXSR;
        state.efer = efer::LME | efer::LMA;
        state.rip = MAIN;
        state.gpr[4] = STACK;
        state.gpr[7] = DATA;
        state.segments.regs = [Segment::flat(0x10, 0xc093); 6];
        state.segments[SegmentName::Cs] = Segment::flat(0x08, 0xa09b);
        Self { memory, state, instructions }
    }

    /// Runs the guest on a new vCPU: how long the first pass took, and one of the others.
    fn run(&self) -> [Duration; 2] {
        let engine = soft::SoftEngine::new().unwrap();
        let config = VmConfig {
            memory: self.memory.clone(),
            read_only: Vec::new(),
            cpu: engine.host_cpu(),
            vcpus: 1,
        };
        let vm = engine.create_vm(config).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut state = self.state.clone();
        state.lapic = vcpu.state().unwrap().lapic;
        vcpu.set_state(&state).unwrap();
        let passes = Passes { ends: Mutex::default(), kick: vcpu.kicker() };
        let start = Instant::now();
        assert_eq!(vcpu.run(&passes).unwrap(), Halt::Kicked);
        let ends = passes.ends.into_inner().unwrap();
        let (first, last) = (ends[0], ends[ends.len() - 1]);
        [first - start, (last - first) / WARM_PASSES]
    }
}

fn translate(criterion: &mut Criterion) {
    let guest = Guest::new();
    let mut group = criterion.benchmark_group("guest instruction");
    group.throughput(Throughput::Elements(guest.instructions)).sample_size(20);
    for (n, name) in ["cold", "warm"].into_iter().enumerate() {
        group.bench_function(name, |b| {
            b.iter_custom(|times| (0..times).map(|_| guest.run()[n]).sum());
        });
    }
    group.finish();
}

criterion_group!(benches, translate);
criterion_main!(benches);
