//! The client against the server's own side, in pieces of any size, and against servers that lie.
use super::{Ask, Event, Negotiation, Next, Replies, Session};
use crate::error::Result;
use crate::nbd::export::{BlockSizes, ExportInfo};
use crate::nbd::wire::{self, Command, Header, chunk, handshake_flag, opt, rep, state, transmission_flag};
use crate::nbd::{Address, Errno, Handshake, Outcome, ReplyTo, Server, Style, Tls, TlsNames};
use crate::range::ByteRange;
use proptest::prelude::{Just, any, prop_oneof, proptest};
use proptest::strategy::Strategy;
use proptest::test_runner::TestCaseError;

fn export() -> ExportInfo {
    ExportInfo {
        name: "disk".into(),
        description: "words".into(),
        size: 1 << 30,
        read_only: true,
        multi_conn: true,
        fast_zero: false,
        block_sizes: BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 },
        bitmaps: Vec::new(),
    }
}

fn address(export: &str, tls: bool) -> Address {
    let server = Server::unix("/socket").expect("a path");
    Address { tls: tls.then(TlsNames::default), ..Address::new(server, export).expect("a name") }
}

/// Lets the client talk to our server, `piece` bytes at a time: in plain, and inside TLS from where both say so.
fn converse(name: &str, tls: bool, mode: Tls, piece: usize) -> Result<Option<Session>> {
    let mut to_client = Vec::new();
    let mut server = Handshake::new(mode, &mut to_client);
    let mut client = Negotiation::new(&address(name, tls));
    let exports = [export()];
    let (mut server_inside, mut client_inside) = (false, false);
    loop {
        let mut to_server = Vec::new();
        for bytes in std::mem::take(&mut to_client).chunks(piece) {
            let mut input = bytes;
            match client.step(&mut input, &mut to_server)? {
                Next::Session(session) => {
                    assert_eq!((server_inside, client_inside), (tls, tls));
                    return Ok(Some(session));
                }
                Next::StartTls => {
                    client_inside = true;
                    client.inside_tls(&mut to_server);
                }
                Next::More => {}
            }
            assert!(input.is_empty(), "nothing is left without a session");
        }
        assert_eq!(server_inside, client_inside, "what comes now is heard as it is said");
        if to_server.is_empty() {
            return Ok(None);
        }
        let mut input = &to_server[..];
        while !input.is_empty() {
            match server.step(&mut input, &exports[..], &mut to_client) {
                Outcome::StartTls => {
                    assert!(input.is_empty(), "nothing is said in plain behind STARTTLS");
                    server_inside = true;
                }
                Outcome::Transmission(_) => break,
                _ => {}
            }
        }
    }
}

#[test]
fn our_server_and_our_client_agree() {
    let modes = [(false, Tls::Off), (false, Tls::Allowed), (true, Tls::Allowed), (true, Tls::Required)];
    for (piece, (tls, mode)) in [1, 2, 7, 19, 4096].into_iter().flat_map(|piece| modes.map(|modes| (piece, modes))) {
        for name in ["disk", ""] {
            let session = converse(name, tls, mode, piece).expect("a negotiation").expect("its end");
            let wanted = Session {
                size: 1 << 30,
                flags: export().transmission_flags(Style::Structured, true),
                block_sizes: export().block_sizes,
                structured_replies: true,
                base_allocation: Some(1),
            };
            assert_eq!(session, wanted);
        }
        let error = converse("none", tls, mode, piece).expect_err("no such export").one_line();
        assert!(error.contains("no export \"none\""), "{error}");
    }
    for (tls, mode, reason) in [
        (true, Tls::Off, "this server was started without TLS"),
        (false, Tls::Required, "name it by nbds:// or nbds+unix://"),
    ] {
        let error = converse("disk", tls, mode, 4096).expect_err(reason).one_line();
        assert!(error.contains(reason), "{error}");
    }
}

