//! String instructions in a guest against a model that takes one element after the other.
use crate::SoftEngine;
use arch::registers::gpr::{RAX, RCX, RDI, RSI};
use arch::registers::{cr0, cr4, efer, rflags};
use arch::{GuestPhysical, Segment, SegmentName, VcpuState};
use engine::{Engine, GuestMemory, Halt, Vcpu, VcpuIo, VmConfig};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 256 << 10;
/// The instructions, 16 bytes each, from here to `CODE_END`; the page tables are below.
const CODE: u64 = 0x6000;
const CODE_END: u64 = 0x9000;
/// Linear pages that tests in 64-bit mode use.
const PAGES: std::ops::Range<u64> = 0x10..0x18;
const OPCODES: [u8; 10] = [0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf];
const PREFIXES: [&[u8]; 3] = [&[], &[0xf3], &[0xf2]];

struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum World {
    /// 64-bit mode, pages in any order, some twice, some missing.
    Long,
    /// 32-bit code, no paging, DS and ES with limits.
    Limited,
    /// Real mode.
    Real,
}

/// One instruction of a world.
#[derive(Clone, Copy, Debug)]
struct Form {
    opcode: u8,
    /// Index in `PREFIXES`.
    prefix: usize,
    size: usize,
    /// Bytes of the pointers.
    pointer: usize,
    address: u64,
    length: u64,
}

/// What a case can change.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Registers {
    rax: u64,
    rcx: u64,
    rsi: u64,
    rdi: u64,
    flags: u64,
}

struct Fault;

struct Nothing;

