//! What KVM does for doorbells, interrupt lines, the dirty log, the debugger and options; what
//! this host's KVM lacks, the engine refuses by the capability's name.
#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.
mod common;

use arch::registers::gpr;
use arch::{GuestPhysical, GuestVirtual};
use common::{Guest, Mode, at, done, engine, say};
use cputest::layout::{read, read_u32};
use cputest::machine::{Access, make_vm};
use engine::{
    Breakpoint, BreakpointKind, DebugPlan, DebugStop, DirtyRange, Doorbell, DoorbellPlace, Engine,
    EngineError, Halt, Msi, Notify, Rings, Width,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm::{DirtyLogMeans, HostKvm, KeepInGuest, KvmEngine, Options, Virtualisation};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// A counter that rings count, with or without an event that the kernel can signal.
struct Counter {
    calls: AtomicU32,
    event: Option<OwnedFd>,
}

impl Counter {
    fn new(with_event: bool) -> Arc<Self> {
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        let event = with_event.then(|| rustix::event::eventfd(0, flags).unwrap());
        Arc::new(Self { calls: AtomicU32::new(0), event })
    }

    /// How often it was called, and how often the event was signalled since the last call.
    fn count(&self) -> (u32, u64) {
        let mut bytes = [0; 8];
        if let Some(event) = &self.event {
            // Nothing to read means that nothing rang.
            let _ = std::fs::File::from(event.try_clone().unwrap()).read(&mut bytes);
        }
        (self.calls.load(Ordering::SeqCst), u64::from_ne_bytes(bytes))
    }
}

impl Notify for Counter {
    fn notify(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
    }
    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(|event| event.as_fd())
    }
}

fn mmio(offset: u64) -> DoorbellPlace {
    DoorbellPlace::Mmio(GuestPhysical(at::DEVICE + offset))
}

#[test]
fn doorbells_ring_by_call_or_by_event_and_the_machine_hears_nothing() {
    let Some(engine) = engine() else { return };
    for with_event in [false, true] {
        let mut guest = Guest::new(&engine, Mode::Long, &|a| {
            a.db(&[0xe6, 0x70])?; // out 70h, al
            a.mov(rbx, at::DEVICE)?;
            a.mov(eax, 2)?;
            a.mov(word_ptr(rbx + 0x10), ax)?;
            a.mov(eax, 3)?;
            a.mov(word_ptr(rbx + 0x10), ax)?; // another value
            a.mov(eax, dword_ptr(rbx + 0x10))?;
            a.mov(dword_ptr(rbx + 0x20), eax)?;
            done(a)
        });
        let places = [
            (DoorbellPlace::Port(0x70), Rings::Any),
            (mmio(0x10), Rings::Value(Width::Word, 2)),
            (mmio(0x20), Rings::Width(Width::Double)),
        ];
        let counters: Vec<_> = places.iter().map(|_| Counter::new(with_event)).collect();
        let ring = |n: usize| {
            let (place, rings) = places[n];
            guest.vm.doorbell(Doorbell { place, rings }, counters[n].clone()).unwrap()
        };
        let handles = [ring(0), ring(1), ring(2)];
        guest.run();
        let expected = if with_event { (0, 1) } else { (1, 0) };
        for counter in &counters {
            assert_eq!(counter.count(), expected);
        }
        let device: Vec<_> = guest.io.log().into_iter().filter(is_of_device).collect();
        let place = GuestPhysical(at::DEVICE + 0x10);
        assert_eq!(device, [Access::Write(place, 3), Access::Read(place)]);
        drop(handles);
        guest.io.clear();
        let state = common::starting_state(guest.state(), Mode::Long);
        guest.vcpus[0].set_state(&state).unwrap();
        guest.run();
        assert_eq!(guest.io.log().into_iter().filter(is_of_device).count(), 4);
        assert_eq!(guest.io.out(0x70).len(), 1);
    }
}

fn is_of_device(access: &Access) -> bool {
    matches!(access, Access::Write(..) | Access::Read(_))
}

