//! The run loop of a vCPU: events between instructions, finding the next block, and what to do
//! when translated code returns.
#![allow(unsafe_code)]
use crate::cache::BlockId;
use crate::cpu::{Cpu, IoPointer};
use crate::dirty::Running;
use crate::events;
use crate::exception::Exception;
use crate::fpu;
use crate::lapic;
use crate::mode::Mode;
use crate::signals::{self, AltStack, HostTimer, POLL_ATTRACT};
use crate::thunks::{self, exit};
use crate::vm::{Mailbox, Written, pending};
use arch::registers::gpr::RSP;
use arch::registers::{rflags, vector};
use arch::{GuestPhysical, MpState, SegmentName};
use engine::{EngineError, Halt, VcpuIo};
use iced_x86::Mnemonic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What [`Cpu::attend`] takes out of the mailbox itself.
const ATTENDED: u32 = pending::KICK | pending::CODE | pending::GUARD | pending::EMPTY_TLB;

/// What polls load from while nobody wants the vCPU's attention.
static POLL_QUIET: u32 = 0;

/// Makes a vCPU that runs translated code leave it soon.
pub fn attract(mailbox: &Mailbox) {
    let poll = mailbox.poll.load(Ordering::SeqCst) as *const AtomicU64;
    if !poll.is_null() {
        // SAFETY: `Mailbox::poll` is the address of a word in a `CpuRegion`, which the VM keeps
        // mapped as long as anybody can hold the mailbox.
        unsafe { (*poll).store(POLL_ATTRACT, Ordering::SeqCst) };
    }
}

/// A machine without devices, for the time when no machine is attached.
struct Nothing;

impl VcpuIo for Nothing {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: GuestPhysical, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: GuestPhysical, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
    fn acknowledge_pic(&self) -> Option<u8> {
        None
    }
}

/// The machine of a running vCPU.
pub fn io_of(cpu: &Cpu) -> &'static dyn VcpuIo {
    match cpu.io {
        // SAFETY: `run` sets the pointer from a reference that outlives it, and clears it before
        // it returns; the reference made here is used within one helper of that run.
        Some(IoPointer(io)) => unsafe { &*io },
        None => &Nothing,
    }
}

/// What a thread holds while it runs vCPUs.
pub struct Thread {
    _stack: AltStack,
    timer: HostTimer,
}

/// Runs the guest until something ends it.
///
/// # Errors
/// The engine cannot go on.
pub fn run(cpu: &mut Cpu, io: &dyn VcpuIo) -> Result<Halt, EngineError> {
    on_this_thread(cpu, io, cycle)
}

/// Runs one instruction, or delivers one event.
///
/// # Errors
/// The engine cannot go on.
pub fn step(cpu: &mut Cpu, io: &dyn VcpuIo) -> Result<Option<Halt>, EngineError> {
    cpu.stepping = true;
    let result = on_this_thread(cpu, io, one);
    cpu.stepping = false;
    result
}

/// Does something while this thread's signals belong to the vCPU.
fn on_this_thread<T>(
    cpu: &mut Cpu,
    io: &dyn VcpuIo,
    work: impl FnOnce(&mut Cpu) -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    let thread = Thread { _stack: AltStack::install(), timer: HostTimer::new()? };
    // SAFETY: only the lifetime is changed; `io` is cleared again below, before `io` the
    // reference ends.
    let erased = unsafe {
        std::mem::transmute::<*const (dyn VcpuIo + '_), *const (dyn VcpuIo + 'static)>(io)
    };
    cpu.io = Some(IoPointer(erased));
    cpu.timer = Some(thread);
    signals::bind(cpu, cpu.cache.range());
    fpu::x87_from_area(cpu);
    cpu.update_mode();
    cpu.timer_changed();
    cpu.poll.store(&raw const POLL_QUIET as u64, Ordering::SeqCst);
    cpu.outstanding = true;
    let running = Running::new(cpu.vm.clone(), cpu.index);
    let result = work(cpu);
    drop(running);
    fpu::x87_to_area(cpu);
    fpu::reset_host_x87();
    signals::unbind();
    cpu.timer = None;
    cpu.io = None;
    result
}

/// What ended the guest while it ran.
fn end(cpu: &mut Cpu) -> Result<Option<Halt>, EngineError> {
    if let Some(defect) = cpu.defect.take() {
        return Err(EngineError::Defect(defect));
    }
    Ok(std::mem::take(&mut cpu.triple_fault).then_some(Halt::TripleFault))
}

