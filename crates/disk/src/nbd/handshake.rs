//! The start of a connection: fixed newstyle negotiation, "The NBD protocol" (`doc/proto.md`),
//! "Newstyle negotiation" and "Option haggling". Numbers are big-endian.
use super::Stream;
use super::url::Url;
use crate::bytes::{be16, be32, be64};
use std::io::{self, Write};
use std::time::{Duration, Instant};

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OLD_MAGIC: u64 = 0x0000_4202_8186_1253;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Bits of both sides' first flags.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
/// Bytes of the longest reply to an option that is read: names have at most 4096.
const MAX_REPLY: u32 = 64 << 10;
/// Replies to one option.
const MAX_REPLIES: usize = 256;
/// Characters of a server's message that are shown.
const MAX_SHOWN: usize = 200;
/// The zeroes that servers of old send after an export's size.
const ZEROES: usize = 124;

mod option {
    pub(super) const EXPORT_NAME: u32 = 1;
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
    pub(super) const SET_META_CONTEXT: u32 = 10;
}

mod reply {
    pub(super) const ACK: u32 = 1;
    pub(super) const INFO: u32 = 3;
    pub(super) const META_CONTEXT: u32 = 4;
    pub(super) const ERROR: u32 = 1 << 31;
    pub(super) const UNSUPPORTED: u32 = ERROR | 1;
    pub(super) const POLICY: u32 = ERROR | 2;
    pub(super) const TLS_REQUIRED: u32 = ERROR | 5;
    pub(super) const UNKNOWN_EXPORT: u32 = ERROR | 6;
}

mod info {
    pub(super) const EXPORT: u16 = 0;
    pub(super) const BLOCK_SIZE: u16 = 3;
}

/// The context whose states are holes and zeroes.
const ALLOCATION: &str = "base:allocation";

/// What a server offers for an export.
#[derive(Clone, Debug, Default)]
pub(super) struct Offer {
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Replies come in chunks.
    pub structured: bool,
    /// The number of the context for holes and zeroes.
    pub allocation: Option<u32>,
    /// What requests have to be aligned to, in bytes.
    pub minimum: u32,
    /// What they had better be aligned to.
    pub preferred: u32,
    /// Bytes that one request may carry.
    pub maximum: u32,
}

/// The error of a server that does not keep to the protocol.
pub(super) fn violation(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server breaks the protocol: {what}"))
}

/// The error of a server that says nothing.
pub(super) fn silence() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the server does not answer")
}

fn refused(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, what)
}

/// A connection that has until a given time.
struct Haggling<'a> {
    stream: &'a Stream,
    until: Instant,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

impl Haggling<'_> {
    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(silence());
            }
            // Zero would mean for ever.
            self.stream.set_timeout(left.max(Duration::from_millis(1)))?;
            done += self.stream.read_some(rest).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => silence(),
                _ => error,
            })?;
        }
        Ok(())
    }

    fn send(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(data);
        (&mut &*self.stream).write_all(&message)
    }

    fn reply(&mut self, option: u32) -> io::Result<Reply> {
        let head: [u8; 20] = self.read()?;
        if be64(&head, 0) != REPLY_MAGIC || be32(&head, 8) != option {
            return Err(violation("a reply to an option is for none that was sent"));
        }
        let length = be32(&head, 16);
        if length > MAX_REPLY {
            return Err(violation("a reply to an option is too long"));
        }
        let mut data = vec![0; usize::try_from(length).unwrap_or_default()];
        self.fill(&mut data)?;
        Ok(Reply { kind: be32(&head, 12), data })
    }

    /// Sends an option and hands over its replies up to the one that ends them: `Ok` where the
    /// server acknowledged.
    fn negotiate(
        &mut self,
        option: u32,
        data: &[u8],
        mut each: impl FnMut(&Reply) -> io::Result<()>,
    ) -> io::Result<Result<(), Reply>> {
        self.send(option, data)?;
        for _ in 0..MAX_REPLIES {
            let reply = self.reply(option)?;
            match reply.kind {
                reply::ACK => return Ok(Ok(())),
                kind if kind & reply::ERROR != 0 => return Ok(Err(reply)),
                _ => each(&reply)?,
            }
        }
        Err(violation("the replies to an option do not end"))
    }
}

