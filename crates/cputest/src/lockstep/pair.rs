//! A vCPU of each engine over the same memory.
use super::program::{Kind, Program, SLOT, START};
use super::ran::{Event, Ran};
use crate::case::{CODE, Case, DATA, DATA_SIZE, READ_ONLY, USER_CODE32, USER_CODE64, USER_DATA};
use crate::layout::{
    PageTables, Paging, descriptor, gate64, page, read, read_u64, write, write_u64,
};
use crate::machine::Watchdog;
use crate::micro::assemble;
use crate::rng::Rng;
use crate::under_test::EngineUnderTest;
use arch::registers::{cr0, cr4, efer};
use arch::{DescriptorTable, GuestPhysical, Segment, SegmentName, VcpuState};
use engine::{Engine, EngineError, GuestMemory, Halt, Kick, Vcpu, VcpuIo, Vm, VmConfig};
use iced_x86::code_asm::*;
use kvm::HostKvm;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::GuestAddress;

/// Bytes of RAM.
const RAM: u64 = 2 << 20;
/// Linear address of guest-physical 0 for the guest's kernel.
const KERNEL: u64 = 0xffff_8000_0000_0000;
// Guest-physical addresses.
const GDT: u64 = 0x1000;
const TSS: u64 = 0x2000;
const IDT: u64 = 0x3000;
const STUBS: u64 = 0x4000;
const STUB: u64 = 0x40;
/// Top of the stack of all handlers.
const STACK: u64 = 0x6000;
/// Where the handler of #PF leaves CR2.
const CR2: u64 = 0x6800;
const TABLES: u64 = 0x1_0000;
const CODE_FRAMES: u64 = 0x10_0000;
const DATA_FRAMES: [u64; 2] = [0x11_0000, 0x11_3000];
const READ_ONLY_FRAME: u64 = 0x11_6000;
/// Port of the handler for vector 0; the others follow.
const PORT: u16 = 0x80;
const BREAKPOINT: u16 = 3;
const KERNEL_CODE: u16 = 0x10;
const KERNEL_DATA: u16 = 0x18;
/// Events after which a guest is not what it was made as.
const EVENTS: usize = 1000;

/// Notes exceptions, and stops the guest at breakpoints.
struct Io {
    memory: Arc<GuestMemory>,
    kickers: [Arc<dyn Kick>; 2],
    finished: AtomicBool,
    events: Mutex<Vec<Event>>,
    unexpected: Mutex<Option<String>>,
}

impl Io {
    fn stop(&self) {
        self.kickers.iter().for_each(|kicker| kicker.kick());
    }
    fn fail(&self, what: String) {
        *self.unexpected.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
        self.stop();
    }
    fn event(&self, vector: u16) -> Event {
        let word = |n: u64| read_u64(&self.memory, STACK - 8 * n);
        let with_error = matches!(vector, 8 | 10..=14 | 17 | 21);
        Event {
            vector,
            error: if with_error { word(6) } else { 0 },
            cr2: if vector == 14 { read_u64(&self.memory, CR2) } else { 0 },
            rip: word(5),
            cs: word(4) & 0xffff,
            rflags: word(3),
            rsp: word(2),
            ss: word(1) & 0xffff,
        }
    }
}

impl VcpuIo for Io {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.fail(format!("IN from port {port:#x}"));
        data.fill(0);
    }
    fn pio_write(&self, port: u16, _: &[u8]) {
        let vector = port.wrapping_sub(PORT);
        if vector >= 32 {
            return self.fail(format!("OUT to port {port:#x}"));
        }
        let event = self.event(vector);
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(event);
        if vector == BREAKPOINT && event.rip == Program::end() {
            self.finished.store(true, Ordering::SeqCst);
            self.stop();
        } else if events.len() > EVENTS {
            self.fail("exceptions without end".into());
        } else if vector == BREAKPOINT {
            self.stop();
        }
    }
    fn mmio_read(&self, address: GuestPhysical, data: &mut [u8]) {
        self.fail(format!("a device read at {address:?}"));
        data.fill(0);
    }
    fn mmio_write(&self, address: GuestPhysical, _: &[u8]) {
        self.fail(format!("a device write at {address:?}"));
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.fail(format!("the end of interrupt {vector:#x}"));
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}

/// Where a guest runs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the software engine, to the next breakpoint or for a number of single steps.
    Soft(Option<u64>),
    /// On KVM, to the next breakpoint.
    Kvm,
}

impl Place {
    /// On the software engine, to the next breakpoint.
    pub fn soft() -> Self {
        Self::Soft(None)
    }
    /// On the software engine, for a random number of instructions or to the next breakpoint.
    pub fn soft_for(rng: &mut Rng) -> Self {
        Self::Soft(rng.chance(50).then(|| rng.below(40)))
    }
    /// On KVM, to the next breakpoint.
    pub fn kvm() -> Self {
        Self::Kvm
    }
    fn index(self) -> usize {
        usize::from(self == Self::Kvm)
    }
}

