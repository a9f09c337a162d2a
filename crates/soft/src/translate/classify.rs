//! What the translator does with each kind of guest instruction.
//!
//! The rule is a whitelist: an instruction runs natively only if the guest's CPU has it, its one memory operand (if any) is explicit and of known size, and it is neither
//! privileged nor able to show the host's state. Everything else goes to `execute`, which raises
//! #UD for what the guest's CPU does not have.
use crate::instruction_set::{self, InstructionSet};
use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, Mnemonic, OpAccess, OpKind,
};

/// The treatment of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Runs as it is, registers renamed and its memory operand, if any, redirected.
    Native = 1,
    /// Native, and touches XMM, YMM or MXCSR.
    NativeVector,
    /// Does nothing: NOPs, prefetches, ENDBR, CLD/STD already in force.
    Nothing,
    /// LEA.
    Lea,
    /// MOV between AL/AX/EAX/RAX and an absolute offset.
    MovOffset,
    /// BT, BTS, BTR or BTC with a register bit offset into memory.
    BitString,
    /// PUSH of a register or immediate.
    Push,
    /// PUSH of memory.
    PushMemory,
    /// POP of a register.
    Pop,
    /// LEAVE.
    Leave,
    /// Near direct JMP.
    Jump,
    /// Jcc.
    Branch,
    /// LOOPcc, JRCXZ.
    LoopBranch,
    /// Near direct CALL.
    Call,
    /// Near indirect JMP.
    JumpIndirect,
    /// Near indirect CALL.
    CallIndirect,
    /// Near RET.
    Return,
    /// RDTSC and RDTSCP where the mode allows them at all levels.
    ReadTsc,
    /// What privileged 64-bit code does all the time: see `emit::system`. Only
    /// `translate::fetch` gives this class, which depends on the mode.
    System,
    /// The same for what changes the mode, and so ends the block.
    SystemEnd,
    /// A Rust helper; the block goes on after it.
    Helper,
    /// A Rust helper after which the block ends.
    HelperEnd,
    /// Not an instruction of this CPU: #UD.
    Invalid,
}

impl Class {
    /// All of them, each at the place of its number less one.
    pub(super) const ALL: [Self; 23] = [
        Self::Native,
        Self::NativeVector,
        Self::Nothing,
        Self::Lea,
        Self::MovOffset,
        Self::BitString,
        Self::Push,
        Self::PushMemory,
        Self::Pop,
        Self::Leave,
        Self::Jump,
        Self::Branch,
        Self::LoopBranch,
        Self::Call,
        Self::JumpIndirect,
        Self::CallIndirect,
        Self::Return,
        Self::ReadTsc,
        Self::System,
        Self::SystemEnd,
        Self::Helper,
        Self::HelperEnd,
        Self::Invalid,
    ];
}

/// Classifies an instruction for a guest.
pub fn classify_for(insn: &Instruction, instructions: &InstructionSet) -> Class {
    match classify(insn) {
        class @ (Class::Nothing | Class::Invalid) => class,
        class if instructions.has(insn) => class,
        _ => Class::Invalid,
    }
}

/// Classifies an instruction that the guest's CPU has; the answer depends on its code and on
/// whether it has a memory operand.
pub fn classify(insn: &Instruction) -> Class {
    super::facts::of(insn).class
}

/// Whether the instruction has an explicit memory operand.
pub fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// Works the class out.
pub(super) fn compute(insn: &Instruction, memory: bool) -> Class {
    use Mnemonic as M;
    if insn.code() == Code::INVALID {
        return Class::Invalid;
    }
    if hint(insn.mnemonic()) {
        return Class::Nothing;
    }
    if unsupported(insn) {
        return Class::Invalid;
    }
    if insn.flow_control() != FlowControl::Next {
        return control_flow(insn);
    }
    match insn.mnemonic() {
        M::Lea => Class::Lea,
        M::Push => push(insn, memory),
        M::Pop if !memory && insn.op0_register().is_gpr() => Class::Pop,
        M::Leave => Class::Leave,
        M::Bt | M::Bts | M::Btr | M::Btc if memory && insn.op_kind(1) == OpKind::Register => {
            Class::BitString
        }
        M::Mov if is_offset_move(insn) => Class::MovOffset,
        M::Mov if (0..2).any(|i| is_special_register(insn, i)) => Class::HelperEnd,
        M::Rdtsc | M::Rdtscp => Class::ReadTsc,
        _ if ends_block(insn.mnemonic()) => Class::HelperEnd,
        _ if needs_helper(insn, memory) => Class::Helper,
        _ if uses_vectors(insn) => Class::NativeVector,
        _ => Class::Native,
    }
}

