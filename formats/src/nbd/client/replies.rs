//! Requests of a client, and the stream of what a server answers to them.
//!
//! Bytes of the disk are handed on as they come, in pieces; everything else is taken whole, and is short.
use super::answered::Answered;
use super::{Collector, Session};
use crate::error::{Error, Result};
use crate::nbd::reply::BLOCK_EXTENTS_MAX;
use crate::nbd::wire::{
    CHUNK_DONE, Command, Fields, Header, SIMPLE_REPLY_MAGIC, STRING_LEN_MAX, STRUCTURED_REPLY_MAGIC, chunk,
    command_flag,
};
use crate::range::ByteRange;
use std::collections::BTreeMap;

/// Longest chunk that tells of an error, in bytes: two numbers, a text, an offset.
const ERROR_LEN_MAX: u32 = 6 + STRING_LEN_MAX as u32 + 8;

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// These bytes.
    Read(ByteRange),
    /// Which of these bytes are holes, which zeroes? Only where `base:allocation` was agreed on.
    BlockStatus(ByteRange),
    /// These bytes are written: they follow the request.
    Write(ByteRange),
    /// These bytes read as zeroes from now on. Only where the export has WRITE_ZEROES.
    Zero {
        /// Which.
        range: ByteRange,
        /// Their space stays taken.
        keep: bool,
    },
    /// What was answered is made durable. Only where the export has FLUSH.
    Flush,
}

impl Ask {
    /// The bytes that it is about; none of a flush.
    pub fn range(self) -> ByteRange {
        match self {
            Self::Read(range) | Self::BlockStatus(range) | Self::Write(range) | Self::Zero { range, .. } => range,
            Self::Flush => ByteRange { start: 0, end: 0 },
        }
    }

    fn command(self) -> (Command, u16) {
        match self {
            Self::Read(_) => (Command::Read, 0),
            Self::BlockStatus(_) => (Command::BlockStatus, 0),
            Self::Write(_) => (Command::Write, 0),
            Self::Zero { keep: false, .. } => (Command::WriteZeroes, 0),
            Self::Zero { keep: true, .. } => (Command::WriteZeroes, command_flag::NO_HOLE),
            Self::Flush => (Command::Flush, 0),
        }
    }
}

/// What a server says of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// These are the bytes from `at` on.
    Data {
        /// Of which request.
        cookie: u64,
        /// Offset on the disk.
        at: u64,
        /// The bytes, inside what was asked for.
        bytes: &'a [u8],
    },
    /// These bytes are zeroes.
    Zero {
        /// Of which request.
        cookie: u64,
        /// The bytes, inside what was asked for.
        range: ByteRange,
    },
    /// The next extent, from the asked range's start on.
    Extent {
        /// Of which request.
        cookie: u64,
        /// The bytes, cut to what was asked for; never empty.
        range: ByteRange,
        /// Flags; see `wire::state`.
        state: u32,
    },
    /// All is said.
    Done {
        /// Of which request.
        cookie: u64,
        /// Whether it was done.
        outcome: std::result::Result<(), Failure>,
    },
}

/// A request that the server did not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The protocol's error number, which is Linux's too.
    pub errno: u32,
    /// What the server adds in words; may be empty.
    pub message: String,
}

/// The requests of one connection that are not answered yet, and the stream of their answers.
#[derive(Debug)]
pub struct Replies {
    session: Session,
    pending: BTreeMap<u64, Pending>,
    cookie: u64,
    state: State,
    collector: Collector,
}

#[derive(Debug)]
struct Pending {
    ask: Ask,
    answered: Answered,
    /// Up to here the extents came.
    extents_end: u64,
    failure: Option<Failure>,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum State {
    Magic,
    SimpleHead,
    /// The rest of a simple reply's bytes.
    SimpleData {
        cookie: u64,
        left: ByteRange,
    },
    ChunkHead,
    /// The first bytes of a chunk's content, which say what the others are.
    ChunkStart(Chunk),
    /// The rest of a chunk of bytes.
    ChunkData {
        chunk: Chunk,
        left: ByteRange,
    },
    /// So many extents more.
    Extents {
        chunk: Chunk,
        left: u32,
    },
}

/// The head of a chunk.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    done: bool,
    kind: u16,
    cookie: u64,
    len: u32,
}

