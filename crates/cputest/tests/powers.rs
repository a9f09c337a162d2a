//! What the engine contract offers beside running guests: doorbells, interrupt lines, the dirty
//! log, the debugger.
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::registers::{gpr, rflags};
use arch::{GuestPhysical, GuestVirtual};
use cputest::layout::{page, read, read_u32, write};
use cputest::machine::{Access, Watchdog};
use cputest::micro::{Guest, Mode, SAY, at, done, say};
use cputest::on_each_engine;
use cputest::under_test::EngineUnderTest;
use engine::{
    Breakpoint, BreakpointKind, DebugPlan, DebugStop, DirtyRange, Doorbell, DoorbellHandle,
    DoorbellPlace, EngineError, Halt, Msi, Rings, Width,
};
use iced_x86::code_asm::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// Device registers, mapped at the same linear address.
const DEVICE: u64 = 0xd000_0000;

fn with_device(engine: EngineUnderTest) -> Guest {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    guest.tables.map(&memory, DEVICE, DEVICE, page::P | page::W | 0x10);
    guest
}

/// A doorbell that counts.
fn count(guest: &Guest, place: DoorbellPlace, rings: Rings) -> (Arc<AtomicU32>, DoorbellHandle) {
    let rung = Arc::new(AtomicU32::new(0));
    let counter = rung.clone();
    let notify = move || {
        counter.fetch_add(1, Ordering::SeqCst);
    };
    let handle = guest.vm.doorbell(Doorbell { place, rings }, Arc::new(notify)).unwrap();
    (rung, handle)
}

fn mmio(offset: u64) -> DoorbellPlace {
    DoorbellPlace::Mmio(GuestPhysical(DEVICE + offset))
}

on_each_engine!(a_write_to_a_doorbell_rings_and_does_not_reach_the_machine, |engine| {
    let mut guest = with_device(engine);
    let (port, _port) = count(&guest, DoorbellPlace::Port(0x70), Rings::Any);
    let (word, _word) = count(&guest, mmio(0x10), Rings::Width(Width::Word));
    guest.code(at::CODE, |a| {
        a.mov(rbx, DEVICE)?;
        a.mov(eax, 7)?;
        a.db(&[0xe7, 0x70, 0xe6, 0x70])?; // out 70h, eax; out 70h, al
        a.mov(word_ptr(rbx + 0x10), ax)?;
        a.mov(dword_ptr(rbx + 0x10), eax)?; // another width
        a.mov(word_ptr(rbx + 0x12), ax)?; // another place
        done(a)
    });
    guest.run().done();
    assert_eq!((port.load(Ordering::SeqCst), word.load(Ordering::SeqCst)), (2, 1));
    let writes: Vec<_> =
        guest.io.log().into_iter().filter(|a| matches!(a, Access::Write(..))).collect();
    let write = |offset| Access::Write(GuestPhysical(DEVICE + offset), 7);
    assert_eq!(writes, [write(0x10), write(0x12)]);
    assert!(guest.io.out(0x70).is_empty());
});

on_each_engine!(code_that_a_device_writes_is_run_as_written, |engine| {
    let mut guest = with_device(engine);
    // mov eax, imm32; ret
    let code = |value: u8| [0xb8, value, 0, 0, 0, 0xc3];
    write(&guest.memory, at::DATA, &code(1));
    let (memory, vm) = (guest.memory.clone(), Arc::downgrade(&guest.vm));
    let rounds = AtomicU32::new(1);
    let load_code = move || {
        let value = rounds.fetch_add(1, Ordering::SeqCst) as u8 + 1;
        write(&memory, at::DATA, &code(value));
        if let Some(vm) = vm.upgrade() {
            vm.memory_written(GuestPhysical(at::DATA), code(value).len());
        }
    };
    let bell = Doorbell { place: mmio(0), rings: Rings::Any };
    let _bell = guest.vm.doorbell(bell, Arc::new(load_code)).unwrap();
    guest.code(at::CODE, |a| {
        a.mov(rbx, DEVICE)?;
        a.mov(esi, at::DATA as u32)?;
        for _ in 0..4 {
            a.call(rsi)?;
            say(a)?;
            a.mov(dword_ptr(rbx), eax)?;
        }
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 2, 3, 4]);
});

