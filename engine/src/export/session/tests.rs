//! Sessions with clients of every manner, over a queue that ends things in any order.
mod bitmaps;
mod table;
mod tls;
mod vast;
mod world;

use super::{Ending, PAYLOAD_MAX, Progress, REQUESTS_MAX};
use crate::export::gate::Route;
use crate::fault::{Fault, plant};
use crate::mirror::Mirror;
use formats::nbd::Style;
use formats::nbd::wire::{self, chunk, command_flag as flag};
use formats::range::ByteRange;
use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use world::{Done, Random, Scene, disk};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;
const SIZE: u64 = 1 << 20;
const CONTEXTS: [&str; 3] = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:mirror"];

fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    [&head(wire::REQUEST_MAGIC, command, flags, cookie, offset)[..], &len.to_be_bytes()].concat()
}

/// The same with a 64-bit header.
fn extended(command: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    [&head(wire::EXTENDED_REQUEST_MAGIC, command, flags, cookie, offset)[..], &len.to_be_bytes()].concat()
}

/// A header up to its length.
fn head(magic: u32, command: u16, flags: u16, cookie: u64, offset: u64) -> Vec<u8> {
    let words = [magic.to_be_bytes(), (u32::from(flags) << 16 | u32::from(command)).to_be_bytes()].concat();
    [words, [cookie.to_be_bytes(), offset.to_be_bytes()].concat()].concat()
}

fn write(flags: u16, cookie: u64, offset: u64, payload: &[u8]) -> Vec<u8> {
    [&request(WRITE, flags, cookie, offset, payload.len() as u32), payload].concat()
}

/// A request of a client of any style.
fn ask(style: Style, command: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    match style {
        Style::Extended => extended(command, flags, cookie, offset, len),
        Style::Simple | Style::Structured => request(command, flags, cookie, offset, len as u32),
    }
}

fn put(style: Style, flags: u16, cookie: u64, offset: u64, payload: &[u8]) -> Vec<u8> {
    let flags = if style == Style::Extended { flags | flag::PAYLOAD_LEN } else { flags };
    [&ask(style, WRITE, flags, cookie, offset, payload.len() as u64), payload].concat()
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let head = [wire::OPTION_MAGIC.to_be_bytes().to_vec(), number.to_be_bytes().to_vec()].concat();
    [&head, &(data.len() as u32).to_be_bytes()[..], data].concat()
}

/// A scene whose handshake is done, with replies in chunks and block status or without.
fn scene(seed: u64, size: u64, style: Style) -> Scene {
    greeted(Scene::new(seed, size), style)
}

fn greeted(scene: Scene, style: Style) -> Scene {
    greeted_for(scene, style, &CONTEXTS)
}

/// The same, with these contexts.
fn greeted_for(mut scene: Scene, style: Style, contexts: &[&str]) -> Scene {
    scene.say(&3_u32.to_be_bytes());
    chosen(scene, style, contexts)
}

