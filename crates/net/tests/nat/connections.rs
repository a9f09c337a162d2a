//! How TCP connections of the guest begin and end.
use crate::guest::{GATEWAY, Guest, Kind};
use net::nat::{HostAccess, NatConfig};
use smoltcp::socket::tcp::State;
use smoltcp::wire::IpAddress;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A guest with a connection to a program of the host's, and that one's end.
fn connected() -> (Guest, smoltcp::iface::SocketHandle, TcpStream) {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let (listener, port) = listener();
    let socket = guest.connect((GATEWAY, port), 40_000, 64 << 10);
    let connected = |guest: &mut Guest| guest.tcp(socket).may_send().then_some(());
    guest.until("the connection", connected);
    let stream = listener.accept().unwrap().0;
    (guest, socket, stream)
}

fn wait_for(guest: &mut Guest, socket: smoltcp::iface::SocketHandle, state: State) {
    guest.until(&format!("{state:?}"), |guest| (guest.tcp(socket).state() == state).then_some(()));
}

fn wait_for_data(guest: &mut Guest, stream: &TcpStream, length: usize) {
    stream.set_nonblocking(true).unwrap();
    guest.until("the data to arrive", |_| {
        (stream.peek(&mut [0; 64]).is_ok_and(|count| count == length)).then_some(())
    });
}

fn wait_until_forgotten(guest: &mut Guest) {
    guest.until("the connection to be forgotten", |guest| {
        (guest.nat().census().0 == 0).then_some(())
    });
}

#[test]
fn the_guest_may_end_first_and_still_gets_the_answer() {
    let (mut guest, socket, mut stream) = connected();
    guest.send(socket, b"question");
    guest.tcp(socket).close();
    wait_for(&mut guest, socket, State::FinWait2);
    let mut question = String::new();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(guest.receive_all(socket), b"answer");
    wait_until_forgotten(&mut guest);
}

#[test]
fn the_host_may_end_first_and_still_gets_the_answer() {
    let (mut guest, socket, mut stream) = connected();
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive_all(socket), b"question");
    assert_eq!(guest.tcp(socket).state(), State::CloseWait);
    guest.send(socket, b"answer");
    guest.tcp(socket).close();
    wait_for(&mut guest, socket, State::Closed);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    wait_until_forgotten(&mut guest);
}

#[test]
fn a_reset_by_the_guest_resets_the_hosts_side() {
    let (mut guest, socket, mut stream) = connected();
    guest.tcp(socket).abort();
    wait_until_forgotten(&mut guest);
    let error = stream.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_reset_by_the_host_resets_the_guest() {
    let (mut guest, socket, stream) = connected();
    guest.send(socket, b"never read");
    wait_for_data(&mut guest, &stream, 10);
    // Closing with unread data resets.
    drop(stream);
    wait_for(&mut guest, socket, State::Closed);
    wait_until_forgotten(&mut guest);
}

#[test]
fn what_a_server_said_before_it_hung_up_on_an_upload_arrives() {
    let (mut guest, socket, mut stream) = connected();
    guest.send(socket, b"upload");
    wait_for_data(&mut guest, &stream, 6);
    stream.write_all(b"413 too large").unwrap();
    drop(stream);
    let mut answer = Vec::new();
    guest.until("the answer", |guest| {
        let socket = guest.tcp(socket);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).unwrap();
        }
        (answer.len() == 13).then_some(())
    });
    assert_eq!(answer, b"413 too large");
}

#[test]
fn a_port_where_nobody_listens_is_refused_at_once() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let port = listener().1;
    let socket = guest.connect((GATEWAY, port), 40_000, 4096);
    wait_for(&mut guest, socket, State::Closed);
    wait_until_forgotten(&mut guest);
}

#[test]
fn a_denied_host_is_not_reached_through_the_gateway() {
    let config = NatConfig { host_access: HostAccess::Denied, ..NatConfig::default() };
    let mut guest = Guest::new(&config, Kind::default());
    let (listener, port) = listener();
    listener.set_nonblocking(true).unwrap();
    guest.connect((GATEWAY, port), 40_000, 4096);
    for _ in 0..20 {
        guest.poll();
    }
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(guest.nat().census(), (0, 0));
}

#[test]
fn the_loopback_network_itself_is_no_way_to_the_host() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let (listener, port) = listener();
    listener.set_nonblocking(true).unwrap();
    // smoltcp routes it to the gateway as anything else.
    guest.connect((IpAddress::v4(127, 0, 0, 1), port), 40_000, 4096);
    for _ in 0..20 {
        guest.poll();
    }
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn many_connections_at_once_each_get_their_own_answer() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let (listener, port) = listener();
    let server = std::thread::spawn(move || {
        let mut streams: Vec<TcpStream> = (0..200).map(|_| listener.accept().unwrap().0).collect();
        for stream in &mut streams {
            let mut question = [0; 8];
            stream.read_exact(&mut question).unwrap();
            stream.write_all(&question).unwrap();
        }
    });
    let sockets: Vec<_> =
        (0..200u16).map(|n| guest.connect((GATEWAY, port), 20_000 + n, 2048)).collect();
    let mut asked = vec![false; sockets.len()];
    guest.until("all to be connected", |guest| {
        for (n, socket) in sockets.iter().enumerate() {
            if !asked[n] && guest.tcp(*socket).can_send() {
                let question = format!("{n:08}");
                assert_eq!(guest.tcp(*socket).send_slice(question.as_bytes()), Ok(8));
                asked[n] = true;
            }
        }
        asked.iter().all(|asked| *asked).then_some(())
    });
    for (n, socket) in sockets.iter().enumerate() {
        assert_eq!(guest.receive_all(*socket), format!("{n:08}").as_bytes());
        guest.tcp(*socket).close();
    }
    server.join().unwrap();
    wait_until_forgotten(&mut guest);
}

#[test]
fn a_machine_with_resets_and_reuses_of_the_same_port_is_served_each_time() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let (listener, port) = listener();
    for round in 0..50 {
        let socket = guest.connect((GATEWAY, port), 40_000, 2048);
        guest.until("the connection", |guest| guest.tcp(socket).may_send().then_some(()));
        let stream = listener.accept().unwrap().0;
        if round % 2 == 0 {
            // As when the guest is switched off.
            guest.sockets.remove(socket);
        } else {
            guest.tcp(socket).abort();
            guest.poll();
            guest.sockets.remove(socket);
        }
        drop(stream);
    }
}
