//! Arbitrary code from arbitrary architectural states: the engine must neither panic nor hang nor
//! touch memory that is not the guest's.
//!
//! Guest RAM lies between pages that nothing may touch: in the same file, so that a write that
//! misses lands in a pattern which is checked after every case, and with PROT_NONE beyond it, so
//! that one that misses further ends the process.
use crate::forms::exclusion;
use crate::layout::{PageTables, Paging, descriptor, gate32, gate64, page, write, write_u64};
use crate::machine::{Recorder, Watchdog};
use crate::rng::Rng;
use crate::under_test::EngineUnderTest;
use crate::values::random_case;
use arch::registers::{cr0, cr4, efer, gpr, rflags};
use arch::{DescriptorTable, GuestPhysical, Segment, SegmentName, VcpuState};
use engine::{EngineError, GuestMemory, Halt, Kick, Vcpu, VcpuIo, Vm, VmConfig};
use iced_x86::Code;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

/// Bytes of guest RAM.
const RAM: u64 = 2 << 20;
const TABLES: u64 = 0x10_0000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
const CODE: u64 = 0x8000;
const CODE_SIZE: u64 = 0x4000;

/// What a case's guest talks to: it only counts, and answers with noise.
struct Io {
    accesses: AtomicU64,
    kicker: Arc<dyn Kick>,
    recorder: Recorder,
}

/// Device accesses after which a case has had enough.
const ACCESSES: u64 = 2000;

impl Io {
    fn count(&self) {
        if self.accesses.fetch_add(1, Ordering::Relaxed) >= ACCESSES {
            self.kicker.kick();
        }
    }
    /// The contract's promise about widths.
    fn check(data: &[u8], widths: &[usize]) {
        assert!(widths.contains(&data.len()), "an access of {} bytes", data.len());
    }
    fn check_device(address: GuestPhysical, data: &[u8]) {
        assert!((1..=64).contains(&data.len()), "an access of {} bytes", data.len());
        let ram = address.0 < RAM;
        assert!(!ram, "{address:?} is RAM, not a device");
    }
}

impl VcpuIo for Io {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        Self::check(data, &[1, 2, 4]);
        self.count();
        data.fill(port as u8);
    }
    fn pio_write(&self, _: u16, data: &[u8]) {
        Self::check(data, &[1, 2, 4]);
        self.count();
    }
    fn mmio_read(&self, address: GuestPhysical, data: &mut [u8]) {
        Self::check_device(address, data);
        self.count();
        data.fill(address.0 as u8);
    }
    fn mmio_write(&self, address: GuestPhysical, data: &[u8]) {
        Self::check_device(address, data);
        self.count();
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.recorder.end_of_interrupt(vector);
    }
    fn acknowledge_pic(&self) -> Option<u8> {
        self.count();
        Some(0x20)
    }
}

/// A machine that runs one random case after another.
pub struct Fuzzer {
    memory: Arc<GuestMemory>,
    red_zone: crate::redzone::RedZone,
    vcpu: Box<dyn Vcpu>,
    base: VcpuState,
    io: Arc<Io>,
    watchdog: Watchdog,
    timer: mpsc::Sender<u64>,
    epoch: Arc<AtomicU64>,
    _vm: Arc<dyn Vm>,
}

/// How long a case may run before it is kicked.
const CASE_TIME: Duration = Duration::from_millis(2);

impl Fuzzer {
    /// Makes the machine.
    ///
    /// # Errors
    /// Fails where the engine or the host's memory does.
    pub fn new(engine: EngineUnderTest) -> Result<Self, EngineError> {
        let engine = engine.make()?;
        let (memory, red_zone) = crate::redzone::guarded_memory(RAM)?;
        let memory = Arc::new(memory);
        let config = VmConfig {
            memory: memory.clone(),
            read_only: Vec::new(),
            cpu: engine.host_cpu(),
            vcpus: 1,
        };
        let vm = engine.create_vm(config)?;
        let mut vcpu = vm.create_vcpu(0)?;
        let base = vcpu.state()?;
        let kicker = vcpu.kicker();
        let epoch = Arc::new(AtomicU64::new(0));
        let (timer, cases) = mpsc::channel();
        let (now, kick) = (epoch.clone(), kicker.clone());
        thread::spawn(move || {
            while let Ok(mut case) = cases.recv() {
                // Cases that ended before their time is up are of no interest any more.
                while let Ok(newer) = cases.try_recv() {
                    case = newer;
                }
                thread::park_timeout(CASE_TIME);
                if now.load(Ordering::SeqCst) == case {
                    kick.kick();
                }
            }
        });
        let io = Arc::new(Io {
            accesses: AtomicU64::new(0),
            kicker: kicker.clone(),
            recorder: Recorder::default(),
        });
        let watchdog = Watchdog::new(vec![kicker]);
        Ok(Self { memory, red_zone, vcpu, base, io, watchdog, timer, epoch, _vm: vm })
    }