fn one(cpu: &mut Cpu) -> Result<Option<Halt>, EngineError> {
    if cpu.attend() {
        return Ok(Some(Halt::Kicked));
    }
    if cpu.lapic.mp == MpState::Halted && events::can_wake(cpu) {
        cpu.lapic.mp = MpState::Running;
    }
    let running = cpu.lapic.mp == MpState::Running;
    if running && !events::finish_delivery(cpu) && !events::take_event(cpu) {
        single(cpu)?;
    }
    end(cpu)
}

fn cycle(cpu: &mut Cpu) -> Result<Halt, EngineError> {
    loop {
        if let Some(halt) = end(cpu)? {
            cpu.outside.take_stop();
            return Ok(halt);
        }
        if let Some(stop) = cpu.outside.take_stop() {
            return Ok(Halt::Debug(stop));
        }
        if cpu.attend() {
            return Ok(Halt::Kicked);
        }
        if cpu.lapic.mp != MpState::Running {
            cpu.wait();
            continue;
        }
        if events::finish_delivery(cpu) {
            continue;
        }
        if cpu.outstanding && !cpu.outside.holds_interrupts() {
            if events::take_event(cpu) {
                continue;
            }
            cpu.outstanding = events::outstanding(cpu);
        }
        if cpu.mode.step() || cpu.mode.shadow() {
            if !cpu.stops_here() {
                single(cpu)?;
                cpu.stops_after();
            }
        } else {
            stretch(cpu)?;
        }
    }
}

/// Runs translated code from `rip` on, following and linking its exits, until something else than
/// the end of a block comes up.
fn stretch(cpu: &mut Cpu) -> Result<(), EngineError> {
    let Some(mut entry) = entry(cpu) else { return Ok(()) };
    loop {
        cpu.pack_flags();
        // SAFETY: `cpu` lies in its `CpuRegion` (made so by `SoftVcpu`), and the entry is that of
        // a block for the present mode which is alive.
        unsafe { thunks::enter(cpu, entry) };
        match cpu.exit {
            exit::EDGE => {
                let edge = cpu.exit_detail as u32;
                let Some(target) = cpu.cache.edge_target(edge) else {
                    return Err(EngineError::Defect(format!("no edge {edge}")));
                };
                cpu.rip = target & cpu.ip_mask();
                cpu.unpack_flags();
                if cpu.refuse_target(cpu.cache.edge_host(edge) + 1) {
                    return Ok(());
                }
                let flushes = cpu.cache.flushes;
                let Some(next) = find(cpu) else { return Ok(()) };
                if cpu.cache.flushes == flushes {
                    let global = cpu.lasting(next);
                    cpu.cache.link(edge, next, global, &mut cpu.cells);
                }
                let Some(next) = cpu.cache.saved_entry(next) else { return Ok(()) };
                entry = next;
            }
            exit::INDIRECT => {
                cpu.rip = cpu.exit_detail & cpu.ip_mask();
                cpu.unpack_flags();
                if cpu.refuse_target(cpu.exit_from) {
                    return Ok(());
                }
                let Some(next) = self::entry(cpu) else { return Ok(()) };
                entry = next;
            }
            exit::SIGNAL => return signal(cpu),
            _ => return Ok(()),
        }
        if cpu.poll.load(Ordering::Relaxed) == POLL_ATTRACT {
            return Ok(());
        }
    }
}

/// The host address at which to enter the code at `rip`, from the jump cache if it is there, which
/// else learns it; faults of the fetch are delivered.
fn entry(cpu: &mut Cpu) -> Option<u64> {
    if std::mem::take(&mut cpu.plain) {
        return plain_entry(cpu);
    }
    let mmu = cpu.mode.mmu() as usize;
    cpu.match_jump_mode(mmu);
    if let Some(slot) = cpu.jumps[mmu].find(cpu.rip) {
        return Some(cpu.jumps[mmu].hosts[slot]);
    }
    let block = find(cpu)?;
    let host = cpu.cache.saved_entry(block)?;
    cpu.jump_misses = cpu.jump_misses.wrapping_add(1);
    let slot = cpu.jumps[mmu].place(cpu.rip, cpu.jump_misses);
    if !cpu.lasting(block) {
        cpu.note_local_jump(mmu, slot, block);
    }
    cpu.jumps[mmu].pcs[slot] = cpu.rip;
    cpu.jumps[mmu].hosts[slot] = host;
    Some(host)
}

