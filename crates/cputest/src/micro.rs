//! Small guests for what only a whole machine shows.
//!
//! A [`Guest`] starts in the mode that a test names, with descriptor tables, page tables and
//! stacks in place, and with a handler for every exception that stops the machine, so that a test
//! is little more than the code it runs and what it expects. Guest code reports values through
//! port [`SAY`] and ends at port [`crate::machine::DONE`].
use crate::layout::{PageTables, Paging, descriptor, gate32, gate64, page, read, write, write_u64};
use crate::machine::{Access, DONE, Recorder, Watchdog, make_vm_on};
use crate::under_test::EngineUnderTest;
use arch::registers::{cr0, cr4, efer, gpr, rflags};
use arch::{CpuModel, DescriptorTable, Segment, SegmentName, VcpuState};
use engine::{EngineError, GuestMemory, Halt, Vcpu, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

/// Port on which guest code reports values.
pub const SAY: u8 = 0xe0;
/// Port of the handler for vector 0; the others follow.
const EXCEPTION: u16 = 0x80;

/// Guest-physical (and, by default, linear) addresses.
pub mod at {
    #![allow(missing_docs)] // The names say it.
    pub const GDT: u64 = 0x1000;
    pub const LDT: u64 = 0x1800;
    pub const TSS: u64 = 0x2000;
    pub const IDT: u64 = 0x3000;
    pub const STUBS: u64 = 0x4000;
    /// Top of the stack that IST 1 names.
    pub const IST_STACK: u64 = 0x6000;
    /// Top of the stack that the TSS names for CPL 0.
    pub const RING0_STACK: u64 = 0x6800;
    /// Top of the stack on which code starts.
    pub const STACK: u64 = 0x7000;
    /// Where code starts.
    pub const CODE: u64 = 0x8000;
    pub const TABLES: u64 = 0x2_0000;
    /// Supervisor data, at least 64 KiB.
    pub const DATA: u64 = 0x8_0000;
    /// The megabyte that user code may reach.
    pub const USER: u64 = 0x10_0000;
    /// Top of the user's stack.
    pub const USER_STACK: u64 = 0x18_0000;
    /// The local APIC, mapped where paging is on.
    pub const LAPIC: u64 = 0xfee0_0000;
    /// Bytes of RAM.
    pub const RAM: u64 = 0x40_0000;
}

/// Selectors in the guest's GDT.
pub mod sel {
    #![allow(missing_docs)] // The names say it.
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE32: u16 = 0x18;
    pub const CODE16: u16 = 0x20;
    pub const DATA16: u16 = 0x28;
    pub const USER_CODE32: u16 = 0x33;
    pub const USER_DATA: u16 = 0x3b;
    pub const USER_CODE64: u16 = 0x43;
    pub const TSS: u16 = 0x48;
    pub const LDT: u16 = 0x58;
    /// The first of the descriptors that tests fill in.
    pub const FREE: u16 = 0x68;
}

/// The mode in which a guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real mode.
    Real,
    /// 16-bit protected mode without paging.
    Protected16,
    /// 32-bit protected mode without paging.
    Protected32,
    /// 32-bit protected mode with paging.
    Paged(Paging),
    /// 64-bit mode with four or five levels.
    Long(Paging),
}

impl Mode {
    /// Width of the code.
    pub fn bits(self) -> u32 {
        match self {
            Self::Real | Self::Protected16 => 16,
            Self::Protected32 | Self::Paged(_) => 32,
            Self::Long(_) => 64,
        }
    }
    /// 64-bit mode, four levels.
    pub const LONG: Self = Self::Long(Paging::Four);
}

/// An exception that nothing in the guest handled, as its frame tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The vector.
    pub vector: u8,
    /// The error code, where the vector has one.
    pub error: Option<u32>,
    /// The saved instruction pointer.
    pub rip: u64,
    /// The saved CS.
    pub cs: u16,
    /// The saved flags.
    pub rflags: u64,
    /// The saved SS:RSP, where the frame has it.
    pub stack: Option<(u16, u64)>,
}

/// Why a guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It said that it was done.
    Done,
    /// An exception.
    Exception(Exception),
    /// The CPU shut down.
    TripleFault,
    /// The watchdog's patience ended.
    Hang,
}

/// How a run ended.
#[derive(Debug)]
pub struct End {
    /// Why.
    pub stop: Stop,
    /// The first vCPU's state.
    pub state: VcpuState,
    /// What the guest said.
    pub said: Vec<u32>,
}

