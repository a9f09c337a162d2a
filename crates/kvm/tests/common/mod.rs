//! Small guests for the KVM engine.
//!
//! On a host without a usable `/dev/kvm` there is nothing to run; each test then checks that the
//! engine says so, and how to go on.
#![allow(dead_code)] // Each test program uses its own part.
#![allow(clippy::unwrap_used)]

use arch::registers::{cr0, cr4, efer, gpr, rflags};
use arch::{DescriptorTable, Segment, SegmentName, VcpuState};
use cputest::layout::{PageTables, Paging, descriptor, gate64, page, write, write_u64};
use cputest::machine::{Recorder, Watchdog, make_vm};
use cputest::micro::assemble;
use engine::{Engine, GuestMemory, Halt, Vcpu, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use kvm::KvmEngine;
use std::sync::Arc;

/// Guest-physical addresses; linear ones are the same.
pub mod at {
    pub const GDT: u64 = 0x1000;
    pub const IDT: u64 = 0x3000;
    pub const STACK: u64 = 0x7000;
    pub const CODE: u64 = 0x8000;
    pub const HANDLER: u64 = 0xa000;
    pub const TABLES: u64 = 0x2_0000;
    pub const DATA: u64 = 0x8_0000;
    pub const RAM: u64 = 0x20_0000;
    /// Device registers, mapped where paging is on.
    pub const DEVICE: u64 = 0xd000_0000;
    pub const LAPIC: u64 = 0xfee0_0000;
}

/// Port on which guests say 32-bit values.
pub const SAY: u16 = 0xe0;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Real,
    Protected,
    Long,
}

/// The engine, or `None` where this host has no KVM, which is then checked to be explained.
pub fn engine() -> Option<KvmEngine> {
    explained(KvmEngine::with_companion(|| Ok(Arc::new(soft::SoftEngine::companion()?))))
}

/// The engine without anything to help it.
pub fn lonely_engine() -> Option<KvmEngine> {
    explained(KvmEngine::new())
}

fn explained(engine: Result<KvmEngine, engine::EngineError>) -> Option<KvmEngine> {
    match engine {
        Ok(engine) => Some(engine),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("kvm") || text.contains("KVM"), "{text}");
            assert!(text.contains("--engine soft"), "{text}");
            None
        }
    }
}

/// A machine with code in it.
pub struct Guest {
    pub vm: Arc<dyn Vm>,
    pub memory: Arc<GuestMemory>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub io: Arc<Recorder>,
    pub watchdog: Watchdog,
    mode: Mode,
}

type Code<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

impl Guest {
    pub fn new(engine: &dyn Engine, mode: Mode, code: Code<'_>) -> Self {
        Self::with_vcpus(engine, mode, 1, code)
    }

    pub fn with_vcpus(engine: &dyn Engine, mode: Mode, count: u32, code: Code<'_>) -> Self {
        let (vm, memory) = make_vm(engine, at::RAM, count).unwrap();
        let vcpus: Vec<_> = (0..count).map(|n| vm.create_vcpu(n).unwrap()).collect();
        let io = Arc::new(Recorder::default());
        let kickers: Vec<_> = vcpus.iter().map(|v| v.kicker()).collect();
        io.kickers.lock().unwrap().clone_from(&kickers);
        let watchdog = Watchdog::new(kickers);
        let mut guest = Self { vm, memory, vcpus, io, watchdog, mode };
        guest.write_tables();
        guest.put(at::CODE, code);
        let state = starting_state(guest.vcpus[0].state().unwrap(), mode);
        guest.vcpus[0].set_state(&state).unwrap();
        guest
    }

    pub fn put(&self, address: u64, code: Code<'_>) {
        let bits = match self.mode {
            Mode::Real => 16,
            Mode::Protected => 32,
            Mode::Long => 64,
        };
        write(&self.memory, address, &assemble(bits, address, code));
    }

    fn write_tables(&self) {
        let entry = |n: u64, value| write_u64(&self.memory, at::GDT + 8 * n, value);
        entry(1, descriptor(0, 0xfffff, 0xa09b));
        entry(2, descriptor(0, 0xfffff, 0xc093));
        entry(3, descriptor(0, 0xfffff, 0xc09b));
        let mut tables = PageTables::new(Paging::Four, at::TABLES);
        tables.map_large(&self.memory, 0, 0, page::P | page::W);
        tables.map_large(&self.memory, at::DEVICE, at::DEVICE, page::P | page::W);
        tables.map_large(&self.memory, at::LAPIC, at::LAPIC, page::P | page::W | 0x10);
    }

    /// Sets the handler of a vector.
    pub fn handler(&self, vector: u8, offset: u64) {
        match self.mode {
            Mode::Real => {
                write(&self.memory, 4 * u64::from(vector), &(offset as u32).to_le_bytes())
            }
            Mode::Protected => panic!("no test needs it"),
            Mode::Long => {
                let [low, high] = gate64(8, offset, 14, 0, 0);
                write_u64(&self.memory, at::IDT + 16 * u64::from(vector), low);
                write_u64(&self.memory, at::IDT + 16 * u64::from(vector) + 8, high);
            }
        }
    }

    /// Runs the first vCPU until something ends it; a guest that hangs fails the test.
    pub fn run(&mut self) -> Halt {
        self.watchdog.begin(|| "a guest of the KVM engine".into());
        let result = self.vcpus[0].run(self.io.as_ref());
        assert!(!self.watchdog.end(), "the guest hangs: {:x?}", self.vcpus[0].state());
        result.unwrap()
    }

    /// What the guest said.
    pub fn said(&self) -> Vec<u32> {
        self.io.out(SAY)
    }

    pub fn state(&mut self) -> VcpuState {
        self.vcpus[0].state().unwrap()
    }
}

/// The state in which a guest starts: its own LAPIC and MSRs, and the mode's registers.
pub fn starting_state(mut state: VcpuState, mode: Mode) -> VcpuState {
    state.rip = at::CODE;
    state.rflags = rflags::FIXED;
    state.gpr = [0; 16];
    state.gpr[gpr::RSP] = at::STACK;
    state.gdtr = DescriptorTable { base: at::GDT, limit: 0x1f };
    state.idtr = DescriptorTable { base: at::IDT, limit: 0xfff };
    let (code, data) = match mode {
        Mode::Real => (Segment::real_mode(0), Segment::real_mode(0)),
        Mode::Protected => (Segment::flat(0x18, 0xc09b), Segment::flat(0x10, 0xc093)),
        Mode::Long => (Segment::flat(0x08, 0xa09b), Segment::flat(0x10, 0xc093)),
    };
    state.segments.regs = [data; 6];
    state.segments[SegmentName::Cs] = code;
    state.segments.tr = Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x8b };
    state.segments.ldtr = Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x82 };
    match mode {
        Mode::Real => {
            state.idtr = DescriptorTable { base: 0, limit: 0x3ff };
            state.cr0 = cr0::ET;
        }
        Mode::Protected => state.cr0 = cr0::PE | cr0::ET | cr0::NE,
        Mode::Long => {
            state.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::MP | cr0::WP;
            state.cr3 = at::TABLES;
            state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
            state.efer = efer::LME | efer::LMA | efer::NXE;
            state.xcr0 = 7;
        }
    }
    state
}

/// Emits code that reports EAX.
pub fn say(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.db(if a.bitness() == 16 { &[0x66, 0xe7, SAY as u8] } else { &[0xe7, SAY as u8] })
}

/// Emits code that ends the run.
pub fn done(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.db(&[0xe6, 0xf4, 0xeb, 0xfe])
}
