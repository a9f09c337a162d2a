//! Guest instructions that the host executes: renaming registers and redirecting memory operands.
use super::asm::{Mem, Reg, Width, op};
use super::layout::{self, ADDRESS, SCRATCH};
use super::memory::Place;
use super::{Emitter, address};
use crate::operand::operand_segment;
use crate::translate::classify::{self, Operand, has_memory};
use crate::translate::flags::Effect;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

/// A guest register that an instruction uses but that has no usable host register there: it is
/// brought to a scratch register before and taken back after.
#[derive(Clone, Copy)]
struct Visitor {
    guest: usize,
    scratch: Reg,
    read: bool,
    written: bool,
}

/// The visitors of one instruction; there are at most three register operands.
#[derive(Default)]
struct Visitors {
    list: [Option<Visitor>; 3],
}

impl Visitors {
    fn iter(&self) -> impl Iterator<Item = &Visitor> {
        self.list.iter().flatten()
    }

    fn scratch_of(&self, guest: usize) -> Option<Reg> {
        self.iter().find(|v| v.guest == guest).map(|v| v.scratch)
    }

    /// Notes a use of `guest`.
    fn add(&mut self, guest: usize, read: bool, written: bool) {
        if let Some(v) = self.list.iter_mut().flatten().find(|v| v.guest == guest) {
            v.read |= read;
            v.written |= written;
        } else if let Some(free) = self.list.iter_mut().find(|v| v.is_none()) {
            *free = Some(Visitor { guest, scratch: SCRATCH, read, written });
        }
    }

    /// Gives each visitor a scratch register. Those that are read must differ from each other and
    /// from the address of a memory operand; those only written must differ from each other.
    fn assign(&mut self, memory: bool) {
        let mut for_reads = if memory { [SCRATCH].iter() } else { [SCRATCH, ADDRESS].iter() };
        let mut taken = [None; 2];
        for v in self.list.iter_mut().flatten().filter(|v| v.read) {
            v.scratch = for_reads.next().copied().unwrap_or(SCRATCH);
            if v.written {
                taken[usize::from(v.scratch == ADDRESS)] = Some(v.scratch);
            }
        }
        let mut free = [SCRATCH, ADDRESS].into_iter().filter(|r| !taken.contains(&Some(*r)));
        for v in self.list.iter_mut().flatten().filter(|v| !v.read) {
            v.scratch = free.next().unwrap_or(SCRATCH);
        }
    }
}

/// The code cannot be encoded; a defect.
#[derive(Debug)]
pub struct NotEncodable;

