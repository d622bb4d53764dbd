//! Handshakes as clients make them, and as they should not.
use super::*;
use crate::nbd::export::BlockSizes;
use crate::nbd::wire::transmission_flag;
use proptest::prelude::*;

const BASE_ALLOCATION: &str = "base:allocation";
const GREETING_LEN: usize = 18;
const FIXED: u32 = 1;
const NO_ZEROES: u32 = 2;

fn export(name: &str, size: u64) -> ExportInfo {
    ExportInfo {
        name: name.into(),
        description: String::new(),
        size,
        read_only: false,
        multi_conn: true,
        fast_zero: false,
        block_sizes: BlockSizes::default(),
        bitmaps: Vec::new(),
    }
}

fn exports() -> Vec<ExportInfo> {
    let strict = BlockSizes { minimum: 512, ..BlockSizes::default() };
    vec![
        ExportInfo { description: "the first".into(), ..export("vda", 1 << 30) },
        ExportInfo { read_only: true, ..export("vdb", 12345) },
        ExportInfo { block_sizes: strict, ..export("strict", 1 << 20) },
    ]
}

/// What a client says, said in any pieces.
struct Said(Vec<u8>);

impl Said {
    fn nothing() -> Self {
        Self(Vec::new())
    }

    fn flags(flags: u32) -> Self {
        Self(flags.to_be_bytes().to_vec())
    }

    fn opt(mut self, option: u32, data: &[u8]) -> Self {
        self.0.extend(OPTION_MAGIC.to_be_bytes());
        self.0.extend(option.to_be_bytes());
        self.0.extend((data.len() as u32).to_be_bytes());
        self.0.extend(data);
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// All of it at once, by a server without TLS.
    fn heard(&self) -> Heard {
        converse(Tls::Off, &[&self.0])
    }

    /// This in plain, and `inside` behind it inside TLS.
    fn heard_by(&self, tls: Tls, inside: &Self) -> Heard {
        converse(tls, &[&self.0, &inside.0])
    }
}

/// What came of it.
#[derive(Debug, PartialEq)]
struct Heard {
    /// Without the greeting.
    out: Vec<u8>,
    outcome: Outcome,
    /// Bytes that were not taken.
    rest: Vec<u8>,
}

impl Heard {
    /// The replies, as option, type and data, up to what is no reply.
    fn replies(&self) -> Vec<(u32, u32, Vec<u8>)> {
        let mut fields = Fields(&self.out);
        let mut replies = Vec::new();
        while let (Some(OPTION_REPLY_MAGIC), Some(option), Some(kind), Some(len)) =
            (fields.u64(), fields.u32(), fields.u32(), fields.u32())
        {
            replies.push((option, kind, fields.bytes(len as usize).expect("a whole reply").to_vec()));
        }
        replies
    }

    fn kinds(&self) -> Vec<u32> {
        self.replies().into_iter().map(|(_, kind, _)| kind).collect()
    }

