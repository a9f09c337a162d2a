//! Hardware task switches and virtual-8086 mode (Intel SDM 3A chapters 7 and 20), which no 64-bit
//! operating system exercises.
#![allow(clippy::unwrap_used)]
use arch::registers::rflags;
use arch::{DescriptorTable, GuestPhysical, Segment, SegmentName, VcpuState};
use engine::{Engine, GuestMemory, Halt, Kick, VcpuIo, VmConfig};
use std::sync::{Arc, OnceLock};
use vm_memory::{Bytes, GuestAddress};

const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
const TASK_A: u16 = 0x18;
const TASK_B: u16 = 0x20;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x1800;
const TSS_A: u64 = 0x2000;
const TSS_B: u64 = 0x2100;
const START: u64 = 0x8000;
/// OUT F4H, AL.
const DONE: [u8; 2] = [0xe6, 0xf4];

/// Any port write ends the run.
struct Stop(OnceLock<Arc<dyn Kick>>);

impl VcpuIo for Stop {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {
        self.0.get().unwrap().kick();
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

struct Guest {
    memory: Arc<GuestMemory>,
    state: VcpuState,
}

impl Guest {
    /// 32-bit code at privilege level 0 in task A, without paging.
    fn new() -> Self {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let mut guest = Self { memory, state: VcpuState::reset() };
        guest.u64(GDT + 8, 0x00cf_9b00_0000_ffff);
        guest.u64(GDT + 16, 0x00cf_9300_0000_ffff);
        guest.u64(GDT + 24, 0x0000_8b00_2000_0067);
        guest.u64(GDT + 32, 0x0000_8900_2100_0067);
        let state = &mut guest.state;
        state.cr0 = 0x11;
        state.rip = START;
        state.gpr[4] = 0x7000;
        state.gdtr = DescriptorTable { base: GDT, limit: 0xff };
        state.idtr = DescriptorTable { base: IDT, limit: 0x7ff };
        state.segments.regs = [Segment::flat(DATA, 0xc093); 6];
        state.segments[SegmentName::Cs] = Segment::flat(CODE, 0xc09b);
        state.segments.tr =
            Segment { selector: TASK_A, base: TSS_A, limit: 0x67, attributes: 0x8b };
        guest
    }

