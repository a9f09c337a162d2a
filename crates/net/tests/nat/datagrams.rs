//! UDP, DNS and echo requests of the guest.
use crate::guest::{DNS, GATEWAY, Guest, Kind};
use net::nat::NatConfig;
use net::{Network, Offload, Packet};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::udp;
use smoltcp::wire::IpAddress;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;

fn bind(guest: &mut Guest, port: u16) -> SocketHandle {
    let ring = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 131_072]);
    let mut socket = udp::Socket::new(ring(), ring());
    socket.bind(port).unwrap();
    guest.sockets.add(socket)
}

fn send(guest: &mut Guest, socket: SocketHandle, data: &[u8], to: (IpAddress, u16)) {
    guest.sockets.get_mut::<udp::Socket<'_>>(socket).send_slice(data, to).unwrap();
}

fn receive(guest: &mut Guest, socket: SocketHandle) -> (Vec<u8>, (IpAddress, u16)) {
    guest.until("a datagram", |guest| {
        let (data, from) = guest.sockets.get_mut::<udp::Socket<'_>>(socket).recv().ok()?;
        Some((data.to_vec(), (from.endpoint.addr, from.endpoint.port)))
    })
}

#[test]
fn datagrams_go_to_the_host_and_back() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let socket = bind(&mut guest, 5000);
    for length in [0usize, 1, 1000, 1472] {
        let data: Vec<u8> = (0..length).map(|n| n as u8).collect();
        send(&mut guest, socket, &data, (GATEWAY, port));
        server.set_nonblocking(true).unwrap();
        let from = guest.until("the datagram at the host", |_| {
            let mut received = [0; 2000];
            let (count, from) = server.recv_from(&mut received).ok()?;
            assert_eq!(received[..count], data);
            Some(from)
        });
        server.send_to(&data, from).unwrap();
        let (answer, from) = receive(&mut guest, socket);
        assert!(answer == data);
        assert_eq!(from, (GATEWAY, port));
    }
    assert_eq!(guest.nat().census(), (0, 1), "one socket for one port of the guest");
}

/// A fragment of a datagram from the guest's port 5000 to the gateway's `port`.
fn fragment(port: u16, offset: usize, more: bool, data: &[u8], total: usize) -> Vec<u8> {
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2];
    frame.extend(crate::guest::MAC);
    frame.extend([8, 0, 0x45, 0]);
    let head = if offset == 0 { 8 } else { 0 };
    frame.extend(((20 + head + data.len()) as u16).to_be_bytes());
    frame.extend([0, 9]);
    frame.extend((((offset + 8 - head) / 8) as u16 | u16::from(more) << 13).to_be_bytes());
    frame.extend([64, 17, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    if offset == 0 {
        frame.extend(5000u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend(((8 + total) as u16).to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.extend(data);
    frame
}

#[test]
fn what_exceeds_the_link_goes_in_fragments_both_ways() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let data: Vec<u8> = (0..4000u32).map(|n| (n % 251) as u8).collect();
    // The last comes first.
    for (from, to) in [(2600, 4000), (0, 1400), (1400, 2600)] {
        let frame = fragment(port, from, to < 4000, &data[from..to], 4000);
        guest.nat().transmit(Packet { frame: &frame, offload: Offload::default() });
    }
    let mut received = [0; 5000];
    let (length, from) = server.recv_from(&mut received).unwrap();
    assert!(received[..length] == data);
    server.send_to(&data, from).unwrap();
    let mut answer = vec![0; 4008];
    let mut missing = answer.len();
    guest.until("all fragments", |guest| {
        while let Some(frame) = guest.take_frame() {
            if frame[23] == 17 {
                assert!(frame.len() <= 1514);
                let offset = usize::from(u16::from_be_bytes([frame[20], frame[21]]) & 0x1fff) * 8;
                let part = &frame[34..];
                answer[offset..offset + part.len()].copy_from_slice(part);
                missing -= part.len();
            }
        }
        (missing == 0).then_some(())
    });
    assert!(answer[8..] == data);
}

/// A resolver that answers each query with its own bytes and a mark, over UDP and TCP.
fn fake_resolver(mark: u8) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut query) {
            let mut answer = query[..length].to_vec();
            answer[2] |= 0x80;
            answer.push(mark);
            // A forgery with another number comes first.
            let mut forged = answer.clone();
            forged[0] ^= 0xff;
            udp.send_to(&forged, from).unwrap();
            udp.send_to(&answer, from).unwrap();
        }
    });
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut query = Vec::new();
            let mut stream = stream.unwrap();
            stream.read_to_end(&mut query).unwrap();
            query.push(mark);
            stream.write_all(&query).unwrap();
        }
    });
    address
}

fn resolv_conf(folder: &tempfile::TempDir, servers: &[SocketAddr]) -> PathBuf {
    let path = folder.path().join("resolv.conf");
    let line = |server: &SocketAddr| format!("nameserver [{}]:{}\n", server.ip(), server.port());
    std::fs::write(&path, servers.iter().map(line).collect::<String>()).unwrap();
    path
}

const QUERY: &[u8] =
    b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x02de\x00\x00\x01\x00\x01";