#[test]
fn a_store_that_the_companion_executes_rings_and_is_in_the_dirty_log() {
    let Some(engine) = engine() else { return };
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.mov(rbx, at::DEVICE)?;
        a.mov(rcx, at::DATA + 0x3000)?;
        a.vpcmpeqd(ymm0, ymm0, ymm0)?;
        a.vmovdqu(ymmword_ptr(rbx + 0x40), ymm0)?;
        a.vmovdqu(ymmword_ptr(rcx), ymm0)?;
        done(a)
    });
    let counter = Counter::new(false);
    let doorbell = Doorbell { place: mmio(0x48), rings: Rings::Width(Width::Quad) };
    let _handle = guest.vm.doorbell(doorbell, counter.clone()).unwrap();
    let log = guest.vm.clone();
    let log = log.dirty_log().unwrap();
    log.start().unwrap();
    guest.run();
    assert_eq!(counter.count(), (1, 0));
    let written: Vec<_> = guest.io.log().into_iter().filter(is_of_device).collect();
    let write = |offset| Access::Write(GuestPhysical(at::DEVICE + offset), u64::MAX);
    assert_eq!(written, [write(0x40), write(0x50), write(0x58)]);
    let dirty = log.harvest().unwrap();
    assert!(has(&dirty, at::DATA + 0x3000), "{dirty:?}");
}

fn has(dirty: &[DirtyRange], address: u64) -> bool {
    dirty.iter().any(|r| (r.start.0..r.start.0 + r.length).contains(&address))
}

/// A guest that says what vectors 41H and 42H bring, and is done after the second.
fn interrupted(engine: &KvmEngine) -> Guest {
    let guest = Guest::new(engine, Mode::Long, &|a| {
        a.mov(ebx, (at::LAPIC + 0xf0) as u32)?;
        a.mov(dword_ptr(rbx), 0x1ff)?;
        a.mov(eax, 1)?;
        say(a)?;
        a.sti()?;
        a.db(&[0xf4, 0xeb, 0xfd])
    });
    for (vector, last) in [(0x41u8, false), (0x42, true)] {
        let handler = at::HANDLER + 0x100 * u64::from(last);
        guest.handler(vector, handler);
        guest.put(handler, &|a| {
            a.mov(eax, u32::from(vector))?;
            say(a)?;
            a.mov(ebx, (at::LAPIC + 0xb0) as u32)?;
            a.mov(dword_ptr(rbx), 0)?;
            if last { done(a) } else { a.iretq() }
        });
    }
    guest
}

fn message(vector: u32) -> Option<Msi> {
    Some(Msi { address: 0xfee0_0000, data: vector })
}

#[test]
fn a_line_is_triggered_by_a_call_and_by_its_event() {
    let Some(engine) = engine() else { return };
    let mut guest = interrupted(&engine);
    let (line, other) = (guest.vm.msi_line().unwrap(), guest.vm.msi_line().unwrap());
    let event = line.event().unwrap().expect("KVM has events");
    let signal = || {
        let mut file = std::fs::File::from(event.try_clone().unwrap());
        file.write_all(&1u64.to_ne_bytes()).unwrap();
    };
    let io = guest.io.clone();
    thread::scope(|scope| {
        scope.spawn(|| {
            let wait = |count: usize| {
                while io.out(common::SAY).len() < count {
                    thread::yield_now();
                }
            };
            wait(1);
            line.trigger(); // without a message: lost
            line.program(message(0x41)).unwrap();
            signal();
            wait(2);
            line.trigger();
            wait(3);
            line.program(None).unwrap();
            line.trigger();
            line.program(message(0x42)).unwrap();
            other.program(message(0x41)).unwrap();
            other.trigger();
            wait(4);
            signal();
        });
        guest.run();
    });
    assert_eq!(guest.said(), [1, 0x41, 0x41, 0x41, 0x42]);
}

#[test]
fn the_end_of_a_level_triggered_line_reaches_the_machine_whoever_triggered_it() {
    let Some(engine) = engine() else { return };
    for by_event in [false, true] {
        let mut guest = interrupted(&engine);
        let (level, edge) = (guest.vm.msi_line().unwrap(), guest.vm.msi_line().unwrap());
        level.program(message(0xc041)).unwrap();
        edge.program(message(0x42)).unwrap();
        let io = guest.io.clone();
        thread::scope(|scope| {
            scope.spawn(|| {
                while io.out(common::SAY).is_empty() {
                    thread::yield_now();
                }
                match level.event().unwrap() {
                    Some(event) if by_event => {
                        std::fs::File::from(event).write_all(&1u64.to_ne_bytes()).unwrap();
                    }
                    _ => level.trigger(),
                }
                while !io.log().contains(&Access::Eoi(0x41)) {
                    thread::yield_now();
                }
                edge.trigger();
            });
            guest.run();
        });
        assert!(!io.log().contains(&Access::Eoi(0x42)), "an edge has no end for the IOAPIC");
    }
}

