//! What a NAT is configured with, and the addresses that its guest sees.
use super::NatError;
use crate::forward::HostForward;
use crate::wire::Mac;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

/// Bytes of an IP packet on the virtual link, larger ones are only handed over with
/// [`crate::Segmentation`].
pub(crate) const MTU: usize = 1500;

/// Whether the guest reaches the host itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostAccess {
    /// As in QEMU's user networking: the gateway's address stands for the host's loopback, so that
    /// a service that listens on 127.0.0.1 (or ::1) is found at 10.0.2.2 (or the gateway's IPv6
    /// address); the host's other addresses are reached as any other machine.
    #[default]
    Allowed,
    /// Neither through the gateway's address nor through any other address of the host. What the
    /// gateway itself offers (DHCP, DNS, echo) stays.
    Denied,
}

/// Configuration of a [`super::Nat`].
#[derive(Clone, Debug)]
pub struct NatConfig {
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<HostForward>,
    /// Whether the guest reaches the host itself.
    pub host_access: HostAccess,
    /// The name that DHCP tells the guest: a label of letters, digits and hyphens, at most 63.
    pub hostname: Option<String>,
    /// The guest's IPv4 network, a /24; its last byte is zero. `.2` is the gateway, `.3` the DNS
    /// server, `.15` the guest, as in QEMU's user networking.
    pub ipv4: Ipv4Addr,
    /// The guest's IPv6 prefix, a /64 whose last eight bytes are zero. `::2` is the gateway, `::3`
    /// the DNS server, the guest chooses its own.
    pub ipv6: Ipv6Addr,
    /// Where the host's resolvers are listed, read anew when the file changes.
    pub resolv_conf: PathBuf,
}

impl Default for NatConfig {
    fn default() -> Self {
        Self {
            forwards: Vec::new(),
            host_access: HostAccess::default(),
            hostname: None,
            ipv4: Ipv4Addr::new(10, 0, 2, 0),
            // A unique local prefix (RFC 4193). It need not be unique, as nothing routes to it;
            // it should only not be one that the host's own network has.
            ipv6: Ipv6Addr::new(0xfd62, 0x6976, 0x6973, 0, 0, 0, 0, 0),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
        }
    }
}

/// The addresses that the guest sees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// The gateway's; the DNS server has the same.
    pub mac: Mac,
    pub network4: Ipv4Addr,
    pub gateway4: Ipv4Addr,
    pub dns4: Ipv4Addr,
    pub prefix6: Ipv6Addr,
    pub gateway6: Ipv6Addr,
    pub dns6: Ipv6Addr,
    /// The gateway's link-local address, from which router advertisements come.
    pub link_local: Ipv6Addr,
}

/// The last byte of the first guest's IPv4 address.
const FIRST_GUEST: u8 = 15;
/// Guests (addresses on the same card: a bridge in the guest) that get a lease.
pub(crate) const MOST_LEASES: u8 = 64;

impl Layout {
    /// From a configuration, checked.
    pub fn new(config: &NatConfig) -> Result<Self, NatError> {
        let [a, b, c, d] = config.ipv4.octets();
        let first_allowed = !matches!(a, 0 | 127 | 224..) && !config.ipv4.is_link_local();
        if d != 0 || !first_allowed {
            return Err(NatError::Ipv4Network(config.ipv4));
        }
        let [prefix @ .., _, _, _, _] = config.ipv6.segments();
        let zero = config.ipv6.segments().get(4..) == Some(&[0; 4]);
        if !zero || config.ipv6.is_multicast() || matches!(prefix[0], 0 | 0xfe80..=0xfebf) {
            return Err(NatError::Ipv6Prefix(config.ipv6));
        }
        let host6 = |host| {
            let [p, q, r, s] = prefix;
            Ipv6Addr::new(p, q, r, s, 0, 0, 0, host)
        };
        Ok(Self {
            // Locally administered, and like QEMU's: a guest's saved settings stay valid.
            mac: Mac([0x52, 0x55, a, b, c, 2]),
            network4: config.ipv4,
            gateway4: Ipv4Addr::new(a, b, c, 2),
            dns4: Ipv4Addr::new(a, b, c, 3),
            prefix6: config.ipv6,
            gateway6: host6(2),
            dns6: host6(3),
            link_local: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
        })
    }