    /// Runs the case of a seed. A panic or an abort of the process is the engine's defect; an
    /// error says what else it did wrong.
    ///
    /// # Errors
    /// Fails where the engine gave up, or wrote outside the guest's memory.
    pub fn run(&mut self, seed: u64) -> Result<Halt, String> {
        let mut rng = Rng::new(seed);
        let state = self.prepare(&mut rng);
        // A state that cannot exist may be refused, but by name.
        if self.vcpu.set_state(&state).is_err() {
            return Ok(Halt::Kicked);
        }
        self.io.accesses.store(0, Ordering::Relaxed);
        let case = self.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        if self.timer.send(case).is_err() {
            return Err("the timer thread is gone".into());
        }
        self.watchdog.begin(|| format!("seed {seed}"));
        let halt = self.vcpu.run(self.io.as_ref());
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let hung = self.watchdog.end();
        let after = self.vcpu.state().map_err(|e| format!("state after the run: {e}"))?;
        if hung {
            return Err(format!("ran 10 s after its kick, now at {:#x}", after.rip));
        }
        if let Some(offset) = self.red_zone.damage() {
            return Err(format!("wrote outside guest memory, at offset {offset:#x}"));
        }
        halt.map_err(|e| e.to_string())
    }

    fn prepare(&mut self, rng: &mut Rng) -> VcpuState {
        write(&self.memory, 0, &[0; 0x1000]);
        let mode = rng.below(6);
        let code = code(rng, mode >= 4);
        write(&self.memory, CODE, &code);
        let mut state = self.base.clone();
        self.tables(rng, mode);
        registers(rng, &mut state, mode);
        self.mutate(rng, &mut state);
        state
    }

