//! Where an NBD export is: the URLs of the NBD project ("The NBD URI specification",
//! `doc/uri.md`).
use crate::DiskError;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port that is registered for NBD.
const PORT: u16 = 10809;
/// Bytes of the longest name of an export, by the protocol.
const MAX_EXPORT: usize = 4096;

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// Over TCP.
    Tcp {
        /// A name or an address.
        host: String,
        /// The port.
        port: u16,
    },
    /// Over a Unix socket.
    Unix {
        /// The socket.
        socket: PathBuf,
    },
}

/// A server and one of its exports: `nbd://host[:port][/export]` or
/// `nbd+unix://[/export]?socket=path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// The server.
    pub server: Server,
    /// The export's name; the empty one is the server's default.
    pub export: String,
    text: String,
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Url {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, DiskError> {
        parse(text).map_err(|problem| DiskError::Invalid { file: text.to_owned(), problem })
    }
}

fn parse(text: &str) -> Result<Url, String> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(
            "an NBD URL is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH".to_owned()
        );
    };
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(a, b)| (a, Some(b)));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(export)?;
    if export.len() > MAX_EXPORT {
        return Err(format!("the export's name is longer than {MAX_EXPORT} bytes"));
    }
    let server = match scheme {
        "nbd" if query.is_some() => {
            return Err("nbd:// takes nothing after `?`; use nbd+unix:// for a socket".to_owned());
        }
        "nbd" => tcp(authority)?,
        "nbd+unix" if !authority.is_empty() => {
            return Err("nbd+unix:// has no host; write nbd+unix:///EXPORT?socket=PATH".to_owned());
        }
        "nbd+unix" => unix(query.unwrap_or_default())?,
        "nbds" | "nbds+unix" => {
            return Err("NBD over TLS is not supported; use a tunnel and nbd://".to_owned());
        }
        other => return Err(format!("{other}:// is not NBD; use nbd:// or nbd+unix://")),
    };
    Ok(Url { server, export, text: text.to_owned() })
}

fn tcp(authority: &str) -> Result<Server, String> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or("the address has a `[` without `]`")?,
        None => {
            let colon = authority.find(':').unwrap_or(authority.len());
            authority.split_at(colon)
        }
    };
    let port = match port.strip_prefix(':') {
        Some(number) => number.parse().map_err(|_| format!("{number:?} is not a port"))?,
        None if port.is_empty() => PORT,
        None => return Err(format!("{port:?} after the address is not a port")),
    };
    let host = decode(host)?;
    if host.is_empty() || host.contains('@') {
        return Err("a host is needed after nbd://, and no user".to_owned());
    }
    Ok(Server::Tcp { host, port })
}

fn unix(query: &str) -> Result<Server, String> {
    match query.split_once('=') {
        Some(("socket", path)) if !path.is_empty() && !path.contains('&') => {
            Ok(Server::Unix { socket: PathBuf::from(decode(path)?) })
        }
        _ => Err("nbd+unix:// needs ?socket=PATH, and nothing else".to_owned()),
    }
}

/// Decodes `%20` and the like.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next().unwrap_or(0), rest.next().unwrap_or(0)];
        let value = std::str::from_utf8(&digits).ok().filter(|digits| !digits.contains('+'));
        let value = value.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(value.ok_or("a `%` in an URL is followed by two hexadecimal digits")?);
    }
    String::from_utf8(bytes).map_err(|_| "the URL is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> (Server, String) {
        (Server::Tcp { host: host.to_owned(), port }, export.to_owned())
    }

    #[test]
    fn urls_name_a_server_and_an_export() {
        let parsed = |text: &str| {
            let url: Url = text.parse().unwrap();
            assert_eq!(url.to_string(), text);
            (url.server, url.export)
        };
        assert_eq!(parsed("nbd://host"), tcp("host", 10809, ""));
        assert_eq!(parsed("nbd://host:7/a/b%20c"), tcp("host", 7, "a/b c"));
        assert_eq!(parsed("nbd://[::1]:7/"), tcp("::1", 7, ""));
        assert_eq!(parsed("nbd://[::1]"), tcp("::1", 10809, ""));
        let socket = PathBuf::from("/run/x y.sock");
        let expected = (Server::Unix { socket }, "disk".to_owned());
        assert_eq!(parsed("nbd+unix:///disk?socket=/run/x%20y.sock"), expected);
    }

    #[test]
    fn other_urls_are_refused_with_what_to_write() {
        for (text, word) in [
            ("host:7", "nbd://HOST"),
            ("nbd://", "host is needed"),
            ("nbd://host:port", "not a port"),
            ("nbd://host:70000", "not a port"),
            ("nbd://[::1", "without"),
            ("nbd://host/?socket=/x", "nbd+unix"),
            ("nbd+unix:///x", "socket=PATH"),
            ("nbd+unix://host/x?socket=/x", "no host"),
            ("nbds://host", "TLS"),
            ("http://host", "not NBD"),
            ("nbd://host/%zz", "hexadecimal"),
            ("nbd://host/%", "hexadecimal"),
        ] {
            let error = text.parse::<Url>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
