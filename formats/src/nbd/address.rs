//! Where an export is: its server and its name, as a URI (`doc/uri.md` of the protocol) or as QEMU wrote it
//! before there were URIs.
//!
//! ```text
//! nbd://host[:port]/export              nbd:host:port[:exportname=export]
//! nbd+unix:///export?socket=/path       nbd:unix:/path[:exportname=export]
//! ```
//!
//! The two letters `s` of `nbds://` and `nbds+unix://` ask for TLS; whoever connects says whether there is any.
use super::wire::STRING_LEN_MAX;
use crate::error::{Error, Result};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use std::fmt;

/// The port where none is named.
pub const PORT: u16 = 10809;
/// Longest path of a Unix socket, in bytes: what the system's address has room for.
pub const SOCKET_PATH_MAX: usize = 107;
/// Longest name of a host, in bytes (RFC 1035).
const HOST_LEN_MAX: usize = 253;

/// Where an export is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Who serves it.
    pub server: Server,
    /// Its name; empty for the server's default one. At most 4096 bytes.
    pub export: String,
    /// The connection has to be inside TLS.
    pub tls: bool,
}

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Server {
    /// By TCP.
    Tcp {
        /// A name or an address, without brackets.
        host: String,
        /// Its port.
        port: u16,
    },
    /// By a socket in the file system, of at most 107 bytes.
    Unix {
        /// The socket's path.
        path: String,
    },
}

impl Server {
    /// A server at a port of a host.
    pub fn tcp(host: impl Into<String>, port: u16) -> Result<Self> {
        let host = host.into();
        let fine = |letter: char| !letter.is_control() && !letter.is_whitespace() && !"/?#@[]%".contains(letter);
        if host.is_empty() || host.len() > HOST_LEN_MAX || !host.chars().all(fine) {
            return Err(Error::malformed(format!("{host:?} is no host's name or address")));
        }
        match port {
            0 => Err(Error::malformed("port 0 is no server's")),
            port => Ok(Self::Tcp { host, port }),
        }
    }

    /// A server at a Unix socket.
    pub fn unix(path: impl Into<String>) -> Result<Self> {
        let path = path.into();
        if path.is_empty() || path.len() > SOCKET_PATH_MAX || path.contains('\0') {
            return Err(Error::malformed(format!(
                "{path:?} is no socket's path: it has 1 to {SOCKET_PATH_MAX} bytes, none of them NUL"
            )));
        }
        Ok(Self::Unix { path })
    }
}

impl Address {
    /// The export of this name, without TLS.
    pub fn new(server: Server, export: impl Into<String>) -> Result<Self> {
        let export = export.into();
        if export.len() > STRING_LEN_MAX || export.contains('\0') {
            return Err(Error::malformed(format!(
                "the export's name has {} bytes: at most {STRING_LEN_MAX} are allowed, none of them NUL",
                export.len()
            )));
        }
        Ok(Self { server, export, tls: false })
    }

    /// True where `name` begins as the names do that `parse` reads.
    pub fn is_named_by(name: &str) -> bool {
        let scheme = name.split_once(':').map(|(scheme, _)| scheme);
        scheme.is_some_and(|scheme| matches!(scheme, "nbd" | "nbds" | "nbd+unix" | "nbds+unix"))
    }

    /// Reads a URI, or the older `nbd:…`.
    pub fn parse(name: &str) -> Result<Self> {
        let parsed = match name.split_once("://") {
            Some((scheme, rest)) => parse_uri(scheme, rest),
            None => name.strip_prefix("nbd:").map_or_else(|| Err(no_address()), parse_old),
        };
        parsed.map_err(|error| error.at(format_args!("{name:?}")))
    }
}

fn no_address() -> Error {
    Error::malformed("no NBD address: it is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")
}