impl End {
    /// The exception that ended the run.
    pub fn exception(&self) -> Exception {
        match self.stop {
            Stop::Exception(exception) => exception,
            other => panic!("expected an exception, not {other:?}; {:x?}", self.state),
        }
    }
    /// Panics unless the guest reached its end; returns what it said.
    pub fn done(&self) -> &[u32] {
        assert_eq!(self.stop, Stop::Done, "said {:x?}; {:x?}", self.said, self.state);
        &self.said
    }
}

/// A machine with a test's code in it.
pub struct Guest {
    /// RAM, from 0.
    pub memory: Arc<GuestMemory>,
    /// The VM.
    pub vm: Arc<dyn Vm>,
    /// All vCPUs.
    pub vcpus: Vec<Box<dyn Vcpu>>,
    /// What it said.
    pub io: Arc<Recorder>,
    /// Where the first vCPU starts; tests may change it before [`Guest::run`].
    pub state: VcpuState,
    /// The page tables.
    pub tables: PageTables,
    mode: Mode,
    watchdog: Watchdog,
}

/// Emits code that reports EAX.
///
/// # Errors
/// Fails where the assembler does.
pub fn say(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.db(match a.bitness() {
        16 => &[0x66, 0xe7, SAY],
        _ => &[0xe7, SAY],
    })
}
/// Emits code that ends the run.
///
/// # Errors
/// Fails where the assembler does.
pub fn done(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.db(&[0xe6, DONE as u8, 0xeb, 0xfe])
}

/// Code for an address, as bytes.
///
/// # Panics
/// Where the code cannot be assembled: the test is wrong.
pub fn assemble(
    bits: u32,
    address: u64,
    code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).expect("16, 32 or 64");
    code(&mut assembler).expect("the test's code assembles");
    assembler.assemble(address).expect("the test's code assembles")
}

impl Guest {
    /// A machine with one vCPU.
    pub fn new(engine: EngineUnderTest, mode: Mode) -> Self {
        Self::with_vcpus(engine, mode, 1).expect("the engine makes a VM")
    }

    /// A machine.
    ///
    /// # Errors
    /// Fails where the engine does.
    pub fn with_vcpus(
        engine: EngineUnderTest,
        mode: Mode,
        count: u32,
    ) -> Result<Self, EngineError> {
        Self::on(engine, &engine.make()?.host_cpu(), mode, count)
    }

    /// A machine with a CPU model.
    ///
    /// # Errors
    /// As [`Self::with_vcpus`]; and the engine lacks what the model has.
    pub fn on(
        engine: EngineUnderTest,
        cpu: &CpuModel,
        mode: Mode,
        count: u32,
    ) -> Result<Self, EngineError> {
        let (vm, memory) = make_vm_on(engine.make()?.as_ref(), cpu.clone(), at::RAM, count)?;
        let mut vcpus = (0..count).map(|n| vm.create_vcpu(n)).collect::<Result<Vec<_>, _>>()?;
        let io = Arc::new(Recorder::default());
        let kickers: Vec<_> = vcpus.iter().map(|v| v.kicker()).collect();
        io.kickers.lock().expect("no test panicked").clone_from(&kickers);
        let paging = match mode {
            Mode::Paged(paging) | Mode::Long(paging) => paging,
            _ => Paging::Four,
        };
        let tables = PageTables::new(paging, at::TABLES);
        let state = vcpus[0].state()?;
        let watchdog = Watchdog::new(kickers);
        let mut guest = Self { memory, vm, vcpus, io, state, tables, mode, watchdog };
        guest.map_all();
        guest.write_descriptors();
        guest.write_handlers();
        guest.set_registers();
        Ok(guest)
    }

    fn map_all(&mut self) {
        let memory = self.memory.clone();
        for frame in (0..at::RAM).step_by(0x1000) {
            let user = if frame >> 20 == 1 { page::U } else { 0 };
            self.tables.map(&memory, frame, frame, page::P | page::W | user);
        }
        self.tables.map(&memory, at::LAPIC, at::LAPIC, page::P | page::W | 0x10);
    }

    /// Sets a descriptor of the GDT.
    pub fn descriptor(&self, selector: u16, value: u64) {
        write_u64(&self.memory, at::GDT + u64::from(selector & !7), value);
    }

