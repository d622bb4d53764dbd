//! A small NBD client: blocking, several requests in flight, and it knows which were answered.
//!
//! Its answers are taken in by a thread of their own, as a client must that has much in flight: a server
//! may stop reading requests until its answers are read.
use super::PATIENCE;
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_ERROR_BIT: u16 = 1 << 15;
const CHUNK_DONE: u16 = 1;

/// How the server is to answer reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Replies {
    /// A header, then the bytes.
    Simple,
    /// Chunks of data and holes.
    Structured,
}

/// One request.
#[derive(Clone, PartialEq)]
pub enum Request {
    /// `len` bytes from `at`.
    Read { at: u64, len: u32 },
    /// `bytes` to `at`.
    Write { at: u64, bytes: Vec<u8> },
    /// Zeroes; `keep` is NO_HOLE.
    Zero { at: u64, len: u32, keep: bool },
    /// A discard.
    Trim { at: u64, len: u32 },
    /// What was answered before is durable.
    Flush,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { at, len } => write!(f, "read of {len} bytes at {at}"),
            Self::Write { at, bytes } => write!(f, "write of {} bytes at {at}", bytes.len()),
            Self::Zero { at, len, keep } => write!(f, "write-zeroes of {len} bytes at {at} (keep: {keep})"),
            Self::Trim { at, len } => write!(f, "trim of {len} bytes at {at}"),
            Self::Flush => write!(f, "flush"),
        }
    }
}

/// What came back for one request.
#[derive(Debug)]
pub struct Answer {
    /// The number that `send` gave.
    pub cookie: u64,
    /// A read's bytes (none for the others), or the protocol's error number.
    pub result: Result<Vec<u8>, u32>,
}

/// One connection to one export.
pub struct Client {
    stream: UnixStream,
    info: Info,
    cookie: u64,
    in_flight: InFlight,
    answers: Receiver<io::Result<Answer>>,
}

/// What the server says of the export.
#[derive(Default)]
struct Info {
    size: u64,
    flags: u16,
    block_min: u32,
}

impl Info {
    fn take(&mut self, info: &[u8]) -> io::Result<()> {
        let field = |from: usize, to: usize| info.get(from..to).ok_or_else(|| broken("info, which is too short"));
        match u16::from_be_bytes(array(field(0, 2)?)) {
            INFO_EXPORT => {
                self.size = u64::from_be_bytes(array(field(2, 10)?));
                self.flags = u16::from_be_bytes(array(field(10, 12)?));
            }
            INFO_BLOCK_SIZE => self.block_min = u32::from_be_bytes(array(field(2, 6)?)),
            _ => (),
        }
        Ok(())
    }
}

type InFlight = Arc<Mutex<HashMap<u64, Pending>>>;

/// What was asked and not answered yet.
struct Pending {
    at: u64,
    /// A read's bytes, as far as they came; what never comes stays `0xa5`.
    bytes: Vec<u8>,
    error: Option<u32>,
}

