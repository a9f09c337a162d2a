//! The control queue (§5.1.6.5): which frames the driver wants, the card's address, and how many
//! queue pairs it uses.
use crate::Chain;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Addresses of a list that are kept; a longer list lets all frames of its kind through.
const MAX_ADDRESSES: usize = 64;
/// The most bytes of a command that are looked at: two full lists.
const MAX_COMMAND: usize = 2 * (4 + MAX_ADDRESSES * 6);

/// Commands by class and number.
mod command {
    pub const PROMISCUOUS: (u8, u8) = (0, 0);
    pub const ALL_MULTICAST: (u8, u8) = (0, 1);
    pub const MAC_TABLE: (u8, u8) = (1, 0);
    pub const MAC_ADDRESS: (u8, u8) = (1, 1);
    pub const PAIRS: (u8, u8) = (4, 0);
}

/// What the driver has set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The card's address.
    pub mac: Mac,
    /// Queue pairs in use.
    pub pairs: u16,
    /// All frames are let through.
    pub promiscuous: bool,
    /// All frames to groups are let through.
    pub all_multicast: bool,
    /// Further addresses of the card.
    pub unicast: Vec<Mac>,
    /// Groups.
    pub multicast: Vec<Mac>,
}

impl Settings {
    /// As after reset: until a driver says otherwise, it gets all.
    pub fn new(mac: Mac) -> Self {
        let (unicast, multicast) = (Vec::new(), Vec::new());
        Self { mac, pairs: 1, promiscuous: true, all_multicast: false, unicast, multicast }
    }

    /// Whether the driver wants a frame.
    pub fn wants(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else { return false };
        let is_group = to[0] & 1 != 0;
        self.promiscuous
            || match is_group {
                true => self.all_multicast || *to == [0xff; 6] || self.multicast.contains(to),
                false => *to == self.mac || self.unicast.contains(to),
            }
    }

    /// Carries out a command of a card with so many queue pairs; answers whether it could be.
    fn carry_out(&mut self, most_pairs: u16, class: u8, number: u8, data: &[u8]) -> bool {
        match ((class, number), data) {
            (command::PROMISCUOUS, [on]) => self.promiscuous = *on != 0,
            (command::ALL_MULTICAST, [on]) => self.all_multicast = *on != 0,
            (command::MAC_ADDRESS, mac) => match mac.try_into() {
                Ok(mac) => self.mac = mac,
                Err(_) => return false,
            },
            (command::PAIRS, [low, high]) => {
                let pairs = u16::from_le_bytes([*low, *high]);
                if pairs == 0 || pairs > most_pairs {
                    return false;
                }
                self.pairs = pairs;
            }
            (command::MAC_TABLE, data) => {
                let Some((unicast, rest)) = list(data) else { return false };
                let Some((multicast, [])) = list(rest) else { return false };
                (self.unicast, self.multicast) = (unicast, multicast);
            }
            _ => return false,
        }
        true
    }

    /// Carries out the command in a chain and writes its answer; says how much is written.
    pub fn serve(&mut self, most_pairs: u16, chain: &Chain) -> u32 {
        let mut reader = chain.reader();
        let head = reader.read_array::<2>();
        let fits = reader.remaining() <= MAX_COMMAND;
        let data = reader.read_vec(MAX_COMMAND);
        let done = match head {
            Some([class, number]) if fits => self.carry_out(most_pairs, class, number, &data),
            _ => false,
        };
        let mut writer = chain.writer();
        writer.write(&[u8::from(!done)]);
        writer.written()
    }
}

/// A list of addresses and what follows it.
fn list(data: &[u8]) -> Option<(Vec<Mac>, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    if count > MAX_ADDRESSES {
        return None;
    }
    let (addresses, rest) = rest.split_at_checked(6 * count)?;
    let addresses = addresses.chunks(6).filter_map(|mac| mac.try_into().ok());
    Some((addresses.collect(), rest))
}