#[test]
fn a_thousand_lines_with_events_come_and_go() {
    let Some(engine) = engine() else { return };
    let (vm, _memory) = make_vm(&engine, at::RAM, 1).unwrap();
    for _ in 0..4 {
        let lines: Vec<_> = (0..256).map(|_| vm.msi_line().unwrap()).collect();
        for line in &lines {
            assert!(line.event().unwrap().is_some());
        }
    }
}

/// Emits code that ends a run, and goes on in the next.
fn pause(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.db(&[0xe6, 0xf4])
}

fn range(start: u64, pages: u64) -> DirtyRange {
    DirtyRange { start: GuestPhysical(start), length: pages * 0x1000 }
}

fn with_dirty_log(dirty_log: DirtyLogMeans) -> Option<KvmEngine> {
    engine()?;
    let companion: kvm::Companion = || Ok(Arc::new(soft::SoftEngine::new()?));
    let options = Options { companion: Some(companion), dirty_log, ..Options::default() };
    Some(KvmEngine::with_options(options).unwrap())
}

#[test]
fn a_harvest_has_the_pages_written_since_the_one_before() {
    for means in [DirtyLogMeans::Rings, DirtyLogMeans::Bitmaps] {
        let Some(engine) = with_dirty_log(means) else { return };
        let mut guest = Guest::new(&engine, Mode::Protected, &|a| {
            a.mov(dword_ptr(at::DATA), 1)?;
            a.mov(eax, dword_ptr(at::DATA + 0x9000))?; // read only
            pause(a)?;
            a.mov(dword_ptr(at::DATA), 2)?;
            a.inc(byte_ptr(at::DATA + 0x1000))?;
            a.mov(dword_ptr(at::DATA + 0x4ffe), 2)?; // two pages
            pause(a)?;
            a.mov(dword_ptr(at::DATA + 0x2000), 3)?;
            pause(a)?;
            a.mov(dword_ptr(at::DATA + 0x8000), 3)?;
            pause(a)
        });
        let vm = guest.vm.clone();
        let log = vm.dirty_log().unwrap();
        assert!(log.harvest().is_err(), "it was not started");
        guest.run();
        log.start().unwrap();
        assert_eq!(log.harvest().unwrap(), []);
        guest.run();
        assert_eq!(log.harvest().unwrap(), [range(at::DATA, 2), range(at::DATA + 0x4000, 2)]);
        assert_eq!(log.harvest().unwrap(), []);
        guest.run();
        assert_eq!(log.harvest().unwrap(), [range(at::DATA + 0x2000, 1)]);
        log.stop().unwrap();
        guest.run();
        assert!(log.harvest().is_err(), "it was stopped");
        log.start().unwrap();
        assert_eq!(log.harvest().unwrap(), []);
    }
}

#[test]
fn more_pages_than_a_ring_has_are_all_told_or_the_harvest_fails() {
    const PAGES: u64 = 6000;
    for means in [DirtyLogMeans::Rings, DirtyLogMeans::Auto] {
        let Some(engine) = with_dirty_log(means) else { return };
        let (vm, memory) = make_vm(&engine, 0x20_0000 + PAGES * 0x1000, 1).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let code = cputest::micro::assemble(32, at::CODE, |a| {
            let mut again = a.create_label();
            a.mov(ebx, 0x20_0000)?;
            a.mov(ecx, PAGES as u32)?;
            a.set_label(&mut again)?;
            a.mov(dword_ptr(ebx), 1)?;
            a.add(ebx, 0x1000)?;
            a.dec(ecx)?;
            a.jne(again)?;
            done(a)
        });
        cputest::layout::write(&memory, at::CODE, &code);
        let state = common::starting_state(vcpu.state().unwrap(), Mode::Protected);
        vcpu.set_state(&state).unwrap();
        let io = cputest::machine::Recorder::default();
        io.kickers.lock().unwrap().push(vcpu.kicker());
        let log = vm.dirty_log().unwrap();
        log.start().unwrap();
        let result = vcpu.run(&io).and_then(|_| log.harvest());
        match result {
            Ok(dirty) => assert_eq!(dirty, [range(0x20_0000, PAGES)]),
            // A KVM that emulates the guest writes past the end.
            Err(error) => {
                assert_eq!(means, DirtyLogMeans::Rings, "{error}");
                assert_eq!(HostKvm::probe().virtualisation, Virtualisation::None, "{error}");
                assert!(error.to_string().contains("KVM_CAP_DIRTY_LOG_RING"), "{error}");
            }
        }
    }
}

