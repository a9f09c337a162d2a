//! Tests of the serial port.
use super::*;
use device::testing::TestMachine;
use device::{Gsi, lock};
use std::sync::Mutex;

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<(Vec<Vec<u8>>, usize)>>);
impl SerialOutput for Recorder {
    fn write(&mut self, bytes: &[u8]) {
        lock(&self.0).0.push(bytes.to_vec());
    }
    fn input_room(&mut self) {
        lock(&self.0).1 += 1;
    }
}
impl Recorder {
    fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut lock(&self.0).0)
    }
}

const BASE: u16 = 0x3f8;

fn machine() -> (TestMachine, Shared<Uart>, Recorder) {
    let (mut machine, recorder) = (TestMachine::default(), Recorder::default());
    let config = UartConfig { index: 0, peer: Box::new(recorder.clone()) };
    let uart = config.wire(machine.builder()).unwrap();
    (machine, uart, recorder)
}
fn send(machine: &TestMachine, bytes: &[u8]) {
    bytes.iter().for_each(|byte| machine.outb(BASE, *byte));
}

#[test]
fn output_arrives_in_lines() {
    let (machine, _, recorder) = machine();
    send(&machine, b"one\ntwo\nthr");
    assert_eq!(recorder.take(), [b"one\n", b"two\n"]);
    machine.advance(OUTPUT_DELAY);
    assert_eq!(recorder.take(), [b"thr"], "an unfinished line does not wait for its end");
    send(&machine, &[b'x'; OUTPUT_BATCH + 1]);
    assert_eq!(recorder.take(), [vec![b'x'; OUTPUT_BATCH]]);
}

#[test]
fn input_beyond_the_fifo_waits_and_beyond_the_queue_is_refused() {
    let (machine, uart, recorder) = machine();
    machine.outb(BASE + IIR_FCR, 0x01);
    machine.advance(START_UP);
    let typed: Vec<u8> = (0..=255).cycle().take(INPUT_LIMIT + 100).collect();
    assert_eq!(lock(&uart).push_input(&typed), INPUT_LIMIT);
    let mut got = Vec::new();
    while machine.inb(BASE + LSR) & LSR_READY != 0 {
        got.push(machine.inb(BASE));
    }
    assert_eq!(got, typed[..INPUT_LIMIT]);
    assert_eq!(lock(&recorder.0).1, 1, "told once that there is room");
}

#[test]
fn linux_identifies_a_16550a() {
    let (machine, _, _) = machine();
    machine.outb(BASE + IER, 0);
    assert_eq!(machine.inb(BASE + IER), 0);
    machine.outb(BASE + IER, 0xff);
    assert_eq!(machine.inb(BASE + IER), 0x0f);
    machine.outb(BASE + MCR, 0x1a);
    assert_eq!(machine.inb(BASE + MSR) & 0xf0, 0x90);
    machine.outb(BASE + LCR, 0xbf);
    machine.outb(BASE + IIR_FCR, 0);
    machine.outb(BASE + LCR, 0);
    machine.outb(BASE + IIR_FCR, 1);
    assert_eq!(machine.inb(BASE + IIR_FCR) >> 6, 3);
    machine.outb(BASE + IIR_FCR, 0x21);
    assert_eq!(machine.inb(BASE + IIR_FCR) >> 5, 6, "not a 16750");
}

#[test]
fn enabling_the_transmitter_interrupt_raises_it_every_time() {
    let (machine, _, _) = machine();
    for _ in 0..2 {
        machine.outb(BASE + IER, IER_TRANSMIT_EMPTY);
        assert_eq!(machine.inb(BASE + IIR_FCR), IIR_TRANSMIT_EMPTY);
        assert_eq!(machine.inb(BASE + IIR_FCR), IIR_NONE, "reading it acknowledged it");
        machine.outb(BASE + IER, 0);
    }
    assert_eq!(machine.interrupts.take_edges(), 2);
}

#[test]
fn writing_a_byte_raises_the_transmitter_interrupt_again() {
    let (machine, _, _) = machine();
    machine.outb(BASE + IER, IER_TRANSMIT_EMPTY);
    machine.inb(BASE + IIR_FCR);
    machine.interrupts.take();
    send(&machine, b"a");
    assert_eq!(machine.interrupts.take(), [(Gsi(4), true)]);
}

