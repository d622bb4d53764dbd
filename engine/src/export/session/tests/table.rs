//! Each command, with each flag, of each size, in each style of replies, to a disk that can be written and to one
//! that cannot: what the protocol answers, what was done, and that the next request is understood.
use super::vast::{Vast, WINDOW};
use super::world::{Scene, disk_of};
use super::{BLOCK_STATUS, DISC, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, ask, greeted, replies};
use crate::export::session::{Ending, Progress};
use formats::nbd::Style;
use formats::nbd::wire::{self, command_flag as flag};
use std::collections::BTreeMap;

/// More than 32 bits can say, and no whole number of pages.
const SIZE: u64 = (8 << 30) + 512;
const CACHE: u16 = 5;
const MIB: u64 = 1 << 20;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// It is done.
    Done,
    /// It is answered with this error, and nothing was done.
    Error(u32),
    /// The connection ends, without an answer.
    Ends,
}

const OK: Then = Then::Done;
const PERM: Then = Then::Error(1);
const INVAL: Then = Then::Error(22);
const NOSPC: Then = Then::Error(28);
const ENDS: Then = Then::Ends;

/// The commands that are told apart below, and their flags: with any replies, with replies in chunks, with 64-bit
/// headers. FUA is allowed on all.
const COMMANDS: [(u16, [u16; 3]); 7] = [
    (READ, [0, flag::DF, flag::DF]),
    (WRITE, [0, 0, flag::PAYLOAD_LEN]),
    (TRIM, [0, 0, 0]),
    (CACHE, [0, 0, 0]),
    (WRITE_ZEROES, [flag::NO_HOLE | flag::FAST_ZERO; 3]),
    (BLOCK_STATUS, [flag::REQ_ONE, flag::REQ_ONE, flag::REQ_ONE | flag::PAYLOAD_LEN]),
    (FLUSH, [0, 0, 0]),
];
/// RESIZE, which is not offered, and others that do not exist.
const UNKNOWN: [u16; 3] = [8, 9, u16::MAX];

/// Offset, length, and what becomes of each of `COMMANDS` on a disk that can be written.
#[rustfmt::skip]
const SIZES: [(u64, u64, [Then; 7]); 22] = [
    //                                      READ   WRITE  TRIM   CACHE  ZEROES STATUS FLUSH
    (0,                0,                 [INVAL, INVAL, INVAL, INVAL, INVAL, INVAL, OK   ]),
    (4096,             0,                 [INVAL, INVAL, INVAL, INVAL, INVAL, INVAL, INVAL]),
    (SIZE,             0,                 [INVAL, INVAL, INVAL, INVAL, INVAL, INVAL, INVAL]),
    (0,                1,                 [OK,    OK,    OK,    OK,    OK,    OK,    INVAL]),
    (8192,             4096,              [OK,    OK,    OK,    OK,    OK,    OK,    INVAL]),
    (4097,             70_001,            [OK,    OK,    OK,    OK,    OK,    OK,    INVAL]),
    (SIZE - 5000,      5000,              [OK,    OK,    OK,    OK,    OK,    OK,    INVAL]),
    (SIZE - 5000,      5001,              [INVAL, NOSPC, INVAL, INVAL, NOSPC, INVAL, INVAL]),
    (SIZE,             1,                 [INVAL, NOSPC, INVAL, INVAL, NOSPC, INVAL, INVAL]),
    (1 << 63,          1,                 [INVAL, NOSPC, INVAL, INVAL, NOSPC, INVAL, INVAL]),
    (u64::MAX,         1,                 [INVAL, NOSPC, INVAL, INVAL, NOSPC, INVAL, INVAL]),
    (u64::MAX - 4095,  4096,              [INVAL, NOSPC, INVAL, INVAL, NOSPC, INVAL, INVAL]),
    (4096,             32 * MIB,          [OK,    OK,    OK,    OK,    OK,    OK,    INVAL]),
    (0,                32 * MIB + 1,      [INVAL, INVAL, OK,    OK,    OK,    OK,    INVAL]),
    (0,                64 * MIB,          [INVAL, INVAL, OK,    OK,    OK,    OK,    INVAL]),
    (0,                64 * MIB + 1,      [INVAL, ENDS,  OK,    OK,    OK,    OK,    INVAL]),
    (512,              u32::MAX as u64,   [INVAL, ENDS,  OK,    OK,    OK,    OK,    INVAL]),
    (4096,             (4 << 30) + 1,     [INVAL, ENDS,  OK,    OK,    OK,    OK,    INVAL]),
    (0,                SIZE,              [INVAL, ENDS,  OK,    OK,    OK,    OK,    INVAL]),
    (0,                SIZE + 1,          [INVAL, ENDS,  INVAL, INVAL, NOSPC, INVAL, INVAL]),
    (0,                1 << 63,           [INVAL, ENDS,  INVAL, INVAL, NOSPC, INVAL, INVAL]),
    (4096,             u64::MAX,          [INVAL, ENDS,  INVAL, INVAL, NOSPC, INVAL, INVAL]),
];

