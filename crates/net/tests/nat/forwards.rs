//! Ports of the host that lead to the guest.
use crate::guest::{Guest, Kind};
use net::nat::{Nat, NatConfig, NatError};
use net::{HostForward, Protocol};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use smoltcp::socket::udp;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;

fn config(forwards: &[&str]) -> NatConfig {
    let forwards = forwards.iter().map(|forward| forward.parse().unwrap()).collect();
    NatConfig { forwards, ..NatConfig::default() }
}

fn guest(forwards: &[&str]) -> (Guest, Vec<SocketAddr>) {
    let guest = Guest::new(&config(forwards), Kind::default());
    let bound = guest.nat().forwards().iter().map(|forward| forward.bind).collect();
    (guest, bound)
}

/// Serves connections at port 80 of the guest, each of which gets its question back, until the
/// client is done.
fn echo_until(guest: &mut Guest, backlog: usize, done: &mpsc::Receiver<()>) {
    let mut listening: Vec<SocketHandle> = Vec::new();
    for _ in 0..backlog {
        let socket = guest.tcp_socket(4096);
        guest.tcp(socket).listen(80).unwrap();
        listening.push(socket);
    }
    guest.until("the client to be done", |guest| {
        for socket in &listening {
            let socket = guest.tcp(*socket);
            if socket.can_recv() && socket.can_send() {
                let data = socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap();
                assert_eq!(socket.send_slice(&data), Ok(data.len()));
            }
            if socket.state() == State::CloseWait {
                socket.close();
            }
            if !socket.is_open() || socket.state() == State::TimeWait {
                socket.abort();
                socket.listen(80).unwrap();
            }
        }
        done.try_recv().ok()
    });
}

#[test]
fn two_thousand_connections_one_after_the_other_are_all_served() {
    let (mut guest, bound) = guest(&["127.0.0.1:0:80"]);
    let (done, wait) = mpsc::channel();
    let client = std::thread::spawn(move || {
        for n in 0..2000u32 {
            let mut stream = TcpStream::connect(bound[0]).unwrap();
            stream.write_all(&n.to_be_bytes()).unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("number {n}: {error}"));
            assert_eq!(answer, n.to_be_bytes());
        }
        done.send(()).unwrap();
    });
    echo_until(&mut guest, 8, &wait);
    client.join().unwrap();
}

#[test]
fn a_client_that_comes_before_the_guest_is_up_is_served_when_it_is() {
    let (mut guest, bound) = guest(&["127.0.0.1:0:80", "[::1]:0:80"]);
    let (done, wait) = mpsc::channel();
    let client = std::thread::spawn(move || {
        for address in bound {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"knock").unwrap();
            let mut answer = [0; 5];
            stream.read_exact(&mut answer).unwrap();
        }
        done.send(()).unwrap();
    });
    guest.until("the client to be accepted", |guest| (guest.nat().census().0 == 1).then_some(()));
    echo_until(&mut guest, 2, &wait);
    client.join().unwrap();
}

#[test]
fn a_port_where_the_guest_does_not_listen_is_reset() {
    let (mut guest, bound) = guest(&["127.0.0.1:0:81"]);
    let mut stream = TcpStream::connect(bound[0]).unwrap();
    guest.until("the guest's reset", |guest| {
        stream.set_nonblocking(true).unwrap();
        match stream.read(&mut [0; 1]) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            result => {
                assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
                assert_eq!(guest.nat().census().0, 0);
                Some(())
            }
        }
    });
}

#[test]
fn datagrams_reach_the_guest_and_its_answers_their_senders() {
    let (mut guest, bound) = guest(&["127.0.0.1:0:53/udp"]);
    let ring = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 65_536]);
    let mut socket = udp::Socket::new(ring(), ring());
    socket.bind(53).unwrap();
    let handle = guest.sockets.add(socket);
    let clients: Vec<UdpSocket> = (0..5).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let mut answered = vec![false; clients.len()];
    for client in &clients {
        client.set_nonblocking(true).unwrap();
    }
    guest.until("answers to all", |guest| {
        for (n, client) in clients.iter().enumerate() {
            if !answered[n] {
                // The first ones are lost while the guest's address is not known.
                client.send_to(format!("from {n}").as_bytes(), bound[0]).unwrap();
            }
            let mut answer = [0; 32];
            if let Ok((length, from)) = client.recv_from(&mut answer) {
                assert_eq!(from, bound[0]);
                assert_eq!(answer[..length], *format!("from {n}").as_bytes());
                answered[n] = true;
            }
        }
        let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
        while let Ok((data, from)) = socket.recv() {
            let data = data.to_vec();
            socket.send_slice(&data, from.endpoint).unwrap();
        }
        answered.iter().all(|answered| *answered).then_some(())
    });
}

#[test]
fn a_port_in_use_is_named_with_the_way_out() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let bind = taken.local_addr().unwrap();
    let guest_port = 80.try_into().unwrap();
    let forward = HostForward { bind, guest_port, protocol: Protocol::Tcp };
    let config = NatConfig { forwards: vec![forward], ..NatConfig::default() };
    let error = Nat::new(&config).err().unwrap();
    assert!(matches!(error, NatError::PortInUse { .. }));
    let message = error.to_string();
    assert!(message.contains(&format!("port {} of 127.0.0.1 is in use", bind.port())), "{message}");
    assert!(message.contains("choose another port"), "{message}");
    let error = Nat::new(&config_at("192.0.2.251:8080:80")).err().unwrap().to_string();
    assert!(error.contains("192.0.2.251 is no address of this host"), "{error}");
}

fn config_at(forward: &str) -> NatConfig {
    config(&[forward])
}
