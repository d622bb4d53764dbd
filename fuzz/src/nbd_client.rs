//! Any server: what it answers to reads and questions of extents, in pieces, against answers taken in again
//! from the protocol's sentences.
//!
//! The right answer is known for every input: which bytes of each read are there and what they are, which
//! extents, which requests are over and how, and whether the server broke the protocol. And whatever it says
//! in the negotiation, the client asks or ends it; what it agrees to can be. Where it has to go inside TLS, nothing
//! is said in plain but that, and nothing that came in plain is heard inside.
use arbitrary::{Arbitrary, Unstructured};
use formats::nbd::client::{Ask, Event, Negotiation, Next, Replies, Session};
use formats::nbd::{Address, BlockSizes, Server, TlsNames};
use formats::range::ByteRange;

const CONTEXT: u32 = 9;
const DISK_LEN: u64 = 1 << 20;
const RUNS_MAX: usize = 1024;

#[derive(Arbitrary, Debug)]
struct Input {
    structured: bool,
    /// Extents or bytes, from where, how many.
    asks: [(bool, u16, u8); 3],
    said: Vec<Said>,
    piece: u8,
    negotiation: Vec<u8>,
}

/// Something that a server says: of a request's own bytes, or of any.
#[derive(Arbitrary, Debug)]
enum Said {
    Data { request: u8, skip: u8, len: u8, done: bool, fill: u8 },
    Hole { request: u8, skip: u8, len: u8, done: bool },
    Extents { request: u8, context: bool, extents: Vec<(u8, u8)>, done: bool },
    Error { request: u8, errno: u8, words: u8, offset: bool, done: bool },
    None { request: u8 },
    Simple { request: u8, errno: u8, fill: u8 },
    Chunk { flags: u8, kind: u16, request: u8, len: u16 },
    Bytes(Vec<u8>),
}

/// One request, as the model sees it.
#[derive(Clone, Debug, PartialEq)]
struct Request {
    extents: bool,
    start: u64,
    bytes: Vec<Option<u8>>,
    found: Vec<(u64, u64, u32)>,
    failed: Option<u32>,
    over: bool,
}

/// The server broke the protocol.
#[derive(Debug, PartialEq)]
struct Broken;

impl Request {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// These bytes are answered, for the first time.
    fn place(&self, at: u64, len: u64) -> Result<usize, Broken> {
        let inside = len > 0 && at >= self.start && at.checked_add(len).is_some_and(|end| end <= self.end());
        let from = at.wrapping_sub(self.start) as usize;
        match inside && self.bytes[from..][..len as usize].iter().all(Option::is_none) {
            true => Ok(from),
            false => Err(Broken),
        }
    }