#[test]
fn copies_of_harvested_pages_make_up_the_memory_of_a_running_guest() {
    for means in [DirtyLogMeans::Rings, DirtyLogMeans::Bitmaps] {
        let Some(engine) = with_dirty_log(means) else { return };
        let mut guest = Guest::new(&engine, Mode::Long, &|a| {
            let mut again = a.create_label();
            a.mov(eax, 1)?;
            say(a)?;
            a.set_label(&mut again)?;
            a.inc(rcx)?;
            a.mov(rdx, rcx)?;
            a.and(edx, 31)?;
            a.shl(edx, 12)?;
            a.mov(qword_ptr(rdx + at::DATA as i32), rcx)?;
            a.jmp(again)
        });
        let (vm, io, memory) = (guest.vm.clone(), guest.io.clone(), guest.memory.clone());
        let log = vm.dirty_log().unwrap();
        let mut copy = vec![0; at::RAM as usize];
        let mut take = |dirty: Vec<DirtyRange>| {
            for DirtyRange { start, length } in dirty {
                let place = start.0 as usize..(start.0 + length) as usize;
                read(&memory, start.0, &mut copy[place]);
            }
        };
        let vcpu = &mut guest.vcpus[0];
        let kicker = vcpu.kicker();
        thread::scope(|scope| {
            let running = scope.spawn(|| vcpu.run(io.as_ref()).unwrap());
            while io.out(common::SAY).is_empty() {
                thread::yield_now();
            }
            log.start().unwrap();
            take(vec![range(0, at::RAM / 0x1000)]);
            for _ in 0..200 {
                take(log.harvest().unwrap());
            }
            kicker.kick();
            assert_eq!(running.join().unwrap(), Halt::Kicked);
        });
        take(log.harvest().unwrap());
        let mut all = vec![0; at::RAM as usize];
        read(&guest.memory, 0, &mut all);
        let pages = copy.chunks(0x1000).zip(all.chunks(0x1000)).enumerate();
        let differing: Vec<_> = pages.filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect();
        assert!(differing.is_empty(), "pages {differing:x?} were written unnoticed");
        assert_ne!(read_u32(&guest.memory, at::DATA), 0);
    }
}

fn keeping(keep_in_guest: KeepInGuest) -> Result<(), EngineError> {
    let options = Options { keep_in_guest, ..Options::default() };
    let engine = KvmEngine::with_options(options)?;
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.pause()?;
        a.mov(eax, 6)?;
        say(a)?;
        done(a)
    });
    guest.run();
    assert_eq!(guest.said(), [6]);
    Ok(())
}

/// What this host's KVM says of a capability.
fn offered(capability: u32) -> i32 {
    let kvm = kvm_ioctls::Kvm::new().unwrap();
    kvm.check_extension_raw(capability.into())
}

#[test]
fn idle_instructions_stay_in_the_guest_or_are_refused_by_name() {
    let Some(engine) = engine() else { return };
    let bits = offered(kvm_bindings::KVM_CAP_X86_DISABLE_EXITS) as u32;
    let none = KeepInGuest::default();
    let all = [
        (KeepInGuest { hlt: true, ..none }, kvm_bindings::KVM_X86_DISABLE_EXITS_HLT, "HLT"),
        (KeepInGuest { pause: true, ..none }, kvm_bindings::KVM_X86_DISABLE_EXITS_PAUSE, "PAUSE"),
        (KeepInGuest { mwait: true, ..none }, kvm_bindings::KVM_X86_DISABLE_EXITS_MWAIT, "MWAIT"),
    ];
    for (keep_in_guest, bit, name) in all {
        if bits & bit != 0 {
            keeping(keep_in_guest).unwrap();
            continue;
        }
        let options = Options { keep_in_guest, ..Options::default() };
        let engine = KvmEngine::with_options(options).unwrap();
        let error = make_vm(&engine, at::RAM, 1).err().unwrap().to_string();
        assert!(error.contains(&format!("cannot keep {name} in the guest")), "{error}");
        assert!(error.contains("KVM_CAP_X86_DISABLE_EXITS"), "{error}");
    }
    assert_eq!(engine.name(), "kvm");
}

