//! The life of a machine, with an engine that runs closures.
pub mod fake;

use crate::{
    Bytes, Command, Image, Machine, MachinePhase, Notice, Outcome, Serial, StopCause, StopSignals,
    VmmError,
};
use arch::GuestPhysical;
use engine::{EngineError, Halt, Msi};
use fake::{FakeEngine, config, host, machine};
use rustix::pipe::pipe;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const COM1: u16 = 0x3f8;
const COM1_STATUS: u16 = COM1 + 5;
const DEBUG_EXIT: u16 = 0xf4;
const RESET_CONTROL: u16 = 0xcf9;
const PM1_EVENT: u16 = 0x600;
const PM1_CONTROL: u16 = 0x604;
const POWER_BUTTON: u16 = 1 << 8;
/// SLP_EN with the sleep type of S5.
const SLEEP_S5: u16 = 1 << 13 | 5 << 10;
const PIT_CHANNEL_0: u16 = 0x40;
const PIT_CONTROL: u16 = 0x43;
const IOAPIC: u64 = 0xfec0_0000;

fn no_notice(notice: Notice<'_>) {
    panic!("nothing to say, but got {notice:?}");
}

#[test]
fn the_guests_last_word_arrives_before_the_machine_ends() {
    let engine = FakeEngine::new(|cpu| {
        cpu.out(COM1, b"last word");
        cpu.out(DEBUG_EXIT, &[0x21]);
        cpu.halt()
    });
    let (reader, writer) = pipe().unwrap();
    let machine = machine(config(), &engine, None, Some(writer));
    let outcome = machine.run(host(&mut no_notice)).unwrap();
    assert_eq!(outcome, Outcome::DebugExit(0x21));
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    assert_eq!(text, "last word");
}

#[test]
fn a_guest_that_ends_stops_its_other_vcpus() {
    let running = Arc::new(AtomicU32::new(0));
    let in_guest = running.clone();
    let engine = FakeEngine::new(move |cpu| {
        in_guest.fetch_add(1, Ordering::SeqCst);
        if cpu.index == 2 {
            while in_guest.load(Ordering::SeqCst) < 4 {
                std::thread::yield_now();
            }
            cpu.out(DEBUG_EXIT, &[7]);
        }
        cpu.halt()
    });
    let mut config = config();
    config.vcpus = 4;
    let outcome = machine(config, &engine, None, None).run(host(&mut no_notice)).unwrap();
    assert_eq!(outcome, Outcome::DebugExit(7));
    assert_eq!(running.load(Ordering::SeqCst), 4, "no vCPU ran again");
}

#[test]
fn a_triple_fault_is_reported_with_registers_and_boots_the_guest_again() {
    let engine = FakeEngine::new(|cpu| match cpu.boot {
        0 => Ok(Halt::TripleFault),
        _ => {
            cpu.out(DEBUG_EXIT, &[1]);
            cpu.halt()
        }
    });
    let mut reports = Vec::new();
    let notify = &mut |notice: Notice<'_>| match notice {
        Notice::TripleFault(fault) => reports.push(fault.to_string()),
        other => panic!("{other:?}"),
    };
    let outcome = machine(config(), &engine, None, None).run(host(notify)).unwrap();
    assert_eq!(outcome, Outcome::DebugExit(1));
    assert_eq!(reports.len(), 1);
    for part in ["rip 0000000000100020", "mode 32-bit protected", "code at rip: 0f 0b eb fe"] {
        assert!(reports[0].contains(part), "{part} in\n{}", reports[0]);
    }
}

#[test]
fn a_triple_fault_ends_a_machine_that_shall_not_reboot() {
    let engine = FakeEngine::new(|_| Ok(Halt::TripleFault));
    let mut config = config();
    config.no_reboot = true;
    let mut reports = 0;
    let outcome = machine(config, &engine, None, None).run(host(&mut |_| reports += 1)).unwrap();
    assert_eq!((outcome, reports), (Outcome::TripleFault, 1));
}

#[test]
fn a_reset_boots_the_guest_again_with_the_console_still_attached() {
    let engine = FakeEngine::new(|cpu| {
        cpu.out(COM1, format!("boot {}\n", cpu.boot).as_bytes());
        match cpu.boot {
            0 | 1 => cpu.out(RESET_CONTROL, &[6]),
            _ => cpu.out(DEBUG_EXIT, &[0]),
        }
        cpu.halt()
    });
    let (reader, writer) = pipe().unwrap();
    let machine = machine(config(), &engine, None, Some(writer));
    assert_eq!(machine.run(host(&mut no_notice)).unwrap(), Outcome::DebugExit(0));
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    assert_eq!(text, "boot 0\nboot 1\nboot 2\n");
}