/// Hints, and instructions in the space of NOPs that this CPU does not know (Intel SDM 2B, NOP).
fn hint(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Nop
            | M::Reservednop
            | M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Cldemote
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchwt1
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Bndcl
            | M::Bndcu
            | M::Bndcn
            | M::Bndmov
            | M::Bndmk
            | M::Bndldx
            | M::Bndstx
    )
}

fn push(insn: &Instruction, memory: bool) -> Class {
    if memory {
        Class::PushMemory
    } else if insn.op_kind(0) == OpKind::Register && !insn.op0_register().is_gpr() {
        Class::Helper
    } else {
        Class::Push
    }
}

fn control_flow(insn: &Instruction) -> Class {
    use FlowControl as F;
    let near = insn.is_jmp_short_or_near()
        || insn.is_jcc_short_or_near()
        || insn.is_call_near()
        || insn.is_jmp_near_indirect()
        || insn.is_call_near_indirect();
    match insn.flow_control() {
        F::UnconditionalBranch if near => Class::Jump,
        F::ConditionalBranch if near => Class::Branch,
        F::ConditionalBranch if insn.is_loop() || insn.is_loopcc() || insn.is_jcx_short() => {
            Class::LoopBranch
        }
        F::Call if near => Class::Call,
        F::IndirectBranch if near => Class::JumpIndirect,
        F::IndirectCall if near => Class::CallIndirect,
        F::Return if insn.mnemonic() == Mnemonic::Ret => Class::Return,
        _ => Class::HelperEnd,
    }
}

/// Helpers after which the next instruction is looked up anew: they may change the mode, the
/// translations, or whether interrupts are taken.
fn ends_block(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Sti
            | M::Cli
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Stac
            | M::Clac
            | M::Std
            | M::Cld
            | M::Hlt
            | M::Lmsw
            | M::Clts
            | M::Invlpg
            | M::Invpcid
            | M::Wrmsr
            | M::Xsetbv
            | M::Lgdt
            | M::Lidt
            | M::Lldt
            | M::Ltr
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Swapgs
            | M::Wbinvd
            | M::Invd
            | M::Cpuid
            | M::Mwait
            | M::Monitor
    )
}

/// Whether the instruction's operand `i` is a segment, control, debug or test register.
fn is_special_register(insn: &Instruction, i: u32) -> bool {
    let r = insn.op_register(i);
    insn.op_kind(i) == OpKind::Register
        && (r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr())
}

fn is_offset_move(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}

fn needs_helper(insn: &Instruction, memory: bool) -> bool {
    use Mnemonic as M;
    if insn.is_privileged()
        || insn.is_string_instruction()
        || insn.is_save_restore_instruction()
        || insn.is_vsib()
        || insn.is_stack_instruction()
        || (0..insn.op_count()).any(|i| is_special_register(insn, i))
    {
        return true;
    }
    if matches!(
        insn.mnemonic(),
        M::In
            | M::Out
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Rdtscp
            | M::Rdpid
            | M::Rdpmc
            | M::Xgetbv
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Enter
            | M::Bound
            | M::Arpl
            | M::Aaa
            | M::Aad
            | M::Aam
            | M::Aas
            | M::Daa
            | M::Das
            | M::Salc
            | M::Xlatb
            | M::Pushf
            | M::Pushfd
            | M::Pushfq
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Fnstenv
            | M::Fstenv
            | M::Fldenv
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fstdw
            | M::Fstsg
    ) {
        return true;
    }
    let size = insn.memory_size().size();
    if memory {
        return size == 0 || size > 64;
    }
    // Without an explicit memory operand there must be no implicit one.
    !InstructionInfoFactory::new().info(insn).used_memory().is_empty()
}