impl VcpuIo for Nothing {
    fn pio_read(&self, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: GuestPhysical, _: &mut [u8]) {}
    fn mmio_write(&self, _: GuestPhysical, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}

fn ones(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// The model: physical memory, where linear pages lie in it, and limits.
struct Model {
    world: World,
    memory: Vec<u8>,
    pages: Vec<Option<u64>>,
    limit: u64,
}

impl Model {
    fn physical(&self, offset: u64, size: usize) -> Result<Vec<usize>, Fault> {
        let bytes = offset..offset + size as u64;
        if self.world == World::Long {
            let page = |at: u64| self.pages.get(at as usize >> 12).copied().flatten().ok_or(Fault);
            return bytes.map(|at| Ok((page(at)? << 12 | at & 0xfff) as usize)).collect();
        }
        if bytes.end - 1 > self.limit {
            Err(Fault)
        } else {
            Ok(bytes.map(|b| b as usize).collect())
        }
    }

    fn load(&self, offset: u64, size: usize) -> Result<u64, Fault> {
        let at = self.physical(offset, size)?;
        Ok(at.iter().rev().fold(0, |value, at| value << 8 | u64::from(self.memory[*at])))
    }

    fn store(&mut self, offset: u64, value: u64, size: usize) -> Result<(), Fault> {
        for (n, at) in self.physical(offset, size)?.into_iter().enumerate() {
            self.memory[at] = (value >> (8 * n)) as u8;
        }
        Ok(())
    }

    /// One element, without the count.
    fn element(&mut self, form: Form, r: &mut Registers) -> Result<(), Fault> {
        let (size, mask) = (form.size, ones(form.pointer));
        let (si, di, al) = (r.rsi & mask, r.rdi & mask, r.rax & ones(size));
        match form.opcode & 0xfe {
            0xa4 => self.store(di, self.load(si, size)?, size)?,
            0xa6 => {
                r.flags = flags_of_cmp(r.flags, self.load(si, size)?, self.load(di, size)?, size)
            }
            0xaa => self.store(di, al, size)?,
            0xac => r.rax = merged(r.rax, self.load(si, size)?, size),
            _ => r.flags = flags_of_cmp(r.flags, al, self.load(di, size)?, size),
        }
        let step =
            if r.flags & rflags::DF == 0 { size as u64 } else { (size as u64).wrapping_neg() };
        if matches!(form.opcode & 0xfe, 0xa4 | 0xa6 | 0xac) {
            r.rsi = merged(r.rsi, si.wrapping_add(step), form.pointer);
        }
        if form.opcode & 0xfe != 0xac {
            r.rdi = merged(r.rdi, di.wrapping_add(step), form.pointer);
        }
        Ok(())
    }

    fn run(&mut self, form: Form, r: &mut Registers) -> Result<(), Fault> {
        if form.prefix == 0 {
            return self.element(form, r);
        }
        while r.rcx & ones(form.pointer) != 0 {
            self.element(form, r)?;
            r.rcx = merged(r.rcx, r.rcx.wrapping_sub(1), form.pointer);
            let compares = matches!(form.opcode & 0xfe, 0xa6 | 0xae);
            if compares && (r.flags & rflags::ZF != 0) != (form.prefix == 1) {
                break;
            }
        }
        Ok(())
    }
}

/// Writes the low `size` bytes of a register.
fn merged(register: u64, value: u64, size: usize) -> u64 {
    match size {
        4 => value & ones(4),
        _ => register & !ones(size) | value & ones(size),
    }
}

/// The host's own CMP.
fn flags_of_cmp(before: u64, left: u64, right: u64, size: usize) -> u64 {
    let flags: u64;
    macro_rules! cmp {
        ($l:literal, $r:literal) => {
            // SAFETY: a comparison of registers; the stack is as before at the end.
            unsafe {
                std::arch::asm!(concat!("cmp ", $l, ", ", $r), "pushfq", "pop {f}", f = out(reg) flags,
                    in("rax") left, in("rcx") right)
            }
        };
    }
    match size {
        1 => cmp!("al", "cl"),
        2 => cmp!("ax", "cx"),
        4 => cmp!("eax", "ecx"),
        _ => cmp!("rax", "rcx"),
    }
    before & !rflags::ARITHMETIC | flags & rflags::ARITHMETIC
}

/// All forms of a world, and their code: each ends in UD2, which ends the run.
fn forms(world: World, code: &mut Vec<u8>) -> Vec<Form> {
    let (word, rex, other): (usize, bool, usize) = match world {
        World::Long => (4, true, 4),
        World::Limited => (4, false, 2),
        World::Real => (2, false, 4),
    };
    let native = if world == World::Long { 8 } else { word };
    let mut forms = Vec::new();
    for opcode in OPCODES {
        for (prefix, prefixes) in PREFIXES.iter().enumerate() {
            for variant in 0..6 {
                let (wide, narrow, pointer) = (variant % 3 == 1, variant % 3 == 2, variant / 3);
                let mut bytes = prefixes.to_vec();
                let mut size = if opcode & 1 == 0 { 1 } else { word };
                if pointer == 1 {
                    bytes.push(0x67);
                }
                if narrow && opcode & 1 == 1 {
                    bytes.push(0x66);
                    size = 6 - word;
                }
                if wide && rex {
                    bytes.push(0x48);
                    size = if opcode & 1 == 1 { 8 } else { 1 };
                }
                bytes.push(opcode);
                let length = bytes.len() as u64;
                bytes.extend([0x0f, 0x0b]);
                bytes.resize(16, 0xcc);
                let pointer = if pointer == 1 { other } else { native };
                let address = CODE + code.len() as u64;
                code.extend(bytes);
                forms.push(Form { opcode, prefix, size, pointer, address, length });
            }
        }
    }
    assert!(code.len() as u64 <= CODE_END - CODE);
    forms
}

fn data_segment(limit: u32) -> Segment {
    Segment { selector: 8, base: 0, limit, attributes: 0xc093 }
}

fn state(world: World, limit: u64) -> VcpuState {
    let mut state = VcpuState::reset();
    state.idtr.limit = 0;
    state.segments[SegmentName::Cs] = match world {
        World::Long => Segment { selector: 16, base: 0, limit: u32::MAX, attributes: 0xa09b },
        World::Limited => Segment { selector: 16, base: 0, limit: u32::MAX, attributes: 0xc09b },
        World::Real => Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x9b },
    };
    if world == World::Real {
        return state;
    }
    state.cr0 |= cr0::PE;
    for name in [SegmentName::Es, SegmentName::Ds, SegmentName::Ss] {
        state.segments[name] = data_segment(limit as u32);
    }
    if world == World::Long {
        state.cr0 |= cr0::PG;
        state.cr3 = 0x1000;
        state.cr4 |= cr4::PAE;
        state.efer |= efer::LME | efer::LMA;
    }
    state
}

/// A guest of a world beside its model.
struct Pair {
    model: Model,
    memory: Arc<GuestMemory>,
    vcpu: Box<dyn Vcpu>,
    state: VcpuState,
    forms: Vec<Form>,
}

impl Pair {
    fn new(world: World, numbers: &mut Numbers) -> Self {
        let mut model = Model { world, memory: vec![0; MEMORY], pages: Vec::new(), limit: 0xffff };
        if world == World::Limited {
            model.limit = 0x2_3000 + numbers.below(0x1000);
        }
        // Long stretches of the same, so that comparisons come far.
        let mut at = 0;
        while at < MEMORY {
            model.memory[at] = numbers.below(256) as u8;
            let next = (at + 1 + numbers.below(900) as usize).min(MEMORY);
            model.memory[at + 1..next].fill(7);
            at = next;
        }
        model.memory[0x1000..CODE_END as usize].fill(0);
        let mut code = Vec::new();
        let forms = forms(world, &mut code);
        model.memory[CODE as usize..][..code.len()].copy_from_slice(&code);
        if world == World::Long {
            model.pages = vec![None; 0x20];
            for page in PAGES {
                model.pages[page as usize] = Some(0x20 + numbers.below(8));
            }
            model.pages[(PAGES.start + numbers.below(8)) as usize] = None;
            let mut entry = |at: usize, value: u64| {
                model.memory[at..at + 8].copy_from_slice(&(value | 3).to_le_bytes());
            };
            (1..4).for_each(|level| entry(level << 12, (level as u64 + 1) << 12));
            (CODE >> 12..CODE_END >> 12).for_each(|n| entry(0x4000 + 8 * n as usize, n << 12));
            for (n, page) in model.pages.iter().enumerate() {
                page.iter().for_each(|page| entry(0x4000 + 8 * n, page << 12));
            }
        }
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        memory.write_slice(&model.memory, GuestAddress(0)).unwrap();
        let engine = SoftEngine::new().unwrap();
        let cpu = engine.host_cpu();
        let config = VmConfig { memory: memory.clone(), read_only: vec![], cpu, vcpus: 1 };
        let vcpu = engine.create_vm(config).unwrap().create_vcpu(0).unwrap();
        let limit = if world == World::Long { u64::from(u32::MAX) } else { model.limit };
        Self { state: state(world, limit), model, memory, vcpu, forms }
    }