on_each_engine!(reads_of_a_doorbell_reach_the_machine, |engine| {
    let mut guest = with_device(engine);
    let (rung, _handle) = count(&guest, mmio(0x20), Rings::Any);
    guest.io.answer.store(0x1122_3344_1122_3344, Ordering::SeqCst);
    guest.code(at::CODE, |a| {
        a.mov(rbx, DEVICE)?;
        a.mov(eax, dword_ptr(rbx + 0x20))?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [0x1122_3344]);
    assert_eq!(rung.load(Ordering::SeqCst), 0);
});

on_each_engine!(a_doorbell_with_a_value_hears_only_that_value, |engine| {
    let mut guest = with_device(engine);
    let (first, _first) = count(&guest, mmio(0x40), Rings::Value(Width::Word, 1));
    let (second, _second) = count(&guest, mmio(0x40), Rings::Value(Width::Word, 0xfffe));
    guest.code(at::CODE, |a| {
        a.mov(rbx, DEVICE)?;
        for value in [1, 2, 0xfffe, 1] {
            a.mov(eax, value)?;
            a.mov(word_ptr(rbx + 0x40), ax)?;
        }
        done(a)
    });
    guest.run().done();
    assert_eq!((first.load(Ordering::SeqCst), second.load(Ordering::SeqCst)), (2, 1));
    assert!(guest.io.log().contains(&Access::Write(GuestPhysical(DEVICE + 0x40), 2)));
});

on_each_engine!(a_vector_store_rings_as_several_writes_of_eight_bytes, |engine| {
    let mut guest = with_device(engine);
    let (rung, _handle) = count(&guest, mmio(0x58), Rings::Width(Width::Quad));
    guest.code(at::CODE, |a| {
        a.mov(rbx, DEVICE)?;
        a.mov(rax, 0x0102_0304_0506_0708u64)?;
        a.movq(xmm0, rax)?;
        a.punpcklqdq(xmm0, xmm0)?;
        a.movups(xmmword_ptr(rbx + 0x50), xmm0)?;
        done(a)
    });
    guest.run().done();
    assert_eq!(rung.load(Ordering::SeqCst), 1);
    let rest = Access::Write(GuestPhysical(DEVICE + 0x50), 0x0102_0304_0506_0708);
    assert!(guest.io.log().contains(&rest), "{:x?}", guest.io.log());
});

on_each_engine!(a_doorbell_is_taken_down_with_its_handle, |engine| {
    let mut guest = with_device(engine);
    let (rung, handle) = count(&guest, DoorbellPlace::Port(0x70), Rings::Any);
    guest.code(at::CODE, |a| {
        a.mov(eax, 9)?;
        a.db(&[0xe7, 0x70])?;
        done(a)
    });
    guest.run().done();
    assert_eq!((rung.load(Ordering::SeqCst), guest.io.out(0x70)), (1, vec![]));
    drop(handle);
    guest.run().done();
    assert_eq!((rung.load(Ordering::SeqCst), guest.io.out(0x70)), (1, vec![9]));
    // The place is free again.
    let (_rung, _handle) = count(&guest, DoorbellPlace::Port(0x70), Rings::Any);
});

on_each_engine!(doorbells_that_cannot_be_are_refused_by_name, |engine| {
    let guest = with_device(engine);
    let (_rung, _handle) = count(&guest, mmio(0x10), Rings::Width(Width::Word));
    let error = |place, rings| match guest
        .vm
        .doorbell(Doorbell { place, rings }, Arc::new(|| {}))
        .map(drop)
    {
        Err(EngineError::Doorbell(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(error(mmio(0x10), Rings::Any).contains("0xd0000010 would ring another doorbell"));
    let memory = DoorbellPlace::Mmio(GuestPhysical(at::DATA));
    assert!(error(memory, Rings::Any).contains("0x80000 is guest memory"));
    let quad = error(DoorbellPlace::Port(0x70), Rings::Width(Width::Quad));
    assert!(quad.contains("no single write of 8 bytes"), "{quad}");
});

/// A guest that says what vectors 41H and 42H bring, and is done after the second.
fn interrupted(engine: EngineUnderTest) -> Guest {
    let guest = Guest::new(engine, Mode::LONG);
    for (vector, last) in [(0x41u8, false), (0x42, true)] {
        let handler = 0x9000 + 0x100 * u64::from(last);
        guest.handler(vector, handler, 0);
        guest.code(handler, |a| {
            a.mov(eax, u32::from(vector))?;
            say(a)?;
            a.mov(r15, at::LAPIC)?;
            a.mov(dword_ptr(r15 + 0xb0), 0)?;
            if last { done(a) } else { a.iretq() }
        });
    }
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.mov(r15, at::LAPIC)?;
        a.mov(dword_ptr(r15 + 0xf0), 0x1ff)?;
        a.mov(eax, 1)?;
        say(a)?;
        a.sti()?;
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    guest
}

fn message(vector: u32) -> Option<Msi> {
    Some(Msi { address: 0xfee0_0000, data: vector })
}

/// Runs the guest with a device thread beside it, which begins when the guest is ready.
fn run_beside(guest: &mut Guest, device: impl FnOnce(&dyn Fn(usize)) + Send) -> Vec<u32> {
    let io = guest.io.clone();
    // The guest's first word must be of this run.
    io.clear();
    thread::scope(|scope| {
        scope.spawn(|| {
            let wait = |count: usize| {
                while io.out(SAY.into()).len() < count {
                    thread::yield_now();
                }
            };
            wait(1);
            device(&wait);
        });
        guest.run().done().to_vec()
    })
}

on_each_engine!(a_device_thread_triggers_lines_and_the_guest_reprograms_them, |engine| {
    let mut guest = interrupted(engine);
    let line = guest.vm.msi_line().unwrap();
    let said = run_beside(&mut guest, |wait| {
        line.trigger(); // without a message: lost
        line.program(message(0x41)).unwrap();
        line.trigger();
        wait(2);
        line.trigger();
        wait(3);
        line.program(None).unwrap();
        line.trigger();
        line.program(message(0x42)).unwrap();
        line.trigger();
    });
    assert_eq!(said, [1, 0x41, 0x41, 0x42]);
});

on_each_engine!(the_end_of_a_level_triggered_line_reaches_the_machine, |engine| {
    let mut guest = interrupted(engine);
    let (level, edge) = (guest.vm.msi_line().unwrap(), guest.vm.msi_line().unwrap());
    level.program(message(0xc041)).unwrap();
    edge.program(message(0x42)).unwrap();
    let io = guest.io.clone();
    run_beside(&mut guest, |_| {
        level.trigger();
        while !io.log().contains(&Access::Eoi(0x41)) {
            thread::yield_now();
        }
        edge.trigger();
    });
    assert!(!io.log().contains(&Access::Eoi(0x42)), "an edge has no end for the IOAPIC");
});

/// Runs the first vCPU from where it is; a guest that hangs fails the test.
fn run(guest: &mut Guest) -> Halt {
    let io = guest.io.clone();
    let vcpu = &mut guest.vcpus[0];
    let watchdog = Watchdog::new(vec![vcpu.kicker()]);
    watchdog.begin(|| "a guest of the powers".into());
    let halt = vcpu.run(io.as_ref()).unwrap();
    assert!(!watchdog.end(), "the guest hangs: {:x?}", vcpu.state());
    halt
}

/// Runs the first vCPU from where it is to the next `done`.
fn go_on(guest: &mut Guest) {
    assert_eq!(run(guest), Halt::Kicked);
    assert!(guest.io.done.swap(false, Ordering::SeqCst));
}

/// Emits code that ends a run, and goes on in the next.
fn pause(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.db(&[0xe6, 0xf4])
}

fn range(start: u64, pages: u64) -> DirtyRange {
    DirtyRange { start: GuestPhysical(start), length: pages * 0x1000 }
}

on_each_engine!(a_harvest_has_the_pages_written_since_the_one_before, |engine| {
    let mut guest = Guest::new(engine, Mode::Protected32);
    guest.code(at::CODE, |a| {
        a.mov(dword_ptr(at::DATA), 1)?;
        a.mov(eax, dword_ptr(at::DATA + 0x9000))?; // read only
        pause(a)?;
        a.mov(dword_ptr(at::DATA), 2)?;
        a.inc(byte_ptr(at::DATA + 0x1000))?;
        a.mov(dword_ptr(at::DATA + 0x4ffe), 2)?; // two pages
        pause(a)?;
        a.mov(edi, (at::DATA + 0x2000) as u32)?;
        a.mov(ecx, 0x400)?;
        a.rep().stosd()?;
        pause(a)?;
        a.mov(dword_ptr(at::DATA + 0x8000), 3)?;
        pause(a)
    });
    let vm = guest.vm.clone();
    let log = vm.dirty_log().unwrap();
    let state = guest.state.clone();
    guest.vcpus[0].set_state(&state).unwrap();
    assert!(log.harvest().is_err(), "it was not started");
    go_on(&mut guest);
    log.start().unwrap();
    assert_eq!(log.harvest().unwrap(), []);
    go_on(&mut guest);
    assert_eq!(log.harvest().unwrap(), [range(at::DATA, 2), range(at::DATA + 0x4000, 2)]);
    assert_eq!(log.harvest().unwrap(), []);
    go_on(&mut guest);
    assert_eq!(log.harvest().unwrap(), [range(at::DATA + 0x2000, 1)]);
    log.stop().unwrap();
    go_on(&mut guest);
    assert!(log.harvest().is_err(), "it was stopped");
    log.start().unwrap();
    assert_eq!(log.harvest().unwrap(), []);
});

on_each_engine!(accessed_and_dirty_bits_are_writes_to_page_tables, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        a.mov(rbx, at::DATA + 0x5000)?;
        pause(a)?;
        a.mov(dword_ptr(rbx), 1)?;
        pause(a)
    });
    let vm = guest.vm.clone();
    let log = vm.dirty_log().unwrap();
    let state = guest.state.clone();
    guest.vcpus[0].set_state(&state).unwrap();
    go_on(&mut guest);
    log.start().unwrap();
    go_on(&mut guest);
    let dirty = log.harvest().unwrap();
    let has = |address| dirty.iter().any(|r| (r.start.0..r.start.0 + r.length).contains(&address));
    assert!(has(at::DATA + 0x5000), "{dirty:?}");
    assert!((at::TABLES..at::TABLES + 0x1_0000).step_by(0x1000).any(has), "{dirty:?}");
});

on_each_engine!(copies_of_harvested_pages_make_up_the_memory_of_a_running_guest, |engine| {
    const PAGES: u64 = 32;
    const COUNTER: u64 = at::DATA + PAGES * 0x1000;
    let mut guest = Guest::new(engine, Mode::LONG);
    // Writes all the time: a counter into one page after the other, its own code page among them.
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(rcx)?;
        a.mov(rdx, rcx)?;
        a.and(edx, PAGES as i32 - 1)?;
        a.shl(edx, 12)?;
        a.mov(qword_ptr(rdx + at::DATA as i32), rcx)?;
        a.mov(rdi, COUNTER)?;
        a.mov(rax, rcx)?;
        a.stosq()?;
        a.mov(dword_ptr(at::CODE + 0x800), ecx)?;
        a.jmp(again)
    });
    let (vm, io, memory) = (guest.vm.clone(), guest.io.clone(), guest.memory.clone());
    let log = vm.dirty_log().unwrap();
    let mut copy = vec![0; at::RAM as usize];
    let take = |copy: &mut [u8], dirty: Vec<DirtyRange>| {
        for DirtyRange { start, length } in dirty {
            let place = start.0 as usize..(start.0 + length) as usize;
            read(&memory, start.0, &mut copy[place]);
        }
    };
    let state = guest.state.clone();
    let vcpu = &mut guest.vcpus[0];
    vcpu.set_state(&state).unwrap();
    let kicker = vcpu.kicker();
    log.start().unwrap();
    take(&mut copy, vec![DirtyRange { start: GuestPhysical(0), length: at::RAM }]);
    // What one harvest misses, later writes would hide: many short runs.
    for round in 0..60 {
        thread::scope(|scope| {
            let running = scope.spawn(|| vcpu.run(io.as_ref()).unwrap());
            // The guest has to run, beside the harvests too: twice round its pages each time.
            for _ in 0..5 {
                let begin = read_u32(&memory, COUNTER);
                while read_u32(&memory, COUNTER) < begin + 2 * PAGES as u32 {
                    thread::yield_now();
                }
                take(&mut copy, log.harvest().unwrap());
            }
            kicker.kick();
            assert_eq!(running.join().unwrap(), Halt::Kicked);
        });
        take(&mut copy, log.harvest().unwrap());
        let mut all = vec![0; at::RAM as usize];
        read(&memory, 0, &mut all);
        let pages = copy.chunks(0x1000).zip(all.chunks(0x1000)).enumerate();
        let differing: Vec<_> = pages.filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect();
        assert!(differing.is_empty(), "round {round}: {differing:x?} were written unnoticed");
    }
});