#[test]
fn the_trigger_level_separates_received_from_timeout() {
    let (machine, uart, _) = machine();
    machine.outb(BASE + IIR_FCR, 0x41);
    machine.outb(BASE + IER, IER_RECEIVED);
    lock(&uart).push_input(b"abcde");
    assert_eq!(machine.inb(BASE + IIR_FCR), IIR_FIFO | IIR_RECEIVED);
    machine.inb(BASE);
    machine.inb(BASE);
    assert_eq!(machine.inb(BASE + IIR_FCR), IIR_FIFO | IIR_TIMEOUT);
    for expect in b"cde" {
        assert_eq!(machine.inb(BASE), *expect);
    }
    assert_eq!(machine.inb(BASE + IIR_FCR), IIR_FIFO | IIR_NONE);
}

#[test]
fn input_that_comes_while_a_driver_starts_up_is_not_lost() {
    let (machine, uart, _) = machine();
    lock(&uart).push_input(b"early");
    // Linux: enable and clear the FIFOs, then read away what is left in the registers.
    machine.outb(BASE + IIR_FCR, 0x01);
    machine.outb(BASE + IIR_FCR, 0x07);
    machine.inb(BASE + LSR);
    machine.inb(BASE);
    machine.outb(BASE + IER, IER_RECEIVED);
    for expect in b"early" {
        assert_eq!(machine.inb(BASE), *expect);
    }
}

#[test]
fn a_driver_that_polls_gets_input_soon_after_it_cleared_the_fifo() {
    let (machine, uart, _) = machine();
    machine.outb(BASE + IIR_FCR, 0x07);
    lock(&uart).push_input(b"x");
    assert_eq!(machine.inb(BASE + LSR), LSR_EMPTY);
    machine.advance(START_UP);
    assert_eq!(machine.inb(BASE + LSR), LSR_EMPTY | LSR_READY);
    assert_eq!(machine.inb(BASE), b'x');
}

#[test]
fn loopback_returns_bytes_and_modem_lines_and_overruns() {
    let (machine, uart, recorder) = machine();
    machine.outb(BASE + MCR, MCR_LOOP);
    machine.outb(BASE + IER, IER_LINE_STATUS | IER_MODEM_STATUS);
    lock(&uart).push_input(b"t");
    send(&machine, b"xy");
    assert_eq!(machine.inb(BASE + IIR_FCR), IIR_LINE_STATUS);
    assert_eq!(machine.inb(BASE + LSR), LSR_EMPTY | LSR_OVERRUN | LSR_READY);
    assert_eq!(machine.inb(BASE), b'x');
    machine.inb(BASE + MSR);
    machine.outb(BASE + MCR, MCR_LOOP | MCR_OUT1 | MCR_RTS);
    assert_eq!(machine.inb(BASE + MSR), MSR_RI | MSR_CTS | 1, "RI tells only its end");
    machine.outb(BASE + MCR, MCR_LOOP | MCR_RTS);
    assert_eq!(machine.inb(BASE + IIR_FCR), IIR_MODEM_STATUS);
    assert_eq!(machine.inb(BASE + MSR), MSR_CTS | MSR_DELTA_RI);
    machine.outb(BASE + MCR, 0);
    assert_eq!(machine.inb(BASE), b't', "typed input waited outside the loop");
    machine.advance(OUTPUT_DELAY);
    assert!(recorder.take().is_empty());
}

#[test]
fn the_divisor_hides_data_and_interrupt_enable() {
    let (machine, _, recorder) = machine();
    machine.outb(BASE + LCR, LCR_DLAB | 3);
    machine.outb(BASE, 1);
    machine.outb(BASE + IER, 2);
    assert_eq!((machine.inb(BASE), machine.inb(BASE + IER)), (1, 2));
    machine.outb(BASE + LCR, 3);
    assert_eq!(machine.inb(BASE + IER), 0);
    machine.advance(OUTPUT_DELAY);
    assert!(recorder.take().is_empty());
}

#[test]
fn a_restored_port_has_lost_no_byte() {
    let (old, uart, _) = machine();
    old.outb(BASE + IIR_FCR, 0x01);
    old.outb(BASE + IER, IER_RECEIVED);
    send(&old, b"half a li");
    lock(&uart).push_input(b"typed");
    let state = lock(&uart).save();
    let (new, uart, recorder) = machine();
    lock(&uart).restore(&state).unwrap();
    assert_eq!(recorder.take(), [b"half a li"]);
    assert_eq!(new.interrupts.take(), [(Gsi(4), true)]);
    for expect in b"typed" {
        assert_eq!(new.inb(BASE), *expect);
    }
}