/// Bytes from the way between, before TLS could keep them out.
#[test]
fn behind_starttls_nothing_in_plain_is_heard_or_said() {
    let ack = reply(opt::STARTTLS, rep::ACK, &[]);
    let asked = [&u32::from(FIXED).to_be_bytes()[..], b"IHAVEOPT\0\0\0\x05\0\0\0\0"].concat();
    let client = || {
        let (mut client, mut out) = (Negotiation::new(&address("disk", true)), Vec::new());
        assert_eq!(client.step(&mut &greeting(FIXED)[..], &mut out).ok(), Some(Next::More));
        assert_eq!(out, asked, "STARTTLS and nothing else");
        client
    };
    let mut out = Vec::new();
    let mut told = client();
    assert_eq!(told.step(&mut &ack[..], &mut out).ok(), Some(Next::StartTls));
    assert!(out.is_empty(), "nothing is said before TLS has begun");
    told.inside_tls(&mut out);
    assert_eq!(out, b"IHAVEOPT\0\0\0\x08\0\0\0\0", "inside it begins anew");

    let behind = [&ack[..], &reply(opt::STRUCTURED_REPLY, rep::ACK, &[])].concat();
    for len in ack.len() + 1..=behind.len() {
        let error = client().step(&mut &behind[..len], &mut Vec::new()).expect_err("it is somebody's").one_line();
        assert!(error.contains("in plain came behind"), "{error}");
    }
    let mut early = Negotiation::new(&address("disk", true));
    let error = early.step(&mut &[&greeting(FIXED)[..], &ack].concat()[..], &mut Vec::new()).expect_err("early");
    assert!(error.one_line().contains("before it was asked"), "{}", error.one_line());
    for (said, reason) in [
        (reply(opt::STARTTLS, rep::ERR_UNSUP, b"what?"), "the server has no TLS (error 0x80000001): \"what?\": start"),
        (reply(opt::STARTTLS, rep::ERR_POLICY, b""), "the server has no TLS (error 0x80000002): start it"),
        (reply(opt::STARTTLS, rep::ERR_TLS_REQD, b""), "the server has no TLS"),
        (reply(opt::STARTTLS, rep::ACK, b"x"), "option 5 has a reply of the type 1"),
        (reply(opt::STARTTLS, rep::SERVER, b""), "option 5 has a reply of the type 2"),
        (reply(opt::STRUCTURED_REPLY, rep::ACK, b""), "option 8 came where 5"),
    ] {
        let mut out = Vec::new();
        let error = client().step(&mut &said[..], &mut out).expect_err(reason).one_line();
        assert!(error.contains(reason) && out.is_empty(), "{reason}: {error}");
    }
    let mut out = Vec::new();
    let older = Negotiation::new(&address("disk", true)).step(&mut &greeting(0)[..], &mut out);
    let error = older.expect_err("no options").one_line();
    assert!(error.contains("the server has no TLS (it knows no options)"), "{error}");
    assert!(!out.ends_with(b"disk"), "the name is not said in plain");
}

