//! Where an export is: its server and its name, as a URI (`doc/uri.md` of the protocol) or as QEMU wrote it
//! before there were URIs.
//!
//! ```text
//! nbd://host[:port]/export              nbd:host:port[:exportname=export]
//! nbd+unix:///export?socket=/path       nbd:unix:/path[:exportname=export]
//! ```
//!
//! `nbds://` and `nbds+unix://` are inside TLS and nothing else. Behind `?` and between `&` they may have, as libnbd
//! and the protocol name them, `tls-certificates=DIR` (the folder with whom we trust and who we are) and
//! `tls-hostname=NAME` (whom the server's certificate has to be for). `tls-type=x509` and `tls-verify-peer=1` ask for
//! what is done anyway; who asks for less is refused.
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
/// Longest path of a folder, in bytes: what the system opens.
const FOLDER_PATH_MAX: usize = 4095;

/// Where an export is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Who serves it.
    pub server: Server,
    /// Its name; empty for the server's default one. At most 4096 bytes.
    pub export: String,
    /// The connection is inside TLS, and never in plain.
    pub tls: Option<TlsNames>,
}

/// What an address names for TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TlsNames {
    /// The folder of certificates, laid out as QEMU's. At most 4095 bytes.
    pub certificates: Option<String>,
    /// Whom the server's certificate has to be for, where that is not the host.
    pub hostname: Option<String>,
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
        match port {
            0 => Err(Error::malformed("port 0 is no server's")),
            port => Ok(Self::Tcp { host: host_name(host.into())?, port }),
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
        Ok(Self { server, export, tls: None })
    }

    /// What tells the export from others: who serves it and its name, however it is reached.
    pub fn place(&self) -> String {
        Self { tls: None, ..self.clone() }.to_string()
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
    let mut query = Query::read(query.unwrap_or_default())?;
    let server = match (unix, query.socket.take()) {
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
    Ok(Address { tls: query.tls(tls)?, ..Address::new(server, export)? })
}

/// The parameters that there are here.
#[derive(Default)]
struct Query {
    socket: Option<String>,
    certificates: Option<String>,
    hostname: Option<String>,
    kind: Option<String>,
    verify_peer: Option<String>,
}

impl Query {
    fn read(text: &str) -> Result<Self> {
        let mut query = Self::default();
        for parameter in text.split('&').filter(|parameter| !parameter.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let name = decoded(name)?;
            let place = match name.as_str() {
                "socket" => &mut query.socket,
                "tls-certificates" => &mut query.certificates,
                "tls-hostname" => &mut query.hostname,
                "tls-type" => &mut query.kind,
                "tls-verify-peer" => &mut query.verify_peer,
                _ => {
                    return Err(Error::unsupported(format!("the parameter {name:?} is not supported: leave it out")));
                }
            };
            if place.replace(decoded(value)?).is_some() {
                return Err(Error::malformed(format!("the parameter {name:?} is there twice")));
            }
        }
        Ok(query)
    }

    /// What is said of TLS, which is `inside` or not at all.
    fn tls(self, inside: bool) -> Result<Option<TlsNames>> {
        let Self { certificates, hostname, kind, verify_peer, .. } = self;
        if !inside {
            // Whoever names certificates believes to be safe.
            let said = [&certificates, &hostname, &kind, &verify_peer].iter().any(|value| value.is_some());
            let plain = || Error::malformed("what begins with tls- belongs to nbds: and nbds+unix:, not to plain NBD");
            return if said { Err(plain()) } else { Ok(None) };
        }
        if let Some(kind) = kind.filter(|kind| kind != "x509") {
            return Err(Error::unsupported(format!("tls-type={kind} is not supported: there is x509, certificates")));
        }
        if let Some(word) = verify_peer.filter(|word| !["1", "true"].contains(&word.as_str())) {
            let why = format!("tls-verify-peer={word} is not supported: a server is always verified, leave it out");
            return Err(Error::unsupported(why));
        }
        let certificates = certificates.map(folder_path).transpose()?;
        Ok(Some(TlsNames { certificates, hostname: hostname.map(host_name).transpose()? }))
    }
}

fn folder_path(path: String) -> Result<String> {
    match path.is_empty() || path.len() > FOLDER_PATH_MAX || path.contains('\0') {
        false => Ok(path),
        true => Err(Error::malformed(format!(
            "tls-certificates={path:?} is no folder's path: it has 1 to {FOLDER_PATH_MAX} bytes, none of them NUL"
        ))),
    }
}

/// A name or an address of a host.
fn host_name(host: String) -> Result<String> {
    let fine = |letter: char| !letter.is_control() && !letter.is_whitespace() && !"/?#@[]%".contains(letter);
    match !host.is_empty() && host.len() <= HOST_LEN_MAX && host.chars().all(fine) {
        true => Ok(host),
        false => Err(Error::malformed(format!("{host:?} is no host's name or address"))),
    }
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
        let scheme = if self.tls.is_some() { "nbds" } else { "nbd" };
        let export = utf8_percent_encode(&self.export, ESCAPED);
        let mut socket = None;
        match &self.server {
            Server::Tcp { host, port } => {
                let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
                write!(f, "{scheme}://{open}{host}{close}:{port}/{export}")?;
            }
            Server::Unix { path } => {
                write!(f, "{scheme}+unix:///{export}")?;
                socket = Some(path);
            }
        }
        let TlsNames { certificates, hostname } = self.tls.as_ref().unwrap_or(&NO_NAMES);
        let names = [("tls-certificates", certificates.as_ref()), ("tls-hostname", hostname.as_ref())];
        let parameters = std::iter::once(("socket", socket)).chain(names);
        let said = parameters.filter_map(|(name, value)| Some((name, utf8_percent_encode(value?, ESCAPED))));
        for (separator, (name, value)) in std::iter::once('?').chain(std::iter::repeat('&')).zip(said) {
            write!(f, "{separator}{name}={value}")?;
        }
        Ok(())
    }
}

const NO_NAMES: TlsNames = TlsNames { certificates: None, hostname: None };

#[cfg(test)]
mod tests;
