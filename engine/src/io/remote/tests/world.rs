//! A stepped connection, in plain or inside TLS, in an order that one seed decides: what is received comes in pieces of
//! any length, sends end late, some of them behind the answer to what they sent, and the server goes at any byte.
//!
//! Held here: before TLS the server hears the client's flags and STARTTLS, and nothing else; what was asked of a
//! server that went is asked again of the next, until all of it is on the disk; and no write is done whose bytes the
//! queue below still has.
use super::super::connection::{Connection, Part};
use super::{Arc, BTreeMap, Duration, Handshake, Header, Op, Outcome, ReplyTo, ServerConnection, Style, Tls, Token};
use super::{Read, Write, carry_out, export, keys, writable_on, write};
use crate::fault::{Fault, plant};
use crate::io::{Completion, File};
use formats::range::ByteRange;
use std::io::{self, ErrorKind};
use std::sync::Mutex;

const LEN: usize = 4 << 20;
/// All that is ever said in plain: the client's flags, and STARTTLS.
const IN_PLAIN: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0";
/// How often a server goes.
const CUTS_MAX: usize = 5;

/// The server's end of one connection.
struct Far {
    handshake: Handshake,
    tls: Option<ServerConnection>,
    /// Heard in plain.
    plain: Vec<u8>,
    /// Heard, decrypted, and not understood yet.
    unread: Vec<u8>,
    serving: bool,
    /// On its way to the client.
    said: Vec<u8>,
}

impl Far {
    fn new(inside_tls: bool) -> Self {
        let mut said = Vec::new();
        let handshake = Handshake::new(if inside_tls { Tls::Required } else { Tls::Off }, &mut said);
        Self { handshake, tls: None, plain: Vec::new(), unread: Vec::new(), serving: false, said }
    }

