//! A minimal NBD client that waits: one request at a time, simple replies.
use crate::failure::Failure;
use formats::nbd::reply::SIMPLE_REPLY_LEN;
use formats::nbd::wire::{
    Command, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, handshake_flag, info, opt,
    rep,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long an answer may take before the disk counts as dead.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Longest reply to an option that is worth reading, in bytes.
const OPTION_REPLY_LEN_MAX: u32 = 64 << 10;

/// A connection to one export.
pub struct Nbd {
    stream: UnixStream,
    cookie: u64,
    len: u64,
}

impl Nbd {
    /// Connects to `export` of the server at `socket`.
    ///
    /// # Errors
    /// What the server did otherwise than the protocol says, or the system's.
    pub fn connect(socket: &Path, export: &str) -> Result<Self, Failure> {
        let at =
            |error: io::Error| Failure::new(format!("{}: NBD handshake for '{export}': {error}", socket.display()));
        let mut stream = UnixStream::connect(socket).map_err(at)?;
        stream.set_read_timeout(Some(ANSWER_MAX)).map_err(at)?;
        let len = handshake(&mut stream, export).map_err(at)?;
        Ok(Self { stream, cookie: 0, len })
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// The server's number, or the system's.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        self.request(Command::Read, offset, bytes.len(), &[])?;
        self.stream.read_exact(bytes).map_err(|error| self.failed(Command::Read, offset, &error))
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// As for `read`.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.request(Command::Write, offset, bytes.len(), bytes)
    }

    /// Makes `len` bytes from `offset` on read as zeroes.
    ///
    /// # Errors
    /// As for `read`.
    pub fn write_zeroes(&mut self, offset: u64, len: usize) -> Result<(), Failure> {
        self.request(Command::WriteZeroes, offset, len, &[])
    }

    /// Makes durable what was acknowledged.
    ///
    /// # Errors
    /// As for `read`.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.request(Command::Flush, 0, 0, &[])
    }

    fn request(&mut self, command: Command, offset: u64, len: usize, payload: &[u8]) -> Result<(), Failure> {
        self.cookie += 1;
        let failed = |error: &io::Error| failed(command, offset, error);
        let mut message = Vec::with_capacity(28 + payload.len());
        message.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        message.extend_from_slice(&[0, 0]);
        message.extend_from_slice(&(command as u16).to_be_bytes());
        message.extend_from_slice(&self.cookie.to_be_bytes());
        message.extend_from_slice(&offset.to_be_bytes());
        message.extend_from_slice(&(len as u32).to_be_bytes());
        message.extend_from_slice(payload);
        self.stream.write_all(&message).map_err(|error| failed(&error))?;
        let mut reply = [0; SIMPLE_REPLY_LEN];
        self.stream.read_exact(&mut reply).map_err(|error| failed(&error))?;
        let (magic, error, cookie) = (be32(&reply[..4]), be32(&reply[4..8]), be64(&reply[8..]));
        match (magic, cookie == self.cookie, error) {
            (SIMPLE_REPLY_MAGIC, true, 0) => Ok(()),
            (SIMPLE_REPLY_MAGIC, true, error) => Err(failed(&io::Error::from_raw_os_error(error as i32))),
            _ => Err(failed(&broken("a reply that is none to this request"))),
        }
    }

    fn failed(&self, command: Command, offset: u64, error: &io::Error) -> Failure {
        failed(command, offset, error)
    }
}

fn failed(command: Command, offset: u64, error: &io::Error) -> Failure {
    Failure::new(format!("the guest's {command:?} at {offset}: {error}"))
}

/// Fixed newstyle, GO. Returns the disk's length.
fn handshake(stream: &mut UnixStream, export: &str) -> io::Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if be64(&greeting[..8]) != NBD_MAGIC || be64(&greeting[8..16]) != OPTION_MAGIC {
        return Err(broken("not a newstyle NBD server"));
    }
    let flags = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    let mut message = flags.to_be_bytes().to_vec();
    message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    message.extend_from_slice(&opt::GO.to_be_bytes());
    message.extend_from_slice(&(export.len() as u32 + 6).to_be_bytes());
    message.extend_from_slice(&(export.len() as u32).to_be_bytes());
    message.extend_from_slice(export.as_bytes());
    message.extend_from_slice(&[0, 0]);
    stream.write_all(&message)?;
    let mut len = None;
    loop {
        let (kind, data) = option_reply(stream)?;
        match kind {
            rep::ACK => return len.ok_or_else(|| broken("an export without a size")),
            rep::INFO if data.len() == 12 && data[..2] == info::EXPORT.to_be_bytes() => len = Some(be64(&data[2..10])),
            rep::INFO => {}
            error => return Err(broken(&format!("refused ({error:#x}): {}", String::from_utf8_lossy(&data)))),
        }
    }
}

fn option_reply(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let (magic, kind, len) = (be64(&head[..8]), be32(&head[12..16]), be32(&head[16..]));
    if magic != OPTION_REPLY_MAGIC || len > OPTION_REPLY_LEN_MAX {
        return Err(broken("an option's reply that is none"));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
