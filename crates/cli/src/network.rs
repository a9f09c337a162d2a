//! `--network` and `--publish`: setting the network up.
use crate::args::Run;
use ::net::nat::{Nat, NatConfig, NatError};
use ::net::switch::{Switch, SwitchError};
use ::net::tap::{Tap, TapError};
use ::net::{Network, NetworkChoice};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use vmm::NicConfig;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The NAT cannot be set up.
    #[error("--network nat")]
    Nat(#[from] NatError),
    /// The tap device cannot be used.
    #[error("--network tap")]
    Tap(#[from] TapError),
    /// The switch cannot be joined.
    #[error("--network switch")]
    Switch(#[from] SwitchError),
    /// Ports of a machine without a NAT.
    #[error("--publish: the guest has no network to publish from; give it --network nat")]
    NothingToPublish,
    /// Ports for two.
    #[error("--network nat: once is enough")]
    TwoNats,
}

impl NetworkError {
    /// Whether the user's input is at fault.
    pub fn is_bad_input(&self) -> bool {
        !matches!(self, Self::Nat(NatError::Host { .. }))
    }
}

/// The cards that the user asked for.
///
/// # Errors
/// A port cannot be forwarded, a network cannot be joined, or the host is out of something.
pub fn cards(arguments: &Run) -> Result<Vec<NicConfig>, NetworkError> {
    let nats = arguments.networks.iter().filter(|choice| **choice == NetworkChoice::Nat).count();
    match nats {
        0 if !arguments.publish.is_empty() => return Err(NetworkError::NothingToPublish),
        0 | 1 => {}
        _ => return Err(NetworkError::TwoNats),
    }
    let networks = arguments.networks.iter().map(|choice| plug(choice, arguments));
    let networks = networks.collect::<Result<Vec<_>, _>>()?.into_iter().flatten();
    Ok(networks.zip(0..).map(|(network, number)| NicConfig { network, mac: mac(number) }).collect())
}

fn plug(choice: &NetworkChoice, arguments: &Run) -> Result<Option<Arc<dyn Network>>, NetworkError> {
    Ok(match choice {
        NetworkChoice::None => None,
        NetworkChoice::Nat => {
            let forwards = arguments.publish.clone();
            Some(Arc::new(Nat::new(&NatConfig { forwards, ..NatConfig::default() })?))
        }
        NetworkChoice::Tap(name) => Some(Arc::new(Tap::open(name)?)),
        NetworkChoice::Switch(name) => Some(Arc::new(Switch::join(name)?)),
    })
}

/// The address of the guest's card `number`: locally administered, and random beside the number, as
/// machines on one switch must differ.
fn mac(number: u8) -> [u8; 6] {
    let [a, b, c, d, ..] = RandomState::new().hash_one(number).to_le_bytes();
    [0x02, a, b, c, d, number]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cards_of_machines_and_within_one_differ() {
        let [first, second, third] = [mac(0), mac(1), mac(0)];
        assert!(first != second && first != third);
        // Neither a group's nor a manufacturer's.
        assert!([first, second, third].iter().all(|mac| mac[0] == 2));
    }
}