/// Where translated code can go on at `rip` without a look around in the run loop: the host
/// address, guest flags being put into `raw_flags`; 0 if it cannot.
pub fn resume(cpu: &mut Cpu) -> u64 {
    let quiet = !(cpu.outstanding || cpu.single || cpu.plain || cpu.triple_fault)
        && cpu.poll.load(Ordering::Relaxed) != POLL_ATTRACT
        && cpu.lapic.mp == MpState::Running;
    let mode = cpu.mode;
    if !quiet || mode.step() || mode.shadow() || !mode.is_64() {
        return 0;
    }
    let mmu = mode.mmu() as usize;
    if cpu.jump_modes[mmu] != mode || cpu.jump_base != 0 {
        return 0;
    }
    let Some(slot) = cpu.jumps[mmu].find(cpu.rip) else { return 0 };
    cpu.pack_flags();
    cpu.jumps[mmu].hosts[slot]
}

/// As `entry`, for a translation without groups of accesses, to get over one that failed.
fn plain_entry(cpu: &mut Cpu) -> Option<u64> {
    cpu.drop_worn_out();
    let mode = cpu.mode;
    cpu.mode.0 |= Mode::PLAIN;
    let block = cpu.block_at(cpu.rip);
    cpu.mode = mode;
    match block {
        Ok(block) => cpu.cache.saved_entry(block),
        Err(exception) => {
            crate::interrupt::deliver_exception(cpu, exception);
            None
        }
    }
}

/// Runs one instruction in step mode or in an interrupt shadow, with the debug traps that follow.
fn single(cpu: &mut Cpu) -> Result<(), EngineError> {
    cpu.single = true;
    let result = instruction(cpu);
    cpu.single = false;
    result
}

fn instruction(cpu: &mut Cpu) -> Result<(), EngineError> {
    let stepping = cpu.rflags & rflags::TF != 0;
    let resume = cpu.rflags & rflags::RF != 0;
    let quiet = cpu.sys.shadow_debug;
    if cpu.mode.step() && !resume && !quiet {
        let hits = cpu.execution_hits();
        if hits != 0 {
            crate::interrupt::deliver_exception(cpu, Exception::debug(hits));
            return Ok(());
        }
    }
    let Some(block) = find(cpu) else { return Ok(()) };
    cpu.sys.shadow = false;
    cpu.sys.shadow_debug = false;
    cpu.rflags &= !rflags::RF;
    cpu.update_mode();
    cpu.faulted = false;
    cpu.sys.debug_hits = 0;
    let Some(entry) = cpu.cache.saved_entry(block) else { return Ok(()) };
    cpu.pack_flags();
    // SAFETY: as in `stretch`; the block was made for the mode of a moment ago, which differs from
    // the present one only in the interrupt shadow.
    unsafe { thunks::enter(cpu, entry) };
    match cpu.exit {
        exit::EDGE => {
            let edge = cpu.exit_detail as u32;
            cpu.rip = cpu.cache.edge_target(edge).unwrap_or(cpu.rip) & cpu.ip_mask();
            cpu.unpack_flags();
            cpu.refuse_target(cpu.cache.edge_host(edge) + 1);
        }
        exit::INDIRECT => {
            cpu.rip = cpu.exit_detail & cpu.ip_mask();
            cpu.unpack_flags();
            cpu.refuse_target(cpu.exit_from);
        }
        exit::SIGNAL => signal(cpu)?,
        _ => {}
    }
    let mut hits = std::mem::take(&mut cpu.sys.debug_hits);
    if stepping {
        hits |= 1 << 14;
    }
    if hits != 0 && !cpu.faulted && !cpu.sys.shadow_debug {
        crate::interrupt::deliver_exception(cpu, Exception::debug(hits));
    }
    Ok(())
}

/// The block at `rip`; faults of the fetch are delivered.
fn find(cpu: &mut Cpu) -> Option<BlockId> {
    // Here no translation is in use.
    if cpu.spaces.crowded() {
        cpu.flush_tlb();
    }
    match cpu.block_at(cpu.rip) {
        Ok(block) => Some(block),
        Err(exception) => {
            cpu.faulted = true;
            crate::interrupt::deliver_exception(cpu, exception);
            None
        }
    }
}

