//! A minimal assembler for the fixed sequences around guest instructions. Guest instructions
//! themselves are encoded by iced-x86.

/// A host register, by its number in encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reg(pub u8);

#[allow(missing_docs)]
impl Reg {
    pub const RAX: Self = Self(0);
    pub const RCX: Self = Self(1);
    pub const RDX: Self = Self(2);
    pub const RSP: Self = Self(4);
    pub const RBP: Self = Self(5);
    pub const RSI: Self = Self(6);
    pub const RDI: Self = Self(7);
    pub const R13: Self = Self(13);
    pub const R14: Self = Self(14);
    pub const R15: Self = Self(15);
}

/// A host memory operand: `[base + index * 2^scale + disp]`.
#[derive(Clone, Copy, Debug)]
pub struct Mem {
    /// Base register, or `None` for an absolute 32-bit displacement.
    pub base: Option<Reg>,
    /// Index register and log2 of its scale; RSP cannot be one.
    pub index: Option<(Reg, u8)>,
    /// Displacement in bytes.
    pub disp: i32,
}

impl Mem {
    /// `[base + disp]`.
    pub const fn at(base: Reg, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }
    /// `[base + index * 2^scale + disp]`.
    pub const fn indexed(base: Reg, index: Reg, scale: u8, disp: i32) -> Self {
        Self { base: Some(base), index: Some((index, scale)), disp }
    }
    /// A field of the CPU structure, to which RSP points.
    pub const fn cpu(offset: usize) -> Self {
        Self::at(Reg::RSP, offset as i32)
    }
}

/// Operand width of the assembler's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 16 bits (prefix 66H).
    W16,
    /// 32 bits; the upper half of a register result becomes zero.
    W32,
    /// 64 bits.
    W64,
}

/// A forward jump whose target is not yet known: the position of its 32-bit displacement.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Fixup(pub usize);

/// Condition codes of Jcc.
#[allow(missing_docs)]
pub mod cc {
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const A: u8 = 7;
    pub const S: u8 = 8;
}

/// One-operand-group and two-operand opcodes, named as the manual names them.
#[allow(missing_docs)]
pub mod op {
    pub const ADD_LOAD: &[u8] = &[0x03];
    pub const XOR_LOAD: &[u8] = &[0x33];
    pub const MOV_LOAD: &[u8] = &[0x8b];
    pub const MOV_STORE: &[u8] = &[0x89];
    pub const LEA: &[u8] = &[0x8d];
    pub const MOVSX8: &[u8] = &[0x0f, 0xbe];
    pub const MOVZX16: &[u8] = &[0x0f, 0xb7];
    pub const MOVSX16: &[u8] = &[0x0f, 0xbf];
    pub const MOVSXD: &[u8] = &[0x63];
}

/// Position-independent code under construction.
#[derive(Default)]
pub struct Asm {
    /// The bytes so far.
    pub bytes: Vec<u8>,
}

impl Asm {
    /// Where the next byte goes.
    pub fn here(&self) -> usize {
        self.bytes.len()
    }

    /// Appends raw bytes.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    /// An instruction with a register and a memory operand.
    pub fn rm(&mut self, width: Width, opcode: &[u8], reg: Reg, mem: Mem) {
        let (index, scale) = mem.index.unwrap_or((Reg::RSP, 0));
        let base = mem.base.unwrap_or(Reg::RBP);
        self.prefixes(width, reg, index, base);
        self.raw(opcode);
        let reg_bits = (reg.0 & 7) << 3;
        let short = i8::try_from(mem.disp).is_ok();
        let mode = match (mem.base, mem.disp) {
            (None, _) => 0,
            (Some(b), 0) if b.0 & 7 != 5 => 0,
            _ if short => 0x40,
            _ => 0x80,
        };
        if mem.index.is_some() || mem.base.is_none() || base.0 & 7 == 4 {
            self.raw(&[mode | reg_bits | 4, scale << 6 | (index.0 & 7) << 3 | base.0 & 7]);
        } else {
            self.raw(&[mode | reg_bits | base.0 & 7]);
        }
        if mode == 0x40 {
            self.raw(&[mem.disp as u8]);
        } else if mode == 0x80 || mem.base.is_none() {
            self.imm32(mem.disp);
        }
    }

    /// An instruction with two register operands; `rm` is the r/m one.
    pub fn rr(&mut self, width: Width, opcode: &[u8], reg: Reg, rm: Reg) {
        self.prefixes(width, reg, Reg::RAX, rm);
        self.raw(opcode);
        self.raw(&[0xc0 | (reg.0 & 7) << 3 | rm.0 & 7]);
    }

    fn prefixes(&mut self, width: Width, reg: Reg, index: Reg, base: Reg) {
        if width == Width::W16 {
            self.raw(&[0x66]);
        }
        let w = u8::from(width == Width::W64) << 3;
        let rex = w | (reg.0 >> 3) << 2 | (index.0 >> 3) << 1 | base.0 >> 3;
        if rex != 0 {
            self.raw(&[0x40 | rex]);
        }
    }

    /// `mov dst, src`.
    pub fn mov(&mut self, width: Width, dst: Reg, src: Reg) {
        self.rr(width, op::MOV_LOAD, dst, src);
    }

    /// `mov dst, [mem]`.
    pub fn load(&mut self, width: Width, dst: Reg, mem: Mem) {
        self.rm(width, op::MOV_LOAD, dst, mem);
    }

    /// `mov [mem], src`.
    pub fn store(&mut self, width: Width, mem: Mem, src: Reg) {
        self.rm(width, op::MOV_STORE, src, mem);
    }

    /// `lea dst, [mem]`; leaves flags alone.
    pub fn lea(&mut self, width: Width, dst: Reg, mem: Mem) {
        self.rm(width, op::LEA, dst, mem);
    }