    /// Answered in few enough pieces, with `from..to` among them.
    fn check_runs(&self, from: usize, to: usize) -> Result<(), Broken> {
        let there = |at: &usize| self.bytes[*at].is_some() || (from..to).contains(at);
        let starts = (0..self.bytes.len()).filter(|at| there(at) && (*at == 0 || !there(&(at - 1))));
        if starts.count() > RUNS_MAX { Err(Broken) } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), Broken> {
        self.over = true;
        let whole = if self.extents { !self.found.is_empty() } else { self.bytes.iter().all(Option::is_some) };
        if self.failed.is_some() || whole { Ok(()) } else { Err(Broken) }
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// The next `len` bytes, all of them or none.
fn take<'a>(said: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (head, rest) = said.split_at_checked(len)?;
    *said = rest;
    Some(head)
}

fn find(requests: &mut [Request], cookie: u64) -> Result<&mut Request, Broken> {
    let request = requests.get_mut((cookie as usize).wrapping_sub(1)).filter(|_| cookie < 1 << 32);
    request.filter(|request| !request.over).ok_or(Broken)
}

/// Takes in one message. `Ok(None)` where it is not all there.
fn message(structured: bool, requests: &mut [Request], said: &mut &[u8]) -> Result<Option<()>, Broken> {
    let Some(magic) = take(said, 4) else { return Ok(None) };
    match magic {
        [0x67, 0x44, 0x66, 0x98] => simple(structured, requests, said),
        [0x66, 0x8e, 0x33, 0xef] if structured => chunk(requests, said),
        _ => Err(Broken),
    }
}

fn simple(structured: bool, requests: &mut [Request], said: &mut &[u8]) -> Result<Option<()>, Broken> {
    let Some(head) = take(said, 12) else { return Ok(None) };
    let (errno, request) = (number(&head[..4]) as u32, find(requests, number(&head[4..]))?);
    if errno != 0 && (request.extents || !structured) {
        request.failed = Some(errno);
        return request.finish().map(Some);
    }
    if request.extents || structured {
        return Err(Broken);
    }
    let came = request.bytes.len().min(said.len());
    let bytes = take(said, came).expect("as many as there are");
    request.bytes.iter_mut().zip(bytes).for_each(|(place, byte)| *place = Some(*byte));
    if came < request.bytes.len() { Ok(None) } else { request.finish().map(Some) }
}

fn chunk(requests: &mut [Request], said: &mut &[u8]) -> Result<Option<()>, Broken> {
    let Some(head) = take(said, 16) else { return Ok(None) };
    let (flags, kind, len) = (number(&head[..2]), number(&head[2..4]), number(&head[12..]));
    let request = find(requests, number(&head[4..12]))?;
    let (done, wanted) = (flags == 1, request.bytes.len() as u64);
    let fits = match (kind, request.extents) {
        (0, _) => len == 0 && done,
        (1, false) => (9..=8 + wanted).contains(&len),
        (2, false) => len == 12,
        (5, true) => (12..=4 + (8 << 20)).contains(&len) && len % 8 == 4,
        (0x8000.., _) => (6..=6 + 4096 + 8).contains(&len),
        _ => false,
    };
    if flags > 1 || !fits {
        return Err(Broken);
    }
    let over = match kind {
        0 => Some(()),
        1 => data(request, said, len - 8)?,
        2 => hole(request, said)?,
        5 => extents(request, said, (len - 4) / 8)?,
        _ => error(request, said, len as usize)?,
    };
    match over {
        None => Ok(None),
        Some(()) if done => request.finish().map(Some),
        Some(()) => Ok(Some(())),
    }
}

fn data(request: &mut Request, said: &mut &[u8], len: u64) -> Result<Option<()>, Broken> {
    let Some(at) = take(said, 8) else { return Ok(None) };
    let from = request.place(number(at), len)?;
    request.check_runs(from, from + len as usize)?;
    let came = said.len().min(len as usize);
    let bytes = take(said, came).expect("as many as there are");
    request.bytes[from..][..came].iter_mut().zip(bytes).for_each(|(place, byte)| *place = Some(*byte));
    Ok((came as u64 == len).then_some(()))
}

fn hole(request: &mut Request, said: &mut &[u8]) -> Result<Option<()>, Broken> {
    let Some(hole) = take(said, 12) else { return Ok(None) };
    let len = number(&hole[8..]);
    let from = request.place(number(&hole[..8]), len)?;
    request.check_runs(from, from + len as usize)?;
    request.bytes[from..][..len as usize].fill(Some(0));
    Ok(Some(()))
}

fn extents(request: &mut Request, said: &mut &[u8], count: u64) -> Result<Option<()>, Broken> {
    let Some(context) = take(said, 4) else { return Ok(None) };
    if number(context) != u64::from(CONTEXT) || !request.found.is_empty() {
        return Err(Broken);
    }
    for _ in 0..count {
        let Some(extent) = take(said, 8) else { return Ok(None) };
        let start = request.found.last().map_or(request.start, |(_, end, _)| *end);
        let len = number(&extent[..4]);
        if len == 0 || start == request.end() {
            return Err(Broken);
        }
        request.found.push((start, request.end().min(start + len), number(&extent[4..]) as u32));
    }
    Ok(Some(()))
}

fn error(request: &mut Request, said: &mut &[u8], len: usize) -> Result<Option<()>, Broken> {
    let Some(error) = take(said, len) else { return Ok(None) };
    let (errno, words) = (number(&error[..4]) as u32, number(&error[4..6]) as usize);
    if errno == 0 || words > len - 6 {
        return Err(Broken);
    }
    request.failed.get_or_insert(errno);
    Ok(Some(()))
}

/// What the server says, in bytes.
fn encode(said: &Said, requests: &[Request], out: &mut Vec<u8>) {
    let cookie = |request: u8| u64::from(request % 4);
    let start = |request: u8| requests.get(usize::from(request % 4).wrapping_sub(1)).map_or(0, |request| request.start);
    let mut chunk = |done: bool, kind: u16, request: u8, content: &[u8]| {
        out.extend([&[0x66, 0x8e, 0x33, 0xef][..], &u16::from(done).to_be_bytes(), &kind.to_be_bytes()].concat());
        out.extend([&cookie(request).to_be_bytes()[..], &(content.len() as u32).to_be_bytes(), content].concat());
    };
    match said {
        Said::Data { request, skip, len, done, fill } => {
            let at = start(*request) + u64::from(*skip);
            chunk(*done, 1, *request, &[&at.to_be_bytes()[..], &vec![*fill; usize::from(*len)]].concat());
        }
        Said::Hole { request, skip, len, done } => {
            let at = start(*request) + u64::from(*skip);
            chunk(*done, 2, *request, &[&at.to_be_bytes()[..], &u32::from(*len).to_be_bytes()].concat());
        }
        Said::Extents { request, context, extents, done } => {
            let context = if *context { CONTEXT } else { 1 };
            let listed = extents.iter().flat_map(|(len, state)| [u32::from(*len), u32::from(*state)]);
            let listed: Vec<u8> = std::iter::once(context).chain(listed).flat_map(u32::to_be_bytes).collect();
            chunk(*done, 5, *request, &listed);
        }
        Said::Error { request, errno, words, offset, done } => {
            let text = vec![b'x'; usize::from(*words)];
            let head = [&u32::from(*errno).to_be_bytes()[..], &u16::from(*words).to_be_bytes()].concat();
            let offset = if *offset { &[0; 8][..] } else { &[] };
            chunk(*done, 0x8001, *request, &[&head[..], &text, offset].concat());
        }
        Said::None { request } => chunk(true, 0, *request, &[]),
        Said::Simple { request, errno, fill } => {
            let bytes =
                requests.get(usize::from(*request % 4).wrapping_sub(1)).map_or(0, |request| request.bytes.len());
            out.extend([&[0x67, 0x44, 0x66, 0x98][..], &u32::from(*errno).to_be_bytes()].concat());
            out.extend(
                [&cookie(*request).to_be_bytes()[..], &vec![*fill; if *errno == 0 { bytes } else { 0 }]].concat(),
            );
        }
        Said::Chunk { flags, kind, request, len } => {
            out.extend([&[0x66, 0x8e, 0x33, 0xef, 0, *flags][..], &kind.to_be_bytes()].concat());
            out.extend([&cookie(*request).to_be_bytes()[..], &u32::from(*len).to_be_bytes()].concat());
        }
        Said::Bytes(bytes) => out.extend(bytes),
    }
}

/// What the client makes of it.
fn answered(replies: &mut Replies, requests: &mut [Request], said: &[u8], piece: usize) -> Result<(), Broken> {
    for mut input in said.chunks(piece) {
        while let Some(event) = replies.step(&mut input).map_err(|_| Broken)? {
            let (Event::Data { cookie, .. } | Event::Zero { cookie, .. }) = event else {
                let (Event::Extent { cookie, .. } | Event::Done { cookie, .. }) = event else { unreachable!() };
                let request = &mut requests[cookie as usize - 1];
                match event {
                    Event::Extent { range, state, .. } => request.found.push((range.start, range.end, state)),
                    Event::Done { outcome, .. } => {
                        request.failed = outcome.err().map(|failure| failure.errno);
                        request.over = true;
                    }
                    _ => unreachable!(),
                }
                continue;
            };
            let request = &mut requests[cookie as usize - 1];
            let (at, bytes) = match &event {
                Event::Data { at, bytes, .. } => (*at, bytes.to_vec()),
                Event::Zero { range, .. } => (range.start, vec![0; range.len() as usize]),
                _ => unreachable!(),
            };
            let from = (at - request.start) as usize;
            request.bytes[from..][..bytes.len()].iter_mut().zip(bytes).for_each(|(place, byte)| *place = Some(byte));
        }
        assert!(input.is_empty(), "without an event all is taken");
    }
    Ok(())
}

/// Checks the answers that `data` says.
pub fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let piece = usize::from(input.piece).max(1);
    let session = Session {
        size: DISK_LEN,
        flags: 0,
        block_sizes: BlockSizes::default(),
        structured_replies: input.structured,
        base_allocation: input.structured.then_some(CONTEXT),
    };
    let mut replies = Replies::new(session);
    let mut model = Vec::new();
    for (extents, start, len) in input.asks {
        let (extents, start, len) = (extents && input.structured, u64::from(start), usize::from(len.max(1)));
        let range = ByteRange { start, end: start + len as u64 };
        replies.ask(if extents { Ask::BlockStatus(range) } else { Ask::Read(range) }, &mut Vec::new());
        let bytes = vec![None; len];
        model.push(Request { extents, start, bytes, found: Vec::new(), failed: None, over: false });
    }
    let mut said = Vec::new();
    input.said.iter().for_each(|one| encode(one, &model, &mut said));
    let mut found = model.clone();

