//! Much data through TCP, under all circumstances, equal at both ends.
use crate::guest::{GATEWAY, Guest, Kind, Rng};
use net::nat::NatConfig;
use smoltcp::iface::SocketHandle;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;

const MIB: usize = 1 << 20;

/// Bytes that depend on where they stand.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Rng::new(seed).fill(&mut bytes);
    bytes
}

/// A host's program that serves one connection.
fn serve<T: Send + 'static>(
    service: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (u16, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, std::thread::spawn(move || service(listener.accept().unwrap().0)))
}

fn connect(guest: &mut Guest, port: u16, buffer: usize) -> SocketHandle {
    guest.connect((GATEWAY, port), 40_000, buffer)
}

/// The guest sends; what arrives is compared.
fn upload(kind: Kind, length: usize, buffer: usize) {
    let mut guest = Guest::new(&NatConfig::default(), kind);
    let (port, server) = serve(|mut stream| {
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received
    });
    let socket = connect(&mut guest, port, buffer);
    let data = pattern(1, length);
    guest.send(socket, &data);
    guest.tcp(socket).close();
    assert_eq!(guest.receive_all(socket), b"");
    assert!(server.join().unwrap() == data, "what arrived differs");
}

/// The host sends; what arrives is compared.
fn download(kind: Kind, length: usize, buffer: usize) {
    let mut guest = Guest::new(&NatConfig::default(), kind);
    let (port, server) = serve(move |mut stream| stream.write_all(&pattern(2, length)).unwrap());
    let socket = connect(&mut guest, port, buffer);
    let received = guest.receive_all(socket);
    assert!(received == pattern(2, length), "what arrived differs: {} bytes", received.len());
    server.join().unwrap();
}

#[test]
fn bytes_64_mib_go_up_and_down_through_a_plain_card() {
    upload(Kind::default(), 64 * MIB, MIB);
    download(Kind::default(), 64 * MIB, MIB);
}

#[test]
fn bytes_64_mib_go_up_and_down_in_large_frames() {
    let kind = Kind { large: true, ..Kind::default() };
    upload(kind, 64 * MIB, MIB);
    download(kind, 64 * MIB, MIB);
}

#[test]
fn a_card_that_refuses_at_random_loses_nothing() {
    for large in [false, true] {
        let kind = Kind { large, refuses: Some(3), ..Kind::default() };
        upload(kind, 4 * MIB, 256 << 10);
        download(kind, 4 * MIB, 256 << 10);
    }
}

#[test]
fn a_card_with_room_for_one_frame_loses_nothing() {
    let kind = Kind { room: Some(1), ..Kind::default() };
    upload(kind, 2 * MIB, MIB);
    download(kind, 2 * MIB, MIB);
}

#[test]
fn a_guest_that_drops_frames_gets_them_again() {
    let kind = Kind { loses: Some(100), ..Kind::default() };
    download(kind, MIB, 64 << 10);
    upload(kind, MIB, 64 << 10);
}

#[test]
fn tiny_windows_only_make_it_slow() {
    for buffer in [1, 100, 3000] {
        download(Kind::default(), 300 * buffer.min(50), buffer);
        upload(Kind::default(), 300 * buffer.min(50), buffer);
    }
}

#[test]
fn both_directions_at_once_do_not_stop_each_other() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let (port, server) = serve(|mut stream| {
        let mut other = stream.try_clone().unwrap();
        let writer = std::thread::spawn(move || {
            other.write_all(&pattern(2, 8 * MIB)).unwrap();
            other.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        writer.join().unwrap();
        received
    });
    let socket = connect(&mut guest, port, 128 << 10);
    let (data, mut sent, mut received) = (pattern(1, 8 * MIB), 0, Vec::new());
    guest.until("both directions", |guest| {
        let socket = guest.tcp(socket);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
            if sent == data.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), received.extend_from_slice(bytes))).unwrap();
        }
        let ended = !socket.may_recv() && !socket.may_send() && socket.send_queue() == 0;
        (sent == data.len() && received.len() == 8 * MIB && ended).then_some(())
    });
    assert!(received == pattern(2, 8 * MIB));
    assert!(server.join().unwrap() == data);
}

#[test]
fn a_receiver_on_the_host_that_waits_slows_the_guest_down_and_gets_all() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (port, server) = serve(move |mut stream| {
        wait.recv().unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received
    });
    let socket = connect(&mut guest, port, 256 << 10);
    let data = pattern(1, 24 * MIB);
    let (mut sent, mut idle) = (0, 0);
    guest.until("the guest to be stopped", |guest| {
        let socket = guest.tcp(socket);
        let count = if socket.can_send() { socket.send_slice(&data[sent..]).unwrap() } else { 0 };
        sent += count;
        idle = if count > 0 || !socket.may_send() { 0 } else { idle + 1 };
        (idle > 200).then_some(())
    });
    assert!(sent < data.len(), "someone kept {sent} bytes");
    go.send(()).unwrap();
    guest.send(socket, &data[sent..]);
    guest.tcp(socket).close();
    assert_eq!(guest.receive_all(socket), b"");
    assert!(server.join().unwrap() == data);
}

#[test]
fn a_guest_that_waits_slows_the_host_down_and_gets_all() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let (port, server) = serve(|mut stream| stream.write_all(&pattern(2, 16 * MIB)).unwrap());
    let socket = connect(&mut guest, port, 64 << 10);
    guest.until("the guest's window to close", |guest| {
        (guest.tcp(socket).recv_queue() == 64 << 10).then_some(())
    });
    for _ in 0..50 {
        guest.poll();
    }
    assert!(guest.receive_all(socket) == pattern(2, 16 * MIB));
    server.join().unwrap();
}