/// The two vCPUs.
pub struct Pair {
    memory: Arc<GuestMemory>,
    vcpus: [Box<dyn Vcpu>; 2],
    io: Io,
    base: VcpuState,
    watchdog: Watchdog,
    emulated: bool,
    _vms: [Arc<dyn Vm>; 2],
}

impl Pair {
    /// Makes both VMs over one memory, each with the CPU that its engine offers here.
    ///
    /// # Errors
    /// Fails where an engine does.
    pub fn new(kvm: &dyn Engine) -> Result<Self, EngineError> {
        let soft = EngineUnderTest::Soft.make_precise()?;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM as usize)])
            .map_err(|e| EngineError::Unsupported(format!("guest memory: {e}")))?;
        let memory = Arc::new(memory);
        let vm = |engine: &dyn Engine| {
            let cpu = engine.host_cpu();
            let (memory, read_only) = (memory.clone(), Vec::new());
            engine.create_vm(VmConfig { memory, read_only, cpu, vcpus: 1 })
        };
        let vms = [vm(soft.as_ref())?, vm(kvm)?];
        let mut vcpus = [vms[0].create_vcpu(0)?, vms[1].create_vcpu(0)?];
        let root = map(&memory);
        write_tables(&memory);
        let base = base_state(vcpus[0].state()?, root);
        let kickers = [vcpus[0].kicker(), vcpus[1].kicker()];
        let io = Io {
            memory: memory.clone(),
            kickers: kickers.clone(),
            finished: AtomicBool::new(false),
            events: Mutex::default(),
            unexpected: Mutex::default(),
        };
        let watchdog = Watchdog::new(kickers.to_vec());
        let emulated = !HostKvm::probe().is_hardware_backed();
        Ok(Self { memory, vcpus, io, base, watchdog, emulated, _vms: vms })
    }

    /// Whether KVM has no hardware behind it.
    pub fn is_emulated(&self) -> bool {
        self.emulated
    }

    /// Runs a guest to its end; `place` says where it starts, and where it goes on each time that
    /// it stops.
    ///
    /// # Errors
    /// An engine gave up, or the guest did something that it was not made for.
    pub fn run(
        &mut self,
        program: &Program,
        mut place: impl FnMut() -> Place,
    ) -> Result<Ran, String> {
        self.load(program);
        let mut state = self.start(program);
        let mut trail: Vec<Place> = Vec::new();
        while !self.io.finished.load(Ordering::SeqCst) {
            let next = place();
            if trail.last().is_none_or(|last| last.index() != next.index()) {
                let vcpu = &mut self.vcpus[next.index()];
                vcpu.set_state(&state).map_err(|e| format!("{next:?} takes no state: {e}"))?;
            }
            trail.push(next);
            self.watchdog.begin(|| format!("{next:?} after {} moves", trail.len()));
            let result = self.stretch(next);
            if self.watchdog.end() {
                return Err(format!("{next:?} hangs"));
            }
            result?;
            let vcpu = &mut self.vcpus[next.index()];
            state = vcpu.state().map_err(|e| format!("{next:?} gives no state: {e}"))?;
        }
        let mut data = vec![0; DATA_SIZE];
        for (frame, part) in DATA_FRAMES.iter().zip(data.chunks_exact_mut(0x1000)) {
            read(&self.memory, *frame, part);
        }
        let events = std::mem::take(&mut *self.io.events.lock().map_err(|e| e.to_string())?);
        Ok(Ran { events, trail, state, data })
    }

    /// Runs to where the guest stops next.
    fn stretch(&mut self, place: Place) -> Result<(), String> {
        let (vcpu, io) = (&mut self.vcpus[place.index()], &self.io);
        let failed = |e: EngineError| format!("{place:?}: {e}");
        let halt = match place {
            Place::Soft(Some(steps)) => {
                let stepper = vcpu.stepper().ok_or("the software engine cannot step")?;
                let step = |_| stepper.step(io).transpose();
                (0..steps).find_map(step).transpose().map_err(failed)?
            }
            _ => Some(vcpu.run(io).map_err(failed)?),
        };
        // A kick is meant for the vCPU that runs, and may still wait for it or for the other.
        for vcpu in &mut self.vcpus {
            vcpu.kicker().kick();
            vcpu.run(io).map_err(failed)?;
        }
        let mut unexpected = io.unexpected.lock().map_err(|e| e.to_string())?;
        match (unexpected.take(), halt) {
            (Some(what), _) => Err(format!("{place:?}: {what}")),
            (None, Some(Halt::TripleFault)) => Err(format!("{place:?}: triple fault")),
            (None, _) => Ok(()),
        }
    }

    fn load(&self, program: &Program) {
        write(&self.memory, CODE_FRAMES + (START - CODE), &program.code);
        let Case { data, read_only, .. } = &program.start;
        for (frame, part) in DATA_FRAMES.iter().zip(data.chunks_exact(0x1000)) {
            write(&self.memory, *frame, part);
        }
        write(&self.memory, READ_ONLY_FRAME, read_only);
        write(&self.memory, STACK - 0x100, &[0; 0x100]);
        write_u64(&self.memory, CR2, 0);
        self.io.finished.store(false, Ordering::SeqCst);
        self.io.events.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn start(&self, program: &Program) -> VcpuState {
        let (mut state, case) = (self.base.clone(), &program.start);
        state.gpr = case.gpr;
        state.rip = case.rip;
        state.rflags = case.rflags;
        state.fpu = case.fpu.clone();
        state.fpu.0[512..576].fill(0);
        state.fpu.0[512] = 7;
        let (code, data) = match program.kind {
            Kind::User64 => (Segment::flat(USER_CODE64, 0xa0fb), Segment::flat(USER_DATA, 0xc0f3)),
            Kind::User32 => (Segment::flat(USER_CODE32, 0xc0fb), Segment::flat(USER_DATA, 0xc0f3)),
            Kind::Kernel64 => {
                (Segment::flat(KERNEL_CODE, 0xa09b), Segment::flat(KERNEL_DATA, 0xc093))
            }
        };
        state.segments.regs = [data; 6];
        state.segments[SegmentName::Cs] = code;
        if program.kind == Kind::User64 {
            // As in a process of Linux, whose selectors native user code sees.
            for name in [SegmentName::Es, SegmentName::Ds] {
                state.segments[name] = Segment::default();
            }
        }
        if program.kind.wide() {
            for (name, base) in [SegmentName::Fs, SegmentName::Gs].into_iter().zip(case.fs_gs) {
                state.segments[name] = Segment { base, ..Segment::default() };
            }
        }
        state
    }
}