    /// Takes in what the client sent. An error is its end.
    fn hear(&mut self, mut bytes: &[u8], disk: &Mutex<Vec<u8>>) -> io::Result<()> {
        match &mut self.tls {
            None => {
                self.plain.extend_from_slice(bytes);
                self.unread.extend_from_slice(bytes);
            }
            Some(tls) => {
                while !bytes.is_empty() {
                    tls.read_tls(&mut bytes)?;
                    let state = tls.process_new_packets().map_err(io::Error::other)?;
                    let mut plain = vec![0; state.plaintext_bytes_to_read()];
                    tls.reader().read_exact(&mut plain)?;
                    self.unread.extend_from_slice(&plain);
                }
            }
        }
        let mut out = Vec::new();
        self.answer(disk, &mut out)?;
        match &mut self.tls {
            None => self.said.extend_from_slice(&out),
            Some(tls) => tls.writer().write_all(&out)?,
        }
        if let Some(tls) = &mut self.tls {
            while tls.wants_write() {
                tls.write_tls(&mut self.said)?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, disk: &Mutex<Vec<u8>>, out: &mut Vec<u8>) -> io::Result<()> {
        let unread = std::mem::take(&mut self.unread);
        let mut input = &unread[..];
        while !self.serving && !input.is_empty() {
            match self.handshake.step(&mut input, &[export(LEN as u64, false, true)][..], out) {
                Outcome::More => {}
                Outcome::StartTls => {
                    // The ACK goes in plain.
                    self.said.append(out);
                    let config = Arc::clone(&keys().ours);
                    self.tls = Some(ServerConnection::new(config).map_err(io::Error::other)?);
                }
                Outcome::Transmission(_) => self.serving = true,
                Outcome::Closed(reason) => return Err(io::Error::other(reason)),
            }
        }
        while self.serving && input.len() >= 28 {
            let header = Header::parse(Style::Structured, &input[..28]).ok_or(ErrorKind::InvalidData)?;
            let Header { flags, command, cookie, offset, len } = header;
            let payload = if command == 1 { len as usize } else { 0 };
            let Some(mut request) = input[28..].get(..payload) else { break };
            carry_out(&mut request, disk, flags, command, ByteRange { start: offset, end: offset + len })?;
            out.extend_from_slice(&ReplyTo { style: Style::Simple, cookie, offset }.done());
            input = &input[28 + payload..];
        }
        self.unread = input.to_vec();
        Ok(())
    }
}

/// A small generator; its numbers decide everything.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

struct World {
    random: Random,
    connection: Connection,
    /// What the connection has under way.
    pending: Vec<(Part, Op)>,
    far: Option<Far>,
    disk: Mutex<Vec<u8>>,
    inside_tls: bool,
    /// What became of the send that is under way, where the server has it already.
    heard: Option<io::Result<u32>>,
    now: Duration,
    cuts: usize,
    ready: Vec<Completion>,
    /// The server heard something in plain that it should not have.
    overheard: bool,
}

impl World {
    fn go_on(&mut self) {
        let pending = &mut self.pending;
        self.connection.go_on(self.now, &mut self.ready, |part, op| pending.push((part, op)));
    }

    /// Ends one operation that can end.
    fn step(&mut self) {
        let may_end = |(_, op): &(Part, Op), far: &Option<Far>| {
            !matches!(op, Op::Receive { .. }) || far.as_ref().is_none_or(|far| !far.said.is_empty())
        };
        let able: Vec<usize> = (0..self.pending.len()).filter(|at| may_end(&self.pending[*at], &self.far)).collect();
        let Some(first) = able.first() else { return };
        // Time passes slowly: nobody is given up.
        let mut picks = (0..8).map(|_| able[self.random.below(able.len())]);
        let at = picks.find(|at| self.pending[*at].0 != Part::Look).unwrap_or(*first);
        let (part, mut op) = self.pending.swap_remove(at);
        if self.far.is_some() && self.cuts < CUTS_MAX && self.random.below(40) == 0 {
            (self.far, self.cuts) = (None, self.cuts + 1);
        }
        let heard = if part == Part::Send { self.heard.take() } else { None };
        let was_heard = heard.is_some();
        let result = heard.unwrap_or_else(|| self.result(&mut op));
        self.overheard |= self.inside_tls && self.far.as_ref().is_some_and(|far| !IN_PLAIN.starts_with(&far.plain));
        if part == Part::Send && !was_heard && self.random.below(2) == 0 {
            self.heard = Some(result);
            self.pending.push((part, op));
            return;
        }
        self.connection.complete(part, op, result, self.now, &mut self.ready);
        self.go_on();
    }

    fn result(&mut self, op: &mut Op) -> io::Result<u32> {
        match (op, &mut self.far) {
            (Op::Connect { .. }, far) => {
                *far = Some(Far::new(self.inside_tls));
                Ok(0)
            }
            (Op::Timeout { after }, _) => {
                self.now += *after;
                Ok(0)
            }
            (Op::Receive { .. }, None) => Ok(0),
            (Op::Receive { buf, .. }, Some(far)) => {
                let most = far.said.len().min(buf.len());
                let count = 1 + self.random.below(most).min(self.random.below(most));
                buf[..count].copy_from_slice(&far.said[..count]);
                far.said.drain(..count);
                Ok(count as u32)
            }
            (Op::Send { .. }, None) => Err(ErrorKind::BrokenPipe.into()),
            (Op::Send { gather, .. }, far @ Some(_)) => {
                let bytes: Vec<u8> = gather.slices().flatten().copied().collect();
                // What was on its way when the server went is heard in part.
                let cut = self.cuts < CUTS_MAX && self.random.below(20) == 0;
                let heard = if cut { self.random.below(bytes.len()) } else { bytes.len() };
                let outcome = far.as_mut().map(|far| far.hear(&bytes[..heard], &self.disk));
                // What is no TLS where that has begun, among others.
                self.overheard |= outcome.is_some_and(|outcome| outcome.is_err());
                if cut {
                    (*far, self.cuts) = (None, self.cuts + 1);
                }
                Ok(bytes.len() as u32)
            }
            _ => panic!("a connection does nothing else"),
        }
    }
}

/// How often the server went, where nothing was overheard, and all that was written is there.
fn world(seed: u64, inside_tls: bool) -> Option<usize> {
    let (_, remote) = writable_on(&[super::Treats::Well], true, inside_tls);
    let file = File::remote(Arc::clone(&remote));
    let mut world = World {
        random: Random(seed),
        connection: Connection::new(remote),
        pending: Vec::new(),
        far: None,
        disk: Mutex::new(vec![0x55; LEN]),
        inside_tls,
        heard: None,
        now: Duration::ZERO,
        cuts: 0,
        ready: Vec::new(),
        overheard: false,
    };
    let mut truth = vec![0x55; LEN];
    let mut ends = BTreeMap::new();
    let (mut at, mut count) = (0, 0);
    while at < LEN {
        let (len, value) = (((world.random.below(600) + 1) * 512).min(LEN - at), count as u8 + 1);
        truth[at..at + len].fill(value);
        world.connection.start(Token(count), write(&file, at as u64, len, value), &mut world.ready);
        (at, count) = (at + len, count + 1);
        world.go_on();
        for _ in 0..world.random.below(6).min(world.pending.len()) {
            world.step();
        }
    }
    world.connection.start(Token(count), Op::Flush { file }, &mut world.ready);
    world.go_on();
    for _ in 0..20_000 {
        for completion in world.ready.drain(..) {
            assert!(ends.insert(completion.token, completion.result.is_ok()).is_none(), "one completion an operation");
        }
        if ends.len() > count as usize || world.overheard {
            break;
        }
        world.step();
    }
    let all_well = ends.len() > count as usize && ends.values().all(|well| *well);
    let is_right = !world.overheard && all_well && *world.disk.lock().expect("a disk") == truth;
    is_right.then_some(world.cuts)
}

#[test]
fn whatever_is_cut_all_is_written_and_nothing_is_said_in_plain() {
    for inside_tls in [true, false] {
        let cuts: usize = (0..60).map(|seed| world(seed, inside_tls).unwrap_or_else(|| panic!("seed {seed}"))).sum();
        assert!(cuts > 100, "only {cuts} cuts: the world is too tame");
    }
}

#[test]
fn speaking_in_plain_behind_starttls_is_caught() {
    plant(Some(Fault::PlainBehindStartTls));
    let caught = (0..60).any(|seed| world(seed, true).is_none());
    plant(None);
    assert!(caught, "the world is too tame");
}

#[test]
#[should_panic(expected = "every piece is back")]
fn a_write_that_is_done_before_it_is_sent_is_caught() {
    plant(Some(Fault::DoneBeforeSent));
    (0..60).for_each(|seed| assert!(world(seed, false).is_some()));
}