/// The same, where the client's flags are said already.
fn chosen(mut scene: Scene, style: Style, contexts: &[&str]) -> Scene {
    match style {
        Style::Simple => {}
        Style::Structured => scene.say(&option(wire::opt::STRUCTURED_REPLY, b"")),
        Style::Extended => scene.say(&option(wire::opt::EXTENDED_HEADERS, b"")),
    }
    if style != Style::Simple {
        let mut queries = [[0; 4], (contexts.len() as u32).to_be_bytes()].concat();
        for name in contexts {
            queries.extend([&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat());
        }
        scene.say(&option(wire::opt::SET_META_CONTEXT, &queries));
    }
    scene.say(&option(wire::opt::GO, b"\0\0\0\x03vda\0\0"));
    assert_eq!(scene.run(), Progress::Running);
    assert_eq!(scene.session.export(), Some("vda"));
    scene.heard();
    scene
}

/// What a client makes of the replies to one request.
#[derive(Clone, Debug, Default, PartialEq)]
struct Reply {
    error: u32,
    /// Bytes of the disk, by offset; holes are zeroes.
    data: BTreeMap<u64, Vec<u8>>,
    holes: usize,
    chunks: usize,
    /// Length and state, by context.
    extents: BTreeMap<u32, Vec<(u64, u32)>>,
}

/// Takes apart what a server sent. `reads`: lengths of the reads whose simple replies have payload.
fn replies(mut bytes: &[u8], reads: &BTreeMap<u64, (u64, u32)>) -> BTreeMap<u64, Reply> {
    let mut open: BTreeMap<u64, Reply> = BTreeMap::new();
    let mut ended = BTreeMap::new();
    let mut take = |len: usize| {
        let (head, rest) = bytes.split_at(len.min(bytes.len()));
        bytes = rest;
        head.to_vec()
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    loop {
        let magic = take(4);
        if magic.is_empty() {
            assert!(open.is_empty(), "every reply ends");
            return ended;
        }
        if number(&magic) as u32 == wire::SIMPLE_REPLY_MAGIC {
            let (error, cookie) = (number(&take(4)) as u32, number(&take(8)));
            let mut reply = Reply { error, ..Reply::default() };
            if let (0, Some((offset, len))) = (error, reads.get(&cookie)) {
                reply.data.insert(*offset, take(*len as usize));
            }
            assert!(ended.insert(cookie, reply).is_none(), "request {cookie} has one reply");
            continue;
        }
        let long = number(&magic) as u32 == wire::EXTENDED_REPLY_MAGIC;
        assert!(long || number(&magic) as u32 == wire::STRUCTURED_REPLY_MAGIC);
        let (flags, kind, cookie) = (number(&take(2)), number(&take(2)) as u16, number(&take(8)));
        if long {
            take(8);
        }
        let payload_len = number(&take(if long { 8 } else { 4 })) as usize;
        let payload = take(payload_len);
        let reply = open.entry(cookie).or_default();
        reply.chunks += 1;
        match kind {
            chunk::NONE => {}
            chunk::OFFSET_DATA => {
                assert!(reply.data.insert(number(&payload[..8]), payload[8..].to_vec()).is_none());
            }
            chunk::OFFSET_HOLE => {
                let zeroes = vec![0; number(&payload[8..12]) as usize];
                assert!(reply.data.insert(number(&payload[..8]), zeroes).is_none());
                reply.holes += 1;
            }
            chunk::BLOCK_STATUS => {
                let extent = |e: &[u8]| (number(&e[..4]), number(&e[4..]) as u32);
                let extents = payload[4..].chunks(8).map(extent).collect();
                assert!(reply.extents.insert(number(&payload[..4]) as u32, extents).is_none());
            }
            chunk::BLOCK_STATUS_EXT => {
                let extent = |e: &[u8]| (number(&e[..8]), number(&e[8..]) as u32);
                let extents: Vec<_> = payload[8..].chunks(16).map(extent).collect();
                assert_eq!(number(&payload[4..8]), extents.len() as u64);
                assert!(reply.extents.insert(number(&payload[..4]) as u32, extents).is_none());
            }
            chunk::ERROR => reply.error = number(&payload[..4]) as u32,
            other => panic!("chunk type {other}"),
        }
        if flags & 1 != 0 {
            let reply = open.remove(&cookie).expect("it was just there");
            assert!(ended.insert(cookie, reply).is_none(), "request {cookie} has one reply");
        }
    }
}

/// The one reply to the one request that is answered.
fn reply(scene: &mut Scene) -> Reply {
    let replies = replies(&scene.heard(), &BTreeMap::new());
    assert_eq!(replies.len(), 1);
    replies.into_values().next().expect("one")
}

/// A client that asks for everything, at random and in bursts, never twice for the same bytes at a
/// time, and keeps its own copy of the truth. How often its connection went to another process.
fn any_client(mut scene: Scene, seed: u64, style: Style) -> u64 {
    let mut random = Random::new(seed + 7);
    let mut truth = vec![0_u8; SIZE as usize];
    let mut cookie = 0;
    for _ in 0..6 {
        // The pages of this burst, each asked for once.
        let mut at = random.below(8) * 512;
        let mut reads = BTreeMap::new();
        let mut expected = BTreeMap::new();
        while at < SIZE && reads.len() + expected.len() < 90 {
            let len = [512, 4096, 5000, 100_000][random.below(4) as usize].min(SIZE - at);
            let bytes = at as usize..(at + len) as usize;
            cookie += 1;
            match random.below(8) {
                0..3 => {
                    scene.say(&ask(style, READ, 0, cookie, at, len));
                    reads.insert(cookie, (at, len as u32));
                    expected.insert(cookie, truth[bytes].to_vec());
                }
                3..6 => {
                    let payload: Vec<u8> = (0..len).map(|n| (n + cookie) as u8).collect();
                    scene.say(&put(style, (random.below(4) == 0).into(), cookie, at, &payload));
                    truth[bytes].copy_from_slice(&payload);
                    expected.insert(cookie, Vec::new());
                }
                6 => {
                    scene.say(&ask(style, WRITE_ZEROES, flag::NO_HOLE * random.below(2) as u16, cookie, at, len));
                    truth[bytes].fill(0);
                    expected.insert(cookie, Vec::new());
                }
                _ => {
                    // Refused, its payload skipped: it ends past the disk.
                    scene.say(&put(style, 0, cookie, SIZE - 10, &vec![1; len as usize]));
                    expected.insert(cookie, b"refused".to_vec());
                }
            }
            at += len + random.below(3) * 7000;
        }
        assert_eq!(scene.run(), Progress::Running);
        let replies = replies(&scene.heard(), &reads);
        assert!(replies.keys().eq(expected.keys()), "every request is answered");
        for (cookie, reply) in replies {
            let want = &expected[&cookie];
            let refused = want == b"refused";
            assert_eq!(reply.error, if refused { 28 } else { 0 }, "request {cookie}");
            if let Some((offset, _)) = reads.get(&cookie) {
                assert_eq!(reply.data.keys().next(), Some(offset));
                let got: Vec<u8> = reply.data.into_values().flatten().collect();
                assert!(got == *want, "read {cookie} at {offset}");
            }
        }
    }
    scene.say(&ask(style, DISC, 0, 0, 0, 0));
    assert_eq!(scene.run(), Progress::Over(Ending::Disconnected));
    assert!(scene.world.files[0] == truth);
    scene.handed_over
}

/// The same for a client whose connection goes to another process now and then.
fn handed_client(seed: u64) -> u64 {
    let style = [Style::Simple, Style::Structured, Style::Extended][seed as usize % 3];
    let mut scene = scene(seed, SIZE, style);
    scene.hand_over_one_in = 3 + seed % 40;
    any_client(scene, seed, style)
}

/// Promise 14.
#[test]
fn a_connection_that_goes_to_another_process_loses_nothing() {
    let handed_over: u64 = (0..150).map(handed_client).sum();
    assert!(handed_over > 500, "{handed_over} handovers");
}

/// The same for one that goes to another thread now and then. How often it did.
fn moved_client(mut scene: Scene, seed: u64, style: Style) -> u64 {
    scene.rest_one_in = 3 + seed % 40;
    let moved = std::rc::Rc::clone(&scene.moved);
    any_client(scene, seed, style);
    moved.get()
}

/// Promise 16.
#[test]
fn a_connection_that_goes_to_another_thread_loses_nothing() {
    let of_style = |seed: u64| [Style::Simple, Style::Structured, Style::Extended][seed as usize % 3];
    let moved: u64 = (0..150).map(|seed| moved_client(scene(seed, SIZE, of_style(seed)), seed, of_style(seed))).sum();
    assert!(moved > 500, "{moved} moves");
}

/// Promise 16.
#[test]
fn going_to_another_thread_with_something_under_way_is_caught() {
    plant(Some(Fault::MoveBeforeSent));
    let client = |seed| moved_client(scene(seed, SIZE, Style::Structured), seed, Style::Structured);
    let shown = (0..150).any(|seed| catch_unwind(|| client(seed)).is_err());
    plant(None);
    assert!(shown, "the world is too tame to be trusted");
}

/// Somebody else may be stepped by the same thread.
#[test]
fn one_step_takes_in_a_bounded_number_of_requests() {
    let mut scene = scene(1, SIZE, Style::Structured);
    scene.world.whole = true;
    // Holes: answered at once.
    (0..2000).for_each(|cookie| scene.say(&request(READ, 0, cookie, 0, 64 << 10)));
    let mut most = 0;
    let mut answered = 0;
    while answered < 2000 {
        assert_eq!(scene.step(), Progress::Running);
        let now = replies(&scene.heard(), &BTreeMap::new()).len();
        (most, answered) = (most.max(now), answered + now);
        // The simulated waker tells nobody.
        scene.world.rung = true;
    }
    assert!(most <= 6 * REQUESTS_MAX, "{most} in one step");
}

/// Others wait for it meanwhile, who are between two requests.
#[test]
fn a_client_that_stops_inside_a_request_is_not_handed_over() {
    let mut scene = scene(1, SIZE, Style::Structured);
    scene.say(&write(0, 1, 0, &[1; 4096])[..100]);
    assert_eq!(scene.run(), Progress::Running);
    scene.session.hand_over_soon();
    assert_eq!(scene.run(), Progress::Running);
    scene.world.expired = true;
    assert_eq!(scene.run(), Progress::Over(Ending::Stopped));
}

/// Promise 14.
#[test]
fn forgetting_what_was_received_and_not_begun_is_caught() {
    plant(Some(Fault::ForgetUnread));
    let shown = (0..150).any(|seed| catch_unwind(|| handed_client(seed)).is_err());
    plant(None);
    assert!(shown, "the world is too tame to be trusted");
}

#[test]
fn whatever_order_things_end_in_every_request_is_answered_rightly() {
    for seed in 0..150 {
        let style = [Style::Simple, Style::Structured, Style::Extended][seed as usize % 3];
        any_client(scene(seed, SIZE, style), seed, style);
    }
}

#[test]
fn whatever_is_said_the_session_ends_with_its_client_and_nothing_under_way() {
    for seed in 0..300 {
        let mut scene = scene(seed, SIZE, if seed % 2 == 0 { Style::Structured } else { Style::Simple });
        let mut random = Random::new(seed);
        for _ in 0..random.below(40) {
            let (command, flags) = (random.below(10) as u16, [0, 0, random.below(64) as u16][random.below(3) as usize]);
            let offset = [0, random.below(SIZE), SIZE - 512, random.below(u64::MAX)][random.below(4) as usize];
            let len = [0, 512, random.below(SIZE), random.below(1 << 32)][random.below(4) as usize] as u32;
            // Cookies may repeat: they are the client's business.
            scene.say(&request(command, flags, random.below(4), offset, len));
            let payload = len.min(1 << 20) as usize * usize::from(command == WRITE);
            scene.say(&vec![seed as u8; payload]);
            if random.below(30) == 0 {
                scene.say(&[0xff; 5]);
            }
        }
        if scene.run() == Progress::Running {
            scene.world.hung_up = true;
            assert!(matches!(scene.run(), Progress::Over(_)));
        }
        let disk = [Done::Read, Done::Write, Done::Zero, Done::Flush];
        assert!(disk.iter().all(|kind| scene.world.under_way(*kind) == 0));
    }
}

#[test]
fn a_deaf_client_gets_no_more_than_its_share() {
    for (len, count, requests_max) in [(4096, 500, REQUESTS_MAX), (8 << 20, 20, (PAYLOAD_MAX >> 23) as usize)] {
        let mut scene = scene(1, 16 << 20, Style::Structured);
        scene.say(&write(0, 9999, 0, &vec![1; 16 << 20]));
        scene.run();
        scene.heard();
        scene.world.deaf = true;
        (0..count).for_each(|cookie| scene.say(&request(READ, flag::DF, cookie, 0, len)));
        let begun = scene.world.log.iter().filter(|done| **done == Done::Read).count();
        scene.world.whole = true;
        scene.run();
        let read = scene.world.log.iter().filter(|done| **done == Done::Read).count() - begun;
        assert!((1..=requests_max).contains(&read), "{read} reads of {len} bytes");
        scene.world.deaf = false;
        scene.run();
        assert_eq!(replies(&scene.heard(), &BTreeMap::new()).len() as u64, count);
    }
}

#[test]
fn refusals_count_as_well() {
    let mut scene = scene(1, SIZE, Style::Structured);
    scene.world.deaf = true;
    (0..5000).for_each(|cookie| scene.say(&request(READ, 0, cookie, SIZE, 512)));
    scene.run();
    assert!(scene.world.to_server.len() > 4000, "what there is no room for stays in the socket");
    scene.world.deaf = false;
    scene.run();
    let replies = replies(&scene.heard(), &BTreeMap::new());
    assert!(replies.len() == 5000 && replies.values().all(|reply| reply.error == 22));
}

#[test]
fn disconnect_finishes_what_is_under_way() {
    let mut scene = scene(3, SIZE, Style::Structured);
    scene.world.disk_rests = true;
    scene.say(&write(0, 1, 0, &[7; 4096]));
    scene.say(&request(FLUSH, 0, 2, 0, 0));
    scene.say(&request(DISC, 0, 0, 0, 0));
    scene.say(&write(0, 3, 0, &[8; 4096]));
    assert_eq!(scene.run(), Progress::Running);
    scene.world.disk_rests = false;
    assert_eq!(scene.run(), Progress::Over(Ending::Disconnected));
    assert_eq!(replies(&scene.heard(), &BTreeMap::new()).len(), 2);
    assert!(scene.world.files[0][..4096].iter().all(|byte| *byte == 7), "nothing counts after a disconnect");
}

#[test]
fn the_writes_of_a_client_that_is_gone_end_before_its_session_does() {
    for seed in 0..50 {
        let mut scene = scene(seed, SIZE, Style::Structured);
        scene.world.disk_rests = true;
        scene.say(&write(0, 1, 0, &[7; 4096]));
        scene.say(&write(0, 2, 8192, &[8; 4096])[..2000]);
        assert_eq!(scene.run(), Progress::Running);
        scene.world.hung_up = true;
        assert_eq!(scene.run(), Progress::Running, "a write is under way");
        scene.world.disk_rests = false;
        assert_eq!(scene.run(), Progress::Over(Ending::Gone));
        assert!(scene.world.files[0][..4096].iter().all(|byte| *byte == 7));
        assert!(scene.world.files[0][4096..].iter().all(|byte| *byte == 0), "half a payload is no write");
    }
}

#[test]
fn a_connections_first_request_waits_for_the_last_of_its_predecessor() {
    // A client that is not gone is not waited for.
    let mut old = scene(1, SIZE, Style::Structured);
    old.world.disk_rests = true;
    old.say(&write(0, 1, 0, &[7; 4096]));
    old.run();
    let mut other = greeted(old.beside(), Style::Structured);
    other.say(&write(0, 1, 0, &[9; 4096]));
    other.run();
    assert_eq!(reply(&mut other).error, 0);

    old.theirs = None;
    old.world.hung_up = true;
    let mut new = greeted(old.beside(), Style::Structured);
    new.say(&write(0, 1, 0, &[8; 4096]));
    new.run();
    assert_eq!((new.world.under_way(Done::Write), new.world.files[0][0]), (0, 0));
    old.world.disk_rests = false;
    assert_eq!(old.run(), Progress::Over(Ending::Gone));
    drop(old);
    new.world.rung = true;
    new.run();
    assert_eq!((reply(&mut new).error, new.world.files[0][0]), (0, 8));
}

#[test]
fn a_wrong_magic_ends_the_connection_not_the_requests_before_it() {
    let mut scene = scene(5, SIZE, Style::Simple);
    scene.say(&write(0, 1, 0, &[7; 4096]));
    scene.say(&[0; 28]);
    scene.say(&write(0, 2, 0, &[8; 4096]));
    assert_eq!(scene.run(), Progress::Over(Ending::Magic));
    assert_eq!(reply(&mut scene), Reply::default());
    assert_eq!(scene.world.files[0][0], 7);
}

#[test]
fn a_write_too_long_to_skip_ends_the_connection() {
    let mut scene = scene(5, SIZE, Style::Simple);
    scene.say(&request(WRITE, 0, 1, 0, u32::MAX));
    assert_eq!(scene.run(), Progress::Over(Ending::TooLong(u32::MAX.into())));
}

#[test]
fn a_closed_gate_holds_every_request_and_the_new_route_has_it() {
    for seed in 0..50 {
        let mut scene = scene(seed, SIZE, Style::Structured);
        let leaving = scene.gate.close();
        scene.say(&write(0, 1, 0, &[7; 4096]));
        scene.say(&request(READ, 0, 2, 65536, 65536));
        scene.say(&request(BLOCK_STATUS, 0, 3, 65536, 65536));
        scene.say(&request(FLUSH, 0, 4, 0, 0));
        scene.run();
        assert!(scene.heard().is_empty());
        assert!(leaving.is_empty(&crate::io::Waker::simulated(9)), "nobody is inside");
        scene.gate.open(Route { disk: disk(1, SIZE), mirror: None });
        scene.world.rung = true;
        scene.run();
        assert_eq!(replies(&scene.heard(), &BTreeMap::new()).len(), 4);
        assert_eq!((scene.world.files[0][0], scene.world.files[1][0]), (0, 7));
    }
}

#[test]
fn a_write_is_marked_when_its_client_hears_of_it() {
    for (message, range) in [
        (write(0, 1, 70_000, &[7; 4096]), ByteRange { start: 65536, end: 131_072 }),
        (request(TRIM, 0, 1, 131_072, 4096), ByteRange { start: 131_072, end: 196_608 }),
        (request(WRITE_ZEROES, 0, 1, 131_072, 4096), ByteRange { start: 131_072, end: 196_608 }),
    ] {
        for failing in [None, Some((Done::Write, 5)), Some((Done::Zero, 5))] {
            let mut scene = scene(1, SIZE, Style::Structured);
            let mirror = Arc::new(Mirror::new(Arc::clone(&scene.disk), disk(1, SIZE), 16, false));
            scene.gate.replace(Route { disk: Arc::clone(&scene.disk), mirror: Some(Arc::clone(&mirror)) });
            scene.world.failing = failing;
            scene.say(&message);
            scene.run();
            reply(&mut scene);
            assert_eq!(mirror.dirty.runs(ByteRange { start: 0, end: SIZE }).iter().filter(|(_, m)| *m).count(), 1);
            assert!(mirror.dirty.is_marked(range));
        }
    }
}

#[test]
fn errors_have_the_protocols_numbers_in_either_kind_of_reply() {
    for style in [Style::Simple, Style::Structured] {
        for (message, failing, want) in [
            (request(READ, 0, 1, 0, 512), (Done::Read, 5), 5),
            (write(0, 1, 0, &[1; 512]), (Done::Write, 28), 28),
            (write(0, 1, 0, &[1; 512]), (Done::Write, 122), 28),
            (write(flag::FUA, 1, 0, &[1; 512]), (Done::Flush, 5), 5),
            (request(FLUSH, 0, 1, 0, 0), (Done::Flush, 28), 28),
            (request(TRIM, 0, 1, 0, 512), (Done::Zero, 5), 5),
            // The file system can neither make holes nor zero in place: fast is only what is short.
            (request(WRITE_ZEROES, flag::FAST_ZERO, 1, 0, SIZE as u32), (Done::Zero, 95), 95),
            (request(WRITE_ZEROES, flag::FAST_ZERO, 1, 0, 512), (Done::Zero, 95), 0),
            (request(WRITE_ZEROES, 0, 1, 0, SIZE as u32), (Done::Zero, 95), 0),
            (request(WRITE_ZEROES, flag::FAST_ZERO, 1, 0, SIZE as u32), (Done::Read, 5), 0),
            (request(99, 0, 1, 0, 512), (Done::Read, 5), 22),
        ] {
            let mut scene = scene(2, SIZE, style);
            // Data, so that there is something to read.
            scene.say(&write(0, 0, 0, &[1; 512]));
            scene.run();
            scene.heard();
            scene.world.failing = Some(failing);
            scene.say(&message);
            scene.run();
            assert_eq!(reply(&mut scene).error, want, "{failing:?}");
        }
    }
}

#[test]
fn fua_is_answered_after_a_flush() {
    let messages = [write(flag::FUA, 1, 0, &[1; 512]), request(WRITE_ZEROES, flag::FUA, 1, 0, 512)];
    for (message, change) in messages.into_iter().zip([Done::Write, Done::Zero]) {
        let mut scene = scene(2, SIZE, Style::Structured);
        scene.world.whole = true;
        scene.world.log.clear();
        scene.say(&message);
        scene.run();
        let order: Vec<_> = scene.world.log.iter().filter(|done| **done != Done::Receive).copied().collect();
        assert_eq!(order, [change, Done::Flush, Done::Send]);
    }
}

#[test]
fn holes_are_told_where_the_client_takes_them() {
    let mut scene = scene(2, SIZE, Style::Structured);
    scene.say(&write(0, 0, 65536, &[1; 65536]));
    scene.run();
    scene.heard();
    for (flags, offset, len, holes, chunks) in [
        (0, 0, 65536, 1, 1),
        (0, 0, 262_144, 2, 3),
        (flag::DF, 0, 262_144, 0, 1),
        (flag::DF, 0, 65536, 0, 1),
        (0, 65536, 65536, 0, 1),
        (0, 0, 4096, 0, 1),
    ] {
        scene.say(&request(READ, flags, 5, offset, len));
        scene.run();
        let reply = reply(&mut scene);
        assert_eq!((reply.holes, reply.chunks), (holes, chunks), "{len} bytes at {offset}");
        let got: Vec<u8> = reply.data.into_values().flatten().collect();
        let want = &scene.world.files[0][offset as usize..][..len as usize];
        assert!(got == want);
    }
}

#[test]
fn block_status_says_holes_and_data() {
    let mut scene = scene(2, SIZE, Style::Structured);
    scene.say(&write(0, 0, 65536, &[1; 65536]));
    scene.run();
    scene.heard();
    for (flags, offset, len, want) in [
        (0, 0, SIZE as u32, &[(65536, 3), (65536, 0), (SIZE - 131_072, 3)][..]),
        (flag::REQ_ONE, 0, SIZE as u32, &[(65536, 3)]),
        (flag::REQ_ONE, 0, 100, &[(100, 3)]),
        (0, 100_000, 31_073, &[(31_072, 0), (1, 3)]),
    ] {
        scene.say(&request(BLOCK_STATUS, flags, 5, offset, len));
        scene.run();
        assert_eq!(reply(&mut scene).extents[&1], want);
    }
}

/// The mirror's own bitmap among them, as long as its job is under way.
#[test]
fn each_context_that_was_chosen_or_asked_for_has_its_answer() {
    let (target, chunk) = (disk(1, SIZE), 65536);
    let scene = Scene::new(2, SIZE);
    let mirror = Arc::new(Mirror::new(Arc::clone(&scene.disk), target, 16, false));
    scene.gate.replace(Route { disk: Arc::clone(&scene.disk), mirror: Some(Arc::clone(&mirror)) });
    let mut scene = greeted(scene, Style::Extended);
    scene.say(&put(Style::Extended, 0, 0, chunk, &[1; 512]));
    scene.run();
    scene.heard();
    let dirty = [(chunk, 0), (chunk, 1), (SIZE - 2 * chunk, 0)];
    let depths = [(SIZE, 1)];
    let filter = |numbers: &[u32]| {
        let payload: Vec<u8> =
            SIZE.to_be_bytes().into_iter().chain(numbers.iter().flat_map(|n| n.to_be_bytes())).collect();
        [extended(BLOCK_STATUS, flag::PAYLOAD_LEN, 5, 0, payload.len() as u64), payload].concat()
    };
    for (message, numbers) in
        [(extended(BLOCK_STATUS, 0, 5, 0, SIZE), &[1, 2, 3][..]), (filter(&[3]), &[3]), (filter(&[3, 1]), &[1, 3])]
    {
        scene.say(&message);
        scene.run();
        let extents = reply(&mut scene).extents;
        assert!(extents.keys().eq(numbers));
        assert!(extents.get(&2).is_none_or(|found| *found == depths));
        assert!(extents.get(&3).is_none_or(|found| *found == dirty));
    }
    scene.say(&filter(&[9]));
    scene.gate.replace(Route { disk: Arc::clone(&scene.disk), mirror: None });
    scene.say(&extended(BLOCK_STATUS, 0, 6, 0, SIZE));
    scene.run();
    let replies = replies(&scene.heard(), &BTreeMap::new());
    assert_eq!((replies[&5].error, replies[&6].error), (22, 22), "an unknown number, and a job that is over");
}

#[test]
fn requests_of_32_mib_are_done() {
    let size = 40 << 20;
    let mut scene = scene(2, size, Style::Simple);
    let payload: Vec<u8> = (0..32 << 20).map(|n: u32| (n >> 9) as u8).collect();
    scene.say(&write(0, 1, 4096, &payload));
    scene.say(&request(READ, 0, 2, 0, 4096));
    scene.run();
    let small = BTreeMap::from([(2, (0, 4096))]);
    assert_eq!(replies(&scene.heard(), &small).len(), 2);
    scene.say(&request(READ, 0, 3, 4096, 32 << 20));
    scene.run();
    let replies = replies(&scene.heard(), &BTreeMap::from([(3, (4096, 32 << 20))]));
    assert!(replies[&3].data[&4096] == payload);
}

#[test]
fn a_silent_client_is_dropped() {
    let mut scene = Scene::new(1, SIZE);
    scene.say(&3_u32.to_be_bytes());
    assert_eq!(scene.run(), Progress::Running);
    scene.world.expired = true;
    assert_eq!(scene.run(), Progress::Over(Ending::Deadline));
}

#[test]
fn a_served_client_may_be_silent() {
    let mut scene = scene(1, SIZE, Style::Structured);
    scene.world.expired = true;
    assert_eq!(scene.run(), Progress::Running);
    scene.say(&request(FLUSH, 0, 1, 0, 0));
    assert_eq!(scene.run(), Progress::Running);
    assert_eq!(reply(&mut scene).error, 0);
}

#[test]
fn export_name_and_hanging_up_ends_one_session() {
    // Killed qemu-nbd.
    let mut scene = Scene::new(1, SIZE);
    scene.say(&[&3_u32.to_be_bytes()[..], &option(wire::opt::EXPORT_NAME, b"vda")].concat());
    scene.world.deaf = true;
    scene.run();
    scene.world.hung_up = true;
    assert_eq!(scene.run(), Progress::Over(Ending::Gone));
}

#[test]
fn leaving_with_replies_pending_ends_one_session() {
    // Was an assertion in nbdkit.
    let mut scene = scene(1, SIZE, Style::Structured);
    scene.world.deaf = true;
    (0..100).for_each(|cookie| scene.say(&request(READ, 0, cookie, 0, 65536)));
    scene.run();
    scene.world.hung_up = true;
    assert_eq!(scene.run(), Progress::Over(Ending::Gone));
}

#[test]
fn a_stop_ends_it_when_what_is_under_way_is_done() {
    let mut scene = scene(1, SIZE, Style::Structured);
    scene.world.disk_rests = true;
    scene.say(&write(0, 1, 0, &[7; 4096]));
    scene.run();
    scene.session.stop().store(true, Ordering::Release);
    scene.world.rung = true;
    assert_eq!(scene.run(), Progress::Running);
    scene.world.disk_rests = false;
    assert_eq!(scene.run(), Progress::Over(Ending::Stopped));
    assert_eq!(reply(&mut scene).error, 0);
}

#[test]
fn a_burst_costs_one_receive_and_one_send() {
    let mut scene = scene(1, SIZE, Style::Structured);
    scene.world.whole = true;
    scene.world.disk_rests = true;
    scene.world.log.clear();
    (0..16).for_each(|n| scene.say(&write(0, n, n * 4096, &[7; 4096])));
    scene.run();
    assert_eq!(scene.world.log, [Done::Receive]);
    assert_eq!(scene.world.under_way(Done::Write), 16);
    scene.world.deaf = true;
    scene.world.disk_rests = false;
    scene.run();
    scene.world.deaf = false;
    scene.world.log.clear();
    scene.run();
    assert!(scene.world.log.len() <= 2, "one send was under way, one has the rest: {:?}", scene.world.log);
    assert_eq!(replies(&scene.heard(), &BTreeMap::new()).len(), 16);
}

#[test]
fn a_long_payload_goes_straight_to_its_place() {
    let mut scene = scene(1, 4 << 20, Style::Structured);
    scene.world.whole = true;
    let send = |scene: &mut Scene, cookie| {
        scene.world.log.clear();
        scene.say(&write(0, cookie, 0, &vec![7; 1 << 20]));
        scene.run();
        assert_eq!(reply(scene), Reply::default());
    };
    send(&mut scene, 1);
    // The second's header comes alone, so no byte of its payload is copied.
    send(&mut scene, 2);
    assert_eq!(scene.world.log, [Done::Receive, Done::Receive, Done::Write, Done::Send]);
    scene.say(&write(0, 3, 1 << 20, &[9; 512]));
    scene.run();
    assert_eq!((scene.world.files[0][1 << 20], scene.world.files[0][(1 << 20) - 1]), (9, 7));
}
