//! The host's resolvers, and what of a DNS message (RFC 1035) a forwarder has to know.
use crate::wire::{be16, put};
use std::fs::{File, Metadata};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where DNS is served.
pub(crate) const PORT: u16 = 53;
/// Bytes of a message's header.
const HEADER: usize = 12;
/// More resolvers than any stub uses.
const MOST: usize = 8;
/// No more of the file is read.
const LARGEST_FILE: u64 = 64 << 10;

/// What changes when a file is written or replaced.
type Stamp = (u64, u64, i64, i64, u64);

/// The host's resolvers, as resolv.conf(5) names them, read anew when the file changes.
#[derive(Debug)]
pub(crate) struct Resolvers {
    path: PathBuf,
    stamp: Option<Stamp>,
    servers: Vec<SocketAddr>,
}

impl Resolvers {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), stamp: None, servers: Vec::new() }
    }

    /// How many there are.
    pub fn count(&mut self) -> usize {
        self.refresh();
        self.servers.len()
    }

    /// One of them, in the file's order.
    pub fn get(&mut self, index: usize) -> Option<SocketAddr> {
        self.refresh();
        self.servers.get(index).copied()
    }

    fn refresh(&mut self) {
        let stamp = std::fs::metadata(&self.path).ok().map(|file| stamp(&file));
        if stamp.is_some() && stamp == self.stamp {
            return;
        }
        // A file that is gone for a moment, as while it is replaced, leaves what there was.
        let Some(text) = read(&self.path) else { return };
        self.stamp = stamp;
        self.servers = parse(&text);
    }
}

fn stamp(file: &Metadata) -> Stamp {
    (file.dev(), file.ino(), file.mtime(), file.mtime_nsec(), file.size())
}

fn read(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(LARGEST_FILE).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// Reads the `nameserver` lines. Without one it is the host itself, as resolv.conf(5) says.
fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| server(words.next()?))?
    });
    let servers: Vec<_> = servers.take(MOST).collect();
    if servers.is_empty() {
        vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT)]
    } else {
        servers
    }
}

/// An address, with a scope where it is link-local; or `[ADDRESS]:PORT`, as OpenBSD's
/// resolv.conf(5) has it.
fn server(word: &str) -> Option<SocketAddr> {
    if let Some((address, port)) = word.strip_prefix('[').and_then(|word| word.split_once("]:")) {
        return Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?));
    }
    if let Some((address, scope)) = word.split_once('%') {
        let scope = scope.parse().ok().or_else(|| interface(scope))?;
        return Some(SocketAddrV6::new(address.parse().ok()?, PORT, 0, scope).into());
    }
    Some(SocketAddr::new(word.parse::<IpAddr>().ok()?, PORT))
}

/// The number of a network interface.
fn interface(name: &str) -> Option<u32> {
    let any = super::host::datagrams(Ipv4Addr::UNSPECIFIED.into()).ok()?;
    rustix::net::netdevice::name_to_index(any, name).ok()
}

/// A message's number, if it has a header.
fn id(message: &[u8]) -> Option<u16> {
    be16(message, HEADER - 2)?;
    be16(message, 0)
}

/// Whether a message is a query.
pub(crate) fn is_query(message: &[u8]) -> bool {
    id(message).is_some() && message.get(2).is_some_and(|flags| flags & 0x80 == 0)
}

/// Whether a message answers the query.
pub(crate) fn is_answer(message: &[u8], query: &[u8]) -> bool {
    id(message).is_some() && id(message) == id(query) && !is_query(message)
}

/// The answer to a query when no resolver answers: "server failure".
pub(crate) fn failure(query: &[u8]) -> Vec<u8> {
    let question = question_end(query).filter(|_| be16(query, 4) == Some(1));
    let mut answer = query.get(..question.unwrap_or(HEADER)).unwrap_or_default().to_vec();
    let recursion = query.get(2).map_or(0, |flags| flags & 0x79);
    put(&mut answer, 2, &[0x80 | recursion, 0x82]);
    put(&mut answer, 4, &[0, u8::from(question.is_some()), 0, 0, 0, 0, 0, 0]);
    answer
}

/// Where the first question ends.
fn question_end(query: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        match *query.get(at)? {
            0 => break,
            // Longer ones are pointers, which no question has.
            length @ 1..=63 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    let end = at + 5;
    (end <= query.len()).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_as_the_c_library_reads_it() {
        let text = "# x\nsearch lan\nnameserver 192.0.2.1\n nameserver\t::1 # c\nnameserver x\n\
                    nameserver [127.0.0.1]:5300\nnameserver fe80::1%1\noptions edns0\n";
        let servers: Vec<String> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[::1]:53", "127.0.0.1:5300", "[fe80::1%1]:53"]);
        assert_eq!(parse("search lan"), ["127.0.0.1:53".parse().unwrap()]);
    }

    #[test]
    fn a_changed_file_is_read_anew_and_a_missing_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        std::fs::write(&path, "nameserver 192.0.2.1").unwrap();
        let mut resolvers = Resolvers::new(&path);
        assert_eq!(resolvers.get(0).unwrap().to_string(), "192.0.2.1:53");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(resolvers.count(), 1);
        let other = folder.path().join("new");
        std::fs::write(&other, "nameserver 192.0.2.2\nnameserver 192.0.2.3").unwrap();
        std::fs::rename(other, &path).unwrap();
        assert_eq!(resolvers.get(1).unwrap().to_string(), "192.0.2.3:53");
    }

    #[test]
    fn the_answer_to_a_query_that_failed_repeats_the_question() {
        let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        query.extend_from_slice(b"\x03www\x02de\x00\x00\x01\x00\x01");
        let question = query.len();
        query.extend_from_slice(b"\x00\x00\x29\x10\x00\x00\x00\x00\x00\x00\x00");
        let answer = failure(&query);
        assert!(is_answer(&answer, &query));
        assert_eq!(answer[3] & 15, 2);
        assert_eq!(answer[HEADER..], query[HEADER..question]);
        for cut in 0..question {
            assert!(failure(&query[..cut]).len() <= HEADER);
        }
    }
}