    fn negotiated(self) -> Negotiated {
        match self.outcome {
            Outcome::Transmission(negotiated) => *negotiated,
            other => panic!("no transmission: {other:?}"),
        }
    }
}

/// Says the pieces one by one: each is all that came until then. After STARTTLS they come out of TLS.
fn converse(tls: Tls, pieces: &[&[u8]]) -> Heard {
    let exports = exports();
    let mut out = Vec::new();
    let mut handshake = Handshake::new(tls, &mut out);
    let mut outcome = Outcome::More;
    let mut rest = Vec::new();
    for piece in pieces {
        let mut input = *piece;
        if outcome == Outcome::StartTls && !piece.is_empty() {
            outcome = Outcome::More;
        }
        while outcome == Outcome::More && !input.is_empty() {
            outcome = handshake.step(&mut input, &exports[..], &mut out);
        }
        rest.extend_from_slice(input);
    }
    assert_eq!(&out[..GREETING_LEN], b"NBDMAGICIHAVEOPT\x00\x03");
    Heard { out: out.split_off(GREETING_LEN), outcome, rest }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn go(name: &str, wishes: &[u16]) -> Vec<u8> {
    let wishes: Vec<_> = std::iter::once(wishes.len() as u16).chain(wishes.iter().copied()).collect();
    [string(name), wishes.iter().flat_map(|wish| wish.to_be_bytes()).collect()].concat()
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let head = [string(name), (queries.len() as u32).to_be_bytes().to_vec()].concat();
    queries.iter().fold(head, |data, query| [data, string(query)].concat())
}

#[test]
fn export_name_answers_size_and_flags_and_zeroes_unless_declined() {
    for (flags, len) in [(FIXED, 134), (FIXED | NO_ZEROES, 10), (0, 134), (NO_ZEROES, 10)] {
        let heard = Said::flags(flags).opt(opt::EXPORT_NAME, b"vdb").raw(b"request").heard();
        assert_eq!(heard.out.len(), len, "client flags {flags}");
        assert_eq!(heard.out[..8], 12345_u64.to_be_bytes());
        let want = transmission_flag::HAS_FLAGS
            | transmission_flag::READ_ONLY
            | transmission_flag::SEND_FLUSH
            | transmission_flag::SEND_FUA
            | transmission_flag::SEND_CACHE
            | transmission_flag::CAN_MULTI_CONN;
        assert_eq!(heard.out[8..10], want.to_be_bytes());
        assert!(heard.out[10..].iter().all(|byte| *byte == 0));
        assert_eq!(heard.rest, b"request");
        let negotiated = heard.negotiated();
        assert_eq!((negotiated.export.name.as_str(), negotiated.block_sizes_told), ("vdb", false));
    }
}

#[test]
fn the_empty_name_is_the_first_export() {
    assert_eq!(Said::flags(FIXED).opt(opt::EXPORT_NAME, b"").heard().negotiated().export.name, "vda");
    assert_eq!(Said::flags(FIXED).opt(opt::GO, &go("", &[])).heard().negotiated().export.name, "vda");
}

#[test]
fn export_name_has_no_error_but_the_end() {
    for name in [&b"nobody"[..], b"strict", b"\xff", &[b'x'; 4097], &[b'x'; 70_000]] {
        let heard = Said::flags(FIXED).opt(opt::EXPORT_NAME, name).heard();
        assert!(matches!(heard.outcome, Outcome::Closed(Reason::ExportName(_))), "{:?}", heard.outcome);
        assert_eq!(heard.out, b"");
    }
}

#[test]
fn go_tells_what_was_asked_for_and_enters_transmission() {
    let heard = Said::flags(FIXED | NO_ZEROES)
        .opt(opt::STRUCTURED_REPLY, b"")
        .opt(opt::GO, &go("vda", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 99]))
        .raw(b"request")
        .heard();
    let replies = heard.replies();
    assert_eq!(heard.kinds(), [rep::ACK, rep::INFO, rep::INFO, rep::INFO, rep::INFO, rep::ACK]);
    let flags = exports()[0].transmission_flags(Style::Structured, false);
    assert_ne!(flags & transmission_flag::SEND_DF, 0);
    assert_eq!(replies[1].2, [&[0, 0][..], &(1_u64 << 30).to_be_bytes(), &flags.to_be_bytes()].concat());
    assert_eq!(replies[2].2, b"\x00\x01vda");
    assert_eq!(replies[3].2, b"\x00\x02the first");
    assert_eq!(replies[4].2, [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    assert_eq!(heard.rest, b"request");
    let negotiated = heard.negotiated();
    assert!(negotiated.style == Style::Structured && negotiated.block_sizes_told);
    assert_eq!(negotiated.contexts, []);
}

#[test]
fn info_tells_the_same_as_go_and_stays_in_the_handshake() {
    let data = go("vdb", &[info::BLOCK_SIZE]);
    let heard = Said::flags(FIXED).opt(opt::INFO, &data).opt(opt::GO, &data).heard();
    let replies: Vec<_> = heard.replies().into_iter().map(|(_, kind, data)| (kind, data)).collect();
    assert_eq!(replies.len(), 6);
    assert_eq!(replies[..3], replies[3..]);
    assert_eq!(heard.negotiated().export.name, "vdb");
}

#[test]
fn an_export_with_strict_sizes_wants_them_asked_for() {
    let heard =
        Said::flags(FIXED).opt(opt::GO, &go("strict", &[])).opt(opt::GO, &go("strict", &[info::BLOCK_SIZE])).heard();
    assert_eq!(heard.kinds(), [rep::INFO, rep::ERR_BLOCK_SIZE_REQD, rep::INFO, rep::INFO, rep::ACK]);
    assert_eq!(heard.negotiated().export.name, "strict");
}

#[test]
fn list_names_every_export() {
    let heard = Said::flags(FIXED).opt(opt::LIST, b"").opt(opt::LIST, b"x").heard();
    assert_eq!(heard.kinds(), [rep::SERVER, rep::SERVER, rep::SERVER, rep::ACK, rep::ERR_INVALID]);
    assert_eq!(heard.replies()[0].2, b"\x00\x00\x00\x03vdathe first");
    assert_eq!(heard.replies()[1].2, b"\x00\x00\x00\x03vdb");
    assert_eq!(heard.outcome, Outcome::More);
}

#[test]
fn options_that_are_not_here_are_declined_and_change_nothing() {
    for (option, data) in [(4, &b""[..]), (0, b"x"), (!0, b"xyz")] {
        let heard = Said::flags(FIXED).opt(option, data).opt(opt::GO, &go("vda", &[])).heard();
        assert_eq!(heard.kinds(), [rep::ERR_UNSUP, rep::INFO, rep::ACK], "option {option}");
        assert_eq!(heard.replies()[0].0, option);
        assert_eq!(heard.negotiated().style, Style::Simple);
    }
}

#[test]
fn abort_is_answered_whatever_it_carries() {
    let heard = Said::flags(FIXED).opt(opt::ABORT, b"so long").raw(b"more").heard();
    assert_eq!(heard.outcome, Outcome::Closed(Reason::Aborted));
    assert_eq!(heard.kinds(), [rep::ACK]);
}

const MODES: [Tls; 3] = [Tls::Off, Tls::Allowed, Tls::Required];

#[test]
fn before_tls_each_mode_answers_as_the_protocol_has_it() {
    let contexts = queries("vda", &[]);
    let [in_plain, required] = [rep::ACK, rep::ERR_TLS_REQD];
    for (option, data, off, allowed, forced) in [
        (opt::STARTTLS, vec![], rep::ERR_POLICY, rep::ACK, rep::ACK),
        (opt::STARTTLS, vec![0], rep::ERR_POLICY, rep::ERR_INVALID, rep::ERR_INVALID),
        (opt::ABORT, vec![], in_plain, in_plain, in_plain),
        (opt::LIST, vec![], in_plain, in_plain, required),
        (opt::INFO, go("vda", &[]), in_plain, in_plain, required),
        (opt::INFO, go("nobody", &[]), rep::ERR_UNKNOWN, rep::ERR_UNKNOWN, required),
        (opt::GO, go("vda", &[]), in_plain, in_plain, required),
        (opt::STRUCTURED_REPLY, vec![], in_plain, in_plain, required),
        (opt::EXTENDED_HEADERS, vec![], in_plain, in_plain, required),
        (opt::LIST_META_CONTEXT, contexts.clone(), in_plain, in_plain, required),
        (opt::SET_META_CONTEXT, contexts, rep::ERR_INVALID, rep::ERR_INVALID, required),
        (4, vec![], rep::ERR_UNSUP, rep::ERR_UNSUP, required),
        (opt::LIST, vec![0; OPTION_LEN_MAX as usize + 1], rep::ERR_TOO_BIG, rep::ERR_TOO_BIG, required),
    ] {
        for (tls, want) in MODES.into_iter().zip([off, allowed, forced]) {
            let heard = Said::flags(FIXED).opt(option, &data).heard_by(tls, &Said::nothing());
            assert_eq!(heard.kinds().last(), Some(&want), "option {option}, TLS {tls:?}");
            // A refused option tells nothing of an export, and does nothing.
            assert!(want == in_plain || heard.kinds().len() == 1, "option {option}, TLS {tls:?}");
            assert_eq!(heard.outcome == Outcome::StartTls, (option, want) == (opt::STARTTLS, rep::ACK));
        }
    }
}

#[test]
fn a_name_in_plain_closes_where_tls_is_required() {
    let said = Said::flags(FIXED).opt(opt::EXPORT_NAME, b"vda");
    let heard = said.heard_by(Tls::Required, &Said::nothing());
    assert_eq!(heard.outcome, Outcome::Closed(Reason::ExportName("this server requires TLS".into())));
    assert_eq!(heard.out, b"");
    assert_eq!(said.heard_by(Tls::Allowed, &Said::nothing()).negotiated().export.name, "vda");
}

#[test]
fn inside_tls_everything_is_there_but_starttls() {
    for tls in [Tls::Allowed, Tls::Required] {
        let inside = Said::nothing().opt(opt::STARTTLS, b"").opt(opt::LIST, b"").opt(opt::GO, &go("vdb", &[]));
        let heard = Said::flags(FIXED).opt(opt::STARTTLS, b"").heard_by(tls, &inside.raw(b"request"));
        let list = [rep::SERVER, rep::SERVER, rep::SERVER, rep::ACK];
        assert_eq!(heard.kinds(), [&[rep::ACK, rep::ERR_INVALID][..], &list, &[rep::INFO, rep::ACK]].concat());
        assert_eq!(heard.rest, b"request");
        let by_name = Said::nothing().opt(opt::EXPORT_NAME, b"vdb");
        let heard = Said::flags(FIXED).opt(opt::STARTTLS, b"").heard_by(tls, &by_name);
        assert_eq!(heard.negotiated().export.name, "vdb");
    }
}

#[test]
fn what_came_with_starttls_in_plain_ends_the_connection() {
    // Taken for what TLS protects, it would let whoever is on the way choose the export.
    let started = Said::flags(FIXED).opt(opt::STARTTLS, b"");
    for behind in [&b"I"[..], &Said::nothing().opt(opt::GO, &go("vdb", &[])).0, b"\x16\x03\x01"] {
        for tls in [Tls::Allowed, Tls::Required] {
            let said = [&started.0[..], behind].concat();
            let heard = converse(tls, &[&said]);
            assert_eq!(heard.outcome, Outcome::Closed(Reason::BehindStartTls));
            assert_eq!(heard.out, b"", "an ACK would let it go on");
        }
    }
}

#[test]
fn what_was_chosen_in_plain_is_forgotten_inside_tls() {
    let chosen =
        |said: Said, style| said.opt(style, b"").opt(opt::SET_META_CONTEXT, &queries("vda", &[BASE_ALLOCATION]));
    let plain = chosen(Said::flags(FIXED), opt::EXTENDED_HEADERS).opt(opt::STARTTLS, b"");
    let go = Said::nothing().opt(opt::GO, &go("vda", &[]));
    let negotiated = plain.heard_by(Tls::Allowed, &go).negotiated();
    assert_eq!((negotiated.style, negotiated.contexts), (Style::Simple, vec![]));
    // And can be chosen again, another way.
    let again = chosen(Said::nothing(), opt::STRUCTURED_REPLY).raw(&go.0);
    let negotiated = plain.heard_by(Tls::Allowed, &again).negotiated();
    assert_eq!((negotiated.style, negotiated.contexts.len()), (Style::Structured, 1));
}

#[test]
fn contexts_come_after_structured_replies() {
    let data = queries("vda", &[BASE_ALLOCATION]);
    let heard = Said::flags(FIXED).opt(opt::SET_META_CONTEXT, &data).opt(opt::GO, &go("vda", &[])).heard();
    assert_eq!(heard.kinds()[0], rep::ERR_INVALID);
    assert_eq!(heard.negotiated().contexts, []);
}

#[test]
fn a_context_is_given_once_with_its_number() {
    let data = queries("", &["base:", BASE_ALLOCATION, "qemu:dirty-bitmap:x", BASE_ALLOCATION, "base:other", "none"]);
    let heard = Said::flags(FIXED)
        .opt(opt::STRUCTURED_REPLY, b"")
        .opt(opt::SET_META_CONTEXT, &data)
        .opt(opt::GO, &go("vda", &[]))
        .heard();
    assert_eq!(heard.kinds(), [rep::ACK, rep::META_CONTEXT, rep::ACK, rep::INFO, rep::ACK]);
    assert_eq!(heard.replies()[1].2, b"\x00\x00\x00\x01base:allocation");
    assert_eq!(heard.negotiated().contexts, [(1, Context::Allocation)]);
}

#[test]
fn contexts_are_lost_by_another_export_another_choice_and_a_failed_choice() {
    let chosen = || {
        Said::flags(FIXED)
            .opt(opt::STRUCTURED_REPLY, b"")
            .opt(opt::SET_META_CONTEXT, &queries("vda", &[BASE_ALLOCATION]))
    };
    let contexts = |said: Said, name| said.opt(opt::GO, &go(name, &[])).heard().negotiated().contexts.len();
    assert_eq!(contexts(chosen(), "vda"), 1);
    assert_eq!(contexts(chosen(), "vdb"), 0);
    let again = [queries("vdb", &[BASE_ALLOCATION]), queries("vda", &[]), queries("nobody", &["base:"]), vec![1]];
    for data in again.into_iter().chain([vec![0; OPTION_LEN_MAX as usize + 1]]) {
        assert_eq!(contexts(chosen().opt(opt::SET_META_CONTEXT, &data), "vda"), 0, "{} bytes", data.len());
    }
    let listed = chosen().opt(opt::LIST_META_CONTEXT, &queries("vda", &[]));
    assert_eq!(contexts(listed, "vda"), 1, "looking chooses nothing");
}

#[test]
fn extended_headers_imply_chunks_and_have_no_way_back() {
    let heard = Said::flags(FIXED)
        .opt(opt::STRUCTURED_REPLY, b"")
        .opt(opt::EXTENDED_HEADERS, b"x")
        .opt(opt::EXTENDED_HEADERS, b"")
        .opt(opt::STRUCTURED_REPLY, b"")
        .opt(opt::EXTENDED_HEADERS, b"")
        .opt(opt::SET_META_CONTEXT, &queries("vda", &[BASE_ALLOCATION, "qemu:allocation-depth"]))
        .opt(opt::GO, &go("vda", &[]))
        .heard();
    let mut want = vec![rep::ACK, rep::ERR_INVALID, rep::ACK, rep::ERR_EXT_HEADER_REQD, rep::ACK];
    want.extend([rep::META_CONTEXT, rep::META_CONTEXT, rep::ACK, rep::INFO, rep::ACK]);
    assert_eq!(heard.kinds(), want);
    let told = u16::from_be_bytes(heard.replies()[8].2[10..12].try_into().expect("two bytes"));
    let negotiated = heard.negotiated();
    assert_eq!(negotiated.style, Style::Extended);
    assert_eq!(negotiated.contexts, [(1, Context::Allocation), (2, Context::Depth)]);
    assert_ne!(told & transmission_flag::BLOCK_STATUS_PAYLOAD, 0);
    let without = Said::flags(FIXED).opt(opt::EXTENDED_HEADERS, b"").opt(opt::GO, &go("vda", &[])).heard();
    assert_eq!(without.negotiated().transmission_flags() & transmission_flag::BLOCK_STATUS_PAYLOAD, 0);
}

#[test]
fn contexts_can_be_listed() {
    for (data, kinds) in [
        (queries("vda", &[]), &[rep::META_CONTEXT, rep::META_CONTEXT, rep::ACK][..]),
        (queries("vda", &["qemu:"]), &[rep::META_CONTEXT, rep::ACK]),
        (queries("vda", &["base:"]), &[rep::META_CONTEXT, rep::ACK]),
        (queries("vda", &["x-other:", BASE_ALLOCATION]), &[rep::META_CONTEXT, rep::ACK]),
        (queries("vda", &["x-other:", "base:else"]), &[rep::ACK]),
        (queries("nobody", &[]), &[rep::ERR_UNKNOWN]),
        (queries("vda", &["q"; 10_000]), &[rep::ACK]),
    ] {
        assert_eq!(Said::flags(FIXED).opt(opt::LIST_META_CONTEXT, &data).heard().kinds(), kinds);
    }
}

#[test]
fn surplus_behind_the_queries_is_invalid_and_never_the_next_option() {
    // qemu-nbd took the surplus for the next option.
    let abort = Said(Vec::new()).opt(opt::ABORT, b"").0;
    let data = [queries("vda", &[BASE_ALLOCATION]), abort].concat();
    let heard = Said::flags(FIXED)
        .opt(opt::STRUCTURED_REPLY, b"")
        .opt(opt::SET_META_CONTEXT, &data)
        .opt(opt::GO, &go("vda", &[]))
        .heard();
    assert_eq!(heard.kinds(), [rep::ACK, rep::ERR_INVALID, rep::INFO, rep::ACK]);
    assert_eq!(heard.negotiated().contexts, []);
}

#[test]
fn strings_too_long_are_too_big() {
    let long = "x".repeat(4097);
    for (option, data) in [
        (opt::GO, go(&long, &[])),
        (opt::LIST_META_CONTEXT, queries(&long, &[])),
        (opt::LIST_META_CONTEXT, queries("vda", &[&long])),
    ] {
        assert_eq!(Said::flags(FIXED).opt(option, &data).heard().kinds(), [rep::ERR_TOO_BIG]);
    }
}

#[test]
fn unoffered_client_flags_and_a_wrong_magic_end_it() {
    assert_eq!(Said::flags(4 | FIXED).heard().outcome, Outcome::Closed(Reason::ClientFlags(5)));
    let heard = Said::flags(FIXED).raw(b"IHAVEOPS\x00\x00\x00\x03\x00\x00\x00\x00").heard();
    assert!(matches!(heard.outcome, Outcome::Closed(Reason::Magic(_))));
}

#[test]
fn without_fixed_newstyle_only_export_name_is_spoken() {
    for option in [opt::LIST, opt::GO, opt::ABORT, 77] {
        let heard = Said::flags(0).opt(option, b"").heard();
        assert_eq!(heard.outcome, Outcome::Closed(Reason::NotFixed(option)));
        assert_eq!(heard.out, b"");
    }
}

#[test]
fn long_data_is_skipped_and_longer_data_ends_it() {
    for len in [OPTION_LEN_MAX + 1, OPTION_SKIP_MAX] {
        let heard = Said::flags(FIXED).opt(opt::LIST, &vec![b'I'; len as usize]).opt(opt::ABORT, b"").heard();
        assert_eq!(heard.kinds(), [rep::ERR_TOO_BIG, rep::ACK]);
    }
    let header = [&OPTION_MAGIC.to_be_bytes()[..], &[0, 0, 0, 3], &(OPTION_SKIP_MAX + 1).to_be_bytes()].concat();
    let want = Reason::OptionTooLong { option: opt::LIST, len: OPTION_SKIP_MAX + 1 };
    assert_eq!(Said::flags(FIXED).raw(&header).heard().outcome, Outcome::Closed(want));
}

#[test]
fn a_client_that_never_ends_is_ended() {
    let said = (0..OPTIONS_MAX).fold(Said::flags(FIXED), |said, _| said.opt(opt::STRUCTURED_REPLY, b""));
    let heard = said.heard();
    assert_eq!((heard.outcome, heard.out.len()), (Outcome::More, OPTIONS_MAX as usize * 20));
    let said = (0..=OPTIONS_MAX).fold(Said::flags(FIXED), |said, _| said.opt(opt::STRUCTURED_REPLY, b""));
    assert_eq!(said.heard().outcome, Outcome::Closed(Reason::TooManyOptions));
}

#[test]
fn one_step_answers_one_option() {
    // So what waits to be sent is bounded by one option's replies, however many are piped in.
    let said = (0..3).fold(Said::flags(FIXED), |said, _| said.opt(opt::LIST, b""));
    let mut out = Vec::new();
    let mut handshake = Handshake::new(Tls::Off, &mut out);
    let mut input = &said.0[..];
    for left in [2, 1, 0] {
        out.clear();
        assert_eq!(handshake.step(&mut input, &exports()[..], &mut out), Outcome::More);
        assert_eq!(input.len(), left * OPTION_HEADER_LEN);
        assert_eq!(out.iter().filter(|byte| **byte == b'v').count(), 2);
    }
}

/// Conversations of right and wrong options, in any order.
fn conversation() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("vda"), Just("vdb"), Just("strict"), Just(""), Just("nobody")];
    let data = prop_oneof![
        (name.clone(), any::<bool>()).prop_map(|(name, ask)| go(name, if ask { &[info::BLOCK_SIZE] } else { &[] })),
        (name.clone(), any::<bool>())
            .prop_map(|(name, ask)| queries(name, if ask { &[BASE_ALLOCATION] } else { &["base:"] })),
        name.prop_map(|name| name.as_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 0..40),
        (OPTION_LEN_MAX as usize..OPTION_LEN_MAX as usize + 3).prop_map(|len| vec![0; len]),
    ];
    // GO, INFO and EXPORT_NAME seldom, for they end it.
    let option = prop_oneof![8 => 2_u32..12, 8 => 8_u32..12, 1 => any::<u32>(), 1 => Just(1)];
    (0_u32..5, prop::collection::vec((option, data), 0..8), prop::collection::vec(any::<u8>(), 0..30)).prop_map(
        |(flags, options, tail)| {
            let said = options.iter().fold(Said::flags(flags), |said, (option, data)| said.opt(*option, data));
            said.raw(&tail).0
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_pieces_that_bytes_come_in_make_no_difference(
        said in conversation(), sizes in prop::collection::vec(1_usize..50, 1..40)
    ) {
        let whole = converse(Tls::Off, &[&said]);
        let mut pieces = Vec::new();
        let mut rest = &said[..];
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            // Long data in small pieces would take long and show nothing.
            let size = if rest.len() > 2000 { size * 700 } else { *size };
            let (piece, after) = rest.split_at(size.min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        prop_assert_eq!(converse(Tls::Off, &pieces), whole);
    }
}
