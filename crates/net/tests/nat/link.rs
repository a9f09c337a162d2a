//! What the guest learns from the link: its addresses, its router.
use crate::guest::{GATEWAY, Guest, Kind};
use net::nat::NatConfig;
use smoltcp::socket::{dhcpv4, icmp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, Ipv4Address};
use std::io::{Read, Write};
use std::net::TcpListener;

#[test]
fn dhcp_gives_address_router_and_dns() {
    let config = NatConfig { hostname: Some("web".to_owned()), ..NatConfig::default() };
    let mut guest = Guest::without_address(&config, Kind::default());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let (address, router, dns) = guest.until("a lease", |guest| {
        match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()? {
            dhcpv4::Event::Configured(lease) => {
                Some((lease.address, lease.router, lease.dns_servers.to_vec()))
            }
            dhcpv4::Event::Deconfigured => None,
        }
    });
    assert_eq!(address.to_string(), "10.0.2.15/24");
    assert_eq!(router, Some(Ipv4Address::new(10, 0, 2, 2)));
    assert_eq!(dns, [Ipv4Address::new(10, 0, 2, 3)]);
}

#[test]
fn the_gateway_answers_an_echo_request() {
    let mut guest = Guest::new(&NatConfig::default(), Kind::default());
    let ring = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut socket = icmp::Socket::new(ring(), ring());
    socket.bind(icmp::Endpoint::Ident(0x1234)).unwrap();
    let handle = guest.sockets.add(socket);
    let request = Icmpv4Repr::EchoRequest { ident: 0x1234, seq_no: 7, data: b"are you there?" };
    let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
    let room = socket.send(request.buffer_len(), GATEWAY).unwrap();
    let checksums = smoltcp::phy::ChecksumCapabilities::default();
    request.emit(&mut Icmpv4Packet::new_unchecked(room), &checksums);
    guest.until("the reply", |guest| {
        let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
        let (reply, from) = socket.recv().ok()?;
        assert_eq!(from, GATEWAY);
        let packet = Icmpv4Packet::new_checked(reply).unwrap();
        let reply = Icmpv4Repr::parse(&packet, &checksums).unwrap();
        assert_eq!(
            reply,
            Icmpv4Repr::EchoReply { ident: 0x1234, seq_no: 7, data: b"are you there?" }
        );
        Some(())
    });
}

#[test]
fn router_advertisements_give_an_ipv6_address_that_reaches_the_host() {
    for large in [false, true] {
        let mut guest = Guest::without_address(
            &NatConfig::default(),
            Kind { large, slaac: true, ..Kind::default() },
        );
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let prefix = NatConfig::default().ipv6.segments();
        guest.until("an address from the prefix", |guest| {
            let address = guest.interface.ip_addrs().iter().find_map(|cidr| match cidr.address() {
                IpAddress::Ipv6(address) => Some(address.segments()),
                IpAddress::Ipv4(_) => None,
            });
            let mine = guest.interface.ip_addrs().iter().any(|cidr| match cidr.address() {
                IpAddress::Ipv6(address) => address.segments()[..4] == prefix[..4],
                IpAddress::Ipv4(_) => false,
            });
            (mine && address.is_some()).then_some(())
        });
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut question = Vec::new();
            stream.read_to_end(&mut question).unwrap();
            stream.write_all(&question).unwrap();
        });
        let gateway = IpAddress::v6(0xfd62, 0x6976, 0x6973, 0, 0, 0, 0, 2);
        let socket = guest.connect((gateway, port), 40_000, 128 << 10);
        let data: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        guest.send(socket, &data);
        guest.tcp(socket).close();
        assert!(guest.receive_all(socket) == data);
        server.join().unwrap();
    }
}
