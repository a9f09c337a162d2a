//! Sockets: streams and datagrams over the loopback interface, and a pair of Unix sockets.

use crate::hash::{Generator, sha256};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::thread;

pub fn exercise() {
    let data = Generator(77).bytes(200_000);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        for _ in 0..3 {
            let (stream, _) = listener.accept().unwrap();
            reverse_all(stream, |stream| stream.shutdown(Shutdown::Write));
        }
    });
    for length in [0, 1000, 200_000] {
        let mut stream = TcpStream::connect(address).unwrap();
        let answer =
            exchange(&mut stream, &data[..length], |stream| stream.shutdown(Shutdown::Write));
        println!("tcp {length}: {}", sha256(&answer));
    }
    server.join().unwrap();

    let (mut one, other) = UnixStream::pair().unwrap();
    let server = thread::spawn(|| reverse_all(other, |stream| stream.shutdown(Shutdown::Write)));
    let answer = exchange(&mut one, &data, |stream| stream.shutdown(Shutdown::Write));
    println!("unix: {}", sha256(&answer));
    server.join().unwrap();

    let (one, other) =
        (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut sum = 0;
    for datagram in data.chunks(1000) {
        one.send_to(datagram, other.local_addr().unwrap()).unwrap();
        let mut received = [0; 2000];
        let (length, sender) = other.recv_from(&mut received).unwrap();
        assert_eq!((&received[..length], sender), (datagram, one.local_addr().unwrap()));
        sum += length;
    }
    println!("udp: {sum}");
}

/// Sends back all that arrives, in reverse order.
fn reverse_all<S: Read + Write>(mut stream: S, finish: impl Fn(&S) -> std::io::Result<()>) {
    let mut data = Vec::new();
    stream.read_to_end(&mut data).unwrap();
    data.reverse();
    stream.write_all(&data).unwrap();
    finish(&stream).unwrap();
}

fn exchange<S: Read + Write>(
    stream: &mut S,
    data: &[u8],
    finish: impl Fn(&S) -> std::io::Result<()>,
) -> Vec<u8> {
    stream.write_all(data).unwrap();
    finish(stream).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.iter().rev().eq(data));
    answer
}
