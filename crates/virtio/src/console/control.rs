//! Messages of the control queues (§5.3.6.2).
use crate::Chain;

/// Bytes of a message without a name.
const LENGTH: usize = 8;

/// Events.
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// What a driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromDriver {
    /// It wants to hear of ports.
    Ready,
    /// It has set up a port.
    PortReady(usize),
    /// A program has opened a port, or closed it.
    PortOpen(usize, bool),
}

impl FromDriver {
    /// Reads a message; `None` where there is nothing to do.
    pub fn parse(chain: &Chain) -> Option<Self> {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = chain.reader().read_array::<LENGTH>()?;
        let port = usize::try_from(u32::from_le_bytes([p0, p1, p2, p3])).ok()?;
        let value = u16::from_le_bytes([v0, v1]);
        match (u16::from_le_bytes([e0, e1]), value) {
            (event::DEVICE_READY, 1) => Some(Self::Ready),
            (event::PORT_READY, 1) => Some(Self::PortReady(port)),
            (event::PORT_OPEN, value) => Some(Self::PortOpen(port, value != 0)),
            _ => None,
        }
    }
}

/// What a driver is still to hear of a port. Each is owed at most once, however often it asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owed(u8);

impl Owed {
    /// That it is there.
    pub const ADD: Self = Self(1);
    /// What it is, and that the host has it open.
    pub const DESCRIPTION: Self = Self(0b1110);

    /// Adds what `more` has.
    pub fn add(&mut self, more: Self) {
        self.0 |= more.0;
    }

    /// The next message about a port, with its bit.
    fn next(self) -> Option<u8> {
        (0..4).map(|n| 1 << n).find(|bit| self.0 & bit != 0)
    }

    /// The next message about port `id`, taken out. A console has no name.
    pub fn take(&mut self, id: u32, name: Option<&str>) -> Option<Vec<u8>> {
        loop {
            let bit = self.next()?;
            self.0 &= !bit;
            let (event, name) = match (bit, name) {
                (1, _) => (event::PORT_ADD, ""),
                (2, None) => (event::CONSOLE_PORT, ""),
                (4, Some(name)) => (event::PORT_NAME, name),
                (8, _) => (event::PORT_OPEN, ""),
                _ => continue,
            };
            let mut message = id.to_le_bytes().to_vec();
            message.extend(event.to_le_bytes());
            message.extend(1u16.to_le_bytes());
            message.extend(name.bytes());
            return Some(message);
        }
    }

    /// Whether nothing is owed.
    pub fn is_nothing(self) -> bool {
        self.0 == 0
    }

    /// The saved form.
    pub fn to_byte(self) -> u8 {
        self.0
    }

    /// From the saved form.
    pub fn from_byte(byte: u8) -> Option<Self> {
        (byte < 16).then_some(Self(byte))
    }
}