impl Emitter<'_> {
    /// An instruction that runs as it is; `bytes` are its own.
    pub fn native(
        &mut self,
        insn: &Instruction,
        effect: Effect,
        bytes: &[u8],
    ) -> Result<(), NotEncodable> {
        if self.context.mode.is_64() && !bytes.is_empty() && keeps_its_registers(insn) {
            self.flags_for(effect);
            self.asm.raw(bytes);
            self.flags_after(effect);
            return Ok(());
        }
        let memory = has_memory(insn).then(|| self.operands.memory(insn)).flatten();
        let accesses_memory = memory.is_some();
        let visitors = self.visitors(insn, has_memory(insn));
        if accesses_memory && classify::waits_for_x87(insn) {
            // A pending #MF comes before the faults of the operand.
            self.asm.raw(&[0x9b]);
        }
        let place = memory.map(|operand| self.open(insn, operand));
        self.flags_for(effect);
        self.bring(&visitors);
        let distance = place.as_ref().map_or(0, Place::distance);
        let host = rename(insn, &visitors, accesses_memory.then_some(distance));
        self.encode(&host)?;
        self.flags_after(effect);
        self.take_back(&visitors);
        if visitors.iter().any(|v| v.scratch == ADDRESS) {
            self.holds = None;
        }
        if let Some(place) = place {
            self.mark();
            self.close(place);
        }
        Ok(())
    }

    /// Decides which registers need a scratch register.
    fn visitors(&mut self, insn: &Instruction, memory: bool) -> Visitors {
        let high_byte = (0..insn.op_count())
            .any(|i| insn.op_kind(i) == OpKind::Register && is_high_byte(insn.op_register(i)));
        let away = |n: usize| n >= 13 || (high_byte && matches!(n, 4 | 6 | 7));
        let mut accesses = None;
        let mut visitors = Visitors::default();
        for i in 0..insn.op_count() {
            let register = insn.op_register(i);
            if insn.op_kind(i) != OpKind::Register || !register.is_gpr() || is_high_byte(register) {
                continue;
            }
            let guest = register.full_register().number();
            if !away(guest) {
                continue;
            }
            let accesses = accesses.get_or_insert_with(|| self.operands.accesses(insn));
            let access = accesses[i as usize];
            let written = classify::writes(access);
            // A write of less than 32 bits keeps the rest of the register.
            let partial = written && register.size() < 4;
            visitors.add(guest, classify::reads(access) || partial, written);
        }
        visitors.assign(memory);
        visitors
    }

    fn bring(&mut self, visitors: &Visitors) {
        for v in visitors.iter().filter(|v| v.read) {
            match layout::host(v.guest) {
                Some(home) => self.asm.mov(Width::W64, v.scratch, home),
                None => self.asm.load(Width::W64, v.scratch, layout::gpr(v.guest)),
            }
        }
    }

    fn take_back(&mut self, visitors: &Visitors) {
        for v in visitors.iter().filter(|v| v.written) {
            match layout::host(v.guest) {
                Some(home) => self.asm.mov(Width::W64, home, v.scratch),
                None => self.asm.store(Width::W64, layout::gpr(v.guest), v.scratch),
            }
        }
    }

    fn encode(&mut self, host: &Instruction) -> Result<(), NotEncodable> {
        self.encoder.encode(host, 0).map_err(|_| NotEncodable)?;
        let mut buffer = self.encoder.take_buffer();
        self.asm.raw(&buffer);
        buffer.clear();
        self.encoder.set_buffer(buffer);
        Ok(())
    }

    /// Writes a scratch register to a guest register with the width of the latter (16 bits keep
    /// the rest, 32 bits clear the upper half). Leaves flags alone.
    pub fn write_gpr(&mut self, target: Register, from: Reg) {
        let n = target.full_register().number();
        let width = match target.size() {
            2 => Width::W16,
            4 => Width::W32,
            _ => Width::W64,
        };
        match (layout::host(n), width) {
            (Some(home), _) => self.asm.mov(width, home, from),
            (None, Width::W32) => {
                self.asm.mov(Width::W32, from, from);
                self.asm.store(Width::W64, layout::gpr(n), from);
            }
            (None, _) => self.asm.store(width, layout::gpr(n), from),
        }
    }

    /// Reads a guest register into a scratch register, all 64 bits.
    pub fn read_gpr(&mut self, to: Reg, source: Register) {
        let n = source.full_register().number();
        match layout::host(n) {
            Some(home) => self.asm.mov(Width::W64, to, home),
            None => self.asm.load(Width::W64, to, layout::gpr(n)),
        }
    }

    /// MOV between the accumulator and an absolute offset.
    pub fn mov_offset(&mut self, insn: &Instruction) -> Result<(), NotEncodable> {
        let load = insn.op_kind(0) == OpKind::Register;
        let size = insn.memory_size().size() as u32;
        let operand = Operand { size, reads: load, writes: !load };
        self.free_flags(self.live_before);
        self.holds = None;
        self.asm.mov_imm(ADDRESS, insn.memory_displacement64());
        let segment = operand_segment(insn, self.context.mode.is_64());
        self.apply_segment(segment, operand);
        let place = Place::Single(self.probe(operand, segment));
        match (load, size) {
            (true, 1) => self.asm.raw(&[0x8a, 0x07]),
            (false, 1) => self.asm.raw(&[0x88, 0x07]),
            (true, _) => self.asm.load(width_of(size), Reg::RAX, Mem::at(ADDRESS, 0)),
            (false, _) => self.asm.store(width_of(size), Mem::at(ADDRESS, 0), Reg::RAX),
        }
        self.close(place);
        Ok(())
    }

    /// BT, BTS, BTR, BTC with a bit offset in a register, which reaches beyond the operand
    /// (Intel SDM 2A 3.1.1.9): the word is addressed by the offset's upper bits first.
    pub fn bit_string(&mut self, insn: &Instruction, effect: Effect) -> Result<(), NotEncodable> {
        let size = insn.memory_size().size() as u32;
        let writes = insn.mnemonic() != Mnemonic::Bt;
        let operand = Operand { size, reads: true, writes };
        // The address arithmetic clobbers flags twice, so they are kept over all of it.
        self.free_flags(self.live_before);
        self.effective_address(insn);
        let bit = insn.op1_register();
        self.read_gpr(SCRATCH, bit);
        match size {
            2 => self.asm.rr(Width::W64, op::MOVSX16, SCRATCH, SCRATCH),
            4 => self.asm.rr(Width::W64, op::MOVSXD, SCRATCH, SCRATCH),
            _ => {}
        }
        let word = size.trailing_zeros() as u8;
        self.asm.shift_imm(Width::W64, 7, SCRATCH, word + 3);
        let (width, mask16) = address::width(insn, self.context.mode);
        self.asm.lea(width, ADDRESS, Mem::indexed(ADDRESS, SCRATCH, word, 0));
        if mask16 {
            self.asm.rr(Width::W32, op::MOVZX16, ADDRESS, ADDRESS);
        }
        let segment = operand_segment(insn, self.context.mode.is_64());
        self.apply_segment(segment, operand);
        let place = Place::Single(self.probe(operand, segment));
        self.read_gpr(SCRATCH, bit);
        self.asm.alu_imm(Width::W32, 4, SCRATCH, size as i32 * 8 - 1);
        if self.live_after & !effect.kills != 0 {
            self.asm.restore_flags_through(layout::RAW_FLAGS, layout::spill(0));
        }
        let mut host = *insn;
        redirect(&mut host, 0);
        host.set_op1_register(sized(usize::from(SCRATCH.0), size as usize));
        self.encode(&host)?;
        self.flags_after(effect);
        self.mark();
        self.close(place);
        Ok(())
    }
}