#[test]
fn a_reset_ends_a_machine_that_shall_not_reboot() {
    let engine = FakeEngine::new(|cpu| {
        cpu.out(RESET_CONTROL, &[6]);
        cpu.halt()
    });
    let mut config = config();
    config.no_reboot = true;
    let outcome = machine(config, &engine, None, None).run(host(&mut no_notice)).unwrap();
    assert_eq!(outcome, Outcome::Reset);
}

#[test]
fn the_power_button_reaches_the_guest_and_the_guest_switches_off() {
    let engine = FakeEngine::new(|cpu| {
        let mut status = [0; 2];
        while u16::from_le_bytes(status) & POWER_BUTTON == 0 {
            cpu.io.pio_read(PM1_EVENT, &mut status);
        }
        cpu.io.pio_write(PM1_CONTROL, &SLEEP_S5.to_le_bytes());
        cpu.halt()
    });
    let machine = machine(config(), &engine, None, None);
    machine.handle().send(Command::PowerButton);
    assert_eq!(machine.run(host(&mut no_notice)).unwrap(), Outcome::PowerOff);
}

#[test]
fn a_timer_device_wakes_up_in_time_and_interrupts_through_the_ioapic() {
    let engine = FakeEngine::new(|cpu| {
        // Redirection entry of input 2: vector 30H, edge, unmasked, to APIC id 0.
        for (register, value) in [(0x14u32, 0x30u32), (0x15, 0)] {
            cpu.io.mmio_write(GuestPhysical(IOAPIC), &register.to_le_bytes());
            cpu.io.mmio_write(GuestPhysical(IOAPIC + 0x10), &value.to_le_bytes());
        }
        // Channel 0, low and high byte, mode 2: every 1193 clocks is every millisecond.
        cpu.out(PIT_CONTROL, &[0x34]);
        cpu.out(PIT_CHANNEL_0, &1193u16.to_le_bytes());
        while cpu.messages().len() < 3 {
            std::thread::yield_now();
        }
        assert_eq!(cpu.messages()[0], Msi { address: 0xfee0_0000, data: 0x30 });
        cpu.out(DEBUG_EXIT, &[3]);
        cpu.halt()
    });
    let machine = machine(config(), &engine, None, None);
    assert_eq!(machine.run(host(&mut no_notice)).unwrap(), Outcome::DebugExit(3));
}

#[test]
fn a_paused_machine_stands_still_until_it_is_resumed() {
    let runs = Arc::new(AtomicU32::new(0));
    let counter = runs.clone();
    let engine = FakeEngine::new(move |cpu| {
        while !cpu.kicked() {
            counter.fetch_add(1, Ordering::SeqCst);
        }
        cpu.halt()
    });
    let mut config = config();
    config.vcpus = 2;
    let machine = machine(config, &engine, None, None);
    let handle = machine.handle();
    assert_eq!(handle.phase(), MachinePhase::Ready);
    let control = std::thread::spawn(move || {
        let progress = || {
            let before = runs.load(Ordering::SeqCst);
            while runs.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
        };
        for _ in 0..3 {
            progress();
            handle.send(Command::Pause);
            assert_eq!(handle.wait_for(MachinePhase::Paused), MachinePhase::Paused);
            let before = runs.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(runs.load(Ordering::SeqCst), before);
            handle.send(Command::Resume);
        }
        progress();
        handle.send(Command::Stop);
        assert_eq!(handle.wait_for(MachinePhase::Ended), MachinePhase::Ended);
    });
    let outcome = machine.run(host(&mut no_notice)).unwrap();
    assert_eq!(outcome, Outcome::Stopped(StopCause::Command));
    control.join().unwrap();
}

#[test]
fn typed_bytes_reach_the_guest_and_its_unfinished_line_reaches_the_reader() {
    let engine = FakeEngine::new(|cpu| {
        while !cpu.kicked() {
            if cpu.input(COM1_STATUS) & 1 != 0 {
                let byte = cpu.input(COM1);
                cpu.out(COM1, &[byte.to_ascii_uppercase()]);
            }
        }
        cpu.halt()
    });
    let (typed, keyboard) = pipe().unwrap();
    let (screen, shown) = pipe().unwrap();
    let machine = machine(config(), &engine, Some(typed), Some(shown));
    let handle = machine.handle();
    let user = std::thread::spawn(move || {
        let (mut keyboard, mut screen) = (File::from(keyboard), File::from(screen));
        let mut echo = [0; 5];
        keyboard.write_all(b"hello").unwrap();
        screen.read_exact(&mut echo).unwrap();
        drop(keyboard);
        handle.send(Command::Stop);
        echo
    });
    machine.run(host(&mut no_notice)).unwrap();
    assert_eq!(&user.join().unwrap(), b"HELLO");
}