/// A host signal stopped translated code: a poll, or a fault of the guest.
fn signal(cpu: &mut Cpu) -> Result<(), EngineError> {
    let host = cpu.exit_detail;
    let trap = cpu.spill[2] as u8;
    let Some(position) = cpu.take_host_flags_at(host + 1) else {
        return Err(EngineError::Defect(format!("host trap {trap} at unknown code {host:#x}")));
    };
    cpu.unpack_flags();
    if position.length == 0 {
        // The prologue of a block: nothing but the poll faults there.
        return Ok(());
    }
    if trap == vector::GP && cpu.uses_recent(host) {
        // Perhaps an address that is not canonical found an empty slot.
        cpu.plain = true;
        return Ok(());
    }
    let exception = match trap {
        vector::DE => Exception::DIVIDE,
        vector::UD => Exception::INVALID_OPCODE,
        vector::NM => Exception::NO_FPU,
        vector::GP => Exception::GP0,
        vector::SS => Exception::SS0,
        vector::MF => Exception::X87,
        vector::XM => Exception::SIMD,
        vector::AC => Exception::ALIGNMENT,
        _ => {
            return Err(EngineError::Defect(format!(
                "host trap {trap} in the translation of guest address {:#x}",
                cpu.rip
            )));
        }
    };
    cpu.faulted = true;
    crate::interrupt::deliver_exception(cpu, exception);
    Ok(())
}

impl Cpu {
    /// Makes the jump cache `mmu` one of the present mode and code segment.
    fn match_jump_mode(&mut self, mmu: usize) {
        if self.jump_modes[mmu] != self.mode {
            self.empty_jumps(mmu);
            self.jump_modes[mmu] = self.mode;
        }
        let base = match self.mode.is_64() {
            true => 0,
            false => self.segment(SegmentName::Cs).base,
        };
        if base != self.jump_base {
            // Links and jump caches hold offsets in CS, which now mean other addresses.
            self.flush_jump_caches();
            self.jump_base = base;
        }
    }

    /// A near transfer to an address that cannot be fetched from, non-canonical or beyond the
    /// segment's limit, faults at the transfer itself (Intel SDM 2A, JMP and RET): takes back what
    /// the instruction at host address `host` did to the stack pointer and delivers the fault.
    fn refuse_target(&mut self, host: u64) -> bool {
        let Err(exception) = self.code_address(self.rip) else { return false };
        let target = self.rip;
        match self.locate(host) {
            Some(position) if position.transfer => {
                let moved = self.transfer_at(self.rip).map_or(0, |insn| match insn.mnemonic() {
                    Mnemonic::Ret | Mnemonic::Call => i64::from(insn.stack_pointer_increment()),
                    _ => 0,
                });
                let sp = self.gpr[RSP].wrapping_sub(moved as u64);
                self.gpr[RSP] = if self.mode.is_64() { sp } else { sp & 0xffff_ffff };
            }
            _ => self.rip = target,
        }
        self.faulted = true;
        crate::interrupt::deliver_exception(self, exception);
        true
    }

    /// Whether the block at host address `host` may use recent pages.
    fn uses_recent(&self, host: u64) -> bool {
        self.cache.key_at(host).is_some_and(|key| crate::translate::may_use_recent(key.mode))
    }

    /// Whether a block that was just found at `rip` lies in global pages only.
    fn lasting(&self, block: BlockId) -> bool {
        let crosses = self.cache.block(block).is_none_or(|b| b.second_page().is_some());
        let linear = match self.mode.is_64() {
            true => self.rip,
            false => self.segment(SegmentName::Cs).base.wrapping_add(self.rip) & 0xffff_ffff,
        };
        self.fetched_from_global(linear)
            && (!crosses || self.fetched_from_global((linear | 0xfff).wrapping_add(1)))
    }

    /// Looks at what other threads posted; says whether to return to the machine.
    fn attend(&mut self) -> bool {
        if self.poll.load(Ordering::Relaxed) != POLL_ATTRACT && !self.wanted() {
            return false;
        }
        self.poll.store(&raw const POLL_QUIET as u64, Ordering::SeqCst);
        let vm = self.vm.clone();
        let Some(mailbox) = vm.mailboxes.get(self.index as usize) else { return true };
        if !self.wanted() {
            return false;
        }
        let bits = mailbox.take(ATTENDED);
        self.outstanding = true;
        self.tlb.be_patient();
        if bits & pending::EMPTY_TLB != 0 {
            self.tlb.flush();
            mailbox.attendance.answer();
        }
        if bits & pending::GUARD != 0 {
            self.stop_writing(mailbox);
        }
        if bits & pending::CODE != 0 {
            self.hear_of_writes(mailbox);
        }
        events::poll(self);
        self.timer_changed();
        bits & pending::KICK != 0
    }

