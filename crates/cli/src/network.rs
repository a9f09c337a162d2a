//! `--network` and `--publish`: setting the network up.
use crate::args::{Network, Run};
use ::net::nat::{Nat, NatConfig, NatError};
use std::sync::Arc;
use vmm::NicConfig;

/// The address of the guest's card: a local one. Behind a NAT of its own it need not be unique.
const MAC: [u8; 6] = [0x02, b'b', b'v', 0, 0, 1];

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The NAT cannot be set up.
    #[error("--network nat")]
    Nat(#[from] NatError),
    /// Ports of a machine without a network.
    #[error("--publish: the guest has no network; leave --network none away")]
    NothingToPublish,
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
/// A port cannot be forwarded, or the host is out of something.
pub fn cards(arguments: &Run) -> Result<Vec<NicConfig>, NetworkError> {
    match arguments.network {
        Network::None if arguments.publish.is_empty() => Ok(Vec::new()),
        Network::None => Err(NetworkError::NothingToPublish),
        Network::Nat => {
            let forwards = arguments.publish.clone();
            let nat = Nat::new(&NatConfig { forwards, ..NatConfig::default() })?;
            Ok(vec![NicConfig { network: Arc::new(nat), mac: MAC }])
        }
    }
}
