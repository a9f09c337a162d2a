//! The subject: runs one instruction at a time in the engine under test.
//!
//! The guest imitates a Linux process: the same selectors, the same linear addresses, CPL 3 with
//! IOPL 0. Each case ends in an exception, whose handler writes the vector to a port, which ends
//! the run before it has changed a register.
use crate::case::{
    CODE, Case, DATA, Outcome, READ_ONLY, STOP, USER_CODE32, USER_CODE64, USER_DATA,
};
use crate::layout::{
    PageTables, Paging, descriptor, gate64, page, read, read_u64, write, write_u64,
};
use crate::machine::{Recorder, Watchdog, make_vm};
use crate::under_test::EngineUnderTest;
use arch::registers::{cr0, cr4, efer, gpr, rflags};
use arch::{DescriptorTable, FpuState, GuestPhysical, Segment, SegmentName, VcpuState};
use engine::{EngineError, GuestMemory, Halt, Kick, Vcpu, VcpuIo, Vm};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Linear address of guest-physical 0 for the guest's kernel: Linux too keeps to the upper half.
const KERNEL: u64 = 0xffff_8000_0000_0000;
// Guest-physical addresses.
const GDT: u64 = 0x1000;
const TSS: u64 = 0x2000;
const IDT: u64 = 0x3000;
const STUBS: u64 = 0x4000;
const STACK: u64 = 0x6000;
const TABLES: u64 = 0x1_0000;
/// Frames of the code pages, of the data pages and of the read-only page: neighbours in linear
/// space, strangers in physical space.
const CODE_FRAMES: [u64; 2] = [0x10_0000, 0x10_3000];
const DATA_FRAMES: [u64; 2] = [0x11_0000, 0x11_3000];
const READ_ONLY_FRAME: u64 = 0x11_6000;
/// Port of the handler for vector 0; the others follow.
const PORT: u16 = 0x80;
/// What [`Outcome::vector`] says after a triple fault.
pub const TRIPLE_FAULT: u64 = 0x1000;
/// What it says when the watchdog had to stop the guest.
pub const HANG: u64 = 0x1001;

struct Io {
    vector: AtomicU64,
    kicker: Arc<dyn Kick>,
    unexpected: Recorder,
}

impl VcpuIo for Io {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.unexpected.pio_read(port, data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        if (PORT..PORT + 32).contains(&port) {
            self.vector.store(u64::from(port - PORT), Ordering::SeqCst);
            self.kicker.kick();
        } else {
            self.unexpected.pio_write(port, data);
        }
    }
    fn mmio_read(&self, address: GuestPhysical, data: &mut [u8]) {
        self.unexpected.mmio_read(address, data);
    }
    fn mmio_write(&self, address: GuestPhysical, data: &[u8]) {
        self.unexpected.mmio_write(address, data);
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.unexpected.end_of_interrupt(vector);
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}

/// A vCPU of the engine under test, ready to run cases.
pub struct GuestCpu {
    memory: Arc<GuestMemory>,
    vcpu: Box<dyn Vcpu>,
    io: Io,
    base: VcpuState,
    watchdog: Watchdog,
    _vm: Arc<dyn Vm>,
}

impl GuestCpu {
    /// Makes the VM.
    ///
    /// # Errors
    /// Fails where the engine does.
    pub fn new(engine: EngineUnderTest) -> Result<Self, EngineError> {
        let (vm, memory) = make_vm(engine.make_precise()?.as_ref(), 2 << 20, 1)?;
        let mut vcpu = vm.create_vcpu(0)?;
        let mut tables = PageTables::new(Paging::Four, TABLES);
        tables.map_large(&memory, KERNEL, 0, page::P | page::W);
        for (n, frame) in (0u64..).zip(CODE_FRAMES) {
            tables.map(&memory, CODE + 0x1000 * n, frame, page::P | page::U);
            write(&memory, frame, &[STOP; 0x1000]);
        }
        let data = page::P | page::W | page::U | page::NX;
        for (n, frame) in (0u64..).zip(DATA_FRAMES) {
            tables.map(&memory, DATA + 0x1000 * n, frame, data);
        }
        tables.map(&memory, READ_ONLY, READ_ONLY_FRAME, page::P | page::U | page::NX);
        write_tables(&memory);
        let base = base_state(vcpu.state()?, tables.root());
        let kicker = vcpu.kicker();
        let io = Io {
            vector: AtomicU64::new(0),
            kicker: kicker.clone(),
            unexpected: Recorder::default(),
        };
        Ok(Self { memory, vcpu, io, base, watchdog: Watchdog::new(vec![kicker]), _vm: vm })
    }

    /// Runs one case.
    ///
    /// # Errors
    /// Fails where the engine gives up.
    pub fn run(&mut self, case: &Case) -> Result<Outcome, EngineError> {
        self.place(case, case.code());
        for (frame, page) in DATA_FRAMES.iter().zip(case.data.chunks_exact(0x1000)) {
            write(&self.memory, *frame, page);
        }
        write(&self.memory, READ_ONLY_FRAME, &case.read_only);
        write(&self.memory, STACK - 0x100, &[0; 0x100]);
        self.vcpu.set_state(&self.start(case))?;
        self.io.vector.store(TRIPLE_FAULT, Ordering::SeqCst);
        self.watchdog.begin(|| format!("{:02x?}", case.code()));
        let halt = self.vcpu.run(&self.io);
        let fired = self.watchdog.end();
        let state = self.vcpu.state()?;
        self.place(case, &[STOP; 16][..case.length]);
        let mut outcome = self.outcome(&state);
        match halt? {
            Halt::TripleFault => outcome.vector = TRIPLE_FAULT,
            Halt::Kicked if fired => outcome.vector = HANG,
            Halt::Kicked | Halt::Debug(_) => {}
        }
        Ok(outcome)
    }