/// Runs the first vCPU to the next stop for the debugger.
fn stop(guest: &mut Guest) -> (DebugStop, u64) {
    match run(guest) {
        Halt::Debug(stop) => (stop, guest.vcpus[0].state().unwrap().rip),
        other => panic!("{other:?}; said {:x?}", guest.io.out(SAY.into())),
    }
}

fn plan(guest: &mut Guest, single_step: bool, breakpoints: &[(u64, BreakpointKind)]) {
    let mut plan = DebugPlan { single_step, ..DebugPlan::default() };
    for (place, &(address, kind)) in plan.breakpoints.iter_mut().zip(breakpoints) {
        *place = Some(Breakpoint { address: GuestVirtual(address), kind });
    }
    guest.vcpus[0].debugger().unwrap().set_plan(&plan).unwrap();
}

fn begin(guest: &mut Guest) {
    let state = guest.state.clone();
    guest.vcpus[0].set_state(&state).unwrap();
}

const STEP: DebugStop = DebugStop { step: true, breakpoints: [false; 4] };

fn hit(n: usize) -> DebugStop {
    let mut stop = DebugStop::default();
    stop.breakpoints[n] = true;
    stop
}

on_each_engine!(a_debugger_steps_one_instruction_at_a_time, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        a.mov(eax, 5)?; // 5 bytes
        a.inc(rcx)?; // 3
        a.push(rax)?; // 1
        a.pop(rdx)?; // 1
        a.db(&[0xeb, 0x02, 0x0f, 0x0b])?; // jmp over ud2
        say(a)?;
        done(a)
    });
    begin(&mut guest);
    plan(&mut guest, true, &[]);
    for rip in [5, 8, 9, 10, 14, 16] {
        assert_eq!(stop(&mut guest), (STEP, at::CODE + rip));
    }
    plan(&mut guest, false, &[]);
    go_on(&mut guest);
    assert_eq!(guest.io.out(SAY.into()), [5]);
});

