//! A machine's network cards.
use crate::config::NicConfig;
use device::{MapError, Wire as _, Wiring};
use virtio::net::NetConfig;

/// Pairs of queues beyond these bring nothing: a pair for each vCPU spares their drivers a lock.
const MAX_PAIRS: u16 = 8;
/// The largest IP packet that is not segmented, as on any Ethernet.
const MTU: u16 = 1500;

/// Wires the cards, `nic0` first.
///
/// # Errors
/// The PCI bus is full.
pub fn wire(wiring: &mut Wiring, nics: &[NicConfig], vcpus: u32) -> Result<(), MapError> {
    let pairs = u16::try_from(vcpus).unwrap_or(MAX_PAIRS).clamp(1, MAX_PAIRS);
    for (number, config) in nics.iter().enumerate() {
        let name = format!("nic{number}");
        let (network, mac) = (config.network.clone(), config.mac);
        NetConfig { name, network, mac, mtu: MTU, pairs }.wire(wiring)?;
    }
    Ok(())
}
