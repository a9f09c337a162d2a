//! Port forwards: `[ADDRESS:]HOST-PORT:GUEST-PORT[/tcp|/udp]`.
use std::fmt;
use std::net::{AddrParseError, IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::str::FromStr;

/// Which protocol a forward is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to one of the guest.
///
/// Written `[ADDRESS:]HOST-PORT:GUEST-PORT[/tcp|/udp]`, an IPv6 address in brackets. Without an
/// address the host listens on 127.0.0.1 only: nobody else's machine reaches the guest unless it
/// is asked for, as with `0.0.0.0:8080:80`. Without a protocol it is TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostForward {
    /// Where the host listens. Port 0 has the host choose a free one
    /// ([`crate::nat::Nat::forwards`] says which).
    pub bind: SocketAddr,
    /// Where it leads to.
    pub guest_port: NonZeroU16,
    /// For which protocol.
    pub protocol: Protocol,
}

/// Why a forward cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// Not of the form.
    #[error(
        "{0:?} is no port forward; write [ADDRESS:]HOST-PORT:GUEST-PORT[/tcp|/udp], as in 8080:80 \
         or 127.0.0.1:2222:22/tcp"
    )]
    Form(String),
    /// A port is not a number in its range.
    #[error("{forward:?}: {port:?} is no port; use {range}")]
    Port {
        /// The forward.
        forward: String,
        /// What stands where a port should.
        port: String,
        /// What could.
        range: &'static str,
    },
    /// Not a protocol that can be forwarded.
    #[error("{forward:?}: {protocol:?} cannot be forwarded; use tcp or udp")]
    Protocol {
        /// The forward.
        forward: String,
        /// What stands where the protocol should.
        protocol: String,
    },
    /// The address is none.
    #[error(
        "{forward:?}: {address:?} is no address to listen on; use one of this host's, IPv6 in \
         brackets, or leave it out for 127.0.0.1"
    )]
    Address {
        /// The forward.
        forward: String,
        /// What stands where the address should.
        address: String,
        /// Why it is none.
        source: AddrParseError,
    },
}

impl FromStr for HostForward {
    type Err = ForwardError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let forward = || text.to_owned();
        let (ports, protocol) = match text.split_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some((_, other)) => {
                let protocol = other.to_owned();
                return Err(ForwardError::Protocol { forward: forward(), protocol });
            }
        };
        let form = || ForwardError::Form(forward());
        let (rest, guest_port) = ports.rsplit_once(':').ok_or_else(form)?;
        let (address, host_port) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, port)) => (Some(address), port),
        };
        let port = |port: &str, range| ForwardError::Port {
            forward: forward(),
            port: port.to_owned(),
            range,
        };
        let host_port = host_port
            .parse::<u16>()
            .map_err(|_| port(host_port, "0 to 65535, where 0 is any free one"))?;
        let guest_port =
            guest_port.parse::<NonZeroU16>().map_err(|_| port(guest_port, "1 to 65535"))?;
        let address = match address {
            None => Ipv4Addr::LOCALHOST.into(),
            Some(address) => parse_address(address).map_err(|source| {
                let address = address.to_owned();
                ForwardError::Address { forward: forward(), address, source }
            })?,
        };
        Ok(Self { bind: SocketAddr::new(address, host_port), guest_port, protocol })
    }
}

/// An IPv4 address, or an IPv6 address in brackets.
fn parse_address(text: &str) -> Result<IpAddr, AddrParseError> {
    match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        Some(address) => address.parse().map(IpAddr::V6),
        None => text.parse().map(IpAddr::V4),
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for HostForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.bind, self.guest_port, self.protocol)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, String> {
        let forward = text.parse::<HostForward>();
        forward.map(|forward| forward.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_forms_of_other_tools_are_read() {
        assert_eq!(parse("8080:80").unwrap(), "127.0.0.1:8080:80/tcp");
        assert_eq!(parse("127.0.0.1:2222:22/tcp").unwrap(), "127.0.0.1:2222:22/tcp");
        assert_eq!(parse("[::1]:53:53/udp").unwrap(), "[::1]:53:53/udp");
        assert_eq!(parse("0.0.0.0:0:65535/udp").unwrap(), "0.0.0.0:0:65535/udp");
    }

    #[test]
    fn what_is_written_is_read_again() {
        let written = parse("[fe80::1]:1:2").unwrap();
        assert_eq!(parse(&written).unwrap(), written);
    }

    #[test]
    fn a_mistake_is_named_with_its_fix() {
        for (text, fix) in [
            ("80", "as in 8080:80"),
            ("", "as in 8080:80"),
            ("8080:0", "use 1 to 65535"),
            ("8080:65536", "\"65536\" is no port"),
            ("-1:80", "use 0 to 65535"),
            ("8080:80/sctp", "use tcp or udp"),
            ("8080:80/", "use tcp or udp"),
            ("localhost:8080:80", "use one of this host's"),
            ("::1:8080:80", "IPv6 in brackets"),
            ("[127.0.0.1]:1:1", "no address"),
            (":8080:80", "leave it out"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(fix), "{text}: {message}");
        }
    }
}