/// Whether the instruction has register operands only, each of which is in its own host register,
/// so that its bytes can run as they are.
fn keeps_its_registers(insn: &Instruction) -> bool {
    // With a prefix that the guest's CPU may ignore, they are another instruction on the host's.
    if matches!(insn.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) {
        return false;
    }
    (0..insn.op_count()).all(|i| match insn.op_kind(i) {
        OpKind::Memory => false,
        OpKind::Register if insn.op_register(i).is_gpr() => {
            let n = insn.op_register(i).full_register().number();
            layout::host(n) == Some(Reg(n as u8))
        }
        _ => true,
    })
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The general register `n` with `size` bytes.
pub fn sized(n: usize, size: usize) -> Register {
    const BYTES: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    let base = match size {
        1 => return BYTES[n & 15],
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + n as u32
}

fn width_of(size: u32) -> Width {
    match size {
        2 => Width::W16,
        4 => Width::W32,
        _ => Width::W64,
    }
}

/// Makes the memory operand `[rdi + distance]`.
fn redirect(insn: &mut Instruction, distance: i32) {
    insn.set_memory_base(Register::RDI);
    insn.set_memory_index(Register::None);
    insn.set_memory_index_scale(1);
    insn.set_memory_displacement64(i64::from(distance) as u64);
    insn.set_memory_displ_size(u32::from(distance != 0));
    insn.set_segment_prefix(Register::None);
}

/// The instruction with host registers.
fn rename(insn: &Instruction, visitors: &Visitors, memory: Option<i32>) -> Instruction {
    let mut host = *insn;
    if let Some(distance) = memory {
        redirect(&mut host, distance);
    }
    host.set_code(long_mode_code(host.code()));
    for i in 0..host.op_count() {
        if host.op_kind(i) != OpKind::Register {
            continue;
        }
        let register = host.op_register(i);
        if !register.is_gpr() || is_high_byte(register) {
            continue;
        }
        let n = register.full_register().number();
        let to = visitors.scratch_of(n).or(layout::host(n)).unwrap_or(SCRATCH);
        host.set_op_register(i, sized(usize::from(to.0), register.size()));
    }
    host
}

/// The encoding for 64-bit mode of those that only 16- and 32-bit modes have.
fn long_mode_code(code: Code) -> Code {
    match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        other => other,
    }
}