    /// Descriptors, gates and page tables, mostly sound.
    fn tables(&mut self, rng: &mut Rng, mode: u64) {
        let attributes = [
            0, 0xc09b, 0xa09b, 0xc093, 0xc0fb, 0xc0f3, 0xa0fb, 0x009b, 0x0093, 0x4097, 0xc0f7,
            0x008b, 0, 0x0082, 0, 0xc09f,
        ];
        for (n, attributes) in (0u64..).zip(attributes) {
            let system = matches!(n, 11 | 13);
            let base = if system { TSS as u32 } else { 0 };
            let limit = if system { 0x67 } else { 0xfffff };
            write_u64(&self.memory, GDT + 8 * n, descriptor(base, limit, attributes));
        }
        if rng.chance(20) {
            write_u64(&self.memory, GDT + 8 * rng.below(16), rng.bits());
        }
        write_u64(&self.memory, TSS + 4, 0x7000);
        write_u64(&self.memory, TSS + 8, if mode >= 4 { 0 } else { 0x18 });
        for vector in 0..64u64 {
            // Most handlers return, past the error code where there is one.
            let with_error = matches!(vector, 8 | 10..=14 | 17);
            let returning = HANDLERS + if with_error { 0x180 } else { 0x190 };
            let handler = if rng.chance(85) { returning } else { HANDLERS + rng.below(0x100) };
            if mode >= 4 {
                let [low, high] = gate64(0x10, handler, 14, (rng.below(4)) as u8, 0);
                write_u64(&self.memory, IDT + 16 * vector, low);
                write_u64(&self.memory, IDT + 16 * vector + 8, high);
            } else {
                let gate = gate32(0x08, handler as u32, 14, rng.below(4) as u8, 0);
                write_u64(&self.memory, IDT + 8 * vector, gate);
            }
        }
        // Some handlers are noise.
        let mut handlers = [0x90u8; 0x200];
        rng.fill(&mut handlers[0x40..0x80]);
        // Skip what faulted by one byte, and go on.
        let (drop, skip): (&[u8], &[u8]) = if mode >= 4 {
            (&[0x48, 0x83, 0xc4, 8], &[0x48, 0xff, 0x04, 0x24, 0x48, 0xcf])
        } else {
            (&[0x83, 0xc4, 4], &[0xff, 0x04, 0x24, 0xcf])
        };
        handlers[0x190 - drop.len()..0x190].copy_from_slice(drop);
        handlers[0x190..0x190 + skip.len()].copy_from_slice(skip);
        write(&self.memory, HANDLERS, &handlers);
        let paging = match mode {
            2 => Paging::Bits32,
            3 => Paging::Pae,
            5 => Paging::Five,
            _ => Paging::Four,
        };
        write(&self.memory, TABLES, &[0; 0x8000]);
        let mut tables = PageTables::new(paging, TABLES);
        let user = if rng.chance(70) { page::U } else { 0 };
        for large in 0..2 {
            let at = large << 21;
            tables.map_large(&self.memory, at, at, page::P | page::W | user);
        }
        let frames = (rng.below(512), rng.bits());
        for n in 0..16 {
            let bits = frames.1 >> n & (page::P | page::W | page::U) | page::P;
            tables.map(&self.memory, 0x80_0000 + 0x1000 * n, frames.0 << 12, bits);
        }
        // Device registers, and frames beyond all memory.
        tables.map(&self.memory, 0x80_0000 + 0x10000, 0xd000_0000, page::P | page::W | page::U);
        tables.map(&self.memory, 0x80_0000 + 0x11000, 0xff_ffff_f000, page::P | page::W | page::U);
        tables.map(&self.memory, 0x80_0000 + 0x12000, 0xfee0_0000, page::P | page::W | page::U);
        tables.map(&self.memory, 0x80_0000 + 0x13000, RAM - 0x1000, page::P | page::W | page::U);
        if rng.chance(15) {
            write_u64(&self.memory, TABLES + 8 * rng.below(0x1000), rng.bits());
        }
    }

    /// Breaks the state in a place or two.
    fn mutate(&mut self, rng: &mut Rng, state: &mut VcpuState) {
        for _ in 0..rng.below(3) {
            match rng.below(9) {
                0 => state.cr0 ^= 1 << rng.pick(&[1u32, 2, 3, 5, 16, 18]),
                1 => state.cr4 ^= 1 << rng.below(23),
                2 => state.debug[5] = rng.bits() & 0xffff_2fff | 0x400,
                3 => state.debug[rng.below(4) as usize] = CODE + rng.below(64),
                4 => {
                    let segment = &mut state.segments.regs[rng.below(6) as usize];
                    segment.limit = rng.word() as u32;
                    segment.base = rng.word() & 0xffff_ffff;
                }
                5 => state.segments.regs[rng.below(6) as usize].attributes = rng.bits() as u16,
                6 => state.rip = rng.word(),
                7 => state.cr3 = rng.word() & 0xffff_f000,
                _ => state.idtr.limit = rng.bits() as u16,
            }
        }
    }
}

/// Instructions that only the system may run, which the comparison's forms leave out in part.
const SYSTEM: [&[u8]; 24] = [
    &[0x0f, 0x20, 0xc0],
    &[0x0f, 0x22, 0xc0],
    &[0x0f, 0x22, 0xd8],
    &[0x0f, 0x22, 0xe0],
    &[0x0f, 0x23, 0xf8],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0xa2],
    &[0x0f, 0x31],
    &[0x0f, 0x01, 0xd0],
    &[0x0f, 0x01, 0xd1],
    &[0x0f, 0x01, 0xf8],
    &[0x0f, 0xae, 0x23],
    &[0x0f, 0xae, 0x2b],
    &[0x0f, 0x01, 0x3b],
    &[0x0f, 0x00, 0xd8],
    &[0x0f, 0x08],
    &[0xfb],
    &[0xf4],
    &[0xcd, 0x20],
    &[0xcf],
];