    fn write_descriptors(&self) {
        let long = self.mode.bits() == 64;
        self.descriptor(sel::CODE64, descriptor(0, 0xfffff, 0xa09b));
        self.descriptor(sel::DATA, descriptor(0, 0xfffff, 0xc093));
        self.descriptor(sel::CODE32, descriptor(0, 0xfffff, 0xc09b));
        self.descriptor(sel::CODE16, descriptor(0, 0xffff, 0x009b));
        self.descriptor(sel::DATA16, descriptor(0, 0xffff, 0x0093));
        self.descriptor(sel::USER_CODE32, descriptor(0, 0xfffff, 0xc0fb));
        self.descriptor(sel::USER_DATA, descriptor(0, 0xfffff, 0xc0f3));
        self.descriptor(sel::USER_CODE64, descriptor(0, 0xfffff, 0xa0fb));
        self.descriptor(sel::TSS, descriptor(at::TSS as u32, 0x67, 0x008b));
        self.descriptor(sel::LDT, descriptor(at::LDT as u32, 0xff, 0x0082));
        write_u64(&self.memory, at::TSS + 4, at::RING0_STACK);
        if long {
            write_u64(&self.memory, at::TSS + 0x24, at::IST_STACK);
        } else {
            write(&self.memory, at::TSS + 8, &sel::DATA.to_le_bytes());
        }
        write(&self.memory, at::TSS + 0x66, &0x68u16.to_le_bytes());
    }

    /// Sets the handler of a vector; `dpl` for user code that may call it by INT.
    pub fn handler(&self, vector: u8, offset: u64, dpl: u8) {
        let n = u64::from(vector);
        match self.mode {
            Mode::Real => {
                let far = (offset as u32 & 0xf) | (offset as u32 >> 4) << 16;
                write(&self.memory, 4 * n, &far.to_le_bytes());
            }
            Mode::Protected16 => {
                let gate = gate32(sel::CODE16, offset as u32, 6, dpl, 0);
                write_u64(&self.memory, at::IDT + 8 * n, gate);
            }
            Mode::Protected32 | Mode::Paged(_) => {
                let gate = gate32(sel::CODE32, offset as u32, 14, dpl, 0);
                write_u64(&self.memory, at::IDT + 8 * n, gate);
            }
            Mode::Long(_) => self.gate64(vector, gate64(sel::CODE64, offset, 14, dpl, 0)),
        }
    }
    /// Sets a 64-bit gate.
    pub fn gate64(&self, vector: u8, [low, high]: [u64; 2]) {
        write_u64(&self.memory, at::IDT + 16 * u64::from(vector), low);
        write_u64(&self.memory, at::IDT + 16 * u64::from(vector) + 8, high);
    }

    fn write_handlers(&self) {
        for vector in 0..32u8 {
            let stub = at::STUBS + 16 * u64::from(vector);
            write(&self.memory, stub, &[0xe6, EXCEPTION as u8 + vector, 0xeb, 0xfe]);
            self.handler(vector, stub, if matches!(vector, 3 | 4) { 3 } else { 0 });
        }
    }

    fn set_registers(&mut self) {
        let state = &mut self.state;
        state.rip = at::CODE;
        state.rflags = rflags::FIXED;
        state.gpr = [0; 16];
        state.gpr[gpr::RSP] = at::STACK;
        state.gdtr = DescriptorTable { base: at::GDT, limit: 0x1ff };
        state.idtr = DescriptorTable { base: at::IDT, limit: 0xfff };
        state.cr3 = self.tables.root();
        state.cr0 = cr0::ET | cr0::NE | cr0::MP;
        state.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        state.xcr0 = 7;
        let segments = &mut state.segments;
        let (code, data) = match self.mode {
            Mode::Real => (Segment::real_mode(0), Segment::real_mode(0)),
            Mode::Protected16 => {
                let mut code = Segment::real_mode(0);
                (code.selector, code.attributes) = (sel::CODE16, 0x009b);
                (code, Segment { selector: sel::DATA16, ..Segment::real_mode(0) })
            }
            Mode::Protected32 | Mode::Paged(_) => {
                (Segment::flat(sel::CODE32, 0xc09b), Segment::flat(sel::DATA, 0xc093))
            }
            Mode::Long(_) => (Segment::flat(sel::CODE64, 0xa09b), Segment::flat(sel::DATA, 0xc093)),
        };
        segments.regs = [data; 6];
        segments[SegmentName::Cs] = code;
        segments.tr = Segment { selector: sel::TSS, base: at::TSS, limit: 0x67, attributes: 0x8b };
        segments.ldtr = Segment { selector: 0, base: 0, limit: 0, attributes: 0 };
        match self.mode {
            Mode::Real => state.idtr = DescriptorTable { base: 0, limit: 0x3ff },
            Mode::Protected16 | Mode::Protected32 => state.cr0 |= cr0::PE,
            Mode::Paged(paging) => {
                state.cr0 |= cr0::PE | cr0::PG | cr0::WP;
                state.cr4 |= if paging == Paging::Pae { cr4::PAE } else { cr4::PSE };
            }
            Mode::Long(paging) => {
                state.cr0 |= cr0::PE | cr0::PG | cr0::WP;
                state.cr4 |= cr4::PAE | cr4::PGE;
                if paging == Paging::Five {
                    state.cr4 |= cr4::LA57;
                }
                state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
            }
        }
    }