    /// Loads a constant by the shortest form; leaves flags alone.
    pub fn mov_imm(&mut self, dst: Reg, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            self.prefixes(Width::W32, Reg::RAX, Reg::RAX, dst);
            self.raw(&[0xb8 | dst.0 & 7]);
            self.raw(&v.to_le_bytes());
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.rr(Width::W64, &[0xc7], Reg(0), dst);
            self.imm32(v);
        } else {
            self.prefixes(Width::W64, Reg::RAX, Reg::RAX, dst);
            self.raw(&[0xb8 | dst.0 & 7]);
            self.raw(&value.to_le_bytes());
        }
    }

    /// `mov [mem], imm32`, sign-extended for 64 bits.
    pub fn store_imm(&mut self, width: Width, mem: Mem, value: i32) {
        self.rm(width, &[0xc7], Reg(0), mem);
        match width {
            Width::W16 => self.raw(&(value as i16).to_le_bytes()),
            _ => self.imm32(value),
        }
    }

    /// Arithmetic with an immediate: `extension` is the /digit of opcode 81H (0 ADD, 4 AND, 7 CMP).
    pub fn alu_imm(&mut self, width: Width, extension: u8, dst: Reg, value: i32) {
        if let Ok(v) = i8::try_from(value) {
            self.rr(width, &[0x83], Reg(extension), dst);
            self.raw(&[v as u8]);
        } else {
            self.rr(width, &[0x81], Reg(extension), dst);
            self.imm32(value);
        }
    }

    /// Shift by a constant: `extension` is the /digit of opcode C1H (4 SHL, 5 SHR, 7 SAR).
    pub fn shift_imm(&mut self, width: Width, extension: u8, dst: Reg, count: u8) {
        self.rr(width, &[0xc1], Reg(extension), dst);
        self.raw(&[count]);
    }

    /// `rorx dst, src, count` (BMI2; leaves flags alone).
    pub fn rorx(&mut self, width: Width, dst: Reg, src: Reg, count: u8) {
        let w = u8::from(width == Width::W64) << 7;
        let byte1 = (!dst.0 >> 3 & 1) << 7 | 1 << 6 | (!src.0 >> 3 & 1) << 5 | 3;
        self.raw(&[0xc4, byte1, w | 0x7b, 0xf0, 0xc0 | (dst.0 & 7) << 3 | src.0 & 7, count]);
    }

    /// Replaces code by instructions that do nothing.
    pub fn erase(&mut self, range: std::ops::Range<usize>) {
        // NOP of 1 to 8 bytes (Intel SDM 2B, NOP, table 4-12).
        const NOPS: [&[u8]; 8] = [
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x40, 0x00],
            &[0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
            &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
        ];
        let Some(code) = self.bytes.get_mut(range) else { return };
        for piece in code.chunks_mut(NOPS.len()) {
            if let Some(nop) = NOPS.get(piece.len() - 1) {
                piece.copy_from_slice(nop);
            }
        }
    }

    /// `jcc` forward.
    pub fn jcc(&mut self, condition: u8) -> Fixup {
        self.raw(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Fixup(self.here() - 4)
    }

    /// `jmp` forward.
    pub fn jmp(&mut self) -> Fixup {
        self.raw(&[0xe9, 0, 0, 0, 0]);
        Fixup(self.here() - 4)
    }

    /// `jmp` back to a known position.
    pub fn jmp_to(&mut self, target: usize) {
        let fixup = self.jmp();
        self.bind_to(fixup, target);
    }

    /// Makes a forward jump land here.
    pub fn bind(&mut self, fixup: Fixup) {
        self.bind_to(fixup, self.here());
    }

    /// Makes a jump land at `target`.
    pub fn bind_to(&mut self, fixup: Fixup, target: usize) {
        let displacement = target as i64 - (fixup.0 as i64 + 4);
        if let Some(bytes) = self.bytes.get_mut(fixup.0..fixup.0 + 4) {
            bytes.copy_from_slice(&(displacement as i32).to_le_bytes());
        }
    }

    /// `call [mem]`.
    pub fn call_mem(&mut self, mem: Mem) {
        self.rm(Width::W32, &[0xff], Reg(2), mem);
    }

    /// `jmp [mem]`.
    pub fn jmp_mem(&mut self, mem: Mem) {
        self.rm(Width::W32, &[0xff], Reg(4), mem);
    }

    /// Saves the arithmetic flags to `to` in the form of LAHF and SETO; clobbers RSI.
    pub fn save_flags(&mut self, to: Mem) {
        self.mov(Width::W64, Reg::RSI, Reg::RAX);
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.store(Width::W16, to, Reg::RAX);
        self.mov(Width::W64, Reg::RAX, Reg::RSI);
    }

    /// Restores the arithmetic flags from `from`; clobbers RSI.
    pub fn restore_flags(&mut self, from: Mem) {
        self.mov(Width::W64, Reg::RSI, Reg::RAX);
        self.rm(Width::W32, op::MOVZX16, Reg::RAX, from);
        self.raw(&[0x04, 0x7f, 0x9e]); // add al, 0x7f; sahf
        self.mov(Width::W64, Reg::RAX, Reg::RSI);
    }

    /// As `restore_flags`, but clobbers the memory `spill` and not RSI.
    pub fn restore_flags_through(&mut self, from: Mem, spill: Mem) {
        self.store(Width::W64, spill, Reg::RAX);
        self.rm(Width::W32, op::MOVZX16, Reg::RAX, from);
        self.raw(&[0x04, 0x7f, 0x9e]); // add al, 0x7f; sahf
        self.load(Width::W64, Reg::RAX, spill);
    }
}