/// What follows `nbd:`. The export's name is all behind the first `exportname=`, colons included.
fn parse_old(rest: &str) -> Result<Address> {
    let (server, export) = match rest.split_once(":exportname=") {
        Some((server, export)) => (server, export),
        None => (rest, ""),
    };
    let server = match server.strip_prefix("unix:") {
        Some(path) => Server::unix(path)?,
        None => {
            let (host, given_port) = host_and_port(server)?;
            Server::tcp(host, port(given_port.ok_or_else(|| Error::malformed("a port is missing"))?)?)?
        }
    };
    Address::new(server, export)
}

fn parse_uri(scheme: &str, rest: &str) -> Result<Address> {
    let (tls, unix) = match scheme {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        _ => return Err(no_address()),
    };
    if rest.contains('#') {
        return Err(Error::malformed("an NBD address has no fragment: write # as %23"));
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let socket = socket(query)?;
    let server = match (unix, socket) {
        (true, Some(path)) if authority.is_empty() => Server::unix(path)?,
        (true, Some(_)) => return Err(Error::malformed("an address with a socket has no host: write three slashes")),
        (true, None) => return Err(Error::malformed("the socket is missing: add ?socket=PATH")),
        (false, Some(_)) => return Err(Error::malformed("a socket belongs to nbd+unix: and has no place here")),
        (false, None) => {
            let (host, given_port) = host_and_port(authority)?;
            Server::tcp(decoded(host)?, given_port.filter(|port| !port.is_empty()).map_or(Ok(PORT), port)?)?
        }
    };
    // One slash is the path's own; a name may begin with another.
    let export = decoded(path.strip_prefix('/').unwrap_or(path))?;
    Ok(Address { tls, ..Address::new(server, export)? })
}

/// The only parameter that there is here.
fn socket(query: Option<&str>) -> Result<Option<String>> {
    let mut socket = None;
    for parameter in query.unwrap_or_default().split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match decoded(name)?.as_str() {
            "socket" if socket.is_none() => socket = Some(decoded(value)?),
            "socket" => return Err(Error::malformed("the socket is named twice")),
            other => return Err(Error::unsupported(format!("the parameter {other:?} is not supported: leave it out"))),
        }
    }
    Ok(socket)
}

/// `host`, `host:port`, `[address]` or `[address]:port`.
fn host_and_port(text: &str) -> Result<(&str, Option<&str>)> {
    if text.contains('@') {
        return Err(Error::unsupported("a user's name is not supported: leave it out"));
    }
    let Some(bracketed) = text.strip_prefix('[') else {
        return Ok(text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))));
    };
    let (host, behind) = bracketed.split_once(']').ok_or_else(|| Error::malformed("a bracket is not closed"))?;
    match (behind, behind.strip_prefix(':')) {
        ("", _) => Ok((host, None)),
        (_, Some(port)) => Ok((host, Some(port))),
        _ => Err(Error::malformed("what follows a bracket is no port")),
    }
}

/// A port in digits.
pub(crate) fn port(text: &str) -> Result<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let port = digits.then(|| text.parse().ok()).flatten();
    port.ok_or_else(|| Error::malformed(format!("{text:?} is no port")))
}

fn decoded(text: &str) -> Result<String> {
    let mut escapes = text.split('%').skip(1).map(str::as_bytes);
    if !escapes.all(|rest| rest.len() >= 2 && rest[..2].iter().all(u8::is_ascii_hexdigit)) {
        return Err(Error::malformed(format!("{text:?} has a % without two hexadecimal digits: write % as %25")));
    }
    let bytes = percent_decode_str(text).decode_utf8();
    bytes.map(Into::into).map_err(|_| Error::unsupported(format!("{text:?} is not UTF-8 text")))
}

/// What stands for itself in a path or in a query.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

impl fmt::Display for Address {
    /// As a URI.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "nbds" } else { "nbd" };
        let export = utf8_percent_encode(&self.export, ESCAPED);
        match &self.server {
            Server::Tcp { host, port } => {
                let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
                write!(f, "{scheme}://{open}{host}{close}:{port}/{export}")
            }
            Server::Unix { path } => {
                write!(f, "{scheme}+unix:///{export}?socket={}", utf8_percent_encode(path, ESCAPED))
            }
        }
    }
}

#[cfg(test)]
mod tests;