#[test]
fn dns_goes_to_the_hosts_resolver_and_follows_a_changed_resolv_conf() {
    let folder = tempfile::tempdir().unwrap();
    let path = resolv_conf(&folder, &[fake_resolver(1)]);
    let config = NatConfig { resolv_conf: path, ..NatConfig::default() };
    let mut guest = Guest::new(&config, Kind::default());
    let socket = bind(&mut guest, 5000);
    let mut ask = |mark: u8| {
        send(&mut guest, socket, QUERY, (DNS, 53));
        let (answer, from) = receive(&mut guest, socket);
        assert_eq!(from, (DNS, 53));
        assert_eq!(answer[..2], QUERY[..2]);
        assert_eq!(answer.last(), Some(&mark));
    };
    ask(1);
    resolv_conf(&folder, &[fake_resolver(2), fake_resolver(3)]);
    ask(2);
    let socket = guest.connect((DNS, 53), 40_000, 4096);
    guest.send(socket, b"over tcp");
    guest.tcp(socket).close();
    assert_eq!(guest.receive_all(socket), b"over tcp\x02");
}

#[test]
fn a_resolver_that_is_gone_is_passed_over_for_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let path = resolv_conf(&folder, &[gone, fake_resolver(9)]);
    let config = NatConfig { resolv_conf: path, ..NatConfig::default() };
    let mut guest = Guest::new(&config, Kind::default());
    let socket = bind(&mut guest, 5000);
    send(&mut guest, socket, QUERY, (DNS, 53));
    assert_eq!(receive(&mut guest, socket).0.last(), Some(&9));
    let socket = guest.connect((DNS, 53), 40_000, 4096);
    guest.send(socket, b"x");
    guest.tcp(socket).close();
    assert_eq!(guest.receive_all(socket), b"x\x09");
}

#[test]
fn a_query_that_no_resolver_answers_fails_instead_of_hanging() {
    let folder = tempfile::tempdir().unwrap();
    let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = NatConfig { resolv_conf: resolv_conf(&folder, &[gone]), ..NatConfig::default() };
    let mut guest = Guest::new(&config, Kind::default());
    let socket = bind(&mut guest, 5000);
    send(&mut guest, socket, QUERY, (DNS, 53));
    let (answer, _) = receive(&mut guest, socket);
    assert_eq!(answer[3] & 15, 2, "server failure");
    assert_eq!(answer[12..], QUERY[12..]);
}

#[test]
fn a_guest_with_ten_thousand_ports_does_not_get_as_many_sockets() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let socket = bind(&mut guest, 1);
    send(&mut guest, socket, b"x", (GATEWAY, port));
    guest.until("the first datagram", |guest| (guest.nat().census().1 == 1).then_some(()));
    for n in 0..10_000u16 {
        let handle = bind_small(&mut guest, 2000 + n);
        send(&mut guest, handle, b"x", (GATEWAY, port));
        guest.step();
        guest.sockets.remove(handle);
    }
    // Two tenths of a limit of 1024 files, which is the least that systems have.
    guest.until("the last one", |guest| (guest.nat().census().1 >= 200).then_some(()));
    assert!(guest.nat().census().1 <= 1024, "{:?}", guest.nat().census());
}

fn bind_small(guest: &mut Guest, port: u16) -> SocketHandle {
    let ring = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 1], vec![0; 64]);
    let mut socket = udp::Socket::new(ring(), ring());
    socket.bind(port).unwrap();
    guest.sockets.add(socket)
}

/// Whether this process may open sockets for echo requests (icmp(7)).
fn may_ping() -> bool {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap();
    let range: Vec<u32> = range.split_whitespace().map(|bound| bound.parse().unwrap()).collect();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let groups = status
        .lines()
        .filter(|line| line.starts_with("G"))
        .flat_map(|line| line.split_whitespace().filter_map(|group| group.parse::<u32>().ok()));
    groups.into_iter().any(|group| (range[0]..=range[1]).contains(&group))
}

#[test]
fn an_echo_request_to_the_outside_is_passed_on_or_refused_with_the_reason() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    // An address of this host that is not its loopback, if it has one.
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let outside = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr());
    let has_outside = outside.is_ok();
    let outside = outside.map_or("192.0.2.1".to_owned(), |address| address.ip().to_string());
    let target: std::net::Ipv4Addr = outside.parse().unwrap();
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2];
    frame.extend(crate::guest::MAC);
    frame.extend([8, 0, 0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 1, 0, 0, 10, 0, 2, 15]);
    frame.extend(target.octets());
    frame.extend([8, 0, 0, 0, 0x77, 0x88, 0, 5, b'p', b'i', b'n', b'g']);
    guest.nat().transmit(Packet { frame: &frame, offload: Offload::default() });
    let answer = guest.until("an answer", |guest| {
        guest.take_frame().filter(|frame| frame[12..14] == [8, 0] && frame[23] == 1)
    });
    assert_eq!(answer[26..30], target.octets());
    if may_ping() && has_outside {
        assert_eq!(answer[34], 0, "a reply");
        assert_eq!(answer[38..46], [0x77, 0x88, 0, 5, b'p', b'i', b'n', b'g']);
    } else {
        assert_eq!(answer[34], 3, "unreachable");
        assert_eq!(answer[42 + 16..42 + 20], target.octets(), "it quotes the request");
    }
}
