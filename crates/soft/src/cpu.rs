//! One virtual CPU's state, laid out for translated code.
//!
//! While translated code runs, the host's RSP points at this structure and most guest registers
//! live in host registers; whenever Rust code runs, everything is here: `gpr`, `rip` and `rflags`
//! are complete and may be changed. The x87 registers alone stay in the host's FPU while the vCPU
//! runs (see `fpu`); XMM and YMM registers and MXCSR are in `fpu.area` whenever Rust code runs.
use crate::cache::CodeCache;
use crate::exception::Exception;
use crate::lapic::Lapic;
use crate::mode::{CodeSize, MmuIndex, Mode, SegmentClass};
use crate::space::Spaces;
use crate::tlb::{ExecTlb, Tlb, Walked};
use crate::vm::VmShared;
use arch::registers::{cr0, cr4, efer, rflags, xcr0};
use arch::{DescriptorTable, FpuState, InDelivery, Msrs, Segment, SegmentName, msr};
use engine::VcpuIo;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Entries of a jump cache: a power of two.
pub const JUMP_CACHE_ENTRIES: usize = 4096;

/// Where translated code of guest addresses starts: for indirect jumps.
#[repr(C)]
pub struct JumpCache {
    /// Guest address in each slot, which is one of its two; what an empty slot holds is in neither.
    pub pcs: [u64; JUMP_CACHE_ENTRIES],
    /// Host address to jump to, guest flags being in `raw_flags`.
    pub hosts: [u64; JUMP_CACHE_ENTRIES],
}

impl JumpCache {
    /// The slot that holds `pc`.
    #[inline]
    pub fn find(&self, pc: u64) -> Option<usize> {
        let slot = jump_slot(pc);
        [slot, slot ^ 1].into_iter().find(|&s| self.pcs[s] == pc)
    }

    /// The slot to put `pc` into, which is not there: an empty one, else `turn` decides which one
    /// of the two.
    pub fn place(&self, pc: u64, turn: u32) -> usize {
        let first = jump_slot(pc);
        let empty = |s: &usize| self.pcs[*s] == EMPTY_JUMPS[*s];
        let any = first ^ (turn & 1) as usize;
        [first, first ^ 1].into_iter().find(empty).unwrap_or(any)
    }
}

/// The first slot of a guest address in a jump cache, where `emit::control` looks; the other one,
/// where `thunks::leave_indirect` does, differs in the lowest bit.
pub const fn jump_slot(pc: u64) -> usize {
    (pc ^ (pc & 0xffff_ffff) >> 5) as usize & (JUMP_CACHE_ENTRIES - 1)
}

/// What empty slots of a jump cache hold: guest addresses that belong to other slots.
pub static EMPTY_JUMPS: [u64; JUMP_CACHE_ENTRIES] = {
    let mut pcs = [0; JUMP_CACHE_ENTRIES];
    pcs[0] = 2;
    pcs[1] = 2;
    pcs
};

/// Link cells for jumps that leave a page: see `links`.
pub const CELLS: usize = 1 << 17;

/// System registers and MSRs: only Rust code touches these.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct System {
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// DR0–DR3, DR6, DR7.
    pub debug: [u64; 6],
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub ldtr: Segment,
    pub tr: Segment,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_adjust: u64,
    pub tsc_aux: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
    /// Current privilege level (CS.DPL is not it in real mode and after some loads).
    pub cpl: u8,
    /// Interrupts are inhibited until after the next instruction (STI, MOV SS).
    pub shadow: bool,
    /// Debug exceptions are inhibited too (MOV SS, not STI).
    pub shadow_debug: bool,
    pub nmi_blocked: bool,
    /// What a state that was taken over had to deliver first.
    pub in_delivery: Option<InDelivery>,
    /// DR6 bits of data and I/O breakpoints hit by the present instruction.
    pub debug_hits: u64,
}

impl System {
    /// The registers after RESET (Intel SDM 3A table 10-1); PAT and MTRRs likewise.
    pub fn reset() -> Self {
        let state = arch::VcpuState::reset();
        let reset = |number| Msrs::reset_value(number).unwrap_or(0);
        Self {
            cr0: state.cr0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: state.xcr0,
            debug: state.debug,
            gdtr: state.gdtr,
            idtr: state.idtr,
            ldtr: state.segments.ldtr,
            tr: state.segments.tr,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_adjust: 0,
            tsc_aux: 0,
            pat: reset(msr::PAT),
            misc_enable: reset(msr::MISC_ENABLE),
            spec_ctrl: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            cpl: 0,
            shadow: false,
            shadow_debug: false,
            nmi_blocked: false,
            in_delivery: None,
            debug_hits: 0,
        }
    }
}