/// Bytes of one extent.
const BLOCK_EXTENT_LEN: usize = 8;
/// The head of a simple reply behind its magic, and of a chunk.
const SIMPLE_HEAD_LEN: usize = 12;
const CHUNK_HEAD_LEN: usize = 16;

impl Replies {
    /// The requests of a connection that has just been negotiated.
    pub fn new(session: Session) -> Self {
        Self { session, pending: BTreeMap::new(), cookie: 0, state: State::Magic, collector: Collector::default() }
    }

    /// What was agreed on.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// How many requests are under way.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Puts a request behind what is in `out`; the answer is its cookie. What is asked for is inside the
    /// disk, not empty, below 4 GiB, and aligned as the export wants it. Bytes to write follow at once.
    pub fn ask(&mut self, ask: Ask, out: &mut Vec<u8>) -> u64 {
        self.cookie += 1;
        let ((command, flags), range) = (ask.command(), ask.range());
        let (cookie, offset, len) = (self.cookie, range.start, range.len());
        let inside = !range.is_empty() && range.end <= self.session.size;
        assert!(inside || ask == Ask::Flush, "a request inside the disk");
        out.extend_from_slice(&Header { flags, command: command as u16, cookie, offset, len }.to_bytes());
        let answered = Answered::new(range);
        self.pending.insert(cookie, Pending { ask, answered, extents_end: range.start, failure: None });
        cookie
    }

    /// The request that says that no other follows.
    pub fn goodbye(out: &mut Vec<u8>) {
        let command = Command::Disconnect as u16;
        out.extend_from_slice(&Header { flags: 0, command, cookie: 0, offset: 0, len: 0 }.to_bytes());
    }

    /// Takes bytes off the front of `input`. With `None` all of it was taken.
    pub fn step<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>> {
        loop {
            let event = match self.state {
                State::SimpleData { cookie, left } => match self.data(input, cookie, left) {
                    Some((event, left)) => {
                        self.state = State::SimpleData { cookie, left };
                        Some(event)
                    }
                    None if !left.is_empty() => return Ok(None),
                    None => Some(self.finish(cookie)?),
                },
                State::ChunkData { chunk, left } => match self.data(input, chunk.cookie, left) {
                    Some((event, left)) => {
                        self.state = State::ChunkData { chunk, left };
                        Some(event)
                    }
                    None if !left.is_empty() => return Ok(None),
                    None => self.end_chunk(chunk)?,
                },
                State::Extents { chunk, left: 0 } => self.end_chunk(chunk)?,
                state => {
                    let Some(unit) = self.collector.take(input, unit_len(state)) else { return Ok(None) };
                    let mut fields = Fields(&unit);
                    match state {
                        State::Magic => self.magic(&mut fields)?,
                        State::SimpleHead => self.simple_head(&mut fields)?,
                        State::ChunkHead => self.chunk_head(&mut fields)?,
                        State::ChunkStart(chunk) => self.chunk_start(chunk, &mut fields)?,
                        State::Extents { chunk, left } => self.extent(chunk, left, &mut fields)?,
                        State::SimpleData { .. } | State::ChunkData { .. } => unreachable!("taken in pieces above"),
                    }
                }
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    /// Bytes of the disk, as many as there are, and which are left.
    fn data<'a>(&self, input: &mut &'a [u8], cookie: u64, left: ByteRange) -> Option<(Event<'a>, ByteRange)> {
        let len = (input.len() as u64).min(left.len());
        if len == 0 {
            return None;
        }
        let (bytes, rest) = input.split_at(len as usize);
        *input = rest;
        Some((Event::Data { cookie, at: left.start, bytes }, ByteRange { start: left.start + len, end: left.end }))
    }

    fn magic<'a>(&mut self, fields: &mut Fields<'_>) -> Result<Option<Event<'a>>> {
        self.state = match fields.u32().unwrap_or_default() {
            SIMPLE_REPLY_MAGIC => State::SimpleHead,
            STRUCTURED_REPLY_MAGIC if self.session.structured_replies => State::ChunkHead,
            other => return Err(Error::malformed(format!("a reply begins with {other:#010x}"))),
        };
        Ok(None)
    }