    let mut rest = &said[..];
    let wanted = loop {
        match message(input.structured, &mut model, &mut rest) {
            Ok(Some(())) => {}
            Ok(None) => break Ok(()),
            Err(Broken) => break Err(Broken),
        }
    };
    let outcome = answered(&mut replies, &mut found, &said, piece);
    assert_eq!(outcome, wanted);
    for (found, wanted) in found.iter_mut().zip(&mut model) {
        if outcome.is_err() || !wanted.over {
            // A failure is told at the end, and not where that is the connection's.
            (found.failed, wanted.failed, found.over, wanted.over) = (None, None, false, false);
        }
        assert_eq!(found, wanted);
    }
    negotiate(&input.negotiation, piece);
}

/// Bytes of the greeting.
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
/// What a server says to STARTTLS that speaks TLS from there on.
const ACK: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0";

fn address(tls: bool) -> Address {
    let server = Server::unix("/socket").expect("a path");
    Address { tls: tls.then(TlsNames::default), ..Address::new(server, "disk").expect("a name") }
}

/// Whatever a server says first: it ends, and what was agreed on can be.
fn negotiate(said: &[u8], piece: usize) {
    let greeting = [GREETING, said].concat();
    let (outcome, asked) = agreed(&greeting, piece);
    assert_eq!((&outcome, &asked), (&agreed(&greeting, usize::MAX).0, &agreed(&greeting, usize::MAX).1), "in pieces");
    assert!(asked.len() < 4096);
    if let Ok(Next::Session(Session { size, block_sizes, structured_replies, base_allocation, .. })) = outcome {
        assert!(size < 1 << 63 && block_sizes.minimum.is_power_of_two() && block_sizes.minimum <= block_sizes.maximum);
        assert!(structured_replies || base_allocation.is_none());
    }
    inside_tls(said, piece);
}