    fn place(&self, case: &Case, bytes: &[u8]) {
        for (address, byte) in (case.rip..).zip(bytes) {
            let offset = address - CODE;
            if let Some(frame) = CODE_FRAMES.get((offset >> 12) as usize) {
                write(&self.memory, frame + (offset & 0xfff), &[*byte]);
            }
        }
    }

    fn start(&self, case: &Case) -> VcpuState {
        let mut state = self.base.clone();
        state.gpr = case.gpr;
        state.rip = case.rip;
        state.rflags = case.rflags;
        state.fpu = case.fpu.clone();
        state.fpu.0[512..576].fill(0);
        state.fpu.0[512] = 7;
        if case.wide {
            state.segments[SegmentName::Fs].base = case.fs_gs[0];
            state.segments[SegmentName::Gs].base = case.fs_gs[1];
        } else {
            state.segments[SegmentName::Cs] = Segment::flat(USER_CODE32, 0xc0fb);
        }
        state
    }

    /// Collects what the handler found: the frame on its stack, and registers it did not touch.
    fn outcome(&self, state: &VcpuState) -> Outcome {
        let mut outcome = Outcome::empty();
        let word = |n: u64| read_u64(&self.memory, STACK - 8 * n);
        outcome.vector = self.io.vector.load(Ordering::SeqCst);
        let with_error = matches!(outcome.vector, 8 | 10..=14 | 17 | 21);
        outcome.error = if with_error { word(6) } else { 0 };
        outcome.cr2 = if outcome.vector == 14 { state.cr2 } else { 0 };
        outcome.rip = word(5);
        outcome.rflags = word(3);
        outcome.gpr = state.gpr;
        outcome.gpr[gpr::RSP] = word(2);
        for name in SegmentName::ALL {
            outcome.selectors[name as usize] = state.segments[name].selector;
        }
        outcome.selectors[SegmentName::Cs as usize] = word(4) as u16;
        outcome.selectors[SegmentName::Ss as usize] = word(1) as u16;
        outcome.fs_gs = [SegmentName::Fs, SegmentName::Gs].map(|s| state.segments[s].base);
        outcome.fpu = FpuState(state.fpu.0);
        for (frame, page) in DATA_FRAMES.iter().zip(outcome.data.chunks_exact_mut(0x1000)) {
            read(&self.memory, *frame, page);
        }
        outcome
    }
}

/// The descriptors at Linux's places, an interrupt gate for each vector, and the task state.
fn write_tables(memory: &GuestMemory) {
    let descriptors = [
        0,
        descriptor(0, 0xfffff, 0xc09b),
        descriptor(0, 0xfffff, 0xa09b),
        descriptor(0, 0xfffff, 0xc093),
        descriptor(0, 0xfffff, 0xc0fb),
        descriptor(0, 0xfffff, 0xc0f3),
        descriptor(0, 0xfffff, 0xa0fb),
        0,
        // The I/O permission bitmap lies beyond the limit: user code has no ports.
        descriptor((KERNEL + TSS) as u32, 0x67, 0x008b),
        (KERNEL + TSS) >> 32,
    ];
    for (n, value) in (0u64..).zip(descriptors) {
        write_u64(memory, GDT + 8 * n, value);
    }
    write(memory, TSS, &[0; 0x68]);
    write_u64(memory, TSS + 4, KERNEL + STACK);
    write(memory, TSS + 0x66, &0x68u16.to_le_bytes());
    for vector in 0..256u64 {
        let number = if vector < 32 { vector } else { 0 };
        let stub = STUBS + 16 * number;
        // OUT of AL to the port of this vector, then stand still.
        write(memory, stub, &[0xe6, (u64::from(PORT) + number) as u8, 0xeb, 0xfe]);
        let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let [low, high] = gate64(0x10, KERNEL + stub, 14, dpl, 0);
        write_u64(memory, IDT + 16 * vector, low);
        write_u64(memory, IDT + 16 * vector + 8, high);
    }
}

fn base_state(mut state: VcpuState, root: u64) -> VcpuState {
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    state.cr3 = root;
    state.cr4 = cr4::PSE
        | cr4::PAE
        | cr4::MCE
        | cr4::PGE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT
        | cr4::FSGSBASE
        | cr4::OSXSAVE
        | cr4::UMIP;
    state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    state.xcr0 = 7;
    state.rflags = rflags::FIXED;
    state.gdtr = DescriptorTable { base: KERNEL + GDT, limit: 10 * 8 - 1 };
    state.idtr = DescriptorTable { base: KERNEL + IDT, limit: 256 * 16 - 1 };
    let segments = &mut state.segments;
    segments.regs = [Segment::flat(USER_DATA, 0xc0f3); 6];
    segments[SegmentName::Cs] = Segment::flat(USER_CODE64, 0xa0fb);
    segments[SegmentName::Fs] = Segment::default();
    segments[SegmentName::Gs] = Segment::default();
    segments.ldtr = Segment { selector: 0, base: 0, limit: 0, attributes: 0x82 };
    segments.tr = Segment { selector: 0x40, base: KERNEL + TSS, limit: 0x67, attributes: 0x8b };
    state
}