fn greeting(flags: u16) -> Vec<u8> {
    [&wire::NBD_MAGIC.to_be_bytes()[..], &wire::OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let numbers = [option.to_be_bytes(), kind.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
    [&wire::OPTION_REPLY_MAGIC.to_be_bytes()[..], &numbers, data].concat()
}

fn facts(size: u64, flags: u16) -> Vec<u8> {
    [&[0, 0], &size.to_be_bytes()[..], &flags.to_be_bytes()].concat()
}

const FIXED: u16 = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;

/// What comes of a server that says all this whatever it is asked.
fn negotiated(said: &[Vec<u8>]) -> Result<Next> {
    let mut client = Negotiation::new(&address("disk", false));
    client.step(&mut &said.concat()[..], &mut Vec::new())
}

#[test]
fn older_servers_are_asked_in_their_own_manner() {
    let flags = transmission_flag::HAS_FLAGS | transmission_flag::READ_ONLY;
    let by_name = [&(7u64 << 20).to_be_bytes()[..], &flags.to_be_bytes()].concat();
    let no = |option| reply(option, rep::ERR_UNSUP, b"what?");
    let gone = [greeting(FIXED), no(opt::STRUCTURED_REPLY), no(opt::GO), by_name.clone()];
    let without_answers = [greeting(0), by_name, vec![0; 124]];
    for said in [&gone[..], &without_answers] {
        let Ok(Next::Session(session)) = negotiated(said) else { panic!("no session: {said:?}") };
        let Session { size, structured_replies, base_allocation, block_sizes, .. } = session;
        assert_eq!((size, structured_replies, base_allocation), (7 << 20, false, None));
        assert_eq!((session.flags, block_sizes), (flags, BlockSizes::default()));
    }
    let mut client = Negotiation::new(&address("none", false));
    let mut asked = Vec::new();
    assert_eq!(client.step(&mut &greeting(0)[..], &mut asked).ok(), Some(Next::More));
    assert_eq!(asked, [&[0; 4], &b"IHAVEOPT\0\0\0\x01\0\0\0\x04none"[..]].concat());
    assert!(client.hung_up().one_line().contains("no export \"none\""));
}

#[test]
fn a_server_that_lies_in_the_negotiation_is_named() {
    let yes = || reply(opt::STRUCTURED_REPLY, rep::ACK, &[]);
    let context = |number: u8, name: &str| {
        reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, &[&[0, 0, 0, number], name.as_bytes()].concat())
    };
    let contexts = || reply(opt::SET_META_CONTEXT, rep::ACK, &[]);
    let sizes = |sizes: [u32; 3]| [&[0, 3], &sizes.map(u32::to_be_bytes).concat()[..]].concat();
    let info = |data: &[u8]| vec![greeting(FIXED), yes(), contexts(), reply(opt::GO, rep::INFO, data)];
    let go = |kind: u32, data: &[u8]| vec![greeting(FIXED), yes(), contexts(), reply(opt::GO, kind, data)];
    for (said, reason) in [
        (vec![b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()], "no NBD server"),
        (
            vec![wire::NBD_MAGIC.to_be_bytes().to_vec(), 0x0000_4202_8186_1253u64.to_be_bytes().to_vec(), vec![0; 2]],
            "old",
        ),
        (vec![greeting(FIXED), vec![0; 20]], "begins with"),
        (vec![greeting(FIXED), reply(opt::GO, rep::ACK, &[])], "option 7 came where 8"),
        (vec![greeting(FIXED), reply(opt::STRUCTURED_REPLY, rep::ERR_TLS_REQD, b"\x1b[1m")], "\"\\u{1b}[1m\""),
        (vec![greeting(FIXED), reply(opt::STRUCTURED_REPLY, rep::SERVER, &[])], "type 2"),
        (vec![greeting(FIXED), reply(opt::STRUCTURED_REPLY, rep::ACK, &[0; 9000])], "9000 bytes"),
        (vec![greeting(FIXED), yes(), context(1, "base:allocation").repeat(2)], "two numbers"),
        (vec![greeting(FIXED), yes(), reply(opt::SET_META_CONTEXT, rep::META_CONTEXT, &[1])], "no number"),
        (vec![greeting(FIXED), yes(), context(1, "x").repeat(257)], "more than 256"),
        (info(&[]), "no number"),
        (info(&facts(1 << 63, 1)), "9223372036854775808 bytes"),
        (info(&facts(1, 1)[..11]), "fewer than 10"),
        (info(&sizes([512; 3])[..13]), "fewer than 12"),
        (info(&sizes([3, 4096, 1 << 20])), "cannot be: 3"),
        (info(&sizes([0, 4096, 1 << 20])), "cannot be: 0"),
        (info(&sizes([1 << 17, 1 << 17, 1 << 20])), "cannot be"),
        (info(&sizes([512, 256, 1 << 20])), "cannot be"),
        (info(&sizes([512, 4096, 511])), "cannot be"),
        (info(&sizes([512, 4096, 513])), "cannot be"),
        (go(rep::ACK, &[]), "without telling"),
        (go(rep::ERR_UNKNOWN, b"gone"), "\"gone\""),
        (go(rep::ERR_BLOCK_SIZE_REQD, &[]), "0x80000008"),
        (go(rep::META_CONTEXT, &[]), "type 4"),
    ] {
        let error = negotiated(&said).expect_err(reason).one_line();
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

fn session(structured_replies: bool) -> Session {
    Session {
        size: 1 << 40,
        flags: 0,
        block_sizes: BlockSizes::default(),
        structured_replies,
        base_allocation: structured_replies.then_some(9),
    }
}

fn to(cookie: u64, style: Style) -> ReplyTo {
    ReplyTo { style, cookie, offset: 0 }
}

fn simple(cookie: u64) -> Vec<u8> {
    to(cookie, Style::Simple).done().to_vec()
}

fn none_chunk(cookie: u64) -> Vec<u8> {
    head(1, chunk::NONE, cookie, 0)
}

const READ: ByteRange = ByteRange { start: 4096, end: 8192 };

/// What comes of one request and of these bytes.
fn answered(structured: bool, ask: Ask, bytes: &[u8]) -> Result<()> {
    let mut replies = Replies::new(session(structured));
    assert_eq!(replies.ask(ask, &mut Vec::new()), 1);
    let mut input = bytes;
    while replies.step(&mut input)?.is_some() {}
    Ok(())
}

fn head(flags: u16, kind: u16, cookie: u64, len: u32) -> Vec<u8> {
    let magic = wire::STRUCTURED_REPLY_MAGIC.to_be_bytes();
    [&magic[..], &flags.to_be_bytes(), &kind.to_be_bytes(), &cookie.to_be_bytes(), &len.to_be_bytes()].concat()
}

fn data(cookie: u64, at: u64, len: u32, done: bool) -> Vec<u8> {
    [&to(cookie, Style::Structured).data(at, len, done)[..], &vec![7; len as usize]].concat()
}

fn extents(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let listed = extents.iter().flat_map(|(len, state)| [len.to_be_bytes(), state.to_be_bytes()].concat());
    to(1, Style::Structured).block_status(context, extents.len(), true).iter().copied().chain(listed).collect()
}

#[test]
fn a_server_that_lies_in_its_replies_is_named() {
    let hole = |at, len, done| to(1, Style::Structured).hole(at, len, done).to_vec();
    let none = none_chunk(1);
    for (bytes, reason) in [
        (b"HTTP".to_vec(), "begins with 0x48545450"),
        (simple(1), "without chunks"),
        (none_chunk(2), "request 0x2"),
        (none_chunk(0), "request 0x0"),
        ([hole(4096, 4096, true), none.clone()].concat(), "request 0x1"),
        (head(2, chunk::NONE, 1, 0), "flags 0x2"),
        (head(0, chunk::NONE, 1, 0), "0 bytes (done: false)"),
        (head(1, chunk::NONE, 1, 1), "1 bytes"),
        (head(1, chunk::OFFSET_DATA, 1, 8), "8 bytes"),
        (head(1, chunk::OFFSET_DATA, 1, 4096 + 9), "4105 bytes"),
        (head(1, chunk::OFFSET_DATA, 1, u32::MAX), "4294967295 bytes"),
        (head(1, chunk::OFFSET_HOLE, 1, 13), "13 bytes"),
        (head(1, chunk::BLOCK_STATUS, 1, 12), "type 5"),
        (head(1, 3, 1, 12), "type 3"),
        (head(1, chunk::ERROR, 1, 5), "5 bytes"),
        (head(1, chunk::ERROR, 1, 1 << 20), "1048576 bytes"),
        ([head(1, chunk::ERROR, 1, 6), vec![0, 0, 0, 0, 0, 0]].concat(), "an error 0"),
        ([head(1, chunk::ERROR, 1, 6), vec![0, 0, 0, 5, 0, 1]].concat(), "text of 1 bytes"),
        (data(1, 4095, 1, false), "is answered with"),
        (data(1, 8192, 1, false), "is answered with"),
        (data(1, u64::MAX, 1, false), "1 bytes at 18446744073709551615"),
        (hole(4096, 4097, false), "is answered with"),
        ([data(1, 4096, 100, false), data(1, 4195, 1, false)].concat(), "twice"),
        ([data(1, 4096, 100, false), hole(4096, 100, false)].concat(), "twice"),
        ([data(1, 5000, 10, false), data(1, 4096, 4096, false)].concat(), "twice"),
        (none, "without all"),
        (data(1, 4097, 4095, true), "without all"),
        ([data(1, 4096, 1, false), data(1, 4098, 4094, true)].concat(), "without all"),
        ((0..1025).flat_map(|n| data(1, 4096 + 2 * n, 1, false)).collect(), "more than 1024 pieces"),
    ] {
        let error = answered(true, Ask::Read(READ), &bytes).expect_err(reason).one_line();
        assert!(error.contains(reason), "{reason}: {error}");
    }
    for (bytes, reason) in [
        (simple(1), "without extents"),
        (none_chunk(1), "without all"),
        (data(1, 4096, 1, true), "type 1"),
        (head(1, chunk::BLOCK_STATUS, 1, 4), "4 bytes"),
        (head(1, chunk::BLOCK_STATUS, 1, 13), "13 bytes"),
        (head(1, chunk::BLOCK_STATUS, 1, 4 + 8 * ((1 << 20) + 1)), "8388620 bytes"),
        (extents(8, &[(4096, 0)]), "context"),
        (extents(9, &[(0, 0)]), "0 bytes at 4096"),
        (extents(9, &[(4096, 0), (1, 0)]), "at 8192"),
    ] {
        let error = answered(true, Ask::BlockStatus(READ), &bytes).expect_err(reason).one_line();
        assert!(error.contains(reason), "{reason}: {error}");
    }
    let chunk = answered(false, Ask::Read(READ), &none_chunk(1)).expect_err("not agreed on").one_line();
    assert!(chunk.contains("begins with 0x668e33ef"), "{chunk}");
}

#[test]
fn what_is_refused_is_told_in_words_and_extents_are_cut() {
    let mut replies = Replies::new(session(true));
    let mut requests = Vec::new();
    for ask in [Ask::Read(READ), Ask::BlockStatus(READ), Ask::Read(READ)] {
        replies.ask(ask, &mut requests);
    }
    let header = requests.chunks(28).nth(1).and_then(|bytes| Header::parse(Style::Structured, bytes));
    let status = Header { flags: 0, command: Command::BlockStatus as u16, cookie: 2, offset: 4096, len: 4096 };
    assert_eq!(header, Some(status));
    let two = to(2, Style::Structured);
    let said = [
        [&head(1, chunk::ERROR_OFFSET, 3, 24)[..], &[0, 0, 0, 5, 0, 10], b"bad sector", &[0; 8]].concat(),
        [&two.block_status(9, 2, true)[..], &two.extent(96, 3), &two.extent(1 << 30, 0)].concat(),
        to(1, Style::Simple).error(Errno::Inval, ""),
    ];
    let mut input = &said[0][..];
    let failed = |cookie, errno, message: &str| {
        let failure = super::Failure { errno, message: message.into() };
        Some(Event::Done { cookie, outcome: Err(failure) })
    };
    assert_eq!(replies.step(&mut input).ok(), Some(failed(3, 5, "bad sector")));
    let mut input = &said[1][..];
    let extent = |start, end, state| Some(Event::Extent { cookie: 2, range: ByteRange { start, end }, state });
    assert_eq!(replies.step(&mut input).ok(), Some(extent(4096, 4192, state::HOLE | state::ZERO)));
    assert_eq!(replies.step(&mut input).ok(), Some(extent(4192, 8192, 0)));
    assert_eq!(replies.step(&mut input).ok(), Some(Some(Event::Done { cookie: 2, outcome: Ok(()) })));
    // Only an error may be told without chunks, and of a read not even that.
    assert!(replies.step(&mut &said[2][..]).is_err());
}

/// A piece of an answer: zeroes or bytes.
#[derive(Clone, Debug)]
struct Piece {
    range: ByteRange,
    zero: bool,
}

/// One read's answer: pieces in any order that make up the whole.
fn answer() -> impl Strategy<Value = (ByteRange, Vec<Piece>)> {
    let cuts = proptest::collection::btree_set(1u64..200, 0..8);
    (0u64..1 << 30, cuts, any::<u64>(), any::<u16>()).prop_flat_map(|(start, cuts, _, zeroes)| {
        let ends: Vec<u64> = cuts.into_iter().chain([200]).collect();
        let starts = std::iter::once(0).chain(ends.iter().copied());
        let pieces: Vec<Piece> = starts
            .zip(&ends)
            .enumerate()
            .map(|(number, (from, to))| Piece {
                range: ByteRange { start: start + from, end: start + to },
                zero: zeroes >> number & 1 == 1,
            })
            .collect();
        (Just(ByteRange { start, end: start + 200 }), Just(pieces).prop_shuffle())
    })
}

/// What the disk of these tests has.
fn byte(at: u64) -> u8 {
    (at * 31 + at / 256) as u8 | 1
}

fn bytes(range: ByteRange) -> Vec<u8> {
    (range.start..range.end).map(byte).collect()
}

proptest! {
    /// Whatever the order of chunks and requests, and however the stream is cut.
    #[test]
    fn reads_come_together(answers in proptest::collection::vec(answer(), 1..5), structured in any::<bool>(), piece in 1usize..300) {
        let mut replies = Replies::new(session(structured));
        let mut stream = Vec::new();
        for (number, (range, pieces)) in answers.iter().enumerate() {
            let cookie = replies.ask(Ask::Read(*range), &mut Vec::new());
            assert_eq!(cookie, number as u64 + 1);
            if !structured {
                stream.push([&simple(cookie)[..], &bytes(*range)].concat());
                continue;
            }
            for (index, Piece { range, zero }) in pieces.iter().enumerate() {
                let (done, len) = (index + 1 == pieces.len(), range.len() as u32);
                stream.push(match zero {
                    true => to(cookie, Style::Structured).hole(range.start, len, done).to_vec(),
                    false => [&to(cookie, Style::Structured).data(range.start, len, done)[..], &bytes(*range)].concat(),
                });
            }
        }
        let mut disks: Vec<Vec<u8>> = answers.iter().map(|(range, _)| vec![0xaa; range.len() as usize]).collect();
        let mut done = 0;
        for mut input in stream.concat().chunks(piece) {
            while let Some(event) = replies.step(&mut input).map_err(|error| TestCaseError::fail(error.one_line()))? {
                match event {
                    Event::Data { cookie, at, bytes } => {
                        let number = cookie as usize - 1;
                        disks[number][(at - answers[number].0.start) as usize..][..bytes.len()].copy_from_slice(bytes);
                    }
                    Event::Zero { cookie, range } => {
                        let number = cookie as usize - 1;
                        disks[number][(range.start - answers[number].0.start) as usize..][..range.len() as usize].fill(0);
                    }
                    Event::Done { outcome, .. } => {
                        assert!(outcome.is_ok());
                        done += 1;
                    }
                    Event::Extent { .. } => panic!("nobody asked"),
                }
            }
        }
        assert_eq!((done, replies.pending()), (answers.len(), 0));
        for ((range, pieces), disk) in answers.iter().zip(disks) {
            let zero = |at: u64| structured && pieces.iter().any(|p| p.zero && (p.range.start..p.range.end).contains(&at));
            let truth: Vec<u8> = (range.start..range.end).map(|at| if zero(at) { 0 } else { byte(at) }).collect();
            assert!(disk == truth, "{range}");
        }
    }

    /// Any bytes end in an error or in wanting more, whatever they are cut into, and both cuts agree.
    #[test]
    fn any_bytes_are_an_answer_or_an_error(
        bytes in proptest::collection::vec(prop_oneof![
            any::<Vec<u8>>(),
            Just(none_chunk(1)),
            Just(head(1, chunk::OFFSET_DATA, 1, 4104)),
            Just(data(1, 4096, 4096, true)),
            Just(extents(9, &[(512, 3), (4096, 0)])),
            Just(to(1, Style::Structured).error(Errno::Io, "why")),
        ], 0..4),
        status in any::<bool>(),
    ) {
        let bytes = bytes.concat();
        let ask = if status { Ask::BlockStatus(READ) } else { Ask::Read(READ) };
        let run = |piece: usize| {
            let mut replies = Replies::new(session(true));
            replies.ask(ask, &mut Vec::new());
            for mut input in bytes.chunks(piece) {
                while replies.step(&mut input).map_err(|error| error.one_line())?.is_some() {}
            }
            Ok::<_, String>(replies.pending())
        };
        assert_eq!(run(1), run(usize::MAX));
        let greet = |piece: usize| {
            let mut client = Negotiation::new(&address("disk", false));
            for input in [&greeting(FIXED)[..], &bytes].concat().chunks(piece) {
                let mut input = input;
                client.step(&mut input, &mut Vec::new()).map_err(|error| error.one_line())?;
            }
            Ok::<_, String>(())
        };
        assert_eq!(greet(1), greet(usize::MAX));
    }
}