    fn simple_head<'a>(&mut self, fields: &mut Fields<'_>) -> Result<Option<Event<'a>>> {
        let (errno, cookie) = (fields.u32().unwrap_or_default(), fields.u64().unwrap_or_default());
        let structured = self.session.structured_replies;
        let pending = self.request(cookie)?;
        match (pending.ask, errno) {
            (Ask::Read(_), _) if structured => {
                Err(Error::malformed("a read is answered without chunks, which were agreed on"))
            }
            (_, 1..) => {
                pending.failure = Some(Failure { errno, message: String::new() });
                self.finish(cookie).map(Some)
            }
            (Ask::Read(range), 0) => {
                pending.answered.add(range)?;
                self.state = State::SimpleData { cookie, left: range };
                Ok(None)
            }
            (Ask::BlockStatus(_), 0) => Err(Error::malformed("a block status is answered without extents")),
            (Ask::Write(_) | Ask::Zero { .. } | Ask::Flush, 0) => self.finish(cookie).map(Some),
        }
    }

    fn chunk_head<'a>(&mut self, fields: &mut Fields<'_>) -> Result<Option<Event<'a>>> {
        let (Some(flags), Some(kind), Some(cookie), Some(len)) =
            (fields.u16(), fields.u16(), fields.u64(), fields.u32())
        else {
            unreachable!("a unit has its length");
        };
        if flags & !CHUNK_DONE != 0 {
            return Err(Error::malformed(format!("a chunk has the flags {flags:#x}")));
        }
        let done = flags & CHUNK_DONE != 0;
        let ask = self.request(cookie)?.ask;
        let fits = match (kind, ask) {
            (chunk::NONE, _) => len == 0 && done,
            (chunk::OFFSET_DATA, Ask::Read(range)) => len > 8 && u64::from(len) - 8 <= range.len(),
            (chunk::OFFSET_HOLE, Ask::Read(_)) => len == 12,
            (chunk::BLOCK_STATUS, Ask::BlockStatus(_)) => {
                let extents = len.saturating_sub(4) as usize / BLOCK_EXTENT_LEN;
                len % BLOCK_EXTENT_LEN as u32 == 4 && (1..=BLOCK_EXTENTS_MAX).contains(&extents)
            }
            (chunk::ERROR_BIT.., _) => (6..=ERROR_LEN_MAX).contains(&len),
            _ => return Err(Error::malformed(format!("{ask:?} is answered with a chunk of the type {kind}"))),
        };
        if !fits {
            return Err(Error::malformed(format!("a chunk of the type {kind} has {len} bytes (done: {done})")));
        }
        let chunk = Chunk { done, kind, cookie, len };
        if kind == chunk::NONE {
            return self.end_chunk(chunk);
        }
        self.state = State::ChunkStart(chunk);
        Ok(None)
    }

    fn chunk_start<'a>(&mut self, chunk: Chunk, fields: &mut Fields<'_>) -> Result<Option<Event<'a>>> {
        let Chunk { kind, cookie, len, .. } = chunk;
        match kind {
            chunk::OFFSET_DATA => {
                let left = self.answer(cookie, fields.u64().unwrap_or_default(), u64::from(len) - 8)?;
                self.state = State::ChunkData { chunk, left };
                Ok(None)
            }
            chunk::OFFSET_HOLE => {
                let (at, len) = (fields.u64().unwrap_or_default(), fields.u32().unwrap_or_default());
                let range = self.answer(cookie, at, len.into())?;
                let left = ByteRange { start: range.end, end: range.end };
                self.state = State::ChunkData { chunk, left };
                Ok(Some(Event::Zero { cookie, range }))
            }
            chunk::BLOCK_STATUS => {
                let context = fields.u32();
                if context != self.session.base_allocation {
                    return Err(Error::malformed(format!("extents of a context {context:?} that was not agreed on")));
                }
                let pending = self.request(cookie)?;
                let asked = pending.ask.range();
                if pending.extents_end > asked.start {
                    return Err(Error::malformed(format!("the extents of {asked} come twice")));
                }
                self.state = State::Extents { chunk, left: (len - 4) / BLOCK_EXTENT_LEN as u32 };
                Ok(None)
            }
            _ => {
                let failure = failure(fields)?;
                self.request(cookie)?.failure.get_or_insert(failure);
                self.end_chunk(chunk)
            }
        }
    }

    fn extent<'a>(&mut self, chunk: Chunk, left: u32, fields: &mut Fields<'_>) -> Result<Option<Event<'a>>> {
        let (len, state) = (fields.u32().unwrap_or_default(), fields.u32().unwrap_or_default());
        let pending = self.request(chunk.cookie)?;
        let asked = pending.ask.range();
        let start = pending.extents_end;
        if len == 0 || start >= asked.end {
            return Err(Error::malformed(format!("an extent of {len} bytes at {start} in the status of {asked}")));
        }
        // The last one may go on behind what was asked for.
        let range = ByteRange { start, end: asked.end.min(start + u64::from(len)) };
        pending.extents_end = range.end;
        self.state = State::Extents { chunk, left: left - 1 };
        Ok(Some(Event::Extent { cookie: chunk.cookie, range, state }))
    }

    /// Notes that these bytes are answered.
    fn answer(&mut self, cookie: u64, at: u64, len: u64) -> Result<ByteRange> {
        let range = ByteRange::new(at, len);
        let range = range.ok_or_else(|| Error::malformed(format!("a chunk of {len} bytes at {at}")))?;
        self.request(cookie)?.answered.add(range)?;
        Ok(range)
    }

    fn end_chunk<'a>(&mut self, chunk: Chunk) -> Result<Option<Event<'a>>> {
        self.state = State::Magic;
        if chunk.done { self.finish(chunk.cookie).map(Some) } else { Ok(None) }
    }

    fn finish<'a>(&mut self, cookie: u64) -> Result<Event<'a>> {
        self.state = State::Magic;
        let pending = self.pending.remove(&cookie).ok_or_else(|| no_request(cookie))?;
        if let Some(failure) = pending.failure {
            return Ok(Event::Done { cookie, outcome: Err(failure) });
        }
        let whole = match pending.ask {
            Ask::Read(_) => pending.answered.is_whole(),
            // A prefix is an answer.
            Ask::BlockStatus(range) => pending.extents_end > range.start,
            // The word that it is done is all that there is.
            Ask::Write(_) | Ask::Zero { .. } | Ask::Flush => true,
        };
        match whole {
            true => Ok(Event::Done { cookie, outcome: Ok(()) }),
            false => Err(Error::malformed(format!("the answer to {:?} ends without all of it", pending.ask))),
        }
    }

    fn request(&mut self, cookie: u64) -> Result<&mut Pending> {
        self.pending.get_mut(&cookie).ok_or_else(|| no_request(cookie))
    }
}

fn unit_len(state: State) -> usize {
    match state {
        State::Magic => 4,
        State::SimpleHead => SIMPLE_HEAD_LEN,
        State::ChunkHead => CHUNK_HEAD_LEN,
        State::ChunkStart(Chunk { kind, len, .. }) => match kind {
            chunk::OFFSET_DATA => 8,
            chunk::BLOCK_STATUS => 4,
            // A hole or an error.
            _ => len as usize,
        },
        State::Extents { .. } => BLOCK_EXTENT_LEN,
        State::SimpleData { .. } | State::ChunkData { .. } => 0,
    }
}

/// A number and a text behind its length; an offset may follow.
fn failure(fields: &mut Fields<'_>) -> Result<Failure> {
    let (errno, len) = (fields.u32().unwrap_or_default(), fields.u16().unwrap_or_default());
    let words = fields.bytes(len.into()).filter(|_| errno != 0);
    let words = words.ok_or_else(|| Error::malformed(format!("an error {errno} with a text of {len} bytes")))?;
    Ok(Failure { errno, message: String::from_utf8_lossy(words).into_owned() })
}

fn no_request(cookie: u64) -> Error {
    Error::malformed(format!("a reply to the request {cookie:#x}, which is not under way"))
}