const FLAGS: [u16; 11] = [
    0,
    flag::FUA,
    flag::NO_HOLE,
    flag::DF,
    flag::REQ_ONE,
    flag::FAST_ZERO,
    flag::PAYLOAD_LEN,
    flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
    flag::DF | flag::REQ_ONE,
    1 << 6,
    1 << 15,
];

/// One request, and to whom.
#[derive(Clone, Copy, Debug)]
struct Case {
    style: Style,
    read_only: bool,
    command: u16,
    flags: u16,
    offset: u64,
    len: u64,
    /// What becomes of it where nothing is wrong but its size.
    by_size: Then,
}

impl Case {
    fn has_payload(&self) -> bool {
        self.command == WRITE || (self.style == Style::Extended && self.flags & flag::PAYLOAD_LEN != 0)
    }

    fn changes(&self) -> bool {
        [WRITE, TRIM, WRITE_ZEROES].contains(&self.command)
    }

    /// True where it is no matter of the disk whether it is done.
    fn is_for_the_disk(&self) -> bool {
        let known = COMMANDS.iter().find(|(command, _)| *command == self.command);
        let own = known.map(|(_, own)| own[self.style as usize]);
        // A payload of BLOCK_STATUS is a length and numbers of contexts: none of these is as long as one.
        let filter = self.command == BLOCK_STATUS && self.has_payload();
        let contexts = self.command != BLOCK_STATUS || self.style != Style::Simple;
        own.is_some_and(|own| self.flags & !(own | flag::FUA) == 0) && !filter && contexts
    }

    fn wanted(&self) -> Then {
        match () {
            () if self.command == DISC => ENDS,
            () if self.has_payload() && self.len > 64 * MIB => ENDS,
            () if !self.is_for_the_disk() => INVAL,
            () if self.read_only && self.changes() => PERM,
            () => self.by_size,
        }
    }

    /// Whether it says something new: long payloads cost time.
    fn is_worth_it(&self) -> bool {
        let expressible = self.style == Style::Extended || u32::try_from(self.len).is_ok();
        let sent = self.has_payload() && (MIB..=64 * MIB).contains(&self.len);
        let telling = self.command == WRITE && [0, flag::FUA, flag::PAYLOAD_LEN, 1 << 6].contains(&self.flags);
        expressible && (!sent || (telling && !(self.read_only && self.flags != 0)))
    }
}

fn cases(style: Style, read_only: bool) -> impl Iterator<Item = Case> {
    let commands = COMMANDS.iter().enumerate().map(|(column, (command, _))| (*command, Some(column)));
    let others = UNKNOWN.iter().chain(&[DISC]).map(|command| (*command, None));
    let all: Vec<(u16, Option<usize>)> = commands.chain(others).collect();
    let cases = all.into_iter().flat_map(move |(command, column)| {
        SIZES.iter().flat_map(move |(offset, len, answers)| {
            let by_size = column.map_or(INVAL, |column| answers[column]);
            let (offset, len) = (*offset, *len);
            FLAGS.iter().map(move |flags| Case { style, read_only, command, flags: *flags, offset, len, by_size })
        })
    });
    cases.filter(Case::is_worth_it)
}

