//! The host's side: its sockets, and what of it a guest may reach.
use super::config::{HostAccess, Layout};
use crate::table::Key;
use crate::wire::icmp::Unreachable;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketFlags, SocketType, ipproto, socket_with, sockopt,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 512;

/// Which socket an event is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// The thread is to look for work.
    Wake,
    /// A TCP connection.
    Flow(Key),
    /// A TCP forward, by its place in the list.
    Listener(u32),
    /// A socket of the guest's datagrams.
    Datagram(Key),
    /// A UDP forward, by its place in the list.
    UdpForward(u32),
}

impl Token {
    pub fn to_bits(self) -> u64 {
        let (kind, rest) = match self {
            Self::Wake => (0, 0),
            Self::Flow(key) => (1, key.to_bits()),
            Self::Listener(index) => (2, u64::from(index)),
            Self::Datagram(key) => (3, key.to_bits()),
            Self::UdpForward(index) => (4, u64::from(index)),
        };
        kind << 56 | rest
    }

    pub fn from_bits(bits: u64) -> Self {
        match bits >> 56 {
            1 => Self::Flow(Key::from_bits(bits)),
            2 => Self::Listener(bits as u32),
            3 => Self::Datagram(Key::from_bits(bits)),
            4 => Self::UdpForward(bits as u32),
            _ => Self::Wake,
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    }
}

/// A stream that is on its way to `remote`; whether it has arrived shows when it is writable.
pub(crate) fn connect(remote: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = socket_with(family(remote.ip()), SocketType::STREAM, FLAGS, None)?;
    prepare_stream(&socket)?;
    match rustix::net::connect(&socket, &remote) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// Options of every stream: the guest's stack decides when to wait for more data, and urgent data
/// stays in its place among the other.
fn prepare_stream(socket: &OwnedFd) -> Result<(), Errno> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_oobinline(socket, true)
}

/// A socket that listens.
pub(crate) fn listen(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = socket_with(family(address.ip()), SocketType::STREAM, FLAGS, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next connection, if there is one, and who it is from.
pub(crate) fn accept(listener: &OwnedFd) -> Result<(OwnedFd, SocketAddr), Errno> {
    let (socket, peer) = rustix::net::acceptfrom_with(listener, FLAGS)?;
    prepare_stream(&socket)?;
    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok()).ok_or(Errno::CONNABORTED)?;
    Ok((socket, peer))
}

/// A socket for datagrams to anywhere.
pub(crate) fn datagrams(like: IpAddr) -> Result<OwnedFd, Errno> {
    let any: IpAddr = match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    bind_datagrams(SocketAddr::new(any, 0))
}

/// A socket for datagrams that come to `address`.
pub(crate) fn bind_datagrams(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = socket_with(family(address.ip()), SocketType::DGRAM, FLAGS, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

/// A socket for datagrams to and from `peer` only.
pub(crate) fn connect_datagrams(peer: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = socket_with(family(peer.ip()), SocketType::DGRAM, FLAGS, None)?;
    rustix::net::connect(&socket, &peer)?;
    Ok(socket)
}

/// A socket for echo requests, which Linux gives to the groups in `net.ipv4.ping_group_range`.
pub(crate) fn ping(like: IpAddr) -> Result<OwnedFd, Errno> {
    let protocol = match like {
        IpAddr::V4(_) => ipproto::ICMP,
        IpAddr::V6(_) => ipproto::ICMPV6,
    };
    socket_with(family(like), SocketType::DGRAM, FLAGS, Some(protocol))
}

/// Receives a datagram and who it is from.
pub(crate) fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<(usize, SocketAddr), Errno> {
    let flags = rustix::net::RecvFlags::DONTWAIT;
    let (length, _, from) = rustix::net::recvfrom(socket, buffer, flags)?;
    let from = from.and_then(|from| SocketAddr::try_from(from).ok());
    Ok((length, from.unwrap_or(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0))))
}

/// The address that a socket is bound to.
pub(crate) fn local_address(socket: &OwnedFd) -> Result<SocketAddr, Errno> {
    let address: SocketAddrAny = rustix::net::getsockname(socket)?;
    SocketAddr::try_from(address).map_err(|_| Errno::AFNOSUPPORT)
}

/// Ends a connection with a reset instead of the orderly way.
pub(crate) fn reset(socket: OwnedFd) {
    // Where the option is refused there is no connection that could be reset.
    let _ = sockopt::set_socket_linger(&socket, Some(std::time::Duration::ZERO));
}

/// Whether an address is one of the host's own, loopback included: only to those can be bound.
fn is_of_host(address: IpAddr) -> bool {
    bind_datagrams(SocketAddr::new(address, 0)).is_ok()
}

/// What an error of the host says to the guest.
pub(crate) fn reason(error: Errno) -> Unreachable {
    match error {
        Errno::ACCESS | Errno::PERM => Unreachable::Prohibited,
        Errno::NETUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT => Unreachable::Network,
        _ => Unreachable::Host,
    }
}

/// Which addresses of the outside a guest may reach, and how both sides name each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    pub layout: Layout,
    pub access: HostAccess,
}

impl Policy {
    /// Where on the host's side the guest's destination is.
    pub fn outside(&self, address: IpAddr) -> Result<IpAddr, Unreachable> {
        if self.layout.is_gateway(address) {
            return match self.access {
                HostAccess::Denied => Err(Unreachable::Prohibited),
                HostAccess::Allowed => Ok(match address {
                    IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                }),
            };
        }
        // What a router does not forward, and other ways to write the host's loopback. Link-local
        // addresses stay on their link (RFC 3927 §2.7, RFC 4291 §2.5.6); that keeps the guest from
        // a cloud's metadata service, which would take it for the host.
        let unroutable = match address {
            IpAddr::V4(v4) => {
                let first = v4.octets()[0];
                first == 0 || v4.is_loopback() || v4.is_link_local() || first >= 224
            }
            IpAddr::V6(v6) => {
                let embedded = v6.segments().first_chunk::<5>() == Some(&[0; 5]);
                embedded || v6.is_unicast_link_local() || v6.is_multicast()
            }
        };
        if unroutable || self.layout.is_inside(address) {
            return Err(Unreachable::Host);
        }
        if self.access == HostAccess::Denied && is_of_host(address) {
            return Err(Unreachable::Prohibited);
        }
        Ok(address)
    }

    /// How the guest sees a peer of the host's side: as it is, but for the host's loopback and for
    /// what the guest could not answer to, which are the gateway.
    pub fn inside(&self, peer: IpAddr) -> IpAddr {
        match peer {
            IpAddr::V4(v4) if v4.is_loopback() || self.layout.is_inside(peer) => {
                self.layout.gateway4.into()
            }
            IpAddr::V6(v6)
                if v6.is_loopback()
                    || v6.is_unicast_link_local()
                    || self.layout.is_inside(peer) =>
            {
                self.layout.gateway6.into()
            }
            _ => peer,
        }
    }

    /// How the guest's IPv4 side sees a client of a forward.
    pub fn client(&self, peer: SocketAddr) -> SocketAddr {
        match self.inside(peer.ip()) {
            address @ IpAddr::V4(_) => SocketAddr::new(address, peer.port()),
            IpAddr::V6(_) => SocketAddr::new(self.layout.gateway4.into(), peer.port()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::NatConfig;
    use super::*;

    fn policy(access: HostAccess) -> Policy {
        Policy { layout: Layout::new(&NatConfig::default()).unwrap(), access }
    }

    #[test]
    fn no_way_of_writing_the_hosts_loopback_reaches_it_but_the_gateway() {
        let policy = policy(HostAccess::Allowed);
        for address in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "fe80::1",
            "169.254.169.254",
            "255.255.255.255",
            "239.0.0.1",
            "ff02::1",
            "10.0.2.15",
            "10.0.2.255",
        ] {
            assert!(policy.outside(address.parse().unwrap()).is_err(), "{address}");
        }
        let gateway = policy.layout.gateway4.into();
        assert_eq!(policy.outside(gateway), Ok(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        assert_eq!(policy.outside(Ipv4Addr::new(192, 0, 2, 77).into()).map(|_| ()), Ok(()));
    }

    #[test]
    fn a_denied_host_is_not_reached_by_any_of_its_addresses() {
        let policy = policy(HostAccess::Denied);
        assert_eq!(policy.outside(policy.layout.gateway4.into()), Err(Unreachable::Prohibited));
        assert_eq!(policy.outside(policy.layout.gateway6.into()), Err(Unreachable::Prohibited));
        assert!(is_of_host(Ipv4Addr::LOCALHOST.into()));
        assert!(!is_of_host(Ipv4Addr::new(192, 0, 2, 250).into()));
    }

    #[test]
    fn tokens_survive_the_poller() {
        for bits in [0u64, 1 << 56 | 7 << 32 | 3, 2 << 56 | 1, 3 << 56 | 9, 4 << 56 | 2] {
            assert_eq!(Token::from_bits(bits).to_bits(), bits);
        }
    }
}