on_each_engine!(the_guest_sees_nothing_of_the_debugger, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        a.pushfq()?;
        a.pop(rcx)?;
        a.mov(rbx, dr6)?;
        a.mov(rdx, dr7)?;
        pause(a)
    });
    begin(&mut guest);
    let before = guest.vcpus[0].state().unwrap();
    plan(&mut guest, true, &[(at::CODE + 1, BreakpointKind::Execute)]);
    for _ in 0..4 {
        stop(&mut guest);
    }
    let state = guest.vcpus[0].state().unwrap();
    assert_eq!(state.gpr[gpr::RCX] & rflags::TF, 0, "PUSHF shows the guest's own flags");
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RDX]), (before.debug[4], before.debug[5]));
    assert_eq!((state.debug, state.rflags), (before.debug, before.rflags));
});

on_each_engine!(a_breakpoint_stops_before_its_instruction_each_time_it_comes, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 3)?; // 5 bytes
        a.set_label(&mut again)?;
        a.inc(rax)?; // 3
        a.dec(ecx)?; // 2
        a.jne(again)?;
        pause(a)
    });
    begin(&mut guest);
    plan(
        &mut guest,
        false,
        &[(0x1234, BreakpointKind::Execute), (at::CODE + 8, BreakpointKind::Execute)],
    );
    for rounds in 1..=3 {
        assert_eq!(stop(&mut guest), (hit(1), at::CODE + 8));
        assert_eq!(guest.vcpus[0].state().unwrap().gpr[gpr::RAX], rounds);
    }
    go_on(&mut guest);
});