/// Code bytes: noise, valid instructions, and valid ones with bits flipped or with system
/// instructions between them.
fn code(rng: &mut Rng, wide: bool) -> Vec<u8> {
    let mut bytes = vec![0; CODE_SIZE as usize];
    let style = rng.below(5);
    if style == 0 {
        rng.fill(&mut bytes);
        return bytes;
    }
    bytes.clear();
    let mut template = random_case(rng, wide);
    while bytes.len() < 0x200 {
        let form = rng.pick(forms(wide));
        template.rip = CODE + bytes.len() as u64;
        let Some(mut piece) = crate::generate::some_bytes(form, &template, rng) else { continue };
        if style == 2 && rng.chance(30) {
            let n = rng.below(piece.len() as u64) as usize;
            piece[n] ^= 1 << rng.below(8);
        }
        if style >= 3 && rng.chance(15) {
            bytes.extend_from_slice(rng.pick(&SYSTEM));
        }
        bytes.append(&mut piece);
    }
    // Once more from the start: what was run is run again, perhaps changed by itself.
    let back = -(bytes.len() as i32 + 5);
    bytes.push(0xe9);
    bytes.extend_from_slice(&back.to_le_bytes());
    bytes
}

fn forms(wide: bool) -> &'static [Code] {
    static FORMS: [OnceLock<Vec<Code>>; 2] = [OnceLock::new(), OnceLock::new()];
    FORMS[usize::from(wide)].get_or_init(|| {
        let fits = |c: &Code| if wide { c.op_code().mode64() } else { c.op_code().mode32() };
        Code::values().filter(|c| exclusion(*c).is_none()).filter(fits).collect()
    })
}

/// A sound starting state of one of six modes: real, 32-bit, 32-bit paged, PAE, long, five-level.
fn registers(rng: &mut Rng, state: &mut VcpuState, mode: u64) {
    let donor = random_case(rng, mode >= 4);
    state.gpr = donor.gpr;
    for register in &mut state.gpr {
        if rng.chance(70) {
            let area = rng.pick(&[0x80_0000u64, 0x80_c000, 0x81_0000, 0x81_3ff8, 0, 0x1f_fff8]);
            *register = area + rng.below(0x1000);
        }
    }
    state.gpr[gpr::RSP] = 0x7000;
    state.fpu = donor.fpu;
    state.rip = CODE + rng.below(32);
    state.rflags =
        donor.rflags & !rflags::IF | rng.bits() & (rflags::TF | rflags::IF | rflags::IOPL);
    if !rng.chance(5) {
        state.rflags &= !rflags::TF;
    }
    state.gdtr = DescriptorTable { base: GDT, limit: 0x7f };
    state.idtr = DescriptorTable { base: IDT, limit: 0x3ff };
    state.cr3 = TABLES;
    state.cr0 = cr0::ET | cr0::NE | cr0::MP | rng.bits() & cr0::WP;
    state.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
    state.xcr0 = 7;
    state.segments.tr = Segment { selector: 0x58, base: TSS, limit: 0x67, attributes: 0x8b };
    let user = rng.chance(40);
    let rpl = if user { 3 } else { 0 };
    let data = Segment::flat(if user { 0x2b } else { 0x18 }, if user { 0xc0f3 } else { 0xc093 });
    state.segments.regs = [data; 6];
    let cs = |selector, attributes: u16| Segment::flat(selector, attributes | rpl << 5);
    match mode {
        0 => {
            state.segments.regs = [Segment::real_mode(0); 6];
            state.idtr = DescriptorTable { base: 0, limit: 0x3ff };
        }
        1..4 => {
            state.cr0 |= cr0::PE;
            state.segments[SegmentName::Cs] = cs(if user { 0x23 } else { 0x08 }, 0xc09b);
            if mode == 2 {
                state.cr0 |= cr0::PG;
                state.cr4 |= cr4::PSE;
            } else if mode == 3 {
                state.cr0 |= cr0::PG;
                state.cr4 |= cr4::PAE;
            }
        }
        _ => {
            state.cr0 |= cr0::PE | cr0::PG;
            state.cr4 |= cr4::PAE | if mode == 5 { cr4::LA57 } else { 0 };
            state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
            state.segments[SegmentName::Cs] = cs(if user { 0x33 } else { 0x10 }, 0xa09b);
        }
    }
}