/// Whether reading an MSR gives #GP.
fn is_refused(engine: &KvmEngine, index: u32) -> bool {
    let mut guest = Guest::new(engine, Mode::Long, &|a| {
        a.mov(ecx, index)?;
        a.rdmsr()?;
        a.mov(eax, 1)?;
        say(a)?;
        done(a)
    });
    guest.handler(13, at::HANDLER);
    guest.put(at::HANDLER, &|a| {
        a.mov(eax, 13)?;
        say(a)?;
        done(a)
    });
    guest.run();
    match guest.said()[..] {
        [1] => false,
        [13] => true,
        ref other => panic!("{other:x?}"),
    }
}

#[test]
fn a_guest_reaches_only_msrs_that_the_engine_knows() {
    let Some(engine) = engine() else { return };
    for index in [arch::msr::PAT, arch::msr::EFER, arch::msr::TSC, arch::msr::APIC_BASE] {
        assert!(!is_refused(&engine, index), "{index:#x}");
    }
    if offered(kvm_bindings::KVM_CAP_X86_MSR_FILTER) <= 0 {
        return; // KVM's own rules stay.
    }
    // A performance counter, platform information, IA32_XSS, VM_CR: KVM has them or not.
    for index in [0xc1, 0xce, 0xda0, 0xc001_0114] {
        assert!(is_refused(&engine, index), "{index:#x}");
    }
}

fn plan(guest: &mut Guest, single_step: bool, breakpoints: &[(u64, BreakpointKind)]) {
    let mut plan = DebugPlan { single_step, ..DebugPlan::default() };
    for (place, &(address, kind)) in plan.breakpoints.iter_mut().zip(breakpoints) {
        *place = Some(Breakpoint { address: GuestVirtual(address), kind });
    }
    guest.vcpus[0].debugger().unwrap().set_plan(&plan).unwrap();
}

fn stop(guest: &mut Guest) -> (DebugStop, u64) {
    match guest.run() {
        Halt::Debug(stop) => (stop, guest.state().rip),
        other => panic!("{other:?}; said {:x?}; {:x?}", guest.said(), guest.state()),
    }
}

const STEP: DebugStop = DebugStop { step: true, breakpoints: [false; 4] };

/// Whether this host's KVM can debug; if not, that is checked to be said.
fn can_debug(engine: &KvmEngine) -> bool {
    const NEEDED: u32 = 0x12_0003;
    let offered = offered(kvm_bindings::KVM_CAP_SET_GUEST_DEBUG2) as u32;
    if offered & NEEDED == NEEDED {
        return true;
    }
    let mut guest = Guest::new(engine, Mode::Long, &done);
    let plan = DebugPlan { single_step: true, ..DebugPlan::default() };
    let error = guest.vcpus[0].debugger().unwrap().set_plan(&plan).unwrap_err().to_string();
    assert!(error.contains("KVM_CAP_SET_GUEST_DEBUG2"), "{error}");
    false
}

#[test]
fn a_debugger_steps_one_instruction_at_a_time_through_the_companion_too() {
    let Some(engine) = engine() else { return };
    if !can_debug(&engine) {
        return;
    }
    let mut guest = Guest::new(&engine, Mode::Long, &|a| {
        a.mov(eax, 5)?; // 5 bytes
        a.inc(rcx)?; // 3
        a.push(rax)?; // 1
        a.pop(rdx)?; // 1
        a.db(&[0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x24])?; // lock cmpxchg16b [rsp]
        a.db(&[0xeb, 0x02, 0x0f, 0x0b])?; // jmp over ud2
        say(a)?;
        done(a)
    });
    let mut state = guest.state();
    state.gpr[gpr::RSP] = at::STACK - 0x100;
    guest.vcpus[0].set_state(&state).unwrap();
    plan(&mut guest, true, &[]);
    for rip in [5, 8, 9, 10, 16, 20, 22] {
        assert_eq!(stop(&mut guest), (STEP, at::CODE + rip));
    }
    plan(&mut guest, false, &[]);
    assert_eq!(guest.run(), Halt::Kicked);
    assert_eq!(guest.said().len(), 1);
}