    /// A place for RSI or RDI, near `other` or near a border more often than chance would have it.
    fn place(&self, numbers: &mut Numbers, other: Option<u64>) -> u64 {
        let (start, end) = match self.model.world {
            World::Long => (PAGES.start << 12, PAGES.end << 12),
            World::Limited => (0xa000, 0x2_4000),
            World::Real => (CODE_END + 0x2800, 0x1_0000),
        };
        let near = |numbers: &mut Numbers, at: u64| (at + numbers.below(80)).saturating_sub(40);
        let anywhere = start + numbers.below(end - start);
        match (numbers.below(4), other) {
            (0, Some(other)) => near(numbers, other),
            (1, _) => near(numbers, anywhere & !0xfff),
            (2, _) if self.model.world != World::Long => near(numbers, self.model.limit),
            _ => anywhere,
        }
        .clamp(start, end - 1)
    }

    fn case(&mut self, numbers: &mut Numbers) {
        let form = self.forms[numbers.below(self.forms.len() as u64) as usize];
        let rsi = self.place(numbers, None);
        let mut rdi = self.place(numbers, Some(rsi));
        let long = numbers.below(8) == 0;
        let mut rcx = numbers.below(if long { 0x2000 } else { 90 }) / form.size as u64;
        if form.prefix == 0 {
            rcx = numbers.below(u64::MAX);
        }
        let mut flags = numbers.below(u64::MAX) & rflags::ARITHMETIC | rflags::FIXED;
        if numbers.below(3) == 0 {
            flags |= rflags::DF;
            if self.model.world == World::Real || form.pointer == 2 {
                // Not down into the code.
                rcx = if form.prefix == 0 { rcx } else { rcx.min(0x2000 / form.size as u64) };
                rdi = rdi.max(CODE_END + 0x2800);
            }
        }
        let fill =
            if numbers.below(2) == 0 { 0x0707_0707_0707_0707 } else { numbers.below(u64::MAX) };
        let mut wanted = Registers { rax: fill, rcx, rsi, rdi, flags };
        if form.pointer == 2 {
            // What is above the pointers is not theirs, and the code is out of their reach.
            wanted.rsi = wanted.rsi & 0xffff | 0xbad << 16;
            wanted.rdi = (wanted.rdi & 0xffff).max(CODE_END + 0x2800) | 0xbad << 16;
            if form.prefix != 0 {
                wanted.rcx = rcx & 0xfff | 0xbad << 16;
            }
        }
        let start = wanted.clone();
        self.state.rip = form.address;
        self.state.rflags = flags;
        for (n, value) in [(RAX, fill), (RCX, start.rcx), (RSI, start.rsi), (RDI, start.rdi)] {
            self.state.gpr[n] = value;
        }
        let faults = self.model.run(form, &mut wanted).is_err();
        self.vcpu.set_state(&self.state).unwrap();
        assert_eq!(self.vcpu.run(&Nothing).unwrap(), Halt::TripleFault);
        let end = self.vcpu.state().unwrap();
        let [rax, rcx, rsi, rdi] = [RAX, RCX, RSI, RDI].map(|n| end.gpr[n]);
        let kept = rflags::ARITHMETIC | rflags::DF | rflags::FIXED;
        let got = Registers { rax, rcx, rsi, rdi, flags: end.rflags & kept };
        assert_eq!(got, wanted, "{form:x?} from {start:x?}");
        let rip = form.address + if faults { 0 } else { form.length };
        assert_eq!(end.rip, rip, "{form:x?} from {start:x?}");
        let mut memory = vec![0; MEMORY];
        self.memory.read_slice(&mut memory, GuestAddress(0)).unwrap();
        for range in [0..0x1000, CODE_END as usize..MEMORY] {
            let differs = range.clone().find(|&at| memory[at] != self.model.memory[at]);
            assert_eq!(differs, None, "{form:x?} from {start:x?}");
        }
    }
}

fn compare_world(world: World, seed: u64) {
    let mut numbers = Numbers(seed);
    for _ in 0..12 {
        let mut pair = Pair::new(world, &mut numbers);
        for _ in 0..400 {
            pair.case(&mut numbers);
        }
    }
}

#[test]
fn across_scattered_and_missing_pages_each_element_counts_by_itself() {
    compare_world(World::Long, 0x5eed_0001);
}

#[test]
fn at_segment_limits_each_element_counts_by_itself() {
    compare_world(World::Limited, 0x5eed_0002);
}

#[test]
fn where_offsets_of_16_bits_wrap_each_element_counts_by_itself() {
    compare_world(World::Real, 0x5eed_0003);
}