    /// Makes the first vCPU start in user mode, at the start of the user's megabyte.
    pub fn start_in_user_mode(&mut self) {
        let long = self.mode.bits() == 64;
        let code = if long { sel::USER_CODE64 } else { sel::USER_CODE32 };
        self.state.segments.regs = [Segment::flat(sel::USER_DATA, 0xc0f3); 6];
        self.state.segments[SegmentName::Cs] =
            Segment::flat(code, if long { 0xa0fb } else { 0xc0fb });
        self.state.rip = at::USER;
        self.state.gpr[gpr::RSP] = at::USER_STACK;
    }

    /// Puts code of the starting mode's width at an address.
    pub fn code(
        &self,
        address: u64,
        code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Vec<u8> {
        self.code_of(self.mode.bits(), address, code)
    }
    /// Puts code of any width at an address; returns its bytes.
    pub fn code_of(
        &self,
        bits: u32,
        address: u64,
        code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Vec<u8> {
        let bytes = assemble(bits, address, code);
        write(&self.memory, address, &bytes);
        bytes
    }

    /// Runs all vCPUs until the guest ends. The first starts from `state`, the others from where
    /// they are (waiting for a start-up IPI, unless a test set them).
    pub fn run(&mut self) -> End {
        self.io.clear();
        let (first, others) = self.vcpus.split_first_mut().expect("at least one vCPU");
        first.set_state(&self.state).expect("the engine takes the state");
        self.watchdog.begin(|| format!("{:x?}", self.state.rip));
        let io = &self.io;
        let halt = thread::scope(|scope| {
            for vcpu in others {
                scope.spawn(move || vcpu.run(io.as_ref()).expect("the engine goes on"));
            }
            let halt = first.run(io.as_ref()).expect("the engine goes on");
            if halt == Halt::TripleFault {
                io.stop();
            }
            halt
        });
        let hung = self.watchdog.end();
        let state = self.vcpus[0].state().expect("the engine gives the state");
        let stop = match halt {
            Halt::TripleFault => Stop::TripleFault,
            Halt::Kicked if hung => Stop::Hang,
            Halt::Kicked => self.stop_of(&state),
            Halt::Debug(stop) => panic!("{stop:?} of a debugger that is not here"),
        };
        End { stop, state, said: self.io.out(SAY.into()) }
    }

    fn stop_of(&self, state: &VcpuState) -> Stop {
        let vector = self.io.log().into_iter().find_map(|access| match access {
            Access::Out(port, _) => {
                u8::try_from(port.wrapping_sub(EXCEPTION)).ok().filter(|v| *v < 32)
            }
            _ => None,
        });
        match vector {
            Some(vector) => Stop::Exception(self.exception(vector, state)),
            None if self.io.done.load(Ordering::SeqCst) => Stop::Done,
            None => Stop::Hang,
        }
    }

    /// Reads the frame under the stack pointer.
    fn exception(&self, vector: u8, state: &VcpuState) -> Exception {
        let width = match self.mode.bits() {
            16 => 2,
            32 => 4,
            _ => 8u64,
        };
        let ss = state.segments[SegmentName::Ss];
        let sp = state.gpr[gpr::RSP] & if width == 2 { 0xffff } else { u64::MAX };
        let base = if width == 8 { 0 } else { ss.base };
        let with_error = matches!(vector, 8 | 10..=14 | 17) && self.mode != Mode::Real;
        let word = |n: u64| {
            let mut bytes = [0; 8];
            read(&self.memory, base + sp + width * n, &mut bytes[..width as usize]);
            u64::from_le_bytes(bytes)
        };
        let first = u64::from(with_error);
        let cs = word(first + 1) as u16;
        let outer = self.mode != Mode::Real && cs & 3 != 0;
        Exception {
            vector,
            error: with_error.then(|| word(0) as u32),
            rip: word(first),
            cs,
            rflags: word(first + 2),
            stack: (width == 8 || outer).then(|| (word(first + 4) as u16, word(first + 3))),
        }
    }
}