/// A client, and what it asked.
struct Client {
    scene: Scene,
    style: Style,
    cookie: u64,
}

impl Client {
    fn new(style: Style, read_only: bool) -> Self {
        let mut scene = Scene::on(disk_of(0, Box::new(Vast::new(SIZE)), read_only), 1, WINDOW);
        scene.world.whole = true;
        Self { scene: greeted(scene, style), style, cookie: 0 }
    }

    fn say(&mut self, command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> Progress {
        self.cookie += 1;
        self.scene.say(&ask(self.style, command, flags, self.cookie, offset, len));
        self.scene.say(payload);
        self.scene.run()
    }

    /// One request that has to be done: the bytes that it was answered with.
    fn must(&mut self, command: u16, offset: u64, len: u64, payload: &[u8]) -> Vec<u8> {
        assert_eq!(self.say(command, 0, offset, len, payload), Progress::Running);
        let reply = replies(&self.scene.heard(), &BTreeMap::from([(self.cookie, (offset, len as u32))]));
        let reply = reply.into_values().next().expect("an answer");
        assert_eq!(reply.error, 0, "command {command}, {len} bytes at {offset}");
        if command == READ { reply.data.into_values().flatten().collect() } else { Vec::new() }
    }

    /// The byte at `at`; 0 outside of the disk.
    fn byte(&mut self, at: Option<u64>) -> u8 {
        at.filter(|at| *at < SIZE).map_or(0, |at| self.must(READ, at, 1, &[])[0])
    }
}

const BEFORE: u8 = 0x55;
const WRITTEN: u8 = 0x77;

/// Where to look for what was done: the request's first byte, its last one, and its neighbours.
fn places(case: &Case) -> [Option<u64>; 4] {
    let end = case.offset.checked_add(case.len);
    [Some(case.offset), end.and_then(|end| end.checked_sub(1)), case.offset.checked_sub(1), end]
}

/// What is there afterwards; `None` where nobody promises anything.
fn expected(case: &Case, then: Then) -> Option<[u8; 4]> {
    let one = case.len == 1;
    match (case.command, then) {
        (WRITE, OK) => Some([WRITTEN, WRITTEN, 0, 0]),
        (WRITE_ZEROES, OK) => Some([0; 4]),
        (TRIM, OK) => None,
        _ if case.offset >= SIZE => Some([0; 4]),
        // With no length, what is behind it is its first byte, and what is its last one is before it.
        _ if case.len == 0 => Some([BEFORE, 0, 0, BEFORE]),
        _ => Some([BEFORE, if one { BEFORE } else { 0 }, 0, 0]),
    }
}

/// One request on a disk that is empty but for its first byte, which is so again afterwards.
fn judge(client: &mut Client, case: &Case) {
    let then = case.wanted();
    let acts = case.changes() && !case.read_only && then != ENDS;
    let inside = case.offset < SIZE;
    if acts && inside {
        client.must(WRITE, case.offset, 1, &[BEFORE]);
    }
    let sent = if case.has_payload() && then != ENDS { case.len } else { 0 };
    let progress = client.say(case.command, case.flags, case.offset, case.len, &vec![WRITTEN; sent as usize]);
    let heard = client.scene.heard();
    if then == ENDS {
        let ending = if case.command == DISC { Ending::Disconnected } else { Ending::TooLong(case.len) };
        assert_eq!((progress, heard.is_empty()), (Progress::Over(ending), true), "{case:?}");
        return;
    }
    assert_eq!(progress, Progress::Running, "{case:?}");
    let replies = replies(&heard, &BTreeMap::from([(client.cookie, (case.offset, case.len as u32))]));
    assert!(replies.len() == 1 && replies.contains_key(&client.cookie), "{case:?}");
    let reply = &replies[&client.cookie];
    let error = if let Then::Error(error) = then { error } else { 0 };
    assert_eq!(reply.error, error, "{case:?}");
    let done = |command| then == OK && case.command == command;
    let len: usize = reply.data.values().map(Vec::len).sum();
    assert_eq!(len as u64, if done(READ) { case.len } else { 0 }, "{case:?}");
    assert_eq!(reply.extents.is_empty(), !done(BLOCK_STATUS), "{case:?}");
    for extents in reply.extents.values() {
        let len: u64 = extents.iter().map(|(len, _)| len).sum();
        let whole = len == case.len || (case.style != Style::Extended && case.len > u64::from(u32::MAX));
        assert!(!extents.is_empty() && len <= case.len, "{case:?}");
        assert!(whole && (extents.len() == 1 || case.flags & flag::REQ_ONE == 0), "{case:?}: {extents:?}");
    }
    assert_form(case, &heard);
    if acts {
        let found = places(case).map(|place| client.byte(place));
        assert!(expected(case, then).is_none_or(|expected| expected == found), "{case:?}: {found:x?}");
        if inside {
            let start = case.offset / 4096 * 4096;
            let end = case.offset.saturating_add(case.len.max(1)).min(SIZE).next_multiple_of(4096).min(SIZE);
            // One request that is longer than its header can say would be several.
            let len = (end - start).min(u64::from(u32::MAX) / 4096 * 4096);
            client.must(WRITE_ZEROES, start, len, &[]);
        }
    } else {
        // It is understood all the same.
        client.must(READ, 0, 1, &[]);
    }
}

/// A reply of the style that was chosen: a READ's never simple where there are chunks, nor an error, which has words.
fn assert_form(case: &Case, heard: &[u8]) {
    let magic = u32::from_be_bytes(heard[..4].try_into().expect("four bytes"));
    let error = heard.len() > 20 && matches!(case.wanted(), Then::Error(_));
    match case.style {
        Style::Simple => assert_eq!(magic, wire::SIMPLE_REPLY_MAGIC, "{case:?}"),
        Style::Structured => {
            let chunks = error || [READ, BLOCK_STATUS].contains(&case.command);
            assert!(!chunks || magic == wire::STRUCTURED_REPLY_MAGIC, "{case:?}");
        }
        Style::Extended => {
            assert_eq!(magic, wire::EXTENDED_REPLY_MAGIC, "{case:?}");
            assert_eq!(heard[16..24], case.offset.to_be_bytes(), "{case:?}");
        }
    }
    assert!(case.style == Style::Simple || error == matches!(case.wanted(), Then::Error(_)), "{case:?}: no words");
}

/// All of a style's; on a disk that can be written, or cannot.
fn judge_all(style: Style, read_only: bool) {
    let mut client = Client::new(style, read_only);
    let (mut done, mut refused, mut ended) = (0, 0, 0);
    for case in cases(style, read_only) {
        judge(&mut client, &case);
        match case.wanted() {
            OK => done += 1,
            ENDS => {
                ended += 1;
                client = Client::new(style, read_only);
            }
            Then::Error(_) => refused += 1,
        }
    }
    assert!(done > 25 && refused > 500 && ended > 100, "{done} done, {refused} refused, {ended} ended");
}

#[test]
fn what_a_client_with_simple_replies_is_answered() {
    judge_all(Style::Simple, false);
    judge_all(Style::Simple, true);
}

#[test]
fn what_a_client_with_replies_in_chunks_is_answered() {
    judge_all(Style::Structured, false);
    judge_all(Style::Structured, true);
}

#[test]
fn what_a_client_with_64_bit_headers_is_answered() {
    judge_all(Style::Extended, false);
    judge_all(Style::Extended, true);
}