on_each_engine!(a_step_that_ends_at_a_breakpoint_tells_both_and_goes_on_from_there, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        a.nop()?;
        a.nop()?;
        a.nop()?;
        pause(a)
    });
    begin(&mut guest);
    plan(&mut guest, true, &[(at::CODE + 1, BreakpointKind::Execute)]);
    let both = DebugStop { step: true, ..hit(0) };
    assert_eq!(stop(&mut guest), (both, at::CODE + 1));
    assert_eq!(stop(&mut guest), (STEP, at::CODE + 2));
    plan(&mut guest, false, &[(at::CODE + 2, BreakpointKind::Execute)]);
    assert_eq!(stop(&mut guest), (hit(0), at::CODE + 2));
    go_on(&mut guest);
});

on_each_engine!(a_data_breakpoint_stops_after_the_access, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let word = at::DATA + 4;
    guest.code(at::CODE, |a| {
        a.mov(rbx, at::DATA)?;
        a.mov(rbx, at::DATA)?;
        a.mov(dword_ptr(rbx), 1)?; // beside it
        a.mov(eax, dword_ptr(rbx + 4))?; // a read
        a.mov(byte_ptr(rbx + 7), 2)?;
        a.mov(ecx, 1)?;
        pause(a)
    });
    begin(&mut guest);
    plan(&mut guest, false, &[(word, BreakpointKind::Write(Width::Double))]);
    let (why, rip) = stop(&mut guest);
    assert_eq!(why, hit(0));
    assert_eq!(guest.vcpus[0].state().unwrap().gpr[gpr::RCX], 0);
    begin(&mut guest);
    plan(&mut guest, false, &[(word, BreakpointKind::Access(Width::Double))]);
    assert_eq!(stop(&mut guest), (hit(0), rip - 4), "after the read");
    assert_eq!(stop(&mut guest), (hit(0), rip));
    go_on(&mut guest);
});