/// One virtual CPU.
#[repr(C, align(64))]
pub struct Cpu {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15.
    pub gpr: [u64; 16],
    /// Address that translated code loads from at each poll: a valid one, or one that faults once
    /// another thread wants this vCPU's attention.
    pub poll: AtomicU64,
    /// Arithmetic flags as LAHF and SETO leave them: AL = OF, AH = SF ZF AF PF CF.
    pub raw_flags: u16,
    /// Flags in the same form, as they were when a thunk or a signal interrupted translated code.
    pub host_flags: u16,
    /// Host addresses of the present block's groups of accesses.
    pub groups: [u64; crate::translate::groups::MAX_GROUPS],
    /// Spill slots of translated code.
    pub spill: [u64; 5],
    /// The host's stack pointer while translated code runs.
    pub host_rsp: u64,
    /// Where translated code left and why (see `run`).
    pub exit: u64,
    /// Second word about the exit.
    pub exit_detail: u64,
    /// Host address after an indirect jump that left.
    pub exit_from: u64,
    /// Pointers to the thunks that translated code calls.
    pub thunks: [usize; crate::thunks::index::COUNT],
    /// 1 while XMM, YMM and MXCSR of the guest are in host registers.
    pub vectors_live: u64,
    /// 64 + 64 bytes in which accesses to devices and across pages take place.
    pub bounce: Bounce,
    /// Instruction pointer of the present instruction (in 16- and 32-bit code the offset in CS).
    pub rip: u64,
    /// RFLAGS, complete whenever Rust code runs.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Difference between the guest's and the host's time-stamp counter.
    pub tsc_offset: u64,
    /// x87, SSE and AVX registers.
    pub area: FpuState,
    /// Guest-linear to host, for reads and writes.
    pub tlb: Tlb,
    /// Guest address to translated code, one for each MMU index.
    pub jumps: [JumpCache; MmuIndex::COUNT],
    /// Targets of jumps that leave a page.
    pub cells: [u64; CELLS],

    /// System registers.
    pub sys: System,
    /// The mode for which the present code was looked up; `update_mode` derives it.
    pub mode: Mode,
    /// How often one of `jumps` missed.
    pub jump_misses: u32,
    /// Modes of the entries in `jumps`.
    pub jump_modes: [Mode; MmuIndex::COUNT],
    /// Which of `jumps` hold addresses of pages that are not global, without a list of them.
    pub jumps_volatile: [bool; MmuIndex::COUNT],
    /// Address spaces.
    pub spaces: Spaces,
    /// Results of page walks.
    pub walked: Walked,
    /// Guest-linear to physical, for instruction fetches.
    pub exec_tlb: ExecTlb,
    /// Translated code.
    pub cache: CodeCache,
    /// The local APIC.
    pub lapic: Lapic,
    /// Index of this vCPU in its VM, also its initial APIC id.
    pub index: u32,
    /// Where a page-crossing or device write in `bounce` must go (see `access`).
    pub pending_write: crate::access::PendingWrite,
    /// Memory, mailboxes, and what else the vCPUs share.
    pub vm: Arc<VmShared>,
    /// The machine, set for the time of `Vcpu::run`.
    pub io: Option<IoPointer>,
    /// Next instruction after the one that a helper executes.
    pub next_rip: u64,
    /// A defect or a panic in a helper: `run` returns it.
    pub defect: Option<String>,
    /// A triple fault happened.
    pub triple_fault: bool,
    /// The present instruction ended in an exception.
    pub faulted: bool,
    /// One instruction at a time is asked for, without the guest's knowledge.
    pub stepping: bool,
    /// The next block is to be one without groups.
    pub plain: bool,
    /// What a debugger outside the guest asked for.
    pub outside: crate::debug::Outside,
    /// An interrupt or NMI may wait to be delivered: whatever might open a window for it must go
    /// back to the run loop.
    pub outstanding: bool,
    /// One instruction at a time is run: no helper may go on with the next one.
    pub single: bool,
    /// PAUSEs to go until the host's thread gives way: see `execute::pause`.
    pub patience: u32,
    /// Base of CS for which links and jump caches were filled.
    pub jump_base: u64,
    /// Timer and signal stack of the thread in `Vcpu::run`.
    pub timer: Option<crate::run::Thread>,
}