impl Client {
    /// Connects and chooses `export`.
    pub fn connect(socket: &Path, export: &str, replies: Replies) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let info = Handshake(&stream).choose(export, replies)?;
        let in_flight = InFlight::default();
        // From here on the server is silent while nothing is asked.
        stream.set_read_timeout(None)?;
        let mut reader = Reader { stream: stream.try_clone()?, in_flight: in_flight.clone() };
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            loop {
                let answer = reader.receive();
                let over = answer.is_err();
                if sender.send(answer).is_err() || over {
                    return;
                }
            }
        });
        Ok(Self { stream, info, cookie: 0, in_flight, answers })
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.info.size
    }

    /// The export's transmission flags.
    pub fn flags(&self) -> u16 {
        self.info.flags
    }

    /// What requests have to be multiples of, in bytes.
    pub fn block_min(&self) -> u32 {
        self.info.block_min.max(1)
    }

    /// Sends a request and does not wait; returns its cookie.
    ///
    /// A connection that is gone is noticed by `receive`, behind the answers that came before its end.
    pub fn send(&mut self, request: &Request) -> u64 {
        let (flags, command, at, len) = match request {
            Request::Read { at, len } => (0u16, 0u16, *at, *len),
            Request::Write { at, bytes } => (0, 1, *at, bytes.len() as u32),
            Request::Flush => (0, 3, 0, 0),
            Request::Trim { at, len } => (0, 4, *at, *len),
            Request::Zero { at, len, keep } => (if *keep { 2 } else { 0 }, 6, *at, *len),
        };
        self.cookie += 1;
        let mut message = Vec::with_capacity(28);
        message.extend(REQUEST_MAGIC.to_be_bytes());
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(self.cookie.to_be_bytes());
        message.extend(at.to_be_bytes());
        message.extend(len.to_be_bytes());
        if let Request::Write { bytes, .. } = request {
            message.extend_from_slice(bytes);
        }
        let room = if matches!(request, Request::Read { .. }) { len as usize } else { 0 };
        let pending = Pending { at, bytes: vec![0xa5; room], error: None };
        self.in_flight.lock().expect("no thread died").insert(self.cookie, pending);
        let _ = self.stream.write_all(&message);
        self.cookie
    }

    /// Waits for one answer. Something must be in flight.
    ///
    /// An error is the end of the connection. A server that is silent fails the test.
    #[track_caller]
    pub fn receive(&mut self) -> io::Result<Answer> {
        match self.answers.recv_timeout(PATIENCE) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => Err(broken("connection is over")),
            Err(RecvTimeoutError::Timeout) => panic!("the server does not answer"),
        }
    }

    /// One request, and its answer. Nothing else may be in flight.
    #[track_caller]
    pub fn ask(&mut self, request: &Request) -> Vec<u8> {
        self.send(request);
        let answer = self.receive().unwrap_or_else(|error| panic!("{request}: {error}"));
        answer.result.unwrap_or_else(|number| panic!("{request}: error {number}"))
    }

    /// The whole disk.
    #[track_caller]
    pub fn content(&mut self) -> Vec<u8> {
        self.try_content().unwrap_or_else(|error| panic!("reading the whole disk: {error}"))
    }

    /// The whole disk, where the server lives as long.
    #[track_caller]
    pub fn try_content(&mut self) -> io::Result<Vec<u8>> {
        const STEP: u64 = 1 << 20;
        let mut bytes = Vec::with_capacity(self.size() as usize);
        while (bytes.len() as u64) < self.size() {
            let at = bytes.len() as u64;
            let read = Request::Read { at, len: STEP.min(self.size() - at) as u32 };
            self.send(&read);
            bytes.extend(self.receive()?.result.unwrap_or_else(|number| panic!("{read}: error {number}")));
        }
        Ok(bytes)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// The talk before the first request.
struct Handshake<'a>(&'a UnixStream);