/// What comes of a server in plain, and what it was asked.
fn agreed(said: &[u8], piece: usize) -> (Result<Next, String>, Vec<u8>) {
    let (mut negotiation, mut asked) = (Negotiation::new(&address(false)), Vec::new());
    for mut input in said.chunks(piece) {
        match negotiation.step(&mut input, &mut asked) {
            Ok(Next::More) => assert!(input.is_empty(), "without a session all is taken"),
            outcome => return (outcome.map_err(|error| error.one_line()), asked),
        }
    }
    (Ok(Next::More), asked)
}

/// A server that has to go inside TLS. In plain it hears the client's flags and STARTTLS and not a byte more,
/// whatever it says; inside, everything is as it would be in plain.
fn inside_tls(said: &[u8], piece: usize) {
    let (mut negotiation, mut asked) = (Negotiation::new(&address(true)), Vec::new());
    assert!(matches!(negotiation.step(&mut &GREETING[..], &mut asked), Ok(Next::More)));
    assert_eq!(asked, b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0");
    let (mut heard, mut outcome) = (0, Ok(None));
    for mut input in said.chunks(piece) {
        heard += input.len();
        let mut out = Vec::new();
        outcome = match negotiation.step(&mut input, &mut out) {
            Ok(Next::More) => Ok(None),
            Ok(Next::StartTls) => Ok(Some(())),
            Ok(Next::Session(session)) => panic!("agreed on in plain: {session:?}"),
            Err(_) => Err(Broken),
        };
        assert!(out.is_empty(), "said before TLS has begun: {out:?}");
        if outcome != Ok(None) {
            break;
        }
    }
    assert_eq!(outcome, border(said, piece));
    if outcome == Ok(Some(())) {
        assert_eq!(heard, ACK.len());
        let mut out = Vec::new();
        negotiation.inside_tls(&mut out);
        let inside = negotiation.step(&mut &said[heard..], &mut out).map_err(|error| error.one_line());
        let (plain, asked) = agreed(&[GREETING, &said[heard..]].concat(), usize::MAX);
        assert_eq!((inside, &out[..]), (plain, &asked[4..]), "behind the client's flags");
    }
}

/// Whether TLS begins: where the answer to STARTTLS is a whole ACK, with which nothing came. `Ok(None)` where it is
/// not all there.
fn border(said: &[u8], piece: usize) -> Result<Option<()>, Broken> {
    let Some(head) = said.get(..ACK.len()) else { return Ok(None) };
    let len = number(&head[16..]) as usize;
    match () {
        () if head[..12] != ACK[..12] || len > 2 * 4096 + 64 => Err(Broken),
        () if said.len() < head.len() + len => Ok(None),
        () if head == ACK && (said.len() == head.len() || head.len() % piece == 0) => Ok(Some(())),
        () => Err(Broken),
    }
}