    /// The address of the lease with this number.
    pub fn guest4(&self, lease: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.network4.octets();
        Ipv4Addr::new(a, b, c, FIRST_GUEST.saturating_add(lease.min(MOST_LEASES)))
    }

    pub fn is_inside(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => {
                address.octets().first_chunk::<3>() == self.network4.octets().first_chunk()
            }
            IpAddr::V6(address) => {
                address.octets().first_chunk::<8>() == self.prefix6.octets().first_chunk()
            }
        }
    }

    /// Whether it is one of ours that stands for the gateway.
    pub fn is_gateway(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address == self.gateway4,
            IpAddr::V6(address) => address == self.gateway6 || address == self.link_local,
        }
    }

    pub fn is_dns(&self, address: IpAddr) -> bool {
        address == IpAddr::V4(self.dns4) || address == IpAddr::V6(self.dns6)
    }

    /// Whether a guest may use it as its own.
    pub fn may_be_guest(&self, address: IpAddr) -> bool {
        let own = self.is_gateway(address) || self.is_dns(address);
        !own && match address {
            IpAddr::V4(v4) => self.is_inside(address) && !matches!(v4.octets()[3], 0 | 255),
            IpAddr::V6(v6) => self.is_inside(address) || v6.is_unicast_link_local(),
        }
    }
}

/// How many sockets of the host a guest may have open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// TCP connections. One more is refused.
    pub flows: usize,
    /// Sockets of datagrams. One more takes the place of that which was not used for longest.
    pub datagrams: usize,
}

impl Limits {
    /// As many as the host's limit on the process's files permits, with a fifth left for the
    /// machine itself: no guest keeps its own machine from opening a file.
    pub fn of_process() -> Self {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        Self::with_files(files.unwrap_or(u64::MAX))
    }

    fn with_files(files: u64) -> Self {
        let share = |tenths: u64, most: usize| {
            usize::try_from(files / 10 * tenths).unwrap_or(usize::MAX).clamp(1, most)
        };
        Self { flows: share(6, 4096), datagrams: share(2, 1024) }
    }
}

/// Whether a name may be told by DHCP (RFC 1123 §2.1).
pub(crate) fn is_hostname(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_sockets_leave_files_for_the_machine() {
        for (files, flows, datagrams) in
            [(1024, 612, 204), (20_000, 4096, 1024), (u64::MAX, 4096, 1024), (3, 1, 1)]
        {
            let limits = Limits::with_files(files);
            assert_eq!((limits.flows, limits.datagrams), (flows, datagrams), "of {files}");
        }
    }

    #[test]
    fn networks_that_cannot_be_the_guests_are_refused() {
        for ipv4 in ["10.0.2.1", "127.0.0.0", "0.0.0.0", "224.0.0.0", "169.254.7.0"] {
            let config = NatConfig { ipv4: ipv4.parse().unwrap(), ..NatConfig::default() };
            assert!(matches!(Layout::new(&config), Err(NatError::Ipv4Network(_))), "{ipv4}");
        }
        for ipv6 in ["fd00::1", "fe80::", "ff02::", "::"] {
            let config = NatConfig { ipv6: ipv6.parse().unwrap(), ..NatConfig::default() };
            assert!(matches!(Layout::new(&config), Err(NatError::Ipv6Prefix(_))), "{ipv6}");
        }
        let layout = Layout::new(&NatConfig::default()).unwrap();
        assert_eq!(layout.guest4(0), Ipv4Addr::new(10, 0, 2, 15));
        assert!(!layout.may_be_guest(layout.gateway4.into()));
    }
}