/// Maps kernel, code and data; returns what CR3 holds.
fn map(memory: &GuestMemory) -> u64 {
    let mut tables = PageTables::new(Paging::Four, TABLES);
    tables.map_large(memory, KERNEL, 0, page::P | page::W);
    for n in 0..2u64 {
        tables.map(memory, CODE + 0x1000 * n, CODE_FRAMES + 0x1000 * n, page::P | page::U);
    }
    let data = page::P | page::U | page::NX;
    for (n, frame) in (0u64..).zip(DATA_FRAMES) {
        tables.map(memory, DATA + 0x1000 * n, frame, data | page::W);
    }
    tables.map(memory, READ_ONLY, READ_ONLY_FRAME, data);
    tables.root()
}

/// The descriptors at Linux's places, and a handler for each exception, on a stack of its own.
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
        descriptor((KERNEL + TSS) as u32, 0x67, 0x008b),
        (KERNEL + TSS) >> 32,
    ];
    for (n, value) in (0u64..).zip(descriptors) {
        write_u64(memory, GDT + 8 * n, value);
    }
    write_u64(memory, TSS + 4, KERNEL + STACK);
    write_u64(memory, TSS + 0x24, KERNEL + STACK);
    write(memory, TSS + 0x66, &0x68u16.to_le_bytes());
    for vector in 0..32u16 {
        let stub = STUBS + STUB * u64::from(vector);
        let code = assemble(64, KERNEL + stub, |a| handler(a, vector));
        assert!(code.len() as u64 <= STUB, "the handler of {vector} has {} bytes", code.len());
        write(memory, stub, &code);
        let dpl = if vector == BREAKPOINT { 3 } else { 0 };
        let [low, high] = gate64(KERNEL_CODE, KERNEL + stub, 14, dpl, 1);
        write_u64(memory, IDT + 16 * u64::from(vector), low);
        write_u64(memory, IDT + 16 * u64::from(vector) + 8, high);
    }
}

/// Tells the machine, and goes on with the next slot (after a breakpoint, behind it).
fn handler(a: &mut CodeAssembler, vector: u16) -> Result<(), iced_x86::IcedError> {
    if vector == 14 {
        a.push(rax)?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(KERNEL + CR2), rax)?;
        a.pop(rax)?;
    }
    a.db(&[0xe6, (PORT + vector) as u8])?;
    if vector != BREAKPOINT {
        if matches!(vector, 8 | 10..=14 | 17 | 21) {
            a.lea(rsp, qword_ptr(rsp + 8))?;
        }
        a.and(qword_ptr(rsp), -(SLOT as i32))?;
        a.add(qword_ptr(rsp), SLOT as i32)?;
    }
    a.iretq()
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
    state.gdtr = DescriptorTable { base: KERNEL + GDT, limit: 10 * 8 - 1 };
    state.idtr = DescriptorTable { base: KERNEL + IDT, limit: 32 * 16 - 1 };
    state.segments.ldtr = Segment { selector: 0, base: 0, limit: 0, attributes: 0 };
    state.segments.tr =
        Segment { selector: 0x40, base: KERNEL + TSS, limit: 0x67, attributes: 0x8b };
    state
}
