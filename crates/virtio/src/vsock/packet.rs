//! Packets (§5.10.6): a header, and data in some of them.

/// Bytes of a header.
pub const HEADER: usize = 44;

/// The host's address (§5.10.4).
pub const HOST_CID: u64 = 2;

/// The type of streams; there are no others here.
const STREAM: u16 = 1;

/// What a packet is for (§5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Ends one, or refuses it.
    Reset,
    /// Says that a side will send, or receive, no more.
    Shutdown,
    /// Carries data.
    Data,
    /// Tells of room for data.
    CreditUpdate,
    /// Asks for that.
    CreditRequest,
}

impl Operation {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    fn number(self) -> u16 {
        self as u16 + 1
    }
}

/// Flags of [`Operation::Shutdown`].
pub mod shutdown {
    /// The sender of the packet receives no more.
    pub const RECEIVE: u32 = 1;
    /// It sends no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// The two ends of a connection, which tell it from all others of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// What a sender can take of the other's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// Bytes of its buffer.
    pub buffer: u32,
    /// Bytes that left the buffer since the connection began, modulo 2^32.
    pub forwarded: u32,
}

/// A packet's header, as either side sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where it comes from.
    pub source: u64,
    /// Where it goes.
    pub destination: u64,
    /// Ports.
    pub ports: Ports,
    /// Bytes of data behind the header.
    pub length: u32,
    /// `None` is one that nobody knows.
    pub operation: Option<Operation>,
    /// Whether it is about a stream.
    pub stream: bool,
    /// Of [`Operation::Shutdown`].
    pub flags: u32,
    /// The sender's.
    pub credit: Credit,
}

impl Header {
    /// A header that the guest sent.
    pub fn from_guest(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            u32::from_le_bytes(bytes.unwrap_or_default())
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (kind, operation) = (word(28) as u16, (word(28) >> 16) as u16);
        Self {
            source: long(0),
            destination: long(8),
            ports: Ports { guest: word(16), host: word(20) },
            length: word(24),
            operation: Operation::ALL.into_iter().find(|known| known.number() == operation),
            stream: kind == STREAM,
            flags: word(32),
            credit: Credit { buffer: word(36), forwarded: word(40) },
        }
    }

    /// The bytes of a header that goes to the guest.
    pub fn to_guest(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let operation = self.operation.map_or(0, Operation::number);
        let fields = (self.source.to_le_bytes().into_iter())
            .chain(self.destination.to_le_bytes())
            .chain(self.ports.host.to_le_bytes())
            .chain(self.ports.guest.to_le_bytes())
            .chain(self.length.to_le_bytes())
            .chain(STREAM.to_le_bytes())
            .chain(operation.to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.credit.buffer.to_le_bytes())
            .chain(self.credit.forwarded.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        bytes
    }
}
