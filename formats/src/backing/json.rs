//! `json:{…}`: a backing image by the words of QEMU's `blockdev-add`.
//!
//! ```text
//! {"driver": "qcow2", "file": {"driver": "file", "filename": "/images/base"}}
//! {"driver": "qcow2", "file.driver": "file", "file.filename": "/images/base"}     the same
//! {"driver": "nbd", "server": {"type": "unix", "path": "/socket"}, "export": "disk"}
//! ```
//!
//! A format (`qcow2`, `raw`) stands on a protocol (`file`, `host_device`, `nbd`); that alone is raw.
//! Keys that change how bytes are fetched, not which, are passed over; any other that is not known is
//! refused, for it may mean another part of the file, or another file.
use super::{BackingName, Location, REMEDY, protocol};
use crate::error::{Error, Result};
use crate::nbd::address::{PORT, port};
use crate::nbd::{Address, Server};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// Objects inside objects, the outermost included.
const DEPTH_MAX: usize = 4;
/// Keys in all of them together.
const KEYS_MAX: usize = 64;
/// Keys that change nothing of what is read.
const PASSED_OVER: [&str; 12] = [
    "aio",
    "auto-read-only",
    "cache.direct",
    "cache.no-flush",
    "detect-zeroes",
    "discard",
    "force-share",
    "locking",
    "node-name",
    "open-timeout",
    "read-only",
    "reconnect-delay",
];

/// Reads what follows `json:`.
pub(super) fn parse(text: &str) -> Result<BackingName> {
    let mut keys = BTreeMap::new();
    let mut input = serde_json::Deserializer::from_str(text);
    let level = Level { keys: &mut keys, prefix: String::new(), depth: 0 };
    let read = level.deserialize(&mut input).and_then(|()| input.end());
    read.map_err(|error| Error::malformed(format!("no JSON that is understood: {error}")))?;

    let mut top = Node(keys);
    match top.take("driver").as_deref() {
        Some("qcow2") => top.format(Some("qcow2")),
        Some("raw") => top.format(Some("raw")),
        None if !top.0.contains_key("filename") => top.format(None),
        // A protocol alone shows its bytes as they are; only where nothing is said the format is open.
        driver => Ok(BackingName { format: driver.map(|_| "raw"), location: top.protocol(driver)? }),
    }
}

/// The keys of one object, those inside it with its own name and a dot before them.
struct Node(BTreeMap<String, String>);

impl Node {
    fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    fn want(&mut self, key: &str) -> Result<String> {
        self.take(key).ok_or_else(|| Error::malformed(format!("the key {key:?} is missing")))
    }

    fn format(mut self, format: Option<&'static str>) -> Result<BackingName> {
        if self.0.contains_key("file") {
            return Err(Error::unsupported(format!("the key \"file\" names a node of one QEMU alone; {REMEDY}")));
        }
        let inside = self.0.keys().filter(|key| key.starts_with("file.")).cloned().collect::<Vec<_>>();
        let moved = inside.iter().filter_map(|key| Some((key["file.".len()..].to_owned(), self.take(key)?)));
        let mut file = Self(moved.collect());
        self.nothing_left("")?;
        if file.0.is_empty() {
            return Err(Error::malformed("the key \"file\" is missing"));
        }
        let driver = file.take("driver");
        let location = file.protocol(driver.as_deref()).map_err(|error| error.at("\"file\""))?;
        Ok(BackingName { location, format })
    }

    fn protocol(mut self, driver: Option<&str>) -> Result<Location> {
        let location = match driver {
            Some("file" | "host_device") => Location::File(self.filename()?.into()),
            None => {
                let name = self.filename()?;
                if protocol(&name).is_some() {
                    return Err(Error::unsupported(format!("{name:?} without a \"driver\": name it")));
                }
                Location::File(name.into())
            }
            Some("nbd") => Location::Nbd(self.nbd()?),
            Some(other) => {
                return Err(Error::unsupported(format!("the driver {other:?} is not supported here; {REMEDY}")));
            }
        };
        self.nothing_left(driver.unwrap_or("file"))?;
        Ok(location)
    }

    fn filename(&mut self) -> Result<String> {
        let name = self.want("filename")?;
        match name.is_empty() || name.contains('\0') {
            false => Ok(name),
            true => Err(Error::malformed(format!("the filename {name:?} is empty or has a NUL byte in it"))),
        }
    }

    /// The server by `server`, or by the older keys beside it.
    fn nbd(&mut self) -> Result<Address> {
        if self.0.contains_key("tls-creds") {
            return Err(Error::unsupported(
                "the key \"tls-creds\" names an object of one QEMU alone: name the export by \
                 nbds://HOST/EXPORT?tls-certificates=DIR, with qemu-img rebase -u",
            ));
        }
        let kind = self.take("server.type");
        let inside = if self.0.keys().any(|key| key.starts_with("server.")) { "server." } else { "" };
        let path = self.take(&format!("{inside}path"));
        let server = match (kind.as_deref(), path) {
            (Some("unix") | None, Some(path)) => Server::unix(path)?,
            (Some("inet") | None, None) => {
                let host = self.want(&format!("{inside}host"))?;
                let given_port = self.take(&format!("{inside}port"));
                Server::tcp(host, given_port.as_deref().map_or(Ok(PORT), port)?)?
            }
            (Some("unix"), None) => return Err(Error::malformed("the socket's \"path\" is missing")),
            (Some(other), _) => {
                return Err(Error::unsupported(format!(
                    "a server of type {other:?} with these keys: use inet or unix"
                )));
            }
        };
        Address::new(server, self.take("export").unwrap_or_default())
    }

    fn nothing_left(&self, driver: &str) -> Result<()> {
        match self.0.keys().find(|key| !PASSED_OVER.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let of = if driver.is_empty() { String::new() } else { format!(" of the driver {driver:?}") };
                Err(Error::unsupported(format!("the key {key:?}{of} is not supported: leave it out")))
            }
        }
    }
}

/// Takes in one value, and its keys where it is an object.
struct Level<'a> {
    keys: &'a mut BTreeMap<String, String>,
    prefix: String,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, input: D) -> std::result::Result<(), D::Error> {
        input.deserialize_any(self)
    }
}

impl Level<'_> {
    fn put<E: serde::de::Error>(self, value: impl fmt::Display) -> std::result::Result<(), E> {
        if self.depth == 0 {
            return Err(E::custom("an object is expected"));
        }
        if self.keys.len() == KEYS_MAX {
            return Err(E::custom(format!("more than {KEYS_MAX} keys")));
        }
        match self.keys.insert(self.prefix.clone(), value.to_string()) {
            None => Ok(()),
            Some(_) => Err(E::custom(format!("the key {:?} is there twice", self.prefix))),
        }
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, a text, a number or a truth value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> std::result::Result<(), A::Error> {
        if self.depth == DEPTH_MAX {
            return Err(A::Error::custom(format!("more than {DEPTH_MAX} objects inside each other")));
        }
        while let Some(key) = object.next_key::<String>()? {
            let prefix = if self.prefix.is_empty() { key } else { format!("{}.{key}", self.prefix) };
            object.next_value_seed(Level { keys: self.keys, prefix, depth: self.depth + 1 })?;
        }
        Ok(())
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<(), E> {
        self.put(text)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> std::result::Result<(), E> {
        self.put(number)
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> std::result::Result<(), E> {
        self.put(number)
    }

    fn visit_bool<E: serde::de::Error>(self, truth: bool) -> std::result::Result<(), E> {
        self.put(if truth { "on" } else { "off" })
    }
}
