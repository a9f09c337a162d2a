//! Disks of a machine, driven by a guest of a few register writes.
use super::fake::{Cpu, FakeEngine, config, host, machine};
use crate::{Command, DiskConfig, Notice, OnFull, Outcome};
use arch::GuestPhysical;
use engine::EngineError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use virtio::testing::MemoryDisk;
use vm_memory::{Bytes, GuestAddress};

const DEBUG_EXIT: u16 = 0xf4;
/// Where the guest puts the disk's registers, and its queue.
const REGISTERS: u64 = 0xc000_0000;
const NOTIFY: u64 = REGISTERS + 0x3000;
const DESCRIPTORS: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const HEADER: u64 = 0x20_3000;
const DATA: u64 = 0x20_4000;
const STATUS: u64 = 0x20_5000;

fn register(cpu: &Cpu<'_>, offset: u64, width: usize, value: u64) {
    cpu.io.mmio_write(GuestPhysical(REGISTERS + offset), &value.to_le_bytes()[..width]);
}

fn store(cpu: &Cpu<'_>, at: u64, bytes: &[u8]) {
    cpu.memory.write_slice(bytes, GuestAddress(at)).unwrap();
}

/// Sets the disk in slot 1 up as a driver does.
fn set_up(cpu: &Cpu<'_>) {
    for (offset, value) in [(0x10, REGISTERS as u32), (0x04, 6)] {
        cpu.io.pio_write(0xcf8, &(1u32 << 31 | 1 << 11 | offset).to_le_bytes());
        cpu.io.pio_write(0xcfc, &value.to_le_bytes());
    }
    let steps = [(20, 1, 3), (8, 4, 1), (12, 4, 1), (20, 1, 0xb), (24, 2, 8)];
    let queue = [(32, 8, DESCRIPTORS), (40, 8, AVAILABLE), (48, 8, USED), (28, 2, 1), (20, 1, 0xf)];
    for (offset, width, value) in steps.into_iter().chain(queue) {
        register(cpu, offset, width, value);
    }
}

/// Asks for a sector to be written.
fn write_sector(cpu: &Cpu<'_>) {
    store(cpu, HEADER, &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    store(cpu, DATA, &[7; 512]);
    store(cpu, STATUS, &[0xff]);
    let chain = [(HEADER, 16u32, 1u16, 1u16), (DATA, 512, 1, 2), (STATUS, 1, 2, 0)];
    for (n, (at, length, flags, next)) in chain.into_iter().enumerate() {
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        store(cpu, DESCRIPTORS + 16 * n as u64, &bytes);
    }
    store(cpu, AVAILABLE + 2, &[1, 0]);
    cpu.io.mmio_write(GuestPhysical(NOTIFY), &[0, 0]);
}

/// A machine with this disk, whose guest writes to it and ends with the status of that.
fn run(
    disk: &Arc<MemoryDisk>,
    on_full: OnFull,
    notice: impl FnOnce(&crate::MachineHandle) -> Box<dyn FnMut(Notice<'_>)>,
) -> Outcome {
    let begun = AtomicBool::new(false);
    let engine = FakeEngine::new(move |cpu| -> Result<_, EngineError> {
        if !begun.swap(true, Ordering::SeqCst) {
            set_up(cpu);
            write_sector(cpu);
        }
        while !cpu.kicked() {
            let status: u8 = cpu.memory.load(GuestAddress(STATUS), Ordering::SeqCst).unwrap();
            if status != 0xff {
                cpu.out(DEBUG_EXIT, &[status]);
                break;
            }
            std::thread::yield_now();
        }
        cpu.halt()
    });
    let mut config = config();
    config.devices.disks = vec![DiskConfig { disk: disk.clone(), serial: "test".into(), on_full }];
    let machine = machine(config, &engine, None, None);
    let mut notify = notice(&machine.handle());
    machine.run(host(&mut notify)).unwrap()
}

#[test]
fn a_machine_whose_host_is_full_pauses_and_makes_the_request_again() {
    let disk = Arc::new(MemoryDisk::new(4096));
    disk.full.store(true, Ordering::SeqCst);
    let notices = Arc::new(AtomicU32::new(0));
    let (count, there) = (notices.clone(), disk.clone());
    let outcome = run(&disk, OnFull::Pause, |handle| {
        let handle = handle.clone();
        Box::new(move |notice| {
            assert!(matches!(notice, Notice::DiskFull(_)), "{notice:?}");
            count.fetch_add(1, Ordering::SeqCst);
            there.full.store(false, Ordering::SeqCst);
            handle.send(Command::Resume);
        })
    });
    assert_eq!((outcome, notices.load(Ordering::SeqCst)), (Outcome::DebugExit(0), 1));
    assert_eq!(disk.data.lock().unwrap()[1024..1536], [7; 512]);
}

#[test]
fn on_a_full_host_the_guest_hears_of_it_where_that_is_wanted() {
    let disk = Arc::new(MemoryDisk::new(4096));
    disk.full.store(true, Ordering::SeqCst);
    let outcome = run(&disk, OnFull::Fail, |_| Box::new(|notice| panic!("{notice:?}")));
    assert_eq!(outcome, Outcome::DebugExit(1));
}