/// Bounce buffer for one access of up to 64 bytes.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; 128]);

/// The machine's callbacks while `Vcpu::run` lasts.
#[derive(Clone, Copy)]
pub struct IoPointer(pub *const (dyn VcpuIo + 'static));

/// Segments in 64-bit mode: only FS and GS have bases.
const SEGMENTS64: [SegmentClass; 6] = {
    let mut classes = [SegmentClass::Flat; 6];
    classes[SegmentName::Fs as usize] = SegmentClass::Based;
    classes[SegmentName::Gs as usize] = SegmentClass::Based;
    classes
};

impl Cpu {
    /// A segment register.
    pub fn segment(&self, name: SegmentName) -> &Segment {
        &self.segments[name as usize]
    }

    /// Whether paging is on.
    pub fn paging(&self) -> bool {
        self.sys.cr0 & cr0::PG != 0
    }

    /// Whether long mode is active (64-bit or compatibility mode).
    pub fn long_mode(&self) -> bool {
        self.sys.efer & efer::LMA != 0
    }

    /// Whether this is protected mode and not virtual-8086 mode.
    pub fn protected(&self) -> bool {
        self.sys.cr0 & cr0::PE != 0 && self.rflags & rflags::VM == 0
    }

    /// Whether `address` is canonical for the present paging mode (always in 32-bit modes).
    pub fn canonical(&self, address: u64) -> bool {
        let bits = if self.sys.cr4 & cr4::LA57 != 0 { 57 } else { 48 };
        let shift = 64 - bits;
        ((address << shift) as i64 >> shift) as u64 == address
    }

    /// Mask of a valid offset or linear address: 64 bits in 64-bit mode, 32 elsewhere.
    pub fn address_mask(&self) -> u64 {
        if self.mode.is_64() { u64::MAX } else { 0xffff_ffff }
    }

    /// The machine's callbacks.
    ///
    /// # Panics
    /// Never while `Vcpu::run` is on the stack, which is the only time when helpers run.
    pub fn io(&self) -> &'static dyn VcpuIo {
        crate::run::io_of(self)
    }

    /// Derives the mode from control registers, flags and segments. To be called by every helper
    /// that changes one of them, before it returns [`crate::exception::Flow::Jump`] or `Leave`.
    pub fn update_mode(&mut self) {
        let cs = self.segments[SegmentName::Cs as usize];
        let long = self.long_mode();
        let code = match (long && cs.long(), cs.db()) {
            (true, _) => CodeSize::Bits64,
            (false, true) => CodeSize::Bits32,
            (false, false) => CodeSize::Bits16,
        };
        let vm86 = self.rflags & rflags::VM != 0;
        let real = self.sys.cr0 & cr0::PE == 0 || vm86;
        let bits64 = code == CodeSize::Bits64;
        let step = self.stepping
            || self.rflags & rflags::TF != 0
            || self.breakpoints()
            || self.outside.is_active();
        let avx = xcr0::SSE | xcr0::AVX;
        // In 64-bit mode SS means nothing: code entered by SYSCALL and by interrupts is the same.
        let stack32 = !bits64 && self.segments[SegmentName::Ss as usize].db();
        let bits = [
            (stack32, Mode::STACK32),
            (self.rflags & rflags::DF != 0, Mode::DOWN),
            (step, Mode::STEP),
            (self.sys.shadow, Mode::SHADOW),
            (self.sys.cr0 & cr0::TS != 0, Mode::TASK_SWITCHED),
            (self.sys.cr0 & cr0::EM != 0, Mode::EMULATE_FPU),
            (self.sys.cr0 & cr0::MP != 0, Mode::MONITOR_FPU),
            (self.sys.cr4 & cr4::OSFXSR != 0, Mode::SSE),
            (self.sys.cr4 & cr4::OSXSAVE != 0 && self.sys.xcr0 & avx == avx, Mode::AVX),
            (self.sys.cr4 & cr4::TSD != 0 && self.sys.cpl != 0, Mode::NO_TSC),
            (self.sys.cr4 & cr4::SMAP != 0, Mode::SMAP),
            (real, Mode::REAL_SEGMENTS),
            (vm86, Mode::VIRTUAL_8086),
        ];
        let bits = bits.iter().fold(0, |all, &(on, bit)| all | if on { bit } else { 0 });
        let classes = if bits64 { SEGMENTS64 } else { self.segment_classes(real) };
        self.mode = Mode::new(code, self.sys.cpl, self.mmu_index(), classes, bits);
    }

    /// The same where 64-bit mode was and is on and control registers are as they were: after a
    /// change of the privilege level or of flags.
    pub fn update_mode_64(&mut self) {
        if !self.mode.is_64() {
            return self.update_mode();
        }
        let bits = [
            (self.rflags & rflags::DF != 0, Mode::DOWN),
            (self.rflags & rflags::TF != 0 || self.breakpoints(), Mode::STEP),
            (self.sys.shadow, Mode::SHADOW),
            (self.sys.cr4 & cr4::TSD != 0 && self.sys.cpl != 0, Mode::NO_TSC),
        ];
        let changing = bits.iter().fold(0, |all, &(_, bit)| all | bit);
        let bits = bits.iter().fold(0, |all, &(on, bit)| all | if on { bit } else { 0 });
        let kept = self.mode.0 & !changing;
        self.mode = Mode(kept | bits).with_cpl(self.sys.cpl).with_mmu(self.mmu_index());
    }

    /// The TLB for ordinary accesses at the present privilege.
    fn mmu_index(&self) -> MmuIndex {
        let ac = self.rflags & rflags::AC != 0;
        match self.sys.cpl {
            3 if ac && self.sys.cr0 & cr0::AM != 0 => MmuIndex::Aligned,
            3 => MmuIndex::User,
            _ if ac && self.sys.cr4 & cr4::SMAP != 0 => MmuIndex::SupervisorAc,
            _ => MmuIndex::Supervisor,
        }
    }

    /// Outside 64-bit mode.
    fn segment_classes(&self, real: bool) -> [SegmentClass; 6] {
        let mut classes = [SegmentClass::Flat; 6];
        for name in SegmentName::ALL {
            let segment = self.segment(name);
            classes[name as usize] = if segment.limit != u32::MAX
                || (!real && (segment.expand_down() || !segment.readable()))
                || (!real && name != SegmentName::Cs && !segment.writable())
            {
                SegmentClass::Checked
            } else if segment.base == 0 {
                SegmentClass::Flat
            } else {
                SegmentClass::Based
            };
        }
        classes
    }

    /// Whether DR7 enables any breakpoint.
    fn breakpoints(&self) -> bool {
        self.sys.debug[5] & 0xff != 0
    }

    /// Whether DR7, or a debugger outside, enables a breakpoint on data or port accesses.
    #[inline]
    pub fn data_breakpoints(&self) -> bool {
        if !self.breakpoints() && self.outside.dr7 == 0 {
            return false;
        }
        let on_data =
            |dr7: u64| (0..4).any(|n| dr7 >> (2 * n) & 3 != 0 && dr7 >> (16 + 4 * n) & 3 != 0);
        on_data(self.sys.debug[5]) || on_data(self.outside.dr7)
    }

    /// The linear address of `offset` in segment `name` for an access of `size` bytes, after the
    /// checks of limit, type and canonical form (Intel SDM 3A 5.3 and 5.4).
    ///
    /// # Errors
    /// #SS(0) for the stack segment, #GP(0) for the others.
    pub fn linear(
        &self,
        name: SegmentName,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Exception> {
        let fault = if name == SegmentName::Ss { Exception::SS0 } else { Exception::GP0 };
        let segment = self.segment(name);
        if self.mode.is_64() {
            let base = match name {
                SegmentName::Fs | SegmentName::Gs => segment.base,
                _ => 0,
            };
            let linear = base.wrapping_add(offset);
            let last = linear.wrapping_add(size.saturating_sub(1));
            return if self.canonical(linear) && self.canonical(last) {
                Ok(linear)
            } else {
                Err(fault)
            };
        }
        if self.mode.access(name, write) == SegmentClass::Checked {
            self.check_segment(segment, offset & 0xffff_ffff, size, write).ok_or(fault)?;
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Type and limit check of 16- and 32-bit code; `None` is a violation.
    fn check_segment(&self, segment: &Segment, offset: u64, size: u64, write: bool) -> Option<()> {
        if !self.mode.real_segments() {
            let allowed = if write { segment.writable() } else { segment.readable() };
            if !allowed {
                return None;
            }
        }
        let last = offset + size.saturating_sub(1);
        let limit = u64::from(segment.limit);
        let within = if !self.mode.real_segments() && segment.expand_down() {
            let top = if segment.db() { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        within.then_some(())
    }
}