#[test]
fn more_input_than_any_buffer_holds_arrives_complete() {
    const COUNT: usize = 300_000;
    let engine = FakeEngine::new(|cpu| {
        let mut sum = 0u8;
        for _ in 0..COUNT {
            while cpu.input(COM1_STATUS) & 1 == 0 {
                std::thread::yield_now();
            }
            sum = sum.wrapping_mul(31).wrapping_add(cpu.input(COM1));
        }
        cpu.out(DEBUG_EXIT, &[sum]);
        cpu.halt()
    });
    let bytes: Vec<u8> = (0..COUNT).map(|n| (n / 7) as u8).collect();
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(*byte));
    let (typed, keyboard) = pipe().unwrap();
    let user = std::thread::spawn(move || File::from(keyboard).write_all(&bytes));
    let machine = machine(config(), &engine, Some(typed), None);
    assert_eq!(machine.run(host(&mut no_notice)).unwrap(), Outcome::DebugExit(sum));
    user.join().unwrap().unwrap();
}

#[test]
fn a_machine_whose_reader_went_away_ends() {
    let engine = FakeEngine::new(|cpu| {
        while !cpu.kicked() {
            cpu.out(COM1, b"a line\n");
        }
        cpu.halt()
    });
    let (reader, writer) = pipe().unwrap();
    let machine = machine(config(), &engine, None, Some(writer));
    let user = std::thread::spawn(move || {
        let mut line = [0; 7];
        File::from(reader).read_exact(&mut line).unwrap();
        line
    });
    let outcome = machine.run(host(&mut no_notice)).unwrap();
    assert_eq!(outcome, Outcome::Stopped(StopCause::ReaderGone));
    assert_eq!(&user.join().unwrap(), b"a line\n");
}

#[test]
fn a_failing_engine_ends_the_machine_with_its_words() {
    let engine = FakeEngine::new(|_| Err(EngineError::Defect("it broke".into())));
    let error = machine(config(), &engine, None, None).run(host(&mut no_notice)).unwrap_err();
    assert!(
        matches!(&error, VmmError::Vcpu { vcpu: 0, source } if source.to_string().contains("it broke"))
    );
    assert!(!error.is_bad_input());
}

#[test]
fn a_panicking_vcpu_thread_ends_the_machine() {
    let engine =
        FakeEngine::new(|cpu| if cpu.index == 1 { panic!("for this test") } else { cpu.halt() });
    let mut config = config();
    config.vcpus = 2;
    let error = machine(config, &engine, None, None).run(host(&mut no_notice)).unwrap_err();
    assert!(matches!(error, VmmError::Vcpu { vcpu: 1, .. }), "{error:?}");
}

// The only test that raises signals, because they reach the whole process.
#[test]
fn a_signal_presses_the_power_button_and_stops_a_guest_that_does_not_care() {
    let engine = FakeEngine::new(|cpu| cpu.halt());
    let signals = StopSignals::catch().unwrap();
    signal_hook::low_level::raise(signal_hook::consts::SIGTERM).unwrap();
    let mut pressed = 0;
    let notify = &mut |notice: Notice<'_>| {
        assert!(matches!(notice, Notice::PowerButton(_)));
        pressed += 1;
    };
    let mut host = host(notify);
    host.signals = Some(signals);
    let outcome = machine(config(), &engine, None, None).run(host).unwrap();
    assert_eq!(outcome, Outcome::Stopped(StopCause::Signal));
    assert_eq!(pressed, 1);
}

#[test]
fn bad_input_is_refused_by_name_and_leaves_no_file_behind() {
    let engine = FakeEngine::new(|cpu| cpu.halt());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.log");
    let refused = |change: fn(&mut crate::MachineConfig)| {
        let mut config = config();
        config.serial = Serial::File(path.clone());
        change(&mut config);
        let error = Machine::new(config, &engine).map(drop).unwrap_err();
        assert!(error.is_bad_input() && !path.exists());
        error.to_string()
    };
    assert!(refused(|config| config.memory = Bytes(4096)).contains("--memory"));
    assert!(refused(|config| config.vcpus = 0).contains("--cpus: 0"));
    assert!(refused(|config| config.vcpus = 9).contains("1 to 8"));
    let foreign = |config: &mut crate::MachineConfig| {
        config.boot.kernel = Image::from_bytes("letter.txt".into(), b"Dear".to_vec()).unwrap();
    };
    assert!(refused(foreign).contains("letter.txt"));
}

#[test]
fn a_serial_file_gets_the_output_and_one_that_cannot_be_made_is_named() {
    let engine = FakeEngine::new(|cpu| {
        cpu.out(COM1, b"to the file\n");
        cpu.out(DEBUG_EXIT, &[0]);
        cpu.halt()
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.log");
    let mut good = config();
    good.serial = Serial::File(path.clone());
    Machine::new(good, &engine).unwrap().run(host(&mut no_notice)).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), b"to the file\n");

    let mut bad = config();
    bad.serial = Serial::File(folder.path().join("missing/serial.log"));
    let error = Machine::new(bad, &engine).map(drop).unwrap_err();
    assert!(error.is_bad_input() && error.to_string().contains("missing/serial.log"), "{error}");
}