impl Handshake<'_> {
    fn choose(&mut self, export: &str, replies: Replies) -> io::Result<Info> {
        if take(self.0, 16)? != *b"NBDMAGICIHAVEOPT" {
            return Err(broken("greeting"));
        }
        let offered = u16::from_be_bytes(array(&take(self.0, 2)?));
        self.0.write_all(&u32::from(offered & 3).to_be_bytes())?;
        if replies == Replies::Structured {
            self.option(OPTION_STRUCTURED_REPLY, &[])?;
            if self.option_reply(OPTION_STRUCTURED_REPLY)?.0 != REPLY_ACK {
                return Err(broken("answer to the wish for structured replies"));
            }
        }
        let mut wish = (export.len() as u32).to_be_bytes().to_vec();
        wish.extend(export.as_bytes());
        wish.extend(1u16.to_be_bytes());
        wish.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.option(OPTION_GO, &wish)?;
        let mut info = Info::default();
        loop {
            match self.option_reply(OPTION_GO)? {
                (REPLY_ACK, _) => return Ok(info),
                (REPLY_INFO, bytes) => info.take(&bytes)?,
                (other, text) => {
                    let text = String::from_utf8_lossy(&text).into_owned();
                    return Err(broken(format!("reply {other:#x} to GO: {text}")));
                }
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut message = OPTION_MAGIC.to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend_from_slice(data);
        self.0.write_all(&message)
    }

    fn option_reply(&mut self, option: u32) -> io::Result<(u32, Vec<u8>)> {
        let header = take(self.0, 20)?;
        let word = |from: usize| u32::from_be_bytes(array(&header[from..from + 4]));
        if header[..8] != OPTION_REPLY_MAGIC.to_be_bytes() || word(8) != option {
            return Err(broken("reply to an option"));
        }
        Ok((word(12), take(self.0, word(16) as usize)?))
    }
}

/// Takes answers in.
struct Reader {
    stream: UnixStream,
    in_flight: InFlight,
}

impl Reader {
    /// The next whole answer.
    fn receive(&mut self) -> io::Result<Answer> {
        loop {
            let answer = match self.u32()? {
                SIMPLE_MAGIC => Some(self.simple_reply()?),
                STRUCTURED_MAGIC => self.structured_chunk()?,
                other => return Err(broken(format!("reply magic {other:#x}"))),
            };
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
    }

    fn simple_reply(&mut self) -> io::Result<Answer> {
        let error = self.u32()?;
        let cookie = self.u64()?;
        let mut bytes = self.finish(cookie)?.bytes;
        if error != 0 {
            return Ok(Answer { cookie, result: Err(error) });
        }
        self.stream.read_exact(&mut bytes)?;
        Ok(Answer { cookie, result: Ok(bytes) })
    }

    /// One chunk of an answer; the answer where it was the last one.
    fn structured_chunk(&mut self) -> io::Result<Option<Answer>> {
        let flags = self.u16()?;
        let kind = self.u16()?;
        let cookie = self.u64()?;
        let len = self.u32()? as usize;
        let body = take(&self.stream, len)?;
        match kind {
            0 => (),
            CHUNK_DATA | CHUNK_HOLE => self.fill(cookie, kind, &body)?,
            kind if kind & CHUNK_ERROR_BIT != 0 && len >= 6 => {
                let mut in_flight = self.in_flight.lock().expect("no thread died");
                let pending = in_flight.get_mut(&cookie);
                pending.ok_or_else(|| broken("error for nothing that was asked"))?.error =
                    Some(u32::from_be_bytes(array(&body[..4])));
            }
            other => return Err(broken(format!("chunk type {other}"))),
        }
        if flags & CHUNK_DONE == 0 {
            return Ok(None);
        }
        let Pending { bytes, error, .. } = self.finish(cookie)?;
        Ok(Some(Answer { cookie, result: error.map_or(Ok(bytes), Err) }))
    }

    /// Puts a chunk of data, or a hole, in its place.
    fn fill(&mut self, cookie: u64, kind: u16, body: &[u8]) -> io::Result<()> {
        let mut in_flight = self.in_flight.lock().expect("no thread died");
        let pending = in_flight.get_mut(&cookie).ok_or_else(|| broken("chunk for nothing that was asked"))?;
        let (at, rest) = body.split_first_chunk::<8>().ok_or_else(|| broken("chunk without its offset"))?;
        let len = match kind {
            CHUNK_HOLE => u32::from_be_bytes(rest.try_into().map_err(|_| broken("hole without its length"))?) as usize,
            _ => rest.len(),
        };
        let from = u64::from_be_bytes(*at).checked_sub(pending.at).ok_or_else(|| broken("chunk before its read"))?;
        let place = usize::try_from(from).ok().and_then(|from| pending.bytes.get_mut(from..from.checked_add(len)?));
        match place.ok_or_else(|| broken("chunk behind its read"))? {
            place if kind == CHUNK_HOLE => place.fill(0),
            place => place.copy_from_slice(rest),
        }
        Ok(())
    }

    fn finish(&mut self, cookie: u64) -> io::Result<Pending> {
        let pending = self.in_flight.lock().expect("no thread died").remove(&cookie);
        pending.ok_or_else(|| broken(format!("answer to {cookie}, which was not asked")))
    }

    fn u16(&mut self) -> io::Result<u16> {
        Ok(u16::from_be_bytes(array(&take(&self.stream, 2)?)))
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(array(&take(&self.stream, 4)?)))
    }

    fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_be_bytes(array(&take(&self.stream, 8)?)))
    }
}

fn take(mut stream: &UnixStream, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("a length that was checked")
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server's {}", what.into()))
}