    fn u64(&self, at: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }
    fn u32(&self, at: u64, value: u32) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }
    fn read(&self, at: u64) -> u32 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
    fn code(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Task B as its TSS holds it: flat segments, code at 9000H.
    fn prepare_task_b(&self) {
        self.u32(TSS_B + 0x20, 0x9000);
        self.u32(TSS_B + 0x24, 2);
        self.u32(TSS_B + 0x38, 0x6000);
        for n in 0..6 {
            let selector = if n == 1 { CODE } else { DATA };
            self.u32(TSS_B + 0x48 + 4 * n, u32::from(selector));
        }
    }

    fn run(&self) -> VcpuState {
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
        let stop = Stop(OnceLock::new());
        assert!(stop.0.set(vcpu.kicker()).is_ok());
        assert_eq!(vcpu.run(&stop).unwrap(), Halt::Kicked, "{:x?}", vcpu.state());
        vcpu.state().unwrap()
    }
}

#[test]
fn a_call_to_a_task_nests_and_its_iret_comes_back() {
    let guest = Guest::new();
    guest.prepare_task_b();
    // CALL FAR 20H:0; MOV EBX, 1111H.
    guest.code(START, &[0x9a, 0, 0, 0, 0, TASK_B as u8, 0, 0xbb, 0x11, 0x11, 0, 0]);
    guest.code(START + 12, &DONE);
    // PUSHFD; POP DWORD [5000H]; MOV ECX, 2222H; IRETD.
    guest.code(0x9000, &[0x9c, 0x8f, 0x05, 0, 0x50, 0, 0, 0xb9, 0x22, 0x22, 0, 0, 0xcf]);
    let state = guest.run();
    assert_eq!((state.gpr[3], state.gpr[1], state.rip), (0x1111, 0, START + 14));
    assert_eq!(state.segments.tr.selector, TASK_A);
    assert_ne!(u64::from(guest.read(0x5000)) & rflags::NT, 0, "NT is set in a nested task");
    assert_eq!(state.rflags & rflags::NT, 0);
    assert_eq!(guest.read(TSS_B) & 0xffff, u32::from(TASK_A), "the back link");
    assert_eq!(guest.read(TSS_B + 0x2c), 0x2222, "ECX of task B");
    assert_eq!(guest.read(GDT + 0x1c) >> 8 & 0xff, 0x8b, "task A is busy");
    assert_eq!(guest.read(GDT + 0x24) >> 8 & 0xff, 0x89, "task B is not");
    assert_ne!(state.cr0 & 8, 0, "TS is set");
}

#[test]
fn a_jump_to_a_task_leaves_the_old_one_for_good() {
    let guest = Guest::new();
    guest.prepare_task_b();
    // JMP FAR 20H:0.
    guest.code(START, &[0xea, 0, 0, 0, 0, TASK_B as u8, 0]);
    guest.code(0x9000, &DONE);
    let state = guest.run();
    assert_eq!((state.segments.tr.selector, state.gpr[4]), (TASK_B, 0x6000));
    assert_eq!(guest.read(TSS_A + 0x20), START as u32 + 7, "task A resumes after its jump");
    assert_eq!(guest.read(GDT + 0x1c) >> 8 & 0xff, 0x89);
    assert_eq!(guest.read(GDT + 0x24) >> 8 & 0xff, 0x8b);
    assert_eq!(state.rflags & rflags::NT, 0);
}

#[test]
fn an_exception_through_a_task_gate_pushes_its_error_code_in_the_new_task() {
    let guest = Guest::new();
    guest.prepare_task_b();
    guest.u64(IDT + 13 * 8, 0x0000_8500_0000_0000 | u64::from(TASK_B) << 16);
    // MOV EAX, FFF0H; MOV DS, AX: a selector beyond the table.
    guest.code(START, &[0xb8, 0xf0, 0xff, 0, 0, 0x8e, 0xd8]);
    guest.code(0x9000, &DONE);
    let state = guest.run();
    assert_eq!(state.segments.tr.selector, TASK_B);
    assert_eq!((state.gpr[4], guest.read(0x5ffc)), (0x5ffc, 0xfff0));
    assert_eq!(guest.read(TSS_A + 0x20), START as u32 + 5, "task A resumes at the fault");
}

#[test]
fn a_task_whose_segment_is_busy_cannot_be_called() {
    let guest = Guest::new();
    guest.u64(IDT + 13 * 8, 0x0000_8e00_0008_a000);
    // CALL FAR 18H:0, the present task.
    guest.code(START, &[0x9a, 0, 0, 0, 0, TASK_A as u8, 0]);
    guest.code(0xa000, &DONE);
    let state = guest.run();
    assert_eq!(state.rip, 0xa002);
    assert_eq!(guest.read(state.gpr[4]), u32::from(TASK_A), "#GP names the selector");
}

/// A frame for IRETD into virtual-8086 code at 900H:0 with the given I/O privilege level.
fn enter_vm86(guest: &mut Guest, iopl: u32) {
    let frame = [0, 0x900, 0x2_0002 | iopl << 12, 0x1000, 0x600, 0x111, 0x222, 0x333, 0x444];
    for (n, word) in frame.into_iter().enumerate() {
        guest.u32(0x7000 + 4 * n as u64, word);
    }
    guest.code(START, &[0xcf]);
    guest.u32(TSS_A + 4, 0x5000);
    guest.u32(TSS_A + 8, u32::from(DATA));
    // Vector 20H for everybody, #GP for the kernel.
    guest.u64(IDT + 0x20 * 8, 0x0000_ee00_0008_a000);
    guest.u64(IDT + 13 * 8, 0x0000_8e00_0008_b000);
    guest.code(0xa000, &DONE);
    guest.code(0xb000, &DONE);
}

#[test]
fn an_interrupt_in_virtual_8086_mode_saves_all_segments_on_the_kernel_stack() {
    let mut guest = Guest::new();
    enter_vm86(&mut guest, 3);
    // MOV AX, 1234H; MOV DS, AX; INT 20H.
    guest.code(0x9000, &[0xb8, 0x34, 0x12, 0x8e, 0xd8, 0xcd, 0x20]);
    let state = guest.run();
    assert_eq!(state.rip, 0xa002);
    assert_eq!(state.segments[SegmentName::Cs].selector, CODE);
    assert_eq!(state.segments[SegmentName::Ds].selector, 0);
    assert_eq!(state.rflags & rflags::VM, 0);
    assert_eq!(state.gpr[4], 0x5000 - 36);
    let frame: Vec<u32> = (0..9).map(|n| guest.read(state.gpr[4] + 4 * n)).collect();
    assert_eq!(frame, [7, 0x900, 0x2_3002, 0x1000, 0x600, 0x111, 0x1234, 0x333, 0x444]);
}

#[test]
fn int_n_in_virtual_8086_mode_needs_iopl_3() {
    let mut guest = Guest::new();
    enter_vm86(&mut guest, 0);
    guest.code(0x9000, &[0x90, 0xcd, 0x20]);
    let state = guest.run();
    assert_eq!(state.rip, 0xb002);
    assert_eq!(guest.read(state.gpr[4]), 0, "the error code");
    assert_eq!(guest.read(state.gpr[4] + 4), 1, "the saved IP is that of INT");
}

#[test]
fn ports_in_virtual_8086_mode_go_by_the_bitmap_alone() {
    let mut guest = Guest::new();
    enter_vm86(&mut guest, 3);
    // The bitmap starts at 68H and lies beyond the TSS's limit: no port is allowed.
    guest.u32(TSS_A + 0x64, 0x68 << 16);
    guest.code(0x9000, &DONE);
    assert_eq!(guest.run().rip, 0xb002);
    // With a limit that covers port F4H and its bit clear, it is.
    guest.state.segments.tr.limit = 0x68 + 0x20;
    assert_eq!(guest.run().rip, 2);
}