/// Whether XMM, YMM or MXCSR may be read or written: by the instruction set, since conversions to
/// general and MMX registers use MXCSR without naming a vector register.
fn uses_vectors(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    use Mnemonic as M;
    if matches!(insn.mnemonic(), M::Lfence | M::Mfence | M::Sfence | M::Movnti | M::Crc32) {
        return false;
    }
    insn.cpuid_features().iter().any(|feature| {
        matches!(
            feature,
            F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSE4A
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::GFNI
                | F::VAES
                | F::VPCLMULQDQ
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
        )
    })
}

/// Whether the engine does not have the instruction.
fn unsupported(insn: &Instruction) -> bool {
    matches!(
        insn.encoding(),
        EncodingKind::EVEX | EncodingKind::XOP | EncodingKind::D3NOW | EncodingKind::MVEX
    ) || instruction_set::is_unknown(insn)
}

/// How the instruction uses its explicit memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Bytes, 1 to 64.
    pub size: u32,
    /// Whether the operand is read.
    pub reads: bool,
    /// Whether the operand is written (perhaps only on a condition).
    pub writes: bool,
}

/// Looks up operand use; one for each translator.
pub struct Operands {
    factory: InstructionInfoFactory,
}

impl Default for Operands {
    fn default() -> Self {
        Self { factory: InstructionInfoFactory::new() }
    }
}

impl Operands {
    /// The accesses of the instruction's explicit operands, by operand number.
    pub fn accesses(&mut self, insn: &Instruction) -> [OpAccess; 5] {
        let options =
            InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        let info = self.factory.info_options(insn, options);
        std::array::from_fn(|i| {
            if i < insn.op_count() as usize { info.op_access(i as u32) } else { OpAccess::None }
        })
    }

    /// All registers that the instruction uses, with how.
    pub fn registers(
        &mut self,
        insn: &Instruction,
    ) -> impl Iterator<Item = (iced_x86::Register, OpAccess)> {
        let info = self.factory.info_options(insn, InstructionInfoOptions::NO_MEMORY_USAGE);
        info.used_registers().iter().map(|used| (used.register(), used.access()))
    }

    /// The memory operand, if there is one that is accessed.
    pub fn memory(&mut self, insn: &Instruction) -> Option<Operand> {
        if !has_memory(insn) {
            return None;
        }
        let facts = super::facts::of(insn);
        let (reads, writes) = (facts.reads_memory, facts.writes_memory);
        (reads || writes).then_some(Operand {
            size: insn.memory_size().size() as u32,
            reads,
            writes,
        })
    }
}

/// Whether the instruction's memory operand must be aligned to its size (Intel SDM 2A table 2-17
/// and 2.4: legacy SSE operands of 16 bytes, and a few others).
pub fn needs_alignment(insn: &Instruction) -> bool {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => false,
        M::Pcmpestri | M::Pcmpestrm | M::Pcmpistri | M::Pcmpistrm => false,
        M::Pcmpestri64 | M::Pcmpestrm64 => false,
        // Here CPUs differ; the access itself will tell.
        M::Sha1msg1
        | M::Sha1msg2
        | M::Sha1nexte
        | M::Sha1rnds4
        | M::Sha256msg1
        | M::Sha256msg2
        | M::Sha256rnds2 => false,
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa
        | M::Cmpxchg16b => true,
        _ => {
            insn.encoding() == EncodingKind::Legacy
                && insn.memory_size().size() == 16
                && uses_vectors(insn)
        }
    }
}

/// Whether the instruction waits for pending x87 exceptions before it touches memory.
pub fn waits_for_x87(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    use Mnemonic as M;
    let x87 = |f: &CpuidFeature| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX);
    let names_mmx = || (0..insn.op_count()).any(|i| insn.op_register(i).is_mm());
    (insn.cpuid_features().iter().any(x87) || names_mmx())
        && !matches!(insn.mnemonic(), M::Fnstcw | M::Fnstsw)
}

/// Whether an access reads.
pub fn reads(access: OpAccess) -> bool {
    use OpAccess as A;
    matches!(access, A::Read | A::CondRead | A::ReadWrite | A::ReadCondWrite | A::CondWrite)
}

/// Whether an access writes.
pub fn writes(access: OpAccess) -> bool {
    use OpAccess as A;
    matches!(access, A::Write | A::CondWrite | A::ReadWrite | A::ReadCondWrite)
}