    /// Other vCPUs translate these pages: drop write access, and tell them once that is done.
    fn stop_writing(&mut self, mailbox: &Mailbox) {
        let pages = std::mem::take(&mut *mailbox.lock_guarded());
        let vm = self.vm.clone();
        for (page, who) in pages {
            if let Some(ram) = vm.ram.page(page) {
                self.tlb.forbid_writes(ram.host as u64);
            }
            if let Some(theirs) = vm.mailboxes.get(who as usize) {
                theirs.lock_written().push(Written::Unsure(page));
                theirs.post(pending::CODE);
            }
        }
    }

    fn hear_of_writes(&mut self, mailbox: &Mailbox) {
        let written = std::mem::take(&mut *mailbox.lock_written());
        for word in written {
            match word {
                Written::Range(start, len) => {
                    self.drop_code(start, len);
                }
                Written::Unsure(page) => {
                    self.verify_code(page);
                    for entry in self.cache.unsure.iter_mut().filter(|e| e.0 == page) {
                        entry.1 = entry.1.saturating_sub(1);
                    }
                    self.cache.unsure.retain(|e| e.1 > 0);
                }
            }
        }
    }

    /// A serializing instruction: pages that others may have written unnoticed are compared now,
    /// as cross-modifying code relies on (Intel SDM 3A 8.1.3).
    pub fn serialize(&mut self) {
        if self.wanted() {
            let vm = self.vm.clone();
            if let Some(mailbox) = vm.mailboxes.get(self.index as usize)
                && mailbox.pending.load(Ordering::SeqCst) & pending::CODE != 0
            {
                mailbox.pending.fetch_and(!pending::CODE, Ordering::SeqCst);
                self.hear_of_writes(mailbox);
            }
        }
        if self.cache.unsure.is_empty() {
            return;
        }
        for (page, _) in self.cache.unsure.clone() {
            self.verify_code(page);
        }
    }

    /// Sleeps in HLT or while waiting for a start-up IPI.
    fn wait(&mut self) {
        if self.lapic.mp == MpState::Halted && events::can_wake(self) {
            self.lapic.mp = MpState::Running;
            self.outstanding = true;
            return;
        }
        let now = Instant::now();
        let deadline = match self.lapic.mp {
            MpState::Halted => self.lapic.timer_deadline(),
            _ => None,
        };
        let timeout = deadline.map(|d| d.saturating_duration_since(now));
        if timeout.is_some_and(|t| t.is_zero()) {
            lapic::timer_expired(self, now);
            return;
        }
        let vm = self.vm.clone();
        if let Some(mailbox) = vm.mailboxes.get(self.index as usize) {
            mailbox.sleep(timeout);
        }
    }

    /// The LAPIC timer's deadline changed: arms the host's timer if it is to fire earlier than it
    /// would. A timer that fires too early does no harm.
    pub fn timer_changed(&mut self) {
        let Some(deadline) = self.lapic.timer_deadline() else { return };
        let Some(thread) = &mut self.timer else { return };
        if thread.timer.armed.is_none_or(|armed| deadline < armed) {
            thread.timer.arm(deadline.saturating_duration_since(Instant::now()), deadline);
        }
    }

    /// The host's timer fired: it has to be armed again. Called by whoever takes the word of it out
    /// of the mailbox; where it went unnoticed, the timer would never be armed again.
    pub(crate) fn timer_fired(&mut self) {
        if let Some(thread) = &mut self.timer {
            thread.timer.armed = None;
        }
    }

    /// Enabled instruction breakpoints that the next instruction hits, as DR6 bits.
    fn execution_hits(&self) -> u64 {
        let Ok(address) = self.code_address(self.rip) else { return 0 };
        let dr7 = self.sys.debug[5];
        (0..4)
            .filter(|n| dr7 >> (2 * n) & 3 != 0 && dr7 >> (16 + 4 * n) & 3 == 0)
            .filter(|&n| self.sys.debug[n as usize] == address)
            .fold(0, |hits, n| hits | 1 << n)
    }

    /// `rflags` gets the arithmetic flags of `raw_flags`.
    pub fn unpack_flags(&mut self) {
        let raw = u64::from(self.raw_flags);
        let high = raw >> 8 & 0xd5;
        let overflow = (raw & 1) << 11;
        self.rflags = (self.rflags & !rflags::ARITHMETIC) | high | overflow;
    }

    /// `raw_flags` gets the arithmetic flags of `rflags`.
    pub fn pack_flags(&mut self) {
        self.raw_flags = ((self.rflags & 0xd5) << 8 | (self.rflags >> 11 & 1)) as u16;
    }
}