on_each_engine!(interrupts_wait_while_a_debugger_steps, |engine| {
    let mut guest = interrupted(engine);
    guest.code(at::CODE, |a| {
        a.mov(r15, at::LAPIC)?;
        a.mov(dword_ptr(r15 + 0xf0), 0x1ff)?;
        a.sti()?;
        a.nop()?;
        a.db(&[0xeb, 0xfd]) // back to the NOP
    });
    begin(&mut guest);
    plan(&mut guest, true, &[]);
    let mut next = at::CODE;
    while read_u32(&guest.memory, next) & 0xff != 0xfb {
        next = stop(&mut guest).1;
        assert!((at::CODE..at::CODE + 0x100).contains(&next), "{next:#x}");
    }
    guest.vm.signal_msi(message(0x42).unwrap());
    for rip in [1, 2, 1, 2] {
        assert_eq!(stop(&mut guest), (STEP, next + rip));
    }
    plan(&mut guest, false, &[]);
    go_on(&mut guest);
    assert_eq!(guest.io.out(SAY.into()), [0x42]);
});

on_each_engine!(a_debugger_steps_over_a_halt_with_an_interrupt_waiting, |engine| {
    let mut guest = interrupted(engine);
    begin(&mut guest);
    plan(&mut guest, true, &[]);
    let mut next = at::CODE;
    while read_u32(&guest.memory, next) & 0xff != 0xf4 {
        next = stop(&mut guest).1;
        assert!((at::CODE..at::CODE + 0x100).contains(&next), "{next:#x}");
    }
    guest.vm.signal_msi(message(0x42).unwrap());
    for rip in [1, 0, 1] {
        assert_eq!(stop(&mut guest), (STEP, next + rip));
    }
    plan(&mut guest, false, &[]);
    go_on(&mut guest);
    assert_eq!(guest.io.out(SAY.into()), [1, 0x42]);
});

on_each_engine!(a_misaligned_data_breakpoint_is_refused, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let mut plan = DebugPlan::default();
    let kind = BreakpointKind::Write(Width::Quad);
    plan.breakpoints[2] = Some(Breakpoint { address: GuestVirtual(at::DATA + 4), kind });
    let error = guest.vcpus[0].debugger().unwrap().set_plan(&plan);
    assert!(matches!(error, Err(EngineError::Debug(_))), "{error:?}");
});