/// Negotiates for an export. The connection is then ready for requests.
pub(super) fn negotiate(stream: &Stream, url: &Url, patience: Duration) -> io::Result<Offer> {
    let mut haggling = Haggling { stream, until: Instant::now() + patience };
    if u64::from_be_bytes(haggling.read()?) != MAGIC {
        return Err(violation("it is no NBD server"));
    }
    match u64::from_be_bytes(haggling.read()?) {
        OPTION_MAGIC => {}
        OLD_MAGIC => {
            return Err(refused("the server speaks only the protocol from before 2011".to_owned()));
        }
        _ => return Err(violation("its greeting is unknown")),
    }
    let flags = u16::from_be_bytes(haggling.read()?);
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(refused("the server speaks only the protocol from before 2012".to_owned()));
    }
    let agreed = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
    (&mut &*stream).write_all(&agreed.to_be_bytes())?;

    let mut offer = Offer { minimum: 1, preferred: 4096, maximum: 32 << 20, ..Offer::default() };
    let structured = haggling.negotiate(option::STRUCTURED_REPLY, &[], |_| Ok(()))?;
    offer.structured = structured.is_ok();
    if offer.structured {
        offer.allocation = ask_for_allocation(&mut haggling, &url.export)?;
    }
    match go(&mut haggling, &url.export, &mut offer)? {
        Ok(()) => {}
        Err(reply) if reply.kind == reply::UNSUPPORTED => {
            by_name(&mut haggling, &url.export, flags, &mut offer)?;
        }
        Err(reply) => return Err(refusal(&reply, &url.export)),
    }
    check(&offer)?;
    Ok(offer)
}

fn ask_for_allocation(haggling: &mut Haggling<'_>, export: &str) -> io::Result<Option<u32>> {
    let mut data = Vec::new();
    push_text(&mut data, export);
    data.extend(1_u32.to_be_bytes());
    push_text(&mut data, ALLOCATION);
    let mut number = None;
    let done = haggling.negotiate(option::SET_META_CONTEXT, &data, |reply| {
        let name = reply.data.get(4..).unwrap_or_default();
        if reply.kind == reply::META_CONTEXT && name == ALLOCATION.as_bytes() {
            number = Some(be32(&reply.data, 0));
        }
        Ok(())
    })?;
    Ok(number.filter(|_| done.is_ok()))
}

fn push_text(data: &mut Vec<u8>, text: &str) {
    data.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    data.extend(text.as_bytes());
}

fn go(
    haggling: &mut Haggling<'_>,
    export: &str,
    offer: &mut Offer,
) -> io::Result<Result<(), Reply>> {
    let mut data = Vec::new();
    push_text(&mut data, export);
    data.extend(1_u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    let mut has_export = false;
    let done = haggling.negotiate(option::GO, &data, |reply| {
        let data = &reply.data;
        match (reply.kind, be16(data, 0), data.len()) {
            (reply::INFO, info::EXPORT, 12) => {
                (offer.size, offer.flags) = (be64(data, 2), be16(data, 10));
                has_export = true;
            }
            (reply::INFO, info::BLOCK_SIZE, 14) => {
                offer.minimum = be32(data, 2);
                offer.preferred = be32(data, 6);
                offer.maximum = be32(data, 10);
            }
            (reply::INFO, info::EXPORT | info::BLOCK_SIZE, _) => {
                return Err(violation("what it says of an export has the wrong length"));
            }
            _ => {}
        }
        Ok(())
    })?;
    if done.is_ok() && !has_export {
        return Err(violation("it does not say how large the export is"));
    }
    Ok(done)
}

/// Asks for an export in the old way, in which the server closes the connection to refuse.
fn by_name(
    haggling: &mut Haggling<'_>,
    export: &str,
    flags: u16,
    offer: &mut Offer,
) -> io::Result<()> {
    haggling.send(option::EXPORT_NAME, export.as_bytes())?;
    let head: [u8; 10] = haggling.read().map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => refused(format!("the server has no export {export:?}")),
        _ => error,
    })?;
    (offer.size, offer.flags) = (be64(&head, 0), be16(&head, 8));
    if flags & NO_ZEROES == 0 {
        haggling.read::<ZEROES>()?;
    }
    Ok(())
}

fn refusal(reply: &Reply, export: &str) -> io::Error {
    let text = String::from_utf8_lossy(&reply.data);
    let said: String = text.chars().filter(|letter| !letter.is_control()).take(MAX_SHOWN).collect();
    let why = match reply.kind {
        reply::POLICY => "the server does not let this client in".to_owned(),
        reply::TLS_REQUIRED => "the server wants TLS, which is not supported; use a tunnel".into(),
        reply::UNKNOWN_EXPORT => format!("the server has no export {export:?}"),
        kind => format!("the server refuses with error {}", kind & !reply::ERROR),
    };
    refused(if said.is_empty() { why } else { format!("{why} ({said})") })
}

fn check(offer: &Offer) -> io::Result<()> {
    if i64::try_from(offer.size).is_err() {
        return Err(violation("the export is larger than the protocol lets it be"));
    }
    let minimum = offer.minimum;
    if !minimum.is_power_of_two()
        || minimum > 64 << 10
        || offer.maximum < minimum
        || !offer.size.is_multiple_of(minimum.into())
    {
        return Err(violation("its block sizes do not fit each other or the export"));
    }
    Ok(())
}
